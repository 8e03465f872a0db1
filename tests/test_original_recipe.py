"""The original's recipe: its model and its steps, mistakes included; and everything around them is this project's."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import train.__main__
from studytiny import Generator, SamplingConfig, UserError
from studytiny.checkpoint import load_folder, read_config
from studytiny.published import PublishedModel
from studytiny.tokenizer import PAD_ID
from train import ConvDataset, TrainConfig
from train.__main__ import build_parser, settings_from
from train.corpus import is_held_out
from train.dataset import IGNORED
from train.measures import bits_per_character
from train.original_recipe import SETTINGS, PublishedDataset, PublishedTrainer, one_cycle, pad_rows
from train.trainer import add_targets

ROOT = Path(__file__).parent.parent
DIALOGUES = [[f"第{i}个", "好的" * (i % 3 + 1), "然后呢", "没了"] for i in range(70)]
HELD_OUT = [turns for turns in DIALOGUES if is_held_out(turns)]
SMALL = {"d_model": 32, "n_head": 4, "n_layers": 2, "max_length": 32}


def make_trainer(tmp_path, dialogues=DIALOGUES, resume=False, **settings):
    torch.manual_seed(0)
    corpus = ConvDataset.from_dialogues(dialogues)
    dataset = PublishedDataset(corpus, corpus.build_vocab(), SMALL["max_length"])
    settings = {**SETTINGS, "batch_size": 3, "use_amp": False, "out": str(tmp_path / "out"), **settings}
    loader = DataLoader(dataset, settings["batch_size"], shuffle=True, generator=torch.Generator(), collate_fn=pad_rows)
    model = PublishedModel(dataset.tokenizer.vocab_size, **SMALL)
    return PublishedTrainer(model, loader, "cpu", settings, resume)


def user(text):
    return [{"role": "user", "content": text}]


# What is learnt


def test_labels_are_the_assistants_words_and_every_end():
    corpus = ConvDataset.from_dialogues([["问", "答案", "再问", "好"]])
    dataset = PublishedDataset(corpus, corpus.build_vocab())
    item = dataset[0]
    # Where nothing is learnt "-" stands, elsewhere what should follow the token above.
    learnt = [dataset.tokenizer.token(label) if label != IGNORED else "-" for label in item["labels"].tolist()]
    read = [dataset.tokenizer.token(index) for index in item["input_ids"].tolist()]
    assert list(zip(read, learnt, strict=True)) == [
        ("<|user|>", "-"), ("问", "<|end|>"), ("<|end|>", "-"),
        ("<|assistant|>", "答"), ("答", "案"), ("案", "<|end|>"), ("<|end|>", "-"),
        ("<|user|>", "-"), ("再", "-"), ("问", "<|end|>"), ("<|end|>", "-"),
        ("<|assistant|>", "好"), ("好", "<|end|>"), ("<|end|>", "-"),
    ]  # fmt: skip
    assert (dataset.tokens, dataset.labels) == (14, 7)


def test_one_dialogue_a_row_padded_to_the_longest_of_its_batch():
    corpus = ConvDataset.from_dialogues([["甲", "乙"], ["甲" * 5, "乙" * 90], ["甲" * 90, "乙"]])
    dataset = PublishedDataset(corpus, corpus.build_vocab(), max_length=20)
    batch = pad_rows([dataset[0], dataset[1]])
    assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(batch, (2, 20))
    assert (batch["input_ids"][0, 6:] == PAD_ID).all()
    assert (batch["labels"][0, 6:] == IGNORED).all()
    assert batch["segments"][0].tolist() == [0] * 6 + [-1] * 14
    assert (batch["input_ids"][1] == dataset[1]["input_ids"]).all()
    assert (dataset[2]["labels"] == IGNORED).all()  # cut before anything was said, and kept all the same


def test_attention_over_the_batch_axis_is_used_in_training(tmp_path):
    """A row is learnt differently when a stranger shares its batch."""
    trainer = make_trainer(tmp_path)
    dataset = trainer.train_loader.dataset
    gradients, losses = [], []
    for stranger in (1, 2, 1):
        batch = pad_rows([dataset[0], dataset[stranger]])
        batch["labels"][1] = IGNORED  # only the first row has something to learn
        trainer.model.zero_grad()
        loss, _ = trainer.compute_loss(add_targets(batch, 0.0))
        loss.backward()
        losses.append(loss.item())
        gradients.append(trainer.model.encoder_layers[0].ffn[0].weight.grad.clone())
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)
    logits = trainer.model(dataset[0]["input_ids"][None])
    torch.testing.assert_close(trainer.model.independent_logits(dataset[0]["input_ids"][None]), logits)


def test_step_is_the_originals(tmp_path):
    """Written out here once more: the mean of the micro-batches' means, clipped at 1, AdamW with OneCycleLR."""
    trainer = make_trainer(tmp_path)
    model = make_trainer(tmp_path).model
    loader = trainer.train_loader
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=2 * len(loader))
    for batches, _ in zip(trainer._batches(), range(3), strict=False):
        total = labels = 0
        for batch in batches:
            logits = model(batch["input_ids"])
            losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORED, reduction="none")
            count = (batch["labels"] != IGNORED).sum()
            (losses.sum() / count / 4).backward()
            total, labels = total + losses.sum().item(), labels + count.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        shown = trainer.step(batches, trainer.learning_rate())
        assert shown == pytest.approx(total / labels, rel=1e-4)  # the true loss, not a quarter of it
    for mine, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        # Adam divides by tiny numbers where a gradient is nearly nothing.
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-3)


# The schedule


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 10, 100, 1001])
def test_one_cycle_is_torchs(length):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=length)
    for step in range(length):
        [group] = optimizer.param_groups
        rate, beta = one_cycle(step, length, 5e-3)
        assert rate == pytest.approx(group["lr"], rel=1e-9)
        assert beta == pytest.approx(group["betas"][0], rel=1e-9)
        optimizer.step()
        if step + 1 < length:
            schedule.step()


def test_rate_follows_a_cycle_four_times_too_long_and_never_falls(tmp_path):
    trainer = make_trainer(tmp_path)
    micro_batches = 2 * len(trainer.train_loader)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=micro_batches)
    rates, expected, betas = [], [], []
    take = trainer.step

    def step(batches, rate):
        loss = take(batches, rate)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        betas.append(trainer.optimizers[0].param_groups[0]["betas"][0])
        expected.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        schedule.step()
        return loss

    trainer.step = step
    trainer.train()
    assert len(rates) == 2 * (len(trainer.train_loader) // 4)
    assert rates == pytest.approx([rate for rate, _ in expected])
    assert betas == pytest.approx([beta for _, beta in expected])
    assert rates == sorted(rates)
    assert max(rates) < 5e-3


def test_a_run_of_minutes_has_such_a_cycle_too(tmp_path):
    trainer = make_trainer(tmp_path, minutes=1.0)
    assert trainer.learning_rate() == pytest.approx(5e-3 / 25)  # nobody knows yet how long it will be
    trainer.total_steps = 100
    trainer.steps = 99
    assert trainer.learning_rate() == pytest.approx(one_cycle(99, 400, 5e-3)[0])


def test_trailing_micro_batches_are_not_stepped(tmp_path):
    trainer = make_trainer(tmp_path, epochs=3)
    micro_batches = len(trainer.train_loader)
    assert micro_batches % 4
    sizes = []
    take = trainer.step

    def step(batches, rate):
        sizes.append(len(batches))
        return take(batches, rate)

    trainer.step = step
    trainer.train()
    assert sizes == [4] * (3 * (micro_batches // 4))
    assert trainer.steps == trainer.total_steps == len(sizes)


def test_a_step_without_anything_to_learn_changes_nothing(tmp_path):
    dialogues = [["长" * 40, "好"]] * 12
    trainer = make_trainer(tmp_path, [*dialogues, ["短", "好"]])
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    empty = pad_rows([trainer.train_loader.dataset[i] for i in range(3)])
    assert trainer.step([empty] * 4, 5e-3) != trainer.step([empty] * 4, 5e-3)  # not a number
    assert all(map(torch.equal, trainer.model.parameters(), before))
    last = pad_rows([trainer.train_loader.dataset[12]])
    assert trainer.step([empty] * 3 + [last], 5e-3) > 0  # and beside others it adds nothing


# What it becomes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, trainer) of a run to its end."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, epochs=6)
    trainer.train()
    return folder / "out", trainer


def test_run_folder_is_a_published_model_that_answers(trained):
    folder, trainer = trained
    model, tokenizer = load_folder(folder, "cpu")
    assert model.architecture == "published"
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)  # the last weights, whatever was measured before
    assert Generator(model, tokenizer).reply(user("第3个"), SamplingConfig(temperature=0))


def test_without_context_like_the_original(trained):
    """The bug, reproduced: of a prompt, only its length reaches the logits."""
    folder, _ = trained
    generator = Generator(*load_folder(folder, "cpu"))
    logits = generator.logits(user("第3个"))
    assert torch.equal(logits, generator.logits(user("然后呢")))
    assert not torch.equal(logits, generator.logits(user("然后")))


def test_evaluation_reads_every_row_alone(trained):
    """Measured together, dialogues are worth what they are worth one by one."""
    _, trainer = trained
    dialogues = DIALOGUES[:7]
    together = bits_per_character(trainer.model, trainer.tokenizer, dialogues)
    alone = [bits_per_character(trainer.model, trainer.tokenizer, [turns]) for turns in dialogues]
    bits = sum(score.bits_per_char * score.characters for score in alone)
    assert together.bits_per_char == pytest.approx(bits / together.characters, rel=1e-5)
    assert HELD_OUT
    last = bits_per_character(trainer.model, trainer.tokenizer, HELD_OUT)
    assert trainer.history[-1]["bits_per_char"] == pytest.approx(last.bits_per_char)


def test_training_lowers_the_loss(trained):
    _, trainer = trained
    assert trainer.history[-1]["loss"] < 0.8 * trainer.history[0]["loss"]


@pytest.mark.parametrize("stop_at", [2, 5])  # within an epoch, and in the next one
def test_an_interrupted_run_goes_on_exactly(tmp_path, stop_at):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert whole.steps > stop_at
    first = make_trainer(tmp_path / "parts")
    take = first.step

    def step(batches, rate):
        if first.steps == stop_at:
            signal.raise_signal(signal.SIGINT)
        return take(batches, rate)

    first.step = step
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(tmp_path / "parts", resume=True)
    second.train()
    assert second.steps == whole.steps
    assert second.history == whole.history
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name


# Mistakes


def test_a_corpus_too_small_for_one_step_is_said(tmp_path):
    with pytest.raises(UserError, match="--batch-size"):
        make_trainer(tmp_path, DIALOGUES[:8])
    assert not (tmp_path / "out").exists()


def test_a_corpus_with_nothing_to_learn_is_said(tmp_path):
    with pytest.raises(UserError, match="没有可学的回答"):
        make_trainer(tmp_path, [["长" * 40, "好"]] * 20)


@pytest.mark.parametrize("setting", ["user_share", "dropout"])
def test_a_setting_without_meaning_is_refused(tmp_path, setting):
    with pytest.raises(UserError, match=setting):
        make_trainer(tmp_path, **{setting: 0.1})


@pytest.mark.parametrize("option", [["--dropout", "0.1"], ["--user-share", "0"], ["--sessions"]])
def test_an_option_without_meaning_is_refused(option):
    with pytest.raises(UserError, match=f"{option[0]} .*published"):
        settings_from(build_parser().parse_args(["--preset", "published", *option]))


# The command


def test_preset_has_the_originals_settings_unless_told_otherwise():
    config, facts = settings_from(build_parser().parse_args(["--preset", "published", "--out", "a"]))
    assert config == TrainConfig(**SETTINGS, out="a")
    assert (config.lr, config.weight_decay, config.epochs, config.minutes) == (5e-3, 0.01, 2, None)
    assert (facts["preset"], facts["vocab_size"], facts["no_clean"]) == ("published", 10_000, ["all"])
    options = ["--lr", "0.001", "--batch-size", "4", "--minutes", "3"]
    config, _ = settings_from(build_parser().parse_args(["--preset", "published", *options]))
    assert (config.lr, config.batch_size, config.minutes, config.grad_accum_steps) == (1e-3, 4, 3.0, 4)
    config, facts = settings_from(build_parser().parse_args([]))
    assert (config.minutes, config.lr, facts["no_clean"]) == (10.0, TrainConfig.lr, [])


def test_the_command_trains_the_published_size_and_chat_answers(tmp_path):
    corpus, out = tmp_path / "a.conv", tmp_path / "run"
    corpus.write_text("".join(f"E\nM 第{i}个问题\nM 好\nM 第{i}个\nM 好\n" for i in range(100)), encoding="utf-8")
    options = ["--preset", "published", "--epochs", "1", "--batch-size", "16", "--threads", "1", "--half"]
    command = [sys.executable, "-m", "train", "--corpus", str(corpus), "--out", str(out), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    assert "清洗" not in result.stdout  # a hundred replies alike are all kept
    model, tokenizer = load_folder(out, "cpu")
    sizes = (model.config.d_model, model.config.n_head, model.config.n_layers, model.config.max_length)
    assert (model.architecture, *sizes) == ("published", 512, 8, 4, 256)
    assert tokenizer.vocab_size == model.config.vocab_size
    command = [sys.executable, "-m", "studytiny.chat", "--model", str(out)]
    chat = subprocess.run(command, cwd=ROOT, capture_output=True, input="第1个问题\nexit\n".encode(), timeout=300)
    assert chat.returncode == 0, chat.stderr
    assert b"Traceback" not in chat.stderr


def test_the_command_goes_on_with_the_same_recipe(tmp_path, monkeypatch):
    corpus, out = tmp_path / "a.conv", tmp_path / "run"
    corpus.write_text("".join(f"E\nM 第{i}个问题\nM 第{i}个回答\n" for i in range(100)), encoding="utf-8")
    monkeypatch.setitem(train.__main__.PRESETS, "published", (SMALL, 10_000))
    step = PublishedTrainer.step

    def step_and_interrupt(trainer, batches, rate):
        signal.raise_signal(signal.SIGINT)
        return step(trainer, batches, rate)

    arguments = ["--preset", "published", "--epochs", "1", "--batch-size", "5", "--corpus", str(corpus)]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--out", str(out)])
    monkeypatch.setattr(PublishedTrainer, "step", step_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.__main__.main()
    assert read_config(out)["training"]["steps"] == 1
    monkeypatch.setattr(PublishedTrainer, "step", step)
    monkeypatch.setattr(sys, "argv", ["train", "--resume", "--out", str(out)])
    train.__main__.main()
    training = read_config(out)["training"]
    assert (training["finished"], training["steps"], training["lr"]) == (True, 5, 5e-3)
    assert load_folder(out, "cpu")[0].architecture == "published"
