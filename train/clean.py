"""Rules about the text of a corpus, each a function."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

RUDE_WORDS_FILE = Path(__file__).parent / "rude_words.txt"


@cache
def _rude_pattern() -> re.Pattern[str]:
    lines = RUDE_WORDS_FILE.read_text(encoding="utf-8").split("\n")
    words = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    # Entries are regular expressions: an exception is written as what may not stand beside the word.
    return re.compile("|".join(words), re.IGNORECASE)


def is_rude(text: str) -> bool:
    """True if ``text`` holds an unambiguous insult or obscenity of ``rude_words.txt``."""
    return _rude_pattern().search(text) is not None
