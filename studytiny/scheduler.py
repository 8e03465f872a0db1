"""Many conversations, one model: who reads how much in the next step (continuous batching, Orca, Yu et al. 2022).

One thread makes step after step as long as there is anything to do, and ends when there is not. Before each step it
looks who has come and who has gone; a reply of five characters therefore never waits for one of five hundred. A long
prompt is read in pieces beside the others' next characters, so that it does not make them wait either (chunked
prefill, Sarathi, Agrawal et al. 2023).
"""

from __future__ import annotations

import atexit
import math
import queue
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from studytiny.cores import use_one_thread_here
from studytiny.engine import Engine, Row
from studytiny.errors import UserError
from studytiny.sampling import MAX_NEW_TOKENS, SamplingConfig, Shaped, draw, shape_logits
from studytiny.tokenizer import END_ID, PAD_ID, SPECIAL_TOKENS, Tokenizer

PIECE = 64  # prompt tokens read in one step, of all conversations together
AHEAD = 8  # characters written that the reader has not taken yet; then its conversation rests
PATIENCE = 60.0  # seconds a conversation may rest before its slot is given away
BUNCH = 4  # characters handed over together while they come faster than
SOON = (
    0.005  # this many seconds apart: nobody reads that fast, and waking a thread takes as long as drawing a character
)
LARGE_K = 256  # a top_k above this is worked out apart, so that it slows down only its own conversation


class GeneratorBusy(UserError):
    """Too many conversations wait already."""


class GeneratorClosed(UserError):
    """The generator was closed, before the question or in the middle of the reply."""


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


@dataclass(eq=False)
class Conversation:
    """A reply being written: what the scheduler knows of it. Only the scheduler's thread changes it, but for ``left``
    and ``taken``, which are the reader's."""

    unread: list[int]  # the prompt at first (and the reply if it is begun), then the character just written
    sampling: SamplingConfig
    n_candidates: int
    caller: Hashable
    random: random.Random = field(init=False)
    reply: list[int] = field(default_factory=list)  # not empty from the start if the reply is to begin so
    slot: int | None = None
    read: int = 0  # tokens
    made: int = 0  # steps, also the one that says the end
    unsent: list[Step | BaseException | None] = field(default_factory=list)
    sent_at: float = -math.inf
    taken: int = 0
    left: bool = False  # the reader is gone, or the reply is complete
    rests_since: float | None = None
    # Bunches of steps; None is the end.
    steps: queue.SimpleQueue[list[Step | BaseException | None]] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)  # None seeds it from the system's entropy

    def give(self, step: Step | BaseException | None) -> None:
        """Hands a step to the reader; the end or an error is the last."""
        ended = not isinstance(step, Step)
        self.left = self.left or ended
        self.made += 1
        self.unsent.append(step)
        now = time.monotonic()
        if ended or len(self.unsent) >= BUNCH or now - self.sent_at >= SOON:
            self.steps.put(self.unsent)
            self.unsent, self.sent_at = [], now


class Reply(Iterator[Step]):
    """The steps of one reply as they are written. ``close`` (or dropping it) ends the work on it at once."""

    def __init__(self, scheduler: Scheduler, conversation: Conversation) -> None:
        self._scheduler = scheduler
        self._conversation = conversation
        self._ended = False
        self._bunch: deque[Step | BaseException | None] = deque()

    def __next__(self) -> Step:
        if self._ended:
            raise StopIteration
        if not self._bunch:
            self._bunch += self._conversation.steps.get()
        step = self._bunch.popleft()
        self._conversation.taken += 1
        if isinstance(step, Step):
            self._scheduler.wake_if_asleep()
            return step
        self._ended = True
        raise StopIteration if step is None else step

    def close(self) -> None:
        """Nobody will read on."""
        if not self._ended:
            self._ended = self._conversation.left = True
            self._scheduler.wake_if_asleep()

    def __del__(self) -> None:
        self.close()


class Scheduler:
    """Conversations in, characters out; see the top of this file."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, window: float, running: int, waiting: int) -> None:
        """
        Args:
            engine: has ``running`` slots.
            window: most tokens of one conversation; may be infinite.
            running: most conversations answered at once.
            waiting: most conversations that wait for a slot.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._window = window
        self._free = list(range(running))[::-1]
        self._most_waiting = waiting
        self._most_of_one = max(1, running // 2)  # caller
        self._running: list[Conversation] = []
        self._waiting: list[Conversation] = []
        self._changed = threading.Condition()  # guards the lists, the thread and ``closed``
        self._thread: threading.Thread | None = None  # the latest
        self._working = False  # is it at work, or has it ended, or is about to?
        self._asleep = False
        self._closed = False
        # The replies so far, for the repetition penalty: (slot, character). NumPy's, because PyTorch lets other threads
        # run at every single entry that is written.
        self._replies = np.full((running, MAX_NEW_TOKENS), PAD_ID)
        _schedulers.add(self)

    # the readers' side

    def submit(self, conversation: Conversation) -> Reply:
        """Puts a conversation in line.

        Raises:
            GeneratorBusy: the line is full. A caller with more in line than this one gives way instead.
            GeneratorClosed: after ``close``.
        """
        with self._changed:
            if self._closed:
                raise _closed()
            self._waiting = [other for other in self._waiting if not other.left]
            if len(self._waiting) >= self._most_waiting + len(self._free):  # a free slot is taken before the next step
                self._make_room(conversation.caller)
            self._waiting.append(conversation)
            if not self._working:
                self._working = True
                self._thread = threading.Thread(target=self._work, args=(self._thread,), name="generator", daemon=True)
                self._thread.start()
            self._changed.notify()
        return Reply(self, conversation)

    @property
    def in_line(self) -> int:
        """Conversations that wait because every slot is taken."""
        with self._changed:
            waiting = sum(not other.left for other in self._waiting)
            return max(0, waiting - len(self._free) - sum(each.left for each in self._running))

    def _make_room(self, newcomer: str) -> None:
        """Sends away the last in line of whoever has most there, if that is not the newcomer."""
        in_line = Counter(other.caller for other in self._waiting)
        heaviest, count = in_line.most_common(1)[0]
        if in_line[newcomer] + 1 >= count:
            raise _busy(len(self._waiting))
        last = next(other for other in reversed(self._waiting) if other.caller == heaviest)
        self._waiting.remove(last)
        last.give(_busy(len(self._waiting)))

    def wake_if_asleep(self) -> None:
        """A reader took a step or left: there may be something to do again."""
        if self._asleep:  # else it will see for itself before the next step
            with self._changed:
                self._changed.notify()

    def close(self) -> None:
        """Ends every conversation; the engine is closed too. Returns when no step is being computed any more."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._engine.close()

    # the thread's side

    @torch.inference_mode()
    def _work(self, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()  # so that waiting for the latest is waiting for all
        use_one_thread_here()
        while conversations := self._next():
            shares = self._shares(conversations)
            rows = [self._row(conversation, share) for conversation, share in shares]
            answered = [conversation for (conversation, _), row in zip(shares, rows, strict=True) if row.wanted]
            try:
                logits = self._engine.step(rows)
                for conversation, row in zip((conversation for conversation, _ in shares), rows, strict=True):
                    conversation.read += len(row.ids)
                    del conversation.unread[: len(row.ids)]
                if answered:
                    self._continue(answered, logits)
            except BaseException as error:  # whatever it was, the readers must not wait for ever
                for conversation, _ in shares:
                    conversation.give(error)

    def _next(self) -> list[Conversation]:
        """The conversations that can go on, at least one; sleeps until there is one, none when all is done."""
        with self._changed:
            while True:
                if self._closed:
                    for conversation in [*self._running, *self._waiting]:
                        if not conversation.left:
                            conversation.give(_closed())
                self._admit()
                self._asleep = True  # before looking: a reader who takes a step now will wake us
                ready = [each for each in self._running if not self._rests(each)]
                if not ready and self._running:  # every reader is behind
                    self._changed.wait(PATIENCE / 2)
                    continue
                self._asleep = False
                if not ready:
                    self._working = False  # the next one to come starts another
                return ready

    def _admit(self) -> None:
        """Lets those go who left, and gives their slots to those in line: next is whose caller has fewest running.

        Half of the slots are more than one caller gets, whoever else is there: the next to come finds a free one.
        """
        running, self._running = self._running, []
        for each in running:  # asked once each: a reader may leave at any moment
            if each.left:
                self._free.append(each.slot)
            else:
                self._running.append(each)
        self._waiting = [each for each in self._waiting if not each.left]
        served = Counter(each.caller for each in self._running)
        while self._free and self._waiting:
            next_one = min(self._waiting, key=lambda each: served[each.caller])  # the first in line among equals
            if served[next_one.caller] >= self._most_of_one:
                break
            served[next_one.caller] += 1
            self._waiting.remove(next_one)
            next_one.slot = self._free.pop()
            self._replies[next_one.slot] = PAD_ID
            self._replies[next_one.slot, : len(next_one.reply)] = next_one.reply
            self._running.append(next_one)

    def _rests(self, conversation: Conversation) -> bool:
        """Whether its reader is so far behind that there is no use in going on; after a time it loses its slot."""
        if conversation.made - conversation.taken < AHEAD:
            conversation.rests_since = None
            return False
        now = time.monotonic()
        conversation.rests_since = conversation.rests_since or now
        if now - conversation.rests_since >= PATIENCE and not conversation.left:
            conversation.give(UserError(f"这条回复有 {PATIENCE:.0f} 秒没有人接着读，已经停下；请重新提问。"))
        return True

    def _shares(self, conversations: Sequence[Conversation]) -> list[tuple[Conversation, int]]:
        """How many tokens each may read in this step: one who is writing its character, the prompts a piece."""
        shares = []
        left = PIECE
        for each in conversations:
            writes = each.made > 0
            share = 1 if writes else min(len(each.unread), left)
            left -= 0 if writes else share
            if share:
                shares.append((each, share))
        return shares

    def _row(self, conversation: Conversation, share: int) -> Row:
        ids = conversation.unread[:share]
        return Row(conversation.slot, conversation.read, ids, wanted=share == len(conversation.unread))

    def _continue(self, conversations: Sequence[Conversation], raw: Tensor) -> None:
        """Draws the next character of each from its logits (R, V) and hands it to its reader."""
        logits = raw.clone() if any(each.n_candidates for each in conversations) else raw
        # A reply holds characters and, at its end, <|end|>; no other special token, ever.
        logits[:, :END_ID] = logits[:, END_ID + 1 : len(SPECIAL_TOKENS)] = -math.inf
        for row, each in enumerate(conversations):
            if not each.reply:
                logits[row, END_ID] = -math.inf  # a reply is never empty
        # Those who choose among very many go apart; for one, it is the same as if they were not there.
        large = [not 0 < each.sampling.top_k <= LARGE_K and each.sampling.temperature > 0 for each in conversations]
        if any(large) and not all(large):
            drawn: dict[int, Step | UserError | None] = {}  # row -> what its reader gets
            for apart in (False, True):
                rows = [row for row, is_large in enumerate(large) if is_large is apart]
                group = [conversations[row] for row in rows]
                drawn |= zip(rows, self._draw(group, logits[rows], raw[rows]), strict=True)
        else:
            drawn = dict(enumerate(self._draw(conversations, logits, raw)))
        # All of it at the end: the readers wake up at once and would take the processor from what is left to do.
        for row, each in enumerate(conversations):
            step = drawn[row]
            if isinstance(step, Step):
                self._replies[each.slot, len(each.reply)] = step.token_id
                each.reply.append(step.token_id)
                each.unread.append(step.token_id)
            each.give(step)
            if not each.left and (len(each.reply) >= each.sampling.max_new_tokens or each.read >= self._window):
                each.give(None)

    def _draw(self, group: Sequence[Conversation], logits: Tensor, raw: Tensor) -> Iterator[Step | UserError | None]:
        """The next character of each; None is the end. ``raw``: the logits (R, V) before anything was forbidden."""
        longest = max(len(each.reply) for each in group)
        replies = torch.from_numpy(self._replies[[each.slot for each in group], :longest])
        shaped = shape_logits(logits, replies, [each.sampling for each in group], self._engine.top)
        token_ids = draw(shaped, [each.random.random() for each in group])
        for row, (each, token_id, sound) in enumerate(zip(group, token_ids, shaped.are_numbers(), strict=True)):
            if not sound:
                yield UserError("模型算出的不是数（NaN）：模型文件可能坏了；请换一个模型或重新训练。")
            elif token_id == END_ID:
                yield None
            else:
                candidates = self._candidates(raw[row], shaped, row, each.n_candidates) if each.n_candidates else ()
                yield Step(self._tokenizer.decode([token_id]), token_id, candidates)

    def _candidates(self, raw: Tensor, shaped: Shaped, row: int, count: int) -> tuple[Candidate, ...]:
        chances = torch.zeros_like(raw, dtype=torch.float64)
        chances[shaped.ids[row]] = shaped.logits[row].softmax(-1)
        raw_chances = raw.softmax(-1)
        best = raw_chances.topk(min(count, raw.numel())).indices.tolist()
        return tuple(
            Candidate(index, self._tokenizer.token(index), raw_chances[index].item(), chances[index].item())
            for index in best
        )


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """No step may run on while Python takes itself apart."""
    for scheduler in list(_schedulers):
        scheduler.close()


def _busy(waiting: int) -> GeneratorBusy:
    return GeneratorBusy(f"现在提问的人太多，已经有 {waiting} 个在排队；请过一会儿再试。")


def _closed() -> GeneratorClosed:
    return GeneratorClosed("这个生成器已经关闭，不能再回答；请重新建一个。")
