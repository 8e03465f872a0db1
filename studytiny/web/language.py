"""Texts that follow the visitor's language: the browser's at first, then what the switch on the page says."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.i18n import I18nData

from studytiny.web.older_gradio import TRANSLATES, supported
from studytiny.web.texts import DEFAULT_LANGUAGE, text


class Texts:
    """Remembers which property of which component shows which text."""

    def __init__(self) -> None:
        self._keys: list[tuple[gr.blocks.Block, dict[str, str]]] = []

    def component(self, kind: type, keys: dict[str, str], **options: Any) -> Any:
        """Makes a component of ``kind``; ``keys`` says which text of texts.py each property shows."""
        options = supported(kind, options)
        # Gradio's page translates these marks itself, so that the first paint is already in the browser's language.
        shown = {name: I18nData(key) if TRANSLATES else text(key, DEFAULT_LANGUAGE) for name, key in keys.items()}
        component = kind(**shown, **options)
        self._keys.append((component, keys))
        return component

    @property
    def components(self) -> list[gr.blocks.Block]:
        return [component for component, _ in self._keys]

    def updates(self, language: str) -> list[dict[str, Any]]:
        """One update for each of ``components``."""
        return [gr.update(**{name: text(key, language) for name, key in keys.items()}) for _, keys in self._keys]
