"""A model and a tokenizer small enough that every test can afford them."""

import os
import signal

import pytest
import torch

from studytiny import DialogueModel, Tokenizer
from studytiny.published import PublishedModel

os.environ["PYTHONUTF8"] = "1"  # so that commands started by tests print UTF-8 on Windows too

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what the tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHARACTERS = "你好呀我是小天叫什么名字吗很高兴认识再见谢不客气今天气怎样，。？！ abcxyz<|>/endusrit"


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(sorted(set(CHARACTERS)))


@pytest.fixture
def model(tokenizer: Tokenizer) -> DialogueModel:
    torch.manual_seed(0)
    return DialogueModel(tokenizer.vocab_size, d_model=32, n_head=4, n_layers=2, max_length=64).eval()


@pytest.fixture
def published(tokenizer: Tokenizer) -> PublishedModel:
    torch.manual_seed(0)
    return PublishedModel(tokenizer.vocab_size, d_model=32, n_head=4, n_layers=2, max_length=64).eval()


@torch.inference_mode()
def next_logits(model, ids, cache=None, start=0):
    """Logits (V,) behind ``ids``, which a conversation reads from place ``start`` on."""
    return model.unembed(model.next_hidden([ids], cache or model.new_cache(), [0], [start])[0])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
