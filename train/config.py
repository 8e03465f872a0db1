"""TrainConfig: the settings of a training run, and the learning rate that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from studytiny.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the first eight have the original README's names.

    Attributes:
        lr: peak learning rate of embeddings and gains; that of the matrices follows it, see ``train.optimizer``.
        weight_decay: pull of the matrices towards zero, per unit of learning rate.
        epochs: passes over the corpus; the run's length unless ``minutes`` is given.
        grad_accum_steps: batches that share one optimizer step.
        use_amp: compute in bfloat16 where the machine is faster that way; the weights stay float32.
        max_grad_norm: a longer gradient is shortened to this.
        save_every: measure and save every so many epochs; None: at ten even moments of the run.
        batch_size: rows of a batch, for whoever builds the DataLoader.
        minutes: time budget, measuring and saving included; None trains ``epochs`` epochs.
        warmup: share of the run in which the learning rate rises.
        decay: share of the run, its last, in which it falls.
        user_share: share of the user's words that are learnt beside all of the assistant's; 0 learns replies only.
        grow: share of the run, its first, in which only the lower half of the blocks learns; the model must have been
            made ready for it by ``train.initialise.prepare``.
        dropout: share of what each block adds that is left out at random; for a corpus that is seen many times.
        patience: stop after so many measurements without an improvement; the best model is kept.
        seed: all that is random in a run follows from it.
        half: store the model folder's weights in bfloat16, half the size.
        tensorboard: also write events for TensorBoard.
        out: the model folder to write.
    """

    lr: float = 1.2e-3
    weight_decay: float = 0.0
    epochs: int = 10
    grad_accum_steps: int = 1
    use_amp: bool = True
    max_grad_norm: float = 1.0
    save_every: int | None = None
    batch_size: int = 8
    minutes: float | None = None
    warmup: float = 0.01
    decay: float = 0.6
    user_share: float = 0.3
    grow: float = 0.0
    dropout: float = 0.0
    patience: int = 3
    seed: int = 0
    half: bool = False
    tensorboard: bool = False
    out: str = "runs/studytiny"

    def __post_init__(self) -> None:
        counts = ["epochs", "grad_accum_steps", "batch_size", "patience"]
        for name in (*counts, *(["save_every"] if self.save_every is not None else [])):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UserError(f"训练设置 {name}={getattr(self, name)!r} 不对；应是 1 以上的整数。")
        for name in ("lr", "max_grad_norm", *(["minutes"] if self.minutes is not None else [])):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                raise UserError(f"训练设置 {name}={value!r} 不对；应是大于 0 的数。")
        for name in ("weight_decay", "warmup", "decay", "user_share", "grow", "dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise UserError(f"训练设置 {name}={value!r} 不对；应是 0 到 1 的数。")
        if type(self.seed) is not int:
            raise UserError(f"训练设置 seed={self.seed!r} 不对；应是整数。")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """From a dictionary as in the original README; its ``assistant_token_id`` is not needed any more."""
        known = {field.name for field in fields(cls)}
        unknown = settings.keys() - known - {"assistant_token_id"}
        if unknown:
            raise UserError(f"不认识的训练设置 {'、'.join(sorted(unknown))}；可用的有 {'、'.join(sorted(known))}。")
        return cls(**{name: value for name, value in settings.items() if name in known})


def learning_rate(progress: float, config: TrainConfig) -> float:
    """The rate at ``progress`` (0 to 1) of the run: quickly up, level, then down in a straight line."""
    rise = min(1.0, max(progress / config.warmup, 0.01)) if config.warmup else 1.0
    fall = min(1.0, max(0.0, 1 - progress) / config.decay) if config.decay else 1.0
    return config.lr * min(rise, fall)
