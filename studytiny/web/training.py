"""A training run in a process of its own, for the page: started, watched, stopped and gone on with.

What is known of a run stands in its folder (see ``train.run_log``), so nothing is lost when the page is closed. When
the server itself ends with Ctrl-C, the run hears it too, saves, and can be gone on with.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from studytiny.errors import UserError
from studytiny.web.models import RUNS_FOLDER
from train.run_log import METRICS_FILE, SAMPLES_FILE, read_metrics, read_samples
from train.snapshots import newest_step

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS_FILE, PRINTED_FILE = "corpus.conv", "printed.txt"
DEMO = "demo"  # the corpus of train/demo
PRESETS = ("mini", "standard")
MOST_MINUTES = 600.0


@dataclass(frozen=True)
class Progress:
    """How a run stands.

    Attributes:
        name: of its folder under runs; empty if there is none.
        state: ``none``, ``starting``, ``running``, ``stopping``, ``stopped`` (and saved), ``dropped`` (before there was
            anything to save), ``finished`` or ``failed``.
        sentence: what went wrong, of a failed one.
        losses: (step, nats per character of the replies).
        bits: (step, held-out bits per character).
        samples: what it said to each prompt at each stage so far, the latest last: (prompt, replies).
    """

    name: str = ""
    state: str = "none"
    sentence: str = ""
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    bits: list[tuple[int, float]] = field(default_factory=list)
    samples: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        return self.state in ("starting", "running", "stopping")


class Training:
    """The page's one run: at most one at a time, whoever asks."""

    def __init__(self, runs_folder: Path = RUNS_FOLDER) -> None:
        self._folder = runs_folder
        self._process: subprocess.Popen[bytes] | None = None
        self._name = ""
        self._stopping = False
        self._lock = threading.Lock()

    def start(self, corpus: str | Path | None, preset: object, minutes: object, title: str = "") -> str:
        """Begins a run on the corpus of this project (None) or on a ``.conv`` file, which is copied into the run's
        folder: what was uploaded does not stay, and whoever goes on needs it.

        Returns:
            The name of its folder.

        Raises:
            UserError: one is running already, or a setting is wrong.
            OSError: the folder cannot be written.
        """
        if preset not in PRESETS:
            raise UserError(f"大小只能是 {'、'.join(PRESETS)}，收到的是 {preset!r}。")
        if type(minutes) not in (int, float) or not 0 < minutes <= MOST_MINUTES:
            raise UserError(f"训练几分钟应是大于 0、不超过 {MOST_MINUTES:.0f} 的数，收到的是 {minutes!r}。")
        with self._lock:
            self._refuse_second()
            plain = re.sub(r"[^0-9A-Za-z\u4e00-\u9fff-]", "", title)[:20] or (DEMO if corpus is None else "corpus")
            name = f"{plain}-{time.strftime('%m%d-%H%M%S')}"
            folder = self._folder / name
            folder.mkdir(parents=True)
            if corpus is not None:
                shutil.copyfile(corpus, folder / CORPUS_FILE)
            learnt = DEMO if corpus is None else str(folder / CORPUS_FILE)
            self._run(name, "--corpus", learnt, "--preset", str(preset), "--minutes", str(minutes))
        return name

    def resume(self, name: object) -> None:
        """Goes on with a run that was stopped. Raises like ``start``."""
        with self._lock:
            self._refuse_second()
            if name not in self.resumable():  # a client's text never becomes a path
                raise UserError("这次训练没有可以接着做的存档；请从列表里选一个，或重新开始。")
            self._run(str(name), "--resume")

    def stop(self) -> None:
        """Asks the run to save and end; it does so after its present step."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return
            self._stopping = True
            self._process.send_signal(signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGTERM)

    def resumable(self) -> list[str]:
        """Names of runs that were stopped or broke off, the latest first."""
        try:
            folders = [path for path in self._folder.iterdir() if newest_step(path) is not None]
        except OSError:
            return []
        alive = self._name if self._process is not None and self._process.poll() is None else ""
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.name for path in folders if path.name != alive]

    def progress(self) -> Progress:
        """How the latest run of this page stands."""
        if self._process is None:
            return Progress()
        code = self._process.poll()
        folder = self._folder / self._name
        training, measurements = read_metrics(folder) if (folder / METRICS_FILE).exists() else ([], [])
        stages = read_samples(folder) if (folder / SAMPLES_FILE).exists() else []
        state, sentence = self._state(code, bool(training)), ""
        if state == "failed":
            sentence = last_sentence(folder / PRINTED_FILE)
        latest = training[-1] if training else {"seconds": 0.0, "tokens_per_second": 0.0}
        return Progress(
            self._name,
            state,
            sentence,
            latest["seconds"],
            latest["tokens_per_second"],
            [(line["step"], line["loss"]) for line in training],
            [(line["step"], line["bits_per_char"]) for line in measurements],
            [
                (prompt, [dict(stage["replies"]).get(prompt, "") for stage in stages])
                for prompt, _ in (stages[-1]["replies"] if stages else [])
            ],
        )

    def _state(self, code: int | None, began: bool) -> str:
        if code is None:
            return "stopping" if self._stopping else "running" if began else "starting"
        if code == 0:
            return "finished"
        if not self._stopping:
            return "failed"
        # Told to stop while it prepares, a run ends by the signal itself.
        return "stopped" if newest_step(self._folder / self._name) is not None else "dropped"

    def _refuse_second(self) -> None:
        if self._process is not None and self._process.poll() is None:
            raise UserError(f"{self._name} 还在训练；一次只能训练一个，请等它结束，或先停下它。")

    def _run(self, name: str, *options: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1", "TQDM_DISABLE": "1"}
        command = [sys.executable, "-m", "train", "--out", str(self._folder / name), *options]
        # On Windows only a process of a group of its own can be asked to stop.
        flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        with (self._folder / name / PRINTED_FILE).open("wb") as printed:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, env=environment, **flags
            )
        self._name, self._stopping = name, False


def last_sentence(path: Path) -> str:
    """The last line that a run printed, which says what was wrong."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line.removeprefix("错误：") for line in reversed(lines) if line), "")
