"""What is rude, and what speaks of suicide: two lists beside this file, a regular expression a line.

``rude_words.txt`` keeps training data and replies clean; ``crisis_words.txt`` is for what users write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from studytiny.errors import UserError

RUDE_WORDS_FILE = Path(__file__).with_name("rude_words.txt")
CRISIS_WORDS_FILE = Path(__file__).with_name("crisis_words.txt")

UNDECIDED = 16  # characters: a rude word and what tells that it is harmless after all, ``sb. with``, are shorter
CRISIS_WITHIN = 10_000  # characters of a message, far more than any model here reads

# An entry: what may not, or must, stand before it; how it begins: a character, [one of some] or (?:a|b), perhaps
# optional; and the rest.
_ENTRY = re.compile(r"(?:\(\?<([!=])([^()]*)\))?(\[[^]^-]+\]|\(\?:[^()]+\)|[^][()\\.^])(\??)(.*)")
_LOOK_AROUND = re.compile(r"\(\?<?[=!](?:[^()]|\([^()]*\))*\)")
_PART = re.compile(r"(?:\(\?:([^()]*)\)|\[([^]]*)\]|([^][()?]))(\??)")  # (?:a|b), [ab] or a, perhaps optional


def _start_as_look_behind(entry: str) -> str:
    entry = re.sub(r"^\^", "(?<=^)", entry)
    # "At the start or after one of these" is "not after any other".
    return re.sub(r"^\(\?:\^\|\[?([^])]+)\]?\)", lambda found: f"(?<![^{found[1].replace('|', '')}])", entry)


def _beginnings(entry: str) -> Iterator[tuple[str, str]]:
    """For each character that an entry can begin with: that character, and what has to match after it.

    Together they match wherever the entry does, for the question whether it is there at all.
    """
    parts = _ENTRY.fullmatch(_start_as_look_behind(entry))
    if parts is None:
        raise UserError(f"词表里的 {entry} 读不懂；请让它以一个字、[几个字] 或 (?:几个词) 开头。")
    kind, before, first, optional, rest = parts.groups()
    if len(first) == 1 and not optional:
        # What stands before is looked at last: the character itself is rarely there.
        yield first, (f"(?<{kind}(?:{before}).)" if kind else "") + rest
        return
    choices = first[3:-1].split("|") if first[0] == "(" else list(first.strip("[]"))
    for choice in choices + [""] * len(optional):
        yield from _beginnings((f"(?<{kind}{before})" if kind else "") + choice + rest)


def _entries(file: Path, mark: str = "") -> list[str]:
    """The entries of a list; those behind ``- `` only when that is the ``mark``."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").split("\n")]
    marked = [line for line in lines if line and line[0] != "#" and line.startswith("- ") == bool(mark)]
    return [line.removeprefix(mark) for line in marked]


@cache
def _pattern(file: Path, ascii_only: bool, mark: str = "") -> re.Pattern[str]:
    """All entries as one pattern ``a(?:...)|b(?:...)``, a branch for each first character: ``re`` then skips all other
    characters at once, where a plain list of entries would be tried in full at every place. ``ascii_only``: without
    what no ASCII text can hold, which leaves little.
    """
    branches: dict[str, list[str]] = {}
    for entry in _entries(file, mark):
        for first, rest in _beginnings(entry):
            # All that IGNORECASE takes for it: ``re`` skips to characters, not to letters of either case.
            for form in set(re.findall(first, first + first.upper() + "ſKıİ", re.IGNORECASE)):
                branches.setdefault(form, []).append(rest)
    return re.compile(
        "|".join(f"{first}(?i:{'|'.join(rests)})" for first, rests in branches.items() if first.isascii() >= ascii_only)
    )


def is_rude(text: str) -> bool:
    """True if ``text`` holds an unambiguous insult or obscenity of ``rude_words.txt``."""
    return _pattern(RUDE_WORDS_FILE, text.isascii()).search(text) is not None


_SIMPLE = str.maketrans(
    "殺樓遺書結殘輕無義還個沒離這開傷後藥過盡樣們說見會別為來時斷橋臥軌燒繩頭讓棄著麼覺將給該樂難熱馬遊戲歡愛寫",
    "杀楼遗书结残轻无义还个没离这开伤后药过尽样们说见会别为来时断桥卧轨烧绳头让弃着么觉将给该乐难热马游戏欢爱写",
)
_GAP = re.compile(r"(?<=[\u3400-\u9fff])[\s·•*_.~\u200b-\u200f\ufeff-]+(?=[\u3400-\u9fff])")


def speaks_of_suicide(text: str) -> bool:
    """True if ``text`` says something of ``crisis_words.txt`` once the harmless sayings in there are crossed out."""
    plain = _GAP.sub("", text[:CRISIS_WITHIN].translate(_SIMPLE).replace("’", "'"))
    ascii_only = plain.isascii()
    left = _pattern(CRISIS_WORDS_FILE, ascii_only, "- ").sub("/", plain)
    return _pattern(CRISIS_WORDS_FILE, ascii_only).search(left) is not None


@cache
def _rude_beginnings() -> frozenset[str]:
    """Every way in which a rude word can begin, the whole word among them."""
    words: set[str] = set()
    for entry in _entries(RUDE_WORDS_FILE):
        words.update(_spelled(_LOOK_AROUND.sub("", _start_as_look_behind(entry))))
    return frozenset(word[:end].casefold() for word in words for end in range(1, len(word) + 1))


def _spelled(entry: str) -> list[str]:
    """All words that an entry without look-arounds stands for."""
    words = [""]
    for group, some, one, optional in _PART.findall(entry):
        choices = [word for choice in group.split("|") for word in _spelled(choice)] if group else list(some or one)
        words = [word + choice for word in words for choice in [*choices, *([""] if optional else [])]]
    return words


def decided(said: str) -> int:
    """How many characters of ``said`` hold no rude word and no beginning of one, whatever comes after."""
    rude = _pattern(RUDE_WORDS_FILE, said.isascii())
    last = range(max(0, len(said) - UNDECIDED), len(said))
    end = next((start for start in last if said[start:].casefold() in _rude_beginnings()), len(said))
    found = rude.search(said)
    end = min(end, found.start()) if found else end
    while found := rude.search(said, 0, end):  # a word that what follows makes harmless stands at the end now
        end = found.start()
    return end
