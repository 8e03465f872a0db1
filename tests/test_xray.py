"""What studytiny.xray promises: it shows what the model and the generator really computed."""

import math

import pytest
import torch
from conftest import assistant, user

from studytiny import Generator, SamplingConfig, UserError
from studytiny.tokenizer import END_ID
from studytiny.xray import STAGES, attention_shares, certainty, chances, look_inside, looked_at

TALK = [user("你好"), assistant("你好呀"), user("我叫小明")]


@pytest.mark.parametrize("name", ["model", "published"])
def test_every_chance_is_what_the_generator_drew_from(request, tokenizer, name):
    model = request.getfixturevalue(name)
    generator = Generator(model, tokenizer, "float32")
    sampling = SamplingConfig(temperature=0.8, top_k=12, top_p=0.8, repetition_penalty=1.4, max_new_tokens=8, seed=3)
    steps = list(generator.stream(TALK, sampling, n_candidates=6))
    inside = look_inside(model, tokenizer, [*TALK, assistant("".join(step.text for step in steps))])
    assert inside.ids[inside.begin :] == [*(step.token_id for step in steps), END_ID]
    for index, step in enumerate(steps):
        shown = {chance.token_id: chance.probabilities for chance in chances(inside, tokenizer, index, sampling, 30)}
        assert step.token_id in shown
        for candidate in step.candidates:
            if candidate.token_id in shown:
                raw, *_, last = shown[candidate.token_id]
                assert raw == pytest.approx(candidate.raw_probability, abs=1e-4)
                assert last == pytest.approx(candidate.probability, abs=1e-4)
        assert certainty(inside)[index] == pytest.approx(shown[step.token_id][0], abs=1e-5)


def test_each_stage_does_what_its_slider_says(model, tokenizer):
    inside = look_inside(model, tokenizer, [*TALK, assistant("你好你好")])
    assert len(STAGES) == len(chances(inside, tokenizer, 2, SamplingConfig())[0].probabilities)

    def shown(**settings):
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        found = chances(inside, tokenizer, 2, SamplingConfig(**{**plain, **settings}), tokenizer.vocab_size)
        return {chance.text: chance.probabilities for chance in found}

    plain = shown()
    assert plain["<pad>"][0] > 0 == plain["<pad>"][1]
    strict = shown(repetition_penalty=2.0)  # 你 was said, 吗 was not
    assert strict["你"][1] / strict["吗"][1] < plain["你"][1] / plain["吗"][1]
    best = max(plain, key=lambda text: plain[text][1])
    assert shown(temperature=0.5)[best][2] > plain[best][2] > shown(temperature=3.0)[best][2]
    assert sum(probabilities[3] > 0 for probabilities in shown(top_k=3).values()) == 3
    assert 0 < sum(probabilities[4] > 0 for probabilities in shown(top_p=0.3).values()) < tokenizer.vocab_size / 2
    assert [probabilities[-1] for probabilities in shown(temperature=0).values()][:2] == [1, 0]
    for stage in range(len(STAGES)):
        assert sum(probabilities[stage] for probabilities in shown(top_k=9).values()) == pytest.approx(1)


def test_the_token_that_stands_there_is_always_shown(model, tokenizer):
    inside = look_inside(model, tokenizer, [*TALK, assistant("你好")])
    for index in range(3):
        shown = [chance.token_id for chance in chances(inside, tokenizer, index, SamplingConfig(temperature=0), 2)]
        assert inside.ids[inside.begin + index] in shown and len(shown) <= 3
    with pytest.raises(IndexError):
        chances(inside, tokenizer, 3, SamplingConfig())


def test_attention_is_what_the_model_mixes_with(model, tokenizer):
    inside = look_inside(model, tokenizer, [*TALK, assistant("小明你好")])
    layers, heads = model.config.n_layers, model.config.n_head
    length = len(inside.ids)
    assert inside.attention.shape == (layers, heads, length, length)
    assert torch.allclose(inside.attention.sum(-1), torch.ones(layers, heads, length), atol=1e-5)
    assert inside.attention.triu(1).abs().max() == 0

    block, seen = model.layers[0], []
    hook = block.self_attn.o_proj.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    ids = torch.tensor([inside.ids])
    with torch.inference_mode():
        model.hidden_states(ids)
        values = block.self_attn.v_proj(block.input_layernorm(model.embed_tokens(ids)))
    hook.remove()
    values = values.view(length, heads, -1).transpose(0, 1)  # (H, T, K)
    mixed = (inside.attention[0] @ values).transpose(0, 1).reshape(length, -1)
    assert torch.allclose(mixed, seen[0][0], atol=1e-5)


def test_where_a_head_looked_ends_before_the_place(model, published, tokenizer):
    talk = [*TALK, assistant("小明你好")]
    inside = look_inside(model, tokenizer, talk)
    shares = looked_at(inside, 0, 0, 2)
    assert len(shares) == inside.begin + 2 and sum(shares) == pytest.approx(1)
    with pytest.raises(UserError, match="第 9 层"):
        looked_at(inside, 8, 0, 0)
    assert looked_at(look_inside(published, tokenizer, talk), 0, 0, 0) is None


def test_no_hook_is_left_behind(model):
    attention_shares(model, torch.tensor([[1, 2, 3]]))
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.layers)


def test_a_long_conversation_loses_its_oldest_turns(model, tokenizer):
    talk = [user("你好"), assistant("你好呀")] * 200
    inside = look_inside(model, tokenizer, talk)
    assert len(inside.ids) <= model.config.max_length and inside.roles[0] == 0
    with pytest.raises(UserError, match="标记"):
        look_inside(model, tokenizer, [user("你"), assistant("好" * model.config.max_length)])
    for wrong in ([user("你好")], [assistant("你好")], [assistant("好"), user("你好")]):
        with pytest.raises(UserError, match="回答结尾"):
            look_inside(model, tokenizer, wrong)


def test_nothing_is_rounded_away(model, tokenizer):
    inside = look_inside(model, tokenizer, [*TALK, assistant("你好")])
    assert inside.logits.dtype == torch.float32
    assert all(math.isfinite(share) and 0 <= share <= 1 for share in certainty(inside))
