"""Writes checkpoints of exactly the published format, for tests: the real one is on ModelScope, out of a test's reach.

The classes below are the original's architecture under the original's module name, ``My``. That module exists only
while a file is being saved, so that no test can lean on it by accident. On a machine without CUDA the storages still
say ``cuda:0``, as in the published file.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<pad>", "<unk>", "<bos>", "<eos>")
ASSISTANT_ID = 1
CHARACTERS = "你好吗呀我是小黄鸡的不了在有人这中大来上国个到说们为子和地出道也时年得就那要下以生会自着去之过家学对可里"
FULL_SIZE: dict[str, Any] = {  # the published sizes: 6711 entries, 512 wide, 19,489,335 parameters, a file of 234 MB
    "characters": "".join(map(chr, range(0x4E00, 0x4E00 + 6704))),
    "d_model": 512,
    "n_head": 8,
    "n_layers": 4,
}


@dataclass(frozen=True)
class PublishedFixture:
    """A written checkpoint, and what the original computes with it: ids (B, T) -> logits (B, T, V)."""

    checkpoint: Path
    vocab: Path
    ids: Tensor
    logits: Tensor


class PositionalEncoding(nn.Module):
    def __init__(self, d_model: int, max_length: int) -> None:
        super().__init__()
        position = torch.arange(max_length).float().unsqueeze(1)
        even = torch.arange(0, d_model, step=2).float()
        self.encoding = torch.zeros(max_length, d_model)  # a plain attribute, not a buffer
        self.encoding[:, 0::2] = torch.sin(position / (10000 ** (even / d_model)))
        self.encoding[:, 1::2] = torch.cos(position / (10000 ** (even / d_model)))

    def forward(self, length: int) -> Tensor:
        return self.encoding[:length]


class TransformerBlock(nn.Module):
    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ffn = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attn(x, x, x)  # (batch, time, width) into a module that expects (time, batch, width)
        x = self.norm1(x + attended)
        return self.norm2(x + self.ffn(x))


class DialogueModel(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, n_head: int, n_layers: int, max_length: int) -> None:
        super().__init__()
        self.role_embed = nn.Embedding(2, d_model)
        self.token_embed = nn.Embedding(vocab_size, d_model)
        self.pos_embed = PositionalEncoding(d_model, max_length)
        self.encoder_layers = nn.ModuleList([TransformerBlock(d_model, n_head) for _ in range(n_layers)])
        self.lm_head = nn.Linear(d_model, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        roles = torch.zeros_like(ids)
        for row, places in enumerate(ids == ASSISTANT_ID):
            if places.any():
                roles[row, int(places.int().argmax()) :] = 1  # up to the end, whoever speaks later
        x = self.token_embed(ids) + self.role_embed(roles) + self.pos_embed(ids.shape[1])
        for layer in self.encoder_layers:
            x = layer(x)
        return self.lm_head(x)


for _class in (PositionalEncoding, TransformerBlock, DialogueModel):
    _class.__module__ = "My"


@contextmanager
def module_my() -> Iterator[None]:
    """Makes ``My`` importable, which pickling its classes needs, and takes it away again."""
    module = types.ModuleType("My")
    module.DialogueModel, module.TransformerBlock = DialogueModel, TransformerBlock
    module.PositionalEncoding = PositionalEncoding
    with mock.patch.dict(sys.modules, {"My": module}):
        yield


def build_checkpoint(
    characters: str = CHARACTERS,
    *,
    d_model: int = 32,
    n_head: int = 4,
    n_layers: int = 2,
    max_length: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """The dictionary the original hands to ``torch.save``, after one training step."""
    vocab_size = len(SPECIAL_TOKENS) + len(characters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DialogueModel(vocab_size, d_model, n_head, n_layers, max_length)
        with torch.no_grad():
            for parameter in model.parameters():  # fresh biases are 0 and norms 1: a mix-up of them would go unseen
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=100)
        ids = torch.randint(vocab_size, (2, 8))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    config = {"vocab_size": vocab_size, "d_model": d_model, "num_heads": n_head, "num_layers": n_layers}
    config |= {"max_length": max_length, "batch_size": 64, "lr": 5e-3, "epochs": 3, "device": "cuda"}
    return {"epoch": 2, "model": model, "optimizer": optimizer, "scheduler": scheduler, "config": config}


def save_as_original(checkpoint: Any, path: Path, *, cuda_tags: bool = True) -> Path:
    """``torch.save`` as called where ``My`` exists and, with ``cuda_tags``, where the weights are on a GPU."""
    location = mock.patch("torch.serialization.location_tag", lambda storage: "cuda:0" if cuda_tags else "cpu")
    with module_my(), location:
        torch.save(checkpoint, path)
    return path


def write_vocab(path: Path, characters: str = CHARACTERS) -> Path:
    """``vocab.txt`` as published: one ``token<TAB>id`` a line."""
    lines = [f"{token}\t{index}\n" for index, token in enumerate([*SPECIAL_TOKENS, *characters])]
    path.write_bytes("".join(lines).encode("utf-8"))
    return path


def write_published(
    folder: Path,
    *,
    characters: str = CHARACTERS,
    d_model: int = 32,
    n_head: int = 4,
    n_layers: int = 2,
    cuda_tags: bool = True,
    seed: int = 0,
) -> PublishedFixture:
    """Writes ``model_epoch_2.pt`` and ``vocab.txt`` into ``folder``; ``**FULL_SIZE`` gives the published sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = build_checkpoint(characters, d_model=d_model, n_head=n_head, n_layers=n_layers, seed=seed)
    path = save_as_original(checkpoint, folder / "model_epoch_2.pt", cuda_tags=cuda_tags)
    vocab = write_vocab(folder / "vocab.txt", characters)
    model = checkpoint["model"].eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + len(characters), (3, 24), generator=generator)
    ids[0, 9] = ids[1, 4] = ids[1, 15] = ASSISTANT_ID  # one reply, two replies, none
    with torch.no_grad():
        return PublishedFixture(path, vocab, ids, model(ids))
