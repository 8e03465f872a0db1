"""Cleaning a corpus: rules with a name, each a function from dialogues to dialogues, and what each of them did.

A rule answers with one entry for every dialogue it is given: the dialogue as it was, a mended or shorter one, or ``[]``
for none. A dialogue is only ever cut at its end, by whole exchanges (user, assistant), so a turn never changes its
speaker and what is kept has nothing missing before it.

Clean what is trained on, not what is measured on, and split first (``ConvDataset.training_dialogues``): normalising a
first turn may move its dialogue to the other side of the split.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from studytiny.errors import UserError
from studytiny.word_lists import is_rude
from train.corpus import INVISIBLE

MOST_REPEATS = 3  # of one punctuation mark
FREQUENT_SHARE = 2000  # a reply may be given to one exchange in so many,
FREQUENT_FLOOR = 20  # but always to so many,
FREQUENT_TIMES_USUAL = 5  # and to so many times as many as is usual in the corpus
SESSION_TURNS = 8
WORDS_WITHIN = 1000  # a text has words by then, or has none

Dialogue = list[str]


# Questions about one text

_FULL_WIDTH = {ord(wide): ord(wide) - 0xFEE0 for wide in map(chr, range(0xFF10, 0xFF5B)) if wide.isalnum()}
_REPEATED = re.compile(rf"([^\w\s]|_)\1{{{MOST_REPEATS},}}")
_LONG_DASH_OR_DOTS = re.compile("([…—])\\1{2,}")  # in Chinese both are written as two characters
# Almost every text is as it should be; one search tells.
_TO_NORMALISE = re.compile(rf"{INVISIBLE.pattern}|[\uff10-\uff5a]|[^\S ]|\s\s|^\s|\s$|([^\w\s]|_)\1\1")


def normalise_text(text: str) -> str:
    """One way of writing: no zero-width characters, single spaces, half-width letters and digits, and one punctuation
    mark at most three times in a row."""
    if not _TO_NORMALISE.search(text):
        return text
    text = INVISIBLE.sub("", text).translate(_FULL_WIDTH)
    text = _LONG_DASH_OR_DOTS.sub(r"\1\1", text)
    text = _REPEATED.sub(lambda match: match[1] * MOST_REPEATS, text)
    return " ".join(text.split())


# Faces drawn with letters or with Chinese characters that are none there.
_KAOMOJI = re.compile(
    r"(?<![a-z])(?:[tq][_.﹏▽w][tq]|q[aw]q|t[ao]t|o[rt]z|x+d+|[=\-^]?w=|0[._]0|>3<|3=)(?![a-z])"
    "|[′´`｀‵°≧>=￣╯][皿口益囗][′´`‵°≦<=￣╰]|囧|∑|ヽ|ー|[\u02b0-\u02ff]",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\u3400-\u9fff0-9]|[^\W_]{2}")


def has_words(text: str) -> bool:
    """False if ``text`` is only punctuation, symbols, emoji or a kaomoji such as ``=。=``, ``T_T`` or ``(｀皿´)ノ``.

    The first thousand characters tell."""
    rest = _KAOMOJI.sub(" ", text[:WORDS_WITHIN]).strip()
    return _WORD.search(rest) is not None or rest.isalnum()


# The rules


def _cut(dialogue: Sequence[str], is_bad: Callable[[Sequence[str]], bool]) -> Dialogue:
    """The exchanges before the first bad one."""
    for start in range(0, len(dialogue), 2):
        if is_bad(dialogue[start : start + 2]):
            return list(dialogue[:start])
    return list(dialogue)


def normalise(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """See ``normalise_text``."""
    return [[normalise_text(turn) for turn in dialogue] for dialogue in dialogues]


def drop_incomplete(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Cuts before an exchange of which one side is missing or empty."""
    return [
        _cut(dialogue, lambda exchange: len(exchange) < 2 or not all(map(str.strip, exchange)))
        for dialogue in dialogues
    ]


def drop_rude(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Cuts before an exchange in which either side is rude: a model that has read insults answers in kind."""
    return [_cut(dialogue, lambda exchange: any(map(is_rude, exchange))) for dialogue in dialogues]


def drop_wordless(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Cuts before a reply without words, or with a broken character. A question may be ``？``, as people do ask so."""
    return [
        _cut(dialogue, lambda exchange: any("\ufffd" in reply or not has_words(reply) for reply in exchange[1:]))
        for dialogue in dialogues
    ]


def drop_duplicates(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Keeps the first of dialogues that are the same, turn by turn."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for dialogue in dialogues:
        key = tuple(dialogue)
        kept.append([] if key in seen else dialogue)
        seen.add(key)
    return kept


def cap_replies(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Cuts before a reply that was given too often already, so that no one reply becomes the answer to everything.

    A list of questions and answers has few replies, each given often; there only what stands out is too often.
    """
    replies = Counter(reply for dialogue in dialogues for reply in dialogue[1::2])
    usual = statistics.median(replies.values()) if replies else 0
    most = max(FREQUENT_FLOOR, replies.total() // FREQUENT_SHARE, FREQUENT_TIMES_USUAL * usual)
    given: Counter[str] = Counter()

    def too_often(exchange: Sequence[str]) -> bool:
        given.update(exchange[1:])
        return any(given[reply] > most for reply in exchange[1:])

    return [_cut(dialogue, too_often) for dialogue in dialogues]


def join_sessions(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Joins neighbours into sessions of up to eight turns: of use where a corpus was cut into exchanges."""
    sessions: list[Dialogue] = []
    current: Dialogue = []
    for dialogue in dialogues:
        # An odd one ends its session, lest the next begin as the assistant.
        if current and len(current) % 2 == 0 and len(current) + len(dialogue) <= SESSION_TURNS:
            current.extend(dialogue)
            sessions.append([])
        else:
            current = list(dialogue)
            sessions.append(current)
    return sessions


@dataclass(frozen=True)
class Rule:
    """A named rule: what a user calls it, what it does in a few Chinese words, and whether it is on by itself."""

    name: str
    title: str
    apply: Callable[[Sequence[Dialogue]], list[Dialogue]]
    default: bool = True


# In the order they are applied: texts first, so that the others see them as they will be; then what is cut, so that
# dialogues which have become the same are found; counting replies when nothing else will go.
RULES = (
    Rule("normalise", "统一写法：空白、全角字母数字、重复标点、零宽字符", normalise),
    Rule("incomplete", "去掉空的、没有回答的话", drop_incomplete),
    Rule("rude", "去掉含脏话的问答", drop_rude),
    Rule("wordless", "去掉只有标点或颜文字的回答", drop_wordless),
    Rule("duplicates", "去掉完全重复的对话", drop_duplicates),
    Rule("frequent", "限制同一句回答的次数", cap_replies),
    Rule("sessions", "把相邻的对话接成一段", join_sessions, default=False),
)


@dataclass(frozen=True)
class RuleEffect:
    """What one rule did: ``changed`` dialogues are other or gone after it."""

    name: str
    title: str
    changed: int
    dialogues_before: int
    dialogues_after: int
    turns_before: int
    turns_after: int
    characters_before: int
    characters_after: int


@dataclass(frozen=True)
class CleaningResult:
    """The cleaned dialogues, and a row for each rule that was applied, in order."""

    dialogues: list[Dialogue]
    table: list[RuleEffect]

    def __str__(self) -> str:
        """The table in Chinese, a rule a line."""
        return "\n".join(
            f"  {row.name:<11}{row.dialogues_before:>8} → {row.dialogues_after:<8} 段 "
            f"{row.turns_before:>9} → {row.turns_after:<9} 句，改动 {row.changed} 段：{row.title}"
            for row in self.table
        )


def clean(dialogues: Iterable[Sequence[str]], off: Iterable[str] = (), on: Iterable[str] = ()) -> CleaningResult:
    """Applies the RULES: those that are on by themselves, without those named in ``off``, and those named in ``on``.

    The dialogues given are left as they are.

    Raises:
        UserError: a name is none of a rule.
    """
    off, on = set(off), set(on)
    names = [rule.name for rule in RULES]
    for name in sorted(off | on):
        if name not in names:
            raise UserError(f"没有叫 {name!r} 的清洗规则；可用的有 {'、'.join(names)}。")
    current = [list(dialogue) for dialogue in dialogues]
    size = _size(current)
    table = []
    for rule in RULES:
        if rule.name in off or not (rule.default or rule.name in on):
            continue
        result = rule.apply(current)
        changed = sum(before != after for before, after in zip(current, result, strict=True))
        kept = [dialogue for dialogue in result if dialogue]
        before, size = size, _size(kept)
        pairs = (number for pair in zip(before, size, strict=True) for number in pair)
        table.append(RuleEffect(rule.name, rule.title, changed, *pairs))
        current = kept
    return CleaningResult(current, table)


def _size(dialogues: Sequence[Dialogue]) -> tuple[int, int, int]:
    """How many dialogues, turns, characters."""
    turns = sum(map(len, dialogues))
    return len(dialogues), turns, sum(len(turn) for dialogue in dialogues for turn in dialogue)
