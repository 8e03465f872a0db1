"""The stages between the logits and the chosen character."""

import math
from collections import Counter

import pytest
import torch

from studytiny import SamplingConfig
from studytiny.sampling import apply_temperature, draw, keep_top_k, keep_top_p, penalize_repetition, shape_logits

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0])


def shape(logits, reply=(), **settings):
    """shape_logits for one conversation."""
    return shape_logits(
        logits.unsqueeze(0),
        torch.tensor([list(reply)], dtype=torch.int64),
        [SamplingConfig(**{"top_p": 1, **settings})],
    )


def test_penalty_divides_positive_and_multiplies_negative_logits():
    penalized = penalize_repetition(LOGITS, torch.tensor([0, 1, 1]), 2.0)
    assert penalized.tolist() == [1.0, -2.0, 0.5, 0.0, -3.0]
    assert LOGITS[0] == 2.0  # the caller's logits are untouched


def test_penalty_of_one_changes_nothing():
    assert torch.equal(penalize_repetition(LOGITS, torch.tensor([0, 1, 4]), 1), LOGITS)


def test_temperature_divides():
    assert torch.equal(apply_temperature(LOGITS, 0.5), LOGITS * 2)


@pytest.mark.parametrize(("k", "kept"), [(0, 5), (1, 1), (3, 3), (5, 5), (99, 5)])
def test_top_k_keeps_the_k_best(k, kept):
    shaped = shape(LOGITS, top_k=k)
    allowed = torch.isfinite(shaped.logits)
    assert set(shaped.ids[allowed].tolist()) == set(LOGITS.topk(kept).indices.tolist())


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert torch.isfinite(keep_top_k(torch.zeros(10), 3)).sum() == 3


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    ordered = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    assert torch.isfinite(keep_top_p(ordered, p)).sum() == kept


def test_temperature_zero_is_greedy():
    shaped = shape(LOGITS, temperature=0)
    assert {draw(shaped, [u / 20])[0] for u in range(20)} == {0}


def test_greedy_still_heeds_the_penalty():
    assert draw(shape(LOGITS, [0], temperature=0, repetition_penalty=9.0), [0.5]) == [2]


def test_draw_follows_the_probabilities():
    shaped = shape(torch.tensor([0.7, 0.0, 0.3]).log(), temperature=1)
    counts = Counter(draw(shaped, [u / 2000])[0] for u in range(2000))
    assert counts[1] == 0
    assert abs(counts[0] - 1400) <= 1


def test_draw_stays_within_what_is_allowed_at_the_very_ends():
    shaped = shape(torch.randn(500, generator=torch.Generator().manual_seed(0)), top_k=7)
    for uniform in (0.0, math.nextafter(1, 0)):
        assert draw(shaped, [uniform])[0] in shaped.ids[0, :7].tolist()


def test_each_of_many_conversations_is_drawn_as_if_alone():
    random = torch.Generator().manual_seed(0)
    settings = [{"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}, {"repetition_penalty": 5.0, "top_k": 0}, {}]
    logits = torch.randn(5, 300, generator=random) * 3
    logits[:, 0] = -math.inf
    replies = [[1, 2], [], [8], list(range(7, 60)), [299]]
    filled = torch.tensor([reply + [0] * (53 - len(reply)) for reply in replies])
    together = shape_logits(logits, filled, [SamplingConfig(**{"top_p": 1, **each}) for each in settings])
    for uniform in (0.01, 0.3, 0.6, 0.99):
        alone = [
            draw(shape(row, reply, **each), [uniform])[0]
            for row, reply, each in zip(logits, replies, settings, strict=True)
        ]
        assert draw(together, [uniform] * 5) == alone


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 10.1, math.nan, math.inf, "1", None, True]),
        ("top_k", [-1, 1.5, math.nan, True, "5", None]),
        ("top_p", [0, -1, 1.1, math.nan, False]),
        ("repetition_penalty", [0, -1, 11, math.inf, None]),
        ("max_new_tokens", [0, -5, 10**9, 3.0, None]),
        ("seed", [-1, 2**63, 0.5, "x", True]),
    ],
)
def test_settings_out_of_range_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            SamplingConfig(**{name: value})
