"""Reads the hand-written material: `topics/*.txt` (exchanges) and `values/*.txt` (what fills a slot).

The format is explained for contributors in README.md. Everything wrong with a file is a `TopicError`: one Chinese
sentence that names the file and the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path

from studytiny.errors import UserError

SLOT = re.compile(r"\{(\??)([a-z_]+)(\d*)\}")
PIECE = re.compile(r"(\{\??[a-z_]+\d*\}|[()|])")
CHOICE = re.compile(r"\(([^()]*)\)")
KINDS = ("话题", "开头", "结尾", "接话", "答问", "刚才", "总结", "询问", "记混", "确认", "更正", "未知")
FACT_KINDS = ("询问", "记混", "确认", "更正", "未知")
FLAGS = ("连问", "不复述", "可迟", "随口")
COMPUTED = frozenset({"a", "b", "sum", "big", "small", "diff", "next", "cn_a", "cn_b", "cn_sum"})
QUOTED = frozenset({"last_user", "last_bot", "first_user"})
PERSONS = frozenset({"ta", "pal", "other_ta"})  # the pronoun of the friend, a word for the friend, the other's pronoun
RECAP = "recap"
SAME = "same"  # inside a value: what stands before it, once more
NEVER = "never"  # values/never.txt: values no slot may take
TYPED = "typed"  # values/typed.txt: how hurried people write
NO_REMARK = ("你", "？", "明天", "帮", "怎么", "喜欢", "爱", "叫", "死", "霸凌")  # to the bot, a fact, or too grave
TEMPER = 0.7  # 1: a file's share grows with its length and weights; 0: all files alike

Part = str | tuple[str, str] | list["tuple[Part, ...]"]  # text, slot (name, digits), choice


def parse(text: str) -> tuple[Part, ...]:
    """The text as parts ready to be filled; `{?name}` leaves nothing behind. Brackets must be paired."""
    options: list[list[Part]] = [[]]
    above: list[list[list[Part]]] = []
    for piece in PIECE.split(text):
        if piece == "(":
            above.append(options)
            options = [[]]
        elif piece == "|" and above:
            options.append([])
        elif piece == ")":
            choice: Part = [tuple(option) for option in options]
            options = above.pop()
            options[-1].append(choice)
        elif slot := SLOT.fullmatch(piece):
            if not slot[1]:
                options[-1].append((slot[2], slot[3]))
        elif piece:
            options[-1].append(piece)
    return tuple(options[0])


def expand(text: str, choose: Callable[[list[str]], str]) -> str:
    """Replace every `(a|b)`, the inner ones first, by what `choose` takes from its options."""
    while (chosen := CHOICE.sub(lambda match: choose(match[1].split("|")), text)) != text:
        text = chosen
    return text


class TopicError(UserError):
    """A topic or value file that cannot be read; the message is one sentence with file and line."""


@dataclass(frozen=True)
class Line:
    """One wording, with the place it stands at for error messages."""

    text: str
    where: str

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return parse(self.text)

    @cached_property
    def slots(self) -> frozenset[str]:
        """The slots this wording draws or copies."""
        return frozenset(name + digits for optional, name, digits in SLOT.findall(self.text) if not optional)

    @cached_property
    def needs(self) -> frozenset[str]:
        """The facts, written `{?name}`, that must be known for this wording to be used."""
        return frozenset(name for optional, name, _ in SLOT.findall(self.text) if optional)


@dataclass(frozen=True)
class Reply:
    """A wording of the assistant and the exchanges that may follow exactly this wording."""

    line: Line
    follow_ups: tuple[Exchange, ...]


@dataclass(frozen=True)
class Exchange:
    """User wordings that mean the same, and replies each of which fits all of them."""

    users: tuple[Line, ...]
    replies: tuple[Reply, ...]

    @cached_property
    def user_slots(self) -> frozenset[str]:
        """Every slot a user line of this exchange or of its follow-ups may say."""
        own = (line.slots for line in self.users)
        return frozenset().union(*own, *(e.user_slots for reply in self.replies for e in reply.follow_ups))

    @cached_property
    def quoted(self) -> frozenset[str]:
        """The slots that repeat an earlier turn (`{last_user}` and so on)."""
        return frozenset().union(*(reply.line.slots for reply in self.replies)) & QUOTED


@dataclass(frozen=True)
class Section:
    """Exchanges of one theme and the rules for when they may come."""

    kind: str
    name: str
    exchanges: tuple[Exchange, ...]
    facts: tuple[str, ...] = ()
    weight: float = 1.0
    groups: frozenset[str] = frozenset()
    touches: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()  # facts that must be known
    refers: tuple[str, ...] = ()  # a pronoun means the first of these; none of the others may be nearer


@dataclass(eq=False)
class Book:
    """All the material: sections by kind, values by slot name, and the facts a user can be asked about later."""

    sections: dict[str, list[Section]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    values: dict[str, list[Line]] = field(default_factory=dict)
    banned: set[str] = field(default_factory=set)

    @cached_property
    def facts(self) -> frozenset[str]:
        """What a user can tell and ask for later: the slots that have an `询问` section."""
        return frozenset(fact for section in self.sections["询问"] for fact in section.facts)

    @cached_property
    def importance(self) -> dict[str, float]:
        """How often each fact is told: the greatest weight of the `询问` sections that ask for it first."""
        found = dict.fromkeys(sorted(self.facts), 0.0)
        for section in self.sections["询问"]:
            found[section.facts[0]] = max(found[section.facts[0]], section.weight)
        return found

    @cached_property
    def leans(self) -> dict[str, frozenset[str]]:
        """Facts that must be known before a fact can be told: the pet's age comes after the pet's name."""
        found: dict[str, frozenset[str]] = {}
        for fact in sorted(self.facts):
            given = [section.given for section, _ in self.pool("话题", fact)[0]]
            found[fact] = frozenset.intersection(*given) if given else frozenset()
        return found

    @cached_property
    def remarks(self) -> list[Line]:
        """What a user says of themselves in the sections marked `随口`: it may stand beside a fact that is told."""
        sections = (section for section in self.sections["话题"] if "随口" in section.flags)
        lines = (line for section in sections for exchange in section.exchanges for line in exchange.users)
        return [line for line in lines if not line.slots | line.needs and not any(w in line.text for w in NO_REMARK)]

    @cached_property
    def unrelated(self) -> list[Line]:
        """Replies of small talk that need nothing said before."""
        exchanges = [exchange for _, exchange in self.pool("话题")[0]]
        lines = {reply.line.text: reply.line for exchange in exchanges for reply in exchange.replies}
        bound = self.facts | PERSONS | QUOTED | COMPUTED
        return [line for line in lines.values() if not line.needs | line.slots & bound]

    @cached_property
    def typos(self) -> list[tuple[str, str]]:
        """Pairs (as it is written here, as hurried people type it) of `values/typed.txt`."""
        return [tuple(line.text.split("=")) for line in self.values.get(TYPED, [])]

    @cache  # noqa: B019 - a Book lives as long as the program
    def pool(self, kind: str, fact: str = "") -> tuple[list[tuple[Section, Exchange]], list[float]]:
        """The exchanges of `kind` and their cumulative weights.

        With `fact`: those that tell it (`话题`) or are about it (kinds of facts). Without: of `话题` those that tell
        nothing. The shares of the files are tempered, so that long files do not crowd out short ones.
        """
        pairs = [(s, e) for s in self.sections[kind] for e in s.exchanges]
        if kind in FACT_KINDS:
            pairs = [(s, e) for s, e in pairs if not fact or fact in s.facts]
        elif kind == "话题":
            told = {id(e): (e.user_slots & self.facts) - s.given for s, e in pairs}
            pairs = [(s, e) for s, e in pairs if (fact in told[id(e)] if fact else not told[id(e)])]
        return pairs, self.shares(pairs)

    @cache  # noqa: B019 - a Book lives as long as the program
    def referring(self, fact: str) -> tuple[list[tuple[Section, Exchange]], list[float]]:
        """The exchanges that speak of `fact` with a pronoun, and their cumulative weights."""
        kinds = ("话题", "询问", "未知")
        found = [section for kind in kinds for section in self.sections[kind] if section.refers[:1] == (fact,)]
        pairs = [(section, exchange) for section in found for exchange in section.exchanges]
        return pairs, self.shares(pairs)

    @cache  # noqa: B019 - a Book lives as long as the program
    def mistaken(self, fact: str) -> tuple[list[tuple[Section, Exchange]], list[float]]:
        """The questions for something unknown that could be taken for `fact`, and their cumulative weights."""
        found = [section for section in self.sections["未知"] if fact in section.given and not section.refers]
        pairs = [(section, exchange) for section in found for exchange in section.exchanges]
        return pairs, self.shares(pairs)

    def shares(self, pairs: list[tuple[Section, Exchange]]) -> list[float]:
        files: dict[str, float] = {}
        for section, _ in pairs:
            files[section.name] = files.get(section.name, 0) + section.weight
        return list(accumulate(section.weight * files[section.name] ** (TEMPER - 1) for section, _ in pairs))

    def check_slots(self) -> None:
        """Every slot must have a value file; a value may be composed of other values."""
        known = (
            self.values.keys() | COMPUTED | QUOTED | PERSONS | {RECAP, SAME} | {f"old_{fact}" for fact in self.facts}
        )
        exchanges = [e for sections in self.sections.values() for s in sections for e in s.exchanges]
        lines = [line for values in self.values.values() for line in values]
        while exchanges:
            exchange = exchanges.pop()
            lines += [*exchange.users, *(reply.line for reply in exchange.replies)]
            exchanges += [e for reply in exchange.replies for e in reply.follow_ups]
        for section in (section for sections in self.sections.values() for section in sections):
            for fact in (*section.facts, *section.given, *section.refers):
                if fact not in self.facts:
                    where = section.exchanges[0].replies[0].line.where
                    raise TopicError(f"{where}：标题里写了 {fact}，可是没有“@询问 {fact}”。")
        for line in lines:
            if set("{}()|") & set(expand(SLOT.sub("", line.text), lambda _: "")):
                raise TopicError(f"{line.where}：括号没有成对，或者花括号里不是小写英文的槽名。")
            for _, name, _ in SLOT.findall(line.text):
                if name not in known:
                    raise TopicError(f"{line.where}：槽 {{{name}}} 没有对应的 values/{name}.txt。")


def load_book(folder: Path) -> Book:
    """Read `folder/topics/*.txt` and `folder/values/*.txt`, in the order of their names.

    What stands in `folder/probes/values/*.txt` and in `values/never.txt` will fill no slot.
    """
    book = Book()
    for path in sorted((folder / "probes" / "values").glob("*.txt")):
        book.banned.update(row.strip() for row in _read(path).splitlines() if not row.startswith("#"))
    for path in sorted((folder / "values").glob("*.txt")):
        rows = [(n, row.strip()) for n, row in enumerate(_read(path).splitlines(), 1)]
        lines = [Line(row, f"{path.name} 第 {n} 行") for n, row in rows if row and not row.startswith("#")]
        if not lines:
            raise TopicError(f"{path.name} 第 1 行：文件里一个值也没有。")
        book.values[path.stem] = lines
        for line in lines if path.stem == TYPED else []:
            if len(line.text.split("=")) != 2:
                raise TopicError(f"{line.where}：要写成“什么=啥”这样，等号左右各一个说法。")
    book.banned.update(line.text for line in book.values.pop(NEVER, []))
    book.banned.discard("")
    for path in sorted((folder / "topics").glob("*.txt")):
        for section in _TopicParser(path).sections():
            book.sections[section.kind].append(section)
    _share_questions(book)
    book.check_slots()
    return book


def _share_questions(book: Book) -> None:
    """`未知` is asked in the same words as `询问`: its user lines are those of the first exchange there."""
    asked = {section.facts: section.exchanges[0].users for section in reversed(book.sections["询问"])}
    for i, section in enumerate(book.sections["未知"]):
        first = section.exchanges[0]
        users = first.users or asked.get(section.facts)
        if not users:
            raise TopicError(f"{first.replies[0].line.where}：“未知”没有写用户的话，也没有对应的“询问”可借。")
        filled = (Exchange(users, first.replies), *section.exchanges[1:])
        book.sections["未知"][i] = replace(section, exchanges=filled)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise TopicError(f"{path.name} 第 {line} 行：不是 UTF-8 编码，请用 UTF-8 另存。") from None


def _split(text: str) -> list[str]:
    """Split at the `|` that stand outside parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


class _TopicParser:
    """Recursive descent over the indented lines of one topic file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[int, int, str, str]] = []  # line number, depth, mark, text
        self.at = 0
        for number, row in enumerate(_read(path).splitlines(), 1):
            text = row.strip()
            if not text or text.startswith("#"):
                continue
            spaces = len(row) - len(row.lstrip(" "))
            if text[0] not in "@><" or not text[1:].strip():
                raise TopicError(f"{path.name} 第 {number} 行：每行要以 @、> 或 < 开头，后面写内容。")
            if spaces % 2 or row[spaces] == "\t":
                raise TopicError(f"{path.name} 第 {number} 行：缩进要用空格，每层两个。")
            self.rows.append((number, spaces // 2, text[0], text[1:].strip()))

    def fail(self, message: str, number: int | None = None) -> TopicError:
        last = self.rows[min(self.at, len(self.rows) - 1)][0] if self.rows else 1
        return TopicError(f"{self.path.name} 第 {number or last} 行：{message}")

    def sees(self, mark: str, depth: int) -> bool:
        return self.at < len(self.rows) and self.rows[self.at][1:3] == (depth, mark)

    def sections(self) -> list[Section]:
        found = []
        while self.at < len(self.rows):
            if not self.sees("@", 0):
                raise self.fail("这里应当是一行不缩进的 @ 标题，例如“@话题”。")
            header = self.rows[self.at]
            self.at += 1
            found.append(self.section(header[0], header[3]))
        if not found:
            raise self.fail("文件里没有内容。")
        return found

    def section(self, number: int, header: str) -> Section:
        kind, *words = header.split()
        if kind not in KINDS:
            raise self.fail(f"不认识“@{kind}”，可用的是{'、'.join(KINDS)}。", number)
        options = {"权重": "1", "互斥": "", "涉及": "", "已知": "", "指代": ""}
        facts, flags = [], []
        for word in words:
            key, equals, value = word.partition("=")
            if equals and key in options:
                options[key] = value
            elif word in FLAGS:
                flags.append(word)
            elif kind in FACT_KINDS and word.isascii() and not equals:
                facts.append(word)
            else:
                raise self.fail(f"不认识标题里的“{word}”。", number)
        if kind in FACT_KINDS and not facts:
            raise self.fail(f"“@{kind}”后面要写是哪一件事，例如“@{kind} name”。", number)
        try:
            weight = float(options["权重"])
        except ValueError:
            raise self.fail(f"权重要写数字，现在是“{options['权重']}”。", number) from None
        exchanges = self.exchanges(0, may_borrow=kind == "未知")
        if not exchanges:
            raise self.fail("这个标题下面没有对话。", number)
        groups, touches, given, refers = (
            tuple(filter(None, options[key].split(","))) for key in ("互斥", "涉及", "已知", "指代")
        )
        return Section(
            kind, self.path.stem, exchanges, tuple(facts), weight,
            frozenset(groups), frozenset(touches), frozenset(flags), frozenset(given), refers,
        )  # fmt: skip

    def exchanges(self, depth: int, may_borrow: bool = False) -> tuple[Exchange, ...]:
        found = []
        while self.sees(">", depth) or (may_borrow and not found and self.sees("<", depth)):
            users = self.lines(">", depth)
            replies: list[Reply] = []
            while self.sees("<", depth):
                lines = self.lines("<", depth)
                follow_ups = self.exchanges(depth + 1)
                # They follow the wordings right above: all questions, or all statements, up to a change of the two.
                block: list[Reply] = []
                for line in reversed(lines):
                    if line.text.endswith("？") != lines[-1].text.endswith("？"):
                        follow_ups = ()
                    block.append(Reply(line, follow_ups))
                replies += reversed(block)  # the first of the file is drawn most
            if not replies:
                raise self.fail("用户的话（>）后面要有同样缩进的回答（<）。")
            found.append(Exchange(users, tuple(replies)))
        if self.at < len(self.rows) and not self.sees("@", 0) and self.rows[self.at][1] >= depth:
            raise self.fail("这一行的缩进或开头的符号和上面接不上。")
        return tuple(found)

    def lines(self, mark: str, depth: int) -> tuple[Line, ...]:
        """Consecutive lines of one mark; `a|b` outside parentheses is two wordings."""
        found = []
        while self.sees(mark, depth):
            number, _, _, text = self.rows[self.at]
            for wording in _split(text):
                if not wording.strip():
                    raise self.fail("竖线两边都要有话。", number)
                found.append(Line(wording.strip(), f"{self.path.name} 第 {number} 行"))
            self.at += 1
        return tuple(found)
