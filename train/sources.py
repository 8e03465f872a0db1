"""The corpora that training and evaluation know by name: where they come from, their licence, how they are fetched.

Nothing of them is part of this project: a file is downloaded when its name is first used, checked, and kept in
``~/.cache/studytiny/corpora`` (or the folder in STUDYTINY_CACHE). The right file brought by hand is as good.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

from studytiny.errors import UserError
from studytiny.files import write_atomically
from train import demo
from train.convert import MAX_BYTES, kdconv_dialogues, qna_dialogues, unpack, xpersona_dialogues
from train.corpus import ConvDataset

DEMO = "demo"
OWN = {DEMO: 40_000, "demo-large": 160_000}  # corpora written by this project: how many dialogues are composed

CONNECT_SECONDS = 5.0  # for each of a host's addresses
STALL_SECONDS = 15.0  # without a byte; a download that moves may take its time
PIP_SECONDS = 300.0  # for all that pip does

_NO_LICENCE = "没有许可声明；用不用由您自己决定，语料和用它训练的模型都请勿再分发"


@dataclass(frozen=True)
class Source:
    """A corpus that can be fetched.

    Attributes:
        what, licence: for the user, Chinese.
        file: its name in the cache, unpacked.
        urls: tried one after the other.
        package: ``name==version`` on PyPI, instead of ``urls``; its wheel is downloaded, never installed.
        member: which entry of the downloaded zip or wheel it is (a pattern); empty if the download is no archive.
        sha256: of the unpacked file; while unknown, ``dialogues`` and the line KNOWN_PAIR are checked.
        dialogues: how few and how many a genuine file has.
        convert: its text as dialogues; None for ``.conv``.
    """

    name: str
    what: str
    licence: str
    file: str
    urls: tuple[str, ...] = ()
    package: str = ""
    member: str = ""
    sha256: str = ""
    dialogues: tuple[int, int] = (1, 10**9)
    convert: Callable[[str], list[list[str]]] | None = None


def _github(repository: str, commit: str, path: str) -> tuple[str, str]:
    """A file of one commit, from GitHub and from a public mirror of it."""
    return (
        f"https://raw.githubusercontent.com/{repository}/{commit}/{path}",
        f"https://cdn.jsdelivr.net/gh/{repository}@{commit}/{path}",
    )


def _chitchat(persona: str, chinese: str, folder: str, sha256: str) -> Source:
    return Source(
        name=f"ms-chitchat-{persona}",
        what=f"微软的闲聊问答，{chinese}：90 种意图的约 18,000 种问法，每种意图一个回答",
        licence="MIT",
        file=f"ms-chitchat-{persona}.zh.qna",
        urls=_github(
            "microsoft/botframework-solutions", "08ad18f1", f"{folder}/Deployment/Resources/QnA/zh-cn/Chitchat.qna"
        ),
        sha256=sha256,
        convert=qna_dialogues,
    )


def _kdconv(topic: str, chinese: str, sha256: str) -> Source:
    return Source(
        name=f"kdconv-{topic}",
        what=f"KdConv（清华）：150 段关于{chinese}的多轮对话",
        licence="Apache-2.0",
        file=f"kdconv-{topic}-dev.json",
        urls=_github("thu-coai/KdConv", "653db764", f"data/{topic}/dev.json"),
        sha256=sha256,
        convert=kdconv_dialogues,
    )


_ALL = (
    Source(
        name="xiaohuangji",
        what="小黄鸡：约 45 万段一问一答",
        licence=_NO_LICENCE,
        file="xiaohuangji.conv",
        urls=(
            "https://raw.githubusercontent.com/aceimnorstuvwxz/dgk_lost_conv/master/results/xiaohuangji50w_nofenci.conv.zip",
            "https://raw.githubusercontent.com/candlewill/Dialog_Corpus/master/xiaohuangji50w_nofenci.conv.zip",
            "https://raw.githubusercontent.com/candlewill/Dialog_Corpus/master/results/xiaohuangji50w_nofenci.conv.zip",
        ),
        member="*.conv",
        dialogues=(400_000, 500_000),
    ),
    Source(
        name="xiaohuangji-50k",
        what="小黄鸡的九分之一：49,946 段一问一答",
        licence=_NO_LICENCE,
        file="xiaohuangji-50k.conv",
        package="qiznlp==0.1.4",
        member="qiznlp/data/XHJ_5w.txt",
        sha256="f7959f7942bf745bf5c453bbb0c2a21af70e84de7ff44679300be06088709842",
    ),
    _chitchat(
        "caring",
        "体贴的语气",
        "samples/csharp/assistants/hospitality-assistant/VirtualAssistantSample",
        "e9595dec56118a32762e941e8a47aa0503caef7ebf273ea92006a0e781190f6c",
    ),
    _chitchat(
        "professional",
        "正式的语气",
        "templates/csharp/VA/VA",
        "18190a97bd2faf133dc26aa08a13e186b7d1e575eff096aa8f71ab8cb9e8fd96",
    ),
    Source(
        name="xpersona",
        what="XPersona 中文部分：222 段人工校对过的日常对话，每段约 16 句",
        licence="MIT",
        file="xpersona-zh-valid.json",
        urls=_github("HLTCHKUST/Xpersona", "1da049a1", "dataset/Zh_persona_split_valid_human_annotated.json"),
        sha256="cfa90117d73fe294a1b776b2d1c7b53711bfcd724f5833204726c910dad5482d",
        convert=xpersona_dialogues,
    ),
    _kdconv("film", "电影", "2f156d8d34bdd3eac31c196772156d36e017f8cb2255a2c312bd98e367ed363e"),
    _kdconv("music", "音乐", "ee34a4af167195db43fdcc910f8d125956222517f0572d248a069057493d557f"),
    _kdconv("travel", "旅游", "8d1f31295888cf61eff398bab8aa042f7fccd04a088bd63c939f0b79625a9093"),
)
SOURCES = {source.name: source for source in _ALL}
NAMES = (*OWN, *SOURCES)
KNOWN_PAIR = "M 呵呵\nM 是王若猫的。"  # in every genuine Xiaohuangji


def load_corpus(name: str) -> ConvDataset:
    """The corpus called ``name``: one of OWN, one of SOURCES (fetched the first time), or the path of a file, which is
    ``.conv``, or the raw file or archive of one of SOURCES.

    Raises:
        UserError: it is none of these, cannot be had, is damaged, or holds nothing to learn.
    """
    if name in OWN:
        return ConvDataset.from_dialogues(demo.generate(OWN[name], misheard=True), name)
    if name in SOURCES:
        return _read(SOURCES[name], fetch(SOURCES[name]))
    path = Path(name)
    if not path.exists():
        names = "、".join(NAMES)
        raise UserError(f"找不到语料 {name}：它不是文件，也不是语料的名字（{names}）；请检查 --corpus 后面的写法。")
    if path.suffix.lower() == ".conv" or not path.is_file():
        return ConvDataset(name).process_file()
    content = _content(path)
    for source in SOURCES.values():
        if (data := _genuine_or_none(source, content)) is not None:
            return _read(source, path if data is content else _keep(source, data))
    if path.suffix.lower() in (".qna", ".json", ".zip", ".whl"):
        raise UserError(
            f"不认识 {path}：它与已知语料的原始文件都不相同（可能不完整，或是另一个版本）；"
            "请给出 .conv 文件，或直接写语料的名字。"
        )
    return ConvDataset(name).process_file()


def licence_of(name: str) -> str:
    """The licence of what ``load_corpus(name)`` reads, for the run's report."""
    if name in OWN:
        return "Apache-2.0"
    return SOURCES[name].licence if name in SOURCES else "未知（自己的文件）"


def cache_folder() -> Path:
    """Where corpora are kept."""
    return Path(os.environ.get("STUDYTINY_CACHE") or Path.home() / ".cache" / "studytiny" / "corpora").expanduser()


def fetch(source: Source) -> Path:
    """The corpus's own file in the cache, downloaded unless the right one lies there, under whatever name.

    Raises:
        UserError: it cannot be had; says why and how to bring it by hand.
    """
    try:
        if (path := _in_cache(source)) is not None:
            return path
        print(f"语料 {source.name}：{source.what}。许可：{source.licence}。", file=sys.stderr, flush=True)
        cache_folder().mkdir(parents=True, exist_ok=True)
        with FileLock(cache_folder() / f".{source.file}.lock").acquire(timeout=0):
            data = _from_pip(source) if source.package else _from_urls(source)
            path = _keep(source, data)
    except Timeout as error:
        raise UserError(f"另一个程序正在下载语料 {source.name}；请等它下载完再试。") from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"缓存文件夹 {cache_folder()} 不能用（{reason}）；请腾出空间，或用环境变量 STUDYTINY_CACHE 换一个文件夹。"
        ) from error
    for part in _parts(source):
        part.unlink(missing_ok=True)
    return path


# A file, and whether it is the right one


def _read(source: Source, path: Path) -> ConvDataset:
    if source.convert is None:
        return ConvDataset(path).process_file()
    return ConvDataset.from_dialogues(source.convert(path.read_text(encoding="utf-8-sig")), source.name)


def _check(source: Source, data: bytes) -> None:
    """Raises a UserError, a reason without its full sentence, unless ``data`` is the corpus."""
    if source.sha256:
        found = hashlib.sha256(data).hexdigest()
        if found != source.sha256:
            raise UserError(f"文件不对，sha256 应是 {source.sha256[:16]}…，实际是 {found[:16]}…")
        return
    count = len(re.findall(rb"^E[ \t\r]*$", data, re.MULTILINE))
    fewest, most = source.dialogues
    if not fewest <= count <= most:
        raise UserError(f"文件不对，应有 {fewest:,} 到 {most:,} 段对话，实际是 {count:,} 段")
    if KNOWN_PAIR.encode() not in data.replace(b"\r\n", b"\n"):
        raise UserError("文件不对，里面没有小黄鸡应有的句子")


def _genuine(source: Source, content: bytes) -> bytes:
    """The corpus's own bytes, ``content`` itself or unpacked from it; checked.

    Raises:
        UserError: it is not the corpus; a reason without its full sentence.
    """
    if source.member and content.startswith(b"PK"):
        content = unpack(content, source.member)
    _check(source, content)
    return content


def _genuine_or_none(source: Source, content: bytes) -> bytes | None:
    try:
        return _genuine(source, content)
    except UserError:
        return None


def _content(path: Path) -> bytes:
    """What is in a file; nothing where there is no file, or none that could be a corpus."""
    return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_BYTES else b""


def _keep(source: Source, data: bytes) -> Path:
    path = cache_folder() / source.file
    write_atomically(path, data)
    return path


def _in_cache(source: Source) -> Path | None:
    """The file under its own name; or any other file of the folder that is the right one, then kept under that name."""
    path = cache_folder() / source.file
    if _genuine_or_none(source, _content(path)) is not None:
        return path
    for other in sorted(cache_folder().glob("[!.]*")):
        if other.suffix != ".part" and (data := _genuine_or_none(source, _content(other))) is not None:
            return _keep(source, data)
    return None


def _unavailable(source: Source, reason: str) -> UserError:
    """Why a corpus cannot be had, and how to bring it by hand, in one sentence."""
    if source.package:
        # Works on any machine with a pip mirror that has the package, not only on this one.
        command = f"pip download {source.package} --no-deps --only-binary=:all:"
        by_hand = f"在能用 pip 的电脑上运行 {command}，把得到的 .whl 文件放进 {cache_folder()}"
    else:
        page = source.urls[0]
        target = cache_folder() / (Path(urlsplit(page).path).name if source.member else source.file)
        by_hand = f"用浏览器下载 {page}，存为 {target}" + ("（那里现有的文件不对）" if target.is_file() else "")
    return UserError(
        f"无法取得语料 {source.name}：{reason}；也可以{by_hand}，然后再试，或者用 --corpus 给出下载的文件。"
    )


# The download


class _Lost(UserError):
    """The connection failed; worth another attempt if bytes had come."""


class _CannotResume(UserError):
    """The server has another file than the one that was begun; worth another attempt from its start."""


def _parts(source: Source) -> list[Path]:
    """Half a download from each of the urls, never mixed: nobody promises that their bytes are the same."""
    return [cache_folder() / f"{source.file}.{number}.part" for number in range(len(source.urls))]


def _from_urls(source: Source) -> bytes:
    """The checked corpus from the first of the urls that has it."""
    reasons = []
    for url, part in zip(source.urls, _parts(source), strict=True):
        try:
            _download(url, part, source.name)
            try:
                return _genuine(source, _content(part))
            except UserError:
                part.unlink()  # whole, and wrong: resuming would not mend it
                raise
        except UserError as error:
            reasons.append(f"{urlsplit(url).netloc}：{error}")
    raise _unavailable(source, "；".join(dict.fromkeys(reasons)))


def _download(url: str, part: Path, name: str) -> None:
    """Continues ``part`` until it is whole; tries again after a lost connection as long as that brings new bytes."""
    best, fresh = _size(part), False
    # disable=None: nothing is drawn where stderr is no terminal.
    with tqdm(desc=f"下载 {name}", unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        while True:
            try:
                return _attempt(url, part, bar)
            except _CannotResume:
                if fresh:
                    raise
                part.unlink()
                best, fresh = 0, True
            except _Lost:
                if _size(part) <= best:
                    raise
                best = _size(part)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _attempt(url: str, part: Path, bar: tqdm) -> None:
    import requests  # on first need: reading a corpus that is there already should not wait for it

    start = _size(part)
    headers = {"Accept-Encoding": "identity"}  # a compressed answer has other sizes and cannot be resumed
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, STALL_SECONDS)) as response:
            where = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code == 416 and where and int(where[2]) == start:
                return  # it was whole already
            if response.status_code == 416 or (response.status_code == 206 and not (where and where[1] == str(start))):
                raise _CannotResume("服务器不能续传")
            if response.status_code not in (200, 206):
                raise UserError(f"服务器回答 {response.status_code}")
            if response.status_code == 200:
                start = 0
            length = response.headers.get("Content-Length", "")
            total = start + int(length) if length.isdigit() else None
            bar.total = total
            bar.update(start - bar.n)
            with part.open("ab" if start else "wb") as file:
                for chunk in response.iter_content(16384):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > MAX_BYTES:
                        file.truncate(0)
                        raise UserError("文件太大")
                if total is not None and file.tell() < total:
                    raise _Lost("连接中断了")
    except requests.exceptions.SSLError as error:
        raise UserError("证书不可信，网络可能需要先登录") from error
    except requests.exceptions.ProxyError as error:
        raise UserError("代理连不上") from error
    except requests.RequestException as error:
        silent = isinstance(error, requests.Timeout) or "timed out" in str(error)
        broken = isinstance(error, requests.exceptions.ChunkedEncodingError)
        reason = "没有回应" if silent else "连接中断了" if broken else "连不上，请检查网络"
        raise _Lost(reason) from error


def _from_pip(source: Source) -> bytes:
    """The checked corpus out of a wheel that the user's own pip downloads, from the index it is set up for."""
    if importlib.util.find_spec("pip") is None:
        raise _unavailable(source, "这个 Python 环境里没有 pip")
    with tempfile.TemporaryDirectory(prefix="studytiny-") as folder:
        # Wheels only: to read a source archive's metadata, pip would run its setup.py.
        command = [sys.executable, "-m", "pip", "download", source.package, "--no-deps", "--only-binary=:all:"]
        options = ["--dest", folder, "--timeout", f"{STALL_SECONDS:g}", "--retries", "1", "--progress-bar", "off"]
        with (
            # One pipe: evaluate --json owns stdout.
            subprocess.Popen(
                [*command, *options, "--no-input", "--disable-pip-version-check"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            ) as process,
            tqdm(desc=f"pip 下载 {source.package}", bar_format="{desc}，已用 {elapsed}", disable=None) as bar,
        ):
            try:
                output = _wait(process, bar)
            finally:
                process.kill()
        wheels = list(Path(folder).glob("*.whl"))
        if output is None or process.returncode or len(wheels) != 1:
            errors = re.findall(r"^ERROR: (.+)$", output or "", re.MULTILINE)
            said = f"：{errors[-1].strip()[:200]}" if errors else ""
            reason = f"pip 在 {PIP_SECONDS:g} 秒内没有下载完" if output is None else f"pip 没有下载到它{said}"
            raise _unavailable(source, f"{reason}；请检查网络或 pip 的镜像设置")
        try:
            return _genuine(source, _content(wheels[0]))
        except UserError as error:
            raise _unavailable(source, str(error)) from error


def _wait(process: subprocess.Popen, bar: tqdm) -> str | None:
    """What the process said; None if it did not end in PIP_SECONDS."""
    deadline = time.monotonic() + PIP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.5)[0]
        bar.refresh()
    return None
