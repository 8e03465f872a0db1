"""The architectures: causal, and independent where they must be. (test_export.py holds logits against transformers.)"""

import pytest
import torch
from conftest import assistant, next_logits, user

from studytiny import ModelConfig, UserError
from studytiny.published import PublishedModel, sinusoid


def random_ids(model, rows=2, length=20, seed=1):
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_later_character_never_changes_an_earlier_logit(model):
    ids = random_ids(model)
    changed = ids.clone()
    changed[:, 12] = (ids[:, 12] + 1) % model.config.vocab_size
    with torch.inference_mode():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 13:], after[:, 13:])


def test_earlier_character_does_reach_later_logits(model):
    ids = random_ids(model)
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % model.config.vocab_size
    with torch.inference_mode():
        assert (model(ids)[:, -1] - model(changed)[:, -1]).abs().max() > 1e-4


def test_cache_gives_the_logits_of_the_whole_sequence(model):
    ids = random_ids(model, rows=1)[0].tolist()
    with torch.inference_mode():
        whole = model(torch.tensor([ids]))[0]
    cache = model.new_cache()
    for start, end in ((0, 7), (7, 8), (8, 15), (15, 20)):
        logits = next_logits(model, ids[start:end], cache, start)
        torch.testing.assert_close(logits, whole[end - 1], atol=1e-5, rtol=1e-5)


def test_dialogues_sharing_a_row_do_not_read_each_other(model):
    ids = random_ids(model, rows=1)
    segments = torch.tensor([[0] * 9 + [1] * 11])
    with torch.inference_mode():
        packed = model(ids, segments)
        torch.testing.assert_close(packed[:, :9], model(ids[:, :9]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed[:, 9:], model(ids[:, 9:]), atol=1e-5, rtol=1e-5)


def test_more_than_the_window_is_an_error(model, published):
    for either in (model, published):
        with pytest.raises(ValueError, match="window"):
            either(random_ids(either, length=either.config.max_length + 1))


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 0},
        {"vocab_size": 10**12},
        {"d_model": 30},
        {"n_layers": 2.0},
        {"n_head": True},
        {"max_length": -1},
        {"d_ff": "big"},
        {"rope_theta": float("nan")},
        {"norm_eps": 0},
    ],
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UserError, match=next(iter(sizes))):
        ModelConfig(**{"vocab_size": 100, **sizes})


# The published architecture. That it equals the original bit for bit is shown in test_import_published.py.


def test_published_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = PublishedModel(6711)
    assert sum(parameter.numel() for parameter in model.parameters()) == 19_489_335
    assert len(dict(model.named_parameters())) == 52


def test_published_sinusoid_is_interleaved():
    table = sinusoid(5, 4)
    assert torch.equal(table[:, 0], torch.arange(5).float().sin())
    assert torch.equal(table[:, 1], torch.arange(5).float().cos())


def test_published_answers_without_context(published, tokenizer):
    """Its bug, kept: changing every earlier character changes nothing at all."""
    prompts = [tokenizer.encode_dialogue([user(text)], add_reply_mark=True).ids for text in ("你好呀", "天气怎")]
    first, second = (next_logits(published, ids) for ids in prompts)
    assert torch.equal(first, second)


def test_published_serving_equals_its_forward(published, tokenizer):
    messages = [user("你好"), assistant("好呀"), user("再见")]
    ids = tokenizer.encode_dialogue(messages, add_reply_mark=True).ids
    with torch.inference_mode():
        whole = published(torch.tensor([ids]))[0]
        alone = published.independent_logits(torch.tensor([ids]))[0]
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    for end in range(1, len(ids) + 1):
        logits = next_logits(published, ids[:end])
        torch.testing.assert_close(logits, whole[end - 1], atol=1e-5, rtol=1e-5)


def test_published_rows_mix_in_forward_but_not_when_serving(published):
    ids = random_ids(published, rows=4)
    with torch.inference_mode():
        alone = published(ids[:1])[0]
        assert (published(ids)[0] - alone).abs().max() > 1e-3
        torch.testing.assert_close(published.independent_logits(ids)[0], alone, atol=1e-5, rtol=1e-5)


def test_published_position_stays_the_last_one_past_the_window(published):
    window = published.config.max_length
    at_the_edge = next_logits(published, [7] * window)
    assert torch.equal(at_the_edge, next_logits(published, [7] * (window + 50)))
    assert torch.equal(at_the_edge, next_logits(published, [7], start=window))
