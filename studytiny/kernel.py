"""Int8Kernel: the forward pass of a DialogueModel in int8 on a CPU, by kernel.c, compiled at first use.

Optional: without a C compiler, or if anything goes wrong, ``build_kernel`` returns None, ``why_not`` says why, and
plain PyTorch does the work. ``STUDYTINY_KERNEL=0`` switches it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from studytiny.model import DialogueModel

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-w")
CPU_FLAGS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler knows
COMPILE_SECONDS = 60
PANEL, HEAD = 64, 16  # of kernel.c: to what sizes are padded
MOST_TOP = 256  # of kernel.c


class KernelUnavailable(Exception):
    """Why there is no kernel, in one Chinese sentence; the caller falls back to PyTorch."""


# ---- compiling ----


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "studytiny"


def _trusted_folder() -> Path | None:
    """The cache folder, if it can be used and only this user can write to it: what lies in it will be run."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return None
    return folder if stat.S_ISDIR(status.st_mode) and os.access(folder, os.W_OK) else None


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").strip()
    for command in [named] if named else ["cc", "gcc", "clang"]:
        words = shlex.split(command, posix=os.name == "posix")
        program = shutil.which(words[0]) if words else None
        if program:
            return [program, *words[1:]]
    raise KernelUnavailable("没有找到 C 编译器（cc、gcc 或 clang），用 PyTorch 计算。")


def _run(command: list[str]) -> bytes | None:
    """The output of a command, or None if it failed."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    done = subprocess.run(command, timeout=COMPILE_SECONDS, check=False, **quiet)
    return done.stdout if done.returncode == 0 else None


def _compile(extra: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of kernel.c, from the cache folder if it is there. ``extra``: more flags."""
    compiler = _compiler()
    for cpu in CPU_FLAGS:
        command = [*compiler, *FLAGS, *cpu, *extra]
        # Its predefined macros tell the compiler's version and every feature it believes this CPU to have.
        macros = _run([*command, "-dM", "-E", "-x", "c", "-"])
        if macros is not None:
            break
    else:
        raise KernelUnavailable("C 编译器不能用（CC），用 PyTorch 计算。")
    key = hashlib.sha256(b"\0".join([repr(command).encode(), macros, SOURCE.read_bytes()])).hexdigest()[:16]
    folder = _trusted_folder()
    if folder is not None:
        with contextlib.suppress(OSError):  # for instance a folder from which nothing may be run
            return _from_cache(command, folder, key)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        return _load(_build(command, Path(temporary)))


def _from_cache(command: list[str], folder: Path, key: str) -> ctypes.CDLL:
    # The name holds the hash of the content: a damaged file is found out before any of it runs.
    for path in folder.glob(f"kernel-{key}-*.so"):
        if path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest()):
            return _load(path)
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-", ignore_cleanup_errors=True) as temporary:
        built = _build(command, Path(temporary))
        path = folder / f"kernel-{key}-{hashlib.sha256(built.read_bytes()).hexdigest()}.so"
        os.replace(built, path)
    return _load(path)


def _build(command: list[str], folder: Path) -> Path:
    target = folder / "kernel.so"
    if _run([*command, "-o", str(target), str(SOURCE), "-lm"]) is None or not target.is_file():
        raise KernelUnavailable("编译 kernel.c 没有成功，用 PyTorch 计算。")
    return target


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    ints, pointer = ctypes.POINTER(ctypes.c_int), ctypes.c_void_p
    library.kernel_new.argtypes = [ints, ctypes.c_float, ctypes.POINTER(pointer)]
    library.kernel_new.restype = pointer
    library.kernel_free.argtypes = [pointer]
    library.kernel_free.restype = None
    library.kernel_step.argtypes = [pointer, ctypes.c_int, ints, ints, ints, ctypes.c_int, ints, pointer]
    library.kernel_top.argtypes = [pointer, ctypes.c_int, ctypes.c_int, ctypes.c_int, pointer, pointer]
    library.kernel_top.restype = None
    return library


def _check(library: ctypes.CDLL) -> None:
    """Holds a small model's logits against PyTorch's, so that a miscompiled kernel is never used."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = DialogueModel(70, d_model=48, n_head=2, n_layers=2, max_length=24)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that every part has its say in the logits
        ids = torch.arange(23) * 29 % 70
        expected = model(ids[None])[0]
    kernel = Int8Kernel(model, slots=2, threads=2, library=library)
    places, ids = list(range(23)), ids.tolist()
    got = torch.cat([kernel.step(ids[:22], [1] * 22, places[:22], places[:22]), kernel.step(ids[22:], [1], [22], [0])])
    kernel.close()
    if not (got - expected).norm() < 0.05 * expected.norm():  # int8 costs about 0.01
        raise KernelUnavailable("编译出的内核算得不对，用 PyTorch 计算。")


@functools.cache
def _attempt() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = _compile()
        _check(library)
        return library, None
    except KernelUnavailable as error:
        return None, str(error)
    except Exception as error:  # a convenience must not stop the program
        return None, f"C 内核不能用（{type(error).__name__}），用 PyTorch 计算。"


def build_kernel() -> ctypes.CDLL | None:
    """The compiled library, or None (``why_not`` says why). The first call may compile for a second or a few."""
    return None if os.environ.get("STUDYTINY_KERNEL") == "0" else _attempt()[0]


def why_not() -> str | None:
    """Why there is no kernel, in one Chinese sentence; None if there is one."""
    return "环境变量 STUDYTINY_KERNEL=0 关掉了 C 内核。" if os.environ.get("STUDYTINY_KERNEL") == "0" else _attempt()[1]


# ---- int8 ----

_NO_MEMORY = "内存不够放下 C 内核的权重和对话记忆，用 PyTorch 计算。"


def _pad(x: Tensor, *sizes: int) -> Tensor:
    """``x`` with zeros behind it in every dimension, up to ``sizes``."""
    padded = x.new_zeros(sizes)
    padded[tuple(slice(size) for size in x.shape)] = x
    return padded


def _up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _quantise(weight: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, inputs) float -> int8 in the order in which kernel.c reads it, scale and start of every output."""
    weight = _pad(weight, *(_up_to(n, PANEL) for n in weight.shape))
    scale = weight.abs().amax(1).clamp_min(1e-30) / 127
    whole = (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    start = whole.sum(1, dtype=torch.int32) * -128
    if packed:  # four inputs of one output, the next output, ...; then the next four inputs
        whole = whole.view(-1, PANEL, whole.shape[1] // 4, 4).transpose(1, 2)
    return whole.contiguous(), scale, start


class Int8Kernel:
    """Conversations ("slots") of one model, read and continued by kernel.c.

    Args:
        slots: conversations held at once; each has room for ``max_length`` tokens, which costs memory once used.
        threads: that work on a step, the caller's included.

    Raises:
        KernelUnavailable: the model is of another kind, there is no library, or not enough memory.
    """

    def __init__(self, model: DialogueModel, slots: int, threads: int, library: ctypes.CDLL | None = None) -> None:
        self._kernel = None
        if slots < 1 or threads < 1:
            raise ValueError(f"{slots} slots, {threads} threads")
        if not isinstance(model, DialogueModel):
            raise KernelUnavailable("C 内核只会算本项目自己的模型结构，用 PyTorch 计算。")
        library = library or build_kernel()
        if library is None:
            raise KernelUnavailable(why_not())
        self._library, self._lock, self._pid = library, threading.Lock(), os.getpid()
        self._buffers: list[ctypes.Array] = []
        c = model.config
        self.config, self.slots = c, slots
        sizes = (c.d_model, c.n_head, model.depth, c.d_ff, c.vocab_size, c.max_length, slots, threads)
        try:
            self._tensors = self._weights(model, library.kernel_packing() == 1)  # kept alive: C reads them in place
            pointers = (ctypes.c_void_p * len(self._tensors))(*(tensor.data_ptr() for tensor in self._tensors))
            self._kernel = library.kernel_new((ctypes.c_int * len(sizes))(*sizes), c.norm_eps, pointers)
        except RuntimeError as error:  # PyTorch's way to say that memory is short
            raise KernelUnavailable(_NO_MEMORY) from error
        if not self._kernel:
            raise KernelUnavailable(_NO_MEMORY)

    @staticmethod
    @torch.inference_mode()
    def _weights(model: DialogueModel, packed: bool) -> list[Tensor]:
        """Everything kernel_new of kernel.c reads, in its order."""
        c = model.config
        head, heads = c.d_model // c.n_head, c.n_head
        wide, inner = _up_to(head, HEAD), _up_to(c.d_ff, PANEL)

        def plain(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", torch.float32).contiguous()

        def by_head(weight: Tensor) -> Tensor:  # (D, inputs) -> (H * Kp, inputs)
            return _pad(weight.view(heads, head, -1), heads, wide, weight.shape[1]).flatten(0, 1)

        def interleaved(gate: Tensor, up: Tensor) -> Tensor:  # 32 rows of gate, the same 32 of up, ...
            halves = [_pad(weight, inner, c.d_model).view(-1, PANEL // 2, c.d_model) for weight in (gate, up)]
            return torch.stack(halves, 1).flatten(0, 2)

        embedding = plain(model.embed_tokens.weight)
        tensors = [embedding, plain(model.rotary_cosine), plain(model.rotary_sine)]
        tensors += _quantise(embedding * plain(model.norm.weight), packed)
        for block in itertools.islice(model.layers, model.depth):
            attention, mlp = block.self_attn, block.mlp
            gain = plain(block.input_layernorm.weight)
            qkv = [
                by_head(plain(part.weight) * gain) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            ]
            tensors += _quantise(torch.cat(qkv), packed)
            tensors += _quantise(by_head(plain(attention.o_proj.weight).T).T, packed)
            gain = plain(block.post_attention_layernorm.weight)
            gate, up = plain(mlp.gate_proj.weight) * gain, plain(mlp.up_proj.weight) * gain
            tensors += _quantise(interleaved(gate, up), packed)
            tensors += _quantise(plain(mlp.down_proj.weight), packed)
            tensors += [plain(attention.q_norm.weight), plain(attention.k_norm.weight)]
        return tensors

    def step(self, ids: list[int], slots: list[int], positions: list[int], wanted: list[int]) -> Tensor:
        """Reads tokens and returns the logits behind some of them.

        Row r is token ``ids[r]`` of conversation ``slots[r]`` at position ``positions[r]``; it sees the positions up to
        its own, which must have been read in this step or before. Its logits do not depend on the other rows, to the
        last bit. The rows of one conversation stand together, their positions rising by one.

        Args:
            wanted: the rows whose logits are needed, each once.

        Returns:
            (len(wanted), V) float32, the caller's to keep.

        Raises:
            ValueError: the rows do not fit together, or one is out of range.
            RuntimeError: the kernel is closed, or this is a fork of the process that made it.
        """
        rows = len(ids)
        self._check_rows(ids, slots, positions, wanted)
        logits = torch.empty(len(wanted), self.config.vocab_size, dtype=torch.float32, device="cpu")
        if self._pid != os.getpid():
            raise RuntimeError("a kernel's threads do not survive a fork: make a new kernel in the child process")
        with self._lock:
            if self._kernel is None:
                raise RuntimeError("the kernel is closed")
            if not rows:
                return logits
            if not self._buffers or rows > len(self._buffers[0]):
                self._buffers = [(ctypes.c_int * _up_to(rows, PANEL))() for _ in range(4)]
            for buffer, values in zip(self._buffers, (ids, slots, positions, wanted), strict=True):
                buffer[: len(values)] = values
            a, b, c, d = self._buffers
            if self._library.kernel_step(self._kernel, rows, a, b, c, len(wanted), d, logits.data_ptr()):
                raise MemoryError(f"a step of {rows} rows")
        return logits

    def _check_rows(self, ids: list[int], slots: list[int], positions: list[int], wanted: list[int]) -> None:
        rows = len(ids)
        if not rows == len(slots) == len(positions):
            raise ValueError(f"{rows} ids, {len(slots)} slots and {len(positions)} positions")
        limits = (
            (ids, self.config.vocab_size),
            (slots, self.slots),
            (positions, self.config.max_length),
            (wanted, rows),
        )
        for values, limit in limits:
            if values and not 0 <= min(values) <= max(values) < limit:
                raise ValueError(f"{min(values)} to {max(values)} is not within 0 to {limit - 1}")
        if len(wanted) > 1 and len(set(wanted)) < len(wanted):
            raise ValueError("a wanted row is named twice")
        starts = rows
        for i in range(1, rows):
            if slots[i] == slots[i - 1]:
                starts -= 1
                if positions[i] != positions[i - 1] + 1:
                    raise ValueError(f"row {i} does not follow the row before it")
        if starts != len(set(slots)):
            raise ValueError("the rows of a slot do not stand together")

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of each row of ``logits`` (R, V) float32 in falling order, and their places; each (R, k).

        NaN is passed over: a row without k numbers is filled up with -inf.
        """
        rows, vocab = logits.shape
        if k > MOST_TOP or k > vocab:
            return logits.topk(k)
        logits = logits.contiguous()
        values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
        self._library.kernel_top(logits.data_ptr(), rows, vocab, k, values.data_ptr(), ids.data_ptr())
        return values, ids

    def close(self) -> None:
        """Ends the threads and frees the memory."""
        if self._kernel is None:
            return
        if self._pid != os.getpid():  # a fork has no threads to end, and waiting for them would take for ever
            self._kernel = None
            return
        with self._lock:
            kernel, self._kernel = self._kernel, None
        self._library.kernel_free(kernel)  # of None: nothing

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or the interpreter is ending
            self.close()
