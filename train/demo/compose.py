"""Composes dialogues: which exchanges follow each other, what the user has told, when it is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random

from .topics import COMPUTED, SLOT, Book, Exchange, Line, Section, TopicError, expand

MAX_TURNS = 16
MAX_COST = 250  # characters plus two marks a turn: a whole dialogue fits the window of 256
TRIES = 60  # draws before giving up on finding an exchange that fits
MANY = 5  # wordings from which on the first one is preferred
NUMERALS = "零一二三四五六七八九十"


@dataclass
class Dialogue:
    """Turns, and what the tests need: at which turn a fact was told, at which it was repeated."""

    turns: list[str] = field(default_factory=list)
    told: list[tuple[int, str, str]] = field(default_factory=list)  # turn, fact, value
    recalled: list[tuple[int, str]] = field(default_factory=list)  # turn of a reply that repeats a fact, fact


class Composer:
    """Writes one dialogue; all its choices come from `rng`."""

    def __init__(self, book: Book, rng: Random) -> None:
        self.book, self.rng = book, rng
        self.dialogue = Dialogue()
        self.facts: dict[str, str] = {}
        self.touched: set[str] = set()  # facts spoken of in passing: neither known nor unknown
        self.groups: set[str] = set()
        self.used: set[int] = set()
        self.latest: set[str] = set()  # facts of the exchange just written: only these can be corrected in short
        self.quotable = True

    def compose(self) -> Dialogue:
        rng = self.rng
        steps = ["话题"] * rng.choices((0, 1, 2, 3, 4), (8, 38, 32, 16, 6))[0]
        if rng.random() < 0.45:
            at = rng.randint(0, len(steps))
            steps.insert(at, "告诉")
            steps.insert(rng.randint(at + 1, len(steps)), "询问")
        if rng.random() < 0.09:
            steps.insert(rng.randint(0, len(steps)), "未知")
        if rng.random() < 0.4:
            self.pick("开头")
        for step in steps:
            self.tell() if step == "告诉" else self.pick(step)
            if self.latest and rng.random() < 0.12:
                self.pick("更正")
            if self.dialogue.turns and rng.random() < 0.12:
                self.pick("答问" if self.dialogue.turns[-1].endswith("？") else "接话")
            if self.dialogue.turns and rng.random() < 0.05:
                self.pick("刚才")
        if self.facts and rng.random() < 0.35:
            self.pick("询问")
        if rng.random() < 0.2 or not self.dialogue.turns:
            self.pick("结尾")
        return self.dialogue

    def tell(self) -> None:
        """Let the user tell a fact not spoken of so far."""
        if free := sorted(self.book.facts - self.facts.keys() - self.touched):
            self.pick("话题", tells=self.rng.choice(free))

    def pick(self, kind: str, tells: str = "") -> bool:
        """Run one section of `kind` that fits what was said so far; False if there is none."""
        pairs, weights = self.book.pool(kind, tells)
        for _ in range(TRIES if pairs else 0):
            section, exchange = self.rng.choices(pairs, cum_weights=weights)[0]
            if self.fits(section, exchange):
                break
        else:
            return False
        bindings = _arithmetic(self.rng) | self.quotes()
        if kind == "更正":
            bindings |= {f"old_{fact}": self.facts.pop(fact) for fact in section.facts}
        start = len(self.dialogue.turns)
        called = kind == "话题" and start == 0 and self.rng.random() < 0.12
        if not self.run(exchange, bindings, called):
            self.facts |= {fact: bindings[f"old_{fact}"] for fact in section.facts if kind == "更正"}
            return False
        if kind == "询问" and len(self.dialogue.turns) == start + 2:
            self.latest = set(section.facts)
        self.groups |= section.groups
        self.touched |= section.touches
        self.quotable = "不复述" not in section.flags
        if "连问" in section.flags and self.rng.random() < 0.4:
            rest = [e for e in section.exchanges if self.fits(section, e, same=True)]
            if rest:
                self.run(self.rng.choice(rest), _arithmetic(self.rng))
        return True

    def fits(self, section: Section, exchange: Exchange, same: bool = False) -> bool:
        """Whether `exchange` contradicts nothing said so far."""
        if id(exchange) in self.used or (self.groups & section.groups and not same):
            return False
        if section.kind in ("询问", "更正"):
            return (self.facts.keys() if section.kind == "询问" else self.latest) >= set(section.facts)
        if section.kind == "未知":
            return not any(fact in self.facts or fact in self.touched for fact in section.facts)
        says = exchange.user_slots & self.book.facts
        if says & (self.facts.keys() | self.touched) or section.touches & self.facts.keys():
            return False
        return exchange.quoted <= self.quotes().keys()

    def run(self, exchange: Exchange, bindings: dict[str, str], called: bool = False) -> bool:
        """Append the exchange and perhaps its follow-ups; False if it no longer fits the window."""
        turns, rng = self.dialogue.turns, self.rng
        users = [line for line in exchange.users if line.needs <= self.facts.keys()]
        replies = [r for r in exchange.replies if r.line.needs <= self.facts.keys()]
        if not users or not replies or len(turns) + 2 > MAX_TURNS:
            return False
        known = dict(self.facts)
        user_line, reply = rng.choice(users), rng.choice(replies)
        if len(users) >= MANY and rng.random() < 0.3:
            user_line = users[0]  # what most people would type stands first
        user = typed(self.fill(user_line, bindings, by_user=True), rng)
        if called:
            user = self.draw("call", set()) + user
        answer = self.fill(reply.line, bindings, by_user=False)
        if sum(len(turn) + 2 for turn in (*turns, user, answer)) > MAX_COST:
            self.facts = known
            return False
        self.used.add(id(exchange))
        self.latest = user_line.slots & self.book.facts
        self.dialogue.told += [(len(turns), slot, self.facts[slot]) for slot in sorted(self.latest)]
        self.dialogue.recalled += [(len(turns) + 1, slot) for slot in sorted(reply.line.slots & self.book.facts)]
        turns += [user, answer]
        options = [e for e in reply.follow_ups if id(e) not in self.used]
        if options and rng.random() < (0.92 if answer.endswith("？") else 0.6):
            self.run(rng.choice(options), bindings)
        return True

    def fill(self, line: Line, bindings: dict[str, str], by_user: bool) -> str:
        """Choose among `(a|b)` and fill the slots; a fact is the user's to tell, never the assistant's to invent."""

        def value(match: re.Match[str]) -> str:
            name, digits = match[2], match[3]
            slot = name + digits
            if slot in bindings:
                return bindings[slot]
            if name in self.book.facts and not digits:
                if name not in self.facts:
                    if not by_user:
                        raise TopicError(f"{line.where}：回答里用了 {{{name}}}，可是用户还没有说过。")
                    self.facts[name] = self.draw(name, {bindings.get(f"old_{name}", "")})
                return self.facts[name]
            taken = {v for k, v in bindings.items() if k.rstrip("0123456789") == name}
            bindings[slot] = self.draw(name, taken | {self.facts.get(name, "")})
            return bindings[slot]

        return SLOT.sub(value, expand(line.text, self.rng.choice))

    def draw(self, name: str, taken: set[str]) -> str:
        """A value of the list `name` that is none of `taken`; its own slots are composed anew each time."""
        while True:
            text = expand(self.rng.choice(self.book.values[name]).text, self.rng.choice)
            text = SLOT.sub(lambda match: self.draw(match[2], set()), text)
            if text not in taken:
                return text

    def quotes(self) -> dict[str, str]:
        """Earlier turns short enough to be repeated word for word."""
        turns = self.dialogue.turns
        if not turns or not self.quotable:
            return {}
        found = {"last_user": turns[-2], "last_bot": turns[-1], "first_user": turns[0]}
        if len(turns) < 4:
            del found["first_user"]
        return {key: turn.rstrip("。？！?") for key, turn in found.items() if len(turn) <= 16 and "“" not in turn}


def typed(text: str, rng: Random) -> str:
    """The text as a hurried person types it: end punctuation often missing, a space where a comma belongs."""
    bare = text.rstrip("。？！")
    if not bare:
        return text
    text, end = bare, text[len(bare) :]
    if rng.random() < 0.12:
        text = text.replace("，", " ")
    if end == "？":
        return text + rng.choices(("？", "", "?"), (50, 45, 5))[0]
    if end == "！":
        return text + rng.choices(("！", "", "。"), (40, 45, 15))[0]
    return text + rng.choices(("。", ""), (30, 70))[0]


def _arithmetic(rng: Random) -> dict[str, str]:
    """Numbers for one sum and one difference, up to 20."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    small, big = sorted(rng.sample(range(21), 2))
    total = NUMERALS[a + b] if a + b <= 10 else "二十" if a + b == 20 else "十" + NUMERALS[a + b - 10]
    numbers = {"a": a, "b": b, "sum": a + b, "big": big, "small": small, "diff": big - small, "next": a + 1}
    words = {"cn_a": NUMERALS[a], "cn_b": NUMERALS[b], "cn_sum": total}
    found = {key: str(number) for key, number in numbers.items()} | words
    assert found.keys() == COMPUTED
    return found
