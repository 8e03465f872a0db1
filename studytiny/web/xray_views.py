"""What the X-ray tab shows, as values of Gradio's components: plain functions of a look inside (``studytiny.xray``)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from studytiny.tokenizer import ASSISTANT_ID, END_ID, UNK_ID, USER_ID, Message, Tokenizer
from studytiny.web.texts import text
from studytiny.xray import STAGES, Chance, Inside, certainty, looked_at

Spans = list[tuple[str, float | None]]  # of gr.HighlightedText: a piece of text, and how deep its colour is, 0 to 1

DEEPEST = 0.75  # at 1 the text on it would be hard to read

_MARKS = {USER_ID: "mark_user", ASSISTANT_ID: "mark_assistant", END_ID: "mark_end", UNK_ID: "mark_unknown"}


def written(tokenizer: Tokenizer, token_id: int, language: str) -> str:
    """A token as people read it; the special ones by what they mean."""
    if token_id in _MARKS:
        return text(_MARKS[token_id], language)
    token = tokenizer.token(token_id)
    return "␣" if token == " " else token


def reply_spans(inside: Inside, tokenizer: Tokenizer, language: str) -> Spans:
    """The reply up to its end, each token as deep as the probability that the model itself gave it."""
    tokens = inside.ids[inside.begin :]
    return [(written(tokenizer, t, language), DEEPEST * p) for t, p in zip(tokens, certainty(inside), strict=True)]


def attention_spans(
    inside: Inside, tokenizer: Tokenizer, layer: int, head: int, index: int, language: str
) -> Spans | None:
    """All that was read before place ``index`` of the reply; the place that the head looked at most is the deepest."""
    shares = looked_at(inside, layer, head, index)
    if shares is None:
        return None
    most = max(shares)
    return [
        (written(tokenizer, token, language), DEEPEST * share / most)
        for token, share in zip(inside.ids, shares, strict=False)
    ]


def bars(rows: Sequence[Chance], tokenizer: Tokenizer, here: int, language: str) -> str:
    """The candidates as an HTML table: a column for each stage, a bar in each cell; ``here`` is what the reply has."""
    head = "".join(f'<th scope="col">{escape(text(f"stage_{stage}", language))}</th>' for stage in STAGES)
    body = []
    for row in rows:
        cells = "".join(f'<td style="--share:{100 * p:.1f}%">{escape(percent(p))}</td>' for p in row.probabilities)
        name = escape(written(tokenizer, row.token_id, language))
        mark = f' class="here" title="{escape(text("stands_here", language))}"' if row.token_id == here else ""
        body.append(f'<tr{mark}><th scope="row">{name}</th>{cells}</tr>')
    corner = escape(text("candidate", language))
    return (
        f'<div class="candidates"><table><thead><tr><th scope="col">{corner}</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def percent(p: float) -> str:
    """A probability for people: 0 is "never", and nothing that can happen is called 0."""
    if p == 0:
        return "–"
    return "<0.1%" if p < 0.001 else f"{100 * p:.1f}%"


def token_rows(tokenizer: Tokenizer, messages: Sequence[Message], language: str) -> list[list[object]]:
    """Place, token, id and speaker of everything the model reads for ``messages``."""
    encoded = tokenizer.encode_dialogue(messages, add_reply_mark=not messages or messages[-1]["role"] == "user")
    who = [text("role_user", language), text("role_assistant", language)]
    return [
        [place, tokenizer.token(token), token, who[role]]
        for place, (token, role) in enumerate(zip(encoded.ids, encoded.roles, strict=True))
    ]
