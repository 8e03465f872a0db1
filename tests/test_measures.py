"""The measures, held against their definition computed the slow way."""

import math

import pytest
import torch
from conftest import assistant, next_logits, user

from studytiny import Tokenizer, UserError
from train.corpus import to_messages
from train.measures import bits_per_character, repeats_itself, reply_statistics, scored_windows

DIALOGUES = [["你好", "好呀"], ["你叫什么", "我是小天", "很高兴", "谢谢🙂"], ["再见", "见"]]


def slow_bits(model, tokenizer, dialogues):
    """The design's sentence, word by word: each token of each assistant turn given all that stands before it."""
    bits = characters = tokens = 0
    for turns in dialogues:
        encoded = tokenizer.encode_dialogue(to_messages(turns))
        for i, wanted in enumerate(encoded.reply_mask):
            if wanted:
                logits = next_logits(model, encoded.ids[:i])
                bits -= logits.log_softmax(0)[encoded.ids[i]].item() / math.log(2)
                tokens += 1
        characters += sum(len(text) for text in turns[1::2])
    return bits / characters, 2 ** (bits / tokens), characters


@pytest.mark.parametrize("name", ["model", "published"])
def test_bits_per_character_follow_the_definition(request, tokenizer, name):
    model = request.getfixturevalue(name)
    score = bits_per_character(model, tokenizer, DIALOGUES)
    bits, perplexity, characters = slow_bits(model, tokenizer, DIALOGUES)
    assert score.bits_per_char == pytest.approx(bits, rel=1e-4)
    assert score.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert (score.dialogues, score.characters) == (3, characters) == (3, 10)
    assert score.unknown_rate == pytest.approx(1 / 10)


def test_dialogue_longer_than_the_window_is_scored_to_its_end(model, tokenizer):
    turns = ["你好你好", "好呀好呀好呀"] * 12
    score = bits_per_character(model, tokenizer, [turns])
    assert score.characters == 72
    assert math.isfinite(score.bits_per_char)
    # The last turn counts: making it unlikely must show.
    assert bits_per_character(model, tokenizer, [[*turns[:-1], "xzxzxz"]]).bits_per_char != score.bits_per_char


@pytest.mark.parametrize("sizes", [[3, 4], [10] * 10, [3, 200, 3, 3], [500], [64, 64], [62, 62, 2]])
def test_windows_score_every_token_once(sizes):
    tokenizer = Tokenizer("一")
    turns = [(assistant if i % 2 else user)("一" * size) for i, size in enumerate(sizes)]
    encoded = tokenizer.encode_dialogue(turns)
    done = 0
    for start, stop, score_from in scored_windows(encoded, 64):
        assert score_from == done
        assert stop - start <= 64
        assert start < max(score_from, 1)  # something stands before the first token that is scored
        done = stop
    assert done == len(encoded.ids)


def test_nothing_to_measure_is_said(model, tokenizer):
    with pytest.raises(UserError, match="--all"):
        bits_per_character(model, tokenizer, [])


def test_reply_statistics():
    statistics = reply_statistics(["你好", "你好吗", "傻逼", "好好好，好好好，好好好"])
    assert statistics.mean_reply_chars == (2 + 3 + 2 + 11) / 4
    assert statistics.profanity_rate == 0.25
    assert statistics.repetition_rate == 0.25
    assert statistics.distinct_1 == len(set("你好吗傻逼，")) / 18
    assert 0 < statistics.distinct_2 <= 1


@pytest.mark.parametrize(
    ("text", "repeats"), [("哈哈哈哈", False), ("我爱你我爱你", False), ("我爱你，我爱你，我爱你", True)]
)
def test_a_phrase_said_three_times_is_a_repetition(text, repeats):
    assert repeats_itself(text) is repeats


def test_scores_do_not_depend_on_the_batch(model, tokenizer, monkeypatch):
    whole = bits_per_character(model, tokenizer, DIALOGUES).bits_per_char
    monkeypatch.setattr("train.measures.TOKENS_A_BATCH", 1)
    assert bits_per_character(model, tokenizer, DIALOGUES).bits_per_char == pytest.approx(whole, rel=1e-5)


def test_rude_words_and_their_harmless_neighbours():
    from train.clean import is_rude

    assert all(map(is_rude, ["你这个傻逼", "去死吧", "他妈的", "卧槽", "FUCK you"]))
    harmless = [
        "体操做得好",
        "他妈的手艺很好",
        "操作系统",
        "性交往的话题",
        "叫做爱心",
        "干净",
        "今天气温不高",
        "畜牧业",
    ]
    assert not any(map(is_rude, harmless))


def test_measuring_leaves_gradients_alone(model, tokenizer):
    bits_per_character(model, tokenizer, DIALOGUES)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
