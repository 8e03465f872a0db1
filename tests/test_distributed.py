"""Training in two processes: the losses of one process, the same weights in both, and one voice."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from studytiny import DialogueModel
from studytiny.checkpoint import hash_tensors, load_folder
from train import ConvDataset, DialogueDataset, TrainConfig, TransformerTrainer
from train.run_log import read_metrics
from train.snapshots import newest_step

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun's processes are stopped in another way there")

ROOT = Path(__file__).parent.parent
TINY = {"d_model": 32, "n_head": 4, "n_layers": 2, "max_length": 32}
PAIRS = [[f"第{i}个问题", f"第{i * 7 % 90}个回答"] for i in range(112)]


def make_trainer(out, resume=False, **settings):
    torch.manual_seed(0)
    corpus = ConvDataset.from_dialogues(PAIRS)
    tokenizer = corpus.build_vocab()
    dataset = DialogueDataset(corpus, tokenizer, TINY["max_length"])
    batch_size = next(size for size in range(5, 12) if len(dataset) % size == 1)  # the last batch: less than processes
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=torch.Generator())
    config = TrainConfig(lr=2e-3, epochs=4, use_amp=False, patience=99, out=str(out), **settings)
    return TransformerTrainer(DialogueModel(tokenizer.vocab_size, **TINY), loader, "cpu", config, resume)


def train_all(folder):
    """What each of the processes does: a run, the same with dropout, and that once more, stopped and resumed."""
    make_trainer(folder / "plain").train()
    trainer = make_trainer(folder / "dropout", dropout=0.2, grad_accum_steps=2)
    trainer.train()
    expected = hash_tensors(trainer.model.state_dict())
    trainer = make_trainer(folder / "resumed", dropout=0.2, grad_accum_steps=2)
    take = trainer.step

    def step(batches, rate):
        loss = take(batches, rate)
        if trainer.steps == 7 and trainer.group.rank == 1:  # one is told, all stop
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    trainer.step = step
    try:
        trainer.train()
    except KeyboardInterrupt:
        trainer = make_trainer(folder / "resumed", True, dropout=0.2, grad_accum_steps=2)
        trainer.train()
        resumed = hash_tensors(trainer.model.state_dict())
        (folder / f"{trainer.group.rank}.txt").write_text(f"{expected} {resumed}", encoding="utf-8")
    trainer.group.leave()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(script, *arguments):
    """``torchrun --nproc_per_node 2 script``, in a session of its own, as in a terminal of its own."""
    options = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # Without OMP_NUM_THREADS torchrun itself prints advice.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        start_new_session=True,
    )  # fmt: skip


def finish(process):
    """What it printed, and what it complained of."""
    try:
        return process.communicate(timeout=240)
    finally:
        process.kill()


def losses(out):
    return [(line["step"], line["loss"]) for line in read_metrics(out)[0]]


def test_two_processes_learn_what_one_learns(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom test_distributed import train_all\ntrain_all(Path(sys.argv[1]))\n",
        encoding="utf-8",
    )
    process = launch(script, tmp_path)
    printed, complaints = finish(process)
    assert process.returncode == 0, complaints
    assert "Traceback" not in complaints
    assert "Warning" not in complaints
    assert complaints.count("训练   0%") == 3  # one bar a run (the resumed one begins later), not one a process
    assert printed.count("收到中断") == 1

    make_trainer(tmp_path / "alone").train()
    together = losses(tmp_path / "plain")
    assert [step for step, _ in together] == [step for step, _ in losses(tmp_path / "alone")]
    for (step, loss), (_, expected) in zip(together, losses(tmp_path / "alone"), strict=True):
        # Sums in another order differ in the last bit, and training makes that grow.
        assert loss == pytest.approx(expected, rel=1e-5 if step <= 8 else 1e-2)

    [first, second] = [(tmp_path / f"{rank}.txt").read_text(encoding="utf-8").split() for rank in (0, 1)]
    assert first == second  # both processes hold the same weights, to the bit
    assert first[0] == first[1]  # as does a run that was stopped and resumed
    assert losses(tmp_path / "resumed") == losses(tmp_path / "dropout")


COMMAND = f"""
import time
from studytiny.command import run_command
from train import __main__ as command
from train.trainer import TransformerTrainer
command.PRESETS["mini"] = ({TINY}, 5_000)
take = TransformerTrainer.step
def step(*arguments):
    time.sleep(0.02)
    return take(*arguments)
TransformerTrainer.step = step
run_command(command.speak_once)
"""


@pytest.fixture
def command(tmp_path):
    """``python -m train`` with a smaller model, as a script for torchrun; and its options."""
    script, corpus = tmp_path / "train.script", tmp_path / "corpus.conv"
    script.write_text(COMMAND, encoding="utf-8")
    corpus.write_text("".join(f"E\nM {user}\nM {reply}\n" for user, reply in PAIRS), encoding="utf-8")
    return [script, "--corpus", corpus, "--no-clean", "all", "--out", tmp_path / "out"]


def test_too_few_rows_for_the_processes_is_one_sentence(tmp_path, command):
    process = launch(*command, "--batch-size", 1)
    _, complaints = finish(process)
    assert process.returncode
    assert complaints.count("错误：") == 1
    assert "Warning" not in complaints
    assert "--batch-size" in complaints
    assert not (tmp_path / "out").exists()


def test_command_in_two_processes_is_stopped_and_resumed(tmp_path, command):
    """SIGTERM to the launcher, then Ctrl-C in its terminal."""
    out = tmp_path / "out"
    step = 0
    for number, arguments in (
        (signal.SIGTERM, [*command, "--epochs", 200]),
        (signal.SIGINT, [command[0], "--resume", "--out", out]),
    ):
        process = launch(*arguments)
        deadline = time.monotonic() + 120
        while (newest_step(out) or 0) <= step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if number == signal.SIGTERM:
            process.terminate()
        else:
            os.killpg(process.pid, number)
        printed, complaints = finish(process)
        assert process.returncode
        assert printed.count("已保存。接着训练：") == 1, complaints
        assert "错误" not in complaints
        assert "Warning" not in complaints
        assert newest_step(out) > step
        step = newest_step(out)
        load_folder(out, "cpu")
    steps = [step for step, _ in losses(out)]
    assert steps == sorted(set(steps))
