"""The exact state of a training run on disk: after a crash, Ctrl-C or a full disk it goes on bit for bit.

``folder/state`` keeps the newest two saves, each one safetensors file that appears whole or not at all. A checksum over
everything in it notices a flipped bit when it is read; the save before it is then used, and a sentence says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from studytiny.checkpoint import hash_tensors
from studytiny.errors import UserError
from studytiny.files import write_atomically

STATE_FOLDER, LOCK_FILE = "state", ".lock"
KEPT = 2  # the newest, and one to fall back to
DAMAGED = ".damaged"  # ends the name of a file that was found damaged, so that it is not counted among the kept


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        tensors: weights, optimizer, random states ... by name; any dtype and shape, also zero-dimensional.
        values: the rest, as far as JSON holds it; tuples come back as lists, keys as text.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save_snapshot(folder: str | Path, snapshot: Snapshot, step: int) -> Path:
    """Writes ``snapshot`` as that of ``step`` and then drops what is no longer needed; hold ``locked(folder)``.

    Saves of later steps are dropped too: whoever saves an earlier step has gone back behind them.

    Raises:
        ValueError: the values hold NaN, infinity or what JSON cannot hold; nothing is written then.
        OSError: the disk is full or the folder cannot be written; the earlier saves stay whole.
    """
    state = Path(folder) / STATE_FOLDER
    path = state / f"step-{step:08}.safetensors"
    # json's default, pure ASCII, also carries what UTF-8 cannot: the name of a folder need not be valid Unicode.
    text = json.dumps(snapshot.values, allow_nan=False)
    tensors = _separate(snapshot.tensors)
    data = save(tensors, {"values": text, "sha256": _checksum(tensors, text)})
    # What saves that were killed left half-written may take the very room that this one needs.
    _remove(state.glob(".step-*.tmp"))
    write_atomically(path, data)
    older = [other for number, other in _found(state) if number < step]
    keep = {path, *older[: KEPT - 1]}
    _remove(other for _, other in _found(state) if other not in keep)
    _remove(state.glob(f"*{DAMAGED}"))
    return path


def load_snapshot(folder: str | Path) -> tuple[Snapshot, list[str]]:
    """The newest intact snapshot, and a Chinese sentence for each newer one that is damaged.

    Those newer ones are renamed, so that the next save keeps an intact one to fall back to and drops them.

    Raises:
        UserError: there is no snapshot, or none that is intact; every file is then left as it is.
    """
    state = Path(folder) / STATE_FOLDER
    damaged: dict[Path, str] = {}
    for step, path in _found(state):
        try:
            snapshot = _read(path)
        except UserError as error:
            damaged[path] = f"{path} 已损坏（{error}）"
            continue
        for other in damaged:
            with contextlib.suppress(OSError):
                other.replace(other.with_suffix(DAMAGED))
        return snapshot, [f"{problem}，改用前一份：第 {step} 步。" for problem in damaged.values()]
    if not damaged:
        raise UserError(f"{state} 里没有保存过的训练状态，没法接着训练；请检查文件夹名，或去掉 --resume 从头训练。")
    raise UserError(f"{'，'.join(damaged.values())}，没有可用的训练状态；请用 --out 换一个文件夹，从头训练。")


def newest_step(folder: str | Path) -> int | None:
    """The step of the newest snapshot by its name, unread; None if there is none."""
    return next((step for step, _ in _found(Path(folder) / STATE_FOLDER)), None)


def delete_snapshots(folder: str | Path) -> None:
    """Removes what a run that is over does not need any more."""
    state = Path(folder) / STATE_FOLDER
    _remove(state.glob("*"))
    with contextlib.suppress(OSError):
        state.rmdir()


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps every other training run out of ``folder``; the system unlocks it when this process ends, however it ends.

    Raises:
        UserError: another run holds the lock, or this disk knows no locks.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"另一个训练正在使用 {folder}；请等它结束，或用 --out 换一个文件夹。") from error
    except NotImplementedError as error:
        raise UserError(f"{folder} 所在的磁盘不支持文件锁；请用 --out 换到这台电脑自己的磁盘上。") from error
    try:
        yield
    finally:
        lock.release()


def _found(state: Path) -> list[tuple[int, Path]]:
    """(step, path) of every snapshot in the folder, the newest first."""
    names = ((re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in state.glob("step-*"))
    return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        with contextlib.suppress(OSError):  # Windows: somebody is reading it; the next save tries again
            path.unlink()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in the same memory: safetensors refuses anything else."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return separate


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{hash_tensors(tensors)}{text}".encode()).hexdigest()


def _read(path: Path) -> Snapshot:
    """Raises UserError with nothing but the reason, for a file that is not exactly what was saved."""
    try:
        # Read, not mapped: Windows cannot replace a mapped file, and of a failing disk a mapping tells by a crash.
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"读不出来：{error.strerror}") from error
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text, expected = header["__metadata__"]["values"], header["__metadata__"]["sha256"]
        intact = _checksum(tensors, text) == expected
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError("不是完整的训练状态") from error
    if not intact:
        raise UserError("校验和不符")
    del data
    for name in tensors:
        # Into memory that torch has aligned: arithmetic on other memory may differ in the last bit.
        tensors[name] = tensors[name].clone()
    return Snapshot(tensors, json.loads(text))
