"""Reads the published pickled checkpoint without running it. (Being written.)"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studytiny.published import PublishedModel


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What a published ``.pt`` file holds that is of use: the model, the epoch it was saved at, its settings."""

    model: PublishedModel
    epoch: int
    config: dict[str, Any]


def read_published(path: str | Path) -> PublishedCheckpoint:
    raise NotImplementedError


def import_published(checkpoint: str | Path, vocab: str | Path, out_folder: str | Path) -> Path:
    raise NotImplementedError
