"""kill -9 while a training run saves, again and again: nothing that was said to be saved may be lost.

    python bench/faults.py [--kills 100]

Each round starts or resumes a real run of ``python -m train`` (its ``mini`` model, saving after every step instead of
ten times), waits for a save to begin, kills the process at a random moment of it, and looks at what lies on the disk:

- the model folder loads,
- the newest state loads, without having to fall back to the one before,
- it is the newest that was there before, acknowledged or not, or the one that was being saved,
- its log leads up to that save, no line missing or there twice.

Every tenth round the command itself, in a process of its own and with nothing changed, goes on from there, and is
stopped by SIGTERM. The other rounds are forks of one process that has imported torch already.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for ``python bench/faults.py``

from studytiny.checkpoint import load_folder, read_config  # noqa: E402
from studytiny.command import CommandParser, number, run_command  # noqa: E402
from studytiny.errors import UserError  # noqa: E402
from train import __main__ as train_command  # noqa: E402
from train import trainer as trainer_module  # noqa: E402
from train.corpus import is_held_out  # noqa: E402
from train.run_log import read_metrics  # noqa: E402
from train.snapshots import STATE_FOLDER, load_snapshot, newest_step  # noqa: E402
from train.trainer import LOG_STEPS  # noqa: E402

RESUME_EVERY = 10
PATIENCE = 300.0  # seconds for anything that takes one or two
BEGUN, STATE, DONE = "begun", "state", "done"  # what a run says of a save


def train(arguments: list[str], sender: Connection) -> None:
    """A run of the command that saves after every step and tells ``sender`` of it, as (what, step)."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    # Its own lock is the system's, to be cleaned up; who is killed cannot.
    trainer_module.tqdm.set_lock(threading.RLock())
    trainer_module.MEASUREMENTS = 10**9
    save, save_state = trainer_module.TransformerTrainer.save, trainer_module.save_snapshot

    def tell_and_save_state(*of_it):
        path = save_state(*of_it)
        sender.send((STATE, of_it[-1]))
        return path

    def tell_and_save(self):
        sender.send((BEGUN, self.steps))
        folder = save(self)
        sender.send((DONE, self.steps))
        return folder

    trainer_module.save_snapshot = tell_and_save_state
    trainer_module.TransformerTrainer.save = tell_and_save
    sys.argv = ["train", *arguments]
    run_command(train_command.main)


class Faults:
    """The rounds in one folder, and what came of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.out = folder / "run"
        self.corpus = folder / "corpus.conv"
        pairs = [[f"第{i}个问题", f"第{i * 7 % 60}个回答"] for i in range(60)]
        # Nothing to measure on: saving should be most of what the run does.
        pairs = [pair for pair in pairs if not is_held_out(pair)]
        self.corpus.write_text("".join(f"E\nM {user}\nM {reply}\n" for user, reply in pairs), encoding="utf-8")
        self.chance = random.Random(seed)
        # A fork of a process that has imported torch already starts at once.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train.__main__"])
        self.moments: Counter[str] = Counter()
        self.failures: list[str] = []
        self.durations: list[float] = []  # seconds of whole saves
        self.acknowledged = 0  # the step of the last save that was said to be done
        self.found = 0  # the step of the newest state; its save may have been killed before it could say so
        self.saves = 0
        self.resumed = 0

    def arguments(self) -> list[str]:
        if newest_step(self.out) is not None:
            return ["--resume", "--out", str(self.out)]
        options = ["--epochs", "1000000", "--batch-size", "2", "--no-clean", "all", "--threads", "1"]
        return ["--corpus", str(self.corpus), *options, "--out", str(self.out)]

    def kill(self) -> None:
        """One round: a run, killed within a save."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=train, args=(self.arguments(), sender), daemon=True)
        process.start()
        sender.close()
        begun = 0
        told = STATE
        whole = self.chance.randrange(3)  # so many saves may end before the one that is disturbed
        started = 0.0

        def listen() -> None:
            nonlocal begun, told, started, whole
            told, step = receiver.recv()
            if told == BEGUN:
                begun, started = step, time.perf_counter()
            elif told == DONE:
                self.acknowledged = self.found = step
                self.saves += 1
                self.durations.append(time.perf_counter() - started)
                whole -= 1

        try:
            while told != BEGUN or whole > 0:
                if not receiver.poll(PATIENCE):
                    raise UserError(f"训练 {PATIENCE:.0f} 秒没有动静；请检查 python -m train 能否运行。")
                listen()
            typical = statistics.median(self.durations[-20:]) if self.durations else 0.2
            time.sleep(self.chance.uniform(0, typical))
        except EOFError:
            self.failures.append("训练自己停了")
        finally:
            process.kill()
            process.join()
        with contextlib.suppress(EOFError, OSError):  # the end, perhaps in the middle of a message
            while True:
                listen()
        receiver.close()
        self.moments[self._moment(told)] += 1  # each run removes what the one before left half-written
        self.check(begun)

    def _moment(self, told: str) -> str:
        """In what the kill came, by what it left behind."""
        if any((self.out / STATE_FOLDER).glob(".*.tmp")):
            return "写训练状态写到一半"
        if any(self.out.glob(".*.tmp")):
            return "写模型写到一半"
        return {BEGUN: "准备训练状态", STATE: "两次写之间", DONE: "刚刚存完"}[told]

    def check(self, begun: int) -> None:
        """Adds what is wrong on the disk to ``failures``."""
        if self.acknowledged == 0 and newest_step(self.out) is None:
            return  # killed in the first save of all: nothing was promised yet
        try:
            snapshot, notes = load_snapshot(self.out)
            self.failures += notes
            step = snapshot.values["steps"]
            if step not in (self.found, begun):
                self.failures.append(f"磁盘上有过第 {self.found} 步，又开始存第 {begun} 步，现在却是第 {step} 步")
            self.found = step
            if self.acknowledged:
                load_folder(self.out, "cpu")
                saved = read_config(self.out)["training"]["steps"]
                if not self.acknowledged <= saved <= step:
                    self.failures.append(f"第 {self.acknowledged} 步报告存好了，模型却是第 {saved} 步的")
            logged = [line["step"] for line in read_metrics(self.out)[0] if line["step"] <= step]
            gaps = {after - before for before, after in pairwise([0, *logged, step])}
            if not gaps <= set(range(LOG_STEPS + 1)) or len(set(logged)) < len(logged):
                self.failures.append(f"存到第 {step} 步，记录里却是 …… {logged[-5:]}")
        except UserError as error:
            self.failures.append(str(error))

    def resume(self) -> None:
        """The command itself goes on, and stops when it is told to."""
        before = newest_step(self.out)
        if before is None:
            return
        last = self._last_line()
        environment = {**os.environ, "PYTHONUTF8": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "train", *self.arguments()], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        )  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE
            # Its own saves are rare: it is at work when the first line of its log comes, after the old ones went.
            while process.poll() is None and time.monotonic() < deadline and self._last_line() == last:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.wait()
        after = newest_step(self.out)
        if process.returncode != 143 or after is None or after <= before or "Traceback" in printed:
            self.failures.append(f"从第 {before} 步接着训练没有成功（{process.returncode}）：{printed[-300:]}")
            return
        self.resumed += 1
        self.acknowledged = self.found = after

    def _last_line(self) -> tuple[int, float] | None:
        lines = read_metrics(self.out)[0]
        return (lines[-1]["step"], lines[-1]["seconds"]) if lines else None


def report(faults: Faults, seconds: float) -> str:
    width = 24  # columns; a Chinese character takes two
    rows = [(moment, f"{count} 次") for moment, count in faults.moments.most_common()]
    rows.append(("kill -9 合计", f"{sum(faults.moments.values())} 次"))
    rows.append(("没有被打断的保存", f"{faults.saves} 次"))
    if faults.durations:
        rows.append(("一次保存（中位数）", f"{statistics.median(faults.durations) * 1000:.0f} 毫秒"))
    rows.append(("用命令接着训练", f"成功 {faults.resumed} 次"))
    rows.append(("出错", f"{len(faults.failures)} 处"))
    rows.append(("用时", f"{seconds:.0f} 秒"))
    lines = [
        name + " " * (width - sum(2 if ord(letter) > 0x2E7F else 1 for letter in name)) + value for name, value in rows
    ]
    return "\n".join([*lines, *(f"  出错：{failure}" for failure in faults.failures)])


def main() -> None:
    parser = CommandParser("python bench/faults.py", "在保存的时候反复 kill -9 训练，看存下来的东西是否都还在。")
    parser.add_argument("--kills", type=number(int), default=100, metavar="次", help="杀多少次（默认 100）")
    parser.add_argument("--seed", type=number(int), default=0, metavar="整数", help="杀在什么时刻由它决定（默认 0）")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        raise UserError(f"--kills {arguments.kills} 不对；应是 1 以上的整数。")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise UserError("这个测试要用 kill -9，Windows 上没有；请在 Linux 或 macOS 上运行。")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="studytiny-faults-") as folder:
        faults = Faults(Path(folder), arguments.seed)
        for count in range(1, arguments.kills + 1):
            faults.kill()
            if count % RESUME_EVERY == 0:
                faults.resume()
                print(f"杀了 {count} 次，出错 {len(faults.failures)} 处", file=sys.stderr, flush=True)
        print(report(faults, time.monotonic() - start))
    if faults.failures:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
