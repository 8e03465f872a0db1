"""The Compare tab: the same words to two models, or to one with two settings, answered next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studytiny.sampling import SamplingConfig
from studytiny.web.chat_events import ChatEvents, clear
from studytiny.web.chat_tab import model_choices, setting_slider
from studytiny.web.conversation import clean_text
from studytiny.web.language import Texts
from studytiny.web.models import BUNDLED, ModelShelf, describe_model
from studytiny.web.texts import DEFAULT_LANGUAGE

HOT = 1.5  # the temperature of the right side at first: so that there is something to see at once
_REST = SamplingConfig()  # of the settings that have no slider here
_STREAM = {"concurrency_limit": None, "concurrency_id": "reply", "show_progress": "hidden", "api_visibility": "private"}
_AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Side:
    """One of the two: its model, its settings, its conversation."""

    model: gr.Dropdown
    note: gr.Markdown
    settings: list[gr.Slider]  # temperature, top-k, repetition penalty
    chat: gr.Chatbot


class CompareTab:
    """Builds the tab inside the current Blocks."""

    def __init__(self, shelf: ModelShelf, texts: Texts, language: gr.Radio) -> None:
        self._shelf = shelf
        self._texts = texts
        self._language = language
        self._events = ChatEvents(shelf)
        texts.component(gr.Markdown, {"value": "compare_intro"}, elem_id="compare-intro")
        with gr.Row():
            self.left, self.right = self._build_side("left"), self._build_side("right", HOT)
        self.box = texts.component(
            gr.Textbox,
            {"label": "message", "placeholder": "compare_hint"},
            elem_id="compare-message",
            show_label=False,
            lines=1,
            max_lines=3,
            submit_btn=True,
        )
        self.clear = texts.component(gr.Button, {"value": "compare_clear"}, size="sm", elem_id="compare-clear")
        self._connect()

    def _build_side(self, name: str, temperature: float = _REST.temperature) -> Side:
        with gr.Column(min_width=320):
            model = self._texts.component(
                gr.Dropdown,
                {"label": "model"},
                choices=model_choices(self._shelf, DEFAULT_LANGUAGE),
                value=BUNDLED,
                elem_id=f"{name}-model",
                filterable=False,
                interactive=True,
            )
            note = gr.Markdown(elem_id=f"{name}-note", elem_classes="side-note")
            chat = self._texts.component(
                gr.Chatbot,
                {"label": "chat"},
                elem_id=f"{name}-chat",
                show_label=False,
                layout="bubble",
                height=300,
                buttons=[],
                feedback_options=None,
                render_markdown=False,
                sanitize_html=True,
                allow_tags=False,
                latex_delimiters=[],
                group_consecutive_messages=False,
            )
            with self._texts.component(gr.Accordion, {"label": "compare_settings"}, open=True):
                settings = [
                    setting_slider(self._texts, "temperature", f"{name}-temperature", temperature),
                    setting_slider(self._texts, "top_k", f"{name}-top_k"),
                    setting_slider(self._texts, "repetition_penalty", f"{name}-repetition_penalty"),
                ]
        return Side(model, note, settings, chat)

    def _connect(self) -> None:
        language, box, left, right = self._language, self.box, self.left, self.right
        box.submit(
            self.answer_left, [left.chat, box, language, left.model, *left.settings], [left.chat, box], **_STREAM
        )
        box.submit(self.answer_right, [right.chat, box, language, right.model, *right.settings], right.chat, **_STREAM)
        self.clear.click(lambda: (clear()[0], clear()[0]), None, [left.chat, right.chat], **_AT_ONCE)
        for side in (left, right):
            side.model.change(self.describe, [language, side.model], side.note, **_AT_ONCE)

    def connect_opening(self, tab: gr.Tab) -> None:
        """Looks which models there are, and says what they are, whenever the tab is opened or the language changes."""
        sides = [self.left.model, self.right.model]
        for event in (tab.select, self._language.input):
            event(self.open, [self._language, *sides], [*sides, self.left.note, self.right.note], **_AT_ONCE)

    def open(self, language: str, left: str, right: str) -> list[Any]:
        """Lists of models and notes as they are now."""
        choices = gr.update(choices=model_choices(self._shelf, language))
        return [choices, choices, self.describe(language, left), self.describe(language, right)]

    def describe(self, language: str, model: str) -> str:
        return describe_model(self._shelf, model, language)

    def answer_left(
        self, request: gr.Request, history: object, message: object, language: str, model: object, *settings: object
    ) -> Iterator[tuple[Any, Any]]:
        """The left side's reply; it also empties the box, once the message stands in the chat."""
        for chat, box, _ in self._events.send(request, history, message, language, model, *_whole(settings)):
            # Stop has no place here: replies are short, and there are two.
            yield chat, box if not isinstance(box, dict) else {**box, "submit_btn": True, "stop_btn": False}

    def answer_right(
        self, request: gr.Request, history: object, message: object, language: str, model: object, *settings: object
    ) -> Iterator[Any]:
        """The right side's reply. What is wrong with a message, the left side says."""
        if isinstance(message, str) and clean_text(message):
            for chat, _, _ in self._events.send(request, history, message, language, model, *_whole(settings)):
                yield chat


def _whole(settings: tuple[object, ...]) -> tuple[object, ...]:
    """The settings in the order of ``sampling_from``."""
    return (*settings, _REST.max_new_tokens, _REST.top_p, "")
