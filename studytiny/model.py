"""DialogueModel: the decoder that reads the whole conversation and predicts its next character.

The shape is Qwen3's, which is Llama's (RMSNorm before each block, rotary positions, causal attention, SwiGLU, no
biases) plus a norm on every query and key; input and output embeddings are one matrix. Parameter names are those of
Qwen3 in transformers, so what is learnt here reads the same there, and a test holds the logits of the two together.

Shapes in comments: B rows, T tokens, D d_model, H heads, K = D / H width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studytiny.errors import UserError

# Generous upper limits: a damaged config.json must not ask for a terabyte.
_LIMITS = {"vocab_size": 200_000, "d_model": 8192, "n_head": 256, "n_layers": 128, "max_length": 32_768, "d_ff": 65_536}


def check_sizes(config: object) -> None:
    """Raises UserError unless every size of a configuration is a whole number within reason and the heads fit."""
    for name, limit in _LIMITS.items():
        value = getattr(config, name, 1)
        if type(value) is not int or not 1 <= value <= limit:
            raise UserError(f"模型配置 {name}={value!r} 不对；应是 1 到 {limit} 的整数。")
    if config.d_model % config.n_head or (config.d_model // config.n_head) % 2:
        raise UserError(
            f"模型配置 d_model={config.d_model} 不能平均分给 n_head={config.n_head} 个头（每头宽度须是偶数）。"
        )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a DialogueModel.

    Attributes:
        vocab_size: entries of the vocabulary.
        d_model: width of the stream of vectors.
        n_head: attention heads.
        n_layers: blocks.
        max_length: the window: most tokens the model reads at once.
        d_ff: inner width of the feed-forward part; 0 picks 8/3 of d_model, which with three matrices costs as much as
            the classic 4 d_model with two.
        rope_theta: base of the rotary positions.
        norm_eps: added to the mean square before the root.
    """

    vocab_size: int
    d_model: int = 512
    n_head: int = 8
    n_layers: int = 4
    max_length: int = 256
    d_ff: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.d_ff == 0 and type(self.d_model) is int:
            object.__setattr__(self, "d_ff", max(32, round(self.d_model * 8 / 3 / 32) * 32))
        check_sizes(self)
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < 1e9:
                raise UserError(f"模型配置 {name}={value!r} 不对；应是一个正数。")


class RMSNorm(nn.Module):
    """Divides a vector by its root mean square, then scales every entry (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)
        if x.requires_grad:
            return NormWithGradient.apply(x, self.weight.type_as(x), self.eps)
        return x * inverse_rms(x, self.eps) * self.weight.type_as(x)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., D) -> (..., 1): one over the root of the mean square."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (length.square_() / x.shape[-1] + eps).rsqrt_().to(x.dtype)


class NormWithGradient(torch.autograd.Function):
    """``F.rms_norm`` with its gradient written out: on a CPU PyTorch's own takes three times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)  # (..., 1)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = gradient * unit
        # What points along x only made it longer, and the norm takes that away again.
        along = product @ (weight / unit.shape[-1]).unsqueeze(-1)  # (..., 1)
        to_x = torch.addcmul(gradient * weight, unit, along, value=-1).mul_(scale)
        return to_x, product.flatten(0, -2).sum(0), None


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (max_length, K) (RoFormer, Su et al. 2021)."""
    head_size = config.d_model // config.n_head
    frequencies = config.rope_theta ** (-torch.arange(0, head_size, 2).float() / head_size)  # (K/2,)
    angles = torch.outer(torch.arange(config.max_length).float(), frequencies).repeat(1, 2)  # (max_length, K)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns each pair of entries (i, i + K/2) by its position's angle; what then counts is only the distance."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class KVCache:
    """Keys and values of all that each conversation has read, so that a token is computed once.

    Every conversation owns a slot. A forward pass continues some of them (``at``), each from its own place.
    """

    def __init__(self, config: ModelConfig, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        # (layer, slot, H, max_length, K)
        shape = (config.n_layers, slots, config.n_head, config.max_length, config.d_model // config.n_head)
        # By way of NumPy, which leaves it to the system to hand out zeros where something is written at last.
        lazy = device.type == "cpu" and dtype == torch.float32
        self.keys, self.values = (
            torch.from_numpy(np.zeros(shape, np.float32)) if lazy else torch.zeros(shape, device=device, dtype=dtype)
            for _ in range(2)
        )

    def at(self, slots: list[int], starts: list[int], length: int) -> CacheRows:
        """The view of a pass whose row i reads ``length`` tokens more of slots[i], the first one at starts[i]."""
        device = self.keys.device
        end = max(starts) + length
        if end > self.keys.shape[3]:
            raise ValueError(f"{end} tokens do not fit the window of {self.keys.shape[3]}")
        positions = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(length, device=device)
        index = torch.tensor(slots, device=device)
        # Neighbouring slots are read in place; scattered ones must be copied together first.
        neighbours = slots == list(range(slots[0], slots[0] + len(slots)))
        rows = slice(slots[0], slots[0] + len(slots)) if neighbours else index
        # Without a mask every row sees all there is, or, from the very beginning on, what stands before each token.
        same = min(starts) == max(starts)
        masked = not (same and (length == 1 or starts[0] == 0))
        return CacheRows(self, index, rows, positions, end, masked, together=neighbours and same)


class CacheRows:
    """The part of a KVCache that one forward pass continues: B conversations, T new tokens each."""

    def __init__(
        self,
        cache: KVCache,
        index: Tensor,
        rows: Tensor | slice,
        positions: Tensor,
        end: int,
        masked: bool,
        together: bool = False,
    ) -> None:
        """``index`` (B,): the slots, and ``rows`` the same for reading; ``positions`` (B, T): places of the new tokens;
        ``end``: places to attend to, those beyond a token's own ``masked``; ``together``: all rows go on at one place,
        so that the new tokens are one block of the cache."""
        self.cache, self.index, self.rows, self.positions, self.end = cache, index, rows, positions, end
        self.together = together
        self.mask = None
        if masked:
            seen = torch.arange(end, device=positions.device) <= positions.unsqueeze(-1)
            self.mask = seen.unsqueeze(1)  # (B, 1, T, end), shared by the heads

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values (B, H, T, K) behind the old ones; returns all of them, (B, H, end, K)."""
        both = ((self.cache.keys[layer], keys), (self.cache.values[layer], values))
        for stored, new in both:
            if self.together:
                stored[self.rows, :, self.end - new.shape[2] : self.end] = new
            else:  # addresses (B, T, H, K)
                stored[self.index.unsqueeze(1), :, self.positions] = new.transpose(1, 2).to(stored.dtype)
        return tuple(stored[self.rows, :, : self.end] for stored, _ in both)


class Attention(nn.Module):
    """Every token gathers what it needs from the tokens before it (Vaswani et al. 2017, causal)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, head_size = config.d_model, config.d_model // config.n_head
        self.head_size = head_size
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.q_norm = RMSNorm(head_size, config.norm_eps)
        self.k_norm = RMSNorm(head_size, config.norm_eps)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """What each token asks for, what it can be found by, and what it has to say: queries, keys, values."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, layer: int, memory: CacheRows | None
    ) -> Tensor:
        rows, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:  # (B, T, D) -> (B, T, H, K)
            return projected.view(rows, length, -1, self.head_size)

        queries, keys, values = (heads(projected) for projected in self.project(x))
        queries = rotate(self.q_norm(queries).transpose(1, 2), *rotary)  # (B, H, T, K)
        keys = rotate(self.k_norm(keys).transpose(1, 2), *rotary)
        values = values.transpose(1, 2)
        if memory is not None:
            keys, values = memory.extend(layer, keys, values)
        # softmax(q k^T / sqrt(K)) v. Without a mask given, a query sees its own place and everything before it.
        if mask is not None and mask.dtype != torch.bool:
            scores = queries @ keys.transpose(-1, -2) / self.head_size**0.5 + mask
            mixed = scores.softmax(-1) @ values
        else:
            causal = mask is None and length > 1
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class FeedForward(nn.Module):
    """Works on each token alone: down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normalised copy and adds its result to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(0.0)  # training on a small corpus sets its share, see train.trainer

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, layer: int, memory: CacheRows | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, mask, layer, memory))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class DialogueModel(nn.Module):
    """ids of a conversation so far -> logits of every next character."""

    architecture = "studytiny"
    config_class = ModelConfig
    has_window = True  # it cannot read on where max_length ends

    def __init__(self, vocab_size: int, d_model: int = 512, n_head: int = 8, n_layers: int = 4, **more: float) -> None:
        """``more``: the other fields of ModelConfig, e.g. ``max_length=512``."""
        super().__init__()
        self.config = config = ModelConfig(vocab_size, d_model, n_head, n_layers, **more)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.depth = config.n_layers  # blocks in use: training may begin with the lower ones
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        cosine, sine = rotary_table(config)
        # Computed, not learnt: they follow the model to its device but are no part of the file.
        self.register_buffer("rotary_cosine", cosine, persistent=False)
        self.register_buffer("rotary_sine", sine, persistent=False)
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: ModelConfig) -> DialogueModel:
        return cls(**asdict(config))

    def reset_parameters(self) -> None:
        """Normal(0, 0.02); the two matrices of a block that add to the stream start smaller, so that depth does not
        inflate it (GPT-2, Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layers) ** 0.5)
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def hidden_states(self, ids: Tensor, segments: Tensor | None = None, memory: CacheRows | None = None) -> Tensor:
        """ids (B, T) -> vectors (B, T, D) from which ``unembed`` predicts the next token at each place.

        Args:
            segments: (B, T) whole numbers; a token sees only tokens of its own number, so that several dialogues can
                share a row in training without reading each other.
            memory: what each row has read before; keys and values of the new tokens are added to it.

        Raises:
            ValueError: more tokens than the window holds.
        """
        length = ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"{length} tokens do not fit the window of {self.config.max_length}")
        x = self.embed_tokens(ids)  # (B, T, D)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if memory is None:
            rotary = (self.rotary_cosine[:length], self.rotary_sine[:length])  # each (T, K)
        else:
            rotary = (
                self.rotary_cosine[memory.positions].unsqueeze(1),
                self.rotary_sine[memory.positions].unsqueeze(1),
            )
        rotary = (rotary[0].to(x.dtype), rotary[1].to(x.dtype))
        mask = memory.mask if memory is not None else None
        if segments is not None:
            same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
            mask = same.tril().unsqueeze(1)  # (B, 1, T, T), shared by the heads
        if mask is not None and x.device.type == "cpu":  # where plain matrix products are the faster attention
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        for layer, block in enumerate(islice(self.layers, self.depth)):
            x = block(x, rotary, mask, layer, memory)
        return self.norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V): how well each token's own embedding fits the vector."""
        return F.linear(hidden, self.embed_tokens.weight)

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); see ``hidden_states`` for the arguments."""
        return self.unembed(self.hidden_states(ids, segments))

    # What generator and evaluation need of any architecture.

    def independent_logits(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V), no row influencing another: simply ``forward``."""
        return self(ids)

    def new_cache(self, slots: int = 1) -> KVCache:
        """An empty memory for ``slots`` conversations."""
        return KVCache(self.config, slots, self.device, self.embed_tokens.weight.dtype)

    def next_hidden(self, ids: list[list[int]], cache: KVCache, slots: list[int], starts: list[int]) -> Tensor:
        """Reads ``ids`` (B lists of T tokens), row i as continuation of slots[i] from place starts[i]; returns the
        vectors (B, D) behind the last ones, for ``unembed``."""
        memory = cache.at(slots, starts, len(ids[0]))
        return self.hidden_states(torch.tensor(ids, device=self.device), memory=memory)[:, -1]
