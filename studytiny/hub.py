"""Where a model comes from: a folder, the ModelScope cache, ModelScope, or the bundled model.

``StudyTinyModel`` is fetched with ModelScope's own client, read without running it (``import_published``) and kept as
a model folder beside the client's cache, so all this happens once. The client works in a process of its own: its
threads cannot be stopped from outside, and a program that is closed in the middle of a download would wait for them.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from filelock import FileLock, Timeout

from studytiny.checkpoint import Model, load_folder
from studytiny.errors import UserError
from studytiny.files import write_atomically
from studytiny.import_published import import_published
from studytiny.tokenizer import Tokenizer

BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "bundled"
MODEL_ID = "fenuolian/StudyTinyModel"
MODEL_PAGE = f"https://www.modelscope.cn/models/{MODEL_ID}"
STALL_SECONDS = 20.0  # without a byte or any other sign from the client; a download that moves may take its time

# The client reads these when it is imported. Its own defaults try for minutes; what the user has set wins.
CLIENT_SETTINGS = {
    "MODELSCOPE_API_CONNECT_TIMEOUT": "5",
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "6",
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
    # Below STALL_SECONDS, so that a connection that went dead is replaced before the whole download is given up.
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "8",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "3",
    "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "5",
}
SOURCE_FILE = "source.json"  # in the converted folder: which files it was made from

# The client's errors by class name; the first that fits speaks.
REASONS = {
    "FileIntegrityError": "下载到的文件与 ModelScope 登记的大小或校验和不符",
    "NotExistError": f"ModelScope 上找不到 {MODEL_ID} 或其中的文件",
    "AuthenticationError": "ModelScope 要求登录",
    "PermissionDeniedError": "ModelScope 拒绝了访问",
    "RateLimitError": "ModelScope 现在限制下载次数，请过一会儿再试",
    "ServerError": "ModelScope 的服务器出错了，请过一会儿再试",
    "RequestTimeoutError": "ModelScope 没有回应，请检查网络",
    "NetworkError": "连不上 ModelScope，请检查网络",
    "ImportError": "没有安装下载用的 modelscope-hub，请运行 pip install modelscope-hub",
    "JSONDecodeError": "ModelScope 的回应看不懂，网络可能需要先登录",
}
NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

Progress = Callable[[int, int], None]


class ModelUnavailable(UserError):
    """StudyTinyModel cannot be had; the message is one Chinese sentence: why, and how to bring it by hand.

    ``reason`` is its first half alone.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason.rstrip("。").replace("。", "；")
        super().__init__(
            f"无法取得 StudyTinyModel：{self.reason}；也可以用浏览器从 {MODEL_PAGE} 下载 "
            "model_epoch_2.pt 和 vocab.txt，运行 python -m studytiny.import_published model_epoch_2.pt vocab.txt 文件夹"
            "，然后使用那个文件夹。"
        )


class BundledModelUsed(UserWarning):
    """The bundled model stands in for StudyTinyModel; the message is one Chinese sentence that says why."""


class _ConnectionLost(ModelUnavailable):
    """The network failed; worth another attempt if bytes had come."""


def load_model(name_or_folder: str | Path = "bundled", device: str | torch.device = "auto") -> tuple[Model, Tokenizer]:
    """The model and tokenizer called ``bundled`` or ``StudyTinyModel``, or those of a model folder.

    StudyTinyModel is downloaded when it is not there yet. If that fails, the bundled model is returned and a
    ``BundledModelUsed`` warning says why.

    Raises:
        UserError: neither a name nor a model folder, or the folder is damaged.
    """
    name = str(name_or_folder)
    if name == "bundled":
        return load_folder(BUNDLED_FOLDER, device)
    if name in ("StudyTinyModel", MODEL_ID):
        try:
            return load_folder(fetch_published(), device)
        except UserError as error:
            warnings.warn(f"改用自带的小模型，因为{error}", BundledModelUsed, stacklevel=2)
            return load_folder(BUNDLED_FOLDER, device)
    if not Path(name_or_folder).is_dir():
        raise UserError(f"找不到模型 {name}；可以写 bundled、StudyTinyModel，或一个模型文件夹的路径。")
    return load_folder(name_or_folder, device)


def cached_published() -> Path | None:
    """StudyTinyModel's folder if it can be had without the network: converted already, or converted now from
    ModelScope's cache. None if it is not there, not complete, or damaged."""
    folder = _converted_folder()
    if _usable(folder):
        return folder
    try:
        return _convert(_cached_snapshot())
    except (UserError, OSError):
        return None


def fetch_published(progress: Progress | None = None) -> Path:
    """StudyTinyModel's folder, downloaded and converted unless it is there already.

    Args:
        progress: called with (bytes done, bytes in all; 0 if unknown), in the caller's thread. What it raises cancels
            the download, which resumes where it was the next time. Without it, a terminal shows a bar.

    Raises:
        ModelUnavailable: no network, no answer, wrong or missing files, no room; within seconds of the last sign of
            life, however long the download took until then.
    """
    folder = cached_published()
    if folder is not None:
        return folder
    try:
        with _lock("download", "另一个程序正在下载它，请等它下载完"):
            with contextlib.nullcontext(progress) if progress else _terminal_bar() as show:
                snapshot = _download(show)
            return _convert(snapshot)
    except OSError as error:
        raise ModelUnavailable(_describe_file_error(error.errno, error.strerror or str(error))) from error


# The cache and the converted folder


def _cache_root() -> Path:
    """ModelScope's cache, by its client's own rule; the client is told this folder, so that both always agree."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser().resolve()


def _converted_folder() -> Path:
    return _cache_root() / "studytiny" / "StudyTinyModel"


@contextlib.contextmanager
def _lock(name: str, busy: str, wait: float = 0) -> Iterator[None]:
    """Held by one process at a time; the system frees it when its holder dies."""
    path = _converted_folder().with_name(f".{name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise ModelUnavailable(busy) from error
    except NotImplementedError as error:
        raise ModelUnavailable(f"{path.parent} 所在的磁盘不支持文件锁") from error
    try:
        yield
    finally:
        lock.release()


def _cached_snapshot() -> Path:
    """The folder of the client's cache that holds the repository's files; it makes no request."""
    try:
        from modelscope_hub.compat import snapshot_download

        return Path(snapshot_download(MODEL_ID, cache_dir=str(_cache_root()), local_files_only=True))
    except Exception as error:  # of whatever class: the client is not ours, and its cache may be anyone's
        raise ModelUnavailable("ModelScope 的缓存里没有它") from error


def _choose_files(sizes: Mapping[str, int]) -> tuple[str, str]:
    """The checkpoint and the vocabulary among ``path -> bytes``: the highest epoch, else the largest."""

    def epoch(path: str) -> int:
        found = re.search(r"epoch\D?(\d+)", PurePosixPath(path).name, re.IGNORECASE)
        return int(found[1]) if found else -1

    def plain(path: str) -> bool:  # relative, nothing hidden, no way out of the folder, fit to be shown
        parts = path.split("/")
        return path.isprintable() and not re.search(r"[\\:]", path) and all(part and part[0] != "." for part in parts)

    names = [path for path in sizes if plain(path)]
    checkpoints = [path for path in names if path.lower().endswith(".pt")]
    vocabularies = [path for path in names if PurePosixPath(path).name == "vocab.txt"]
    if not checkpoints or not vocabularies:
        missing = "、".join(["以 .pt 结尾的模型文件"] * (not checkpoints) + ["vocab.txt"] * (not vocabularies))
        found = "、".join(sorted(names)[:8]) or "空的"
        raise ModelUnavailable(f"里面没有{missing}（现有：{found}）")
    checkpoint = max(checkpoints, key=lambda path: (epoch(path), sizes[path]))
    beside = str(PurePosixPath(checkpoint).with_name("vocab.txt"))
    return checkpoint, beside if beside in vocabularies else min(vocabularies, key=len)


def _sources(snapshot: Path) -> dict[str, Any]:
    """What a conversion of ``snapshot`` is made from; a file with another size or date makes it stale."""
    stats = {path.relative_to(snapshot).as_posix(): path.stat() for path in snapshot.rglob("*") if path.is_file()}
    chosen = _choose_files({path: stat.st_size for path, stat in stats.items()})
    return {
        "snapshot": str(snapshot),
        "files": [[path, stats[path].st_size, stats[path].st_mtime_ns] for path in chosen],
    }


def _usable(folder: Path, sources: Mapping[str, Any] | None = None) -> bool:
    """Whether the converted folder loads, and was made from ``sources`` (None: from what now lies where it did)."""
    try:
        made_from = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        snapshot = Path(made_from["snapshot"])
        load_folder(folder, "cpu")
    except (OSError, ValueError, KeyError, TypeError):
        return False
    try:
        return made_from == (sources or _sources(snapshot))
    except (OSError, ModelUnavailable):
        return True  # the download was deleted to save room; what was made from it is still good


def _convert(snapshot: Path) -> Path:
    """Makes the model folder from the downloaded files, unless that was done already.

    The folder appears under its name by renaming only, so one that is there is whole.
    """
    folder = _converted_folder()
    sources = _sources(snapshot)
    checkpoint, vocab = (snapshot / path for path, _, _ in sources["files"])
    with _lock("convert", "另一个程序正在转换它，请稍后再试", wait=120):
        if _usable(folder, sources):
            return folder
        for leftover in folder.parent.glob(".converting-*"):  # of a conversion that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
        try:
            import_published(checkpoint, vocab, work / "new")
            write_atomically(work / "new" / SOURCE_FILE, json.dumps(sources, ensure_ascii=False) + "\n")
            if folder.exists():
                _rename(folder, work / "old")
            _rename(work / "new", folder)
        except UserError as error:
            raise ModelUnavailable(str(error)) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _rename(folder: Path, target: Path) -> None:
    for _ in range(20):
        with contextlib.suppress(PermissionError):  # Windows, while a virus scanner still reads a new file
            folder.rename(target)
            return
        time.sleep(0.1)
    folder.rename(target)


# The download


def _download(progress: Progress) -> Path:
    """Downloads until the files are there; starts again after a lost connection as long as that brings new bytes.

    Returns:
        The folder of the client's cache that holds them.
    """
    best = 0

    def forward(done: int, total: int) -> None:
        nonlocal best
        best = max(best, done)  # a file fetched anew must not make the bar jump back
        progress(best, total)

    while True:
        before = best
        try:
            return _attempt(forward)
        except _ConnectionLost:
            if best == before:
                raise


def _attempt(progress: Progress) -> Path:
    """Runs the client once, in its own process, and talks to it in lines of JSON."""
    environment = {**CLIENT_SETTINGS, **os.environ}
    if not os.environ.get("MODELSCOPE_DOMAIN") and not os.environ.get("MODELSCOPE_ENDPOINT"):
        # Left to itself, the client first asks two sites whether they have the model, with many retries.
        environment["MODELSCOPE_ENDPOINT"] = "https://www.modelscope.cn"
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", f"{inspect.getsource(_client_process)}\n_client_process()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        raise ModelUnavailable(f"无法启动下载进程（{error.strerror}）") from error
    lines: queue.Queue[bytes] = queue.Queue()  # of what it says; b"" once it has nothing more to say

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(b"")

    with process:
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            return _converse(process.stdin, lines, progress)
        finally:
            process.kill()
            reader.join()


def _converse(requests: Any, lines: queue.Queue[bytes], progress: Progress) -> Path:
    """Tells the client process what to fetch and follows it to its end; silence counts as failure."""

    def ask(question: Any) -> None:
        with contextlib.suppress(OSError):  # it has died: its last line, or the lack of one, will say so
            requests.write(json.dumps(question).encode("ascii") + b"\n")

    ask([MODEL_ID, str(_cache_root())])
    done: dict[str, int] = {}
    total = 0
    while True:
        try:
            line = lines.get(timeout=STALL_SECONDS)
        except queue.Empty:
            raise ModelUnavailable(f"{STALL_SECONDS:g} 秒没有收到任何数据，请检查网络") from None
        if not line:
            raise ModelUnavailable("下载进程意外退出")
        message = json.loads(line)
        if "files" in message:
            chosen = _choose_files(message["files"])
            sizes = [message["files"][path] for path in chosen]
            total = sum(sizes) if all(sizes) else 0
            ask(chosen)
            progress(0, total)
        elif "done" in message:
            done[message["file"]] = message["done"]
            progress(sum(done.values()), total)
        elif "error" in message:
            raise _client_error(message)
        else:
            progress(total, total)  # a file that lay in the cache already was never reported
            return Path(message["folder"])


def _client_process() -> None:
    """The process that downloads: run from this text alone, so it has to import what it needs.

    In: a line with model and cache folder, then a line with the files to fetch. Out: lines that tell the repository's
    files, the bytes of each that are there, and at last the folder or the error.
    """
    import glob
    import json
    import os
    import sys
    import threading
    import time

    def say(**message):
        os.write(1, json.dumps(message).encode("ascii") + b"\n")  # one write a line: several threads report

    def leave_with_parent():
        os.read(0, 1)  # returns when the other end is gone, be it by kill -9
        os._exit(1)

    try:
        sys.stdout = sys.stderr  # fd 1 is for the reports
        model_id, cache_dir = json.loads(sys.stdin.readline())
        from modelscope_hub import HubApi, ProgressCallback
        from modelscope_hub.compat import snapshot_download

        class Report(ProgressCallback):
            def __init__(self, filename, file_size):
                super().__init__(filename, file_size)
                self.done, self.said = 0, 0.0

            def update(self, size):
                self.done += size
                if time.monotonic() > self.said + 0.1:
                    self.end()

            def end(self):
                self.said = time.monotonic()
                say(file=self.filename, done=self.done)

        listing = HubApi().list_repo_files(model_id, "model")
        say(files={file.path: file.size for file in listing if not file.is_dir})
        wanted = json.loads(sys.stdin.readline())
        threading.Thread(target=leave_with_parent, daemon=True).start()
        folder = snapshot_download(
            model_id,
            cache_dir=cache_dir,
            allow_patterns=[glob.escape(path) for path in wanted],
            progress_callbacks=[Report],
        )
        say(folder=str(folder))
    except BaseException as error:
        # The cause of a failed download stands behind several layers of the client's own errors.
        chain = [*getattr(error, "failed_files", {}).values()][:1] or [error]
        while chain[-1].__cause__:
            chain.append(chain[-1].__cause__)
        say(
            error=[cls.__name__ for link in chain for cls in type(link).__mro__],
            errnos=[link.errno for link in chain if isinstance(link, OSError) and link.errno],
            text=str(chain[0])[:300],
        )
    finally:
        os._exit(0)  # not by returning: that would wait for threads which may still be downloading


def _client_error(message: Mapping[str, Any]) -> ModelUnavailable:
    """The client process's last word as one of our sentences."""
    names, errnos = message["error"], message["errnos"]
    if NO_SPACE & set(errnos):
        return ModelUnavailable(_describe_file_error(errno.ENOSPC, ""))
    kind = _ConnectionLost if {"NetworkError", "ServerError"} & set(names) else ModelUnavailable
    for name, reason in REASONS.items():
        if name in names:
            return kind(reason)
    if "OSError" in names and errnos:
        return ModelUnavailable(_describe_file_error(errnos[0], os.strerror(errnos[0])))
    return ModelUnavailable(f"下载程序报告 {names[0]}：{' '.join(message['text'].split())}")


def _describe_file_error(number: int | None, text: str) -> str:
    if number in NO_SPACE:
        return f"缓存文件夹 {_cache_root()} 所在的磁盘满了"
    return f"缓存文件夹 {_cache_root()} 不能写入（{text}）"


@contextlib.contextmanager
def _terminal_bar() -> Iterator[Progress]:
    from tqdm import tqdm

    # disable=None: nothing is drawn where stderr is no terminal.
    with tqdm(desc="下载 StudyTinyModel", unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield show
