"""Generator: messages -> a stream of Step, character by character, for either architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from studytiny.checkpoint import Model
from studytiny.engine import make_engine
from studytiny.errors import UserError
from studytiny.precision import choose_precision
from studytiny.sampling import SamplingConfig
from studytiny.scheduler import Candidate, Conversation, GeneratorBusy, GeneratorClosed, Reply, Scheduler, Step
from studytiny.tokenizer import SPECIAL_TOKENS, TURN_OVERHEAD, UNK_ID, Message, Tokenizer

__all__ = ["Candidate", "Generator", "GeneratorBusy", "GeneratorClosed", "Reply", "Step", "check_messages"]


class Generator:
    """Answers conversations with one model, many at once, from any number of threads.

    A reply depends on its messages, its settings and its seed, never on what else is being answered.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        precision: str = "auto",
        max_running: int = 32,
        max_waiting: int = 64,
    ) -> None:
        """
        Args:
            model: from ``load_model``; its device is used.
            tokenizer: the model's own.
            precision: ``float32``, ``bfloat16``, ``float16`` or ``int8``; ``auto`` takes what is fastest on this device
                and says the same, see ``studytiny.precision``.
            max_running: most conversations answered at once.
            max_waiting: most conversations that wait while so many are; the next one is turned away.

        Raises:
            UserError: unknown precision, or a vocabulary of another size than the model's.
        """
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                f"词表有 {tokenizer.vocab_size} 项，模型是按 {model.config.vocab_size} 项建的；两者必须是同一套。"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.precision = choose_precision(precision, model)
        window = model.config.max_length if model.has_window else math.inf
        engine = make_engine(model, self.precision, max_running)
        self._scheduler = Scheduler(engine, tokenizer, window, max_running, max_waiting)

    def stream(
        self,
        messages: Sequence[Message],
        sampling: SamplingConfig | None = None,
        n_candidates: int = 0,
        caller: str | None = None,
        begun: Sequence[int] = (),
    ) -> Reply:
        """Starts the reply to ``messages`` and yields it one character at a time; closing the iterator stops the work.

        Args:
            messages: ``[{"role": "user" | "assistant", "content": str}, ...]``, the last one the user's. When they
                outgrow the window, whole turns are left out, oldest first.
            sampling: the settings; None takes the defaults.
            n_candidates: how many of the most probable next characters each Step tells about.
            caller: who asks. However many it sends, no caller gets more than half of the places, and where
                conversations wait, each is served in turn. None: somebody of its own.
            begun: ids of the characters that the reply begins with; only what follows them is yielded, and they count
                among ``max_new_tokens``.

        Raises:
            UserError: before the first Step: no message to answer, or one that does not fit the window; a beginning
                that fills ``max_new_tokens``, or one with something that is no character.
            GeneratorBusy, GeneratorClosed (UserErrors): too many wait already; ``close`` was called.
        """
        sampling = sampling or SamplingConfig()
        prompt = self._prompt(messages, sampling.max_new_tokens)
        begun = list(begun)
        longest = min(sampling.max_new_tokens, self.model.config.max_length - len(prompt))
        characters = {UNK_ID, *range(len(SPECIAL_TOKENS), self.tokenizer.vocab_size)}
        if len(begun) >= longest or not characters.issuperset(begun):
            raise UserError(f"回答的开头要由字组成，而且要短于 {longest} 个字；请调大最大长度或换一句短的。")
        return self._scheduler.submit(
            Conversation(prompt + begun, sampling, n_candidates, caller or object(), reply=begun)
        )

    def reply(
        self, messages: Sequence[Message], sampling: SamplingConfig | None = None, caller: str | None = None
    ) -> str:
        """The whole reply; see ``stream``."""
        return "".join(step.text for step in self.stream(messages, sampling, caller=caller))

    @property
    def in_line(self) -> int:
        """How many conversations wait at this moment because ``max_running`` others are being answered."""
        return self._scheduler.in_line

    @torch.inference_mode()
    def logits(self, messages: Sequence[Message]) -> Tensor:
        """Logits (vocab_size,) in float32, on the CPU, of the first character of the reply to ``messages``.

        They are the model's own, before ``precision`` rounds anything: for tests and lessons.
        """
        prompt = self._prompt(messages, SamplingConfig().max_new_tokens)
        hidden = self.model.next_hidden([prompt], self.model.new_cache(), [0], [0])
        return self.model.unembed(hidden[0]).float().cpu()

    def close(self) -> None:
        """Stops every reply, tells its readers, and gives back what the generator holds; no question may follow."""
        self._scheduler.close()

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
