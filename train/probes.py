"""Held-out probes: does a model remember what it was told? ``python -m train.evaluate MODEL_FOLDER --probes``.

`demo/probes/*.txt` holds them (README.md there explains the format). The model answers every turn live and its own
replies stay in the history; only the last one is judged. The same seed makes the same probes and draws.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from studytiny.checkpoint import Model
from studytiny.errors import UserError
from studytiny.generator import Generator
from studytiny.sampling import SamplingConfig
from studytiny.tokenizer import Message, Tokenizer
from train.measures import reply_statistics

FOLDER = Path(__file__).parent / "demo" / "probes"
NOT_PROBES = ("fillers", "first_messages", "forms")  # files of the folder that hold no probes
SLOT = re.compile(r"\{([a-z_]+)(\d?)\}")
OWN_REPLY, OWN_CHARACTERS = "{reply}", 8  # "what did you just say": so much of it must come again
SEEDS_A_PROBE = 100  # more than a probe has turns
AT_ONCE = 32  # probes worked out together
DRAWS = 3  # of each probe at default sampling
WORST = 5  # kinds named as the worst

Values = dict[str, list[tuple[str, ...]]]  # slot -> its values, each in all its forms
Answerer = Callable[[list[Message], SamplingConfig], str]  # Generator.reply, or a test's stand-in


@dataclass(frozen=True)
class Template:
    """One block of a file: rows of (mark, text), from which ``count`` probes are made."""

    kind: str
    count: int
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Probe:
    """What a user says, and what the last reply must hold: one of each group of ``wanted``, none of ``forbidden``."""

    kind: str
    turns: tuple[str, ...]
    wanted: tuple[tuple[str, ...], ...]
    forbidden: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    probe: Probe
    replies: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        last = self.replies[-1].lower()
        before = "".join(self.replies[-2:-1]).rstrip("。？！!?")[:OWN_CHARACTERS] or "\0"  # nothing cannot come again

        def holds(text: str) -> bool:
            return (before if text == OWN_REPLY else text).lower() in last

        return all(any(map(holds, group)) for group in self.probe.wanted) and not any(map(holds, self.probe.forbidden))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are neither empty nor a comment."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def read_values(folder: Path = FOLDER) -> Values:
    """Slot -> its values, each the form that users say and, by ``forms.txt`` if any, the others that count as well."""
    path = folder / "forms.txt"
    forms = {line.split("|")[0]: tuple(line.split("|")) for line in (read_lines(path) if path.exists() else ())}
    lists = {path.stem: read_lines(path) for path in sorted((folder / "values").glob("*.txt"))}
    return {slot: [forms.get(value, (value,)) for value in values] for slot, values in lists.items()}


def read_templates(path: Path, slots: Sequence[str]) -> list[Template]:
    """The blocks of one file of probes; a UserError names the line that cannot be understood."""
    kind, count, rows, templates = "", 0, [], []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        mark, text, where = line[:1], line[1:].strip(), f"{path.name} 第 {number} 行"
        unknown = [slot for slot, _ in SLOT.findall(text) if slot not in slots and f"{{{slot}}}" != OWN_REPLY]
        if mark != "#" and unknown:
            raise UserError(f"{where}：没有 values/{unknown[0]}.txt 这张表。")
        if mark == "@":
            kind = text
        elif mark == "*" and text.isdecimal():
            count = int(text)
        elif re.fullmatch(r"[>=!].+|~\d( \d)*", mark + text):
            rows.append((mark, text))
        elif mark not in ("", "#"):
            raise UserError(f"{where}：看不懂“{line}”；开头应是 @ * > ~ = ! 之一，后面有内容。")
        elif not mark and rows:
            if not (kind and count and {">", "="} <= {row for row, _ in rows}):
                raise UserError(f"{where}：上面这一段缺了 @ 类别、* 题数、> 用户的话、= 答案中的一样。")
            templates.append(Template(kind, count, tuple(rows)))
            count, rows = 0, []
    return templates


def deal(items: Sequence[Any], rng: Random) -> Iterator[Any]:
    """The items in random order, again and again: each comes up as often as the others."""
    while True:
        yield from rng.sample(items, len(items))


def fill(text: str, filled: dict[str, tuple[str, ...]]) -> list[str]:
    """``text`` with each form of the values in it; the first one is what users say. ``filled``: "{name}" -> forms."""
    texts = [text]
    for slot, forms in filled.items():
        texts = [found.replace(slot, form) for found in texts for form in (forms if slot in found else forms[:1])]
    return texts


def make_probes(template: Template, values: Values, fillers: Sequence[str], rng: Random) -> list[Probe]:
    """The probes of one template: wordings, values and distances take turns."""
    slots = dict.fromkeys(slot for _, text in template.rows for slot in SLOT.findall(text) if slot[0] in values)
    decks = {name: deal(values[name], rng) for name, _ in slots}
    rows = [(mark, text, deal(text.split(" " if mark == "~" else "|"), rng)) for mark, text in template.rows]
    probes = []
    for _ in range(template.count):
        filled: dict[str, tuple[str, ...]] = {}
        for name, digit in slots:
            filled[f"{{{name}{digit}}}"] = next(value for value in decks[name] if value not in filled.values())
        turns: list[str] = []
        judged: dict[str, list[tuple[str, ...]]] = {"=": [], "!": []}
        for mark, text, deck in rows:
            if mark == "~":
                turns += rng.sample(fillers, int(next(deck)))
            elif mark == ">":
                turns.append(fill(next(deck), filled)[0])
            else:
                judged[mark].append(tuple(form for part in text.split("|") for form in fill(part, filled)))
        probes.append(Probe(template.kind, tuple(turns), tuple(judged["="]), sum(judged["!"], ())))
    return probes


def load_probes(seed: int = 0, folder: Path = FOLDER) -> list[Probe]:
    """All probes, kind by kind; the same for the same seed. A UserError says if `folder` holds none."""
    if not (folder / "fillers.txt").is_file():
        raise UserError(f"{folder} 里没有 fillers.txt（闲话，一行一句）；考题怎么写，见 train/demo/probes/README.md。")
    values, fillers = read_values(folder), read_lines(folder / "fillers.txt")
    probes = [
        probe
        for path in sorted(path for path in folder.glob("*.txt") if path.stem not in NOT_PROBES)
        for number, template in enumerate(read_templates(path, list(values)))
        for probe in make_probes(template, values, fillers, Random(f"{seed} {path.stem} {number}"))
    ]
    if not probes:
        raise UserError(f"{folder} 里没有考题：请一类写一个 .txt，写法见 train/demo/probes/README.md。")
    return probes


def run_probe(answerer: Answerer, probe: Probe, sampling: SamplingConfig) -> Answer:
    """Lets the model answer every turn; each draws with the next seed."""
    messages: list[Message] = []
    for number, turn in enumerate(probe.turns):
        messages.append({"role": "user", "content": turn})
        reply = answerer(messages, replace(sampling, seed=(sampling.seed or 0) + number))
        messages.append({"role": "assistant", "content": reply})
    return Answer(probe, tuple(message["content"] for message in messages[1::2]))


def run_probes(answerer: Answerer, probes: Sequence[Probe], sampling: SamplingConfig, seed: int = 0) -> list[Answer]:
    """Answers to all probes, many worked out at once."""
    settings = [replace(sampling, seed=(seed + number) * SEEDS_A_PROBE) for number in range(len(probes))]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(lambda job: run_probe(answerer, *job), zip(probes, settings, strict=True)))


def summary(answers: Sequence[Answer]) -> dict:
    """Share of right answers in total and by kind, and the worst kinds, the worst one first."""
    kinds: dict[str, list[bool]] = {}
    for answer in answers:
        kinds.setdefault(answer.probe.kind, []).append(answer.is_right)
    shares = {kind: sum(right) / len(right) for kind, right in kinds.items()}
    total = sum(answer.is_right for answer in answers) / len(answers)
    return {"total": total, "kinds": shares, "worst": sorted(shares, key=shares.__getitem__)[:WORST]}


def measure_probes(
    model: Model, tokenizer: Tokenizer, seed: int = 0, folder: Path = FOLDER
) -> tuple[dict, list[Answer], list[Answer]]:
    """All figures; the answers to the probes, DRAWS each, at default sampling; those to the first messages."""
    probes, messages = load_probes(seed, folder), read_lines(FOLDER / "first_messages.txt")
    firsts = [Probe("", (message[: model.config.max_length // 2],), (), ()) for message in messages]
    seconds = {}
    with contextlib.closing(Generator(model, tokenizer, "float32", max_running=AT_ONCE)) as generator:

        def timed(name: str, asked: Sequence[Probe], sampling: SamplingConfig) -> list[Answer]:
            start = time.perf_counter()
            answers = run_probes(generator.reply, asked, sampling, seed)
            seconds[name] = round(time.perf_counter() - start, 1)
            return answers

        greedy = timed("greedy", probes, SamplingConfig(temperature=0))
        sampled = timed("sampled", probes * DRAWS, SamplingConfig())
        first = timed("first_messages", firsts, SamplingConfig())
    replies = [answer.replies[0] for answer in first]
    empty = sum(not reply.strip() for reply in replies) / len(replies)
    figures = {"messages": len(replies), "empty_rate": empty, **asdict(reply_statistics(replies))}
    result = {"probes": len(probes), "greedy": summary(greedy), "sampled": summary(sampled), "first_messages": figures}
    return {**result, "seconds": seconds}, sampled, first


def describe(result: dict) -> str:
    """The figures as a person reads them."""
    greedy, sampled, first = result["greedy"], result["sampled"], result["first_messages"]
    rows = [*greedy["kinds"].items(), ("合计", greedy["total"])]
    drawn = {**sampled["kinds"], "合计": sampled["total"]}
    table = "".join(f"  {share:6.1%} / {drawn[kind]:6.1%}  {kind}\n" for kind, share in rows)
    return f"""考题 {result["probes"]} 道，答对的比例（贪心 / 默认抽样，后者每道 {DRAWS} 次）：
{table}最差的几类：贪心 {"、".join(greedy["worst"])}；默认抽样 {"、".join(sampled["worst"])}
第一句话 {first["messages"]} 句的回答：平均 {first["mean_reply_chars"]:.1f} 字，空的 {first["empty_rate"]:.1%}，\
同一短语说三遍 {first["repetition_rate"]:.1%}，含脏话 {first["profanity_rate"]:.1%}，\
distinct-1 {first["distinct_1"]:.3f}，distinct-2 {first["distinct_2"]:.3f}
用时（秒）：贪心、默认抽样、第一句话各 {"、".join(map(str, result["seconds"].values()))}"""
