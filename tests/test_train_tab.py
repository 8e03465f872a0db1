"""The Train tab: real runs in processes of their own, started, stopped and gone on with as the page does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

import app  # noqa: F401 - sets what Gradio reads while it is imported
from studytiny import DialogueModel, Tokenizer, UserError, hub, load_model, save_checkpoint
from studytiny.web import build_page, launch_options
from studytiny.web.chat_tab import ChatTab
from studytiny.web.language import Texts
from studytiny.web.lessons_tab import Lessons
from studytiny.web.models import ModelShelf
from studytiny.web.texts import text
from studytiny.web.train_tab import POINTS, SWITCH, TrainTab, curve, status
from studytiny.web.training import Progress, Training
from train.run_log import PROMPTS

PATIENCE = 120  # seconds; a busy machine imports torch slowly


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = []
    for i in range(200):
        lines += ["E", f"M 你好，我是{i}号", f"M 你好呀，{i}号", "M 再见", "M 再见，下次再聊"]
    path = tmp_path / "上传的.conv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    training = Training(tmp_path / "runs")
    yield training
    if training._process is not None:
        training._process.kill()
        training._process.wait()


@pytest.fixture
def shelf(tmp_path: Path, model: DialogueModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> ModelShelf:
    monkeypatch.setattr(hub, "BUNDLED_FOLDER", save_checkpoint(tmp_path / "bundled", model, tokenizer))
    return ModelShelf(runs_folder=tmp_path / "runs")


@pytest.fixture
def tab(shelf: ModelShelf, training: Training) -> Iterator[TrainTab]:
    with gr.Blocks():
        texts, language = Texts(), gr.Radio(["zh", "en"])
        yield TrainTab(shelf, texts, language, ChatTab(shelf, texts, language), Lessons(), training)


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr("gradio.Warning", lambda sentence, **_: heard.append(sentence))
    return heard


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_run_from_the_upload_to_the_chat(tab: TrainTab, training: Training, shelf: ModelShelf, corpus: Path) -> None:
    shown, report = tab.examine("zh", str(corpus))
    assert shown["visible"] is True and "200 段对话" in report and str(corpus.parent) not in report
    started = tab.begin("zh", str(corpus), "mini", 0.1)
    name = training.progress().name
    assert name.startswith("上传的-") and name in started[0] and started[-1].active is True
    corpus.unlink()  # what was uploaded does not stay
    wait_until(lambda: not training.progress().is_alive)
    progress = training.progress()
    assert progress.state == "finished", progress.sentence
    assert progress.losses[-1][1] < progress.losses[0][1] and progress.bits and progress.seconds > 3
    assert [prompt for prompt, _ in progress.samples] == list(PROMPTS)
    sentence, start, stop, resuming, _, chat_with, loss, _, samples, clock = tab.watch("zh")
    assert text("train_finished", "zh", name=name) in sentence and "比特/字" in sentence
    assert start["interactive"] is True and stop["visible"] is False and resuming["visible"] is False
    assert chat_with["visible"] is True and samples["visible"] is True and clock.active is False
    assert loss["visible"] is True and list(loss["value"]["value"]) == [loss for _, loss in progress.losses]
    chosen, tabs = tab.to_the_chat("zh")
    assert chosen["value"] == f"runs/{name}" and tabs.selected == "chat"
    assert shelf.generator(chosen["value"]).reply([{"role": "user", "content": "再见"}])


def test_stop_saves_and_it_goes_on_from_there(tab: TrainTab, training: Training, corpus: Path, notices: Any) -> None:
    tab.begin("zh", str(corpus), "mini", 5)
    name = training.progress().name
    wait_until(lambda: len(training.progress().losses) > 1)
    tab.begin("en", None, "mini", 5)
    assert len(notices) == 1 and "still training" in notices[0]
    assert training.resumable() == []
    tab.end("zh")
    wait_until(lambda: not training.progress().is_alive)
    assert training.progress().state == "stopped"
    steps = training.progress().losses[-1][0]
    *_, resuming, which, chat_with, _, _, _, _ = tab.watch("zh")
    assert resuming["visible"] is True and which["value"] == name and chat_with["visible"] is True
    tab.go_on("zh", name)
    assert len(notices) == 1
    wait_until(lambda: training.progress().losses[-1][0] > steps)
    assert training.progress().losses[0][0] < steps  # one log, one run
    tab.end("zh")
    wait_until(lambda: not training.progress().is_alive)
    assert training.progress().state == "stopped"
    load_model(training._folder / name)


def test_who_stops_before_anything_is_saved_is_told_so(tab: TrainTab, training: Training, corpus: Path) -> None:
    tab.begin("zh", str(corpus), "mini", 5)
    tab.end("zh")
    wait_until(lambda: not training.progress().is_alive)
    assert training.progress().state == "dropped" and training.resumable() == []
    assert text("train_dropped", "zh", name=training.progress().name) == tab.watch("zh")[0]


def test_what_is_wrong_with_a_corpus_is_one_sentence(tab: TrainTab, training: Training, tmp_path: Path) -> None:
    empty = tmp_path / "空.conv"
    empty.write_text("今天天气不错\n", encoding="utf-8")
    tab.begin("zh", str(empty), "mini", 1)
    wait_until(lambda: not training.progress().is_alive)
    progress = training.progress()
    assert progress.state == "failed" and progress.sentence and "Traceback" not in progress.sentence
    assert progress.sentence in tab.watch("zh")[0]
    gone = tab.examine("zh", str(tmp_path / "没有.conv"))
    assert gone[0]["visible"] is True and str(tmp_path) not in gone[1]


@pytest.mark.parametrize(
    ("preset", "minutes"),
    [("huge", 1), (None, 1), ("mini", 0), ("mini", float("nan")), ("mini", True), ("mini", 10**9), ("mini", "1")],
)
def test_a_wrong_setting_starts_nothing(
    tab: TrainTab, training: Training, notices: list[str], preset: object, minutes: object
) -> None:
    tab.begin("en", None, preset, minutes)
    assert len(notices) == 1 and "must be" in notices[0]
    assert training.progress() == Progress() and not training._folder.exists()


@pytest.mark.parametrize("name", ["../../etc", "nobody", None, 5])
def test_only_what_is_in_the_list_is_gone_on_with(training: Training, name: object) -> None:
    with pytest.raises(UserError, match="没有可以接着做的存档"):
        training.resume(name)


def test_every_state_has_a_sentence_in_both_languages() -> None:
    for state in ("none", "starting", "running", "stopping", "stopped", "dropped", "finished", "failed"):
        for language in ("zh", "en"):
            said = status(Progress("<b>", state, "<i>坏了</i>", 60, 1000, [(10, 2.0)], [(10, 3.0)]), language)
            assert said and "<b>" not in said and "<i>" not in said


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    points = [(step, float(step)) for step in range(1, 10_001)]
    drawn = curve(points)
    assert len(drawn) <= POINTS and drawn["step"].iloc[-1] == 10_000
    assert curve([]).empty and list(curve(points[:3])["value"]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("environment", "offered"),
    [
        ({}, True),
        ({"SPACE_ID": "a/b"}, False),
        ({"MODELSCOPE_ENVIRONMENT": "studio"}, False),
        ({"SPACE_ID": "a/b", SWITCH: "1"}, True),
        ({SWITCH: "0"}, False),
    ],
)
def test_on_a_host_nobody_trains_unless_it_is_switched_on(
    monkeypatch: pytest.MonkeyPatch, shelf: ModelShelf, environment: dict[str, str], offered: bool
) -> None:
    for name in ("SPACE_ID", "MODELSCOPE_ENVIRONMENT", SWITCH):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    page = build_page(shelf)
    ids = [block.elem_id for block in page.blocks.values()]
    assert ("train-start" in ids) is offered
    assert (launch_options(shelf)["max_file_size"] == "1mb") is not offered
