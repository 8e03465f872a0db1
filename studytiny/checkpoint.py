"""A model folder: config.json + model.safetensors + vocab.txt; saved atomically, checked when loaded.

``model.safetensors`` carries a hash over its own tensors and one of the vocabulary it was trained with, so a flipped
bit or files of two different models in one folder are noticed, and named, instead of answering nonsense.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from studytiny.errors import UserError
from studytiny.files import write_atomically
from studytiny.model import DialogueModel
from studytiny.published import PublishedModel
from studytiny.tokenizer import Tokenizer

CONFIG_FILE, WEIGHTS_FILE, VOCAB_FILE = "config.json", "model.safetensors", "vocab.txt"
ARCHITECTURES = {cls.architecture: cls for cls in (DialogueModel, PublishedModel)}
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Model = DialogueModel | PublishedModel


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``auto``: the first of CUDA, MPS, CPU that is there.

    Raises:
        UserError: the device that was asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if str(device) == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    device = torch.device(device)
    if not there.get(device.type, True):
        raise UserError(f"这台电脑上没有可用的 {device.type}；请改用 cpu 或 auto。")
    return device


def save_checkpoint(
    folder: str | Path,
    model: Model,
    tokenizer: Tokenizer,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes ``model`` and ``tokenizer`` as a model folder.

    Args:
        training: how it was trained, kept in config.json for people; must be JSON.
        dtype: of the stored weights; bfloat16 halves the file.

    Raises:
        UserError: vocabulary and model do not fit, or the weights hold NaN or infinity; nothing is written then.
        OSError: the folder cannot be written; whatever was there before stays whole.
    """
    folder = Path(folder)
    _check_vocabulary_size(folder, model.config.vocab_size, tokenizer)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
    _check_finite(folder, tensors)
    metadata = {"format": "pt", "sha256": hash_tensors(tensors), "vocab_sha256": tokenizer.sha256}
    config = {"architecture": model.architecture, **asdict(model.config), "vocab_sha256": tokenizer.sha256}
    if training is not None:
        config["training"] = dict(training)
    # config.json last: without it the folder is no model yet, so a first save cut short leaves nothing half-made.
    tokenizer.save_vocab(folder / VOCAB_FILE)
    write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    return folder


def load_folder(folder: str | Path, device: str | torch.device = "auto") -> tuple[Model, Tokenizer]:
    """Reads a model folder and checks it: configuration, vocabulary, names, shapes, types, hash, finite values.

    Returns:
        The model in float32 on ``device``, in eval mode, and its tokenizer.

    Raises:
        UserError: one sentence that names what does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    cls = ARCHITECTURES[config.pop("architecture")]
    try:
        model_config = cls.config_class(**config["sizes"])
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}：{error}") from error
    tokenizer = Tokenizer.load_vocab(folder / VOCAB_FILE)
    _check_vocabulary_size(folder, model_config.vocab_size, tokenizer)
    if config["vocab_sha256"] != tokenizer.sha256:
        raise UserError(f"{folder} 里的 {VOCAB_FILE} 不是这个模型训练时用的词表；请换回原来的词表文件。")

    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    # On the meta device a model has shapes but no memory: the file is compared before anything is allocated.
    with torch.device("meta"):
        expected = {name: value.shape for name, value in cls.from_config(model_config).state_dict().items()}
    _check_tensors(folder, tensors, expected)
    if metadata.get("vocab_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{folder} 里的 {WEIGHTS_FILE} 和 {VOCAB_FILE} 不是同一次保存的；请重新复制整个模型文件夹。")
    if metadata.get("sha256", "") != hash_tensors(tensors):
        raise UserError(f"{folder / WEIGHTS_FILE} 已损坏（校验和不符）；请重新复制或重新训练这个模型。")
    _check_finite(folder, tensors)

    model = cls.from_config(model_config)
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model.to(pick_device(device)).eval(), tokenizer


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as ``{"architecture", "sizes", "vocab_sha256", "training"}``; UserError if it is none of ours."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} 不是模型文件夹：里面没有 {CONFIG_FILE}；请给出训练得到的文件夹。")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        architecture = raw["architecture"]
        cls = ARCHITECTURES[architecture]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} 不是 StudyTiny 的模型配置（architecture 应是 {' 或 '.join(ARCHITECTURES)}）。"
        ) from error
    known = fields(cls.config_class)
    missing = [field.name for field in known if field.name not in raw and field.default is MISSING]
    if missing:
        raise UserError(f"{path} 缺少 {'、'.join(missing)}；请重新复制整个模型文件夹。")
    return {
        "architecture": architecture,
        "sizes": {field.name: raw[field.name] for field in known if field.name in raw},
        "vocab_sha256": raw.get("vocab_sha256"),
        "training": raw.get("training") or {},
    }


def _check_vocabulary_size(folder: Path, vocab_size: int, tokenizer: Tokenizer) -> None:
    if vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{folder}：词表有 {tokenizer.vocab_size} 项，模型却是按 {vocab_size} 项建的；两者必须是同一套。"
        )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"找不到 {path}；请重新复制整个模型文件夹。")
    try:
        with safe_open(path, framework="pt") as file:
            # clone: the file is memory-mapped, and Windows cannot replace a file that is still mapped.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} 已损坏，读不出来；请重新复制或重新训练这个模型。") from error


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Names, shapes and types against what config.json promises."""
    for problem, names in (("缺少", expected.keys() - tensors.keys()), ("多出", tensors.keys() - expected.keys())):
        if names:
            raise UserError(
                f"{folder / WEIGHTS_FILE} {problem} {min(names)} 等 {len(names)} 个张量，与 {CONFIG_FILE} 不符。"
            )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            found, wanted = tuple(tensor.shape), tuple(expected[name])
            raise UserError(f"{folder / WEIGHTS_FILE} 里 {name} 的形状是 {found}，按 {CONFIG_FILE} 应是 {wanted}。")
        if tensor.dtype not in STORED_DTYPES:
            raise UserError(f"{folder / WEIGHTS_FILE} 里 {name} 的类型是 {tensor.dtype}；只支持浮点权重。")


def _check_finite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{folder}：权重 {name} 里有 NaN 或无穷大，这个模型不能用；请换一份或调低学习率重新训练。")


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
