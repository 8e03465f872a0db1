"""Decode steps of fixed shapes, so that a GPU can replay them as CUDA graphs.

A GPU computes one token of a small model in less time than the host takes to name the hundred operations of it. A
graph names them once and then starts them all together; in return every shape and every address must stay what it was.
So a pass always reads a whole window of keys and values (masked), and as many rows as the next larger size; rows too
many write into a spare slot that nobody reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from studytiny.model import CacheRows, DialogueModel, KVCache


class FixedPasses:
    """Reads one token each for up to ``slots`` conversations; owns their cache."""

    def __init__(self, model: DialogueModel, slots: int) -> None:
        self.cache = model.new_cache(slots + 1)
        self._model = model
        self._spare = slots
        self._sizes = [2**i for i in range(slots.bit_length()) if 2**i < slots] + [slots]  # 1, 2, 4 ... slots
        self._passes: dict[int, FixedPass] = {}

    def next_hidden(self, ids: list[list[int]], slots: list[int], starts: list[int]) -> Tensor:
        """As ``DialogueModel.next_hidden`` with T = 1."""
        size = next(size for size in self._sizes if size >= len(ids))
        if size not in self._passes:
            self._passes[size] = FixedPass(self._model, self.cache, size, self._spare)
        more = size - len(ids)
        inputs = torch.tensor([[i for (i,) in ids] + [0] * more, slots + [self._spare] * more, starts + [0] * more])
        return self._passes[size](inputs)[: len(ids)]


class FixedPass:
    """A forward pass over ``size`` rows of one token, captured as a graph where there is CUDA."""

    def __init__(self, model: DialogueModel, cache: KVCache, size: int, spare: int) -> None:
        self._model, self._cache = model, cache
        # ids, slots and places of the rows: (3, size)
        self._inputs = torch.tensor([[0] * size, [spare] * size, [0] * size], device=model.device)
        self._graph = None
        if model.device.type == "cuda":
            self._capture()

    def __call__(self, inputs: Tensor) -> Tensor:
        """(3, size) -> vectors (size, D); a graph gives the same tensor each time, overwritten by the next call."""
        self._inputs.copy_(inputs)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._hidden

    def _run(self) -> Tensor:
        ids, slots, places = self._inputs
        window = self._model.config.max_length
        memory = CacheRows(self._cache, slots, slots, places.unsqueeze(1), window, masked=True)
        return self._model.hidden_states(ids.unsqueeze(1), memory=memory)[:, -1]

    def _capture(self) -> None:
        # A few runs beforehand, on a stream of their own: libraries choose and allocate what they need at first use.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._hidden = self._run()
