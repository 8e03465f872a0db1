"""The doctor of a ``.conv`` file: what is in it, what is wrong, by line, and what training would use.

    python -m train.corpus FILE_OR_NAME [--clean] [--json]

It only reads: nothing in the file is changed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studytiny.command import CommandParser
from studytiny.errors import UserError
from train.clean import CleaningResult, RuleEffect, clean, is_rude
from train.corpus import PROBLEMS, ConvDataset, Problem, is_held_out
from train.sources import NAMES, load_corpus

LINES_SHOWN = 5  # of each kind of problem, to people
LINES_LISTED = 1000  # and in the JSON, where a file of nothing but problems should not become another such file
REPLIES_SHOWN = 5
RARE_SHOWN = 20
RARE = 3  # a character seen fewer times than this can hardly be learnt
BAR = 30  # characters of the longest bar
ENCODINGS = {
    "": "无（不是 .conv 文件）",
    "UTF-8-SIG": "UTF-8（带 BOM）",
    "UTF-16-LE": "UTF-16 小端（没有 BOM）",
    "UTF-16-BE": "UTF-16 大端（没有 BOM）",
}
LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100, 200)  # each begins a class of the histogram


@dataclass(frozen=True)
class ProblemCount:
    """How often one of PROBLEMS was found, and on which lines (the first thousand)."""

    count: int
    lines: list[int]


@dataclass(frozen=True)
class Amount:
    """A part of the corpus."""

    dialogues: int
    turns: int
    characters: int


@dataclass(frozen=True)
class Vocabulary:
    """The characters of what training would use.

    Attributes:
        characters: how many different ones.
        cover_99, cover_999: how many of the most frequent make up 99 % and 99.9 % of the text.
        rare: how many are seen once or twice; ``rare_examples`` are some.
    """

    characters: int
    cover_99: int
    cover_999: int
    rare: int
    rare_examples: str


@dataclass(frozen=True)
class Report:
    """All the doctor found.

    Attributes:
        encoding: see ``train.corpus.find_encoding``.
        found: the file as it stands; ``usable``: the complete dialogues; these are ``training`` and ``held_out``.
        dialogue_turns: number of turns -> how many dialogues.
        turn_lengths, reply_lengths: class such as "5-9" -> how many turns (user's and replies; only replies).
        duplicate_dialogues: usable dialogues that are the same as an earlier one.
        frequent_replies: the most frequent replies that are not rude, with their number.
        rude_dialogues: usable dialogues with a word of ``rude_words.txt``.
        cleaning: the effect of each rule on what would be trained on; empty if it was not asked for.
    """

    file: str
    encoding: str
    found: Amount
    usable: Amount
    training: Amount
    held_out: Amount
    problems: dict[str, ProblemCount]
    dialogue_turns: dict[int, int]
    turn_lengths: dict[str, int]
    reply_lengths: dict[str, int]
    duplicate_dialogues: int
    different_replies: int
    frequent_replies: dict[str, int]
    rude_dialogues: int
    vocabulary: Vocabulary
    cleaning: list[RuleEffect]

    def as_json(self) -> dict[str, Any]:
        """The report for programs, with the shares that people would work out from it."""
        usable = max(1, self.usable.dialogues)
        shares = {
            "duplicate_rate": self.duplicate_dialogues / usable,
            "rude_rate": self.rude_dialogues / usable,
        }
        return {**asdict(self), **shares}


def amount(dialogues: Iterable[Sequence[str]]) -> Amount:
    """How much there is."""
    numbers = [(len(turns), sum(map(len, turns))) for turns in dialogues]
    return Amount(len(numbers), sum(turns for turns, _ in numbers), sum(characters for _, characters in numbers))


def count_problems(problems: Iterable[Problem]) -> dict[str, ProblemCount]:
    """By kind, in the order of PROBLEMS, without what was not found."""
    lines: dict[str, list[int]] = {kind: [] for kind in PROBLEMS}
    for problem in problems:
        lines[problem.kind].append(problem.line)
    return {kind: ProblemCount(len(found), found[:LINES_LISTED]) for kind, found in lines.items() if found}


def length_classes(lengths: Mapping[int, int]) -> dict[str, int]:
    """Length -> number as class -> number, classes as in LENGTHS, "0" for the empty; without empty ends."""
    bounds = [0, *LENGTHS]
    totals = dict.fromkeys(bounds, 0)
    for length, number in lengths.items():
        totals[max(bound for bound in bounds if bound <= length)] += number
    filled = [bound for bound in bounds if totals[bound]]
    named = {}
    for bound, following in zip(bounds, [*bounds[1:], None], strict=True):
        if filled and filled[0] <= bound <= filled[-1]:
            single = following == bound + 1
            name = f"{bound}+" if following is None else str(bound) if single else f"{bound}-{following - 1}"
            named[name] = totals[bound]
    return named


def cover(counts: Counter[str], share: float) -> int:
    """How many of the most frequent characters make up ``share`` of the text."""
    wanted, reached = share * counts.total(), 0
    for number, (_, count) in enumerate(counts.most_common(), 1):
        reached += count
        if reached >= wanted:
            return number
    return len(counts)


def describe_vocabulary(dialogues: Iterable[Sequence[str]]) -> Vocabulary:
    """See Vocabulary."""
    counts: Counter[str] = Counter()
    for turns in dialogues:
        counts.update("".join(turns))
    # Sorted: side by side as in the text they could spell what should not be shown.
    rare = [character for character, count in counts.items() if count < RARE]
    rare.sort(key=lambda character: (not "\u4e00" <= character <= "\u9fff", character))
    examples = "".join(character for character in rare if character.isprintable())[:RARE_SHOWN]
    return Vocabulary(len(counts), cover(counts, 0.99), cover(counts, 0.999), len(rare), examples)


def examine(path: str | Path, cleaning: bool = False) -> Report:
    """Examines a file, or where there is none of that name, a corpus of ``train.sources``; ``cleaning`` also tries the
    rules of ``train.clean`` on it.

    Raises:
        UserError: it is missing or not text, or cannot be had. A file with nothing to learn is a finding, not an error.
    """
    known = str(path) in NAMES and not Path(path).exists()
    dataset = load_corpus(str(path)) if known else ConvDataset(path).read_file()
    usable = dataset.usable()
    sides = [is_held_out(turns) for turns in usable]
    training = [turns for turns, held_out in zip(usable, sides, strict=True) if not held_out]
    held_out = [turns for turns, held_out in zip(usable, sides, strict=True) if held_out]
    replies = Counter(reply for turns in usable for reply in turns[1::2])
    polite = [(reply, count) for reply, count in replies.most_common(20 * REPLIES_SHOWN) if not is_rude(reply)]
    return Report(
        file=str(path),
        encoding=dataset.encoding,
        found=amount(dataset.dialogues),
        usable=amount(usable),
        training=amount(training),
        held_out=amount(held_out),
        problems=count_problems(dataset.problems),
        dialogue_turns=dict(sorted(Counter(map(len, dataset.dialogues)).items())),
        turn_lengths=length_classes(Counter(len(turn) for turns in dataset.dialogues for turn in turns)),
        reply_lengths=length_classes(Counter(len(reply) for turns in usable for reply in turns[1::2])),
        duplicate_dialogues=len(usable) - len(set(map(tuple, usable))),
        different_replies=len(replies),
        frequent_replies=dict(polite[:REPLIES_SHOWN]),
        rude_dialogues=sum(any(map(is_rude, turns)) for turns in usable),
        vocabulary=describe_vocabulary(training),
        cleaning=clean(training).table if cleaning else [],
    )


# For people


def bars(classes: Mapping[str, int], unit: str) -> list[str]:
    """A histogram in text."""
    most, total = max(classes.values(), default=0), sum(classes.values())
    return [
        f"  {name:>8} {unit} {'#' * -(-BAR * number // most):<{BAR}} {number}（{number / total:.1%}）"
        for name, number in classes.items()
    ]


def shorten(text: str, most: int = 30) -> str:
    """Text of a file on one line of a terminal: short, and nothing in it that could steer the terminal."""
    shown = "".join(character if character.isprintable() else "?" for character in text[:most])
    return shown + ("……" if len(text) > most else "")


def describe(report: Report) -> str:
    """The report in Chinese, for someone who never looked into a corpus."""

    def share(part: int) -> str:
        return f"{part} 段（{part / max(1, report.usable.dialogues):.1%}）"

    def size(part: Amount) -> str:
        return f"{part.dialogues} 段对话，{part.turns} 句，{part.characters} 个字"

    lines = [
        f"{report.file}",
        f"编码：{ENCODINGS.get(report.encoding, report.encoding)}",
        f"文件里有：{size(report.found)}",
        "",
        "问题（行号从 1 数起）",
    ]
    for kind, problem in report.problems.items():
        where = "、".join(map(str, problem.lines[:LINES_SHOWN]))
        more = "……" if problem.count > LINES_SHOWN else ""
        lines.append(f"  {PROBLEMS[kind]}：{problem.count} 处，第 {where}{more} 行")
    if not report.problems:
        lines.append("  没有发现")

    # Corpora are mostly of two turns or of a few; the long tail fits a line.
    turns = {str(number): count for number, count in report.dialogue_turns.items() if number < 10}
    if longer := sum(count for number, count in report.dialogue_turns.items() if number >= 10):
        turns["10+"] = longer
    lines += ["", "每段对话有几句", *bars(turns, "句")]
    lines += ["", "每句话有多长", *bars(report.turn_lengths, "字")]

    vocabulary = report.vocabulary
    lines += ["", "重复"]
    lines.append(f"  与前面完全相同的对话：{share(report.duplicate_dialogues)}")
    lines.append(f"  回答共 {report.usable.turns // 2} 句，不同的有 {report.different_replies} 句；最常见的：")
    lines += [f"    {count} 次  {shorten(reply)}" for reply, count in report.frequent_replies.items()]
    lines += ["", "用字"]
    lines.append(f"  不同的字（含标点）{vocabulary.characters} 个；")
    lines.append(f"  其中最常用的 {vocabulary.cover_99} 个占全文的 99%，{vocabulary.cover_999} 个占 99.9%。")
    if vocabulary.rare:
        example = f"，例如 {vocabulary.rare_examples}" if vocabulary.rare_examples else ""
        lines.append(f"  只出现一两次的 {vocabulary.rare} 个，很难学会{example}")
    lines += ["", f"含脏话的对话：{share(report.rude_dialogues)}（按 studytiny/rude_words.txt；这里不显示）"]
    if report.cleaning:
        lines += ["", "如果清洗，每条规则的前后（可以逐条关掉）", str(CleaningResult([], report.cleaning))]
    lines += ["", "训练会用到的", f"  训练：{size(report.training)}", f"  留作测试：{size(report.held_out)}"]
    unused = report.found.turns - report.usable.turns
    if unused:
        lines.append(
            f"  用不上：{report.found.dialogues - report.usable.dialogues} 段对话，连同去掉的末句共 {unused} 句"
        )
    return "\n".join(lines)


def main() -> None:
    parser = CommandParser("python -m train.corpus", "给 .conv 语料做体检：里面有什么，哪一行有问题，训练会用到什么。")
    names = "、".join(NAMES)
    parser.add_argument("file", metavar="语料", help=f".conv 文件（只读，不会改动它），或语料的名字：{names}")
    parser.add_argument("--clean", action="store_true", help="再试一遍清洗规则，看每条规则的前后")
    parser.add_argument("--json", action="store_true", help="输出一个 JSON 对象")
    arguments = parser.parse_args()
    report = examine(arguments.file, arguments.clean)
    print(json.dumps(report.as_json()) if arguments.json else describe(report))
    if not report.training.dialogues:
        raise UserError(
            f"{arguments.file} 里没有可训练的对话；每段对话前写一行 E，每句话写成一行“M 文字”，一问一答至少两句。"
        )
