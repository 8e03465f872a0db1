"""Composes dialogues: which exchanges follow each other, what the user has told, when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from studytiny.word_lists import is_rude
from train.corpus import Unlearnt

from .topics import COMPUTED, PERSONS, RECAP, SAME, Book, Exchange, Line, Part, Section, TopicError

MAX_TURNS = 24
MAX_COST = 500  # characters plus two marks a turn: a whole dialogue fits the window of 512
TRIES = 60  # draws before giving up on finding an exchange that fits
DRAWS = 2000  # draws before a list of values counts as forbidden altogether
RANKED = 0.3  # how much less often each further reply comes: what is said most is learnt soonest
SLOPPY = 0.3  # share of the user's turns with slips of the fingers: a sentence must be understood though a bit is amiss
ASIDE = 0.08  # share of a topic's first turns with half a sentence before it that has nothing to do with it
TOLD_ASIDE = 0.16  # the same where a fact is told: what to keep must be found in the middle of a longer message, too
AFTER = 0.12  # share of the turns that tell a fact with half a sentence after it
REMARK = 0.2  # share of the turns that tell a fact with a remark of another topic before or after it: the fact counts
ASKED_REMARK = 0.06  # the same where a fact is asked for
REMARK_LENGTH = 16  # characters of the longest
SLIP_EVERY = 7  # characters of a wording
MANY = 5  # wordings from which on the first one is preferred
BRIEF = 0.45  # share of dialogues that are only a few exchanges and begin with any topic: what most visitors do
BRIEFLY = ((1, 2, 3), (30, 42, 28))  # how many topics they have
RECALLS = 0.88  # share of the others in which the user tells something and asks for it later
TELLS = ((1, 2, 3, 4), (56, 31, 10, 3))  # how many facts such a dialogue tells
DISTANCES = ((0, 1, 2, 3, 4), (26, 28, 22, 14, 10))  # exchanges between telling and asking
ASKS = (("询问", "记混", "确认", "更正"), (58, 18, 10, 14))  # what happens when the time to ask has come
PRONOUNS = 0.5  # how often something is said of what was just told, with a pronoun
UNKNOWN = 0.09  # share of the dialogues with facts in which one never told is asked for
SILENT = 0.3  # share of the told facts whose reply is about something else: then only the user's words have them
MISTAKEN = 0.25  # how often, after a fact about somebody else, the user's own is asked for
LONG = (8, 18)  # turns, drawn anew, after which no new topic begins: what is due is asked, then it ends
CHATS = ((1, 2, 3, 4, 5, 6), (12, 22, 28, 20, 12, 6))  # how many topics the other dialogues have
NUMERALS = "零一二三四五六七八九十"
REACH = 10  # turns a pronoun reaches back
QUOTE = 22  # characters of the longest turn that is repeated word for word
RECAPPED = 4  # facts a summary names at most
SHE, HE = "姐妹妈女奶婆姨姑嫂娘", "爸爷哥弟叔舅儿公伯男侄甥"


class Event(NamedTuple):
    """A turn of the user that is about facts: which turn, the kind of its section, the facts (the asked one first)."""

    turn: int
    kind: str
    facts: tuple[str, ...]


@dataclass
class Dialogue:
    """Turns, and what the tests need: at which turn a fact was told, at which it was repeated."""

    turns: list[str] = field(default_factory=list)
    told: list[tuple[int, str, str]] = field(default_factory=list)  # turn, fact, value
    recalled: list[tuple[int, str]] = field(default_factory=list)  # turn of a reply that repeats a fact, fact
    events: list[Event] = field(default_factory=list)
    topics: list[tuple[int, str]] = field(default_factory=list)  # turn, name of the file its exchange is from


class Composer:
    """Writes one dialogue; all its choices come from `rng`. `misheard`: some told facts get an `Unlearnt` reply."""

    def __init__(self, book: Book, rng: Random, misheard: bool) -> None:
        self.book, self.rng, self.misheard = book, rng, misheard
        self.dialogue = Dialogue()
        self.cost = 0
        self.facts: dict[str, str] = {}
        self.mentioned: dict[str, int] = {}  # fact: the last turn that spoke of it
        self.person: dict[str, str] = {}  # PERSONS, the same throughout a dialogue
        self.touched: set[str] = set()  # facts spoken of in passing: neither known nor unknown
        self.groups: set[str] = set()
        self.used: set[tuple[int, str]] = set()
        self.latest: set[str] = set()  # facts of the exchange just written: only these can be corrected in short
        self.due: list[tuple[int, str]] = []  # the exchange from which on a fact is to be asked for, fact
        self.theme: Section | None = None  # a section that still has something to say, to come back to
        self.quotable = True
        self.filled: set[str] = set()  # slots of the wording filled last, of those between brackets only the chosen

    def compose(self) -> Dialogue:
        rng = self.rng
        if rng.random() < BRIEF:
            start = rng.choices(("开头", "结尾", "话题"), (12, 4, 84))[0]
            self.chat(rng.choices(*BRIEFLY)[0]) if start == "话题" else self.pick(start)
            if start == "结尾":
                return self.dialogue
        else:
            if rng.random() < 0.4:
                self.pick("开头")
            if rng.random() < RECALLS:
                self.remember(rng.choices(*TELLS)[0])
            else:
                self.chat(rng.choices(*CHATS)[0])
        if rng.random() < 0.18 or not self.dialogue.turns:
            self.pick("结尾")
        return self.dialogue

    def chat(self, topics: int) -> None:
        """Small talk about some topics, now and then with a question about something never told."""
        for _ in range(topics):
            self.pick("未知") if self.rng.random() < 0.03 else self.filler()
            self.aside()

    def remember(self, tells: int) -> None:
        """The user tells facts, asks for each of them after a while, mixes them up, corrects them."""
        rng = self.rng
        if rng.random() < 0.35:
            self.filler()
        unknown = rng.random() < UNKNOWN
        limit = rng.randint(*LONG)
        for _ in range(MAX_TURNS):
            before = len(self.dialogue.turns)
            late = before >= limit
            if unknown and rng.random() < 0.35:
                unknown = False
                self.watch("未知")
            elif ready := [item for item in self.due if late or item[0] <= before // 2]:
                self.due.remove(ready[0])
                self.ask(ready[0][1])
            elif tells and not late and (not self.due or rng.random() < 0.5):
                tells -= 1
                self.tell()
            elif self.due:
                self.filler()
            else:
                break
            self.aside()
            if len(self.dialogue.turns) == before and not self.due:
                break
        if self.facts and rng.random() < 0.14:
            self.pick("总结")

    def filler(self) -> None:
        """Something that has nothing to do with facts: a new topic, or one talked of before."""
        if self.theme and self.rng.random() < 0.2:
            theme, self.theme = self.theme, None
            if theme is not None and self.again(theme):
                return
        self.pick("话题")

    def aside(self) -> None:
        """What may come after any exchange: a short reaction, or a question about what was just said."""
        if not self.dialogue.turns:
            return
        if self.rng.random() < 0.08:
            self.watch("答问" if self.dialogue.turns[-1].endswith("？") else "接话")
        if self.rng.random() < 0.045:
            self.pick("刚才")

    def tell(self) -> None:
        """Let the user tell a fact not spoken of so far; one that belongs to a fact already told comes more often."""
        free = [fact for fact in self.book.importance if fact not in self.facts and fact not in self.touched]
        free = [fact for fact in free if self.book.leans[fact] <= self.facts.keys()]
        weights = [self.book.importance[fact] * (3 if self.book.leans[fact] else 1) for fact in free]
        for _ in range(4 if free else 0):
            if self.watch("话题", self.rng.choices(free, weights)[0]):
                break
        told = sorted(self.latest)
        if any(self.book.mistaken(fact)[0] for fact in told) and self.rng.random() < MISTAKEN:
            self.watch("错认", self.rng.choice(told))
        about = [fact for fact in told if self.book.referring(fact)[0]]
        if about and self.rng.random() < PRONOUNS:
            if self.rng.random() < 0.3:
                self.filler()
            self.watch("指代", self.rng.choice(about))

    def ask(self, fact: str) -> None:
        """Ask for a fact told before, claim a wrong or the right value, or correct it; then perhaps ask once more."""
        kind = self.rng.choices(*ASKS)[0]
        done = self.pick(kind, fact, late=kind == "更正" and fact not in self.latest)
        if not done and kind != "询问":
            kind, done = "询问", self.pick("询问", fact)
        if done and kind == "询问" and fact in self.latest and self.rng.random() < 0.12:
            done, kind = self.pick("更正", fact), "更正"
        if done and self.rng.random() < (0.8 if kind == "更正" else 0.1):
            self.plan(fact)

    def plan(self, fact: str) -> None:
        self.due.append((len(self.dialogue.turns) // 2 + self.rng.choices(*DISTANCES)[0], fact))

    def watch(self, kind: str, fact: str = "") -> bool:
        """`pick`, and plan to ask for whatever the user told on the way."""
        before = set(self.facts)
        done = self.pick(kind, fact)
        for new in sorted(self.facts.keys() - before):
            if new == fact or self.rng.random() < 0.4:
                self.plan(new)
        return done

    def pick(self, kind: str, fact: str = "", late: bool = False) -> bool:
        """Run one exchange of `kind` (about `fact`) that fits what was said so far; False if there is none.

        The kind `指代` is any exchange that speaks of `fact` with a pronoun, `错认` a question for something unknown
        that might be taken for `fact`.
        A correction that comes `late` needs wordings that name what is corrected.
        """
        pools = {"指代": self.book.referring, "错认": self.book.mistaken}
        pairs, weights = pools[kind](fact) if kind in pools else self.book.pool(kind, fact)
        for _ in range(TRIES if pairs else 0):
            section, exchange = self.rng.choices(pairs, cum_weights=weights)[0]
            if (not late or "可迟" in section.flags) and self.fits(section, exchange):
                break
        else:
            return False
        kind = section.kind
        bindings = _arithmetic(self.rng) | self.quotes()
        if kind == "更正":
            bindings |= {f"old_{name}": self.facts.pop(name) for name in section.facts}
        start = len(self.dialogue.turns)
        call = ""
        if start == 0 and kind == "话题" and self.rng.random() < 0.12:
            call = self.draw("call", ())
        elif (
            start
            and (kind in ("询问", "未知", "记混") or (kind == "话题" and fact and not section.refers))
            and self.rng.random() < 0.12
        ):
            call = self.draw("back", ()) if "back" in self.book.values else ""
        elif kind == "话题" and "aside" in self.book.values and self.rng.random() < (TOLD_ASIDE if fact else ASIDE):
            call = self.draw("aside", ())
        tells = kind == "话题" and fact and not section.refers
        tail = self.draw("after", ()) if tells and "after" in self.book.values and self.rng.random() < AFTER else ""
        asks = kind in ("询问", "记混", "确认")
        if self.book.remarks and not call and self.rng.random() < (REMARK if tells else ASKED_REMARK if asks else 0):
            remark = self.remark()
            if remark and tells and not tail and self.rng.random() < 0.3:
                tail = "，" + remark
            elif remark:
                call = remark + self.rng.choice("，，，。！")
        if not self.run(section, exchange, bindings, call, tail):
            self.facts |= {name: bindings[f"old_{name}"] for name in section.facts if kind == "更正"}
            return False
        if kind in ("询问", "记混", "确认") and len(self.dialogue.turns) == start + 2:
            self.latest = set(section.facts)
        self.groups |= section.groups
        for name in section.touches if kind == "更正" else ():
            self.facts.pop(name, None)
        self.touched |= section.touches
        self.quotable = "不复述" not in section.flags
        if "连问" in section.flags and self.rng.random() < 0.4:
            self.again(section)
        if kind == "话题" and not fact and len(section.exchanges) > 1:
            self.theme = section
        return True

    def remark(self) -> str:
        """Half a sentence of some topic that lets itself be said beside a fact; "" if none is short enough."""
        for _ in range(TRIES):
            text = self.fill(self.rng.choice(self.book.remarks), {}, by_user=True).rstrip("。！")
            if len(text) <= REMARK_LENGTH:
                return text
        return ""

    def reply_to_something_else(self) -> str:
        """Any reply that needs nothing said before, as if the user had been misheard.

        There must be many: of a few dozen a model learns by heart that they repeat nothing, and looks for the fact in
        the user's words after these only.
        """
        line = self.rng.choice(self.book.unrelated)
        return self.fill(line, {}, by_user=False)

    def again(self, section: Section) -> bool:
        """Another exchange of the same section."""
        rest = [e for e in section.exchanges if self.fits(section, e, same=True)]
        return bool(rest) and self.run(section, self.rng.choice(rest), _arithmetic(self.rng))

    def key(self, section: Section, exchange: Exchange) -> tuple[int, str]:
        """What is said only once: after a correction the same question may come again."""
        return id(exchange), "/".join(self.facts.get(fact, "") for fact in section.facts)

    def fits(self, section: Section, exchange: Exchange, same: bool = False) -> bool:
        """Whether `exchange` contradicts nothing said so far."""
        if self.key(section, exchange) in self.used or (self.groups & section.groups and not same):
            return False
        if not self.facts.keys() >= section.given or not self.refers(section):
            return False
        if section.kind in ("询问", "记混", "确认") or (section.kind == "更正" and "可迟" in section.flags):
            return self.facts.keys() >= set(section.facts)
        if section.kind == "更正":
            return self.latest & self.facts.keys() >= set(section.facts)
        if section.kind == "总结":
            return any(line.slots <= self.facts.keys() for line in self.book.values.get(RECAP, []))
        if section.kind == "未知":
            return not any(fact in self.facts or fact in self.touched for fact in section.facts)
        says = (exchange.user_slots & self.book.facts) - section.given
        if says & (self.facts.keys() | self.touched) or section.touches & self.facts.keys():
            return False
        return exchange.quoted <= self.quotes().keys()

    def refers(self, section: Section) -> bool:
        """Whether a pronoun in `section` can only mean what it should."""
        if not section.refers:
            return True
        at = self.mentioned.get(section.refers[0], -1)
        return at >= max(0, len(self.dialogue.turns) - REACH) and all(
            self.mentioned.get(other, -1) < at for other in section.refers[1:]
        )

    def run(
        self,
        section: Section,
        exchange: Exchange,
        bindings: dict[str, str],
        call: str = "",
        tail: str = "",
        top: bool = True,
    ) -> bool:
        """Append the exchange and perhaps its follow-ups; False if it no longer fits the window."""
        turns, rng, known = self.dialogue.turns, self.rng, self.facts.keys()
        users = [line for line in exchange.users if line.needs <= known]
        if not users or len(turns) + 2 > MAX_TURNS:
            return False
        before = dict(self.facts)
        user_line = rng.choice(users)
        if len(users) >= MANY and rng.random() < 0.25:
            user_line = users[0]  # what most people would type stands first
        wording = self.fill(user_line, bindings, by_user=True)
        if tail and not wording.endswith("？"):
            wording = wording.rstrip("。！") + tail
        user = self.typed(call + wording)
        said = self.filled & self.book.facts
        replies = [reply for reply in exchange.replies if reply.line.needs <= known]
        if not replies:
            self.facts = before
            return False
        reply = rng.choices(replies, [RANKED**place for place in range(len(replies))])[0]
        if RECAP in reply.line.slots:
            bindings[RECAP], recapped = self.recap()
        answer = self.fill(reply.line, bindings, by_user=False)
        options = [e for e in reply.follow_ups if (id(e), "") not in self.used]
        tells = top and section.kind == "话题" and said - before.keys() and not section.refers
        if tells and self.misheard and rng.random() < SILENT:
            answer = Unlearnt(self.reply_to_something_else())
            options, self.filled = [], set()
        cost = len(user) + len(answer) + 4
        if self.cost + cost > MAX_COST:
            self.facts = before
            return False
        self.cost += cost
        self.used.add(self.key(section, exchange))
        at = len(turns)
        repeated = (self.filled & self.book.facts) | (set(recapped) if RECAP in reply.line.slots else set())
        self.latest = said - section.given
        self.dialogue.told += [(at, slot, self.facts[slot]) for slot in sorted(said)]
        self.dialogue.recalled += [(at + 1, slot) for slot in sorted(repeated)]
        self.dialogue.topics.append((at, section.name))
        if top and (section.facts or section.kind == "总结"):
            self.dialogue.events.append(Event(at, section.kind, section.facts))
        for fact in sorted(said | repeated | set(section.refers[:1])):
            self.mentioned[fact] = at + 1
        turns += [user, answer]
        if options and rng.random() < (0.92 if answer.endswith("？") else 0.6):
            self.run(section, rng.choice(options), bindings, top=False)
        return True

    def fill(self, line: Line, bindings: dict[str, str], by_user: bool) -> str:
        """Choose among `(a|b)` and fill the slots; a fact is the user's to tell, never the assistant's to invent."""
        pieces = list(self.pieces(line.parts))
        self.filled = {"".join(piece) for piece in pieces if not isinstance(piece, str)}
        slips = self.book.typos if by_user and self.rng.random() < 0.05 else []
        found = []
        for piece in pieces:
            if isinstance(piece, str):
                found.append(piece)
                continue
            name, digits = piece
            if (
                not by_user
                and not digits
                and name in self.book.facts
                and name not in self.facts
                and name not in bindings
            ):
                raise TopicError(f"{line.where}：回答里用了 {{{name}}}，可是用户还没有说过。")
            found.append(self.value(name, digits, bindings))
        # The slip is made in what stands around the values, never in a value.
        fitting = [
            (i, slip)
            for slip in slips
            for i, p in enumerate(pieces)
            if isinstance(p, str) and len(p) > 2 and slip[0] in p
        ]
        if fitting:
            i, (right, hurried) = self.rng.choice(fitting)
            found[i] = found[i].replace(right, hurried, 1)
        if by_user and self.rng.random() < SLOPPY:
            found = [self.slip(text) if isinstance(p, str) else text for text, p in zip(found, pieces, strict=True)]
        return "".join(found)

    def slip(self, text: str) -> str:
        """The text with characters lost, doubled, in the wrong order or wrong, but for the first and the last."""
        rng = self.rng
        for _ in range(len(text) // SLIP_EVERY):
            at = rng.randrange(1, len(text) - 2)
            here, following = text[at], text[at + 1]
            amiss = rng.choices(("", here * 2, following + here, rng.choice(text)), (50, 15, 20, 15))[0]
            text = text[:at] + amiss + text[at + 1 + (amiss == following + here) :]
        return text

    def pieces(self, parts: tuple[Part, ...]):
        """The parts of one wording, each choice made."""
        for part in parts:
            if isinstance(part, list):
                yield from self.pieces(part[int(self.rng.random() * len(part))])
            else:
                yield part

    def value(self, name: str, digits: str, bindings: dict[str, str]) -> str:
        """What a slot stands for: the fact the user told, the value of this exchange, or a new one."""
        slot = name + digits
        if slot in bindings:
            return bindings[slot]
        if slot in PERSONS:
            return self.who(slot)
        if name in self.book.facts and not digits:
            if name not in self.facts:
                taken = (bindings.get(f"old_{name}", ""), *self.facts.values())
                self.facts[name] = self.draw(name, taken)
            return self.facts[name]
        taken = [text for key, text in bindings.items() if key.rstrip("0123456789") in (name, f"old_{name}")]
        bindings[slot] = self.draw(name, (*taken, self.facts.get(name, "")))
        return bindings[slot]

    def who(self, slot: str) -> str:
        """A pronoun or a word for a person, the same throughout the dialogue."""
        if slot == "pal":
            return self.draw("pal_she" if self.who("ta") == "她" else "pal_he", ())
        relation = self.facts.get("relation", "") if slot == "other_ta" else ""
        if any(sign in relation for sign in SHE):
            return "她"
        if any(sign in relation for sign in HE):
            return "他"
        return self.person.setdefault(slot, "她" if self.rng.random() < 0.5 else "他")

    def draw(self, name: str, taken: tuple[str, ...]) -> str:
        """A value of the list `name`: neither forbidden nor rude, unlike each of `taken` and containing none."""
        for _ in range(DRAWS):
            text = self.compound(name)
            if any(other and (other in text or text in other) for other in taken):
                continue
            if not self.banned(text) and not is_rude(text):  # two harmless characters may make a name that is not
                return text
        raise TopicError(f"values/{name}.txt：这张表里的值全被禁用或用掉了，请多写几个。")

    def compound(self, name: str) -> str:
        """A value as its list writes it, its own slots filled in turn."""
        values = self.book.values[name]
        line = values[int(self.rng.random() * len(values))]
        found: list[str] = []
        for part in self.pieces(line.parts):
            text = part if isinstance(part, str) else found[-1] if part[0] == SAME else self.compound(part[0])
            found.append(text)
        return "".join(found)

    def banned(self, text: str) -> bool:
        """Whether the value is held out, or has a held-out one in it (of one character or a number: is one)."""
        banned = self.book.banned
        if not banned or text in banned:
            return bool(banned)
        ends = range(2, len(text) + 1)
        return any(text[i:j] in banned and not text[i:j].isdigit() for j in ends for i in range(j - 1))

    def recap(self) -> tuple[str, list[str]]:
        """What the user told, as one clause a fact, and which facts these are."""
        clauses: list[str] = []
        facts: list[str] = []
        lines = sorted(self.book.values[RECAP], key=lambda line: -len(line.slots))
        for fact in self.facts:
            fitting = [line for line in lines if fact in line.slots <= self.facts.keys()]
            if fact in facts or not fitting or len(clauses) == RECAPPED:
                continue
            best = [line for line in fitting if len(line.slots) == len(fitting[0].slots)]
            line = self.rng.choice(best)
            clauses.append(self.fill(line, {}, by_user=False))
            facts += sorted(line.slots & self.book.facts)
        return "，".join(clauses), facts

    def quotes(self) -> dict[str, str]:
        """Earlier turns short and polite enough to be repeated word for word."""
        turns = self.dialogue.turns
        if not turns or not self.quotable:
            return {}
        found = {"last_user": turns[-2], "last_bot": turns[-1], "first_user": turns[0]}
        if len(turns) < 4:
            del found["first_user"]
        short = {
            key: turn.rstrip("。？！?~～") for key, turn in found.items() if len(turn) <= QUOTE and "“" not in turn
        }
        return {key: turn for key, turn in short.items() if not is_rude(turn)}

    def typed(self, text: str) -> str:
        """The text as a hurried person types it: end punctuation often missing, a space where a comma belongs."""
        rng = self.rng
        bare = text.rstrip("。？！")
        if not bare:
            return text
        text, end = bare, text[len(bare) :]
        if rng.random() < 0.12:
            text = text.replace("，", " ").strip()
        if end == "？":
            return text + rng.choices(("？", "", "?", "？？"), (50, 44, 5, 1))[0]
        if end == "！":
            return text + rng.choices(("！", "", "。"), (40, 45, 15))[0]
        return text + rng.choices(("", "。", "~", "。。", "..."), (74, 23, 1, 1, 1))[0]


def _arithmetic(rng: Random) -> dict[str, str]:
    """Numbers for one sum and one difference, up to 20."""
    a, b = int(rng.random() * 11), int(rng.random() * 11)
    small, big = sorted((int(rng.random() * 21), int(rng.random() * 21)))
    if small == big:
        small, big = (small - 1, big) if big == 20 else (small, big + 1)
    total = NUMERALS[a + b] if a + b <= 10 else "二十" if a + b == 20 else "十" + NUMERALS[a + b - 10]
    numbers = {"a": a, "b": b, "sum": a + b, "big": big, "small": small, "diff": big - small, "next": a + 1}
    words = {"cn_a": NUMERALS[a], "cn_b": NUMERALS[b], "cn_sum": total}
    found = {key: str(number) for key, number in numbers.items()} | words
    assert found.keys() == COMPUTED
    return found
