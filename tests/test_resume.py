"""Going on with a run: to the bit as if it had never stopped; and one sentence for what cannot go on.

Runs are stopped by real signals, the command's runs in processes of their own. These are forks of one process that has
imported torch already: starting Python anew for each would take longer than all that they do.
"""

import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from studytiny import DialogueModel
from studytiny.checkpoint import load_folder, read_config
from studytiny.command import run_command
from studytiny.errors import UserError
from train import ConvDataset, DialogueDataset, TrainConfig, TransformerTrainer
from train import __main__ as train_command
from train import trainer as trainer_module
from train.corpus import is_held_out
from train.optimizer import optimizer_tensors
from train.run_log import METRICS_FILE, read_metrics, read_samples
from train.snapshots import STATE_FOLDER, load_snapshot, newest_step

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals cannot be sent to one process there")

STEPS = 40  # of every run here, with a measurement and a save every 4
EVERY = 4
PAIRS = [[f"第{i}个问题", f"第{i * 7 % 90}个回答"] for i in range(117)]
TINY = {"d_model": 32, "n_head": 4, "n_layers": 2, "max_length": 32}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums that are split between threads in another way may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_trainer(out, resume=False, amp=False, dialogues=PAIRS, **settings):
    torch.manual_seed(0)
    corpus = ConvDataset.from_dialogues(dialogues)
    tokenizer = corpus.build_vocab()
    dataset = DialogueDataset(corpus, tokenizer, TINY["max_length"])
    steps_an_epoch, rows, accumulated = 10, len(dataset), settings.get("grad_accum_steps", 1)
    batch_size = next(size for size in range(1, rows) if -(-rows // size // accumulated) == steps_an_epoch)
    assert rows % (batch_size * accumulated)  # the last step of an epoch has fewer rows
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=torch.Generator())
    settings = {"lr": 5e-3, "patience": 99, "use_amp": False, "out": str(out), **settings}
    config = TrainConfig(epochs=STEPS // steps_an_epoch, **settings)
    model = DialogueModel(tokenizer.vocab_size, **TINY)
    trainer = TransformerTrainer(model, loader, "cpu", config, resume)
    if not resume:
        trainer.amp = amp
    return trainer


def stopped_at(trainer, step, number):
    """``trainer``, to which that signal will come within that step."""
    take = trainer.step

    def take_and_signal(batches, rate):
        loss = take(batches, rate)
        if trainer.steps == step:
            os.kill(os.getpid(), number)
        return loss

    trainer.step = take_and_signal
    return trainer


def run(out, stops=(), **settings):
    """A whole run, stopped at each (step, signal), each time resumed by a new trainer."""
    for count, (step, number) in enumerate(stops):
        trainer = stopped_at(make_trainer(out, count > 0, **settings), step, number)
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt):
            trainer.train()
        assert newest_step(out) == trainer.steps == step
        load_folder(out, "cpu")
    trainer = make_trainer(out, len(stops) > 0, **settings)
    trainer.train()
    return trainer


def bits(tensors):
    """As integers, so that NaN equals itself and 0.0 does not equal -0.0."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def lines_of(out):
    """All that a run wrote of itself but times."""
    timeless = [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
        for lines in read_metrics(out)
        for line in lines
    ]
    return timeless, read_samples(out)


def assert_same_folder(out, expected):
    assert lines_of(out) == lines_of(expected)
    assert bits(load_file(out / "model.safetensors")) == bits(load_file(expected / "model.safetensors"))
    assert read_config(out)["training"] == read_config(expected)["training"]
    assert newest_step(out) is None  # a run that is over leaves no state
    assert not list(out.rglob("*.tmp"))  # nor what a kill left half-written


def assert_same_run(trainer, expected):
    assert_same_folder(Path(trainer.config.out), Path(expected.config.out))
    assert trainer.history == expected.history
    assert (trainer.steps, trainer.tokens, trainer.epoch) == (expected.steps, expected.tokens, expected.epoch)
    assert bits(trainer.model.state_dict()) == bits(expected.model.state_dict())
    assert bits(optimizer_tensors(trainer.optimizers)) == bits(optimizer_tensors(expected.optimizers))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run of given settings that nothing stopped; made once."""
    made = {}

    def make(**settings):
        key = tuple(sorted(settings.items()))
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("uninterrupted") / "out", **settings)
        return made[key]

    return make


def test_the_run_here_is_worth_comparing(uninterrupted):
    trainer = uninterrupted()
    assert trainer.steps == STEPS
    assert [entry["step"] for entry in trainer.history] == list(range(EVERY, STEPS + 1, EVERY))
    assert any(map(is_held_out, PAIRS))
    assert [line["stage"] for line in read_samples(trainer.config.out)] == [1, 2, 3]


# Ctrl-C and SIGTERM


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGTERM),
        (13, signal.SIGINT),
        (13, signal.SIGTERM),
        (2 * EVERY, signal.SIGINT),
        (STEPS - 1, signal.SIGTERM),
        (STEPS, signal.SIGINT),
    ],
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, uninterrupted, step, number):
    """The first step, between two measurements, at one, before the last step and at it."""
    assert_same_run(run(tmp_path / "out", [(step, number)]), uninterrupted())


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.2, "user_share": 0.5},
        {"grad_accum_steps": 3, "user_share": 0.0},
        {"amp": True},
        {"grow": 0.5},
        {"amp": True, "dropout": 0.1, "grad_accum_steps": 2, "weight_decay": 0.1, "half": True, "seed": 7},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_stopped_twice_with_any_setting_is_never_stopped(tmp_path, uninterrupted, settings):
    stops = [(9, signal.SIGINT), (27, signal.SIGTERM)]
    assert_same_run(run(tmp_path / "out", stops, **settings), uninterrupted(**settings))


@pytest.fixture
def third_is_best(monkeypatch):
    """Every run's third measurement is its best."""
    current = []
    train = TransformerTrainer.train

    def train_and_remember(self):
        current[:] = [self]
        return train(self)

    def measure(*_):
        count = len(current[0].history)
        return SimpleNamespace(bits_per_char=[5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9, 4.0, 4.1][count])

    monkeypatch.setattr(TransformerTrainer, "train", train_and_remember)
    monkeypatch.setattr(trainer_module, "bits_per_character", measure)


@pytest.mark.parametrize("patience", [3, 99])
@pytest.mark.parametrize("step", [11, 12, 13, 22])
def test_best_model_is_kept_over_a_stop(tmp_path, third_is_best, step, patience):
    """Weights that nobody measured must not take its place."""
    expected = run(tmp_path / "expected", patience=patience)
    assert expected.steps == (6 * EVERY if patience == 3 else STEPS)
    assert_same_run(run(tmp_path / "out", [(step, signal.SIGINT)], patience=patience), expected)


def test_run_that_ended_early_has_ended_when_it_is_resumed(tmp_path, third_is_best, monkeypatch):
    expected = run(tmp_path / "expected", patience=3)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(TransformerTrainer, "_finish", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
        run(tmp_path / "out", patience=3)
    trainer = make_trainer(tmp_path / "out", True, patience=3)
    trainer.train()
    assert_same_run(trainer, expected)


# kill -9


CONTEXT = None


def start(target, *arguments):
    """``target`` in a process of its own."""
    global CONTEXT
    if CONTEXT is None:
        CONTEXT = multiprocessing.get_context("forkserver")
        CONTEXT.set_forkserver_preload(["train.__main__"])
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def finish(process, seconds=120):
    """Its exit code, as a shell's -N for a signal."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the run did not end")
    return process.exitcode


def train_until_killed(out, step, replacement):
    """Kills itself at the end of a step, or as a file is about to be replaced for the n-th time."""
    torch.set_num_threads(1)
    count, replace = [0], os.replace

    def replace_or_die(*paths):
        count[0] += 1
        if count[0] == replacement:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    stopped_at(make_trainer(out), step, signal.SIGKILL).train()


LOG_FILES = 2  # replaced as a run begins
FILES = 4  # of a measurement: the state, and the model's three
LAST = LOG_FILES + FILES * STEPS // EVERY


@pytest.mark.parametrize(
    ("step", "replacement"),
    [
        (2, 0),  # nothing saved yet
        (15, 0),
        (STEPS, 0),
        *((0, LOG_FILES + 1 + file) for file in range(FILES)),  # in the first save
        *((0, LOG_FILES + 1 + FILES * 4 + file) for file in (0, 2)),
        (0, LAST + 2),  # in the last save of all, the run being over
    ],
)
def test_killed_and_resumed_is_never_stopped(tmp_path, uninterrupted, step, replacement):
    out = tmp_path / "out"
    assert finish(start(train_until_killed, out, step, replacement)) == -signal.SIGKILL
    first = step == 2 or replacement == LOG_FILES + 1
    assert (newest_step(out) is None) == first
    if newest_step(out) and replacement not in range(LOG_FILES + 2, LOG_FILES + FILES + 1):
        load_folder(out, "cpu")
    trainer = make_trainer(out, resume=not first)
    trainer.train()
    assert_same_run(trainer, uninterrupted())


# The command


def limit_files():
    """From now on a state is too large for the disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


def fill_log():
    """From now on not even another line of the log has room."""
    full = os.open("/dev/full", os.O_WRONLY)
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().name == METRICS_FILE:
                os.dup2(full, int(link.name))


def run_train(arguments, printed, step_seconds, fill):
    """``python -m train`` with a smaller model, each step taking a while longer; before step 30 it calls ``fill``."""
    torch.set_num_threads(1)
    descriptor = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    train_command.PRESETS["mini"] = (TINY, 5_000)
    take = TransformerTrainer.step

    def step(self, *arguments):
        time.sleep(step_seconds)
        if fill and self.steps == 29:
            fill()
        return take(self, *arguments)

    TransformerTrainer.step = step
    sys.argv = ["train", *map(str, arguments)]
    run_command(train_command.speak_once)


class Runs:
    """Runs of the command in one folder, their corpus and what they printed."""

    def __init__(self, folder):
        self.folder = folder
        self.corpus = self.write_corpus(PAIRS)
        self.count = 0

    def write_corpus(self, dialogues):
        path = self.folder / "我的 对话.conv"
        path.write_text("".join(f"E\nM {user}\nM {reply}\n" for user, reply in dialogues), encoding="utf-8")
        return path

    def options(self, out):
        # A row has 32 places here: 8 rows a batch make about 8 steps an epoch.
        options = ["--epochs", 10, "--batch-size", 8, "--lr", 0.005, "--no-clean", "all", "--threads", 1]
        return ["--corpus", self.corpus, *options, "--out", out]

    def start(self, *arguments, step_seconds=0.0, fill=None):
        self.count += 1
        self.printed = self.folder / f"printed-{self.count}.txt"
        process = start(run_train, arguments, self.printed, step_seconds, fill)
        process.printed = self.printed
        return process

    def run(self, *arguments, **options):
        """(exit code, what it printed)"""
        process = self.start(*arguments, **options)
        return finish(process), process.printed.read_text(encoding="utf-8")

    def stop(self, out, number=signal.SIGINT):
        """Starts a run, stops it after two saves; returns what it printed."""
        process = self.start(*self.options(out), step_seconds=0.03)
        wait_for(lambda: len(list((out / STATE_FOLDER).glob("step-*"))) > 1, process)
        os.kill(process.pid, number)
        code = finish(process)
        assert code == 128 + number
        return process.printed.read_text(encoding="utf-8")


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        if process.exitcode is not None or time.monotonic() > deadline:
            pytest.fail(f"in vain: {process.printed.read_text(encoding='utf-8')}")
        time.sleep(0.01)


def error_of(printed):
    """The one sentence of a run that went wrong."""
    assert "Traceback" not in printed
    [error] = [line for line in printed.splitlines() if "错误：" in line]
    assert error.endswith("。")
    return error


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def expected(runs):
    """The folder of a run that nothing stopped."""
    out = runs.folder / "expected"
    code, printed = runs.run(*runs.options(out))
    assert code == 0, printed
    return out


@pytest.fixture(scope="module")
def stopped(runs):
    """The folder of a run that was stopped; to be copied."""
    out = runs.folder / "stopped"
    runs.stop(out)
    return out


def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_sentence_on_how_to_go_on_goes_on_to_the_same_end(runs, expected, tmp_path, number):
    out = tmp_path / "名字 里有空格"
    printed = runs.stop(out, number)
    assert "Traceback" not in printed
    load_folder(out, "cpu")
    assert (out / "README.md").exists()
    [line] = [line for line in printed.splitlines() if "接着训练：" in line]
    python, dash_m, train, *arguments = shlex.split(line.partition("接着训练：")[2])
    assert (python, dash_m, train) == ("python", "-m", "train")
    code, printed = runs.run(*arguments)
    assert code == 0, printed
    assert_same_folder(out, expected)


def test_ctrl_c_before_the_first_step_is_not_a_traceback(runs, tmp_path):
    process = runs.start("--minutes", 5, "--out", tmp_path / "out")
    wait_for(process.printed.exists, process)  # a fork that has hardly begun ignores Ctrl-C
    time.sleep(0.2)  # it makes its own corpus first, which takes longer
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert error_free(process)


def test_flipped_bit_falls_back_to_the_save_before_and_says_so(runs, expected, stopped, tmp_path):
    out = copy(stopped, tmp_path)
    [earlier, newest] = sorted((out / STATE_FOLDER).glob("step-*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    code, printed = runs.run("--resume", "--out", out)
    assert code == 0, printed
    [sentence] = [line for line in printed.splitlines() if "已损坏" in line]
    assert newest.name in sentence
    assert sentence.endswith(f"改用前一份：第 {int(earlier.stem[5:])} 步。")
    assert_same_folder(out, expected)


@pytest.mark.parametrize("fill", [limit_files, fill_log])
def test_full_disk_is_one_sentence_and_costs_nothing_but_time(runs, expected, tmp_path, fill):
    if fill is fill_log and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    out = tmp_path / "out"
    code, printed = runs.run(*runs.options(out), fill=fill)
    assert code == 2, printed
    assert "--resume" in error_of(printed)
    load_folder(out, "cpu")
    _, notes = load_snapshot(out)
    assert notes == []
    code, printed = runs.run("--resume", "--out", out)
    assert code == 0, printed
    assert_same_folder(out, expected)


def test_second_run_in_a_folder_is_refused_and_the_first_goes_on(runs, tmp_path):
    out = tmp_path / "out"
    process = runs.start(*runs.options(out), step_seconds=0.1)
    wait_for((out / "metrics.jsonl").exists, process)
    code, printed = runs.run(*runs.options(out))
    assert code == 2, printed
    assert str(out) in error_of(printed)
    wait_for(lambda: newest_step(out) is not None, process)
    code, printed = runs.run("--resume", "--out", out)
    assert code == 2, printed
    assert "另一个训练正在使用" in error_of(printed)
    step = newest_step(out)
    wait_for(lambda: newest_step(out) > step, process)
    load_folder(out, "cpu")  # while it is still training
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    assert error_free(process)


def error_free(process):
    printed = process.printed.read_text(encoding="utf-8")
    return "Traceback" not in printed and "错误" not in printed


@pytest.mark.parametrize(
    ("change", "arguments", "named"),
    [
        ("finished", ["--resume", "--out", "{out}"], "做完"),
        ("model", ["--resume", "--out", "{out}"], "只有模型"),
        ("empty", ["--resume", "--out", "{out}"], "没有保存过"),
        ("missing", ["--resume", "--out", "{out}"], "没有保存过"),
        ("file", ["--resume", "--out", "{out}"], "{out}"),
        ("", ["--resume"], "--out"),
        ("", ["--resume", "--out", "{out}", "--lr", "0.1"], "--lr"),
        ("", ["--resume", "--out", "{out}", "--epochs", "50"], "--epochs"),
        ("", ["--resume", "--out", "{out}", "--half"], "--half"),
        ("", ["--out", "{out}"], "--resume"),
        ("vocabulary", ["--resume", "--out", "{out}"], "语料"),
        ("corpus", ["--resume", "--out", "{out}"], "语料"),
        ("held out", ["--resume", "--out", "{out}"], "语料"),
        ("no corpus", ["--resume", "--out", "{out}"], "找不到语料"),
    ],
)
def test_what_cannot_go_on_is_one_sentence_and_changes_nothing(
    runs, expected, stopped, tmp_path, change, arguments, named
):
    out = tmp_path / "out"
    if change == "finished":
        shutil.copytree(expected, out)
    elif change == "empty":
        out.mkdir()
    elif change == "file":
        out.write_text("")
    elif change != "missing":
        copy(stopped, tmp_path)
    if change == "model":
        shutil.rmtree(out / STATE_FOLDER)
    dialogues = [list(pair) for pair in PAIRS]
    learnt, held_out = (next(pair for pair in dialogues if is_held_out(pair) == wanted) for wanted in (False, True))
    if change == "vocabulary":
        learnt[1] += "新"
    elif change == "corpus":  # other words, the same characters
        learnt[1] = learnt[1][::-1]
    elif change == "held out":
        held_out[1] = held_out[1][::-1]
    runs.write_corpus(dialogues)
    if change == "no corpus":
        runs.corpus.unlink()
    before = contents(tmp_path)
    try:
        code, printed = runs.run(*(argument.format(out=out) for argument in arguments))
    finally:
        runs.write_corpus(PAIRS)
    assert code == 2, printed
    assert named.format(out=out) in error_of(printed)
    assert contents(tmp_path) == before
    assert out.exists() == (change != "missing")


def test_nothing_to_resume_is_an_error_of_the_trainer_too(tmp_path):
    with pytest.raises(UserError, match="没有保存过"):
        make_trainer(tmp_path / "out", resume=True).train()
