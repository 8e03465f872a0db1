"""Generator: messages -> a stream of Step, character by character, for either architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studytiny.checkpoint import Model
from studytiny.errors import UserError
from studytiny.sampling import SamplingConfig, draw, shape_logits
from studytiny.tokenizer import END_ID, SPECIAL_TOKENS, TURN_OVERHEAD, Message, Tokenizer

PRECISIONS = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Candidate:
    """One possible next character.

    Attributes:
        token_id: its id; ``text`` is the character, or the name of a special token.
        raw_probability: as the model gave it.
        probability: after repetition penalty, temperature, top-k and top-p: what was drawn from.
    """

    token_id: int
    text: str
    raw_probability: float
    probability: float


@dataclass(frozen=True)
class Step:
    """One character of a reply: ``text`` is what it adds; ``candidates`` only when asked for, most probable first."""

    text: str
    token_id: int
    candidates: tuple[Candidate, ...] = ()


class Generator:
    """Answers conversations with one model. Safe to use from several threads: each reply has its own state."""

    def __init__(self, model: Model, tokenizer: Tokenizer, precision: str = "auto") -> None:
        """
        Args:
            model: from ``load_model``; its device is used.
            tokenizer: the model's own.
            precision: of the computation: ``float32`` (``auto`` means this for now) or ``bfloat16``.

        Raises:
            UserError: unknown precision, or a vocabulary of another size than the model's.
        """
        if precision not in PRECISIONS:
            raise UserError(f"不认识的精度 {precision!r}；可以用 {'、'.join(PRECISIONS)}。")
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"词表有 {tokenizer.vocab_size} 项，模型是按 {model.config.vocab_size} 项建的；两者必须是同一套。"
            )
        dtype = PRECISIONS[precision]
        model = model.eval()
        if next(model.parameters()).dtype != dtype:
            model = copy.deepcopy(model).to(dtype)  # the caller's model keeps its own precision
        self.model = model
        self.tokenizer = tokenizer
        # Added to the logits: a reply holds characters and, at its end, <|end|>; no other special token, ever.
        forbidden = torch.zeros(tokenizer.vocab_size)
        forbidden[: len(SPECIAL_TOKENS)] = -math.inf
        self._never_first = forbidden.clone()  # nor may <|end|> come first: a reply is never empty
        forbidden[END_ID] = 0
        self._never = forbidden

    def stream(
        self, messages: Sequence[Message], sampling: SamplingConfig | None = None, n_candidates: int = 0
    ) -> Iterator[Step]:
        """Yields the reply to ``messages`` one character at a time; closing the iterator stops the work.

        Args:
            messages: ``[{"role": "user" | "assistant", "content": str}, ...]``, the last one the user's. When they
                outgrow the window, whole turns are left out, oldest first.
            sampling: the settings; None takes the defaults.
            n_candidates: how many of the most probable next characters each Step tells about.

        Raises:
            UserError: before the first Step: no message to answer, or one that does not fit the window.
        """
        # Checked here and now, not when the caller first asks the iterator for a step.
        sampling = sampling or SamplingConfig()
        prompt = self._prompt(messages, sampling.max_new_tokens)
        return self._steps(prompt, sampling, n_candidates)

    def _steps(self, prompt: list[int], sampling: SamplingConfig, n_candidates: int) -> Iterator[Step]:
        random = torch.Generator()
        if sampling.seed is None:
            random.seed()
        else:
            random.manual_seed(sampling.seed)
        cache = self.model.new_cache()
        reply: list[int] = []
        unread = prompt
        while len(reply) < sampling.max_new_tokens and not cache.full:
            raw = self.model.next_logits(unread, cache).float().cpu()
            shaped = shape_logits(raw + (self._never if reply else self._never_first), reply, sampling)
            token_id = draw(shaped, random)
            if token_id == END_ID:
                return
            reply.append(token_id)
            unread = [token_id]
            candidates = self._candidates(raw, shaped, n_candidates) if n_candidates else ()
            yield Step(self.tokenizer.decode(unread), token_id, candidates)

    def reply(self, messages: Sequence[Message], sampling: SamplingConfig | None = None) -> str:
        """The whole reply; see ``stream``."""
        return "".join(step.text for step in self.stream(messages, sampling))

    def logits(self, messages: Sequence[Message]) -> Tensor:
        """Logits (vocab_size,) in float32, on the CPU, of the first character of the reply to ``messages``."""
        prompt = self._prompt(messages, SamplingConfig().max_new_tokens)
        return self.model.next_logits(prompt, self.model.new_cache()).float().cpu()

    def _candidates(self, raw: Tensor, shaped: Tensor, count: int) -> tuple[Candidate, ...]:
        raw_probabilities, probabilities = raw.softmax(0), shaped.softmax(0)
        best = raw_probabilities.topk(min(count, raw.numel())).indices.tolist()
        return tuple(
            Candidate(index, self.tokenizer.token(index), raw_probabilities[index].item(), probabilities[index].item())
            for index in best
        )

    def _prompt(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        """Ids of as many of the latest turns as fit, ending in the mark that asks for a reply."""
        check_messages(messages)
        turns = [message for message in messages if message["content"].strip()]
        window = self.model.config.max_length
        sizes = [len(turn["content"]) + TURN_OVERHEAD for turn in turns]
        longest = window - min(max_new_tokens, window // 8) - 1
        if sizes[-1] > longest:
            said = len(turns[-1]["content"])
            raise UserError(
                f"这句话有 {said} 个字，这个模型一次最多读 {longest - TURN_OVERHEAD} 个字；请缩短或分几次说。"
            )
        # Room for the reply comes first, but never more than half of the window: the rest is memory.
        available = window - min(max_new_tokens, window // 2) - 1
        first, total = len(turns) - 1, sizes[-1]
        for index in range(len(turns) - 2, -1, -1):
            total += sizes[index]
            if total > available:
                break
            if index == 0 or turns[index]["role"] == "user":  # what is left must not begin with an orphaned reply
                first = index
        return self.tokenizer.encode_dialogue(turns[first:], add_reply_mark=True).ids


def check_messages(messages: Sequence[Message]) -> None:
    """Raises UserError unless ``messages`` is a list of role/content turns that ends with something the user said."""
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError('每条消息应是 {"role": "user", "content": "文字"} 的形式。')
        if message.get("role") not in ("user", "assistant"):
            raise UserError(f"不认识的角色 {message.get('role')!r}；只能是 user 或 assistant。")
    if not messages or messages[-1]["role"] != "user":
        raise UserError("对话的最后一句应是用户说的话。")
    if not messages[-1]["content"].strip():
        raise UserError("消息是空的；请先输入一句话。")
