"""The page without a browser: its texts, its models, its handlers, and the real server met by API clients."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import app  # sets what Gradio reads while it is imported
from studytiny import DialogueModel, Generator, SamplingConfig, Tokenizer, UserError, hub, save_checkpoint
from studytiny.generator import Step
from studytiny.safety import FILTER_VARIABLE, HELP, POLITE
from studytiny.web import conversation, launch_options, serve
from studytiny.web.chat_events import ChatEvents, clear, last_question, undo
from studytiny.web.chat_tab import (
    default_settings,
    download_status,
    example_cards,
    model_choices,
    restored_settings,
)
from studytiny.web.conversation import clean_text, flatten, sampling_from, show, stream_reply, unshow
from studytiny.web.language import Texts
from studytiny.web.models import Download, ModelShelf, describe_failure, describe_model
from studytiny.web.texts import TEXTS, explain, pick_language, text, translations
from tests.browser import command, free_port, offline_environment, running_page, small_bundled

DEFAULTS = (0.7, 50, 1.1, 20, 1.0, 7)  # in the order of sampling_from
CHINESE = [(0x4E00, 0x9FFF)]


@pytest.fixture
def bundled(tmp_path: Path, model: DialogueModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = save_checkpoint(tmp_path / "bundled", model, tokenizer)
    monkeypatch.setattr(hub, "BUNDLED_FOLDER", folder)
    return folder


@pytest.fixture
def shelf(bundled: Path, tmp_path: Path) -> ModelShelf:
    return ModelShelf(runs_folder=tmp_path / "runs")


@pytest.fixture
def events(shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch) -> ChatEvents:
    for name in ("Info", "Warning"):
        monkeypatch.setattr(f"gradio.{name}", lambda sentence, **_: NOTICES.append(sentence))
    NOTICES.clear()
    return ChatEvents(shelf)


NOTICES: list[str] = []


def last(updates: Iterator[tuple[Any, Any, Any]]) -> Any:
    """The chat after the last of the updates that change it."""
    chats = [chat for chat, _, _ in updates]
    return next(chat for chat in reversed(chats) if isinstance(chat, list))


# texts


def test_every_text_has_both_languages() -> None:
    for key, (chinese, english) in TEXTS.items():
        assert chinese.strip() and english.strip(), key
        assert not any(low <= ord(character) <= high for character in english for low, high in CHINESE), key
    assert translations()["zh-CN"]["model"] == "模型" and translations()["en"]["model"] == "Model"


@pytest.mark.parametrize(
    ("tag", "language"),
    [("zh-CN", "zh"), ("ZH", "zh"), ("en-GB", "en"), ("fr", "en"), ("", "zh"), (None, "zh"), (5, "zh")],
)
def test_language_follows_the_browser(tag: object, language: str) -> None:
    assert pick_language(tag) == language


def library_errors(generator: Generator) -> Iterator[UserError]:
    """Every mistake that a visitor can make."""
    calls = [
        lambda: SamplingConfig(temperature=math.nan),
        lambda: SamplingConfig(top_k=-1),
        lambda: SamplingConfig(top_p=0),
        lambda: SamplingConfig(repetition_penalty=True),
        lambda: SamplingConfig(max_new_tokens=0),
        lambda: SamplingConfig(seed="1"),
        lambda: generator.stream([{"role": "user", "content": "长" * 500}]),
        lambda: generator.stream([{"role": "user", "content": " "}]),
        lambda: generator.stream([{"role": "assistant", "content": "你好"}]),
        lambda: generator.stream([{"role": "system", "content": "你好"}]),
        lambda: generator.stream(["你好"]),
        lambda: flatten("你好"),
        lambda: flatten([{"role": "root", "content": "你好"}]),
        lambda: hub.load_model(Path(__file__).parent),
    ]
    for call in calls:
        with pytest.raises(UserError) as raised:
            call()
        yield raised.value


def test_every_error_a_visitor_can_meet_is_explained_in_english(shelf: ModelShelf) -> None:
    for error in library_errors(shelf.generator("bundled")):
        english = explain(error, "en")
        assert english != str(error) and english.isascii(), str(error)
        assert explain(error, "zh") == str(error)
    for reason in (*hub.REASONS.values(), "20 秒没有收到任何数据，请检查网络"):
        assert describe_failure(hub.ModelUnavailable(reason), "en").isascii()
        assert reason.rstrip("。") in describe_failure(hub.ModelUnavailable(reason), "zh")


# between the page and the Generator


def test_clean_text_drops_what_nobody_types() -> None:
    assert clean_text(" 你\x00好\x07\ud83d\u202e\u200b！\n再\t见 ") == "你好！ 再 见"
    assert clean_text("👨‍👩‍👧") == "👨‍👩‍👧"


@pytest.mark.parametrize(
    "said", ["<b>粗</b>", "<img src=x>", "</p>", "<!-- -->", "&lt;", "&amp;lt;", "&#60;b", ">_<", "1 < 2 & 3", "<3"]
)
def test_markup_is_written_as_entities_and_read_back(said: str) -> None:
    shown = show([{"role": "user", "content": said}])[0]["content"]
    assert unshow(shown) == said
    assert not any(f"<{first}" in shown for first in "bi/!")
    if said in (">_<", "1 < 2 & 3", "<3"):
        assert shown == said


def test_flatten_takes_the_page_s_and_an_api_s_history() -> None:
    page = {
        "role": "user",
        "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}, {"type": "file"}],
    }
    assert flatten([page, {"role": "assistant", "content": "嗯"}]) == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "嗯"},
    ]
    assert len(flatten([page] * 10_000)) == conversation.MAX_TURNS


def test_whole_numbers_of_json_are_whole() -> None:
    assert sampling_from(0.7, 50.0, 1.1, 20.0, 1, None) == SamplingConfig(temperature=0.7, max_new_tokens=20, top_p=1)


@pytest.mark.parametrize(("typed", "seed"), [("", None), (" ", None), (None, None), (" 7 ", 7), (7.0, 7), ("0", 0)])
def test_an_empty_seed_is_a_new_one_each_time(typed: object, seed: int | None) -> None:
    assert sampling_from(0.7, 50, 1.1, 20, 1, typed).seed == seed


@pytest.mark.parametrize("typed", ["七", "-1", "1.5", "9" * 30, "9" * 10_000, True, [7]])
def test_a_wrong_seed_is_refused(typed: object) -> None:
    with pytest.raises(UserError, match="seed"):
        sampling_from(0.7, 50, 1.1, 20, 1, typed)


def test_first_and_last_text_always_come(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.01)
    monkeypatch.setattr(conversation.time, "monotonic", lambda: 100 + next(clock))
    growing = ("一二三四五六七八九十"[:length] for length in range(1, 11))
    texts = list(conversation._paced(growing, 0.05))
    assert texts[0] == "一" and texts[-1] == "一二三四五六七八九十"
    assert len(texts) == 3


def test_closing_the_reply_stops_the_model(shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = shelf.generator("bundled")
    drawn: list[int] = []
    monkeypatch.setattr("studytiny.scheduler.draw", lambda *_: drawn.append(1) or [10])
    reply = stream_reply(generator, [{"role": "user", "content": "你好"}], SamplingConfig(max_new_tokens=30))
    next(reply)
    reply.close()
    seen = len(drawn)
    assert list(reply) == []
    time.sleep(0.2)
    assert len(drawn) <= seen + 1 < 30


class Rude:
    """Stands in for a Generator that knows only one word."""

    def stream(self, messages: object, sampling: SamplingConfig, caller: str = "") -> Iterator[Step]:
        return (Step(character, 7) for character in "滚！")


def test_the_page_is_polite_unless_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{"role": "user", "content": "你好"}]
    monkeypatch.delenv(FILTER_VARIABLE, raising=False)
    assert list(stream_reply(Rude(), asked, SamplingConfig()))[-1] in [chinese for chinese, _ in POLITE]
    monkeypatch.setenv(FILTER_VARIABLE, "0")
    assert list(stream_reply(Rude(), asked, SamplingConfig()))[-1] == "滚！"


# models


def test_a_model_is_loaded_once_and_shared(shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    load = hub.load_model
    monkeypatch.setattr(hub, "load_model", lambda *arguments: loads.append(arguments) or load(*arguments))
    assert shelf.generator("bundled") is shelf.generator("bundled")
    assert len(loads) == 1


def test_runs_are_offered_and_read_again_while_they_train(
    shelf: ModelShelf, tmp_path: Path, model: DialogueModel, tokenizer: Tokenizer
) -> None:
    assert shelf.names() == ["bundled"]
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    folder = save_checkpoint(tmp_path / "runs" / "xhj", model, tokenizer)
    assert shelf.names() == ["bundled", "runs/xhj"]
    assert ("我训练的：xhj", "runs/xhj") in model_choices(shelf, "zh")
    first = shelf.generator("runs/xhj")
    assert shelf.generator("runs/xhj") is first
    later = (folder / "model.safetensors").stat().st_mtime + 10
    os.utime(folder / "model.safetensors", (later, later))
    assert shelf.generator("runs/xhj") is not first


@pytest.mark.parametrize("name", ["nowhere", "runs/../../etc", "/etc", "", None, ["bundled"], 5, "runs/"])
def test_only_offered_names_are_looked_up(shelf: ModelShelf, name: object) -> None:
    with pytest.raises(UserError):
        shelf.generator(name)


def test_damaged_model_is_described_not_raised(shelf: ModelShelf, bundled: Path) -> None:
    (bundled / "model.safetensors").write_bytes(b"x" * 100)
    assert "损坏" in describe_model(shelf, "bundled", "zh")
    assert describe_model(shelf, "bundled", "en").isascii()


def wait_for(shelf: ModelShelf, state: str) -> Download:
    end = time.monotonic() + 30
    while shelf.download.state != state:
        assert time.monotonic() < end, shelf.download
        time.sleep(0.01)
    return shelf.download


def test_download_fails_is_tried_again_and_succeeds(
    shelf: ModelShelf, tmp_path: Path, published: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tmp_path / "published", published, tokenizer)
    attempts: list[int] = []

    def fetch(progress: Any) -> Path:
        attempts.append(1)
        progress(50_000_000, 200_000_000)
        if len(attempts) == 1:
            assert "25%" in download_status(shelf.download, "zh") and "<progress" in download_status(
                shelf.download, "en"
            )
            raise hub.ModelUnavailable("连不上 <ModelScope>")
        return folder

    monkeypatch.setattr(hub, "cached_published", lambda: None)
    monkeypatch.setattr(hub, "fetch_published", fetch)
    assert download_status(shelf.download, "zh") == ""
    shelf.start_download()
    failed = wait_for(shelf, "failed")
    assert "&lt;ModelScope&gt;" in download_status(failed, "zh") and "import_published" in download_status(failed, "en")
    assert shelf.names() == ["bundled"]
    shelf.start_download()  # every visitor calls this: it is no second attempt
    assert shelf.download is failed
    shelf.retry_download()
    wait_for(shelf, "ready")
    assert shelf.names() == ["bundled", "StudyTinyModel"]
    assert "published" in describe_model(shelf, "StudyTinyModel", "zh")


# handlers


def test_send_streams_and_remembers(events: ChatEvents, shelf: ModelShelf) -> None:
    chat = last(events.send(None, [], " 你好\u202e ", "zh", "bundled", *DEFAULTS))
    assert chat[0] == {"role": "user", "content": "你好"} and chat[1]["role"] == "assistant"
    longer = last(events.send(None, chat, "你是谁", "zh", "bundled", *DEFAULTS))
    asked = [*flatten(chat), {"role": "user", "content": "你是谁"}]
    expected = shelf.generator("bundled").reply(asked, sampling_from(*DEFAULTS))
    assert longer == [*asked, {"role": "assistant", "content": expected}]


def test_the_line_under_the_chat_says_how_fast_it_was(events: ChatEvents) -> None:
    *_, (chat, _, line) = events.send(None, [], "你好", "zh", "bundled", *DEFAULTS)
    assert not isinstance(chat, list) and re.search(r"正在回答的是：.*每秒写 \d+ 字", line)


def test_who_waits_is_told_how_many_are_before_them(events: ChatEvents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "in_line", 3)
    lines = [line for *_, line in events.send(None, [], "你好", "zh", "bundled", *DEFAULTS) if isinstance(line, str)]
    assert lines[0] == text("in_line", "zh", count=3) and "正在回答的是" in lines[1]

    def give_way(*_: object, **__: object) -> Iterator[str]:
        yield from ()
        raise UserError("现在提问的人太多")

    monkeypatch.setattr("studytiny.web.chat_events.stream_reply", give_way)
    *_, (_, _, line) = events.send(None, [], "你好", "zh", "bundled", *DEFAULTS)
    assert "正在回答的是" in line and "太多" in NOTICES[-1]  # nobody is told of a line that they no longer stand in
    monkeypatch.setattr("studytiny.web.chat_events.stream_reply", stream_reply)
    monkeypatch.setattr(Generator, "in_line", 0)
    assert "在等" not in str(list(events.send(None, [], "你好", "zh", "bundled", *DEFAULTS)))


def test_the_box_is_emptied_once_the_message_is_in_the_chat(events: ChatEvents) -> None:
    chat, box, _ = next(events.send(None, [], "你好", "zh", "bundled", *DEFAULTS))
    assert chat == [{"role": "user", "content": "你好"}]
    assert box["value"] == "" and box["stop_btn"]


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize(
    ("message", "chosen", "settings"),
    [
        ("", "bundled", DEFAULTS),
        (" \n\u202e", "bundled", DEFAULTS),
        (None, "bundled", DEFAULTS),
        ({"a": 1}, "bundled", DEFAULTS),
        ("长" * 10_000, "bundled", DEFAULTS),
        ("长" * 500, "bundled", DEFAULTS),
        ("你好", "<b>nowhere", DEFAULTS),
        ("你好", "bundled", (math.nan, *DEFAULTS[1:])),
        ("你好", "bundled", (True, *DEFAULTS[1:])),
        ("你好", "bundled", ("0.7", *DEFAULTS[1:])),
        ("你好", "bundled", (0.7, 1.5, *DEFAULTS[2:])),
        ("你好", "bundled", (0.7, 50, math.inf, *DEFAULTS[3:])),
        ("你好", "bundled", (0.7, 50, 1.1, -1, 1.0, None)),
    ],
)
def test_a_mistake_is_one_notice_and_nothing_is_lost(
    events: ChatEvents, language: str, message: Any, chosen: Any, settings: tuple[Any, ...]
) -> None:
    updates = list(events.send(None, [], message, language, chosen, *settings))
    assert len(NOTICES) == 1 and "<" not in NOTICES[0]
    assert NOTICES[0].isascii() == (language == "en")
    for chat, box, _ in updates:
        assert not isinstance(chat, list) and "value" not in box


@pytest.mark.parametrize(
    ("message", "answer"),
    [("我不想活了", HELP[0]), ("i want to die", HELP[1]), ("我想死。" + "长" * 10_000, HELP[0])],
)
@pytest.mark.parametrize(
    ("chosen", "settings"), [("bundled", DEFAULTS), ("nowhere", DEFAULTS), ("bundled", (math.nan, *DEFAULTS[1:]))]
)
def test_who_is_in_danger_is_answered_whatever_the_model_and_the_settings(
    events: ChatEvents, message: str, answer: str, chosen: str, settings: tuple[Any, ...]
) -> None:
    chat = last(events.send(None, [], message, "zh", chosen, *settings))
    assert chat == [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    assert list(events.chat(None, message, model=chosen))[-1] == answer
    assert NOTICES == []


def test_retry_edit_undo_and_clear(events: ChatEvents) -> None:
    chat = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "嗯"},
        {"role": "user", "content": "&lt;b>你是谁"},
        {"role": "assistant", "content": "我"},
    ]
    again = last(events.send_again(None, SimpleNamespace(index=3), chat, "zh", "bundled", *DEFAULTS))
    assert again[:3] == chat[:3] and len(again) == 4
    edited = last(events.send_edited(None, SimpleNamespace(index=0, value="再见"), chat, "zh", "bundled", *DEFAULTS))
    assert edited[0]["content"] == "再见" and len(edited) == 2
    example = last(
        events.send_example(None, SimpleNamespace(value={"text": "你好！"}), chat, "zh", "bundled", *DEFAULTS)
    )
    assert example[4]["content"] == "你好！" and len(example) == 6
    left, box = undo(chat)
    assert left == chat[:2] and box["value"] == "<b>你是谁"
    assert undo([])[0] == [] and clear()[0] == []
    assert last_question([]) is None and last_question(flatten(chat), 99) == 2
    nothing = list(events.send_again(None, SimpleNamespace(index=0), [], "zh", "bundled", *DEFAULTS))
    assert not isinstance(nothing[0][0], list)


@pytest.mark.parametrize(
    "kept", [None, 5, [], ["hot", 50, 1.1, 100, 1.0, ""], [0.7, 50, 1.1, 100, 9.0, ""], {"temperature": 1}]
)
def test_kept_settings_that_make_no_sense_become_the_defaults(kept: object) -> None:
    assert restored_settings(kept) == default_settings()
    assert restored_settings([1.3, 20, 1.2, 50, 0.9, "7"]) == [1.3, 20, 1.2, 50, 0.9, "7"]


def test_examples_are_explained_outside_chinese() -> None:
    assert example_cards("zh")[0]["display_text"] == example_cards("zh")[0]["text"]
    assert example_cards("en")[0]["display_text"].endswith("Hello!")


# the page and its server


def test_importing_app_starts_nothing_and_calls_nobody() -> None:
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert "127.0.0.1" in os.environ["NO_PROXY"]
    assert app.demo.shelf.download.state == "idle"
    assert app.demo.config["analytics_enabled"] is False
    public = [item["api_name"] for item in app.demo.config["dependencies"] if item["api_visibility"] == "public"]
    assert public == ["chat", "next_characters"]


def test_an_older_gradio_is_told_only_what_it_knows(shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_options(shelf)["run_history"] is False

    def older_launch(self: object, css: str, footer_links: list[str], quiet: bool) -> None: ...

    monkeypatch.setattr("gradio.Blocks.launch", older_launch)
    assert set(launch_options(shelf)) == {"css", "footer_links", "quiet"}

    class OlderBox:
        def __init__(self, label: object, lines: int = 1) -> None:
            self.lines = lines

    assert Texts().component(OlderBox, {"label": "model"}, lines=3, show_whitespaces=True).lines == 3


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server, with a small model of no training."""
    folder = tmp_path_factory.mktemp("server")
    small_bundled(folder)
    with running_page(command(folder / "bundled"), offline_environment(folder), folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False)


def test_api_answers_streams_and_repeats_with_a_seed(client: Any) -> None:
    history = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好呀"}]
    first = client.predict("你是谁", history=history, seed=7, max_new_tokens=8, api_name="/chat")
    assert 0 < len(first) <= 8
    assert client.predict("你是谁", history=history, seed=7, max_new_tokens=8, api_name="/chat") == first
    job = client.submit("你好", api_name="/chat")
    whole = job.result()
    assert job.outputs()[-1] == whole and whole.startswith(job.outputs()[0])


def test_api_names_the_next_characters_with_their_probabilities(client: Any) -> None:
    found = client.predict("你好", count=5, api_name="/next_characters")
    chances = [entry["probability"] for entry in found]
    assert len(found) == 5 and chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1
    history = [{"role": "user", "content": "我叫小天"}, {"role": "assistant", "content": "你好呀"}]
    assert client.predict("你好", history=history, count=5, api_name="/next_characters") != found
    everything = client.predict("你好", count=1000, api_name="/next_characters")
    assert sum(entry["probability"] for entry in everything) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": "many"}, {"model": "nobody"}, {"message": " "}])
def test_a_wrong_question_for_the_next_characters_is_answered_with_a_sentence(
    client: Any, wrong: dict[str, Any]
) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as raised:
        client.predict(**{"message": "你好", **wrong}, api_name="/next_characters")
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"message": ""},
        {"message": None},
        {"message": 5},
        {"message": "长" * 10_000},
        {"history": "你好"},
        {"history": [{"role": "system", "content": "你好"}]},
        {"history": [None, 3]},
        {"model": "../../etc"},
        {"temperature": 99},
        {"temperature": True},
        {"top_k": "many"},
        {"max_new_tokens": 10**9},
        {"seed": 1.5},
    ],
)
def test_a_wrong_api_call_is_answered_with_a_sentence_and_the_next_one_works(
    client: Any, wrong: dict[str, Any]
) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as raised:
        client.predict(**{"message": "你好", **wrong}, api_name="/chat")
    assert "/work" not in str(raised.value) and "Traceback" not in str(raised.value)
    assert client.predict("你好", max_new_tokens=3, api_name="/chat")


def get(url: str, **options: Any) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(urllib.request.Request(url, **options), timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_queue_cannot_be_passed_by_and_nothing_is_monitored(address: str) -> None:
    body = json.dumps({"data": ["你好"]}).encode()
    assert get(f"{address}gradio_api/run/chat", data=body, headers={"Content-Type": "application/json"}) >= 400
    assert get(f"{address}monitoring") >= 400
    assert get(address) == 200


def test_a_taken_port_leads_to_the_next_one(tmp_path: Path, address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with started(tmp_path, port) as process:
        said = process.stdout.readline().decode("utf-8")
        assert "http://127.0.0.1:" in said and str(port) not in said


@pytest.mark.parametrize("port", ["abc", "-1", "70000", ""])
def test_a_port_that_is_none_is_one_sentence(port: str) -> None:
    result = subprocess.run(command(), env={**os.environ, "GRADIO_SERVER_PORT": port}, capture_output=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.decode("utf-8").startswith("错误：环境变量 GRADIO_SERVER_PORT")
    assert result.stderr.count(b"\n") == 1


def test_no_free_port_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError("Cannot find empty port in range: 7860-7860")

    monkeypatch.setenv("GRADIO_SERVER_PORT", "7860")
    with pytest.raises(UserError, match="7860"):
        serve(SimpleNamespace(launch=refuse, shelf=None))


@contextlib.contextmanager
def started(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The real app.py; ``stdout`` and ``stderr`` can be read."""
    environment = {**offline_environment(folder), "GRADIO_SERVER_PORT": str(port)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(), env=environment, cwd=folder, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_quietly(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port) as process:
        assert str(port) in process.stdout.readline().decode("utf-8")
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == b"" and "再见" in said.decode("utf-8")


def test_text_fills_its_braces() -> None:
    assert text("answering", "zh", model="甲") == "正在回答的是：甲。"
