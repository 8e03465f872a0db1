"""PublishedModel: StudyTinyModel exactly as its author released it on ModelScope, its attention bug included.

``nn.MultiheadAttention`` expects (time, batch, width) unless told otherwise, but it is given (batch, time, width). So
it attends between the rows of a batch, place by place, and never from one character to an earlier one. With a single
row there is nothing to attend to: a softmax over one entry is 1, attention is out_proj(v_proj(x)), and the whole model
is a map from (last character, role, position) to the next character. That is why it answers without context.

Serving uses just that map (``next_hidden``): exact, one matrix product for everybody who is being served, and nobody's
reply depends on who else that is.

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


class Roles:
    """All that the published model must remember of a conversation: whether a reply has begun (1) or not yet (0)."""

    def __init__(self, slots: int) -> None:
        self.role = [0] * slots


class PublishedModel(nn.Module):
    """ids -> logits, bit for bit as the released code computes them."""

    architecture = "published"
    config_class = PublishedConfig
    has_window = False  # past its last position it goes on with that one

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

    def new_cache(self, slots: int = 1) -> Roles:
        """An empty memory for ``slots`` conversations."""
        return Roles(slots)

    def next_hidden(self, ids: list[list[int]], cache: Roles, slots: list[int], starts: list[int]) -> Tensor:
        """Reads ``ids`` (B lists of any length), row i as continuation of slots[i] from place starts[i]; returns the
        vectors (B, D) behind the last ones, for ``unembed``.

        Only the last id of each is computed: no other can reach the result. Past the window the position stays the
        last one, as it does when the original's window slides.
        """
        for slot, start, new in zip(slots, starts, ids, strict=True):
            begun = cache.role[slot] if start > 0 else 0
            cache.role[slot] = int(begun or ASSISTANT_ID in new)
        ends = [start + len(new) - 1 for start, new in zip(starts, ids, strict=True)]

        def tensor(numbers: list[int]) -> Tensor:  # (B,)
            return torch.tensor(numbers, device=self.device)

        x = self.token_embed(tensor([new[-1] for new in ids])) + self.role_embed(tensor([cache.role[i] for i in slots]))
        x = x + self.position_encoding[tensor(ends).clamp(max=self.config.max_length - 1)]  # (B, D)
        for layer in self.encoder_layers:
            x = layer.alone(x)
        return x

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return self.lm_head(hidden)
