"""The Compare tab: the same words to two models, or to one with two settings, answered next to each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studytiny.sampling import SamplingConfig
from studytiny.web.chat_events import ChatEvents, box_at_rest, clear
from studytiny.web.chat_tab import AT_ONCE, REPLY, TEXT_ONLY, model_choices, setting_slider
from studytiny.web.language import Texts
from studytiny.web.models import BUNDLED, ModelShelf, describe_model
from studytiny.web.texts import DEFAULT_LANGUAGE

HOT = 1.5  # the temperature of the right side at first: so that there is something to see at once
_REST = SamplingConfig()  # of the settings that have no slider here


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
                group_consecutive_messages=False,
                **TEXT_ONLY,
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
        sides = [left.chat, left.model, *left.settings, right.chat, right.model, *right.settings]
        box.submit(self.answer, [language, box, *sides], [left.chat, right.chat, box], **REPLY)
        self.clear.click(lambda: (clear()[0], clear()[0]), None, [left.chat, right.chat], **AT_ONCE)
        for side in (left, right):
            side.model.change(self.describe, [language, side.model], side.note, **AT_ONCE)

    def connect_opening(self, tab: gr.Tab) -> None:
        """Looks which models there are, and says what they are, whenever the tab is opened or the language changes."""
        sides = [self.left.model, self.right.model]
        for event in (tab.select, self._language.input):
            event(self.open, [self._language, *sides], [*sides, self.left.note, self.right.note], **AT_ONCE)

    def open(self, language: str, left: str, right: str) -> list[Any]:
        """Lists of models and notes as they are now."""
        choices = gr.update(choices=model_choices(self._shelf, language))
        return [choices, choices, self.describe(language, left), self.describe(language, right)]

    def describe(self, language: str, model: str) -> str:
        return describe_model(self._shelf, model, language)

    def answer(
        self, request: gr.Request, language: str, message: object, *sides: object
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Both replies as they grow, in turns. ``sides``: history, model, settings of the left, then of the right."""
        half = len(sides) // 2
        running, asked = {}, []
        for place, (history, model, *settings) in enumerate((sides[:half], sides[half:])):
            running[place] = self._events.send(request, history, message, language, model, *_all_settings(settings))
            chat, _, _ = next(running[place])
            if not isinstance(chat, list):  # something is wrong, and it was said; once is enough
                yield gr.skip(), gr.skip(), box_at_rest()
                return
            asked.append(chat)
        yield *asked, box_at_rest("")
        while running:
            for place, updates in list(running.items()):
                try:
                    chat, _, _ = next(updates)
                    yield *_on_side(place, chat), gr.skip()
                except StopIteration:
                    del running[place]


def _on_side(place: int, chat: Any) -> tuple[Any, Any]:
    return (gr.skip(), chat) if place else (chat, gr.skip())


def _all_settings(settings: list[object]) -> tuple[object, ...]:
    """The settings in the order of ``sampling_from``."""
    return (*settings, _REST.max_new_tokens, _REST.top_p, "")
