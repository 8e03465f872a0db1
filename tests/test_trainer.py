"""The trainer: it learns, counts right, saves on the way, and says what is wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from studytiny import DialogueModel, Generator, SamplingConfig, UserError, load_checkpoint
from studytiny.checkpoint import load_folder
from train import ConvDataset, DialogueDataset, TrainConfig, TransformerTrainer
from train.config import learning_rate
from train.corpus import is_held_out
from train.snapshots import delete_snapshots, newest_step

ROOT = Path(__file__).parent.parent
PAIRS = [["一二三", "三二一"], ["四五", "五四"], ["六七八九", "九八七六"], ["十", "十"]] * 8


def make_trainer(tmp_path, dialogues=PAIRS, batch_size=2, **settings):
    torch.manual_seed(0)
    corpus = ConvDataset.from_dialogues(dialogues)
    tokenizer = corpus.build_vocab()
    dataset = DialogueDataset(corpus, tokenizer, max_length=32)
    model = DialogueModel(tokenizer.vocab_size, d_model=32, n_head=4, n_layers=2, max_length=32)
    config = {"lr": 5e-3, "user_share": 0.0, "out": str(tmp_path / "out"), "use_amp": False, **settings}
    return TransformerTrainer(model, DataLoader(dataset, batch_size=batch_size), "cpu", config)


def test_training_learns_the_corpus(tmp_path):
    trainer = make_trainer(tmp_path, epochs=60, save_every=60)
    trainer.train()
    model, tokenizer = load_folder(tmp_path / "out", "cpu")
    generator = Generator(model, tokenizer)
    for question, answer in PAIRS[:4]:
        if not is_held_out([question]):
            assert generator.reply([{"role": "user", "content": question}], SamplingConfig(temperature=0)) == answer


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    """However the rows are split, the gradient is that of the mean over all labels; a last odd batch counts too."""
    weights = []
    rows = len(make_trainer(tmp_path, batch_size=1).train_loader)
    assert rows % 3
    for batch_size, steps in ((rows, 1), (1, rows), (3, rows)):
        trainer = make_trainer(tmp_path / str(batch_size), batch_size=batch_size, grad_accum_steps=steps)
        loss = trainer.step(next(trainer._batches()), 1e-3)
        weights.append((loss, trainer.model.embed_tokens.weight.detach()))
    for loss, weight in weights[1:]:
        assert loss == pytest.approx(weights[0][0], rel=1e-5)
        torch.testing.assert_close(weight, weights[0][1], atol=1e-6, rtol=1e-4)


def test_every_batch_of_an_epoch_is_learnt_from(tmp_path):
    trainer = make_trainer(tmp_path, batch_size=1, grad_accum_steps=3, epochs=2, patience=99)
    rows = len(trainer.train_loader)
    assert rows % 3
    trainer.train()
    assert trainer.steps == 2 * -(-rows // 3)


def test_printed_loss_is_nats_per_token(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.train_loader))
    labels = batch["labels"]
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], batch["segments"])
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
    assert trainer.step([batch], 1e-3) == pytest.approx(expected.item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(lr=1.0, warmup=0.1, decay=0.6)
    rates = [learning_rate(i / 100, config) for i in range(101)]
    assert max(rates) == rates[10] == rates[40] == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[40:] == sorted(set(rates[40:]), reverse=True)
    assert rates[-1] == 0
    assert rates[0] > 0
    assert learning_rate(0.0, TrainConfig(lr=1.0, warmup=0.0)) == 1.0


def test_run_folder_is_a_model_with_its_history(tmp_path):
    history = make_trainer(tmp_path, [[f"{i}", "好"] for i in range(300)], epochs=4, save_every=2).train()
    assert [entry["epoch"] for entry in history] == [1, 3]
    assert all(entry["bits_per_char"] > 0 for entry in history)
    _, optimizer, _, _, config = load_checkpoint(tmp_path / "out", "cpu")
    assert optimizer is None
    assert config["history"] == history
    assert config["lr"] == 5e-3


def broken_from(trainer, step, until=10**9):
    """Makes the weights of ``trainer`` useless in the steps between."""
    take = trainer.step
    trainer.step = lambda batches, rate: take(batches, float("inf") if step <= trainer.steps < until else rate)
    return trainer


def test_loss_that_is_no_number_stops_the_run_and_keeps_the_last_save(tmp_path):
    trainer = broken_from(make_trainer(tmp_path, epochs=4, save_every=1), step=12)
    with pytest.raises(UserError, match="lr"):
        trainer.train()
    assert trainer.steps > len(trainer.train_loader)
    load_folder(tmp_path / "out", "cpu")
    assert newest_step(tmp_path / "out") == 12


def test_one_loss_that_is_no_number_is_skipped(tmp_path):
    trainer = make_trainer(tmp_path, epochs=4)
    compute = trainer.compute_loss

    def compute_loss(batch):
        loss, shown = compute(batch)
        return (loss * float("nan"), shown * float("nan")) if trainer.steps == 5 else (loss, shown)

    trainer.compute_loss = compute_loss
    trainer.train()
    load_folder(tmp_path / "out", "cpu")
    assert trainer.history[-1]["loss"] < 5


def test_folder_that_holds_a_model_or_a_run_is_not_overwritten(tmp_path):
    make_trainer(tmp_path).save()
    with pytest.raises(UserError, match="--resume"):
        make_trainer(tmp_path)
    delete_snapshots(tmp_path / "out")
    with pytest.raises(UserError, match="已经有一个模型"):
        make_trainer(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0},
        {"lr": float("nan")},
        {"epochs": 0},
        {"minutes": 0},
        {"minutes": -1.0},
        {"save_every": 1.5},
        {"speed": 1},
    ],
)
def test_wrong_setting_is_named(tmp_path, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        make_trainer(tmp_path, **settings)


def test_model_of_another_vocabulary_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(UserError, match="DialogueModel"):
        TransformerTrainer(DialogueModel(50, 32, 4, 2), trainer.train_loader, "cpu", {})


# The command, as a user types it.


def run_train(*arguments, **options):
    command = [sys.executable, "-m", "train", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300, **options)


def write_corpus(path, encoding="utf-8"):
    lines = [f"E\r\nM 第{i}个问题\r\nM 第{i}个回答\r\nM 然后呢\r\n" for i in range(200)]
    lines.insert(5, "E\r\nM 空的\r\nM\r\n")
    path.write_bytes("".join(lines).encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8-sig"])
def test_a_file_a_user_brings_is_trained_evaluated_and_chatted_with(tmp_path, encoding):
    corpus = write_corpus(tmp_path / "我的 对话.conv", encoding)
    out = tmp_path / "run"
    result = run_train("--corpus", corpus, "--minutes", "0.05", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "可用于学习 200 段" in result.stdout
    assert "空的一句" in result.stdout
    assert "句数是奇数" in result.stdout
    command = [sys.executable, "-m", "train.evaluate", str(out), "--corpus", str(corpus), "--json"]
    measured = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True).stdout)
    assert measured.keys() >= {
        "bits_per_char", "perplexity", "dialogues", "characters", "unknown_rate", "distinct_1", "distinct_2",
        "mean_reply_chars", "repetition_rate", "profanity_rate", "seconds",
    }  # fmt: skip
    assert measured["dialogues"] == sum(is_held_out([f"第{i}个问题"]) for i in range(200))
    command = [sys.executable, "-m", "studytiny.chat", "--model", str(out)]
    chat = subprocess.run(command, cwd=ROOT, capture_output=True, input="第1个问题\nexit\n".encode(), timeout=300)
    assert chat.returncode == 0
    assert not chat.stderr.count(b"Traceback")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--corpus", "没有这个.conv"], "找不到语料"),
        (["--corpus", "{empty}"], "没有可学的对话"),
        (["--corpus", "{picture}"], "UTF-8"),
        (["--corpus", "{good}", "--minutes", "0"], "minutes"),
        (["--corpus", "{good}", "--epochs", "-3"], "epochs"),
        (["--corpus", "{good}", "--threads", "0"], "threads"),
        (["--corpus", "{good}", "--out", "{good}"], "good.conv"),
    ],
)
def test_mistakes_get_one_sentence_and_write_nothing(tmp_path, arguments, named):
    names = {"empty": tmp_path / "empty.conv", "picture": tmp_path / "a.png", "good": tmp_path / "good.conv"}
    names["empty"].write_bytes(b"")
    names["picture"].write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xff\x80\x00")
    write_corpus(names["good"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = [argument.format(**names) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "run")]
    result = run_train(*arguments)
    assert result.returncode == 2
    errors = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    assert errors[-1].startswith("错误：")
    assert named in errors[-1]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C cannot be sent to one process there")
def test_interrupt_saves_a_model(tmp_path):
    corpus = write_corpus(tmp_path / "a.conv")
    command = [sys.executable, "-m", "train", "--corpus", str(corpus), "--minutes", "5", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        while b"%|" not in process.stderr.read(16):
            pass
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    load_folder(tmp_path / "run", "cpu")
