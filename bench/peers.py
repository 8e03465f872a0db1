"""The engines that ``decode.py`` and ``serve.py`` compare: ``python bench/peers.py ENGINE FOLDER`` runs one of them.

Every engine runs in a process of its own, because the spinning thread pools of two libraries in one process disturb
each other. A process loads its engine, then answers one line of JSON on stdout for every line on stdin, and rests in
between. All run the same weights, Qwen3's shape with its norm on queries and keys: ``prepare FOLDER`` draws them and
writes the folder in everybody's format.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bench.engines import VOCABULARY, WINDOW, CTranslate2, HuggingFace, LlamaCpp, Request, StudyTiny, load_vocabulary
from studytiny import DialogueModel, Tokenizer, save_checkpoint
from studytiny.errors import UserError
from studytiny.export import export
from studytiny.tokenizer import END_ID, SPECIAL_TOKENS

NAMES = {
    "studytiny-float32": "本项目 float32",
    "studytiny-bfloat16": "本项目 bfloat16",
    "studytiny-int8": "本项目 int8",
    "studytiny-int8-plain": "本项目 int8，不用编译的内核",
    "transformers-float32": "transformers float32",
    "transformers-bfloat16": "transformers bfloat16",
    "ctranslate2-float32": "CTranslate2 float32",
    "ctranslate2-int8": "CTranslate2 int8",
    "ctranslate2-int8-avx512": "CTranslate2 int8，强制 AVX512",
    "llama.cpp-q8_0": "llama.cpp Q8_0",
}


# Of each family: its class, what ``prepare`` must have written for it, and what to install.
FAMILIES = {
    "studytiny": (StudyTiny, "studytiny", "-r requirements.txt"),
    "transformers": (HuggingFace, "huggingface", "transformers"),
    "ctranslate2": (CTranslate2, "ctranslate2", "ctranslate2 transformers"),
    "llama.cpp": (LlamaCpp, "q8_0.gguf", "llama-cpp-python gguf"),
}


def load_engine(name: str, folder: Path, threads: int) -> StudyTiny | HuggingFace | CTranslate2 | LlamaCpp:
    """Raises UserError: it is not installed, or does not run on this machine."""
    family, _, kind = name.partition("-")
    engine, written, packages = FAMILIES[family]
    if kind.endswith("-plain"):
        os.environ["STUDYTINY_KERNEL"] = "0"
    if kind.endswith("-avx512"):
        os.environ["CT2_FORCE_CPU_ISA"] = "AVX512"
    kind = kind.removesuffix("-plain").removesuffix("-avx512")
    if not (folder / written).exists():
        raise UserError(f"没有装齐；请运行 pip install {packages}")
    try:
        return engine(folder, threads, kind)
    except ImportError as error:
        raise UserError(f"没有装齐（{error.name}）；请运行 pip install {packages}") from error
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:  # CTranslate2 told to use AVX512 where there is none
        raise UserError(f"在这台机器上不能用：{error}") from error


# The model, the same for all


def random_model() -> tuple[DialogueModel, Tokenizer]:
    """The standard size with fixed random weights, changed in two ways that cost no time.

    The blocks speak 30 times louder than a fresh model's: otherwise the last token, whose embedding still stands in the
    stream, would be drawn for ever. The embedding of <|end|> is a hundredth of its size, so its logit stays near 0,
    while each of the 50 best of 6,700 lies well above: top-k never lets <|end|> through, and every reply gets the
    length asked.
    """
    tokenizer = Tokenizer(chr(0x4E00 + number) for number in range(VOCABULARY - len(SPECIAL_TOKENS)))
    torch.manual_seed(0)
    model = DialogueModel(tokenizer.vocab_size, max_length=WINDOW)
    with torch.no_grad():
        for block in model.layers:
            block.self_attn.o_proj.weight *= 30
            block.mlp.down_proj.weight *= 30
        model.embed_tokens.weight[END_ID] *= 0.01
    return model, tokenizer


def write_gguf(model: DialogueModel, path: Path) -> None:
    """Q8_0 throughout, as llama.cpp's own tool writes it; norms stay float32. No vocabulary: we speak in ids."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_key_length(config.d_model // config.n_head)
    writer.add_value_length(config.d_model // config.n_head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.n_layers)
    for name, tensor in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        theirs = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        writer.add_tensor(theirs, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(folder: Path) -> None:
    """Writes the model for every engine that is installed; one that is not will say so itself."""
    model, tokenizer = random_model()
    save_checkpoint(folder / "studytiny", model, tokenizer)
    export(model, tokenizer, folder / "huggingface")
    try:
        import transformers  # noqa: F401  # the converter needs it and says so too late
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder / "huggingface")).convert(str(folder / "ctranslate2"))
    except ImportError as error:
        print(f"CTranslate2: {error}", file=sys.stderr)
    try:
        write_gguf(model, folder / "q8_0.gguf")
    except ImportError as error:
        print(f"llama.cpp: {error}", file=sys.stderr)


# The process


@dataclass(frozen=True)
class Workload:
    """Conversations to hold: lengths of prompts and replies in tokens, arrivals in seconds, callers (empty: nobody's).

    ``watch``: the time to the first token of each conversation is wanted.
    """

    prompts: list[int]
    replies: list[int]
    arrivals: list[float] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    watch: bool = False


def make_requests(workload: Workload, tokenizer: Tokenizer, seed: int) -> list[Request]:
    """Random texts whose rendering has exactly the tokens asked; a new seed gives new texts, so nothing is cached."""
    source = random.Random(seed)
    characters = list(tokenizer.vocab)[len(SPECIAL_TOKENS) :]
    overhead = len(tokenizer.encode_dialogue([{"role": "user", "content": ""}], add_reply_mark=True).ids)
    requests = []
    for index, (length, reply) in enumerate(zip(workload.prompts, workload.replies, strict=True)):
        text = "".join(source.choices(characters, k=length - overhead))
        prompt = tokenizer.encode_dialogue([{"role": "user", "content": text}], add_reply_mark=True).ids
        arrival = workload.arrivals[index] if workload.arrivals else 0.0
        caller = workload.callers[index] if workload.callers else ""
        requests.append(Request(text, prompt, reply, arrival, caller))
    return requests


def memory_use() -> dict[str, float]:
    """Resident memory of this process in MB, the most so far and now; empty on a system that is not Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = dict(line.split(":", 1) for line in lines)
    names = {"peak": "VmHWM", "now": "VmRSS"}
    return {key: int(found[name].split()[0]) / 1024 for key, name in names.items() if name in found}


def serve(name: str, folder: Path, threads: int, reply: Callable[[dict], None]) -> None:
    try:
        engine = load_engine(name, folder, threads)
    except UserError as error:
        reply({"missing": str(error)})
        return
    tokenizer = load_vocabulary(folder)
    reply({"settings": [setting.label for setting in engine.settings]})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "memory":
            reply(memory_use())
            continue
        workload = Workload(**order["workload"])
        requests = make_requests(workload, tokenizer, order["seed"])
        answers = engine.run(engine.settings[order["setting"]], requests, workload.watch)
        for request, answer in zip(requests, answers, strict=True):
            if not answer.refused and answer.tokens != request.new_tokens:
                raise RuntimeError(f"{name}: {answer.tokens} tokens instead of {request.new_tokens}")
        reply({"answers": [asdict(answer) for answer in answers]})


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    for module in sys.argv[4:]:  # what else the process of a page has loaded
        importlib.import_module(module)
    if name == "prepare":
        prepare(folder)
        return
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # libraries print: what they say goes to stderr instead
    os.dup2(2, 1)

    def reply(message: dict) -> None:
        print(json.dumps(message, ensure_ascii=False), file=answers, flush=True)

    serve(name, folder, threads, reply)


if __name__ == "__main__":
    main()
