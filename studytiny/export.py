"""Writes a model folder in Hugging Face's format: ``python -m studytiny.export MODEL_FOLDER OUT``.

The shape of DialogueModel is Qwen3's, so the result needs no code of ours: transformers loads it without
``trust_remote_code``, and so does whatever else reads Qwen3, vLLM for instance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from studytiny.checkpoint import WEIGHTS_FILE, load_folder
from studytiny.command import CommandParser, run_command
from studytiny.errors import UserError
from studytiny.files import write_atomically
from studytiny.model import DialogueModel, ModelConfig
from studytiny.tokenizer import END_ID, PAD_ID, SPECIAL_TOKENS, UNK_ID, Tokenizer

# A conversation as ``Tokenizer.encode_dialogue`` renders it, in the language of Hugging Face's templates.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def huggingface_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of transformers' Qwen3Config."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.d_model // config.n_head,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
        "torch_dtype": "float32",
    }


def huggingface_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: every character a token, the special ones recognised by name.

    There they are recognised in any text, also in a user's: whoever serves the model must not let them through.
    """
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **added} for index, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": tokenizer.vocab, "unk_token": SPECIAL_TOKENS[UNK_ID]},
    }


def export(model: DialogueModel, tokenizer: Tokenizer, folder: str | Path) -> Path:
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Raises:
        UserError: the published architecture, which has no counterpart there, or a folder that holds a model already.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if not isinstance(model, DialogueModel):
        raise UserError(
            "StudyTinyModel 的结构（published）在 Hugging Face 里没有对应的；只能导出 studytiny 架构的模型。"
        )
    if (folder / "config.json").exists():
        raise UserError(f"{folder} 里已经有一个模型；请换一个文件夹。")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_length,
        "unk_token": SPECIAL_TOKENS[UNK_ID],
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "eos_token": SPECIAL_TOKENS[END_ID],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    weights = {f"model.{name}": value.detach().cpu().float() for name, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, save(weights, {"format": "pt"}))
    files = {"tokenizer.json": huggingface_tokenizer(tokenizer), "tokenizer_config.json": settings}
    files["config.json"] = huggingface_config(model.config)
    for name, content in files.items():
        write_atomically(folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    return folder


def main() -> None:
    parser = CommandParser(
        "python -m studytiny.export", "把模型文件夹转换成 Hugging Face 的格式（Qwen3），transformers 可以直接读取。"
    )
    parser.add_argument("model", metavar="模型文件夹", help="训练得到的文件夹")
    parser.add_argument("out", metavar="OUT", help="写到哪个文件夹，没有就新建")
    arguments = parser.parse_args()
    folder = export(*load_folder(arguments.model, torch.device("cpu")), arguments.out)
    print(f"已导出到 {folder}；用 transformers 的 AutoModelForCausalLM.from_pretrained 读取。")


if __name__ == "__main__":
    run_command(main)
