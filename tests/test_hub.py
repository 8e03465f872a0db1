"""Where StudyTinyModel comes from: the real ModelScope client against a ModelScope on this machine that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from studytiny import hub
from studytiny.checkpoint import load_folder, save_checkpoint
from studytiny.errors import UserError
from studytiny.hub import BundledModelUsed, ModelUnavailable, cached_published, fetch_published, load_model
from studytiny.model import DialogueModel
from studytiny.tokenizer import Tokenizer
from tests.loopback_hub import LoopbackHub
from tests.published_factory import write_published

PT = "model_epoch_2.pt"
FETCH = "from studytiny.hub import fetch_published; fetch_published()"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository with one published checkpoint of about 1 MB."""
    fixture = write_published(tmp_path_factory.mktemp("published"), d_model=96)
    return {
        PT: fixture.checkpoint.read_bytes(),
        "vocab.txt": fixture.vocab.read_bytes(),
        "README.md": "说明".encode(),
        "original/huge.bin": bytes(1 << 20),
    }


@pytest.fixture
def server(published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The hub, with this process and all it starts led there; limits short enough for a test."""
    with LoopbackHub(published) as loopback:
        for name in [name for name in os.environ if name.startswith("MODELSCOPE_")]:
            monkeypatch.delenv(name)
        for name, value in loopback.settings(tmp_path).items():
            monkeypatch.setenv(name, value)
        for name in ("REPO_TREE_PAGE_TIMEOUT_SECONDS", "REPO_TREE_PAGE_MAX_ATTEMPTS", "DOWNLOAD_TIMEOUT"):
            monkeypatch.setenv(f"MODELSCOPE_{name}", "1")
        monkeypatch.setattr(hub, "STALL_SECONDS", 4.0)
        yield loopback


def refusal() -> str:
    """The one sentence with which ``fetch_published`` fails, checked for what every such sentence promises."""
    with pytest.raises(ModelUnavailable) as caught:
        fetch_published()
    text = str(caught.value)
    assert text.count("。") == 1 and text.endswith("。") and "\n" not in text
    for part in (hub.MODEL_PAGE, PT, "vocab.txt", "python -m studytiny.import_published"):
        assert part in text
    return text


def cache_of(server: LoopbackHub, home: Path) -> Path:
    return home / "cache" / "models" / server.model_id.replace("/", "--") / "snapshots" / "master"


def same_weights(folder: Path, published: dict[str, bytes], tmp_path: Path) -> bool:
    """Whether ``folder`` holds what the importer makes of the published bytes."""
    for name in (PT, "vocab.txt"):
        (tmp_path / name).write_bytes(published[name])
    expected, _ = load_folder(hub.import_published(tmp_path / PT, tmp_path / "vocab.txt", tmp_path / "expected"), "cpu")
    model, _ = load_folder(folder, "cpu")
    return all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


# Getting it


def test_first_download_gives_the_published_weights_and_fetches_nothing_else(server, published, tmp_path):
    assert cached_published() is None and not server.requests
    folder = fetch_published()
    assert same_weights(folder, published, tmp_path)
    assert {request.file for request in server.requests} <= {None, PT, "vocab.txt"}


def test_second_start_needs_no_network(server):
    folder = fetch_published()
    server.stop()
    server.requests.clear()
    assert cached_published() == fetch_published() == folder
    assert load_model("StudyTinyModel", "cpu")[0].architecture == "published"
    assert not server.requests


def test_a_cache_that_modelscope_filled_is_enough(server, published, tmp_path):
    cache = cache_of(server, tmp_path)
    cache.mkdir(parents=True)
    (cache / PT).write_bytes(published[PT])
    assert cached_published() is None  # the vocabulary is missing
    (cache / "vocab.txt").write_bytes(published["vocab.txt"])
    assert same_weights(cached_published(), published, tmp_path)
    assert not server.requests


def test_progress_never_falls_and_ends_at_the_total(server, published):
    server.bytes_per_second = 2_000_000
    server.cut_after = 300_000
    seen = []
    fetch_published(lambda done, total: seen.append((done, total)))
    total = len(published[PT]) + len(published["vocab.txt"])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {total}
    assert seen[0][0] == 0 and seen[-1][0] == total and len(seen) > 3


def test_what_the_callback_raises_cancels_and_the_next_call_resumes(server, published, tmp_path):
    server.bytes_per_second = 1_000_000

    def cancel(done: int, total: int) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_published(cancel)
    server.bytes_per_second = None
    assert same_weights(fetch_published(), published, tmp_path)
    assert server.ranges(PT)[0] is None and server.ranges(PT)[-1].startswith("bytes=")


def test_the_highest_epoch_is_taken_and_no_other_downloaded(server, published, tmp_path):
    server.files["model_epoch_10.pt"] = server.files.pop(PT)
    server.files["model_epoch_9.pt"] = server.files["pytorch_model.pt"] = bytes(3 << 20)
    assert same_weights(fetch_published(), published, tmp_path)
    assert {request.file for request in server.requests} == {None, "model_epoch_10.pt", "vocab.txt"}


def test_without_an_epoch_in_the_name_the_largest_is_taken():
    assert hub._choose_files({"a.pt": 1, "b.pt": 5, "c.pt": 3, "vocab.txt": 1}) == ("b.pt", "vocab.txt")


def test_names_that_lead_out_of_the_folder_are_never_asked_for():
    evil = dict.fromkeys(("../x.pt", "/x.pt", "a/../../x.pt", "C:/x.pt", "..\\x.pt", ".hidden/x.pt", "vocab.txt"), 1)
    with pytest.raises(ModelUnavailable, match=r"没有以 \.pt 结尾的模型文件"):
        hub._choose_files(evil)


def test_a_proxy_from_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://modelscope.invalid")
    monkeypatch.setenv("HTTP_PROXY", server.endpoint)
    monkeypatch.setenv("http_proxy", server.endpoint)
    fetch_published()
    assert server.ranges(PT) == [None]


# Interruptions


def test_a_cut_connection_resumes_where_it_was(server, published, tmp_path):
    server.cut_after = 400_000
    assert same_weights(fetch_published(), published, tmp_path)
    assert server.ranges(PT) == [None, "bytes=400000-"]


def test_many_cuts_are_survived_as_long_as_bytes_come(server, published, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")  # the client gives up at once; this file does not
    server.cut_after = 150_000
    cuts = []

    def cut_again(done: int, total: int) -> None:
        if server.cut_after is None and len(cuts) < 4:
            cuts.append(done)
            server.cut_after = 150_000

    folder = fetch_published(cut_again)
    assert same_weights(folder, published, tmp_path)
    assert len(cuts) >= 2 and len(server.ranges(PT)) >= 3


def test_a_killed_process_resumes_at_the_next_start(server, published, tmp_path):
    server.bytes_per_second = 400_000
    process = subprocess.Popen([sys.executable, "-c", FETCH], env=server.environment(tmp_path))
    partial = cache_of(server, tmp_path) / f"{PT}.incomplete"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 100_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.bytes_per_second = None
    assert same_weights(fetch_published(), published, tmp_path)
    resumed_at = int(server.ranges(PT)[-1].removeprefix("bytes=").removesuffix("-"))
    assert 100_000 < resumed_at < len(published[PT])


def test_a_killed_conversion_leaves_no_half_folder(server, published, tmp_path):
    killed = """
import os
from studytiny import hub
def half(checkpoint, vocab, out):
    out.mkdir(); (out / "config.json").write_text("{"); os._exit(9)
hub.import_published = half
hub.fetch_published()
"""
    assert subprocess.run([sys.executable, "-c", killed], env=server.environment(tmp_path), timeout=60).returncode == 9
    home = hub._converted_folder().parent
    assert list(home.glob(".converting-*")) and not hub._converted_folder().exists()
    assert same_weights(cached_published(), published, tmp_path)
    assert not list(home.glob(".converting-*"))


def test_two_starts_at_once_do_not_break_each_other(server, published, tmp_path):
    cache = cache_of(server, tmp_path)
    cache.mkdir(parents=True)
    for name in (PT, "vocab.txt"):
        (cache / name).write_bytes(published[name])
    command = [sys.executable, "-c", "from studytiny.hub import cached_published; print(cached_published())"]
    both = [subprocess.Popen(command, env=server.environment(tmp_path), stdout=subprocess.PIPE) for _ in range(2)]
    folders = {process.communicate(timeout=60)[0].decode("utf-8").strip() for process in both}
    assert folders == {str(hub._converted_folder())}
    assert same_weights(cached_published(), published, tmp_path)


def test_a_second_download_at_the_same_time_is_told_so(server):
    lock = hub._converted_folder().with_name(".download.lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert "另一个程序正在下载" in refusal()


# What lies in the cache


def test_another_checkpoint_in_the_cache_is_converted_anew(server, published, tmp_path):
    folder = fetch_published()
    newer = write_published(tmp_path / "newer", d_model=96, seed=1).checkpoint.read_bytes()
    (cache_of(server, tmp_path) / PT).write_bytes(newer)
    assert same_weights(fetch_published(), {**published, PT: newer}, tmp_path)
    assert hub._converted_folder() == folder


def test_a_damaged_conversion_is_made_again(server, published, tmp_path):
    weights = fetch_published() / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    server.stop()
    assert same_weights(cached_published(), published, tmp_path)


def test_the_download_may_be_deleted_after_the_conversion(server, tmp_path):
    folder = fetch_published()
    server.stop()
    for path in cache_of(server, tmp_path).iterdir():
        path.unlink()
    assert cached_published() == folder


def test_a_damaged_file_in_the_cache_is_downloaded_again(server, published, tmp_path):
    cache = cache_of(server, tmp_path)
    cache.mkdir(parents=True)
    (cache / PT).write_bytes(published[PT][:-1000])
    (cache / "vocab.txt").write_bytes(published["vocab.txt"])
    assert cached_published() is None
    assert same_weights(fetch_published(), published, tmp_path)


# What cannot be had: one sentence each, in bounded time


@pytest.mark.parametrize(("missing", "named"), [(PT, "以 .pt 结尾的模型文件"), ("vocab.txt", "vocab.txt")])
def test_a_missing_file_is_named_with_what_was_found(server, missing, named):
    del server.files[missing]
    text = refusal()
    assert f"里面没有{named}" in text and "README.md" in text
    assert not [request for request in server.requests if request.file]


def test_a_wrong_hash_is_refused(server, tmp_path):
    server.wrong_sha = True
    assert "校验和不符" in refusal()
    assert not (cache_of(server, tmp_path) / PT).exists() and cached_published() is None


def test_a_corrupt_checkpoint_is_refused(server, published):
    server.files[PT] = published[PT][: len(published[PT]) // 2]
    assert PT in refusal()
    assert not hub._converted_folder().exists()


def test_a_refused_connection(server):
    server.stop()
    assert "连不上 ModelScope" in refusal()


def test_silence_instead_of_the_listing(server):
    server.silent_listing = True
    assert "没有回应" in refusal()


def test_silence_in_the_middle_of_a_file(server):
    server.silent_after = 300_000
    assert "没有收到任何数据" in refusal()
    server.silent_after = None
    fetch_published()
    assert set(server.ranges(PT)) == {None, "bytes=300000-"}


@pytest.mark.parametrize(("status", "said"), [(404, "找不到"), (500, "服务器出错"), (403, "拒绝"), (429, "限制")])
def test_an_http_error_instead_of_the_listing(server, status, said):
    server.listing_status = status
    assert said in refusal()


@pytest.mark.parametrize(("status", "said"), [(404, "找不到"), (500, "服务器出错")])
def test_an_http_error_instead_of_a_file(server, status, said, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "1")
    server.file_status = status
    assert said in refusal()


@pytest.mark.parametrize("body", [b"<html>please log in</html>", b"[]", b'{"Data": null}', b'{"Data": {"Files": [3]}}'])
def test_an_answer_that_is_no_listing(server, body):
    server.listing_body = body
    refusal()


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "file" / "cache"))
    assert "不能写入" in refusal()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit on file size, which stands in for a full disk, is POSIX")
def test_a_full_disk(server, tmp_path):
    full = """
import os, resource
os.environ["MODELSCOPE_DOWNLOAD_MAX_RETRIES"] = "0"
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
from studytiny import hub
try:
    hub.fetch_published()
except hub.ModelUnavailable as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", full], env=server.environment(tmp_path), capture_output=True, timeout=60
    )
    assert "磁盘满了" in done.stdout.decode("utf-8")


def test_a_missing_client_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError('not installed')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "pip install modelscope-hub" in refusal()


# load_model


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer = Tokenizer("你好呀")
    model = DialogueModel(vocab_size=tokenizer.vocab_size, d_model=16, n_head=2, n_layers=1, max_length=32)
    folder = save_checkpoint(tmp_path / "bundled", model, tokenizer)
    monkeypatch.setattr(hub, "BUNDLED_FOLDER", folder)
    return folder


@pytest.mark.parametrize("name", ["StudyTinyModel", "fenuolian/StudyTinyModel"])
def test_without_network_the_bundled_model_answers_and_one_sentence_says_why(server, bundled, name):
    server.stop()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load_model(name, "cpu")
    assert model.architecture == "studytiny" and tokenizer.vocab_size == 10
    [warning] = [entry for entry in caught if entry.category is BundledModelUsed]
    text = str(warning.message)
    assert text.startswith("改用自带的小模型，因为") and text.count("。") == 1 and text.endswith("。")


def test_the_bundled_model_and_a_folder_ask_nobody(server, bundled):
    load_model(device="cpu")
    load_model(bundled, "cpu")
    assert not server.requests


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_that_is_no_model_is_a_users_mistake(tmp_path, kind):
    path = tmp_path / "somewhere"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="somewhere"):
        load_model(path, "cpu")


def test_importing_the_library_does_not_import_the_client():
    code = "import sys, studytiny; print(any(name.startswith('modelscope') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout.decode().lower()) is False
