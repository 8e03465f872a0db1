"""How the next character is chosen: repetition penalty -> temperature -> top-k -> top-p -> draw.

Each stage is a pure function on the last axis of its tensors: one conversation is (V,), and R conversations with
settings of their own are (R, V) with settings (R, 1). -inf means "never".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studytiny.errors import UserError

MAX_NEW_TOKENS = 2048
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of one reply, checked when made.

    Attributes:
        temperature: 0 to 10. Divides the logits: below 1 plays safe, above 1 dares; 0 always takes the best (greedy).
        top_k: only the k best characters may be drawn; 0 = all.
        top_p: 0 < p <= 1. Only the smallest set of best characters that together reach this probability; 1 = all.
        repetition_penalty: above 0, at most 10. Makes characters that the reply already holds less likely; 1 = off.
        max_new_tokens: 1 to 2048. Longest reply, in characters.
        seed: the same seed gives the same reply; None draws a new one each time.

    Raises:
        UserError (a ValueError): a value of the wrong type, not finite, or out of range.
    """

    temperature: float = 0.5  # with 0.7, 2 in 100 more of the probes come out wrong
    top_k: int = 50
    top_p: float = 0.9  # the rest is mostly slips: with it, 3 in 100 more of the probes come out right
    repetition_penalty: float = 1.1
    max_new_tokens: int = 100
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_number("temperature（温度）", self.temperature, 0, 10)
        _check_whole("top_k", self.top_k, 0, 1_000_000)
        _check_number("top_p", self.top_p, 0, 1, above_low=True)
        _check_number("repetition_penalty（重复惩罚）", self.repetition_penalty, 0, 10, above_low=True)
        _check_whole("max_new_tokens（最大长度）", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        if self.seed is not None:
            _check_whole("seed（随机种子）", self.seed, 0, MAX_SEED)


def _check_number(name: str, value: object, low: float, high: float, above_low: bool = False) -> None:
    # bool is an int to Python, but True is no temperature.
    fits = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    if not fits or (above_low and value == low):
        lower = f"大于 {low}、不超过" if above_low else f" {low} 到"
        raise UserError(f"{name} 应是{lower} {high} 的数，收到的是 {value!r}。")


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name} 应是 {low} 到 {high} 的整数，收到的是 {value!r}。")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor | float) -> Tensor:
    """Makes every token of ``seen`` (..., n) less likely, once: a positive logit is divided by ``penalty``, a negative
    one multiplied (CTRL, Keskar et al. 2019). Dividing negative ones too would make them *more* likely."""
    values = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(values > 0, values / penalty, values * penalty))


def apply_temperature(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Sharpens (below 1) or flattens (above 1) the distribution; ``temperature`` must be above 0."""
    return logits / temperature


def keep_top_k(ordered: Tensor, k: Tensor | int) -> Tensor:
    """Forbids all but the k best of logits that stand in falling order (Fan et al. 2018)."""
    return ordered.masked_fill(torch.arange(ordered.shape[-1], device=ordered.device) >= k, -math.inf)


def keep_top_p(ordered: Tensor, p: Tensor | float) -> Tensor:
    """Forbids all but the fewest best of logits in falling order whose probabilities sum to at least ``p``; the best
    one always stays (nucleus sampling, Holtzman et al. 2020)."""
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # Rounding may bring a sum to 1 too early, and p = 1 forbids nothing.
    return ordered.masked_fill((before >= p) & (torch.as_tensor(p) < 1), -math.inf)


def best_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, in falling order, and which they are; each (..., k)."""
    return logits.topk(k)


def shape_logits(
    logits: Tensor,
    replies: Tensor,
    configs: Sequence[SamplingConfig],
    top: Callable[[Tensor, int], tuple[Tensor, Tensor]] = best_first,
) -> Shaped:
    """All stages before the draw, for R conversations at once: logits (R, V) -> the best of each row, (R, k).

    ``replies`` (R, n) are the replies' characters so far; shorter ones are filled up with any token that is never
    drawn. The user's own words are not penalised: a good answer often repeats them, a name for instance. ``top`` does
    what ``best_first`` does, for an engine that does it faster.
    """
    size = logits.shape[-1]
    if replies.numel() and any(config.repetition_penalty != 1 for config in configs):
        penalty = _column(logits, [config.repetition_penalty for config in configs])
        logits = penalize_repetition(logits, replies, penalty)
    k = [1 if config.temperature == 0 else min(config.top_k or size, size) for config in configs]
    # Top-k before temperature, which does not change the order: what follows has k entries instead of V. They are
    # float64 so that a sum does not depend on how many entries other conversations ask for.
    values, ids = top(logits, max(k))
    ordered = apply_temperature(values.double(), _column(values, [config.temperature or 1 for config in configs]))
    if min(k) < max(k):
        ordered = keep_top_k(ordered, _column(ordered, k))
    if any(config.top_p < 1 for config in configs):
        ordered = keep_top_p(ordered, _column(ordered, [config.top_p for config in configs]))
    return Shaped(ordered, ids)


@dataclass(frozen=True)
class Shaped:
    """The tokens that may be drawn: ``logits`` (R, k) in falling order, and which token each one is, ``ids`` (R, k)."""

    logits: Tensor
    ids: Tensor

    def are_numbers(self) -> list[bool]:
        """Of each row: False if the model's logits were broken (NaN, or nothing but -inf)."""
        return torch.isfinite(self.logits[..., 0]).tolist()  # NaN counts as the largest


def _column(like: Tensor, values: Sequence[float]) -> Tensor:  # (R, 1)
    return torch.tensor(values, device=like.device, dtype=like.dtype).unsqueeze(-1)


def draw(shaped: Shaped, uniform: Sequence[float]) -> list[int]:
    """One token id a row, drawn with the probabilities softmax(logits).

    ``uniform``: a random number from [0, 1) for each row. It falls into one of the intervals that the probabilities,
    laid end to end, make of the line from 0 to 1.
    """
    ends = shaped.logits.softmax(-1).cumsum(-1)
    place = (ends <= _column(ends, uniform) * ends[..., -1:]).sum(-1)
    last = torch.isfinite(shaped.logits).sum(-1) - 1  # rounding must not lead beyond what is allowed
    return shaped.ids.gather(-1, torch.minimum(place, last).unsqueeze(-1)).squeeze(-1).tolist()
