"""RunLog: what happens in a run, one line of JSON each, in the run's own folder; and how to read it again.

``metrics.jsonl`` holds the numbers, ``samples.jsonl`` what the model said to PROMPTS at three stages of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studytiny.errors import UserError
from studytiny.files import write_atomically

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"

# Asked in every run, in this order, so that runs can be compared. The last five want more than small talk.
PROMPTS = (
    "你好",
    "早上好",
    "你是谁",
    "你叫什么名字",
    "你会做什么",
    "今天心情不好",
    "我今天特别开心",
    "我有点累了",
    "你喜欢吃什么",
    "今天天气怎么样",
    "周末去哪里玩好呢",
    "你平时喜欢做什么",
    "讲个笑话吧",
    "谢谢你",
    "再见",
    "一加一等于几",
    "天空为什么是蓝色的",
    "用三个词形容春天",
    "如果明天下雨，我该带什么",
    "你怎么证明你不是机器人",
)

# What a line must hold to be of use; anything else in the file is passed over.
_NUMBER = (int, float)
_MEASUREMENT = {"kind": str, "step": int, "epoch": int, "seconds": _NUMBER, "bits_per_char": _NUMBER}
_TRAINING = {"kind": str, "step": int, "epoch": int, "seconds": _NUMBER, "tokens": int} | dict.fromkeys(
    ("loss", "learning_rate", "tokens_per_second"), _NUMBER
)
_SAMPLES = {"step": int, "stage": int, "replies": list}


class RunLog:
    """Appends what happens in a run to its folder; each line is whole and flushed."""

    def __init__(self, folder: str | Path, resume_step: int = 0, tensorboard: bool = False) -> None:
        """
        Args:
            resume_step: 0 starts with empty files; otherwise the lines of later steps are dropped, since those steps
                will be run again, and with them the torn line that a killed run may have left.
            tensorboard: also write for TensorBoard, into ``folder/tensorboard``.

        Raises:
            UserError: TensorBoard is wanted and not installed; the files are as they were.
        """
        folder = Path(folder)
        self._writer = _summary_writer(folder / "tensorboard", resume_step) if tensorboard else None
        for name in (METRICS_FILE, SAMPLES_FILE):
            kept = [line for line in _read(folder / name, {"step": int}) if line["step"] <= resume_step]
            write_atomically(folder / name, "".join(map(_to_line, kept)) if resume_step else "")
        self._metrics = (folder / METRICS_FILE).open("a", encoding="utf-8", newline="\n")
        self._samples = (folder / SAMPLES_FILE).open("a", encoding="utf-8", newline="\n")

    def training(
        self,
        *,
        step: int,
        epoch: int,
        seconds: float,
        tokens: int,
        loss: float,
        learning_rate: float,
        tokens_per_second: float,
    ) -> None:
        """``loss``: nats per label, the mean since the last such line; ``seconds`` and ``tokens``: so far."""
        numbers = {"loss": loss, "learning_rate": learning_rate, "tokens_per_second": tokens_per_second}
        line = {"kind": "training", "step": step, "epoch": epoch, "seconds": seconds, "tokens": tokens, **numbers}
        self._append(self._metrics, line)
        self._to_tensorboard(step, numbers)

    def measurement(self, *, step: int, epoch: int, seconds: float, bits_per_char: float) -> None:
        """``bits_per_char``: on held-out dialogues, see train.measures."""
        numbers = {"bits_per_char": bits_per_char}
        line = {"kind": "measurement", "step": step, "epoch": epoch, "seconds": seconds, **numbers}
        self._append(self._metrics, line)
        self._to_tensorboard(step, numbers)

    def samples(self, *, step: int, stage: int, replies: Sequence[tuple[str, str]]) -> None:
        """``stage``: 1, 2, 3 for a third, two thirds and the end of the run; ``replies``: (prompt, reply)."""
        self._append(self._samples, {"step": step, "stage": stage, "replies": [list(pair) for pair in replies]})

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        if self._writer is not None:
            self._writer.close()

    def _append(self, file: Any, line: dict[str, Any]) -> None:
        file.write(_to_line(line))
        file.flush()  # whoever looks at a running run, or at one that was killed, finds all up to now

    def _to_tensorboard(self, step: int, numbers: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()


def read_metrics(folder: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, measurement lines) in the order written; what is no whole line is passed over."""
    path = Path(folder) / METRICS_FILE
    return (
        [line for line in _read(path, _TRAINING) if line.get("kind") == "training"],
        [line for line in _read(path, _MEASUREMENT) if line.get("kind") == "measurement"],
    )


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of RunLog.samples in the order written; what is no whole line is passed over."""
    lines = _read(Path(folder) / SAMPLES_FILE, _SAMPLES)
    return [line for line in lines if all(isinstance(pair, list) and len(pair) == 2 for pair in line["replies"])]


def _to_line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _read(path: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The file's JSON objects that have the ``wanted`` keys with values of those types; [] without a file."""
    try:
        # A kill may cut a character in two. Not splitlines(): that also splits at U+2028, which JSON leaves in a text.
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines[:-1]:  # what follows the last newline was never finished
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in wanted.items()):
            found.append(value)
    return found


def _summary_writer(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("这台电脑上没有 TensorBoard；请先运行 pip install tensorboard，或不用这个选项。") from error
    # purge_step hides what an earlier run wrote of the steps that will be run again.
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)
