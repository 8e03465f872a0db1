"""The chat as it is laid out: messages on one side, the model and its settings on the other, and what wires them."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from studytiny.errors import UserError
from studytiny.sampling import SamplingConfig
from studytiny.web.chat_events import ChatEvents, box_at_rest, clear, undo
from studytiny.web.conversation import sampling_from
from studytiny.web.language import Texts
from studytiny.web.models import (
    BUNDLED,
    Download,
    ModelShelf,
    describe_download,
    describe_failure,
    describe_model,
    label_of,
    status_line,
)
from studytiny.web.texts import DEFAULT_LANGUAGE, EXAMPLES

_DEFAULTS = SamplingConfig()
# What a visitor or a model writes is never HTML, a picture or a formula.
TEXT_ONLY = {"render_markdown": False, "sanitize_html": True, "allow_tags": False, "latex_delimiters": []}
_RANGES = {  # of the sliders: lowest, highest, step
    "temperature": (0, 2, 0.05),
    "top_k": (0, 200, 1),
    "repetition_penalty": (1, 2, 0.05),
    "max_new_tokens": (1, 200, 1),
    "top_p": (0.05, 1, 0.05),
}
# The generator answers many at once, keeps the others in line and turns away who finds it full: all may come to it.
REPLY = {"concurrency_limit": None, "concurrency_id": "reply", "show_progress": "hidden", "api_visibility": "private"}
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class ChatTab:
    """Builds the chat inside the current Blocks. ``localized`` and ``localize`` are for the page's language switch."""

    def __init__(self, shelf: ModelShelf, texts: Texts, language: gr.Radio) -> None:
        self._shelf = shelf
        self._texts = texts
        self._language = language
        with gr.Row(elem_classes="chat-row"):
            with gr.Column(scale=7, min_width=320, elem_classes="chat-column"):
                self._build_chat()
            with gr.Column(scale=3, min_width=300, elem_classes="settings-column"):
                self._build_models()
                self._build_settings()
        self._connect()

    # what is on the page

    def _build_chat(self) -> None:
        self.chat = self._texts.component(
            gr.Chatbot,
            {"label": "chat", "placeholder": "placeholder"},
            elem_id="chat",
            show_label=False,
            layout="bubble",
            height=None,
            buttons=["copy", "copy_all"],
            feedback_options=None,
            editable="user",
            examples=example_cards(DEFAULT_LANGUAGE),
            group_consecutive_messages=False,
            **TEXT_ONLY,
        )
        self.box = self._texts.component(
            gr.Textbox,
            {"label": "message", "placeholder": "message_hint"},
            elem_id="message",
            show_label=False,
            lines=1,
            max_lines=5,
            autofocus=True,
            submit_btn=True,
        )
        self.status = gr.Markdown(elem_id="status")

    def _build_models(self) -> None:
        with gr.Group(elem_id="models"):
            self.model = self._texts.component(
                gr.Dropdown,
                {"label": "model", "info": "model_info"},
                choices=model_choices(self._shelf, DEFAULT_LANGUAGE),
                value=BUNDLED,
                elem_id="model",
                filterable=False,
                interactive=True,
            )
            self.note = gr.Markdown(elem_id="model-note", padding=True)
            self.download = gr.HTML(elem_id="download", padding=False)
            self.again = self._texts.component(
                gr.Button, {"value": "download_again"}, size="sm", visible=False, elem_id="again"
            )
        self.clock = gr.Timer(1, active=False)  # ticks only while the download runs

    def _build_settings(self) -> None:
        with gr.Group(elem_id="settings"):
            self._texts.component(gr.Markdown, {"value": "settings"}, elem_id="settings-title", padding=True)
            temperature = setting_slider(self._texts, "temperature", "temperature")
            top_k = setting_slider(self._texts, "top_k", "top_k")
            penalty = setting_slider(self._texts, "repetition_penalty", "repetition_penalty")
            length = setting_slider(self._texts, "max_new_tokens", "max_new_tokens")
        with self._texts.component(gr.Accordion, {"label": "more"}, open=False, elem_id="more"):
            top_p = setting_slider(self._texts, "top_p", "top_p")
            # Text, not gr.Number: an empty number inside a closed accordion turns into 0 once that is opened.
            seed = self._texts.component(
                gr.Textbox, {"label": "seed", "info": "seed_info"}, max_lines=1, elem_id="seed"
            )
        self.reset = self._texts.component(gr.Button, {"value": "reset"}, size="sm", elem_id="reset")
        self.settings = [temperature, top_k, penalty, length, top_p, seed]  # in the order of ``sampling_from``
        self.kept = gr.BrowserState(default_settings(), storage_key="studytiny-settings", secret="studytiny")

    # what happens

    def _connect(self) -> None:
        chat, box, events = self.chat, self.box, ChatEvents(self._shelf)
        context = [self._language, self.model, *self.settings]
        replies = [
            box.submit(events.send, [chat, box, *context], [chat, box, self.status], **REPLY),
            chat.example_select(events.send_example, [chat, *context], [chat, box, self.status], **REPLY),
            chat.retry(events.send_again, [chat, *context], [chat, box, self.status], **REPLY),
            chat.edit(events.send_edited, [chat, *context], [chat, box, self.status], **REPLY),
        ]
        for reply in replies:
            reply.then(box_at_rest, None, box, **AT_ONCE)
        # Each first ends a reply that is still growing, whose last words might otherwise come after.
        named = [self._language, self.model]
        box.stop(None, cancels=replies, **AT_ONCE).then(self.rest, named, [box, self.status], **AT_ONCE)
        chat.undo(None, cancels=replies, **AT_ONCE).then(undo, chat, [chat, box], **AT_ONCE)
        chat.clear(None, cancels=replies, **AT_ONCE).then(clear, None, [chat, box], **AT_ONCE)

        self.model.change(self.describe_model, [self._language, self.model], [self.note, self.status], **AT_ONCE)
        self.reset.click(default_settings, None, self.settings, **AT_ONCE)
        for setting in self.settings:
            setting.change(lambda *values: list(values), self.settings, self.kept, **AT_ONCE)
        self.clock.tick(self.watch_download, self._language, self._watched, **AT_ONCE)
        self.again.click(self.download_again, self._language, self._watched, **AT_ONCE)
        gr.api(events.chat, api_name="chat", concurrency_limit=None, concurrency_id="reply")
        gr.api(events.next_characters, api_name="next_characters", concurrency_limit=4)

    @property
    def _watched(self) -> list[gr.blocks.Block]:
        return [self.model, self.download, self.again, self.clock]

    @property
    def localized(self) -> list[gr.blocks.Block]:
        """The components that ``localize`` updates; ``model`` stands once more among them, as the chosen one."""
        return [self.chat, self.note, self.status, *self._watched]

    def localize(self, language: str, model: str) -> list[Any]:
        """What is not a plain text of texts.py, in ``language``."""
        return [
            gr.update(examples=example_cards(language)),
            *self.describe_model(language, model),
            *self.watch_download(language),
        ]

    def describe_model(self, language: str, model: str) -> tuple[str, str]:
        """What the model is, beside the list; and which one answers, under the chat."""
        return describe_model(self._shelf, model, language), status_line(model, language)

    def rest(self, language: str, model: str) -> tuple[Any, str]:
        """The box and the line under the chat after a reply was stopped."""
        return box_at_rest(), status_line(model, language)

    def watch_download(self, language: str) -> tuple[Any, Any, Any, Any]:
        """The model list, the progress, whether to offer another try, and whether to look again in a second."""
        download = self._shelf.download
        return (
            gr.update(choices=model_choices(self._shelf, language)),
            download_status(download, language),
            gr.update(visible=download.state == "failed"),
            gr.Timer(active=download.state == "running"),
        )

    def download_again(self, language: str) -> tuple[Any, Any, Any, Any]:
        """Another try after a failure."""
        self._shelf.retry_download()
        return self.watch_download(language)


def setting_slider(texts: Texts, name: str, elem_id: str, value: float | None = None) -> gr.Slider:
    """A slider for the field ``name`` of SamplingConfig, at its default if no ``value`` is given."""
    low, high, step = _RANGES[name]
    return texts.component(
        gr.Slider,
        {"label": name, "info": f"{name}_info"},
        minimum=low,
        maximum=high,
        step=step,
        value=getattr(_DEFAULTS, name) if value is None else value,
        elem_id=elem_id,
        buttons=[],
        interactive=True,
    )


def example_cards(language: str) -> list[dict[str, str]]:
    """The examples to click; outside Chinese each says what it means."""
    return [
        {"text": said, "display_text": said if language == "zh" else f"{said} · {meaning}"}
        for said, meaning in EXAMPLES
    ]


def model_choices(shelf: ModelShelf, language: str) -> list[tuple[str, str]]:
    """``(label, name)`` of every model that can answer."""
    return [(label_of(name, language), name) for name in shelf.names()]


def default_settings() -> list[Any]:
    """Values of the settings, in the order of ``sampling_from``."""
    names = ("temperature", "top_k", "repetition_penalty", "max_new_tokens", "top_p")
    return [*(getattr(_DEFAULTS, name) for name in names), ""]


def restored_settings(kept: object) -> list[Any]:
    """What the browser kept of an earlier visit; the defaults if that makes no sense."""
    try:
        sampling_from(*kept)
    except (TypeError, UserError):  # it is the visitor's to change
        return default_settings()
    return list(kept)


def download_status(download: Download, language: str) -> str:
    """The download as HTML: a sentence, with a bar while it runs, or what to do after it failed."""
    sentence, percent = describe_download(download, language)
    if not sentence:
        return ""
    if download.error is not None:
        more = escape(describe_failure(download.error, language))
        return f'<details class="download"><summary>{escape(sentence)}</summary><p>{more}</p></details>'
    bar = ""
    if percent is not None:
        bar = f'<progress max="100" value="{percent:.1f}" aria-label="StudyTinyModel"></progress>'
    return f'<div class="download" role="status"><p>{escape(sentence)}</p>{bar}</div>'
