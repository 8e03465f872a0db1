"""An exported folder is a stock Qwen3 to transformers: same ids, same logits, no code of ours."""

import pytest
import torch
from conftest import assistant, user

from studytiny import Generator, SamplingConfig, UserError
from studytiny.export import export

transformers = pytest.importorskip("transformers")
TALK = [user("你好，小天！"), assistant("你好呀 abc"), user("再见\n龘")]


@pytest.fixture
def exported(tmp_path, model, tokenizer):
    for parameter in model.parameters():  # gains of exactly 1 would hide a forgotten norm
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return export(model, tokenizer, tmp_path / "hf")


def test_logits_equal_those_of_transformers(exported, model):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = torch.randint(0, model.config.vocab_size, (3, model.config.max_length))  # to the end of the window
    with torch.inference_mode():
        expected, found = theirs(ids).logits, model(ids)
    assert expected.abs().max() > 1  # there is something to compare
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_tokenizer_gives_the_same_ids(exported, tokenizer):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for text in ("你好呀  abc ", "龘\n🙂好"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode("你好 abc")) == "你好 abc"
    rendered = theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert theirs.encode(rendered, add_special_tokens=False) == tokenizer.encode_dialogue(TALK, True).ids


def test_transformers_generates_the_same_greedy_reply(exported, model, tokenizer):
    sampling = SamplingConfig(temperature=0, repetition_penalty=1, max_new_tokens=20)
    steps = [step.token_id for step in Generator(model, tokenizer, "float32").stream([user("你好")], sampling)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.tensor([tokenizer.encode_dialogue([user("你好")], True).ids])
    limits = {"min_new_tokens": 1, "max_new_tokens": 20, "suppress_tokens": [0, 1, 3, 4, 5, 6]}
    generated = theirs.generate(ids, do_sample=False, attention_mask=torch.ones_like(ids), **limits)
    assert generated[0, ids.shape[1] :].tolist()[: len(steps)] == steps


def test_what_cannot_be_exported_is_said(tmp_path, exported, model, published, tokenizer):
    with pytest.raises(UserError, match="published"):
        export(published, tokenizer, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="已经有一个模型"):
        export(model, tokenizer, exported)
