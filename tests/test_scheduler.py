"""Many conversations at once: fair, bounded, and nothing left behind."""

import gc
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assistant, user

from studytiny import Generator, GeneratorBusy, GeneratorClosed, SamplingConfig, UserError
from studytiny.scheduler import AHEAD, PIECE, Conversation, Scheduler
from studytiny.tokenizer import END_ID

LETTER = 20  # what the stand-in always writes


class StandIn:
    """An engine that writes one and the same character, keeps a record and does what the test tells it."""

    def __init__(self, vocab_size):
        self.logits = torch.zeros(vocab_size)
        self.logits[LETTER] = 50.0
        self.steps = []
        self.go = threading.Event()
        self.go.set()
        self.error = None
        self.closed = 0

    def step(self, rows):
        assert self.go.wait(20)
        assert len({row.slot for row in rows}) == len(rows)
        self.steps.append(rows)
        if self.error:
            raise self.error
        return self.logits.repeat(sum(row.wanted for row in rows), 1)

    def top(self, logits, k):
        return logits.topk(k)

    def close(self):
        self.closed += 1


@pytest.fixture
def engine(tokenizer):
    return StandIn(tokenizer.vocab_size)


@pytest.fixture
def scheduler(engine, tokenizer):
    scheduler = Scheduler(engine, tokenizer, window=1000, running=4, waiting=6)
    yield scheduler
    engine.go.set()
    scheduler.close()


def ask(scheduler, caller=None, length=5, prompt=3, **settings):
    sampling = SamplingConfig(max_new_tokens=length, **settings)
    return scheduler.submit(Conversation([9] * prompt, sampling, 0, caller or object()))


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# what a reply is

SETTINGS = [
    {},
    {"temperature": 1.7, "top_k": 0},
    {"temperature": 0},
    {"top_p": 0.6, "top_k": 1000},
    {"repetition_penalty": 3.0, "temperature": 2.0},
    {"top_k": 3},
]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", ["model", "published"])
def test_a_reply_is_the_same_as_if_alone(request, tokenizer, name, precision):
    chance = random.Random(0)
    questions = []
    for number in range(40):
        turns = []
        for _ in range(chance.randint(0, 2)):
            turns += [user("你好" * chance.randint(1, 4)), assistant("好呀")]
        turns.append(user("".join(chance.choices("你好呀天气怎样", k=chance.randint(1, 12)))))
        length = chance.randint(1, 30)
        questions.append((turns, SamplingConfig(seed=number, max_new_tokens=length, **chance.choice(SETTINGS))))
    generator = Generator(request.getfixturevalue(name), tokenizer, precision, max_running=7)
    alone = [generator.reply(*question) for question in questions]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda question: generator.reply(*question), questions))
    assert together == alone


def test_a_prompt_read_in_pieces_gives_the_same_reply(model, tokenizer, monkeypatch):
    generator = Generator(model, tokenizer, "float32")
    messages = [user("今天天气怎样"), assistant("很好"), user("高兴认识你")]
    settings = SamplingConfig(seed=1, max_new_tokens=20)
    whole = generator.reply(messages, settings)
    monkeypatch.setattr("studytiny.scheduler.PIECE", 4)
    assert generator.reply(messages, settings) == whole


def test_without_a_seed_replies_differ(model, tokenizer):
    generator = Generator(model, tokenizer)
    assert len({generator.reply([user("你好")], SamplingConfig(temperature=2.0)) for _ in range(5)}) == 5


# who is served


def test_conversations_share_every_step(scheduler, engine):
    engine.go.clear()
    first = ask(scheduler, length=1)
    replies = [ask(scheduler, length=6) for _ in range(4)]
    engine.go.set()
    with ThreadPoolExecutor(5) as pool:
        assert [len(steps) for steps in pool.map(list, [first, *replies])] == [1, 6, 6, 6, 6]
    assert Counter(len(rows) for rows in engine.steps)[4] >= 5


def test_a_long_prompt_does_not_stop_the_others(scheduler, engine):
    writer = ask(scheduler, length=1000)
    next(writer)
    engine.go.clear()
    seen = len(engine.steps)
    long_one = ask(scheduler, prompt=7 * PIECE, length=1)
    engine.go.set()
    done = threading.Event()
    threading.Thread(target=lambda: [next(writer) for _ in range(30)] and done.set()).start()
    assert len(list(long_one)) == 1
    assert done.wait(20)
    writer.close()
    pieces = [rows for rows in engine.steps[seen:] if any(len(row.ids) > 1 for row in rows)]
    assert len(pieces) == 7
    assert all(sum(len(row.ids) for row in rows if len(row.ids) > 1) <= PIECE for rows in pieces)


def test_a_caller_who_floods_does_not_keep_another_waiting(scheduler, engine):
    engine.go.clear()
    flood = [ask(scheduler, "flood", length=40, prompt=3) for _ in range(9)]
    quiet = ask(scheduler, "quiet", length=4, prompt=5)
    engine.go.set()
    with ThreadPoolExecutor(10) as pool:
        assert [len(steps) for steps in pool.map(list, [*flood, quiet])] == [40] * 9 + [4]
    prompts = [len(row.ids) for rows in engine.steps for row in rows if row.start == 0]
    assert prompts.index(5) <= 2  # half of the four slots are left for others


def test_a_full_line_turns_newcomers_away_in_a_sentence(scheduler, engine):
    engine.go.clear()
    held = [ask(scheduler) for _ in range(10)]
    with pytest.raises(GeneratorBusy, match="排队"):
        ask(scheduler)
    engine.go.set()
    with ThreadPoolExecutor(10) as pool:
        assert [len(steps) for steps in pool.map(list, held)] == [5] * 10
    assert len(list(ask(scheduler))) == 5


def test_in_a_full_line_whoever_has_most_there_gives_way(scheduler, engine):
    engine.go.clear()
    flood = [ask(scheduler, "flood") for _ in range(10)]
    quiet = ask(scheduler, "quiet")
    with pytest.raises(GeneratorBusy):
        ask(scheduler, "flood")
    engine.go.set()
    with pytest.raises(GeneratorBusy):
        list(flood[-1])
    with ThreadPoolExecutor(10) as pool:
        assert [len(steps) for steps in pool.map(list, [*flood[:-1], quiet])] == [5] * 10


def test_the_line_is_as_long_as_those_who_find_no_place(scheduler, engine):
    assert scheduler.in_line == 0
    engine.go.clear()
    held = [ask(scheduler) for _ in range(3)]
    assert scheduler.in_line == 0
    held += [ask(scheduler) for _ in range(3)]
    assert scheduler.in_line == 2
    held.pop().close()
    assert scheduler.in_line == 1
    engine.go.set()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(list, held))
    assert scheduler.in_line == 0


# who leaves


def test_nothing_is_computed_for_a_reader_who_left(scheduler, engine):
    reply, other = ask(scheduler, length=1000), ask(scheduler, length=1000)
    next(reply)
    next(other)
    slot = engine.steps[0][0].slot
    engine.go.clear()
    reply.close()
    seen = len(engine.steps) + 1  # one step may be on its way
    engine.go.set()
    for _ in range(3 * AHEAD):
        next(other)
    assert all(row.slot != slot for rows in engine.steps[seen:] for row in rows)
    other.close()
    assert list(reply) == []


def test_a_reader_who_only_drops_the_reply_has_left_too(scheduler, engine):
    reply = ask(scheduler, length=1000)
    next(reply)
    del reply
    gc.collect()
    wait_until(lambda: not scheduler._working)
    assert len(engine.steps) <= AHEAD + 2


def test_a_conversation_left_in_line_is_never_begun(scheduler, engine):
    engine.go.clear()
    first = [ask(scheduler, length=2) for _ in range(4)]
    left = ask(scheduler, prompt=11)
    left.close()
    engine.go.set()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(list, first))
    assert all(len(row.ids) != 11 for rows in engine.steps for row in rows)


def test_a_reader_who_falls_behind_costs_no_more_than_a_few_characters(scheduler, engine):
    slow = ask(scheduler, length=1000)
    wait_until(lambda: scheduler._asleep)
    assert len(engine.steps) == AHEAD
    assert len(list(ask(scheduler, length=50))) == 50  # and nobody else waits for it
    for _ in range(20):
        next(slow)
    slow.close()


def test_a_slot_nobody_reads_from_is_given_away(scheduler, engine, monkeypatch):
    monkeypatch.setattr("studytiny.scheduler.PATIENCE", 0.2)
    forgotten = [ask(scheduler, length=1000) for _ in range(4)]
    assert len(list(ask(scheduler, length=3))) == 3
    steps = []
    with pytest.raises(UserError, match="没有人接着读"):
        steps += forgotten[0]
    wait_until(lambda: not scheduler._working)


def test_an_idle_scheduler_has_no_thread(scheduler):
    for _ in range(3):
        assert len(list(ask(scheduler))) == 5
        wait_until(lambda: not scheduler._working)


def test_ten_thousand_conversations_leave_nothing_behind(tokenizer):
    engine = StandIn(tokenizer.vocab_size)
    scheduler = Scheduler(engine, tokenizer, window=1000, running=8, waiting=64)
    chance = random.Random(0)
    sizes = []
    tracemalloc.start()
    for number in range(10_000):
        reply = ask(scheduler, length=3, prompt=2)
        ending = chance.random()
        if ending < 0.5:
            list(reply)
        elif ending < 0.75:
            next(reply)
            reply.close()
        del reply
        engine.steps.clear()
        if number % 1000 == 999:
            wait_until(lambda: not scheduler._working)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sorted(scheduler._free) == list(range(8))
    assert not scheduler._running
    assert not scheduler._waiting
    assert max(sizes[2:]) - min(sizes[2:]) < 100_000
    scheduler.close()


# what goes wrong


def test_an_error_in_a_step_reaches_its_readers_and_no_one_else(scheduler, engine):
    engine.error = RuntimeError("out of memory")
    for _ in range(6):  # more than there are slots
        with pytest.raises(RuntimeError, match="out of memory"):
            list(ask(scheduler))
    engine.error = None
    assert len(list(ask(scheduler))) == 5


def test_logits_that_are_no_numbers_end_only_that_reply(scheduler, engine):
    engine.logits[LETTER] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        list(ask(scheduler))
    engine.logits[LETTER] = 50.0
    assert len(list(ask(scheduler))) == 5


def test_the_end_token_ends_the_reply_and_frees_the_slot(scheduler, engine):
    engine.logits[END_ID] = 90.0
    assert len(list(ask(scheduler, length=100))) == 1  # never empty
    wait_until(lambda: len(scheduler._free) == 4)


# close


def test_close_tells_every_reader_and_refuses_the_next(scheduler, engine):
    running = [ask(scheduler, length=1000) for _ in range(4)]
    waiting = ask(scheduler)
    next(running[0])
    scheduler.close()
    scheduler.close()
    assert engine.closed >= 1
    for reply in [*running, waiting]:
        with pytest.raises(GeneratorClosed, match="关闭"):
            list(reply)
        assert list(reply) == []
    with pytest.raises(GeneratorClosed):
        ask(scheduler)
    assert not [thread for thread in threading.enumerate() if thread.name == "generator"]


def test_a_generator_used_after_close_says_so(model, tokenizer):
    generator = Generator(model, tokenizer)
    reply = generator.stream([user("你好")], SamplingConfig(max_new_tokens=1000))
    generator.close()
    with pytest.raises(GeneratorClosed):
        list(reply)
    with pytest.raises(GeneratorClosed):
        generator.stream([user("你好")])


@pytest.mark.parametrize("how_far", ["next(stream)", "list(stream)"])
def test_a_program_may_end_at_any_moment(how_far):
    code = (
        "from studytiny import Generator, load_model\n"
        "generator = Generator(*load_model('bundled'))\n"
        "stream = generator.stream([{'role': 'user', 'content': '你好'}])\n"
        f"{how_far}"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
