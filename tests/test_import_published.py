"""Importing a published checkpoint gives the same model and runs no code, whatever the file says."""

from __future__ import annotations

import builtins
import codecs
import json
import operator
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import next_logits
from torch import nn

from studytiny.checkpoint import load_folder
from studytiny.errors import UserError
from studytiny.import_published import (
    MAX_DIRECTORY_BYTES,
    MAX_PICKLE_BYTES,
    PublishedFileError,
    import_published,
    main,
    read_published,
)
from studytiny.original import load_checkpoint
from tests.published_factory import (
    CHARACTERS,
    FULL_SIZE,
    PublishedFixture,
    build_checkpoint,
    save_as_original,
    write_published,
    write_vocab,
)

ROOT = Path(__file__).parent.parent
CANARY = Path(os.path.abspath(os.environ.get("TMPDIR", "/tmp"))) / f"studytiny-canary-{os.getpid()}"
SMALL = {"d_model": 8, "n_head": 2, "n_layers": 1}
MEGABYTE = 1 << 20


# What an importer must never do, as Python's own audit hooks report it. "compile", "exec" and "import" catch anything
# run in Python; a hook cannot be taken out again, so it listens only while ``watched`` says so.
FORBIDDEN = ("exec", "compile", "import", "pickle.", "marshal.", "os.", "subprocess.", "shutil.", "socket.", "ctypes.")
_listening = False
_seen: list[str] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event.startswith(FORBIDDEN):
            _seen.append(f"{event}{arguments!r}"[:200])


sys.addaudithook(_listen)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collects forbidden events, and what the canary command would have left."""
    global _listening
    _seen.clear()
    CANARY.unlink(missing_ok=True)
    _listening = True
    try:
        yield _seen
    finally:
        _listening = False
        if CANARY.exists():
            _seen.append("the canary")
            CANARY.unlink()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedFixture:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PublishedFixture:
    """A file of 40 kB, for tests that write it a thousand times."""
    fixture = write_published(tmp_path_factory.mktemp("small"), characters=CHARACTERS[:9], **SMALL)
    # What torch, zipfile and pickletools import late is imported now, so that any import under watch is the file's.
    read_published(fixture.checkpoint)
    for encoding in ("cp437", "raw_unicode_escape", "unicode_escape"):
        codecs.lookup(encoding)
    return fixture


def unzip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(path: Path, entries: dict[str, bytes] | list[tuple[str, bytes]], compress: str = "") -> Path:
    """Writes a zip with right checksums; the entry whose name ends with ``compress`` is deflated."""
    pairs = entries.items() if isinstance(entries, dict) else entries
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in pairs:
            deflate = bool(compress) and name.endswith(compress)
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED)
    return path


def with_pickle(original: Path, path: Path, pickled: bytes) -> Path:
    entries = unzip(original)
    name = next(name for name in entries if name.endswith("/data.pkl"))
    return rezip(path, {**entries, name: pickled})


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    theirs = right.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in left.state_dict().items())


# The same model comes out


def test_logits_are_bit_equal_to_the_original(published: PublishedFixture) -> None:
    checkpoint = read_published(published.checkpoint)
    with torch.no_grad():
        assert torch.equal(checkpoint.model(published.ids), published.logits)
    assert checkpoint.epoch == 2
    assert checkpoint.config["d_model"] == 32 and checkpoint.config["device"] == "cuda"


def test_the_file_really_says_cuda(published: PublishedFixture) -> None:
    assert b"cuda:0" in unzip(published.checkpoint)["model_epoch_2/data.pkl"]


def test_a_file_written_on_a_cpu_reads_the_same(published: PublishedFixture, tmp_path: Path) -> None:
    fixture = write_published(tmp_path, cuda_tags=False)
    assert b"cuda:0" not in unzip(fixture.checkpoint)["model_epoch_2/data.pkl"]
    assert same_weights(read_published(fixture.checkpoint).model, read_published(published.checkpoint).model)


def test_decoding_step_by_step_agrees_with_the_original(published: PublishedFixture) -> None:
    original = build_checkpoint()["model"].eval()
    model = read_published(published.checkpoint).model
    for row in published.ids:
        with torch.no_grad():
            expected = original(row[None])[0]
        cache = model.new_cache()
        for place, index in enumerate(row.tolist()):
            logits = next_logits(model, [index], cache, place)
            assert torch.allclose(logits, expected[place], rtol=0, atol=1e-5)
            assert logits.argmax() == expected[place].argmax()


def test_a_strided_weight_is_read_in_its_order(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(**SMALL)
    weight = checkpoint["model"].lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    path = save_as_original(checkpoint, tmp_path / "model.pt")
    assert same_weights(read_published(path).model.lm_head, checkpoint["model"].lm_head)


def test_a_file_of_an_earlier_torch_reads_the_same(tmp_path: Path) -> None:
    """Up to torch 2.3 OneCycleLR kept its curve as a function, which is pickled as a getattr; some had no byteorder."""
    checkpoint = build_checkpoint(**SMALL)
    checkpoint["scheduler"].anneal_func = torch.optim.lr_scheduler.OneCycleLR._annealing_cos
    path = save_as_original(checkpoint, tmp_path / "model.pt")
    entries = unzip(path)
    assert b"__builtin__\ngetattr" in entries["model/data.pkl"]
    rezip(path, {name: content for name, content in entries.items() if name != "model/byteorder"})
    assert same_weights(read_published(path).model.lm_head, checkpoint["model"].lm_head)


def test_what_matters_in_training_only_may_differ(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(**SMALL)
    model = checkpoint["model"].eval()
    model.encoder_layers[0].attn.dropout = 0.1
    model.token_embed.padding_idx = 3
    model.d_model, model.name = 8, "小黄鸡"
    assert not read_published(save_as_original(checkpoint, tmp_path / "model.pt")).model.training


def test_the_model_folder_holds_the_same_model(published: PublishedFixture, tmp_path: Path) -> None:
    folder = import_published(published.checkpoint, published.vocab, tmp_path / "out")
    model, tokenizer = load_folder(folder, "cpu")
    with torch.no_grad():
        assert torch.equal(model(published.ids), published.logits)
    assert tokenizer.vocab_size == len(CHARACTERS) + 7
    training = json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]
    assert training["epoch"] == 2 and training["batch_size"] == 64


def test_load_checkpoint_reads_the_published_file(published: PublishedFixture) -> None:
    model, optimizer, scheduler, epoch, config = load_checkpoint(published.checkpoint)
    model = model.cpu()
    with torch.no_grad():
        assert torch.equal(model(published.ids), published.logits)
    assert (optimizer, scheduler, epoch, config["num_heads"]) == (None, None, 2, 4)


def test_settings_that_are_no_plain_values_are_left_out(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(**SMALL)
    checkpoint["config"] = {"lr": 5e-3, "warm": None, "nan": float("nan"), "long": "长" * 2000, "list": [1], 7: "seven"}
    assert read_published(save_as_original(checkpoint, tmp_path / "m.pt")).config == {"lr": 5e-3, "warm": None}


FULL_SIZE_SCRIPT = """
import importlib.util, resource, sys, torch
from pathlib import Path
from studytiny import import_published, load_model
from studytiny.import_published import read_published

assert importlib.util.find_spec("My") is None
folder = Path(sys.argv[1])
read_published(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
published = read_published(folder / "model_epoch_2.pt")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
expected = torch.load(folder / "expected.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(published.model(expected["ids"]), expected["logits"])
assert sum(parameter.numel() for parameter in published.model.parameters()) == 19_489_335
import_published(folder / "model_epoch_2.pt", folder / "vocab.txt", folder / "out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert not {"My", "dill", "joblib"} & set(sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory the way Linux reports it")
def test_a_file_of_the_published_size_reads_in_a_bounded_memory(published: PublishedFixture, tmp_path: Path) -> None:
    fixture = write_published(tmp_path, **FULL_SIZE)
    torch.save({"ids": fixture.ids, "logits": fixture.logits}, tmp_path / "expected.pt")
    command = [sys.executable, "-W", "error", "-c", FULL_SIZE_SCRIPT, str(tmp_path), str(published.checkpoint)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    size = fixture.checkpoint.stat().st_size
    assert 230e6 < size < 240e6
    for kilobytes in result.stdout.split():
        assert int(kilobytes) * 1024 < 4 * size


# Hostile files: each builder writes one file and returns its path


class Calls:
    """Pickled as a call of ``function``; harmless until someone unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def shell() -> Calls:
    return Calls(os.system, f"echo > {CANARY}")


def object_tricks() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Changes to the objects the original saves; what comes out is saved by torch itself."""

    def put(place: str, value: Callable[[], Any]) -> Callable[[dict[str, Any]], Any]:
        """Sets e.g. ``model.lm_head.weight`` or ``config.note``, past all checks of torch."""

        def change(checkpoint: dict[str, Any]) -> None:
            first, *path, last = ["", *place.split(".")] if "." not in place else place.split(".")
            target = checkpoint[first] if first else checkpoint
            for name in path:
                target = target[int(name)] if name.isdigit() else getattr(target, name)
            if isinstance(target, dict):
                target[last] = value()
            else:
                target.__dict__[last] = value()

        return change

    def weight(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
        def apply(checkpoint: dict[str, Any]) -> None:
            parameters = checkpoint["model"].lm_head._parameters
            parameters["weight"] = change(parameters["weight"].detach())

        return apply

    def module(path: str, build: Callable[[], nn.Module]) -> Callable[[dict[str, Any]], Any]:
        def apply(checkpoint: dict[str, Any]) -> None:
            parent, _, name = path.rpartition(".")
            checkpoint["model"].get_submodule(parent)._modules[name] = build()

        return apply

    def hook(checkpoint: dict[str, Any]) -> None:
        checkpoint["model"].lm_head._forward_hooks[0] = print

    def tied(checkpoint: dict[str, Any]) -> None:
        checkpoint["model"].lm_head.weight = checkpoint["model"].token_embed.weight

    def swapped(checkpoint: dict[str, Any]) -> None:
        modules = checkpoint["model"].encoder_layers[0].ffn._modules
        modules["0"] = modules.pop("0")

    def fill(value: float) -> Callable[[torch.Tensor], Any]:
        def change(tensor: torch.Tensor) -> torch.Tensor:
            tensor[1, 2] = value
            return tensor

        return change

    def with_state(checkpoint: dict[str, Any]) -> None:
        checkpoint["model"].lm_head.weight.note = "a parameter with attributes of its own"

    def attention(**options: Any) -> Callable[[dict[str, Any]], Any]:
        return module("encoder_layers.0.attn", lambda: nn.MultiheadAttention(8, 2, **options))

    run = "__import__('os').system('echo > %s')" % CANARY  # noqa: UP031
    attn = "model.encoder_layers.0.attn"
    return {
        # code, wherever it hides
        "system in place of the checkpoint": lambda checkpoint: shell(),
        "system in place of the model": put("model", shell),
        "system in the optimizer's place": put("optimizer", shell),
        "system in the scheduler's place": put("scheduler", shell),
        "system in the config's place": put("config", shell),
        "system in place of the epoch": put("epoch", shell),
        "system in the optimizer's state": put("optimizer.state.note", shell),
        "system in the optimizer's defaults": put("optimizer.defaults.lr", shell),
        "system in the scheduler": put("scheduler._last_lr", lambda: [shell()]),
        "system in the config": put("config.note", shell),
        "system in a list of lists of the config": put("config.note", lambda: [[[shell()]]]),
        "system as a model attribute": put("model.note", shell),
        "system as a weight": put("model.lm_head._parameters.weight", shell),
        "system as a module": put("model._modules.lm_head", shell),
        "system as the position table": put("model.pos_embed.encoding", shell),
        "system beside what is needed": put("more", shell),
        "a hook that calls print": hook,
        "eval": put("config.note", lambda: Calls(eval, run)),
        "exec": put("config.note", lambda: Calls(exec, run)),
        "compile": put("config.note", lambda: Calls(compile, run, "x", "exec")),
        "__import__": put("config.note", lambda: Calls(__import__, "antigravity")),
        "getattr of os": put("config.note", lambda: Calls(getattr, Calls(__import__, "os"), "system")),
        "getattr of a known class": put("config.note", lambda: Calls(getattr, nn.Linear, "__init__")),
        "getattr of the scheduler's class": put(
            "config.note", lambda: Calls(getattr, torch.optim.lr_scheduler.OneCycleLR, "__globals__")
        ),
        "open for writing": put("config.note", lambda: Calls(open, str(CANARY), "w")),
        "subprocess": put("config.note", lambda: Calls(subprocess.Popen, ["touch", str(CANARY)])),
        "functools.partial": put("config.note", lambda: partial(os.system, "x")),
        "operator.attrgetter": put("config.note", lambda: operator.attrgetter("system")),
        "map over eval": put("config.note", lambda: Calls(builtins.list, Calls(builtins.map, eval, [run]))),
        "unlink": put("config.note", lambda: Calls(os.unlink, __file__)),
        "torch.load of another file": put("config.note", lambda: Calls(torch.load, "other.pt")),
        "torch.hub": put("config.note", lambda: Calls(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x")),
        "a terabyte of bytearray": put("config.note", lambda: Calls(bytearray, 1 << 40)),
        "bytes": put("config.note", lambda: b"raw"),
        # tensors of other kinds
        "sparse weight": weight(lambda tensor: tensor.to_sparse()),
        "quantized weight": weight(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
        "half weight": weight(lambda tensor: tensor.half()),
        "bfloat16 weight": weight(lambda tensor: tensor.bfloat16()),
        "double weight": weight(lambda tensor: tensor.double()),
        "integer weight": weight(lambda tensor: tensor.long()),
        "complex weight": weight(lambda tensor: tensor.to(torch.complex64).conj()),
        "meta weight": weight(lambda tensor: tensor.to("meta")),
        "nested weight": weight(lambda tensor: torch.nested.nested_tensor([tensor])),
        "expanded weight": weight(lambda tensor: tensor[:1].expand(tensor.shape)),
        "overlapping weight": weight(lambda tensor: tensor.flatten().as_strided(tensor.shape, (1, 1))),
        "transposed weight": weight(lambda tensor: tensor.t()),
        "flat weight": weight(lambda tensor: tensor.flatten()),
        "scalar weight": weight(lambda tensor: tensor[0, 0]),
        "shortened weight": weight(lambda tensor: tensor[:-1]),
        "NaN in a weight": weight(fill(float("nan"))),
        "infinity in a weight": weight(fill(float("-inf"))),
        "NaN in the position table": lambda checkpoint: checkpoint["model"].pos_embed.encoding[3].fill_(float("nan")),
        "missing weight": weight(lambda tensor: None),
        "weight with a state": with_state,
        "double position table": lambda checkpoint: put(
            "model.pos_embed.encoding", lambda: checkpoint["model"].pos_embed.encoding.double()
        )(checkpoint),
        "shared weights": tied,
        # another model
        "unknown torch class": module("encoder_layers.0.ffn.1", lambda: nn.Dropout()),
        "another activation": module("encoder_layers.0.ffn.1", lambda: nn.GELU()),
        "another known class": module("encoder_layers.0.ffn.1", lambda: nn.Linear(32, 32)),
        "one layer more in a block": module("encoder_layers.0.ffn.3", lambda: nn.ReLU()),
        "one part more": module("more", lambda: nn.Linear(8, 8)),
        "one weight more": put("model._parameters.more", lambda: nn.Parameter(torch.zeros(3))),
        "a buffer": put("model._buffers.more", lambda: torch.zeros(3)),
        "no layers": module("encoder_layers", lambda: nn.ModuleList()),
        "a linear without bias": module("lm_head", lambda: nn.Linear(8, 58, bias=False)),
        "layers in another order": swapped,
        "batch_first": attention(batch_first=True),
        "add_zero_attn": attention(add_zero_attn=True),
        "bias_kv": attention(add_bias_kv=True),
        "attention without bias": attention(bias=False),
        "another width of keys": attention(kdim=4),
        "another eps": put("model.encoder_layers.0.norm1.eps", lambda: 1e-6),
        "no eps": put("model.encoder_layers.0.norm1.eps", lambda: None),
        "max_norm": put("model.token_embed.max_norm", lambda: 1.0),
        "forward overridden": put("model.lm_head.forward", OrderedDict),
        "weight shadowed": put("model.lm_head.weight", lambda: torch.zeros(58, 8)),
        "other heads": put(f"{attn}.num_heads", lambda: 4),
        "no heads": put(f"{attn}.num_heads", lambda: 0),
        "a billion heads": put(f"{attn}.num_heads", lambda: 10**9),
        "heads that are text": put(f"{attn}.num_heads", lambda: "2"),
        "a billion rows": put("model.lm_head.out_features", lambda: 10**9),
        "a number of 300 digits": put("model.lm_head.out_features", lambda: 10**300),
        "a table of numbers instead of the model": put("model", lambda: [1, 2, 3]),
        "a bare state_dict": lambda checkpoint: checkpoint["model"].state_dict(),
        "a state_dict as the model": lambda checkpoint: {**checkpoint, "model": checkpoint["model"].state_dict()},
        "the model alone": lambda checkpoint: checkpoint["model"],
        "no model": lambda checkpoint: {name: checkpoint[name] for name in ("epoch", "config")},
        "no config": lambda checkpoint: {name: checkpoint[name] for name in ("epoch", "model")},
        "epoch as text": put("epoch", lambda: "2"),
        "epoch below zero": put("epoch", lambda: -1),
        "config as a list": put("config", lambda: [1]),
        "half a surrogate pair": put("config.note", lambda: "\ud800"),
    }


def opcodes() -> dict[str, bytes]:
    """Whole pickles, written by hand."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    system = b"cos\nsystem\n"
    command = text(f"echo > {CANARY}")
    proto, stop, size = b"\x80\x02", b".", MAX_PICKLE_BYTES - 100
    known = b"ccollections\nOrderedDict\n"
    laughs = b"]q\x00" + b"".join(b"](" + b"h%c" % n * 10 + b"eq%c" % (n + 1) for n in range(60))
    return {
        "REDUCE": proto + system + command + b"\x85R" + stop,
        "posix system": proto + b"cposix\nsystem\n" + command + b"\x85R" + stop,
        "INST": proto + b"(" + command + b"ios\nsystem\n" + stop,
        "OBJ": proto + b"(" + system + command + b"o" + stop,
        "NEWOBJ": proto + system + command + b"\x85\x81" + stop,
        "NEWOBJ_EX": proto + system + command + b"\x85}\x92" + stop,
        "STACK_GLOBAL": proto + text("os") + text("system") + b"\x93" + command + b"\x85R" + stop,
        "EXT1": proto + b"\x82\x01" + stop,
        "EXT2": proto + b"\x83\x01\x00" + stop,
        "EXT4": proto + b"\x84\x01\x00\x00\x00" + stop,
        "PERSID": proto + b"Pstorage\n" + stop,
        "BINPERSID of a call": proto + known + b")RQ" + stop,
        "BINPERSID of a list": proto + b"]Q" + stop,
        "protocol 0": b"(dp0\n" + stop,
        "protocol 4": b"\x80\x04}" + stop,
        "protocol twice": proto + proto + b"}" + stop,
        "DUP": proto + b"}2" + stop,
        "POP": proto + b"}}0" + stop,
        "BYTEARRAY8 of an exabyte": proto + b"\x96" + struct.pack("<Q", 1 << 60) + stop,
        "BINUNICODE of four gigabytes": proto + b"X\xff\xff\xff\xff" + stop,
        "LONG4 of 200 kB": proto + b"\x8b" + struct.pack("<i", 200_000) + b"\x7f" * 200_000 + stop,
        "LONG of 200,000 digits": proto + b"L" + b"9" * 200_000 + b"L\n" + stop,
        "LONG1 of 255 bytes": proto + b"\x8a\xff" + b"\x7f" * 255 + stop,
        "huge memo index": proto + b"}r\xff\xff\xff\xff" + stop,
        "memo never set": proto + b"h\x07" + stop,
        "empty stack": proto + b"R" + stop,
        "no MARK": proto + b"}u" + stop,
        "odd SETITEMS": proto + b"}(Nu" + stop,
        "items of no dictionary": proto + b"](K\x01K\x02u" + stop,
        "APPEND to a dictionary": proto + b"}Na" + stop,
        "state for a dictionary": proto + b"}}b" + stop,
        "state for a name": proto + known + b"}b" + stop,
        "a call of a number": proto + b"K\x01)R" + stop,
        "a call with no tuple": proto + known + b"]R" + stop,
        "a name of 200 kB": proto + b"c" + b"o" * 200_000 + b"\nsystem\n" + stop,
        "a name that is not ASCII": proto + b"c\xff\xfe\nsystem\n" + stop,
        "a name with escapes": proto + b"cos\\x0a\\x1b[2J\nsystem\n" + stop,
        "a name inside a known module": proto + b"ctorch._utils\n_rebuild_sparse_tensor\n)R" + stop,
        "a known module's own imports": proto + b"ctorch._utils\nimportlib.import_module\n)R" + stop,
        "nested tuples": proto + b")" + b"\x85" * size + stop,
        "nested tuples as a key": proto + b"})" + b"\x85" * size + b"Ns" + stop,
        "nested lists": proto + b"](" * (size // 3) + b"e" * (size // 3) + stop,
        "nested marks": proto + b"(" * size + stop,
        "nested calls": proto + known + b"q\x00" + b"h\x00)R\x85" * (size // 5) + stop,
        "a list of itself": proto + b"]q\x00h\x00a" + stop,
        "a dictionary of itself": proto + b"}q\x00" + text("model") + b"h\x00s" + stop,
        "a billion laughs": proto + laughs + stop,
        "many dictionaries": proto + b"}" * size + stop,
        "no STOP": proto + b"}",
        "nothing": b"",
        "two pickles": proto + b"}." + proto + system + command + b"\x85R" + stop,
        "too long": proto + b"N" * (MAX_PICKLE_BYTES + 1) + stop,
    }


def zip_tricks() -> dict[str, Callable[[dict[str, bytes], Path], Any]]:
    """Entries of a good file -> a bad file at the given path."""
    top = "model_epoch_2"
    data = f"{top}/data.pkl"

    def patched(change: Callable[[bytearray, int], Any]) -> Callable[[dict[str, bytes], Path], Any]:
        """Changes bytes; is told where the list of entries begins."""

        def write(entries: dict[str, bytes], path: Path) -> None:
            content = bytearray(rezip(path, entries).read_bytes())
            change(content, struct.unpack_from("<I", content, len(content) - 6)[0])
            path.write_bytes(content)

        return write

    def put(offset: int, value: bytes) -> Callable[[dict[str, bytes], Path], Any]:
        def change(content: bytearray, directory: int) -> None:
            content[directory + offset : directory + offset + len(value)] = value

        return patched(change)

    def long_directory(entries: dict[str, bytes], path: Path) -> None:
        rezip(path, [(f"{top}/{index:060d}", b"") for index in range(MAX_DIRECTORY_BYTES // 100)])

    def bomb(entries: dict[str, bytes], path: Path) -> None:
        rezip(path, {**entries, data: bytes(300 * MEGABYTE)}, compress="data.pkl")

    def end_record_64(entries: dict[str, bytes], path: Path) -> None:
        """Announces a long list in the 64-bit record only."""
        content = rezip(path, entries).read_bytes()
        record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 9, 9, 1 << 40, 0)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(content) - 22, 1)
        path.write_bytes(content[:-22] + record + locator + content[-22:])

    return {
        "compressed pickle": lambda entries, path: rezip(path, entries, compress="data.pkl"),
        "compressed tensor": lambda entries, path: rezip(path, entries, compress="data/1"),
        "compressed entry that is not needed": lambda entries, path: rezip(path, entries, compress="version"),
        "300 MB in 300 kB": bomb,
        "an entry twice": lambda entries, path: rezip(path, [*entries.items(), (data, entries[data])]),
        "a tensor twice": lambda entries, path: rezip(path, [(f"{top}/data/1", b"\0" * 4), *entries.items()]),
        "an entry outside": lambda entries, path: rezip(path, {**entries, "../x": b""}),
        "an absolute entry": lambda entries, path: rezip(path, {**entries, "/tmp/x": b""}),
        "two folders": lambda entries, path: rezip(path, {**entries, "other/data.pkl": entries[data]}),
        "no entries": lambda entries, path: rezip(path, {}),
        "no pickle": lambda entries, path: rezip(path, {name: entries[name] for name in entries if name != data}),
        "no tensor": lambda entries, path: rezip(path, {n: entries[n] for n in entries if not n.endswith("data/1")}),
        "long tensor": lambda entries, path: rezip(path, {**entries, f"{top}/data/1": bytes(1 << 20)}),
        "short tensor": lambda entries, path: rezip(path, {**entries, f"{top}/data/1": bytes(4)}),
        "big-endian": lambda entries, path: rezip(path, {**entries, f"{top}/byteorder": b"big"}),
        "encrypted": put(8, b"\x01\x00"),
        "patched data": put(8, b"\x20\x00"),
        "zip version of the future": put(6, b"\xff\xff"),
        "wrong checksum": put(16, b"\x00\x00\x00\x00"),
        "sizes that differ": put(20, b"\x05\x00\x00\x00"),
        "four gigabytes announced": put(20, b"\xfe\xff\xff\xff\xfe\xff\xff\xff"),
        "entry beyond the end": put(42, b"\xf0\xff\xff\xff"),
        "entry that points to another": put(42, b"\x09\x00\x00\x00"),
        "a name cut by NUL": put(46, b"\x00"),
        "no list of entries": put(0, b"\x00\x00\x00\x00"),
        "a long list of entries": long_directory,
        "a long list in the 64-bit record": end_record_64,
        "a comment": lambda entries, path: path.write_bytes(rezip(path, entries).read_bytes()[:-2] + b"\x04\x00abcd"),
        "more behind the end": lambda entries, path: path.write_bytes(rezip(path, entries).read_bytes() + b"more"),
        # no zip at all
        "empty file": lambda entries, path: path.write_bytes(b""),
        "text": lambda entries, path: path.write_text("你好" * 1000, encoding="utf-8"),
        "web page": lambda entries, path: path.write_text("<!DOCTYPE html><html>404</html>"),
        "zeros": lambda entries, path: path.write_bytes(bytes(100_000)),
        "noise": lambda entries, path: path.write_bytes(random.Random(0).randbytes(100_000)),
        "a bare pickle": lambda entries, path: path.write_bytes(b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R."),
        "only the end of a zip": lambda entries, path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
        "torch's old format": lambda entries, path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False),
        "another program's zip": lambda entries, path: rezip(path, {"word/document.xml": b"<xml/>", "word/a": b""}),
        "a tensor alone": lambda entries, path: torch.save(torch.zeros(3), path),
    }


def refused(path: Path) -> str:
    """Reads a bad file under watch; returns the message, checked for what every refusal promises."""
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with watched() as events, pytest.raises(PublishedFileError) as caught:
            read_published(path)
        assert events == []
        assert (
            tracemalloc.get_traced_memory()[1] < 4 * size + 32 * MEGABYTE
        )  # lists and dictionaries of a hostile pickle
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path} 不能导入：") and message.endswith("。") and message.count("。") == 1
    assert message.isprintable() and len(message) < 400 + len(str(path))
    return message


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of the odd tensors
@pytest.mark.parametrize("trick", object_tricks())
def test_hostile_objects_are_refused_and_nothing_runs(trick: str, small: PublishedFixture, tmp_path: Path) -> None:
    checkpoint = build_checkpoint(**SMALL)
    changed = object_tricks()[trick](checkpoint)
    containers = (dict, list, nn.Module, Calls)
    bad = save_as_original(changed if isinstance(changed, containers) else checkpoint, tmp_path / "bad.pt")
    refused(bad)


@pytest.mark.parametrize("trick", opcodes())
def test_hostile_opcodes_are_refused_and_nothing_runs(trick: str, small: PublishedFixture, tmp_path: Path) -> None:
    refused(with_pickle(small.checkpoint, tmp_path / "bad.pt", opcodes()[trick]))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("trick", zip_tricks())
def test_hostile_archives_are_refused(trick: str, small: PublishedFixture, tmp_path: Path) -> None:
    zip_tricks()[trick](unzip(small.checkpoint), tmp_path / "bad.pt")
    refused(tmp_path / "bad.pt")


def test_the_watch_notices_a_loader_that_runs_the_file(tmp_path: Path) -> None:
    checkpoint = {**build_checkpoint(**SMALL), "optimizer": shell()}
    path = save_as_original(checkpoint, tmp_path / "bad.pt")
    with watched() as events, pytest.raises(ModuleNotFoundError, match="My"):
        torch.load(path, weights_only=False)
    assert any(event.startswith("pickle.find_class") for event in events)
    path = save_as_original({"optimizer": shell()}, tmp_path / "worse.pt")
    with watched() as events:
        torch.load(path, weights_only=False)
    assert "the canary" in events and any(event.startswith("os.system") for event in events)


def test_an_unknown_name_is_named(tmp_path: Path) -> None:
    checkpoint = {**build_checkpoint(**SMALL), "scheduler": shell()}
    assert f"{os.system.__module__}.system" in refused(save_as_original(checkpoint, tmp_path / "bad.pt"))


def test_tricks_for_the_terminal_are_not_printed(small: PublishedFixture, tmp_path: Path) -> None:
    pickled = b"\x80\x02cos\\x1b]0;hacked\\x07\nsystem\n."
    assert "\\x1b" in refused(with_pickle(small.checkpoint, tmp_path / "bad.pt", pickled))


def test_a_folder_or_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(OSError):
            read_published(path)


# Damaged files


def test_a_truncated_file_is_refused(small: PublishedFixture, tmp_path: Path) -> None:
    content, bad = small.checkpoint.read_bytes(), tmp_path / "bad.pt"
    chance = random.Random(0)
    lengths = {*range(100), *range(len(content) - 200, len(content)), *chance.sample(range(len(content)), 300)}
    for length in lengths:
        bad.write_bytes(content[:length])
        with pytest.raises(PublishedFileError):
            read_published(bad)


def test_a_flipped_bit_is_noticed_or_without_effect(small: PublishedFixture, tmp_path: Path) -> None:
    content, bad = small.checkpoint.read_bytes(), tmp_path / "bad.pt"
    good, chance, refusals = read_published(small.checkpoint), random.Random(1), 0
    directory = content.index(b"PK\x01\x02")
    header = content.index(b"PK\x03\x04", 1)
    places = [
        *chance.sample(range(len(content) * 8), 300),
        *chance.sample(range(directory * 8, len(content) * 8), 200),
        *chance.sample(range(header * 8, (header + 64) * 8), 50),
    ]
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        bad.write_bytes(damaged)
        try:
            read = read_published(bad)
        except PublishedFileError:
            refusals += 1
        else:
            assert same_weights(read.model, good.model)
            assert (read.epoch, read.config) == (good.epoch, good.config)
    assert refusals > len(places) // 4


def mutate(pickled: bytes, chance: random.Random) -> bytes:
    """One to three changes: a bit, a byte, an opcode, a piece left out, doubled or moved."""
    changed = bytearray(pickled)
    for _ in range(chance.randint(1, 3)):
        place, length = chance.randrange(2, len(changed)), chance.randint(1, 40)
        piece = changed[place : place + length]
        kind = chance.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[place] = chance.randrange(256)
        elif kind == 2:
            changed[place] = chance.choice(
                b"(.012FIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x81\x82\x85\x86\x87\x88\x89\x8a\x93"
            )
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = piece
        else:
            target = chance.randrange(2, len(changed))
            changed[target:target] = piece
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # pickletools, of a mutated name
def test_mutated_pickles_run_nothing_and_raise_only_the_importers_error(
    small: PublishedFixture, tmp_path: Path
) -> None:
    entries, bad, chance = unzip(small.checkpoint), tmp_path / "bad.pt", random.Random(2)
    name = next(name for name in entries if name.endswith("data.pkl"))
    pickled, accepted = entries[name], 0
    for _ in range(600):
        rezip(bad, {**entries, name: mutate(pickled, chance)})
        with watched() as events:
            try:
                model = read_published(bad).model
            except PublishedFileError:
                pass
            else:
                accepted += 1
                assert all(value.isfinite().all() for value in model.state_dict().values())
        assert events == []
    assert accepted < 300  # a change of the optimizer's numbers or the settings is nobody's business


# Vocabulary and command


def test_another_models_vocabulary_is_refused(published: PublishedFixture, tmp_path: Path) -> None:
    vocab = write_vocab(tmp_path / "vocab.txt", CHARACTERS[:-1])
    with pytest.raises(PublishedFileError, match=r"请换成和它一起发布的 vocab\.txt"):
        import_published(published.checkpoint, vocab, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_vocabulary_is_refused(published: PublishedFixture, tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_bytes(published.vocab.read_bytes().replace("好\t8".encode(), "好 8".encode()))
    with pytest.raises(UserError, match=r"第 9 行"):
        import_published(published.checkpoint, vocab, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_module(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "studytiny.import_published", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_command_writes_a_model_folder(published: PublishedFixture, tmp_path: Path) -> None:
    result = run_module(published.checkpoint, published.vocab, tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert str(tmp_path / "out") in result.stdout
    model, _ = load_folder(tmp_path / "out", "cpu")
    assert same_weights(model, read_published(published.checkpoint).model)


def test_the_command_refuses_in_one_sentence(published: PublishedFixture, tmp_path: Path) -> None:
    path = save_as_original({**build_checkpoint(**SMALL), "optimizer": shell()}, tmp_path / "bad.pt")
    result = run_module(path, published.vocab, tmp_path / "out")
    assert not CANARY.exists()
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("错误：") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_commands_help_is_chinese(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["import_published", "--help"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0 and "不运行文件里的代码" in capsys.readouterr().out
