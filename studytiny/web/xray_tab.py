"""The X-ray tab: a reply character by character. How sure the model was, what else it considered, what the sliders
would change, where its heads looked, and how the reply could have gone on.

Nothing is remembered from when the reply was written: the model reads the conversation once more, which takes a moment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr

from studytiny.errors import UserError
from studytiny.generator import Generator
from studytiny.safety import help_for, is_filter_on
from studytiny.sampling import SamplingConfig
from studytiny.tokenizer import SPECIAL_TOKENS, Message
from studytiny.web.chat_events import caller_of, sentence_for
from studytiny.web.chat_tab import ChatTab, setting_slider
from studytiny.web.conversation import clean_text, flatten, sampling_from
from studytiny.web.language import Texts
from studytiny.web.lessons_tab import Lessons
from studytiny.web.models import ModelShelf
from studytiny.web.older_gradio import LOSES_HIDDEN
from studytiny.web.texts import text
from studytiny.web.xray_views import attention_spans, bars, percent, reply_spans, token_rows, written
from studytiny.word_lists import is_rude, speaks_of_suicide
from studytiny.xray import Inside, chances, look_inside

SHOWN = 10  # candidates
KEPT = 4  # looks inside, of all visitors together: a long one takes 17 MB
MAX_TOKENS_SHOWN = 400  # of the tokenizer view
_EVENT = {"concurrency_limit": 4, "concurrency_id": "xray", "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model by name and a conversation that ends with its reply."""

    model: str
    messages: tuple[tuple[str, str], ...]  # (role, content)

    @property
    def turns(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.messages]


class Looks:
    """``look_inside``, with the last few results kept: every slider that moves asks for the same one again."""

    def __init__(self, shelf: ModelShelf) -> None:
        self._shelf = shelf
        self._kept: OrderedDict[tuple[int, Subject], tuple[Generator, Inside]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, subject: Subject) -> tuple[Generator, Inside]:
        """The generator of the subject's model and the look.

        Raises:
            UserError: no such model, or a conversation that it cannot read.
        """
        generator = self._shelf.generator(subject.model)
        key = (id(generator), subject)  # a run that went on training is another generator
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = (generator, look_inside(generator.model, generator.tokenizer, subject.turns))
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found


class XrayTab:
    """Builds the tab inside the current Blocks. ``localized`` and ``localize`` are for the page's language switch."""

    def __init__(self, shelf: ModelShelf, texts: Texts, language: gr.Radio, chat: ChatTab, lessons: Lessons) -> None:
        self._shelf = shelf
        self._lessons = lessons
        self._looks = Looks(shelf)
        self._texts = texts
        self._language = language
        self._chat = chat
        self.subject = gr.State(None)  # Subject
        texts.component(gr.Markdown, {"value": "xray_intro"}, elem_id="xray-intro")
        self._lessons.link(2)
        self.empty = gr.Markdown(visible=True, elem_id="xray-empty")
        with gr.Column(visible=False, elem_id="xray") as self.body:
            self._build_reply()
            with gr.Row():
                with gr.Column(scale=7, min_width=320):
                    self._build_candidates()
                with gr.Column(scale=3, min_width=280):
                    self._build_settings()
            self._build_attention()
        with texts.component(gr.Accordion, {"label": "tokens"}, open=False, elem_id="tokens"):
            self._build_tokens()
        self._connect()

    # what is on the page

    def _build_reply(self) -> None:
        component = self._texts.component
        self.which = component(
            gr.Dropdown, {"label": "which_reply", "info": "which_reply_info"}, elem_id="which", filterable=False
        )
        self.reply = component(
            gr.HighlightedText,
            {"label": "xray_reply"},
            elem_id="xray-reply",
            interactive=False,
            show_whitespaces=True,
        )
        self.place = component(
            gr.Slider,
            {"label": "place", "info": "place_info"},
            minimum=1,
            maximum=2,
            step=1,
            value=1,
            elem_id="place",
            buttons=[],
            interactive=True,
        )

    def _build_candidates(self) -> None:
        component = self._texts.component
        component(gr.Markdown, {"value": "candidates_intro"}, elem_id="candidates-intro")
        self._lessons.link(3)
        self.table = gr.HTML(elem_id="candidates", padding=False)
        self.verdict = gr.Markdown(elem_id="verdict")
        with gr.Row():
            self.other = component(gr.Dropdown, {"label": "other_candidate"}, elem_id="other", filterable=False)
            self.go_on = component(gr.Button, {"value": "go_on"}, elem_id="go-on")
        self.note = gr.Markdown(elem_id="what-if")
        self._lessons.link(5)

    def _build_settings(self) -> None:
        with gr.Group(elem_id="xray-settings"):
            self._texts.component(gr.Markdown, {"value": "xray_settings"}, padding=True)
            self.settings = [
                setting_slider(self._texts, name, f"xray-{name}")
                for name in ("temperature", "top_k", "repetition_penalty", "top_p")
            ]

    def _build_attention(self) -> None:
        component = self._texts.component
        component(gr.Markdown, {"value": "attention_intro"}, elem_id="attention-intro")
        self._lessons.link(4)
        with gr.Row():
            self.layer = component(gr.Radio, {"label": "layer"}, elem_id="layer")
            self.head = component(gr.Radio, {"label": "head"}, elem_id="head")
        self.looks = component(
            gr.HighlightedText, {"label": "looked_at"}, elem_id="looked-at", interactive=False, show_whitespaces=True
        )
        self.blind = gr.Markdown(visible=False, elem_id="blind")

    def _build_tokens(self) -> None:
        component = self._texts.component
        component(gr.Markdown, {"value": "tokens_intro"})
        self._lessons.link(1)
        self.text = component(
            gr.Textbox, {"label": "tokens_text", "placeholder": "tokens_hint"}, max_lines=3, elem_id="tokens-text"
        )
        self.tokens = gr.Dataframe(interactive=False, wrap=False, elem_id="token-table", max_height=360)

    # what happens

    def _connect(self) -> None:
        chat, language = self._chat, self._language
        view = [self.empty, self.body, self.reply, self.place, self.layer, self.head, self.note]
        start = [self.subject, self.which, *self.settings, *view]
        details = [self.table, self.verdict, self.other]
        at_place = [language, self.subject, self.place, *self.settings]
        attention = [language, self.subject, self.place, self.layer, self.head]
        seen = [self.looks, self.blind]

        def show_all(event: Any) -> None:
            """After ``event`` changed the reply or the place: everything below follows."""
            event.then(self.show_candidates, at_place, details, **_EVENT)
            event.then(self.show_attention, attention, seen, **_EVENT)

        self._opened = [language, chat.chat, chat.model, *chat.settings]
        self._start, self._show_all = start, show_all
        show_all(self.which.input(self.choose, [language, chat.chat, chat.model, self.which], [self.subject, *view],
                                  **_EVENT))  # fmt: skip
        show_all(self.reply.select(self.pick, self.place, self.place, **_EVENT))
        for event in (self.place.input, language.input):
            show_all(event(lambda: None, None, None, **_EVENT))
        for slider in self.settings:
            slider.change(self.show_candidates, at_place, details, **_EVENT)
        for choice in (self.layer, self.head):
            choice.input(self.show_attention, attention, seen, **_EVENT)
        show_all(self.go_on.click(self.continue_with, [*at_place, self.other], [self.subject, *view], **_EVENT))
        for event in (self.text.change, chat.model.change):
            event(self.show_tokens, [language, chat.model, self.text], self.tokens, **_EVENT)

    def connect_opening(self, tab: gr.Tab) -> None:
        """Looks at the conversation as it stands whenever ``tab`` is opened."""
        opening = tab.select
        if LOSES_HIDDEN:
            opening = tab.select(lambda: gr.update(visible=True), None, self.body, **_EVENT).then
        self._show_all(opening(self.open, self._opened, self._start, **_EVENT))
        tab.select(self.show_tokens, [self._language, self._chat.model, self.text], self.tokens, **_EVENT)

    def open(self, language: str, history: object, model: object, *settings: object) -> list[Any]:
        """The last reply of the chat, with the chat's own settings."""
        temperature, top_k, penalty, _, top_p, _ = settings
        replies = reply_choices(_turns(history))
        last = replies[-1][1] if replies else None
        which = gr.update(choices=replies, value=last)
        subject, *view = self.choose(language, history, model, last)
        return [subject, which, temperature, top_k, penalty, top_p, *view]

    def choose(self, language: str, history: object, model: object, which: object) -> list[Any]:
        """Another reply of the chat."""
        turns = _turns(history)
        if type(which) is not int or not 0 < which < len(turns) or turns[which]["role"] != "assistant":
            return self._nothing(text("xray_empty", language))
        messages = tuple((turn["role"], turn["content"]) for turn in turns[: which + 1])
        return self._view(Subject(str(model), messages), language)

    def _view(self, subject: Subject, language: str, place: int = 1, note: str = "") -> list[Any]:
        try:
            generator, inside = self._looks(subject)
        except UserError as error:
            return self._nothing(escape(sentence_for(error, language)))
        spans = reply_spans(inside, generator.tokenizer, language)
        layers, heads = inside.attention.shape[:2] if inside.attention is not None else (0, 0)
        return [
            subject,
            gr.update(visible=False),
            gr.update(visible=True),
            spans,
            gr.update(maximum=max(2, len(spans)), value=min(place, len(spans))),
            gr.update(choices=[*range(1, layers + 1)], value=min(2, layers) or None, visible=layers > 0),
            gr.update(choices=[*range(1, heads + 1)], value=1 if heads else None, visible=heads > 0),
            note,
        ]

    def _nothing(self, sentence: str) -> list[Any]:
        return [None, gr.update(visible=True, value=sentence), gr.update(visible=False), *[gr.skip()] * 4, ""]

    def pick(self, event: gr.SelectData, place: object) -> Any:
        """The character that was clicked."""
        return event.index + 1 if type(event.index) is int else place

    def show_candidates(self, language: str, subject: Subject | None, place: object, *settings: object) -> list[Any]:
        """The candidates at a place, and what the sliders make of them."""
        if subject is None:
            return [gr.skip()] * 3
        try:
            generator, inside = self._looks(subject)
            sampling = _sampling(settings)
        except UserError as error:
            return ["", escape(sentence_for(error, language)), gr.skip()]
        index = _index(inside, place)
        here = inside.ids[inside.begin + index]
        rows = chances(inside, generator.tokenizer, index, sampling, SHOWN)
        best, name = rows[0], written(generator.tokenizer, rows[0].token_id, language)
        verdict = text("verdict", language, place=index + 1, token=name, percent=percent(best.probabilities[-1]))
        others = [
            (f"{written(generator.tokenizer, row.token_id, language)}　{percent(row.probabilities[0])}", row.token_id)
            for row in rows
            if row.token_id != here and row.token_id >= len(SPECIAL_TOKENS)
        ]
        choice = gr.update(choices=others, value=others[0][1] if others else None)
        return [bars(rows, generator.tokenizer, here, language), escape(verdict), choice]

    def show_attention(
        self, language: str, subject: Subject | None, place: object, layer: object, head: object
    ) -> list[Any]:
        """Where one head looked before the character at a place was chosen."""
        if subject is None:
            return [gr.skip()] * 2
        try:
            generator, inside = self._looks(subject)
            layer, head = (value - 1 if type(value) is int else 0 for value in (layer, head))
            index = _index(inside, place)
            spans = attention_spans(inside, generator.tokenizer, layer, head, index, language)
        except UserError as error:
            return [gr.update(visible=False), gr.update(visible=True, value=escape(sentence_for(error, language)))]
        if spans is None:
            return [gr.update(visible=False), gr.update(visible=True, value=text("blind", language))]
        return [gr.update(visible=True, value=spans), gr.update(visible=False)]

    def continue_with(
        self,
        request: gr.Request,
        language: str,
        subject: Subject | None,
        place: object,
        temperature: object,
        top_k: object,
        penalty: object,
        top_p: object,
        other: object,
    ) -> list[Any]:
        """The reply as it could have gone on with another character at a place; the chat stays as it is."""
        if subject is None or type(other) is not int:
            return [gr.skip()] * 8
        if help_for(subject.turns[-2]["content"]) is not None:  # such a message is never the model's to answer
            gr.Warning(text("what_if_help", language))
            return [gr.skip()] * 8
        try:
            generator, inside = self._looks(subject)
            index = _index(inside, place)
            begun = [*inside.ids[inside.begin : inside.begin + index], other]
            sampling = _sampling((temperature, top_k, penalty, top_p))
            # The question's window leaves room for a reply; the beginning is part of it.
            sampling = replace(sampling, max_new_tokens=max(sampling.max_new_tokens, len(begun) + 1))
            steps = generator.stream(subject.turns[:-1], sampling, caller=caller_of(request), begun=begun)
            said = generator.tokenizer.decode(begun) + "".join(step.text for step in steps)
        except UserError as error:
            gr.Warning(escape(sentence_for(error, language)))
            return [gr.skip()] * 8
        if is_filter_on("page") and (is_rude(said) or speaks_of_suicide(said)):
            gr.Warning(text("what_if_rude", language))
            return [gr.skip()] * 8
        changed = Subject(subject.model, (*subject.messages[:-1], ("assistant", said)))
        return self._view(changed, language, index + 1, text("what_if", language))

    def show_tokens(self, language: str, model: object, typed: object) -> Any:
        """A text as the model gets it."""
        content = clean_text(typed)[:MAX_TOKENS_SHOWN] if isinstance(typed, str) else ""
        try:
            generator = self._shelf.generator(model)
        except UserError:
            return gr.skip()
        messages = [{"role": "user", "content": content}] if content else []
        rows = token_rows(generator.tokenizer, messages, language)
        return gr.update(headers=text("token_headers", language).split("|"), value=rows)

    # the page's language

    @property
    def localized(self) -> list[gr.blocks.Block]:
        """The components that ``localize`` updates."""
        return [self.empty]

    def localize(self, language: str) -> list[Any]:
        """What is not a plain text of texts.py, in ``language``."""
        return [text("xray_empty", language)]


def _turns(history: object) -> list[Message]:
    """The chat's messages; none if a client sent something else."""
    try:
        return flatten(history)
    except UserError:
        return []


def reply_choices(turns: list[Message]) -> list[tuple[str, int]]:
    """``(beginning of the reply, its index)`` of every reply."""
    return [(turn["content"][:30], i) for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]


def _index(inside: Inside, place: object) -> int:
    """The place of the page's slider, from 1 on, as an index into the reply."""
    last = len(inside.logits) - 1
    return min(max(int(place) - 1, 0), last) if type(place) in (int, float) and place == place else 0


def _sampling(settings: tuple[object, ...]) -> SamplingConfig:
    temperature, top_k, penalty, top_p = settings
    return sampling_from(temperature, top_k, penalty, SamplingConfig.max_new_tokens, top_p, None)
