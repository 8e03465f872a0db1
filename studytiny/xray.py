"""A look inside a reply: how sure the model was at each place, what else it considered, and where its heads looked.

All of it is computed anew from the finished conversation, in one pass of the model in float32: the generator that wrote
the reply need not remember anything. What other settings would have done follows from the logits alone, at once.

Shapes in comments: T tokens, V vocabulary, L layers, H heads, K width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from studytiny.checkpoint import Model
from studytiny.errors import UserError
from studytiny.model import DialogueModel, rotate
from studytiny.sampling import SamplingConfig, apply_temperature, keep_top_k, keep_top_p, penalize_repetition
from studytiny.tokenizer import END_ID, SPECIAL_TOKENS, TURN_OVERHEAD, Message, Tokenizer

STAGES = ("raw", "penalty", "temperature", "top_k", "top_p")  # a probability after each of them, in this order
NEVER_SAID = [index for index in range(len(SPECIAL_TOKENS)) if index != END_ID]


@dataclass(frozen=True, eq=False)
class Inside:
    """A conversation and its last reply, from inside.

    Attributes:
        ids: the conversation as the model reads it, up to the reply's ``<|end|>``, (T,).
        roles: who speaks at each place: 0 user, 1 assistant, (T,).
        begin: place of the reply's first character.
        logits: (T - begin, V) float32: row i is what the model gave for the token at place ``begin`` + i.
        attention: (L, H, T, T) float32: what a head gathers at a place (third axis) comes from earlier places (fourth
            axis) in these shares; None if the architecture never looks at an earlier place.
    """

    ids: list[int]
    roles: list[int]
    begin: int
    logits: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class Chance:
    """A token that could stand at a place; ``probabilities``: one after each of STAGES."""

    token_id: int
    text: str
    probabilities: tuple[float, ...]


@torch.inference_mode()
def look_inside(model: Model, tokenizer: Tokenizer, messages: Sequence[Message]) -> Inside:
    """The reply that ends ``messages``; turns that do not fit the window are left out, oldest first.

    Raises:
        UserError: the last message is not a reply of the assistant, or does not fit the window with its question.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError("要看的对话应以模型的回答结尾。")
    window = model.config.max_length
    first = 0
    while first < len(messages) - 2 and _tokens(messages[first:]) > window:
        first += 2 if messages[first]["role"] == "user" else 1
    encoded = tokenizer.encode_dialogue(messages[min(first, len(messages) - 2) :])
    if len(encoded.ids) > window:
        raise UserError(f"这一问一答有 {len(encoded.ids)} 个标记，模型一次最多读 {window} 个；请看一句短些的。")
    begin = encoded.turn_starts[-1] + 1
    ids = torch.tensor([encoded.ids], device=model.device)
    logits = model.independent_logits(ids)[0, begin - 1 : -1].float().cpu()
    attention = attention_shares(model, ids) if isinstance(model, DialogueModel) else None
    return Inside(encoded.ids, encoded.roles, begin, logits, attention)


def _tokens(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) + TURN_OVERHEAD for message in messages)


@torch.inference_mode()
def attention_shares(model: DialogueModel, ids: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) of every head, for ids (1, T): (L, H, T, T). A row sums to 1; what lies ahead has 0."""
    shares: list[Tensor] = []

    def note(attention: nn.Module, arguments: tuple) -> None:
        x, rotary = arguments[:2]  # (1, T, D), and what turns queries and keys by their place
        heads = (*x.shape[:2], -1, attention.head_size)
        queries, keys, _ = attention.project(x)
        queries = rotate(attention.q_norm(queries.view(heads)).transpose(1, 2), *rotary)  # (1, H, T, K)
        keys = rotate(attention.k_norm(keys.view(heads)).transpose(1, 2), *rotary)
        scores = (queries @ keys.mT / attention.head_size**0.5)[0]
        ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
        shares.append(scores.masked_fill(ahead, -math.inf).softmax(-1).float().cpu())

    hooks = [layer.self_attn.register_forward_pre_hook(note) for layer in model.layers]
    try:
        model.hidden_states(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares)


def certainty(inside: Inside) -> list[float]:
    """The model's own probability of each token of the reply, that of its ``<|end|>`` last."""
    tokens = torch.tensor(inside.ids[inside.begin :]).unsqueeze(1)
    return inside.logits.softmax(-1).gather(1, tokens).squeeze(1).tolist()


def chances(
    inside: Inside, tokenizer: Tokenizer, index: int, sampling: SamplingConfig, count: int = 10
) -> list[Chance]:
    """The ``count`` tokens most likely to be drawn at place ``index`` of the reply under ``sampling``, and the one that
    stands there if it is none of them; those that cannot be drawn follow in the order of the model's own probability.

    Raises:
        IndexError: the reply has no such place.
    """
    raw = inside.logits[index].double()
    said = inside.ids[inside.begin : inside.begin + index]
    greedy = sampling.temperature == 0
    allowed = raw.index_fill(0, torch.tensor(NEVER_SAID), -math.inf)
    if index == 0:
        allowed[END_ID] = -math.inf  # a reply is never empty
    if said:
        allowed = penalize_repetition(allowed, torch.tensor(sorted(set(said))), sampling.repetition_penalty)
    heated = allowed if greedy else apply_temperature(allowed, sampling.temperature)
    ordered, order = heated.sort(descending=True)
    kept = keep_top_k(ordered, 1 if greedy else sampling.top_k or len(ordered))
    back = order.argsort()
    stages = (raw, allowed, heated, kept[back], keep_top_p(kept, sampling.top_p)[back])
    probabilities = torch.stack([stage.softmax(-1) for stage in stages])  # (len(STAGES), V)
    # A probability of the model is below 1, so what can be drawn at all stands before what cannot.
    best = (probabilities[-1] + (probabilities[-1] > 0) + probabilities[0]).topk(min(count, len(raw))).indices.tolist()
    best.sort(key=lambda token: (-probabilities[-1, token].item(), -probabilities[0, token].item()))
    here = inside.ids[inside.begin + index]
    shown = best if here in best else [*best, here]
    return [Chance(token, tokenizer.token(token), tuple(probabilities[:, token].tolist())) for token in shown]


def looked_at(inside: Inside, layer: int, head: int, index: int) -> list[float] | None:
    """Where a head looked when the token at place ``index`` of the reply was chosen: the share of every place from the
    beginning on, up to the one before it; None if the architecture never looks back.

    Raises:
        UserError: there is no such layer or head.
    """
    if inside.attention is None:
        return None
    layers, heads = inside.attention.shape[:2]
    if not (0 <= layer < layers and 0 <= head < heads):
        raise UserError(f"没有第 {layer + 1} 层第 {head + 1} 个头：这个模型有 {layers} 层，每层 {heads} 个头。")
    place = inside.begin + index - 1
    return inside.attention[layer, head, place, : place + 1].tolist()
