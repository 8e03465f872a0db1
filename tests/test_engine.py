"""The engines: whatever way a step is computed, a conversation's logits are those of the model."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import next_logits

from studytiny import DialogueModel, UserError
from studytiny.engine import KernelEngine, Row, TorchEngine, make_engine
from studytiny.kernel import build_kernel
from studytiny.precision import HalfLinear, Int8Linear, choose_precision, in_precision

WINDOW = 64
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.05}


def conversations(vocab_size, count=6):
    chance = random.Random(1)
    return [[chance.randrange(7, vocab_size) for _ in range(chance.randint(2, WINDOW))] for _ in range(count)]


def play(engine, texts, order):
    """Reads the texts through the engine, in pieces and a different set of them each step; logits behind each piece."""
    chance = random.Random(order)
    read = [0] * len(texts)
    logits = {}
    while any(read[i] < len(text) for i, text in enumerate(texts)):
        rows = []
        for slot, text in enumerate(texts):
            if read[slot] < len(text) and chance.random() < 0.7:
                size = chance.choice([1, 1, 1, 3, 9])
                rows.append(Row(slot, read[slot], text[read[slot] : read[slot] + size], chance.random() < 0.8))
                read[slot] += len(rows[-1].ids)
        if rows:
            wanted = [row for row in rows if row.wanted]
            for row, values in zip(wanted, engine.step(rows), strict=True):
                logits[row.slot, row.start + len(row.ids)] = values
    engine.close()
    return logits


ENGINES = {
    "float32": lambda model: TorchEngine(model, 6),
    "fixed shapes": lambda model: TorchEngine(model, 6, fixed=True),
    "bfloat16": lambda model: TorchEngine(in_precision(model, "bfloat16"), 6),
    "int8": lambda model: TorchEngine(in_precision(model, "int8"), 6),
    "int8 kernel": lambda model: make_engine(model, "int8", 6),
}


@pytest.mark.parametrize("name", ENGINES)
def test_logits_are_the_models_own_however_they_are_read(model, name):
    texts = conversations(model.config.vocab_size)
    for order in range(3):
        logits = play(ENGINES[name](model), texts, order)
        assert len(logits) > 20
        for (slot, end), values in logits.items():
            expected = next_logits(model, texts[slot][:end])
            torch.testing.assert_close(values, expected, atol=TOLERANCE.get(name.split()[0], 1e-5), rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_published_rows_do_not_touch_each_other(published, precision):
    texts = conversations(published.config.vocab_size)
    logits = play(TorchEngine(in_precision(published, precision), 6), texts, 0)
    for (slot, end), values in logits.items():
        expected = next_logits(published, texts[slot][:end])
        torch.testing.assert_close(values, expected, atol=TOLERANCE[precision], rtol=1e-4)


def test_a_slot_can_be_used_again(model):
    engine = TorchEngine(model, 1)
    for text in conversations(model.config.vocab_size):
        logits = engine.step([Row(0, 0, text, True)])[0]
        torch.testing.assert_close(logits, next_logits(model, text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [HalfLinear, Int8Linear])
@pytest.mark.parametrize("bias", [True, False])
def test_rounded_layers_are_close_and_row_by_row(layer, bias):
    torch.manual_seed(0)
    exact = torch.nn.Linear(37, 23, bias=bias).requires_grad_(False)
    rounded = layer(exact.weight, exact.bias)
    x = torch.randn(5, 3, 37)
    torch.testing.assert_close(rounded(x), exact(x), atol=0.03, rtol=0.02)
    x[0] *= 1000  # a row with large entries must not make the others coarse
    torch.testing.assert_close(rounded(x)[1:], exact(x)[1:], atol=0.03, rtol=0.02)
    assert torch.equal(rounded(torch.zeros(1, 37)), exact(torch.zeros(1, 37)))


def test_the_callers_model_is_left_as_it_is(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for precision in ("bfloat16", "int8"):
        assert in_precision(model, precision) is not model
    assert in_precision(model, "float32") is model
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.skipif(build_kernel() is None, reason="there is no C compiler here")
def test_the_kernel_is_used_where_there_is_one_and_can_be_switched_off(model, monkeypatch):
    assert isinstance(make_engine(model, "int8", 1), KernelEngine)
    monkeypatch.setenv("STUDYTINY_KERNEL", "0")
    assert isinstance(make_engine(model, "int8", 1), TorchEngine)


def on_device(device, architecture="studytiny"):
    return SimpleNamespace(device=torch.device(device), architecture=architecture)


@pytest.mark.parametrize(
    ("device", "bfloat16", "chosen"), [("cuda", True, "bfloat16"), ("cuda", False, "float16"), ("mps", None, "float16")]
)
def test_auto_takes_what_the_device_is_good_at(monkeypatch, device, bfloat16, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
    assert choose_precision("auto", on_device(device)) == chosen


def test_auto_falls_back_where_int8_is_missing(monkeypatch):
    monkeypatch.setenv("STUDYTINY_KERNEL", "0")
    for available, capability, chosen in (
        (True, "AVX2", "int8"),
        (True, "DEFAULT", "float32"),
        (False, "AVX512", "float32"),
    ):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert choose_precision("auto", on_device("cpu")) == chosen
    with pytest.raises(UserError, match="int8"):
        choose_precision("int8", on_device("cpu"))


def test_published_is_served_exactly_unless_asked_otherwise(published):
    assert choose_precision("auto", published) == "float32"
    assert in_precision(published, "float32") is published


@pytest.mark.parametrize(
    ("device", "wanted"), [("cpu", "float16"), ("cpu", "float64"), ("cuda", "int8"), ("mps", "int8"), ("cpu", "INT8")]
)
def test_a_precision_the_device_cannot_do_is_named(device, wanted):
    with pytest.raises(UserError, match=wanted):
        choose_precision(wanted, on_device(device))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_gpu_gets_the_whole_model_in_half(model, monkeypatch, precision):
    monkeypatch.setattr(DialogueModel, "device", torch.device("meta"))  # any that is no CPU
    half = in_precision(model, precision)
    assert {parameter.dtype for parameter in half.parameters()} == {getattr(torch, precision)}
