"""Where a model comes from: a folder, the ModelScope cache, ModelScope, or the bundled model."""

from __future__ import annotations

from pathlib import Path

import torch

from studytiny.checkpoint import Model, load_folder
from studytiny.tokenizer import Tokenizer

BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "bundled"


def load_model(name_or_folder: str | Path = "bundled", device: str | torch.device = "auto") -> tuple[Model, Tokenizer]:
    """The model and tokenizer called ``bundled`` or ``StudyTinyModel``, or those of a model folder."""
    if str(name_or_folder) == "bundled":
        return load_folder(BUNDLED_FOLDER, device)
    return load_folder(name_or_folder, device)
