"""The X-ray tab without a browser: what it shows is what the model computed, and nothing wrong breaks it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from conftest import assistant, user

import app  # noqa: F401 - sets what Gradio reads while it is imported
from studytiny import DialogueModel, SamplingConfig, Tokenizer, hub, save_checkpoint
from studytiny.web.chat_tab import ChatTab
from studytiny.web.language import Texts
from studytiny.web.lessons_tab import Lessons
from studytiny.web.models import ModelShelf
from studytiny.web.texts import text
from studytiny.web.xray_tab import KEPT, Subject, XrayTab, reply_choices
from studytiny.web.xray_views import DEEPEST, bars, percent, token_rows
from studytiny.xray import STAGES, Chance, certainty, look_inside

TALK = [user("你好"), assistant("你好呀"), user("我叫小天"), assistant("你好小天")]
SETTINGS = (0.7, 50, 1.1, 1.0)  # of the tab: temperature, top-k, penalty, top-p
CHAT_SETTINGS = (0.5, 20, 1.3, 30, 0.9, "")


@pytest.fixture
def shelf(tmp_path: Path, model: DialogueModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> ModelShelf:
    monkeypatch.setattr(hub, "BUNDLED_FOLDER", save_checkpoint(tmp_path / "bundled", model, tokenizer))
    return ModelShelf(runs_folder=tmp_path / "runs")


@pytest.fixture
def tab(shelf: ModelShelf) -> Iterator[XrayTab]:
    with gr.Blocks():
        texts, language = Texts(), gr.Radio(["zh", "en"])
        yield XrayTab(shelf, texts, language, ChatTab(shelf, texts, language), Lessons())


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr("gradio.Warning", lambda sentence, **_: heard.append(sentence))
    return heard


def subject(turns: list[dict[str, str]] = TALK, model: str = "bundled") -> Subject:
    return Subject(model, tuple((turn["role"], turn["content"]) for turn in turns))


def test_opening_shows_the_last_reply_with_the_settings_of_the_chat(tab: XrayTab, shelf: ModelShelf) -> None:
    looked, which, *rest = tab.open("zh", TALK, "bundled", *CHAT_SETTINGS)
    assert looked == subject() and which["value"] == 3
    assert which["choices"] == [("你好呀", 1), ("你好小天", 3)] == reply_choices(TALK)
    assert rest[:4] == [0.5, 20, 1.3, 0.9]
    empty, body, spans, place = rest[4:8]
    assert empty["visible"] is False and body["visible"] is True
    generator = shelf.generator("bundled")
    inside = look_inside(generator.model, generator.tokenizer, TALK)
    assert [token for token, _ in spans] == [*"你好小天", text("mark_end", "zh")]
    assert [p for _, p in spans] == pytest.approx([DEEPEST * p for p in certainty(inside)])
    assert place["maximum"] == len(spans)


@pytest.mark.parametrize("history", [[], [user("你好")], [assistant("你好")]])
def test_without_a_reply_it_says_what_to_do(tab: XrayTab, history: list[dict[str, str]]) -> None:
    looked, _, *rest = tab.open("en", history, "bundled", *CHAT_SETTINGS)
    assert looked is None and rest[4]["value"] == text("xray_empty", "en") and rest[5]["visible"] is False


@pytest.mark.parametrize("place", [1, 3, 5, 99, -4, math.nan, None, "2", True])
def test_candidates_of_any_place_or_none(tab: XrayTab, place: object) -> None:
    table, verdict, other = tab.show_candidates("zh", subject(), place, *SETTINGS)
    assert table.count("<tr") >= 10 and table.count('class="here"') == 1
    assert re.search(r"第 [1-5] 个字", verdict)
    assert other["value"] in [token for _, token in other["choices"]]


def test_the_sliders_change_the_table_at_once(tab: XrayTab) -> None:
    warm, _, _ = tab.show_candidates("zh", subject(), 1, 1.0, 0, 1.0, 1.0)
    greedy, verdict, _ = tab.show_candidates("zh", subject(), 1, 0, 0, 1.0, 1.0)
    assert greedy != warm and "100.0%" in verdict and greedy.count(">100.0%<") == 2  # after top-k and top-p


@pytest.mark.parametrize("settings", [(math.nan, 50, 1.1, 1.0), (0.7, -1, 1.1, 1.0), ("hot", 50, 1.1, 1.0)])
def test_a_wrong_setting_is_one_sentence(tab: XrayTab, settings: tuple[object, ...]) -> None:
    table, sentence, _ = tab.show_candidates("en", subject(), 1, *settings)
    assert table == "" and "must be" in sentence


def test_attention_shows_what_was_read_and_the_most_looked_at_is_deepest(tab: XrayTab, model: DialogueModel) -> None:
    shown, blind = tab.show_attention("zh", subject(), 2, 1, 1)
    spans = shown["value"]
    assert "".join(token for token, _ in spans).endswith(text("mark_assistant", "zh") + "你")
    assert max(share for _, share in spans) == pytest.approx(DEEPEST) and blind["visible"] is False
    _, wrong = tab.show_attention("en", subject(), 2, 99, 1)
    assert wrong["visible"] is True and "layer 99" in wrong["value"]


def test_the_published_architecture_attends_to_nothing(
    tab: XrayTab, shelf: ModelShelf, tmp_path: Path, published: Any, tokenizer: Tokenizer
) -> None:
    save_checkpoint(tmp_path / "runs" / "old", published, tokenizer)
    shown, blind = tab.show_attention("zh", subject(model="runs/old"), 2, None, None)
    assert shown["visible"] is False and blind["value"] == text("blind", "zh")
    _, _, *rest = tab.open("zh", TALK, "runs/old", *CHAT_SETTINGS)
    assert rest[8]["visible"] is False and rest[9]["visible"] is False  # no layer and no head to choose


def test_another_candidate_and_the_reply_goes_on_from_there(tab: XrayTab, shelf: ModelShelf) -> None:
    generator = shelf.generator("bundled")
    other = generator.tokenizer.vocab["吗"]
    looked, *_, note = tab.continue_with(None, "zh", subject(), 3, *SETTINGS, other)
    *before, (role, said) = looked.messages
    assert before == list(subject().messages[:-1]) and role == "assistant"
    assert said.startswith("你好吗") and note == text("what_if", "zh")
    begun = generator.tokenizer.encode("你好吗")
    steps = generator.stream(TALK[:-1], SamplingConfig(temperature=0, repetition_penalty=1.1), begun=begun)
    greedy, *_ = tab.continue_with(None, "zh", subject(), 3, 0, 50, 1.1, 1.0, other)
    assert greedy.messages[-1][1] == "你好吗" + "".join(step.text for step in steps)


def test_what_cannot_go_on_or_turns_rude_changes_nothing(
    tab: XrayTab, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in (None, "吗", 2, 10**6):
        assert len(tab.continue_with(None, "en", subject(), 1, *SETTINGS, other)) == 8
    assert len(notices) == 2 and all("too long" in notice for notice in notices)  # <|end|>, and no token at all
    monkeypatch.setattr("studytiny.web.xray_tab.is_rude", lambda said: True)
    tab.continue_with(None, "zh", subject(), 1, *SETTINGS, 9)
    assert notices[-1] == text("what_if_rude", "zh")


def test_the_model_never_goes_on_with_an_answer_to_somebody_in_danger(tab: XrayTab, notices: list[str]) -> None:
    turns = [user("我不想活了"), assistant("你好呀")]
    tab.continue_with(None, "zh", subject(turns), 1, *SETTINGS, 9)
    assert notices == [text("what_if_help", "zh")]


@pytest.mark.parametrize("history", ["你好", None, [3], [{"role": "root", "content": "你好"}]])
def test_a_history_that_is_none_is_no_reply(tab: XrayTab, history: object) -> None:
    looked, _, *rest = tab.open("zh", history, "bundled", *CHAT_SETTINGS)
    assert looked is None and rest[4]["value"] == text("xray_empty", "zh")


@pytest.mark.parametrize("name", ["nobody", None, "../../etc"])
def test_an_unknown_model_is_one_sentence(tab: XrayTab, name: object) -> None:
    looked, _, *rest = tab.open("zh", TALK, name, *CHAT_SETTINGS)
    assert looked is None and "没有叫" in rest[4]["value"]


def test_a_reply_longer_than_the_window_is_one_sentence(tab: XrayTab) -> None:
    looked, _, *rest = tab.open("en", [user("你好"), assistant("好" * 5000)], "bundled", *CHAT_SETTINGS)
    assert looked is None and "tokens" in rest[4]["value"]


def test_looks_are_kept_and_forgotten(tab: XrayTab, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def counting(*arguments: Any) -> Any:
        counted.append(1)
        return look_inside(*arguments)

    monkeypatch.setattr("studytiny.web.xray_tab.look_inside", counting)
    for _ in range(3):
        tab.show_candidates("zh", subject(), 1, *SETTINGS)
    assert len(counted) == 1
    for letter in "呀吗气怎样":
        tab.show_candidates("zh", subject([user("你好"), assistant(letter)]), 1, *SETTINGS)
    tab.show_candidates("zh", subject(), 1, *SETTINGS)
    assert len(counted) == 7 and len(tab._looks._kept) == KEPT


def test_the_table_escapes_what_it_shows(tokenizer: Tokenizer) -> None:
    tokenizer = Tokenizer("<&>")
    rows = [Chance(token, tokenizer.token(token), (0.5, 0.5, 0.5, 0.0, 0.00001)) for token in (7, 8, 9)]
    table = bars(rows, tokenizer, 8, "en")
    assert "&lt;" in table and "&amp;" in table and "<&" not in table
    assert table.count("<th scope") == 1 + len(STAGES) + len(rows)
    assert percent(0.0) == "–" and percent(0.0001) == "<0.1%" and percent(0.5) == "50.0%"


def test_a_text_becomes_characters_ids_and_roles(tab: XrayTab, tokenizer: Tokenizer) -> None:
    rows = token_rows(tokenizer, [user("你好")], "zh")
    assert [row[1] for row in rows] == ["<|user|>", "你", "好", "<|end|>", "<|assistant|>"]
    assert [row[3] for row in rows] == ["用户"] * 4 + ["模型"]
    shown = tab.show_tokens("en", "bundled", "你好<|end|>")
    assert shown["headers"] == ["place", "token", "id", "speaker"]
    assert [row[1] for row in shown["value"]][-2:] == ["<|end|>", "<|assistant|>"]
    assert sum(row[1] == "<|end|>" for row in shown["value"]) == 1  # typed marks are plain characters
    assert len(tab.show_tokens("zh", "bundled", "好" * 10_000)["value"]) < 500
    assert tab.show_tokens("zh", "bundled", None)["value"] == token_rows(tokenizer, [], "zh")


def test_a_click_names_its_character(tab: XrayTab) -> None:
    assert tab.pick(SimpleNamespace(index=3), 1) == 4
    assert tab.pick(SimpleNamespace(index=[1, 2]), 1) == 1
