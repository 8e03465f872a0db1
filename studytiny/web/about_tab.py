"""The About tab: what this is, what it cannot do, how it was made, under which licences, and the model's own card."""

from __future__ import annotations

import re
from pathlib import Path

import gradio as gr

from studytiny import hub
from studytiny.hosting import code_address
from studytiny.web.language import Texts

CARD = "README.md"  # of the bundled model's folder


def build_about(texts: Texts) -> None:
    """Builds the tab inside the current Blocks."""
    texts.component(gr.Markdown, {"value": "about"}, elem_id="about")
    address = code_address()
    if address:
        texts.component(gr.Markdown, {"value": "code"}, elem_id="code")
        gr.Markdown(f"[{address}]({address})")
    card = Path(hub.BUNDLED_FOLDER) / CARD
    if card.is_file():
        with texts.component(gr.Accordion, {"label": "model_card"}, open=False, elem_id="model-card"):
            # Its links to other files of the repository lead nowhere from here.
            gr.Markdown(re.sub(r"\[([^\]]*)\]\(\.[^)]*\)", r"\1", card.read_text(encoding="utf-8")))
