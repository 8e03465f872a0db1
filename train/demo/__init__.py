"""The corpus of the bundled model: small talk composed from hand-written text, the same for the same seed.

`topics/*.txt` and `values/*.txt` hold the words (README.md explains the format), `topics.py` reads them and
`compose.py` chains them. `python -m train.demo OUT.conv` writes the corpus as a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from studytiny.files import write_atomically

from .compose import Composer, Dialogue
from .topics import TopicError, load_book

__all__ = ["Dialogue", "TopicError", "compose_dialogues", "generate", "write_conv"]

FOLDER = Path(__file__).parent
RETRIES = 8  # of a dialogue that already exists; short ones then simply repeat


def generate(count: int = 8000, seed: int = 0, misheard: bool = False) -> list[list[str]]:
    """`count` dialogues, each a list of turns: user, assistant, user, assistant ...

    `misheard`: with replies that are `Unlearnt`, for training in memory; a file could not tell them from the others.
    """
    return [dialogue.turns for dialogue in compose_dialogues(count, seed, misheard=misheard)]


def compose_dialogues(count: int = 8000, seed: int = 0, folder: Path = FOLDER, misheard: bool = True) -> list[Dialogue]:
    """Like `generate`, with what was told and asked in each dialogue; `misheard` is as there, but True by default.

    Raises TopicError for a broken file.
    """
    book, rng = load_book(folder), Random(seed)
    dialogues: list[Dialogue] = []
    seen: set[tuple[str, ...]] = set()
    for _ in range(count):
        for _ in range(RETRIES):
            dialogue = Composer(book, rng, misheard).compose()
            if dialogue.turns and tuple(dialogue.turns) not in seen:
                break
        seen.add(tuple(dialogue.turns))
        dialogues.append(dialogue)
    return dialogues


def write_conv(path: str | os.PathLike[str], dialogues: Iterable[Sequence[str]]) -> None:
    """Write the `.conv` format (a line `E` before each dialogue, then `M turn` lines), whole or not at all."""
    text = "".join("E\n" + "".join(f"M {turn}\n" for turn in turns) for turns in dialogues)
    write_atomically(path, text)
