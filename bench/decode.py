"""Speed of replies, against the peers: ``python bench/decode.py [--rounds 7] [--engines NAME ...] [--quick]``.

One conversation: a prompt of 64 tokens, 128 new ones; and 16 or 32 at once, of equal and of ragged lengths, the same
list for everybody. The engines are processes of their own (``peers.py``) and work one at a time: within a round each
takes its turn, in random order, so that a slow moment of the machine hits all of them. The first token is a reply of
one token, from question to end; the speed of one conversation is that of the 127 after it; of many, everything counts.
Figures are medians over the rounds, ratios are medians of the rounds' ratios. The tables go into a section of
``bench/RESULTS.md``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.peers import NAMES, Workload
from studytiny.command import CommandParser, number, run_command
from studytiny.errors import UserError
from studytiny.files import write_atomically

PROGRAM = Path(__file__).with_name("peers.py")
RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "ctranslate2", "llama-cpp-python", "gradio")
REST = 0.2  # seconds before each run: threads of the engine before have stopped spinning
NEAR = 1.5  # a setting that took so many times as long as the best is not tried again


class Peer:
    """One engine in its process."""

    def __init__(self, name: str, folder: Path, threads: int, *modules: str) -> None:
        """``modules``: what the process imports besides."""
        self.name = name
        self.chosen: dict[str, int] = {}  # workload -> number of the best setting
        self._log = folder / f"{name}.log"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM), name, str(folder), str(threads), *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
            )
        hello = self._read()
        self.missing: str = hello.get("missing", "")
        self.settings: list[str] = hello.get("settings", [])

    def run(self, key: str, workload: Workload, seed: int, setting: int | None = None) -> list[dict]:
        """The answers to ``workload`` (see ``peers.Answer``), with its chosen setting unless told another."""
        time.sleep(REST)
        setting = self.chosen.get(key, 0) if setting is None else setting
        return self._ask({"do": "run", "workload": asdict(workload), "seed": seed, "setting": setting})["answers"]

    def tune(self, key: str, workload: Workload, tries: int) -> None:
        """Tries every setting and keeps the fastest; where first tokens count, the one they come soonest with.

        Those that came near the best get ``tries`` tries. 0 only warms up and stays with the first setting.
        """
        costs = [math.inf] * len(self.settings)
        turns = tries if tries and len(self.settings) > 1 else 1
        for turn in range(turns):
            near = min(costs) * NEAR
            for setting in range(len(self.settings) if tries else 1):
                if costs[setting] <= near:
                    answers = self.run(key, workload, turn, setting)
                    cost = sum(first_times(answers)) if workload.watch else end_time(workload, answers)
                    costs[setting] = min(costs[setting], cost)
        self.chosen[key] = costs.index(min(costs))

    def memory(self) -> dict[str, float]:
        """``peak`` and ``now``: resident MB of the process."""
        return self._ask({"do": "memory"})

    def close(self) -> None:
        """Ends the process: it stops at the end of its orders, or else is made to."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, order: dict) -> dict:
        with suppress(BrokenPipeError):  # it has stopped, and ``_read`` says why
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace")
            raise UserError(f"{NAMES[self.name]} 的进程停了：{last_line(said)}。")
        return json.loads(line)


@contextmanager
def start_peers(names: Sequence[str], threads: int) -> Iterator[tuple[list[Peer], Path]]:
    """The engines, ready, and the folder of their models; those that are not installed say so in ``missing``."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        command = [sys.executable, str(PROGRAM), "prepare", folder, str(threads)]
        prepared = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if prepared.returncode:
            raise UserError(f"写不出测试用的模型：{last_line(prepared.stderr)}。")
        peers = []
        for name in names:
            peer = Peer(name, Path(folder), threads)
            stack.callback(peer.close)
            peers.append(peer)
            print(f"  {NAMES[name]}：{peer.missing or '就绪'}", flush=True)
        yield peers, Path(folder)


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "没有说原因"


def end_time(workload: Workload, answers: list[dict]) -> float:
    """When the last token of all was there, in seconds since the start."""
    arrivals = workload.arrivals or [0.0] * len(answers)
    return max(arrival + answer["done"] for arrival, answer in zip(arrivals, answers, strict=True))


def first_times(answers: list[dict]) -> list[float]:
    """Seconds from each conversation's arrival to its first token; the refused ones are left out."""
    return [answer["first"] for answer in answers if not answer["refused"]]


def rate(workload: Workload, answers: list[dict]) -> float:
    """New tokens per second, of all conversations together."""
    return sum(answer["tokens"] for answer in answers) / end_time(workload, answers)


def ragged(count: int, longest_reply: int, watch: bool = False) -> Workload:
    """Prompts of 8 to 120 tokens, replies of 16 to ``longest_reply``: the same list at every call."""
    source = random.Random(count)
    prompts = [source.randint(8, 120) for _ in range(count)]
    return Workload(prompts, [source.randint(16, longest_reply) for _ in range(count)], watch=watch)


@dataclass(frozen=True)
class Plan:
    """What is measured: ``prompt`` and ``reply`` in tokens, ``sizes`` in conversations at once."""

    prompt: int = 64
    reply: int = 128
    sizes: tuple[int, ...] = (16, 32)

    def workloads(self) -> dict[str, Workload]:
        found = {"first": Workload([self.prompt], [1]), "one": Workload([self.prompt], [self.reply])}
        for size in self.sizes:
            found[f"equal-{size}"] = Workload([self.prompt] * size, [self.reply] * size)
        for size in self.sizes:
            found[f"ragged-{size}"] = ragged(size, self.reply)
        return found

    def headings(self) -> dict[str, str]:
        found = {"one": "一段对话，字/秒", "first": "首字，毫秒"}
        found |= {f"equal-{size}": f"{size} 段，一样长，字/秒" for size in self.sizes}
        return found | {f"ragged-{size}": f"{size} 段，长短不一，字/秒" for size in self.sizes}


@dataclass
class Figures:
    """One value a round for each engine and column."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, engine: str, column: str, value: float) -> None:
        self.values.setdefault(engine, {}).setdefault(column, []).append(value)

    def median(self, engine: str, column: str) -> float:
        return statistics.median(self.values[engine][column])

    def cell(self, engine: str, column: str) -> str:
        """Median, and in brackets the smallest and the largest."""
        values = self.values.get(engine, {}).get(column)
        return (
            f"{shorten(statistics.median(values))}（{shorten(min(values))}–{shorten(max(values))}）" if values else "—"
        )

    def ratio(self, engine: str, other: str, column: str, less_is_better: bool) -> float:
        """How many times as fast ``engine`` is as ``other``: median over the rounds."""
        pairs = zip(self.values[engine][column], self.values[other][column], strict=True)
        return statistics.median(b / a if less_is_better else a / b for a, b in pairs)


def shorten(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def measure(peers: list[Peer], plan: Plan, rounds: int) -> Figures:
    figures, order = Figures(), random.Random(0)
    whole: dict[str, list[float]] = {peer.name: [] for peer in peers}  # seconds of one conversation, all of it
    for seed in range(1000, 1000 + rounds):
        for key, workload in plan.workloads().items():
            for peer in order.sample(peers, len(peers)):
                answers = peer.run(key, workload, seed)
                if key == "first":
                    figures.add(peer.name, key, end_time(workload, answers) * 1000)
                elif key == "one":
                    whole[peer.name].append(end_time(workload, answers))
                else:
                    figures.add(peer.name, key, rate(workload, answers))
        print(f"  第 {seed - 999} 轮，共 {rounds} 轮", flush=True)
    for name, times in whole.items():
        first = figures.median(name, "first") / 1000
        for seconds in times:
            figures.add(name, "one", (plan.reply - 1) / (seconds - first))
    return figures


def report(peers: list[Peer], plan: Plan, figures: Figures, rounds: int, facts: str) -> str:
    headings, present = plan.headings(), [peer.name for peer in peers if not peer.missing]
    rows = [[NAMES[name], *(figures.cell(name, column) for column in headings)] for name in present]
    parts = [
        facts,
        f"提示 {plan.prompt} 个 token，回答正好 {plan.reply} 个；长短不一：提示 8–120、回答 16–{plan.reply}，"
        "大家用同一份名单。"
        f"温度 0.7、top-k 50、重复惩罚 1.1。{rounds} 轮的中位数（最小–最大）；一段对话的速度不算首字。",
        table(["引擎", *headings.values()], rows + missing_rows(peers)),
    ]
    ratios = ratio_rows(present, headings, figures)
    if ratios:
        parts.append("本项目是对手的几倍快（每轮的比的中位数；CTranslate2 取这一栏里它最快的一行）：")
        parts.append(table(["", *headings.values()], ratios))
    choices = [peer for peer in peers if len(peer.settings) > 1]
    if choices:
        settings = [[NAMES[p.name], *(p.settings[p.chosen.get(key, 0)] for key in headings)] for p in choices]
        parts.append("每个对手先试遍自己的设置，这里是各栏最快、也就是测速时用的：")
        parts.append(table(["引擎", *headings.values()], settings))
    return "\n\n".join(parts)


def missing_rows(peers: list[Peer]) -> list[list[str]]:
    return [[NAMES[peer.name], f"没有测：{peer.missing}"] for peer in peers if peer.missing]


def ratio_rows(present: list[str], headings: dict[str, str], figures: Figures) -> list[list[str]]:
    """One row for each of our engines and each family of peers that both have figures."""
    rows = []
    for ours in (name for name in present if name.startswith("studytiny")):
        for family, label in (("llama.cpp", "llama.cpp"), ("ctranslate2", "CTranslate2")):
            rivals = [name for name in present if name.startswith(family)]
            if not rivals:
                continue
            row = [f"{NAMES[ours]} : {label}"]
            for column in headings:
                less = column == "first"
                best = (min if less else max)(rivals, key=lambda name, column=column: figures.median(name, column))
                row.append(f"{figures.ratio(ours, best, column, less):.2f}")
            rows.append(row)
    return rows


# The report


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine_facts(threads: int) -> str:
    """Processor, memory, versions, date and how busy the machine is now, which is best asked before it all begins."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts = [named[0] if named else platform.processor() or platform.machine(), f"{os.cpu_count()} 核"]
    if hasattr(os, "sysconf"):
        facts.append(f"内存 {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    facts += [f"{threads} 线程", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            facts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            facts.append(f"{package} 没有安装")
    facts.append(f"{datetime.date.today()}")
    if hasattr(os, "getloadavg"):
        facts.append(f"开始时的系统负载 {os.getloadavg()[0]:.1f}")
    return "，".join(facts) + "。"


def replace_section(document: str, name: str, title: str, body: str) -> str:
    """``document`` with the section ``name`` put in, in place of what it held there; the rest stays."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{begin}\n## {title}\n\n{body}\n{end}"
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if found and closed:
        return before + section + after
    return f"{document.rstrip()}\n\n{section}\n".lstrip()


def save_section(path: Path, name: str, title: str, body: str) -> None:
    document = path.read_text(encoding="utf-8") if path.exists() else "# 速度 / Speed\n"
    write_atomically(path, replace_section(document, name, title, body))
    print(f"\n{body}\n\n已写进 {path} 的“{title}”一节。")


def add_options(parser: CommandParser, engines: Sequence[str], rounds: int) -> None:
    """The options that both benchmarks have."""
    parser.add_argument("--rounds", type=number(int), default=rounds, metavar="轮", help=f"测几轮（默认 {rounds}）")
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines, metavar="引擎", help="只测这几个")
    parser.add_argument("--threads", type=number(int), default=2, metavar="线程", help="每个引擎用几个线程（默认 2）")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="文件", help="写到哪里（默认 bench/RESULTS.md）")
    parser.add_argument("--quick", action="store_true", help="很小的一次，只看能不能跑；数不算数")


def main() -> None:
    parser = CommandParser("python bench/decode.py", "比较逐字生成的速度：本项目和同类软件，交替着测。")
    add_options(parser, list(NAMES), 7)
    arguments = parser.parse_args()
    plan, rounds, tries = (Plan(reply=24, sizes=(4,)), 1, 0) if arguments.quick else (Plan(), arguments.rounds, 2)
    facts = machine_facts(arguments.threads)
    print(f"{facts}\n准备模型和各个引擎：", flush=True)
    with start_peers(arguments.engines, arguments.threads) as (peers, _):
        present = [peer for peer in peers if not peer.missing]
        for peer in present:
            print(f"  试 {NAMES[peer.name]} 的设置（{len(peer.settings)} 种）", flush=True)
            for key, workload in plan.workloads().items():
                peer.tune(key, workload, tries)
        figures = measure(present, plan, rounds)
    save_section(arguments.out, "decode", "逐字生成的速度", report(peers, plan, figures, rounds, facts))


if __name__ == "__main__":
    run_command(main)
