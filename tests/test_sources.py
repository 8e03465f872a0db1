"""Corpora by name: fetched once, checked, resumed, and with a way out when the network has none."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import socket
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

from studytiny.errors import UserError
from train import convert, sources
from train.sources import KNOWN_PAIR, SOURCES, Source, load_corpus

RAW = Path(__file__).resolve().parents[2] / "shared" / "data" / "raw"

# Written for these tests; the shapes are those of the sources, the words are not.
QNA = """> Source: example
## ? 今天下雨吗
- 外面在下雨吗\x20
- 要不要带伞

**Filters:**
- editorial = chitchat

```markdown
我看不到窗外，
带上伞总没错。
```

> Source: example
## ? 我撑不下去了
- 我想自杀
- 好累

**Filters:**
- editorial = chitchat

```markdown
请马上找人陪着您。
```

> Source: example
## ? 你爱喝茶吗

**Filters:**
- editorial = chitchat

```markdown
闻起来一定很香。
```
"""
QNA_DIALOGUES = [
    ["今天下雨吗", "我看不到窗外， 带上伞总没错。"],
    ["外面在下雨吗", "我看不到窗外， 带上伞总没错。"],
    ["要不要带伞", "我看不到窗外， 带上伞总没错。"],
    ["你爱喝茶吗", "闻起来一定很香。"],
]
XPERSONA = json.dumps(
    [{"persona": ["我养鱼。"], "dialogue": [["早！", "早\n呀。"], ["养了几条？", "三条。"]]}], ensure_ascii=False
)
XPERSONA_DIALOGUES = [["早！", "早 呀。", "养了几条？", "三条。"]]
KDCONV = json.dumps(
    [
        {
            "name": "雨巷",
            "messages": [{"message": "听过雨巷吗？"}, {"attrs": [{"attrname": "类别"}], "message": "听过，是诗。"}],
        }
    ],
    ensure_ascii=False,
)
CONV = f"E\n{KNOWN_PAIR}\nE\nM 今天星期几\nM 星期三\n"


class Web:
    """Files on 127.0.0.1, and the faults of a network.

    Attributes:
        files: path -> content.
        status: instead of the answer, for every request.
        cut_after: closes the connection after that many bytes, once.
        silent_after: sends no more than that many bytes of an answer, and keeps the connection open.
        ignores_range: always answers with the whole file.
        on_request: called before a request is answered.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.status = 200
        self.cut_after: int | None = None
        self.silent_after: int | None = None
        self.ignores_range = False
        self.on_request = lambda: None
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"web": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        web, asked = self.web, self.headers.get("Range")
        web.on_request()
        web.requests.append((self.path, asked))
        data = web.files.get(self.path)
        if data is None or web.status != 200:
            self.send_error(404 if web.status == 200 else web.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not web.ignores_range else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if web.cut_after is not None:
            data, web.cut_after = data[: start + web.cut_after], None
        if web.silent_after is not None:
            data = data[: start + web.silent_after]
        self.wfile.write(data[start:])
        if web.silent_after is not None:
            self.wfile.flush()
            web.closing.wait(20)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STUDYTINY_CACHE", str(tmp_path / "cache"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def web(cache):
    web = Web()
    yield web
    web.close()


@pytest.fixture
def corpus(monkeypatch):
    """Registers a corpus of a few lines under a real one's name."""

    def register(name: str, content: str | bytes, *urls: str, **changes) -> Source:
        data = content.encode() if isinstance(content, str) else content
        changes = {"sha256": hashlib.sha256(data).hexdigest(), **changes}
        source = dataclasses.replace(SOURCES[name], urls=urls, **changes)
        monkeypatch.setitem(SOURCES, name, source)
        return source

    return register


def zipped(**entries: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def leftovers(folder: Path) -> list[str]:
    """What is in the cache, without the locks."""
    return sorted(path.name for path in folder.glob("*") if path.suffix != ".lock")


def closed_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/a.json"


# The table


def test_every_source_says_what_it_is_and_under_which_licence_and_how_it_is_checked():
    for name, source in SOURCES.items():
        assert name == source.name and source.what and source.licence and source.file
        assert bool(source.urls) != bool(source.package)
        assert all(url.startswith("https://") for url in source.urls)
        assert re.fullmatch("[0-9a-f]{64}", source.sha256) or (name == "xiaohuangji" and source.dialogues[0] == 400_000)
    assert len({source.file for source in SOURCES.values()}) == len(SOURCES)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="找不到语料 黄小鸡") as error:
        load_corpus("黄小鸡")
    assert all(name in str(error.value) for name in ["demo", *SOURCES])


# The formats


def test_qna_gives_every_way_to_ask_with_the_answer_and_leaves_the_crisis_intent_out_whole():
    assert convert.qna_dialogues(QNA) == QNA_DIALOGUES


def test_qna_with_windows_line_ends_reads_the_same():
    assert convert.qna_dialogues(QNA.replace("\n", "\r\n")) == QNA_DIALOGUES


def test_xpersona_and_kdconv_become_turns_of_one_line_each():
    assert convert.xpersona_dialogues(XPERSONA) == XPERSONA_DIALOGUES
    assert convert.kdconv_dialogues(KDCONV) == [["听过雨巷吗？", "听过，是诗。"]]


def test_unpack_reads_the_one_entry_asked_for():
    archive = zipped(**{"a/readme.txt": "无关", "a/x.conv": CONV, "__MACOSX/a/._x.conv": "无关"})
    assert convert.unpack(archive, "*.conv").decode() == CONV


@pytest.mark.parametrize("name", ["../x.conv", "/x.conv", "a/../../x.conv", "..\\x.conv", "C:\\x.conv"])
def test_unpack_refuses_an_archive_with_a_way_out_of_the_folder(name):
    with pytest.raises(UserError, match="不安全的文件名"):
        convert.unpack(zipped(**{"good.conv": CONV, name: CONV}), "*.conv")


def test_unpack_refuses_an_entry_that_is_too_large(monkeypatch):
    archive = zipped(**{"x.conv": "你好" * 10_000})
    monkeypatch.setattr(convert, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="太大"):
        convert.unpack(archive, "*.conv")


def test_unpack_refuses_what_is_no_whole_zip_with_one_such_entry():
    archive = zipped(**{"x.conv": CONV})
    for damaged in (archive[:-30], b"PK nothing", archive[:40]):
        with pytest.raises(UserError, match="压缩包不完整"):
            convert.unpack(damaged, "*.conv")
    for wrong in (zipped(**{"x.txt": CONV}), zipped(**{"x.conv": CONV, "y.conv": CONV})):
        with pytest.raises(UserError, match="应有一个"):
            convert.unpack(wrong, "*.conv")


# The download


def test_first_start_downloads_and_second_needs_no_network(web, cache, corpus):
    web.files["/a.json"] = XPERSONA.encode()
    corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES
    web.status = 500
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES
    assert len(web.requests) == 1
    assert leftovers(cache) == ["xpersona-zh-valid.json"]


def test_licence_is_shown_before_the_first_request_and_not_on_stdout(web, cache, corpus, monkeypatch, capsys):
    web.files["/a.json"] = XPERSONA.encode()
    corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    shown, at_request = io.StringIO(), []
    web.on_request = lambda: at_request.append(shown.getvalue())
    monkeypatch.setattr(sys, "stderr", shown)
    load_corpus("xpersona")
    assert "许可：MIT" in at_request[0]
    assert capsys.readouterr().out == ""
    assert "没有许可声明" in SOURCES["xiaohuangji"].licence and "没有许可声明" in SOURCES["xiaohuangji-50k"].licence


def test_a_cut_connection_is_resumed_where_it_was(web, cache, corpus):
    data = XPERSONA + " " * 200_000
    web.files["/a.json"], web.cut_after = data.encode(), 100_000
    corpus("xpersona", data, f"{web.url}/a.json")
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES
    (_, first), (_, second) = web.requests
    assert first is None and 0 < int(re.fullmatch(r"bytes=(\d+)-", second)[1]) <= 100_000
    assert leftovers(cache) == ["xpersona-zh-valid.json"]


def test_a_download_that_was_given_up_is_resumed_by_the_next_start(web, cache, corpus, monkeypatch):
    monkeypatch.setattr(sources, "STALL_SECONDS", 0.2)
    data = XPERSONA + " " * 200_000
    web.files["/a.json"], web.silent_after = data.encode(), 0
    source = corpus("xpersona", data, f"{web.url}/a.json")
    cache.mkdir()
    (cache / f"{source.file}.0.part").write_bytes(data.encode()[:50_000])
    with pytest.raises(UserError, match="没有回应"):
        load_corpus("xpersona")
    web.silent_after = None
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES
    assert [asked for _, asked in web.requests] == ["bytes=50000-"] * 2


def test_a_server_that_cannot_resume_sends_it_all_again(web, cache, corpus):
    web.files["/a.json"], web.ignores_range = XPERSONA.encode(), True
    source = corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    cache.mkdir()
    (cache / f"{source.file}.0.part").write_bytes(b"something else")
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES


def test_a_part_that_is_whole_already_only_gets_its_name(web, cache, corpus):
    web.files["/a.json"] = XPERSONA.encode()
    source = corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    cache.mkdir()
    (cache / f"{source.file}.0.part").write_bytes(XPERSONA.encode())
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES
    assert leftovers(cache) == [source.file]


def test_a_connection_that_brings_nothing_new_is_not_tried_for_ever(web, cache, corpus, monkeypatch):
    monkeypatch.setattr(sources, "STALL_SECONDS", 0.2)
    data = XPERSONA + " " * 200_000
    web.files["/a.json"], web.silent_after, web.ignores_range = data.encode(), 50_000, True
    corpus("xpersona", data, f"{web.url}/a.json")
    with pytest.raises(UserError, match="没有回应"):
        load_corpus("xpersona")
    assert len(web.requests) == 2


def test_a_part_longer_than_the_file_is_begun_again(web, cache, corpus):
    web.files["/a.json"] = XPERSONA.encode()
    source = corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    cache.mkdir()
    (cache / f"{source.file}.0.part").write_bytes(b"?" * 5_000)
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES
    assert [asked for _, asked in web.requests] == ["bytes=5000-", None]


def test_another_content_is_refused_and_leaves_nothing_behind(web, cache, corpus):
    web.files["/a.json"] = b"<html>login</html>"
    corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    with pytest.raises(UserError, match="文件不对，sha256 应是"):
        load_corpus("xpersona")
    assert leftovers(cache) == []


def test_a_silent_server_is_given_up(web, cache, corpus, monkeypatch):
    monkeypatch.setattr(sources, "STALL_SECONDS", 0.2)
    web.files["/a.json"], web.silent_after = XPERSONA.encode(), 0
    corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    with pytest.raises(UserError, match="没有回应"):
        load_corpus("xpersona")


def test_what_one_place_lacks_comes_from_the_next(web, cache, corpus):
    web.files["/b.json"] = XPERSONA.encode()
    corpus("xpersona", XPERSONA, closed_url(), f"{web.url}/a.json", f"{web.url}/b.json")
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES


@pytest.mark.parametrize("status", [404, 500])
def test_out_of_reach_is_one_sentence_with_the_reason_and_the_way_by_hand(web, cache, corpus, status):
    web.status = status
    source = corpus("xpersona", XPERSONA, f"{web.url}/a.json", closed_url())
    with pytest.raises(UserError) as error:
        load_corpus("xpersona")
    sentence = str(error.value)
    assert f"服务器回答 {status}" in sentence and "连不上" in sentence
    assert source.urls[0] in sentence and str(cache / source.file) in sentence and "--corpus" in sentence
    assert sentence.endswith("。") and sentence.count("。") == 1
    assert leftovers(cache) == []


def test_a_download_too_large_to_be_a_corpus_is_stopped(web, cache, corpus, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 50_000)
    web.files["/a.json"] = b" " * 200_000
    corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    with pytest.raises(UserError, match="文件太大"):
        load_corpus("xpersona")
    assert len(web.requests) == 1
    assert sum(path.stat().st_size for path in cache.iterdir()) == 0


def test_two_programs_do_not_write_the_same_download(web, cache, corpus):
    source = corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    cache.mkdir()
    with (
        FileLock(cache / f".{source.file}.lock"),
        pytest.raises(UserError, match="另一个程序正在下载"),
    ):
        load_corpus("xpersona")


def test_a_cache_that_cannot_be_written_is_named(web, cache, corpus):
    cache.write_text("a file, not a folder", encoding="utf-8")
    corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    with pytest.raises(UserError, match="STUDYTINY_CACHE") as error:
        load_corpus("xpersona")
    assert str(cache) in str(error.value)


# Files brought by hand


@pytest.mark.parametrize("name", ["xpersona-zh-valid.json", "Zh_persona (1).json"])
def test_the_right_file_in_the_cache_folder_replaces_the_download(cache, corpus, name):
    source = corpus("xpersona", XPERSONA, closed_url())
    cache.mkdir()
    (cache / name).write_text(XPERSONA, encoding="utf-8")
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES
    assert (cache / source.file).is_file()


def test_a_damaged_file_in_the_cache_folder_is_downloaded_again_or_named(web, cache, corpus):
    source = corpus("xpersona", XPERSONA, f"{web.url}/a.json")
    cache.mkdir()
    (cache / source.file).write_text(XPERSONA[:-3], encoding="utf-8")
    with pytest.raises(UserError, match="那里现有的文件不对"):
        load_corpus("xpersona")
    web.files["/a.json"] = XPERSONA.encode()
    assert load_corpus("xpersona").dialogues == XPERSONA_DIALOGUES


@pytest.mark.parametrize(
    ("name", "text", "dialogues"),
    [("ms-chitchat-caring", QNA, QNA_DIALOGUES), ("xpersona", XPERSONA, XPERSONA_DIALOGUES)],
)
def test_a_known_raw_file_given_by_path_is_converted(tmp_path, cache, corpus, name, text, dialogues):
    corpus(name, text, closed_url())
    path = tmp_path / f"download{Path(SOURCES[name].file).suffix}"
    path.write_bytes(text.encode())
    assert load_corpus(str(path)).dialogues == dialogues


def test_an_unknown_raw_file_given_by_path_is_not_guessed_at(tmp_path, cache):
    path = tmp_path / "download.json"
    path.write_text(XPERSONA, encoding="utf-8")
    with pytest.raises(UserError, match="不认识"):
        load_corpus(str(path))


def test_a_conv_file_of_any_name_is_read_as_before(tmp_path, cache):
    for name in ("a.conv", "a.txt"):
        (tmp_path / name).write_text(CONV, encoding="utf-8")
        assert len(load_corpus(str(tmp_path / name)).usable()) == 2


# The full Xiaohuangji: a zip whose sha256 nobody here knows


def test_the_zip_is_unpacked_and_its_counts_are_checked(web, cache, corpus):
    web.files["/x.conv.zip"] = zipped(**{"xhj/x.conv": CONV})
    corpus("xiaohuangji", CONV, f"{web.url}/x.conv.zip", sha256="", dialogues=(2, 3))
    assert load_corpus("xiaohuangji").dialogues[1] == ["今天星期几", "星期三"]
    assert leftovers(cache) == ["xiaohuangji.conv"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(**{"x.conv": f"E\n{KNOWN_PAIR}\n"}), "应有 2 到 3 段对话，实际是 1 段"),
        (zipped(**{"x.conv": "E\nM 甲\nM 乙\n" * 2}), "没有小黄鸡应有的句子"),
        (zipped(**{"../x.conv": CONV}), "不安全的文件名"),
        (zipped(**{"x.conv": CONV})[:-9], "压缩包不完整"),
        (b"<html>", "应有 2 到 3 段对话，实际是 0 段"),
    ],
)
def test_another_zip_is_refused_and_leaves_nothing_behind(web, cache, corpus, content, reason):
    web.files["/x.conv.zip"] = content
    corpus("xiaohuangji", CONV, f"{web.url}/x.conv.zip", sha256="", dialogues=(2, 3))
    with pytest.raises(UserError, match=reason) as error:
        load_corpus("xiaohuangji")
    assert str(cache / "x.conv.zip") in str(error.value)
    assert leftovers(cache) == []


def test_the_zip_by_hand_is_accepted_in_the_cache_folder_and_by_path(tmp_path, cache, corpus):
    corpus("xiaohuangji", CONV, closed_url(), sha256="", dialogues=(2, 3))
    (tmp_path / "x.zip").write_bytes(zipped(**{"x.conv": CONV}))
    assert len(load_corpus(str(tmp_path / "x.zip"))) == 2
    (cache / "xiaohuangji.conv").unlink()
    (tmp_path / "x.zip").rename(cache / "x.zip")
    assert len(load_corpus("xiaohuangji")) == 2


# Xiaohuangji's ninth: out of a wheel, by pip


@pytest.fixture
def index(web, monkeypatch):
    """A package index with one project, whose files are added by the test."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", f"{web.url}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")

    def add(file: str, content: bytes) -> None:
        web.files["/simple/qiznlp/"] = f'<!DOCTYPE html><a href="/{file}">{file}</a>'.encode()
        web.files[f"/{file}"] = content

    return add


def wheel(text: str) -> bytes:
    information = "qiznlp-0.1.4.dist-info"
    return zipped(
        **{
            "qiznlp/data/XHJ_5w.txt": text,
            f"{information}/METADATA": "Metadata-Version: 2.1\nName: qiznlp\nVersion: 0.1.4\n",
            f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{information}/RECORD": "",
        }
    )


def test_pip_brings_the_wheel_and_only_its_text_is_kept(index, web, cache, corpus):
    index("qiznlp-0.1.4-py3-none-any.whl", wheel(CONV))
    corpus("xiaohuangji-50k", CONV)
    assert len(load_corpus("xiaohuangji-50k")) == 2
    asked = len(web.requests)
    assert len(load_corpus("xiaohuangji-50k")) == 2
    assert len(web.requests) == asked
    assert leftovers(cache) == ["xiaohuangji-50k.conv"]


def test_a_wheel_with_another_text_is_refused(index, cache, corpus):
    index("qiznlp-0.1.4-py3-none-any.whl", wheel(CONV))
    corpus("xiaohuangji-50k", "another text")
    with pytest.raises(UserError, match="文件不对，sha256 应是"):
        load_corpus("xiaohuangji-50k")
    assert leftovers(cache) == []


def test_a_source_archive_is_never_run(index, tmp_path, cache, corpus):
    marker = tmp_path / "was-run"
    index(
        "qiznlp-0.1.4.zip",
        zipped(**{"qiznlp-0.1.4/setup.py": f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"}),
    )
    corpus("xiaohuangji-50k", CONV)
    with pytest.raises(UserError, match="pip 没有下载到它") as error:
        load_corpus("xiaohuangji-50k")
    assert not marker.exists()
    assert "pip download qiznlp==0.1.4" in str(error.value) and str(cache) in str(error.value)


def test_a_python_without_pip_is_told_so(cache, corpus, monkeypatch):
    corpus("xiaohuangji-50k", CONV)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="没有 pip"):
        load_corpus("xiaohuangji-50k")


def test_the_wheel_by_hand_is_accepted_in_the_cache_folder(cache, corpus):
    corpus("xiaohuangji-50k", CONV)
    cache.mkdir()
    (cache / "QizNLP-0.1.4-py3-none-any.whl").write_bytes(wheel(CONV))
    assert len(load_corpus("xiaohuangji-50k")) == 2


# The real files, where they lie beside the checkout


@pytest.mark.skipif(not RAW.is_dir(), reason="the raw files are not part of the project")
@pytest.mark.parametrize(
    ("name", "dialogues"),
    [
        ("xiaohuangji-50k", 49_946),
        ("ms-chitchat-caring", 18_224),
        ("ms-chitchat-professional", 18_224),
        ("xpersona", 222),
        ("kdconv-film", 150),
        ("kdconv-music", 150),
        ("kdconv-travel", 150),
    ],
)
def test_the_real_files_have_their_sha256_and_their_dialogues(cache, name, dialogues):
    content = (RAW / SOURCES[name].file).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SOURCES[name].sha256
    corpus = load_corpus(str(RAW / SOURCES[name].file))
    assert len(corpus) == dialogues
    texts = [text for turns in corpus.dialogues for text in turns]
    assert all(text == text.strip() and "\n" not in text for text in texts)
    if name.startswith("ms-"):
        questions = re.findall(r"^(?:## \?|- (?!editorial))", content.decode(), re.MULTILINE)
        assert len(questions) - dialogues == 298  # the phrasings of the one intent that is left out
        assert not any(word in text for text in texts for word in ("自杀", "自残", "400-161", "跳楼"))
