"""What people would otherwise train with: nanoGPT's architecture and recipe, written anew from its description.

GPT-2's shape without biases: learnt positions, LayerNorm, GELU, tied embeddings. A stream of text in which dialogue
follows dialogue; each row is a window of it from anywhere, every token of it is learnt, and whatever stands before in
the row is read. AdamW 1e-3 with betas 0.9 and 0.99, weight decay 0.1 for matrices, 100 steps of warm-up, then a cosine
down to a tenth. Only the benchmarks use it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studytiny.tokenizer import Tokenizer
from train.corpus import to_messages


@dataclass(frozen=True)
class NanoConfig:
    """Sizes; ``max_length`` is the window."""

    vocab_size: int
    d_model: int = 512
    n_head: int = 8
    n_layers: int = 4
    max_length: int = 256


class NanoBlock(nn.Module):
    """Attention, then a feed-forward part of four times the width."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.attention_norm = nn.LayerNorm(d, bias=False)
        self.query_key_value = nn.Linear(d, 3 * d, bias=False)
        self.attention_out = nn.Linear(d, d, bias=False)
        self.feed_forward_norm = nn.LayerNorm(d, bias=False)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, d = x.shape
        parts = self.query_key_value(self.attention_norm(x)).view(rows, length, 3, self.n_head, d // self.n_head)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)  # each (B, H, T, K)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, d))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class NanoGPT(nn.Module):
    """ids (B, T) -> logits (B, T, V); has what ``train.measures`` needs of a model."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(NanoBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds_to_stream = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers) if adds_to_stream else 0.02)

    @property
    def device(self) -> torch.device:
        return self.tokens.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def independent_logits(self, ids: Tensor) -> Tensor:
        """See studytiny.model: rows do not influence each other here either."""
        return self(ids)


def text_stream(dialogues: Sequence[Sequence[str]], tokenizer: Tokenizer) -> Tensor:
    """All dialogues one after the other, as ids."""
    return torch.tensor([token for turns in dialogues for token in tokenizer.encode_dialogue(to_messages(turns)).ids])


class NanoTrainer:
    """Takes steps on random windows of a stream of text."""

    def __init__(self, model: NanoGPT, stream: Tensor, rows: int, seed: int, lr: float = 1e-3) -> None:
        self.model, self.stream, self.rows, self.lr = model, stream, rows, lr
        self.random = torch.Generator().manual_seed(seed)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        gains = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.steps = 0

    def step(self, progress: float) -> int:
        """One step at ``progress`` (0 to 1) of the run; returns how many tokens were learnt from."""
        window = self.model.config.max_length
        starts = torch.randint(len(self.stream) - window - 1, (self.rows,), generator=self.random).tolist()
        ids = torch.stack([self.stream[start : start + window + 1] for start in starts])
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.steps + 1) / 100) * cosine
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(ids[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return self.rows * window
