"""Reads the published checkpoint, which is a pickled Python program, without running it; writes a model folder.

``model_epoch_2.pt`` is a zip: one entry with the raw numbers of each tensor, and ``data.pkl``, a small program that
says which functions to import and call to build the objects again. The usual way of loading runs that program,
whatever it says. Here it is only read::

    zip -> pickle opcodes -> plain data and inert records -> compared with our own PublishedModel -> tensors

Nothing is imported, looked up or called on the file's behalf; whatever the original would not have written is refused.

    python -m studytiny.import_published model_epoch_2.pt vocab.txt OUT
"""

from __future__ import annotations

import math
import os
import pickletools  # takes pickles apart; it is the module ``pickle`` that runs them
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from studytiny.checkpoint import save_checkpoint
from studytiny.command import CommandParser, run_command
from studytiny.errors import UserError
from studytiny.published import PublishedBlock, PublishedConfig, PublishedModel
from studytiny.tokenizer import Tokenizer

# ``python -m`` finds this module loaded already, by the package's __init__, and would warn of it, to no use.
warnings.filterwarnings("ignore", "'studytiny.import_published' found in sys.modules", RuntimeWarning)

# The real file: 30 kB of pickle, a list of 215 entries in 15 kB. A file that claims much more only wants to be slow.
MAX_PICKLE_BYTES = MAX_DIRECTORY_BYTES = 128 * 1024

# The names in the published file. Here a name does nothing; another one means a file of another kind.
DICT, SET = "__builtin__ dict", "__builtin__ set"
ORDERED_DICT, DEFAULT_DICT = "collections OrderedDict", "collections defaultdict"
GETATTR, ONE_CYCLE = "__builtin__ getattr", "torch.optim.lr_scheduler OneCycleLR"
FLOAT_STORAGE = "torch FloatStorage"
REBUILD_TENSOR, REBUILD_PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
ORIGINAL_CLASSES = {
    PublishedModel: "My DialogueModel",
    PublishedBlock: "My TransformerBlock",
    nn.Module: "My PositionalEncoding",  # nothing but a table, which is a buffer of our model
}
KNOWN_NAMES = {
    *(DICT, SET, ORDERED_DICT, DEFAULT_DICT, GETATTR, ONE_CYCLE, FLOAT_STORAGE, REBUILD_TENSOR, REBUILD_PARAMETER),
    *ORIGINAL_CLASSES.values(),
    "torch.nn.modules.activation MultiheadAttention",
    "torch.nn.modules.activation ReLU",
    "torch.nn.modules.container ModuleList",
    "torch.nn.modules.container Sequential",
    "torch.nn.modules.linear Linear",
    "torch.nn.modules.linear NonDynamicallyQuantizableLinear",
    "torch.nn.modules.normalization LayerNorm",
    "torch.nn.modules.sparse Embedding",
    "torch.optim.adamw AdamW",
}
# Attributes that matter in training only, or save memory: free to differ from ours.
WITHOUT_EFFECT = {"training", "dropout", "padding_idx", "scale_grad_by_freq", "sparse", "inplace"}


class PublishedFileError(UserError):
    """The file is damaged, hostile or simply not the published checkpoint; the message says what was found."""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What a published ``.pt`` file holds that is of use: the model, the epoch it was saved at, its settings."""

    model: PublishedModel
    epoch: int
    config: dict[str, Any]


def read_published(path: str | Path) -> PublishedCheckpoint:
    """Reads a published ``.pt`` file without running any of it; optimizer and scheduler are left out.

    Raises:
        PublishedFileError: one sentence that says what in the file is not as published.
        OSError: the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            archive = Archive(file)
            content = interpret(archive.read("data.pkl", MAX_PICKLE_BYTES))
            _require(type(content) is dict, "里面没有 epoch、model、config 三项")
            epoch, config = content.get("epoch"), content.get("config")
            _require(type(epoch) is int and 0 <= epoch < 10**6 and type(config) is dict, "epoch 或 config 不像原来的")
            return PublishedCheckpoint(_read_model(content.get("model"), archive), epoch, _plain_settings(config))
        except UserError as error:
            reason = str(error).rstrip("。")
            raise PublishedFileError(
                f"{path} 不能导入：{reason}；请确认它是 ModelScope 上 fenuolian/StudyTinyModel 的 .pt 文件，并重新下载"
                "（文件里的代码一行也没有运行）。"
            ) from error


def import_published(checkpoint: str | Path, vocab: str | Path, out_folder: str | Path) -> Path:
    """Writes the published checkpoint and its vocabulary as a model folder; returns the folder.

    Raises:
        UserError: the checkpoint (PublishedFileError) or the vocabulary is not as published; nothing is written then.
        OSError: a file cannot be read, or the folder cannot be written.
    """
    tokenizer = Tokenizer.load_vocab(vocab)
    published = read_published(checkpoint)
    entries, expected = tokenizer.vocab_size, published.model.config.vocab_size
    if entries != expected:
        raise PublishedFileError(
            f"{vocab} 有 {entries} 项，{checkpoint} 里的模型却有 {expected} 项；请换成和它一起发布的 vocab.txt。"
        )
    return save_checkpoint(out_folder, published.model, tokenizer, {**published.config, "epoch": published.epoch})


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise PublishedFileError(complaint)


# 1. The zip

# What zipfile raises on damaged files: to us all the same.
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError)


class Archive:
    """The zip as torch.save writes it: nothing compressed, everything in one folder, a checksum for each entry."""

    def __init__(self, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        _check_directory(file, size)
        try:
            self.zip = zipfile.ZipFile(file)
        except ZIP_ERRORS as error:
            raise PublishedFileError("zip 的目录已损坏") from error
        entries = self.zip.infolist()
        self.folder = entries[0].filename.partition("/")[0] if entries else ""
        self.entries = {entry.filename: entry for entry in entries}
        _require(len(self.entries) == len(entries), "zip 里有重名的条目")
        _require(all(name.startswith(f"{self.folder}/") for name in self.entries), "zip 里不止一个文件夹")
        for entry in entries:
            _require(entry.compress_type == zipfile.ZIP_STORED, "zip 里有压缩过的条目")
            _require(entry.compress_size == entry.file_size, "zip 里有大小不一致的条目")
            # The two flags torch sets: names are UTF-8, sizes stand behind the data. Others mean encryption and such.
            _require(not entry.flag_bits & ~0x0808, "zip 里有加密或特殊的条目")
        _require(sum(entry.file_size for entry in entries) <= size, "zip 里的条目加起来比文件本身还大")
        if f"{self.folder}/byteorder" in self.entries:  # early torch 2 did not write it
            _require(self.read("byteorder", 16) == b"little", "它的字节序不是 little")

    def read(self, name: str, max_bytes: int) -> bytes:
        """An entry of at most ``max_bytes``; reading it to its end makes zipfile compare the checksum."""
        entry = self.entries.get(f"{self.folder}/{name}")
        _require(entry is not None and entry.file_size <= max_bytes, f"zip 里没有 {name}，或者它大得不正常")
        try:
            return self.zip.read(entry)
        except ZIP_ERRORS as error:
            raise PublishedFileError(f"zip 里的 {name} 已损坏（校验和不符）") from error


def _check_directory(file: BinaryIO, size: int) -> None:
    """zipfile loads the list of entries at once, and believes its announced length; so that is bounded first.

    It is announced by the last 22 bytes and, as torch writes it, before them by a record of 56 bytes with 64-bit
    numbers and 20 bytes that say where this record is.
    """
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    _require(tail[76:80] == b"PK\x05\x06" and tail[96:] == b"\0\0", "它不是 torch.save 写的 zip，或没有下载完整")
    (length,) = struct.unpack_from("<I", tail, 88)
    if tail[56:60] == b"PK\x06\x07":
        (place,) = struct.unpack_from("<Q", tail, 64)
        _require(tail[:4] == b"PK\x06\x06" and place == size - 98, "zip 的目录已损坏")
        length = max(length, *struct.unpack_from("<Q", tail, 40))
    _require(length <= MAX_DIRECTORY_BYTES, "zip 的目录大得不正常")


# 2. The pickle


@dataclass(frozen=True)
class Symbol:
    """A name the pickle asks to import. Here it stays a name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The numbers behind a tensor: entry ``data/KEY`` of the zip, ``numel`` float32."""

    key: str
    numel: int


@dataclass(eq=False)  # compared and hashed by identity: the optimizer has parameters as keys
class Record:
    """What the pickle asks to build: ``symbol(*args)``, then the attributes. Here it is never built."""

    symbol: Symbol
    args: tuple[Any, ...]
    state: Any = None


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
# How many items of the stack an opcode gathers; None: all since the last MARK.
GATHERS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None, "APPEND": 1, "APPENDS": None}
GATHERS |= {"SETITEM": 2, "SETITEMS": None}


def interpret(pickled: bytes) -> Any:
    """Follows a pickle of protocol 2 as far as it is data; a call is only written down, as a Record.

    With a stack instead of recursion, so that deep nesting is no danger.
    """
    try:
        return _follow(pickled)
    except PublishedFileError:
        raise
    except (IndexError, KeyError, ValueError) as error:  # a pop too many, a memo never set, an argument cut off
        raise PublishedFileError("其中的 pickle 已损坏") from error


def _follow(pickled: bytes) -> Any:
    _require(pickled[:2] == b"\x80\x02", "其中的 pickle 不是第 2 版")
    stack: list[Any] = []
    below: list[list[Any]] = []  # MARK puts the stack aside; what follows gathers on a new one
    memo: dict[int, Any] = {}
    for opcode, argument, position in pickletools.genops(pickled):
        match opcode.name:
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(CONSTANTS[opcode.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append(EMPTY[opcode.name]())
            case "BININT" | "BININT1" | "BININT2" | "BINFLOAT":
                stack.append(argument)
            case "LONG1" if abs(argument) < 2**63:
                stack.append(argument)
            case "BINUNICODE":
                argument.encode("utf-8")  # ValueError: half a surrogate pair, which no file could take
                stack.append(argument)
            case "MARK":
                below.append(stack)
                stack = []
            case name if name in GATHERS:
                if GATHERS[name] is None:
                    items, stack = stack, below.pop()
                else:
                    items = [stack.pop() for _ in range(GATHERS[name])][::-1]
                if name.startswith("TUPLE"):
                    stack.append(tuple(items))
                elif name.startswith("APPEND"):
                    _require(type(stack[-1]) is list, "其中的 pickle 往不是列表的东西里添加内容")
                    stack[-1].extend(items)
                else:
                    # A tuple as a key can be nested so deep that hashing it overflows the C stack.
                    _require(all(type(key) in (str, int, Record) for key in items[::2]), "其中的字典有不该有的键")
                    _require(type(stack[-1]) is dict, "其中的 pickle 往不是字典的东西里添加内容")
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                known = argument in KNOWN_NAMES
                _require(known, f"它要调用 {_show(argument.replace(' ', '.'))}，原来的文件里没有这个名字")
                stack.append(Symbol(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_describe_call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                _require(type(stack[-1]) is Record and stack[-1].state is None, "其中有东西的属性设置了两次")
                stack[-1].state = state
            case "PROTO" if position == 0:
                pass
            case "STOP":
                _require(len(stack) == 1 and not below and position == len(pickled) - 1, "其中的 pickle 没有正常结束")
            case _:
                raise PublishedFileError(f"其中的 pickle 用了原来没有的指令 {opcode.name}")
    return stack[0]


def _describe_call(symbol: Any, arguments: Any) -> Any:
    """Containers become the plain data they are; everything else stays a note of what was asked for."""
    _require(type(symbol) is Symbol and type(arguments) is tuple, "其中的 pickle 要调用的不是一个函数名")
    if symbol.name in (ORDERED_DICT, DEFAULT_DICT) and arguments in ((), (Symbol(DICT),)):
        return {}
    if symbol.name == SET and arguments == ([],):
        return set()
    if symbol.name == GETATTR:  # torch before 2.4 notes a scheduler's curve as a function; never anything else
        curves = [(Symbol(ONE_CYCLE), "_annealing_cos"), (Symbol(ONE_CYCLE), "_annealing_linear")]
        _require(arguments in curves, "它要用 getattr 取出原来的文件里没有的函数")
    return Record(symbol, arguments)


def _storage(reference: Any) -> Storage:
    """From what torch writes: ("storage", type, key, device, number of elements). The device does not matter here."""
    match reference:
        case ("storage", Symbol(name), str(key), str(), int(numel)) if name == FLOAT_STORAGE and len(key) < 10:
            return Storage(key, numel)
    raise PublishedFileError("其中有不是 float32 的张量数据")


# 3. The model


@dataclass(frozen=True)
class StoredTensor:
    """Which numbers of a storage make up a tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _read_model(record: Any, archive: Archive) -> PublishedModel:
    """Compares the file's modules with ours one by one, and only then reads the weights."""
    head, layers = _attributes(record, "lm_head"), _attributes(record, "encoder_layers")["_modules"]
    config = PublishedConfig(
        vocab_size=head.get("out_features"),
        d_model=head.get("in_features"),
        n_head=_attributes(record, "encoder_layers", "0", "attn").get("num_heads"),
        n_layers=len(layers),
        max_length=_stored_tensor(_attributes(record, "pos_embed").get("encoding"), "pos_embed.encoding").shape[0],
    )
    with torch.device("meta"):  # shapes without memory: nothing is allocated before the file is found right
        model, twin = PublishedModel.from_config(config), PublishedModel.from_config(config)
    # The twin keeps the position table where the original does; its modules are then exactly the original's.
    twin.pos_embed = nn.Module()
    twin.pos_embed.encoding = twin.position_encoding
    del twin.position_encoding, twin.config

    stored: dict[str, StoredTensor] = {}
    _compare(record, twin, "", stored)
    stored["position_encoding"] = stored.pop("pos_embed.encoding")
    # One storage behind many weights would make much out of a small file.
    _require(len({tensor.storage.key for tensor in stored.values()}) == len(stored), "其中有几个权重共用同一份数据")
    weights = {name: _read_tensor(name, tensor, archive) for name, tensor in stored.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _attributes(record: Any, *names: str) -> dict[str, Any]:
    """What the file says of a module, or of the module below it that ``names`` lead to."""
    for name in names:
        record = _attributes(record)["_modules"].get(name)
    good = type(record) is Record and record.args == () and type(record.state) is dict
    tables = [record.state, record.state.get("_parameters"), record.state.get("_modules")] if good else [None]
    plain = all(type(table) is dict and all(type(key) is str for key in table) for table in tables)
    _require(plain, f"其中的 {'.'.join(('model', *names))} 不是原来的模型部件")
    return record.state


def _compare(record: Any, ours: nn.Module, path: str, stored: dict[str, StoredTensor]) -> None:
    """Refuses whatever could make the file's module compute something else than ``ours``; notes its tensors.

    That is class, children, shapes and every attribute: hooks, eps, batch_first, add_zero_attn and so on.
    """
    state, original = _attributes(record), ORIGINAL_CLASSES.get(type(ours))
    expected_class = original or f"{type(ours).__module__} {type(ours).__qualname__}"
    _require(record.symbol.name == expected_class, f"其中的 {path or 'model'} 是 {record.symbol.name}，不是原来的类型")
    for theirs, mine in ((state, vars(ours)), (state["_parameters"], ours._parameters)):
        for name in sorted((theirs.keys() | mine.keys()) - {"_parameters", "_modules"} - WITHOUT_EFFECT):
            found, expected, place = theirs.get(name), mine.get(name), f"{path}.{name}".lstrip(".")
            if isinstance(expected, Tensor):
                stored[place] = _stored_tensor(found, place)
                shape, wanted = stored[place].shape, tuple(expected.shape)
                _require(shape == wanted, f"其中 {place} 的形状是 {shape}，应是 {wanted}")
            elif not (original and type(found) in (bool, int, float, str)):  # those are the original's own notes
                # Versions of torch differ in which hooks, all empty, a module has.
                same = found == expected or (name.startswith("_") and not found and not expected)
                _require(same, f"其中的 {_show(place)} 与原来的不同，会算出别的结果")
    # Layers run in the order of their dictionary; children that have names are called by name.
    order = list if isinstance(ours, nn.ModuleList | nn.Sequential) else set
    _require(order(state["_modules"]) == order(ours._modules), f"其中的 {path or 'model'} 的部件与原来的不同")
    for name, child in ours._modules.items():
        _compare(state["_modules"][name], child, f"{path}.{name}".lstrip("."), stored)


def _stored_tensor(value: Any, name: str) -> StoredTensor:
    """Takes the note of ``_rebuild_parameter(_rebuild_tensor_v2(storage, offset, shape, stride, ...))`` for data."""
    match value:
        case Record(Symbol("torch._utils _rebuild_parameter"), (inner, bool(), dict(hooks)), None) if not hooks:
            value = inner
    match value:
        case Record(
            Symbol("torch._utils _rebuild_tensor_v2"),
            (Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict(hooks)),
            None,
        ) if not hooks and 1 <= len(shape) == len(stride) <= 2 and all(type(n) is int for n in shape + stride):
            reach = 0  # how far the last number lies behind the first
            for step, size in sorted(zip(stride, shape, strict=True)):
                _require(step > reach and size > 0, f"其中 {name} 的同一个数用了多次")  # much out of a small file
                reach += (size - 1) * step
            if offset >= 0 and offset + reach < storage.numel:
                return StoredTensor(storage, offset, shape, stride)
    raise PublishedFileError(f"其中的 {name} 不是完整的 float32 张量")


def _read_tensor(name: str, stored: StoredTensor, archive: Archive) -> Tensor:
    size = 4 * stored.storage.numel
    numbers = bytearray(archive.read(f"data/{_show(stored.storage.key)}", size))
    _require(len(numbers) == size, f"其中 {name} 的数据长度不对")
    tensor = torch.frombuffer(numbers, dtype=torch.float32).as_strided(stored.shape, stored.stride, stored.offset)
    _require(all(math.isfinite(extreme) for extreme in tensor.aminmax()), f"其中 {name} 有 NaN 或无穷大")
    return tensor.clone(memory_format=torch.contiguous_format)


def _plain_settings(config: dict[Any, Any]) -> dict[str, Any]:
    """The original's settings as far as config.json can hold them: numbers, short texts, True, False, None."""
    return {
        key: value
        for key, value in list(config.items())[:100]
        if type(key) is str
        and type(value) in (str, int, float, bool, type(None))
        and len(f"{key}{value}") < 1000
        and not (type(value) is float and not math.isfinite(value))
    }


def _show(text: str) -> str:
    """Text of an untrusted file for a message: short, and without control characters that could fool a terminal."""
    return ascii(text[:80])[1:-1]


def main() -> None:
    parser = CommandParser(
        "python -m studytiny.import_published",
        "把 ModelScope 上发布的 StudyTinyModel 安全地转换成模型文件夹：只读数据，不运行文件里的代码。",
    )
    parser.add_argument("checkpoint", help="下载的检查点，例如 model_epoch_2.pt")
    parser.add_argument("vocab", help="和它一起发布的 vocab.txt")
    parser.add_argument("out", metavar="OUT", help="要写入的模型文件夹，没有就新建")
    arguments = parser.parse_args()
    folder = import_published(arguments.checkpoint, arguments.vocab, arguments.out)
    print(f"已导入到 {folder}；现在可以聊天：python -m studytiny.chat --model {folder}")


if __name__ == "__main__":
    run_command(main)
