"""``python -m train --preset published``: StudyTinyModel trained as its author trained it, for comparison.

Model and recipe are the original's, mistakes included, because they made the published model what it is:

- One dialogue a row, padded to the longest row of its batch. Attention runs between the rows of a batch, padding and
  all (see ``studytiny.published``), so what a row learns depends on the strangers it was drawn together with.
- Beside the assistant's words, the ``<|end|>`` of the user's turns is learnt.
- Every micro-batch counts alike, however few labels it has; four share a step. What is left over at the end of an
  epoch is never learnt from.
- The learning rate follows one cycle that is planned in micro-batches but moved on once a step. A run therefore sees
  the first quarter of it: the rate rises to the end and never falls. At 0.005 a short run may learn next to nothing.
- Nothing chooses between the weights of a run: the last are the model.

What leaves the weights alone is this project's: measuring, saving, exact resume, and a printed loss that is the true
one (the original's was a quarter of it).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from studytiny.errors import UserError
from studytiny.tokenizer import END_ID, PAD_ID, EncodedDialogue, Tokenizer
from train.corpus import ConvDataset, encode_turns
from train.dataset import IGNORED, nothing_to_learn
from train.trainer import TransformerTrainer

PUBLISHED = "published"  # the preset's name
# What differs from TrainConfig's own defaults. No word of the user is drawn: the labels say all there is to learn.
SETTINGS: dict[str, Any] = {
    "lr": 5e-3,
    "weight_decay": 0.01,
    "epochs": 2,  # the published file is model_epoch_2.pt
    "grad_accum_steps": 4,
    "batch_size": 32,
    "user_share": 0.0,
}
WITHOUT_MEANING = ("user_share", "dropout", "sessions")  # options of the command that only our own recipe has

# OneCycleLR's documented defaults (Smith & Topin 2018): the rate begins at a 25th of its peak, is there after 30 % of
# the cycle, and ends at a 10,000th of where it began; AdamW's first beta moves the other way.
RISING = 0.3
START_DIVISOR, END_DIVISOR = 25, 1e4
HIGH_BETA, LOW_BETA = 0.95, 0.85


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError if an option of the command was given that the original's recipe has no place for."""
    for name in WITHOUT_MEANING:
        if options[name] is not None and options[name] is not False:  # 0 was given, and is equal to False
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} 不能和 --preset {PUBLISHED} 一起用：原项目的练法里没有这一项；请去掉。")


def cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at 1 along half a wave: slowly, fast, slowly."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def one_cycle(step: int, length: int, peak: float) -> tuple[float, float]:
    """(learning rate, AdamW's first beta) at ``step``, counted from 0, of a cycle of ``length`` steps."""
    top = RISING * length - 1  # of the steps, the place of the peak; it need not be a whole number
    start = peak / START_DIVISOR
    if step <= top:
        progress = step / top
        return cosine(start, peak, progress), cosine(HIGH_BETA, LOW_BETA, progress)
    progress = (step - top) / (length - 1 - top)
    return cosine(peak, start / END_DIVISOR, progress), cosine(LOW_BETA, HIGH_BETA, progress)


def learnt(encoded: EncodedDialogue, index: int) -> bool:
    """True if the original learns to say token ``index``: the assistant's words, and ``<|end|>``, whoever says it."""
    return encoded.reply_mask[index] or encoded.ids[index] == END_ID


class PublishedDataset(Dataset):
    """One dialogue an item, in full up to ``max_length`` tokens; held-out dialogues are left out.

    An item is ``{"input_ids", "labels", "segments"}``, each a LongTensor (T,) of the dialogue's own length; see
    ``pad_rows``. ``labels[t]`` is the token that should follow ``input_ids[t]``, or -100; a long first turn may leave
    a dialogue without any. ``segments`` is 0, since nobody shares the row.

    Attributes:
        tokens: tokens of all items.
        labels: of them, those with something to learn.
    """

    def __init__(self, conv_dataset: ConvDataset, tokenizer: Tokenizer, max_length: int = 256, seed: int = 0) -> None:
        """``seed`` is there for whoever builds a DialogueDataset or this one; nothing is drawn here.

        Raises:
            UserError: nothing in the corpus can be learnt.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.conv_dataset = conv_dataset
        # All dialogues behind each other, in 4-byte numbers: a large corpus as lists would not fit a laptop.
        ids, labels, self._starts = array("i"), array("i"), array("q", [0])
        for turns in conv_dataset.training_dialogues():
            encoded = encode_turns(tokenizer, turns)
            length = min(len(encoded.ids), max_length)
            ids.extend(encoded.ids[:length])
            labels.extend(encoded.ids[i] if learnt(encoded, i) else IGNORED for i in range(1, length))
            labels.append(IGNORED)  # nothing follows the last token, or it was cut off
            self._starts.append(len(ids))
        self.tokens = len(ids)
        self.labels = len(labels) - labels.count(IGNORED)
        if not self.labels:
            raise nothing_to_learn(conv_dataset)
        self._ids, self._labels = torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(labels, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        part = slice(self._starts[index], self._starts[index + 1])
        ids, labels = self._ids[part].long(), self._labels[part].long()
        return {"input_ids": ids, "labels": labels, "segments": torch.zeros_like(ids)}


def pad_rows(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Items of a PublishedDataset -> a batch, each entry (B, T) with the T of the longest: a DataLoader's collate_fn.

    Padding has a segment of its own, -1, and nothing to learn.
    """
    filling = {"input_ids": PAD_ID, "labels": IGNORED, "segments": -1}
    return {
        name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=value)
        for name, value in filling.items()
    }


class PublishedTrainer(TransformerTrainer):
    """Trains a PublishedModel on a PublishedDataset, batched by ``pad_rows``, with the original's steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See TransformerTrainer; ``SETTINGS`` are the original's.

        Raises:
            UserError: as there; or the corpus is too small for a single step, or there are several processes.
        """
        super().__init__(*arguments, **options)
        if self.group.size > 1:
            # Rows that a process does not see cannot mix with those it does: it would be another model.
            raise UserError(f"{PUBLISHED} 只能用一个进程训练：同一批的各行会互相影响，分开就不是原来的模型了。")
        if self.config.user_share or self.config.dropout:
            raise UserError(f"训练设置 user_share 和 dropout 在 {PUBLISHED} 里没有意义，都应是 0。")
        if not self.steps_an_epoch:
            rows, wanted = len(self.train_loader.dataset), self.config.batch_size * self.config.grad_accum_steps
            raise UserError(
                f"语料只有 {rows} 段对话，{PUBLISHED} 一步要用 {wanted} 段；请换大一些的语料，或把 --batch-size 调小。"
            )

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        # One AdamW for everything, norms and embeddings decayed like the rest; fused changes its speed only.
        fused = self.device.type in ("cpu", "cuda")
        config = self.config
        optimizer = torch.optim.AdamW(self.model.parameters(), config.lr, weight_decay=config.weight_decay, fused=fused)
        for group in optimizer.param_groups:
            group["rate_scale"] = 1.0
        return [optimizer]

    def learning_rate(self) -> float:
        return one_cycle(self.steps, self.cycle_length, self.config.lr)[0]

    @property
    def cycle_length(self) -> int:
        """In micro-batches, the original's mistake: only as many steps as there are groups of them will be taken."""
        if self.config.minutes is None:
            return self.config.epochs * len(self.train_loader)
        return max(1, self.total_steps) * self.config.grad_accum_steps  # 0 until the first step has been timed

    @property
    def steps_an_epoch(self) -> int:
        return len(self.train_loader) // self.config.grad_accum_steps

    def _batches(self) -> Iterator[list[Mapping[str, Tensor]]]:
        # An epoch's last group, if it is not full, is never learnt from.
        return (batches for batches in super()._batches() if len(batches) == self.config.grad_accum_steps)

    def step(self, batches: Sequence[Mapping[str, Tensor]], rate: float) -> float:
        if all((batch["labels"] == IGNORED).all() for batch in batches):
            self.steps += 1
            return math.nan  # as in the original, where such a step also spoils the weights for good
        beta = one_cycle(self.steps, self.cycle_length, self.config.lr)[1]
        for group in self.optimizers[0].param_groups:
            group["betas"] = (beta, group["betas"][1])
        return super().step(batches, rate)

    def divisors(self, counts: Sequence[int]) -> list[int]:
        # The mean of means. Where nothing is to be learnt the original divides 0 by 0; here it adds nothing.
        return [max(1, count) * self.config.grad_accum_steps for count in counts]

    def compute_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, targets = batch["input_ids"].to(self.device), batch["targets"].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.model(ids)  # (B, T, V), the rows mixed
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, loss.detach()

    def _worse(self) -> int:
        # The original measures nothing, so it neither stops early nor keeps an earlier model.
        return 0
