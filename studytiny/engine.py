"""One step of the generator: every conversation that is being answered reads a little further, all in one go.

Why together: the weights come from memory once for all of them, and that is what takes the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Protocol

import torch
from torch import Tensor

from studytiny.checkpoint import Model
from studytiny.cores import granted_cores, use_granted_cores
from studytiny.fixed_passes import FixedPasses
from studytiny.kernel import Int8Kernel, KernelUnavailable
from studytiny.model import DialogueModel
from studytiny.precision import in_precision
from studytiny.sampling import best_first

MOST_THREADS = 4  # of the kernel: a step is short, and at some fifty places in it all threads wait for each other


@dataclass(frozen=True, slots=True)
class Row:
    """What one conversation reads in a step: ``ids`` behind the ``start`` tokens that its ``slot`` has read before.

    ``wanted``: the logits of the next token are needed, that is, ``ids`` reach the end of what there is to read.
    """

    slot: int
    start: int
    ids: list[int]
    wanted: bool


class Engine(Protocol):
    """What the scheduler needs. Slots are numbered from 0; a step at start 0 begins a slot anew."""

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Logits (number of wanted rows, V), float32 on the CPU, in the order of ``rows``."""

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As ``sampling.best_first``."""

    def close(self) -> None:
        """Gives back what the engine holds; no step may follow."""


class TorchEngine:
    """Either architecture in plain PyTorch, on any device."""

    top = staticmethod(best_first)

    def __init__(self, model: Model, slots: int, fixed: bool | None = None) -> None:
        """``fixed``: single tokens are read in passes of fixed shapes, which a GPU can replay; None: on CUDA."""
        self.model = model
        fixed = model.device.type == "cuda" if fixed is None else fixed
        self._fixed = FixedPasses(model, slots) if fixed and model.has_window else None
        self._cache = self._fixed.cache if self._fixed else model.new_cache(slots)

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> Tensor:
        hidden: dict[int, Tensor] = {}  # slot -> (D,)
        for group in self._groups(rows):
            ids, slots, starts = ([getattr(row, name) for row in group] for name in ("ids", "slot", "start"))
            if self._fixed and len(ids[0]) == 1:
                read = self._fixed.next_hidden(ids, slots, starts)
            else:
                read = self.model.next_hidden(ids, self._cache, slots, starts)
            hidden.update(zip(slots, read, strict=True))
        wanted = [hidden[row.slot] for row in rows if row.wanted]
        if not wanted:
            return torch.empty(0, self.model.config.vocab_size)
        return self.model.unembed(torch.stack(wanted)).float().cpu()

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that one pass can read: equally many tokens each, by rising slot so that the cache is read in place."""
        if not self.model.has_window:
            return [list(rows)]  # only the last token counts

        def order(row: Row) -> tuple[int, int]:
            return len(row.ids), row.slot

        return [list(group) for _, group in groupby(sorted(rows, key=order), key=lambda row: len(row.ids))]

    def close(self) -> None:
        self._cache = self._fixed = None


class KernelEngine:
    """int8 on a CPU by the C kernel, see ``studytiny.kernel``."""

    def __init__(self, model: DialogueModel, slots: int) -> None:
        """Raises KernelUnavailable where the kernel cannot be had."""
        self.kernel = Int8Kernel(model, slots, min(granted_cores(), MOST_THREADS))

    def step(self, rows: Sequence[Row]) -> Tensor:
        ids = [index for row in rows for index in row.ids]
        slots = [row.slot for row in rows for _ in row.ids]
        positions = [row.start + place for row in rows for place in range(len(row.ids))]
        ends = accumulate(len(row.ids) for row in rows)
        wanted = [end - 1 for end, row in zip(ends, rows, strict=True) if row.wanted]
        return self.kernel.step(ids, slots, positions, wanted)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.kernel.top(logits, k)

    def close(self) -> None:
        self.kernel.close()


def make_engine(model: Model, precision: str, slots: int) -> Engine:
    """The fastest engine for ``model`` in ``precision`` on its device."""
    if model.device.type == "cpu":
        use_granted_cores()
    if precision == "int8" and model.architecture == "studytiny":
        with contextlib.suppress(KernelUnavailable):
            return KernelEngine(model, slots)
    return TorchEngine(in_precision(model, precision), slots)
