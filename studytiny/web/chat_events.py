"""What happens in the chat: every way to get a reply (Enter, an example, retry, edit) and to take one back.

The conversation lives in the visitor's browser and comes along with every event; the server keeps nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from studytiny.errors import UserError
from studytiny.safety import help_for
from studytiny.web.conversation import (
    MAX_MESSAGE,
    Turns,
    clean_text,
    flatten,
    sampling_from,
    show,
    stream_reply,
    unshow,
)
from studytiny.web.models import BUNDLED, ModelShelf, UnknownModel, status_line
from studytiny.web.texts import explain, pick_language, text

Updates = Iterator[tuple[Any, Any, Any]]  # of the chat, of the message box, of the line under them


class ChatEvents:
    """The handlers; ``settings`` are the values that ``sampling_from`` takes, in its order."""

    def __init__(self, shelf: ModelShelf) -> None:
        self._shelf = shelf

    def send(
        self, request: gr.Request, history: object, message: object, language: str, model: object, *settings: object
    ) -> Updates:
        """What was typed. The box is emptied only once the message stands in the chat: nothing typed is lost."""
        typed = clean_text(message) if isinstance(message, str) else ""
        if not typed:
            gr.Info(text("empty_message", language), duration=3)
            yield gr.skip(), box_at_rest(), gr.skip()
            return
        yield from self._answer(request, history, typed, "", language, model, settings)

    def send_example(
        self,
        request: gr.Request,
        event: gr.SelectData,
        history: object,
        language: str,
        model: object,
        *settings: object,
    ) -> Updates:
        """An example that was clicked; what stands in the box stays there."""
        yield from self._answer(request, history, event.value["text"], None, language, model, settings)

    def send_again(
        self,
        request: gr.Request,
        event: gr.RetryData,
        history: object,
        language: str,
        model: object,
        *settings: object,
    ) -> Updates:
        """A message to be answered anew; what came after it goes."""
        turns = flatten(history)
        index = last_question(turns, event.index)
        if index is None:
            yield gr.skip(), box_at_rest(), gr.skip()
            return
        yield from self._answer(request, turns[:index], turns[index]["content"], None, language, model, settings)

    def send_edited(
        self,
        request: gr.Request,
        event: gr.EditData,
        history: object,
        language: str,
        model: object,
        *settings: object,
    ) -> Updates:
        """A message that was changed; what came after it goes."""
        changed = clean_text(unshow(event.value)) if isinstance(event.value, str) else ""
        turns = flatten(history)[: event.index]
        yield from self._answer(request, turns, changed, None, language, model, settings)

    def _answer(
        self,
        request: gr.Request,
        history: object,
        message: str,
        box_text: str | None,
        language: str,
        model: object,
        settings: tuple[object, ...],
    ) -> Updates:
        """Streams the chat with the reply growing; a mistake becomes one sentence and changes nothing."""
        try:
            turns, replies, before = self._begin(request, history, message, model, settings)
        except UserError as error:
            gr.Warning(escape(sentence_for(error, language)))
            yield gr.skip(), box_at_rest(), gr.skip()
            return
        place = text("in_line", language, count=before) if before else gr.skip()
        yield show(turns), box_in_use(box_text), place
        reply, begun, at_first = "", 0.0, 0
        try:
            for reply in replies:
                status = gr.skip()
                if not begun:
                    begun, at_first = time.perf_counter(), len(reply)
                    status = status_line(str(model), language) if before else status
                yield show([*turns, {"role": "assistant", "content": reply}]), gr.skip(), status
            if len(reply) > at_first:  # else it came in one piece, or was drawn anew
                speed = (len(reply) - at_first) / (time.perf_counter() - begun)
                yield gr.skip(), gr.skip(), status_line(str(model), language, speed)
        except UserError as error:  # it had to give way, or the model broke; what was said stays
            gr.Warning(escape(sentence_for(error, language)))
            yield gr.skip(), gr.skip(), status_line(str(model), language)

    def _begin(
        self, request: gr.Request, history: object, message: str, model: object, settings: tuple[object, ...]
    ) -> tuple[Turns, Iterator[str], int]:
        """The conversation, the reply as it grows, and how many wait for theirs before it begins."""
        turns = [*flatten(history), {"role": "user", "content": message}]
        answer = help_for(message)
        if answer is not None:  # first of all: no wrong setting, length or missing model may stand in the way of it
            return turns, iter([answer]), 0
        if len(message) > MAX_MESSAGE:
            raise MessageTooLong(len(message))
        sampling = sampling_from(*settings)
        generator = self._shelf.generator(model)
        before = generator.in_line
        return turns, stream_reply(generator, turns, sampling, caller_of(request)), before

    def chat(
        self,
        request: gr.Request,
        message: str,
        history: list[dict[str, Any]] = [],  # noqa: B006 - Gradio shows it in the API's description; never changed
        model: str = BUNDLED,
        temperature: float = 0.5,
        top_k: int = 50,
        top_p: float = 0.9,
        repetition_penalty: float = 1.1,
        max_new_tokens: int = 100,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The reply to ``message`` after ``history`` (openai-style messages); each text is all of it so far."""
        try:
            typed = clean_text(message) if isinstance(message, str) else ""
            settings = (temperature, top_k, repetition_penalty, max_new_tokens, top_p, seed)
            _, replies, _ = self._begin(request, history, typed, model, settings)
            yield from replies
        except UserError as error:
            language = pick_language(request.headers.get("accept-language") if request else None)
            raise gr.Error(sentence_for(error, language), print_exception=False) from error

    def next_characters(
        self,
        request: gr.Request,
        message: str,
        history: list[dict[str, Any]] = [],  # noqa: B006 - see ``chat``
        model: str = BUNDLED,
        count: int = 10,
    ) -> list[dict[str, Any]]:
        """The characters that the reply to ``message`` is most likely to begin with, and the model's own probability of
        each."""
        try:
            if type(count) is not int or count < 1:
                raise UserError(f"count 应是 1 到 1000 的整数，收到的是 {count!r}。")
            typed = clean_text(message) if isinstance(message, str) else ""
            generator = self._shelf.generator(model)
            chances = generator.logits([*flatten(history), {"role": "user", "content": typed}]).softmax(-1)
            best = chances.topk(min(count, 1000, len(chances)))
        except UserError as error:
            language = pick_language(request.headers.get("accept-language") if request else None)
            raise gr.Error(sentence_for(error, language), print_exception=False) from error
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [{"character": generator.tokenizer.token(index), "probability": p} for p, index in pairs]


def caller_of(request: gr.Request | None) -> str:
    """Who asks: one page in one browser, or one client of the API. None while a test or a program calls directly."""
    return getattr(request, "session_hash", None) or ""


class MessageTooLong(UserError):
    """Longer than the page takes at all, whatever the model."""

    def __init__(self, length: int) -> None:
        super().__init__(text("message_too_long", "zh", length=length, limit=MAX_MESSAGE))
        self.length = length


def sentence_for(error: UserError, language: str) -> str:
    """The error in the visitor's language."""
    if isinstance(error, MessageTooLong):
        return text("message_too_long", language, length=error.length, limit=MAX_MESSAGE)
    if isinstance(error, UnknownModel):
        return text("unknown_model", language, name=error.name)
    return explain(error, language)


def undo(history: object) -> tuple[Turns, Any]:
    """Takes the last message and its reply back; the message returns to the box."""
    turns = flatten(history)
    index = last_question(turns)
    if index is None:
        return show(turns), box_at_rest()
    return show(turns[:index]), box_at_rest(turns[index]["content"])


def clear() -> tuple[Turns, Any]:
    """An empty chat, also when a reply was still growing."""
    return [], box_at_rest()


def last_question(turns: Turns, index: object = None) -> int | None:
    """Index of the user's message at or before ``index`` (the last of all if it is none): Gradio names the message or
    the reply that was clicked."""
    start = index if type(index) is int and 0 <= index < len(turns) else len(turns) - 1
    return next((place for place in range(start, -1, -1) if turns[place]["role"] == "user"), None)


def box_in_use(value: str | None) -> dict[str, Any]:
    """The message box while a reply is written: Stop in place of Send; None leaves the text."""
    return gr.update(submit_btn=False, stop_btn=True, **({} if value is None else {"value": value}))


def box_at_rest(value: str | None = None) -> dict[str, Any]:
    """The message box when nothing is being written; None leaves the text."""
    return gr.update(submit_btn=True, stop_btn=False, **({} if value is None else {"value": value}))
