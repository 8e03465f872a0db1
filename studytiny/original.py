"""The calls of the original StudyGPT README, on top of ours: ``load_checkpoint`` and ``generate_response``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from studytiny.checkpoint import Model, load_folder, pick_device, read_config
from studytiny.generator import Generator
from studytiny.import_published import read_published
from studytiny.sampling import SamplingConfig
from studytiny.tokenizer import Tokenizer


def load_checkpoint(
    path: str | Path, device: str | torch.device = "auto"
) -> tuple[Model, None, None, int, dict[str, Any]]:
    """``(model, optimizer, scheduler, start_epoch, config)`` of a model folder or of the published ``.pt`` file.

    Optimizer and scheduler are always None: the published ones cannot be read without running the file's code.

    Raises:
        UserError: neither a model folder nor a published checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        model, _ = load_folder(path, device)
        training = read_config(path)["training"]
        return model, None, None, int(training.get("epoch", 0)), training
    published = read_published(path)
    return published.model.to(pick_device(device)).eval(), None, None, published.epoch, published.config


def generate_response(
    model: Model,
    tokenizer: Tokenizer,
    input_text: str,
    device: str | torch.device | None = None,
    max_length: int = 100,
    temperature: float = 0.7,
    top_k: int = 50,
    repetition_penalty: float = 1.0,
) -> str:
    """The reply to a single message; ``max_length`` counts the reply's characters.

    Raises:
        UserError: an empty message, one that is too long, or a setting out of range.
    """
    if device is not None:
        model = model.to(device)
    sampling = SamplingConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=1.0,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_length,
    )
    return Generator(model, tokenizer).reply([{"role": "user", "content": input_text}], sampling)
