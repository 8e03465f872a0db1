"""Replies: reproducible, free of special tokens, within the window."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import assistant, user

from studytiny import Generator, SamplingConfig, Tokenizer, UserError
from studytiny.scheduler import AHEAD
from studytiny.tokenizer import ASSISTANT_ID, END_ID, SPECIAL_TOKENS, USER_ID


@pytest.fixture(params=["model float32", "model bfloat16", "model int8", "published float32"])
def generator(request, tokenizer):
    name, precision = request.param.split()
    generator = Generator(request.getfixturevalue(name), tokenizer, precision)
    yield generator
    generator.close()


class Scripted:
    """Stands in for a model: always gives the same logits and remembers what it was given to read."""

    architecture = "published"  # so that it is not converted to another precision
    has_window = True
    device = torch.device("cpu")

    def __init__(self, vocab_size, favourites, max_length=64):
        self.config = SimpleNamespace(vocab_size=vocab_size, max_length=max_length)
        self.logits = torch.zeros(vocab_size)
        self.logits[favourites] = 50.0
        self.read = []

    def eval(self):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def new_cache(self, slots):
        return None

    def next_hidden(self, ids, cache, slots, starts):
        self.read += [list(row) for row in ids]
        return torch.zeros(len(ids), 1)

    def unembed(self, hidden):
        return self.logits.repeat(len(hidden), 1)


def test_same_seed_same_reply(generator):
    settings = SamplingConfig(temperature=1.5, seed=7, max_new_tokens=30)
    replies = {generator.reply([user("你好")], settings) for _ in range(5)}
    assert len(replies) == 1
    assert generator.reply([user("你好")], SamplingConfig(temperature=1.5, seed=8, max_new_tokens=30)) not in replies


def test_a_reply_goes_on_from_where_it_was_begun(generator):
    """As if the model itself had written the beginning: the penalty counts it, and so does the length."""
    settings = SamplingConfig(temperature=0, repetition_penalty=1.5, max_new_tokens=24)
    steps = list(generator.stream([user("你好")], settings))
    assert len(steps) > 4
    for begun in (1, len(steps) // 2, len(steps) - 1):
        ids = [step.token_id for step in steps[:begun]]
        rest = [step.token_id for step in generator.stream([user("你好")], settings, begun=ids)]
        assert rest == [step.token_id for step in steps[begun:]]


@pytest.mark.parametrize("begun", [[9] * 24, [9, END_ID], [USER_ID]])
def test_a_beginning_that_cannot_be_is_one_sentence(generator, begun):
    with pytest.raises(UserError, match="回答的开头"):
        generator.stream([user("你好")], SamplingConfig(max_new_tokens=24), begun=begun)


def test_same_seed_same_reply_whatever_runs_beside_it(generator):
    settings = [SamplingConfig(temperature=1.5, seed=seed, max_new_tokens=30) for seed in range(6)]
    alone = [generator.reply([user("你好")], each) for each in settings]
    together = [""] * len(settings)

    def answer(i):
        torch.rand(10)  # the global random state is nobody's business
        together[i] = generator.reply([user("你好")], settings[i])

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_interleaved_streams_do_not_mix(generator):
    settings = [SamplingConfig(temperature=1.5, seed=seed, max_new_tokens=20) for seed in (1, 2)]
    alone = [generator.reply([user("你好")], each) for each in settings]
    streams = [generator.stream([user("你好")], each) for each in settings]
    texts = ["", ""]
    for _ in range(20):
        for i, stream in enumerate(streams):
            step = next(stream, None)
            texts[i] += step.text if step else ""
    assert texts == alone


def test_no_special_token_is_ever_emitted(tokenizer):
    favourites = [index for index in range(len(SPECIAL_TOKENS)) if index != END_ID]
    generator = Generator(Scripted(tokenizer.vocab_size, favourites), tokenizer)
    steps = list(generator.stream([user("你好")], SamplingConfig(temperature=2.0, top_k=0, seed=1)))
    assert steps
    assert all(step.token_id >= len(SPECIAL_TOKENS) for step in steps)


def test_a_reply_is_never_empty_and_ends_at_the_end_token(tokenizer):
    generator = Generator(Scripted(tokenizer.vocab_size, [END_ID]), tokenizer)
    assert len(generator.reply([user("你好")], SamplingConfig(seed=1))) == 1


def test_max_new_tokens_bounds_the_reply(tokenizer):
    generator = Generator(Scripted(tokenizer.vocab_size, [10]), tokenizer)
    assert len(generator.reply([user("你好")], SamplingConfig(max_new_tokens=5))) == 5


def test_reply_ends_where_the_window_does(model, tokenizer):
    model.unembed = lambda hidden: torch.eye(tokenizer.vocab_size)[[10] * len(hidden)] * 50  # never <|end|>
    reply = Generator(model, tokenizer, "float32").reply([user("你好")], SamplingConfig(max_new_tokens=2000))
    assert model.config.max_length - 10 < len(reply) <= model.config.max_length


def test_published_reply_may_outgrow_the_window(published, tokenizer):
    published.lm_head.bias.data[10] = 1e4
    reply = Generator(published, tokenizer).reply([user("你好")], SamplingConfig(max_new_tokens=200))
    assert len(reply) == 200


def test_long_conversation_loses_whole_oldest_turns(tokenizer):
    stand_in = Scripted(tokenizer.vocab_size, [END_ID])
    generator = Generator(stand_in, tokenizer)
    conversation = [user("你" * 10), assistant("好" * 10), user("再" * 10), assistant("见" * 10), user("呀呀呀")]
    generator.reply(conversation, SamplingConfig(max_new_tokens=30))
    kept = tokenizer.encode_dialogue(conversation[2:], add_reply_mark=True).ids
    assert stand_in.read[0] == kept
    assert len(kept) + 30 <= 64


@pytest.mark.parametrize("turns", range(1, 40, 2))
def test_what_is_left_begins_with_a_user_and_ends_with_the_question(tokenizer, turns):
    stand_in = Scripted(tokenizer.vocab_size, [END_ID])
    conversation = [(assistant if i % 2 else user)("你" * (3 + i % 5)) for i in range(turns)]
    Generator(stand_in, tokenizer).reply(conversation, SamplingConfig(max_new_tokens=20))
    prompt = stand_in.read[0]
    assert prompt[0] == USER_ID
    assert prompt[-1] == ASSISTANT_ID
    assert len(prompt) + 20 <= 64
    assert prompt.count(USER_ID) == prompt.count(ASSISTANT_ID)


def test_short_conversation_is_read_whole(tokenizer):
    stand_in = Scripted(tokenizer.vocab_size, [END_ID])
    conversation = [user("你好"), assistant("好呀"), user("再见")]
    Generator(stand_in, tokenizer).reply(conversation, SamplingConfig(max_new_tokens=20))
    assert stand_in.read[0] == tokenizer.encode_dialogue(conversation, add_reply_mark=True).ids


def test_reply_depends_on_earlier_turns(model, tokenizer):
    generator = Generator(model, tokenizer)
    one = generator.logits([user("你好"), assistant("好呀"), user("再见")])
    other = generator.logits([user("天气"), assistant("好呀"), user("再见")])
    assert not torch.allclose(one, other)


def test_logits_are_those_of_the_next_character(model, tokenizer):
    messages = [user("你好")]
    ids = tokenizer.encode_dialogue(messages, add_reply_mark=True).ids
    logits = Generator(model, tokenizer).logits(messages)
    assert logits.shape == (tokenizer.vocab_size,)
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(torch.tensor([ids]))[0, -1], atol=1e-5, rtol=1e-5)


def test_candidates_tell_raw_and_final_probability(generator):
    plain = list(generator.stream([user("你好")], SamplingConfig(seed=3, max_new_tokens=5)))
    told = list(generator.stream([user("你好")], SamplingConfig(seed=3, max_new_tokens=5), n_candidates=4))
    assert [step.token_id for step in told] == [step.token_id for step in plain]
    assert all(step.candidates == () for step in plain)
    first = told[0].candidates
    assert len(first) == 4
    assert [c.raw_probability for c in first] == sorted((c.raw_probability for c in first), reverse=True)
    raw = generator.logits([user("你好")]).softmax(0)
    tolerance = 1e-6 if generator.precision == "float32" else 1e-3
    assert all(abs(c.raw_probability - raw[c.token_id]) < tolerance for c in first)
    every = next(generator.stream([user("你好")], SamplingConfig(seed=3), n_candidates=len(raw))).candidates
    assert len(every) == len(raw)
    assert sum(c.probability for c in every) == pytest.approx(1, abs=1e-5)
    special = [c for c in every if c.token_id < len(SPECIAL_TOKENS)]
    assert len(special) == len(SPECIAL_TOKENS)
    assert all(c.probability == 0 < c.raw_probability for c in special)  # at the first place not even <|end|>


def test_bfloat16_leaves_the_callers_model_alone(model, tokenizer):
    generator = Generator(model, tokenizer, precision="bfloat16")
    assert model.embed_tokens.weight.dtype == torch.float32
    assert generator.reply([user("你好")], SamplingConfig(seed=1))
    exact = Generator(model, tokenizer).logits([user("你好")])
    assert (generator.logits([user("你好")]) - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "最后一句"),
        ([user("你好"), assistant("好")], "最后一句"),
        ([user("")], "空的"),
        ([user(" \n\t　")], "空的"),
        ([user("你" * 10_000)], "10000 个字"),
        ([{"role": "system", "content": "x"}, user("你")], "system"),
        ([{"role": "user", "content": ["x"]}], "content"),
        ([{"role": "user"}], "content"),
        (["你好"], "content"),
    ],
)
def test_conversation_that_cannot_be_answered_is_named_at_once(generator, messages, named):
    with pytest.raises(UserError, match=named):
        generator.stream(messages)


def test_emoji_and_unknown_characters_are_answered(generator):
    assert generator.reply([user("🙂👨‍👩‍👧‍👦 ξ \ud83d")], SamplingConfig(seed=1))


def test_stopping_a_stream_stops_the_work(tokenizer):
    stand_in = Scripted(tokenizer.vocab_size, [10])
    stream = Generator(stand_in, tokenizer).stream([user("你好")])
    next(stream)
    stream.close()
    time.sleep(0.2)
    assert len(stand_in.read) <= AHEAD + 2


def test_vocabulary_of_another_size_and_unknown_precision_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="词表"):
        Generator(model, Tokenizer("一二"))
    with pytest.raises(UserError, match="float64"):
        Generator(model, tokenizer, precision="float64")
