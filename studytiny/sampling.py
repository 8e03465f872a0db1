"""How the next character is chosen: repetition penalty -> temperature -> top-k -> top-p -> draw.

Each stage is a pure function from logits (V,) to logits (V,); -inf means "never".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
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


def penalize_repetition(logits: Tensor, seen_ids: Sequence[int], penalty: float) -> Tensor:
    """Makes every token of ``seen_ids`` less likely, once: a positive logit is divided by ``penalty``, a negative one
    multiplied (CTRL, Keskar et al. 2019). Dividing negative ones too would make them *more* likely."""
    if penalty == 1 or not seen_ids:
        return logits
    index = torch.tensor(sorted(set(seen_ids)), device=logits.device)
    seen = logits[index]
    return logits.index_copy(0, index, torch.where(seen > 0, seen / penalty, seen * penalty))


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Sharpens (below 1) or flattens (above 1) the distribution; ``temperature`` must be above 0."""
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Forbids all but the k best; 0 keeps all (Fan et al. 2018)."""
    if k == 0 or k >= logits.numel():
        return logits
    best = logits.topk(k)
    return torch.full_like(logits, -math.inf).index_copy(0, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Forbids all but the fewest best whose probabilities sum to at least ``p``; the best one always stays
    (nucleus sampling, Holtzman et al. 2020)."""
    if p == 1:
        return logits
    ordered = logits.sort(descending=True)
    probabilities = ordered.values.softmax(0)
    beyond = probabilities.cumsum(0) - probabilities >= p  # what stands before a token already reaches p
    return logits.index_fill(0, ordered.indices[beyond], -math.inf)


def shape_logits(logits: Tensor, reply_ids: Sequence[int], config: SamplingConfig) -> Tensor:
    """All stages before the draw. Greedy (temperature 0) leaves only the best token.

    ``reply_ids`` are the reply's characters so far. The user's own words are not penalised: a good answer often
    repeats them, a name for instance.
    """
    logits = penalize_repetition(logits, reply_ids, config.repetition_penalty)
    if config.temperature == 0:
        return keep_top_k(logits, 1)
    logits = apply_temperature(logits, config.temperature)
    return keep_top_p(keep_top_k(logits, config.top_k), config.top_p)


def draw(logits: Tensor, random: torch.Generator) -> int:
    """Draws one token id with the probabilities softmax(logits)."""
    allowed = torch.isfinite(logits).nonzero().squeeze(1)  # drawing among the few allowed is 10 times faster
    choice = torch.multinomial(logits[allowed].softmax(0), 1, generator=random)
    return int(allowed[choice])
