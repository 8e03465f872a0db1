"""PublishedModel: StudyTinyModel exactly as its author released it on ModelScope, its attention bug included.

``nn.MultiheadAttention`` expects (time, batch, width) unless told otherwise, but it is given (batch, time, width). So
it attends between the rows of a batch, place by place, and never from one character to an earlier one. With a single
row there is nothing to attend to: a softmax over one entry is 1, attention is out_proj(v_proj(x)), and the whole model
is a map from (last character, role, position) to the next character. That is why it answers without context.

Serving uses just that map (``next_logits``): exact, cheap, and independent of whoever else is being served.

Shapes in comments: B rows, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studytiny.model import check_sizes
from studytiny.tokenizer import ASSISTANT_ID


@dataclass(frozen=True)
class PublishedConfig:
    """Sizes of the published architecture; the defaults are StudyTinyModel's."""

    vocab_size: int = 6711
    d_model: int = 512
    n_head: int = 8
    n_layers: int = 4
    max_length: int = 256

    def __post_init__(self) -> None:
        check_sizes(self)


def sinusoid(max_length: int, d_model: int) -> Tensor:
    """Position encoding (max_length, D): sine on even, cosine on odd entries, base 10000 (Vaswani et al. 2017)."""
    position = torch.arange(max_length).float().unsqueeze(1)
    even = torch.arange(0, d_model, step=2).float()
    angles = position / (10000 ** (even / d_model))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def published_roles(ids: Tensor) -> Tensor:
    """Role ids (B, T) as the original sets them: 1 from the first ``<|assistant|>`` on, later user turns included."""
    return ((ids == ASSISTANT_ID).cumsum(dim=1) > 0).long()


class PublishedBlock(nn.Module):
    """Norm after each part, ReLU, and attention over the wrong axis."""

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head)  # no batch_first: this is the bug, kept on purpose
        self.ffn = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), rows of the batch mixed as in the original."""
        attended, _ = self.attn(x, x, x)
        x = self.norm1(x + attended)
        return self.norm2(x + self.ffn(x))

    def alone(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D): what ``forward`` does to a batch of one row."""
        value_weight = self.attn.in_proj_weight.chunk(3)[2]
        value_bias = self.attn.in_proj_bias.chunk(3)[2]
        x = self.norm1(x + self.attn.out_proj(F.linear(x, value_weight, value_bias)))
        return self.norm2(x + self.ffn(x))


class Place:
    """All that the published model remembers of a conversation: how long it is and whether a reply has begun."""

    full = False  # past the window the position just stays the last one

    def __init__(self) -> None:
        self.length = 0
        self.role = 0


class PublishedModel(nn.Module):
    """ids -> logits, bit for bit as the released code computes them."""

    architecture = "published"
    config_class = PublishedConfig

    def __init__(
        self, vocab_size: int, d_model: int = 512, n_head: int = 8, n_layers: int = 4, max_length: int = 256
    ) -> None:
        super().__init__()
        self.config = PublishedConfig(vocab_size, d_model, n_head, n_layers, max_length)
        self.role_embed = nn.Embedding(2, d_model)
        self.token_embed = nn.Embedding(vocab_size, d_model)
        self.encoder_layers = nn.ModuleList(PublishedBlock(d_model, n_head) for _ in range(n_layers))
        self.lm_head = nn.Linear(d_model, vocab_size)
        # Kept in the model folder, though it could be computed: sin() differs in the last bit between machines, and
        # the released table travels inside the checkpoint.
        self.register_buffer("position_encoding", sinusoid(max_length, d_model))

    @classmethod
    def from_config(cls, config: PublishedConfig) -> PublishedModel:
        return cls(**asdict(config))

    @property
    def device(self) -> torch.device:
        return self.token_embed.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V). Rows influence each other, as in the original's training."""
        x = self._embed(ids)
        for layer in self.encoder_layers:
            x = layer(x)
        return self.lm_head(x)

    def independent_logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V), each row as if it were alone: what the model is worth when it serves."""
        x = self._embed(ids)
        for layer in self.encoder_layers:
            x = layer.alone(x)
        return self.lm_head(x)

    def _embed(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.config.max_length:
            raise ValueError(f"{ids.shape[1]} tokens do not fit the window of {self.config.max_length}")
        x = self.token_embed(ids) + self.role_embed(published_roles(ids))
        return x + self.position_encoding[: ids.shape[1]]

    def new_cache(self) -> Place:
        """An empty memory for one conversation."""
        return Place()

    @torch.inference_mode()
    def next_logits(self, ids: list[int], cache: Place) -> Tensor:
        """Reads ``ids`` behind what ``cache`` stands for; returns the logits (V,) of the token that follows.

        Only the last id is computed: no other can reach the result. Past the window the position stays the last one,
        as it does when the original's window slides.
        """
        cache.length += len(ids)
        cache.role = int(cache.role or ASSISTANT_ID in ids)
        position = min(cache.length, self.config.max_length) - 1
        x = self.token_embed.weight[ids[-1]] + self.role_embed.weight[cache.role]
        x = x + self.position_encoding[position]  # (D,)
        for layer in self.encoder_layers:
            x = layer.alone(x)
        return self.lm_head(x)
