"""TransformerTrainer: the training loop, and TrainConfig, its settings.

Each step: read packed rows, predict the assistant's characters, compute the loss (cross entropy, in nats per token),
clip the gradient, let AdamW change the weights. The learning rate warms up, then falls in a straight line to zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from studytiny.checkpoint import CONFIG_FILE, save_checkpoint
from studytiny.errors import UserError
from studytiny.model import DialogueModel
from train.dataset import IGNORED
from train.measures import bits_per_character

VALIDATION_DIALOGUES = 200  # enough to see where training goes; train.evaluate measures on all
EVALUATIONS = 10  # how often a run measures and saves, if its epochs do not say otherwise
BAR = "{desc} {percentage:3.0f}%|{bar:30}| 已用 {elapsed}，还需 {remaining}{postfix}"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the first eight have the original README's names.

    Attributes:
        lr: peak learning rate.
        weight_decay: pull of the matrices towards zero, per unit of learning rate (AdamW).
        epochs: passes over the corpus; the run's length unless ``minutes`` is given.
        grad_accum_steps: batches that share one optimizer step.
        use_amp: compute in bfloat16 where the machine is faster that way; the weights stay float32.
        max_grad_norm: a longer gradient is shortened to this.
        save_every: save and measure every so many epochs; with ``minutes``, at ten even moments instead.
        batch_size: rows of a batch, for whoever builds the DataLoader.
        minutes: time budget, measuring and saving included; None trains ``epochs`` epochs.
        warmup: share of the run in which the learning rate rises.
        half: store the weights in bfloat16, half the size.
        out: the model folder to write.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 10
    grad_accum_steps: int = 1
    use_amp: bool = True
    max_grad_norm: float = 1.0
    save_every: int = 1
    batch_size: int = 4
    minutes: float | None = None
    warmup: float = 0.02
    half: bool = False
    out: str = "runs/studytiny"

    def __post_init__(self) -> None:
        for name in ("epochs", "grad_accum_steps", "save_every", "batch_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise UserError(f"训练设置 {name}={getattr(self, name)!r} 不对；应是 1 以上的整数。")
        for name in ("lr", "max_grad_norm", *(["minutes"] if self.minutes is not None else [])):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                raise UserError(f"训练设置 {name}={value!r} 不对；应是大于 0 的数。")
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise UserError(f"训练设置 {name}={value!r} 不对；应是 0 到 1 的数。")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """From a dictionary as in the original README; its ``assistant_token_id`` is not needed any more."""
        known = {field.name for field in fields(cls)}
        unknown = settings.keys() - known - {"assistant_token_id"}
        if unknown:
            raise UserError(f"不认识的训练设置 {'、'.join(sorted(unknown))}；可用的有 {'、'.join(sorted(known))}。")
        return cls(**{name: value for name, value in settings.items() if name in known})


def learning_rate(progress: float, config: TrainConfig) -> float:
    """The rate at ``progress`` (0 to 1) of the run: up in a straight line, then down in one."""
    if progress < config.warmup:
        return config.lr * max(progress / config.warmup, 0.01)
    return config.lr * max(0.0, (1 - progress) / (1 - config.warmup))


def bfloat16_is_faster(device: torch.device) -> bool:
    """Measured, not looked up: many CPUs accept bfloat16 and are slower with it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.randn(1024, 512).to(dtype), torch.randn(512, 1024).to(dtype)
        best = math.inf
        for _ in range(5):  # the first runs set things up; the best one is the least disturbed
            start = time.perf_counter()
            torch.mm(left, right)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


class TransformerTrainer:
    """Trains a DialogueModel on the rows of ``train_loader`` and writes a model folder."""

    def __init__(
        self,
        model: DialogueModel,
        train_loader: DataLoader,
        device: torch.device | str,
        config: TrainConfig | Mapping[str, Any],
    ) -> None:
        """``train_loader`` loads a DialogueDataset: its tokenizer is saved with the model, its held-out dialogues
        measure the progress.

        Raises:
            UserError: a setting is wrong, the vocabulary is not the model's, or ``config.out`` holds a model already.
        """
        self.config = config if isinstance(config, TrainConfig) else TrainConfig.from_mapping(config)
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.train_loader = train_loader
        self.tokenizer = train_loader.dataset.tokenizer
        if self.tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"词表有 {self.tokenizer.vocab_size} 项，模型是按 {model.config.vocab_size} 项建的；"
                "请用 DialogueModel(tokenizer.vocab_size, ...) 建模型。"
            )
        out = Path(self.config.out)
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} 是一个文件，不能当作模型文件夹；请用 --out 换一个名字。")
        if (out / CONFIG_FILE).exists():
            raise UserError(f"{out} 里已经有一个模型；请用 --out 换一个文件夹，或先把它移走。")
        self.validation = train_loader.dataset.conv_dataset.held_out_dialogues()[:VALIDATION_DIALOGUES]
        self.amp = self.config.use_amp and bfloat16_is_faster(self.device)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        gains = [parameter for parameter in model.parameters() if parameter.dim() < 2]  # decay would silence norms
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": gains, "weight_decay": 0.0}],
            lr=self.config.lr,
            betas=(0.9, 0.95),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.history: list[dict[str, float]] = []  # one entry a measurement
        self.epoch = 0
        self.steps = 0

    def compute_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Sum over the batch's labels of -ln p(label); divide by their number for the mean."""
        ids, labels, segments = (batch[name].to(self.device) for name in ("input_ids", "labels", "segments"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            hidden = self.model.hidden_states(ids, segments)
            wanted = labels != IGNORED
            # The output layer is a third of the work, and most places have nothing to learn.
            logits = self.model.unembed(hidden[wanted])
        return F.cross_entropy(logits.float(), labels[wanted], reduction="sum")

    def step(self, batches: Sequence[Mapping[str, Tensor]], rate: float) -> float:
        """One optimizer step on the given batches together; returns their mean loss in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Divided by the labels of all batches: the result is that of one large batch, however they are split.
        count = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.compute_loss(batch) / count
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            self.optimizer.zero_grad(set_to_none=True)
            raise UserError(f"第 {self.steps + 1} 步的损失变成了 {total}；请把学习率 lr 调小一些再训练。")
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return total

    def train(self) -> list[dict[str, float]]:
        """Trains to the end of the epochs or minutes; saves on the way, at the end, and at Ctrl-C.

        Returns:
            The measurements: step, epoch, loss (nats per token, mean since the last one), bits_per_char (held-out).

        Raises:
            UserError: the loss is no longer a number; the last save stays as it was.
            KeyboardInterrupt: after saving.
        """
        Path(self.config.out).mkdir(parents=True, exist_ok=True)  # what cannot be written should fail before the work
        start = time.monotonic()
        steps_an_epoch = math.ceil(len(self.train_loader) / self.config.grad_accum_steps)
        total_steps = steps_an_epoch * self.config.epochs
        seconds = None if self.config.minutes is None else self.config.minutes * 60
        # A time budget has no steps to count: the bar then shows seconds.
        bar = tqdm(total=round(seconds) if seconds else total_steps, desc="训练", bar_format=BAR, mininterval=0.5)
        next_moment = 1 / EVALUATIONS
        losses: list[float] = []
        self.model.train()
        try:
            for batches in self._batches():
                progress = (time.monotonic() - start) / seconds if seconds else self.steps / total_steps
                if progress >= 1:
                    break
                losses.append(self.step(batches, learning_rate(progress, self.config)))
                bar.update(round(progress * seconds) - bar.n if seconds else 1)
                bar.set_postfix_str(f"损失 {sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
                at_epoch_end = self.steps % (steps_an_epoch * self.config.save_every) == 0
                if progress >= next_moment if seconds else at_epoch_end:
                    next_moment += 1 / EVALUATIONS
                    bar.write(self._measure_and_save(losses))
                    losses = []
        except KeyboardInterrupt:
            bar.write(f"收到中断，正在保存到 {self.config.out} ……")
            self.save()
            raise
        finally:
            bar.close()
        if losses:
            print(self._measure_and_save(losses))
        return self.history

    def save(self) -> Path:
        """Writes the model folder in one atomic step; it can be chatted with while training goes on."""
        training = {**asdict(self.config), "epoch": self.epoch, "steps": self.steps, "history": self.history}
        del training["out"]  # where it lay on this machine is nobody else's business
        dtype = torch.bfloat16 if self.config.half else torch.float32
        return save_checkpoint(self.config.out, self.model, self.tokenizer, training, dtype)

    def _batches(self) -> Iterator[list[Mapping[str, Tensor]]]:
        """The batches of each optimizer step, epoch after epoch; an epoch's last step may have fewer."""
        while True:
            batches = iter(self.train_loader)
            while group := list(islice(batches, self.config.grad_accum_steps)):
                yield group
            self.epoch += 1

    def _measure_and_save(self, losses: Iterable[float]) -> str:
        losses = list(losses)
        entry = {"step": self.steps, "epoch": self.epoch, "loss": sum(losses) / len(losses)}
        line = f"第 {self.steps} 步　损失 {entry['loss']:.3f}"
        if self.validation:
            entry["bits_per_char"] = bits_per_character(self.model, self.tokenizer, self.validation).bits_per_char
            line += f"　留出对话 {entry['bits_per_char']:.3f} 比特/字"
            self.model.train()
        self.history.append(entry)
        self.save()
        return f"{line}　已保存到 {self.config.out}"
