"""The Train tab: a corpus, a size and a time; then the curves fall, the model begins to speak, and can be chatted with.

The one part of the page that also calls ``train``. On a host it is left out unless it is asked for.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from studytiny.errors import UserError, describe_os_error
from studytiny.hosting import is_hosted
from studytiny.web.chat_events import sentence_for
from studytiny.web.chat_tab import ChatTab, model_choices
from studytiny.web.language import Texts
from studytiny.web.lessons_tab import Lessons
from studytiny.web.models import ModelShelf
from studytiny.web.texts import DEFAULT_LANGUAGE, text
from studytiny.web.training import PRESETS, Progress, Training
from train.doctor import describe, examine

SWITCH = "STUDYTINY_TRAIN"  # environment: 1 shows the tab, 0 hides it
LARGEST_CORPUS = "256mb"
LOOK_SECONDS = 2  # between two looks at a running training
POINTS = 400  # drawn of a curve
_EVENT = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4, "concurrency_id": "train"}


def is_offered() -> bool:
    """Whether this page lets its visitors train: at home, or where the switch says so."""
    said = os.environ.get(SWITCH, "").strip()
    return said != "0" if said else not is_hosted()


class TrainTab:
    """Builds the tab inside the current Blocks. ``localized`` and ``localize`` are for the page's language switch."""

    def __init__(
        self,
        shelf: ModelShelf,
        texts: Texts,
        language: gr.Radio,
        chat: ChatTab,
        lessons: Lessons,
        training: Training | None = None,
    ) -> None:
        self._shelf = shelf
        self._texts = texts
        self._language = language
        self._chat = chat
        self.training = training or Training()
        texts.component(gr.Markdown, {"value": "train_intro"}, elem_id="train-intro")
        lessons.link(6)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self._build_settings()
            with gr.Column(scale=7, min_width=320):
                self._build_progress()
        self.clock = gr.Timer(LOOK_SECONDS, active=False)
        self._connect()

    # what is on the page

    def _build_settings(self) -> None:
        component = self._texts.component
        with gr.Group(elem_id="train-settings"):
            self.file = component(
                gr.File, {"label": "corpus_file"}, file_types=[".conv", ".txt"], elem_id="corpus-file", height=150
            )
            component(gr.Markdown, {"value": "corpus_info"}, padding=True)
            self.preset = component(
                gr.Radio, {"label": "preset", "info": "preset_info"}, choices=[*PRESETS], value=PRESETS[0],
                elem_id="preset",
            )  # fmt: skip
            self.minutes = component(
                gr.Slider, {"label": "minutes", "info": "minutes_info"}, minimum=1, maximum=120, step=1, value=10,
                elem_id="minutes", buttons=[], interactive=True,
            )  # fmt: skip
        self.start = component(gr.Button, {"value": "train_start"}, variant="primary", elem_id="train-start")
        self.stop = component(gr.Button, {"value": "train_stop"}, visible=False, elem_id="train-stop")
        with gr.Group(visible=False, elem_id="resume-group") as self.resuming:
            self.stopped = component(gr.Dropdown, {"label": "resume_which"}, elem_id="resume-which", filterable=False)
            self.resume = component(gr.Button, {"value": "train_resume"}, elem_id="train-resume")

    def _build_progress(self) -> None:
        component = self._texts.component
        self.status = gr.Markdown(text("train_none", DEFAULT_LANGUAGE), elem_id="train-status")
        self.chat_with = component(
            gr.Button, {"value": "chat_with"}, variant="primary", visible=False, elem_id="chat-with"
        )
        with gr.Row():
            options = {"x": "step", "y": "value", "y_title": " ", "height": 220, "buttons": [], "visible": False}
            self.loss = component(gr.LinePlot, {"label": "loss_curve", "x_title": "steps"}, **options)
            self.bits = component(gr.LinePlot, {"label": "bits_curve", "x_title": "steps"}, **options)
        self.samples = component(
            gr.Dataframe, {"label": "train_samples"}, interactive=False, wrap=True, visible=False, elem_id="samples"
        )
        with component(gr.Accordion, {"label": "doctor"}, open=True, visible=False) as self.doctor:
            self.report = gr.Textbox(show_label=False, container=False, lines=12, max_lines=24, elem_id="doctor")

    # what happens

    def _connect(self) -> None:
        language = self._language
        self._watched = [
            self.status, self.start, self.stop, self.resuming, self.stopped, self.chat_with, self.loss, self.bits,
            self.samples, self.clock,
        ]  # fmt: skip
        self.file.change(self.examine, [language, self.file], [self.doctor, self.report], **_EVENT)
        self.start.click(self.begin, [language, self.file, self.preset, self.minutes], self._watched, **_EVENT)
        self.stop.click(self.end, language, self._watched, **_EVENT)
        self.resume.click(self.go_on, [language, self.stopped], self._watched, **_EVENT)
        self.clock.tick(self.watch, language, self._watched, **_EVENT)

    def connect_tabs(self, tabs: gr.Tabs, own: gr.Tab) -> None:
        """Looks whenever the tab is opened, and takes visitors to the chat with what was trained."""
        own.select(self.watch, self._language, self._watched, **_EVENT)
        self.chat_with.click(self.to_the_chat, self._language, [self._chat.model, tabs], **_EVENT)

    def examine(self, language: str, path: object) -> tuple[Any, Any]:
        """The doctor's report on a file that was just uploaded."""
        if not isinstance(path, str):
            return gr.update(visible=False), ""
        try:
            found = examine(path)
        except UserError as error:
            # The file by its name: where the server put it is of no use to anybody.
            return gr.update(visible=True), str(error).replace(path, Path(path).name)
        return gr.update(visible=True), describe(found).replace(path, Path(path).name)

    def begin(self, language: str, path: object, preset: object, minutes: object) -> list[Any]:
        """Starts a run."""
        corpus = path if isinstance(path, str) else None
        return self._try(
            language, lambda: self.training.start(corpus, preset, minutes, Path(corpus).stem if corpus else "")
        )

    def go_on(self, language: str, name: object) -> list[Any]:
        """Goes on with a run that was stopped."""
        return self._try(language, lambda: self.training.resume(name))

    def end(self, language: str) -> list[Any]:
        """Asks the run to save and stop."""
        return self._try(language, self.training.stop)

    def _try(self, language: str, action: Any) -> list[Any]:
        try:
            action()
        except UserError as error:
            gr.Warning(escape(sentence_for(error, language)))
        except OSError as error:
            gr.Warning(escape(describe_os_error(error)))
        return self.watch(language)

    def watch(self, language: str) -> list[Any]:
        """How the run stands now."""
        progress = self.training.progress()
        resumable = [] if progress.is_alive else self.training.resumable()
        model_is_there = f"runs/{progress.name}" in self._shelf.names()
        table = [[prompt, *replies] for prompt, replies in progress.samples]
        stages = max((len(row) - 1 for row in table), default=0)
        headers = [text("prompt", language), *text("stages", language).split("|")[:stages]]
        return [
            status(progress, language),
            gr.update(interactive=not progress.is_alive),
            gr.update(visible=progress.is_alive, interactive=progress.state != "stopping"),
            gr.update(visible=bool(resumable)),
            gr.update(choices=resumable, value=resumable[0] if resumable else None),
            gr.update(visible=model_is_there),
            drawn(progress.losses),
            drawn(progress.bits),
            gr.update(visible=bool(table), headers=headers, value=table),
            gr.Timer(active=progress.is_alive),
        ]

    def to_the_chat(self, language: str) -> tuple[Any, Any]:
        """Chooses the model that was trained, and opens the chat."""
        name = f"runs/{self.training.progress().name}"
        if name not in self._shelf.names():
            return gr.skip(), gr.skip()
        return gr.update(choices=model_choices(self._shelf, language), value=name), gr.Tabs(selected="chat")

    # the page's language

    @property
    def localized(self) -> list[gr.blocks.Block]:
        """The components that ``localize`` updates."""
        return [self.status]

    def localize(self, language: str) -> list[Any]:
        """What is not a plain text of texts.py, in ``language``."""
        return [status(self.training.progress(), language)]


def status(progress: Progress, language: str) -> str:
    """How the run stands, in a sentence or two."""
    name = escape(progress.name)
    if progress.state == "failed":
        return text("train_failed", language, name=name, sentence=escape(progress.sentence))
    said = text(f"train_{progress.state}", language, name=name)
    if not progress.losses:
        return said
    numbers = {"minutes": progress.seconds / 60, "steps": progress.losses[-1][0], "speed": progress.tokens_per_second}
    said += " " + text("train_numbers", language, **numbers)
    if progress.bits:
        said += " " + text("train_bits", language, bits=progress.bits[-1][1])
    return said


def drawn(points: list[tuple[int, float]]) -> dict[str, Any]:
    """The update of a gr.LinePlot; there is nothing to see before there is a line."""
    return gr.update(visible=True, value=curve(points)) if len(points) > 1 else gr.update(visible=False)


def curve(points: list[tuple[int, float]]) -> pd.DataFrame:
    """The points as gr.LinePlot takes them: at most POINTS, each the mean of those it stands for."""
    size = -(-len(points) // POINTS) or 1
    bunches = [points[at : at + size] for at in range(0, len(points), size)]
    return pd.DataFrame(
        {
            "step": [bunch[-1][0] for bunch in bunches],
            "value": [sum(value for _, value in bunch) / len(bunch) for bunch in bunches],
        }
    )
