"""Texts that follow the visitor's language: the browser's at first, then what the switch on the page says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.i18n import I18nData

from studytiny.web.texts import DEFAULT_LANGUAGE, text

# Before that it shows the marks themselves in some places, the names of tabs for one.
_TRANSLATES = tuple(int(part) for part in gr.__version__.split(".")[:2]) >= (6, 12)


def supported(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """``options`` less what this Gradio's ``function`` does not know: a host may have an older one than ours."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


class Texts:
    """Remembers which property of which component shows which text."""

    def __init__(self) -> None:
        self._keys: list[tuple[gr.blocks.Block, dict[str, str]]] = []

    def component(self, kind: type, keys: dict[str, str], **options: Any) -> Any:
        """Makes a component of ``kind``; ``keys`` says which text of texts.py each property shows."""
        options = supported(kind, options)
        # Gradio's page translates these marks itself, so that the first paint is already in the browser's language.
        shown = {name: I18nData(key) if _TRANSLATES else text(key, DEFAULT_LANGUAGE) for name, key in keys.items()}
        component = kind(**shown, **options)
        self._keys.append((component, keys))
        return component

    @property
    def components(self) -> list[gr.blocks.Block]:
        return [component for component, _ in self._keys]

    def updates(self, language: str) -> list[dict[str, Any]]:
        """One update for each of ``components``."""
        return [gr.update(**{name: text(key, language) for name, key in keys.items()}) for _, keys in self._keys]
