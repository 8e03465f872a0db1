"""The stages between the logits and the chosen character."""

import math
from collections import Counter

import pytest
import torch

from studytiny import SamplingConfig
from studytiny.sampling import apply_temperature, draw, keep_top_k, keep_top_p, penalize_repetition, shape_logits

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0])


def test_penalty_divides_positive_and_multiplies_negative_logits():
    penalized = penalize_repetition(LOGITS, [0, 1, 1], 2.0)
    assert penalized.tolist() == [1.0, -2.0, 0.5, 0.0, -3.0]
    assert LOGITS[0] == 2.0  # the caller's logits are untouched


def test_penalty_of_one_changes_nothing():
    assert torch.equal(penalize_repetition(LOGITS, [0, 1, 4], 1), LOGITS)


def test_temperature_divides():
    assert torch.equal(apply_temperature(LOGITS, 0.5), LOGITS * 2)


@pytest.mark.parametrize(("k", "kept"), [(0, 5), (1, 1), (3, 3), (5, 5), (99, 5)])
def test_top_k_keeps_the_k_best(k, kept):
    result = keep_top_k(LOGITS, k)
    assert torch.isfinite(result).sum() == kept
    assert set(LOGITS.topk(kept).indices.tolist()) == set(torch.isfinite(result).nonzero().flatten().tolist())


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert torch.isfinite(keep_top_k(torch.zeros(10), 3)).sum() == 3


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    logits = torch.tensor([0.3, 0.5, 0.05, 0.15]).log()
    assert torch.isfinite(keep_top_p(logits, p)).sum() == kept


def test_temperature_zero_is_greedy():
    shaped = shape_logits(LOGITS, [], SamplingConfig(temperature=0))
    assert {draw(shaped, torch.Generator().manual_seed(seed)) for seed in range(20)} == {0}


def test_greedy_still_heeds_the_penalty():
    shaped = shape_logits(LOGITS, [0], SamplingConfig(temperature=0, repetition_penalty=9.0))
    assert draw(shaped, torch.Generator()) == 2


def test_draw_follows_the_probabilities():
    random = torch.Generator().manual_seed(0)
    counts = Counter(draw(torch.tensor([0.7, 0.0, 0.3]).log(), random) for _ in range(2000))
    assert counts[1] == 0
    assert abs(counts[0] / 2000 - 0.7) < 0.05


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
