"""Model folders: what is saved comes back, and whatever does not fit is named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from studytiny import DialogueModel, Tokenizer, UserError, save_checkpoint
from studytiny.checkpoint import CONFIG_FILE, VOCAB_FILE, WEIGHTS_FILE, load_folder, read_config


@pytest.fixture(params=["model", "published"])
def either(request):
    return request.getfixturevalue(request.param)


def test_saved_model_comes_back_equal(tmp_path, either, tokenizer):
    save_checkpoint(tmp_path / "m", either, tokenizer, {"epoch": 3})
    loaded, vocabulary = load_folder(tmp_path / "m", "cpu")
    assert type(loaded) is type(either)
    assert loaded.config == either.config
    assert vocabulary.vocab == tokenizer.vocab
    assert not loaded.training
    for name, tensor in either.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert read_config(tmp_path / "m")["training"] == {"epoch": 3}
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE, VOCAB_FILE])


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path, model, tokenizer):
    save_checkpoint(tmp_path / "full", model, tokenizer)
    save_checkpoint(tmp_path / "half", model, tokenizer, dtype=torch.bfloat16)
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert load_folder(tmp_path / "half", "cpu")[0].embed_tokens.weight.dtype == torch.float32


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config.update(changes)
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def flip_bit(folder):
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-1000] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)


def truncate(folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), "config.json"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), "model.safetensors"),
        (lambda f: (f / CONFIG_FILE).write_text("{", encoding="utf-8"), "不是 StudyTiny 的模型配置"),
        (lambda f: (f / CONFIG_FILE).write_text("[]", encoding="utf-8"), "不是 StudyTiny 的模型配置"),
        (lambda f: edit_config(f, architecture="gpt"), "architecture"),
        (lambda f: edit_config(f, n_layers=10**9), "n_layers"),
        (lambda f: edit_config(f, n_layers=3), "缺少"),
        (lambda f: edit_config(f, n_layers=1), "多出"),
        (lambda f: edit_config(f, d_model=64), "形状"),
        (lambda f: edit_config(f, vocab_size=9), "词表有"),
        (lambda f: edit_config(f, vocab_sha256="0" * 64), "不是这个模型训练时用的词表"),
        (flip_bit, "已损坏"),
        (truncate, "已损坏"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), "已损坏"),
        (lambda f: edit_weights(f, lambda t: t["norm.weight"].fill_(2)), "已损坏"),
        (lambda f: edit_weights(f, lambda t: t.update({"norm.weight": t["norm.weight"].long()})), "类型"),
    ],
)
def test_damaged_folder_is_named(tmp_path, model, tokenizer, damage, named):
    folder = save_checkpoint(tmp_path / "m", model, tokenizer)
    damage(folder)
    with pytest.raises(UserError, match=named):
        load_folder(folder, "cpu")


def test_vocabulary_of_another_model_is_named(tmp_path, model, tokenizer):
    folder = save_checkpoint(tmp_path / "m", model, tokenizer)
    characters = list(tokenizer.vocab)[7:]
    Tokenizer(reversed(characters)).save_vocab(folder / VOCAB_FILE)
    with pytest.raises(UserError, match="不是这个模型训练时用的词表"):
        load_folder(folder, "cpu")
    Tokenizer(characters[:-1]).save_vocab(folder / VOCAB_FILE)
    with pytest.raises(UserError, match="词表有"):
        load_folder(folder, "cpu")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="不是模型文件夹"):
        load_folder(tmp_path / "nowhere", "cpu")


def test_nothing_is_written_for_a_model_that_cannot_be_used(tmp_path, model, tokenizer):
    with pytest.raises(UserError, match="词表有"):
        save_checkpoint(tmp_path / "m", model, Tokenizer("一二"))
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        save_checkpoint(tmp_path / "m", model, tokenizer)
    assert not (tmp_path / "m").exists()


def test_failed_save_leaves_the_old_model_whole(tmp_path, model, tokenizer, monkeypatch):
    folder = save_checkpoint(tmp_path / "m", model, tokenizer)
    replace = os.replace

    def full_disk(source, target):
        if str(target).endswith(WEIGHTS_FILE):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    torch.manual_seed(9)
    other = DialogueModel(tokenizer.vocab_size, d_model=32, n_head=4, n_layers=2, max_length=64)
    with pytest.raises(OSError):
        save_checkpoint(folder, other, tokenizer)
    loaded, _ = load_folder(folder, "cpu")
    assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)
    assert len(list(folder.iterdir())) == 3  # no temporary file stays behind
