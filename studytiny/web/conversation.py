"""Between Gradio's chat history and the Generator: plain functions on plain messages."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Iterator

from studytiny.errors import UserError
from studytiny.generator import Generator
from studytiny.safety import is_filter_on, safe_stream
from studytiny.sampling import SamplingConfig

Turns = list[dict[str, str]]

YIELD_SECONDS = 0.05  # a phone draws no more often anyway, and every update costs the server a millisecond
MAX_MESSAGE = 2000  # characters; longer than any model's window here, far below what would trouble a browser
MAX_TURNS = 200  # of a history, latest ones kept: no window holds more
_ZERO_WIDTH_JOINER = "\N{ZERO WIDTH JOINER}"  # holds emoji such as a family together


def clean_text(text: str) -> str:
    """What a person could have typed: no control characters, half emoji or marks that turn the direction of text.

    Line breaks and tabs become spaces, since a turn of the models' corpora is one line.
    """
    kept = []
    for character in text:
        if character in "\n\r\t\u2028\u2029":
            kept.append(" ")
        elif character == _ZERO_WIDTH_JOINER or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
            kept.append(character)
    return "".join(kept).strip()


# What starts a tag or an entity. Gradio shows messages as HTML (cleaned, but a remote picture would stay), so these two
# marks are written as entities on their way to the page; a lone "<" or "&", as in >_< or 1 < 2, is left as it is.
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def show(turns: Turns) -> Turns:
    """``turns`` for the page: HTML in them is seen as text. ``flatten`` undoes it."""
    return [{**turn, "content": _MARKUP.sub(lambda mark: _ENTITIES[mark[0]], turn["content"])} for turn in turns]


def unshow(text: str) -> str:
    """A text of the page as it was written."""
    return text.replace("&lt;", "<").replace("&amp;", "&")


def flatten(history: object) -> Turns:
    """The page's history as ``{"role", "content"}`` with plain strings.

    Gradio hands over ``{"role", "content": [{"type": "text", "text"}, ...]}``; an API client may send anything.

    Raises:
        UserError: not a list of messages.
    """
    if not isinstance(history, list):
        raise UserError('每条消息应是 {"role": "user", "content": "文字"} 的形式。')
    return [_flatten_message(message) for message in history[-MAX_TURNS:]]


def _flatten_message(message: object) -> dict[str, str]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        pieces = [piece.get("text") if isinstance(piece, dict) else piece for piece in content]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
    if not isinstance(content, str):
        raise UserError('每条消息应是 {"role": "user", "content": "文字"} 的形式。')
    if message.get("role") not in ("user", "assistant"):
        raise UserError(f"不认识的角色 {message.get('role')!r}；只能是 user 或 assistant。")
    return {"role": message["role"], "content": clean_text(unshow(content))}


def sampling_from(
    temperature: object,
    top_k: object,
    repetition_penalty: object,
    max_new_tokens: object,
    top_p: object,
    seed: object,
) -> SamplingConfig:
    """The settings as the page's controls hold them; an empty seed is None.

    Raises:
        UserError: of the wrong type, not finite or out of range.
    """
    return SamplingConfig(
        temperature=temperature,
        top_k=_whole(top_k),
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=_whole(max_new_tokens),
        seed=_seed(seed),
    )


def _whole(value: object) -> object:
    """50.0 as 50: JSON knows only one kind of number. Anything else is left for SamplingConfig to judge."""
    return int(value) if type(value) is float and value.is_integer() else value


def _seed(value: object) -> object:
    """The seed of the page's text box: "7" as 7, nothing as None."""
    if not isinstance(value, str):
        return _whole(value)
    digits = value.strip()
    return int(digits) if re.fullmatch(r"-?[0-9]{1,30}", digits) else digits[:40] or None


def stream_reply(generator: Generator, turns: Turns, sampling: SamplingConfig, caller: str = "") -> Iterator[str]:
    """The reply so far, again and again, at most one every ``YIELD_SECONDS``; closing it stops the model. A reply that
    turns rude starts again, see ``studytiny.safety``.

    Raises:
        UserError: at once, before the first text.
    """
    return _paced(safe_stream(generator, turns, sampling, caller, is_filter_on("page")))


def _paced(texts: Iterator[str], seconds: float = YIELD_SECONDS) -> Iterator[str]:
    """Leaves out some of ``texts``: the first comes at once, then one every ``seconds``, and the last always."""
    said, shown, last = "", "", 0.0
    try:
        for said in texts:
            now = time.monotonic()
            if not shown or now - last >= seconds:
                shown, last = said, now
                yield shown
        if said != shown:
            yield said
    finally:
        texts.close()  # a visitor who leaves or presses Stop must not cost another character
