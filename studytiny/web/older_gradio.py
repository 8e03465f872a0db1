"""What the page must know of older Gradios: a host decides which 6.x it runs on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr

_VERSION = tuple(int(part) for part in gr.__version__.split(".")[:2])
# Before 6.12 marks of gr.I18n are shown as they are in some places, the names of tabs for one.
TRANSLATES = _VERSION >= (6, 12)
# Before 6.5 (6.0 and 6.2 were tried) what is hidden does not hear what it is told.
LOSES_HIDDEN = _VERSION < (6, 5)


def supported(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """``options`` less what this Gradio's ``function`` does not know."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
