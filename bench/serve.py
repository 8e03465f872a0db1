"""Waiting under load: ``python bench/serve.py [--rounds 5] [--engines NAME ...] [--quick]``.

Milliseconds to the first character when nobody else is there, and of 16 conversations that arrive at random within
about two seconds; what 32 visitors at once wait while one caller floods the queue; and the memory of a process that
answers 32 conversations. CTranslate2 and llama.cpp do the first two as well: how they are run stands in ``peers.py``.
The tables go into a section of ``bench/RESULTS.md``.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.decode import (
    Figures,
    Peer,
    add_options,
    first_times,
    machine_facts,
    missing_rows,
    ragged,
    rate,
    save_section,
    start_peers,
    table,
)
from bench.peers import NAMES, Workload
from studytiny.command import CommandParser, run_command

ENGINES = [name for name in NAMES if not name.startswith("transformers")]  # its generate() cannot take late arrivals
FLOOD = "flood"
HEAD_START = 0.1  # seconds before the visitors come, so that the flood stands in front of them
ARRIVAL_HEADINGS = {
    "first": "首字（没有别人），毫秒",
    "p50": "随机到来：首字 p50，毫秒",
    "p95": "p95，毫秒",
    "max": "最久，毫秒",
    "rate": "一共，字/秒",
}
FLOOD_HEADINGS = {
    "quiet-p95": "同时来：首字 p95，毫秒",
    "flood-p95": "旁边有人刷屏：首字 p95，毫秒",
    "turned": "来客被拒绝",
    "flood-turned": "刷屏的被拒绝",
}


@dataclass(frozen=True)
class Plan:
    """Sizes in conversations; ``reply``: the longest reply in tokens; the random ones arrive within ``seconds``."""

    arriving: int = 16
    seconds: float = 2.0
    visitors: int = 32
    flood: int = 200
    reply: int = 128

    def alone(self) -> Workload:
        return Workload([64], [1], watch=True)

    def at_random(self) -> Workload:
        """Gaps between arrivals as of a Poisson process; the same ones at every call."""
        source = random.Random(self.arriving)
        moments = [0.0]
        while len(moments) < self.arriving:
            moments.append(moments[-1] + source.expovariate(self.arriving / self.seconds))
        return replace(ragged(self.arriving, self.reply, watch=True), arrivals=moments)

    def together(self) -> Workload:
        callers = [f"visitor-{number}" for number in range(self.visitors)]
        return replace(ragged(self.visitors, self.reply, watch=True), callers=callers)

    def flooded(self) -> Workload:
        """``together``, behind one caller's many conversations."""
        quiet, loud = self.together(), ragged(self.flood, self.reply)
        return Workload(
            loud.prompts + quiet.prompts,
            loud.replies + quiet.replies,
            [0.0] * self.flood + [HEAD_START] * self.visitors,
            [FLOOD] * self.flood + quiet.callers,
            watch=True,
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def measure_arrivals(peers: list[Peer], plan: Plan, rounds: int, figures: Figures) -> None:
    order, busy = random.Random(0), plan.at_random()
    for seed in range(1000, 1000 + rounds):
        for peer in order.sample(peers, len(peers)):
            alone = [first_times(peer.run("alone", plan.alone(), seed * 100 + turn))[0] for turn in range(5)]
            figures.add(peer.name, "first", percentile(alone, 0.5) * 1000)
            answers = peer.run("random", busy, seed)
            waits = first_times(answers)
            for column, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
                figures.add(peer.name, column, percentile(waits, share) * 1000)
            figures.add(peer.name, "rate", rate(busy, answers))
        print(f"  随机到来：第 {seed - 999} 轮，共 {rounds} 轮", flush=True)


def measure_flood(peers: list[Peer], plan: Plan, rounds: int, figures: Figures) -> None:
    for seed in range(2000, 2000 + rounds):
        for peer in peers:
            quiet = peer.run("together", plan.together(), seed)
            answers = peer.run("flooded", plan.flooded(), seed)
            loud, beside = answers[: plan.flood], answers[plan.flood :]
            figures.add(peer.name, "quiet-p95", percentile(first_times(quiet), 0.95) * 1000)
            figures.add(peer.name, "flood-p95", percentile(first_times(beside), 0.95) * 1000)
            figures.add(peer.name, "turned", sum(bool(answer["refused"]) for answer in beside))
            figures.add(peer.name, "flood-turned", sum(bool(answer["refused"]) for answer in loud))
        print(f"  刷屏：第 {seed - 1999} 轮，共 {rounds} 轮", flush=True)


def measure_memory(name: str, folder: Path, threads: int, plan: Plan, *modules: str) -> list[str]:
    """Resident MB of a fresh process: with the model loaded, and the most while it answered everybody."""
    peer = Peer(name, folder, threads, *modules)
    try:
        if peer.missing:
            return ["—", "—"]
        loaded = peer.memory()
        peer.run("together", plan.together(), 0)
        most = peer.memory()
    finally:
        peer.close()
    return [f"{loaded['now']:.0f}", f"{most['peak']:.0f}"] if loaded else ["—", "—"]


def report(peers: list[Peer], plan: Plan, figures: Figures, memory: list[list[str]], rounds: int, facts: str) -> str:
    present = [peer for peer in peers if not peer.missing]
    ours = [peer for peer in present if peer.name.startswith("studytiny")]
    arriving = [[NAMES[p.name], *(figures.cell(p.name, column) for column in ARRIVAL_HEADINGS)] for p in present]
    flooded = [[NAMES[p.name], *(figures.cell(p.name, column) for column in FLOOD_HEADINGS)] for p in ours]
    settings = "；".join(
        f"{NAMES[p.name]}：{p.settings[p.chosen.get('random', 0)]}" for p in present if len(p.settings) > 1
    )
    parts = [
        facts,
        f"{rounds} 轮的中位数（最小–最大）。随机到来：{plan.arriving} 段对话在约 {plan.seconds:g} 秒里先后到来，"
        f"提示 8–120、回答 16–{plan.reply} 个 token，大家用同一份名单；一共的速度最多只能和它们到来一样快。",
        table(["引擎", *ARRIVAL_HEADINGS.values()], arriving + missing_rows(peers)),
    ]
    if settings:
        parts.append(f"随机到来时，对手用的是它们首字来得最早的设置。{settings}。")
    if ours:
        parts.append(
            f"{plan.visitors} 位来客同时说话；再来一次，这回有人抢在前面 {HEAD_START:g} 秒，一口气发 {plan.flood} 条："
        )
        parts.append(table(["引擎", *FLOOD_HEADINGS.values()], flooded))
        parts.append(f"一个进程的常驻内存，MB；回答 {plan.visitors} 段对话：")
        headings = ["引擎", "刚装好模型", "最多时", "连同 gradio，刚装好", "最多时"]
        parts.append(table(headings, memory))
    return "\n\n".join(parts)


def main() -> None:
    parser = CommandParser("python bench/serve.py", "有人一起用时要等多久：首字、随机到来、刷屏、内存。")
    add_options(parser, ENGINES, 5)
    arguments = parser.parse_args()
    rounds, plan, tries, figures = arguments.rounds, Plan(), 2, Figures()
    if arguments.quick:
        rounds, plan, tries = 1, Plan(arriving=4, seconds=0.2, visitors=6, flood=150, reply=24), 0
    facts = machine_facts(arguments.threads)
    print(f"{facts}\n准备模型和各个引擎：", flush=True)
    with start_peers(arguments.engines, arguments.threads) as (peers, folder):
        present = [peer for peer in peers if not peer.missing]
        for peer in present:
            print(f"  试 {NAMES[peer.name]} 的设置（{len(peer.settings)} 种）", flush=True)
            peer.tune("alone", plan.alone(), tries)
            peer.tune("random", plan.at_random(), tries)
        measure_arrivals(present, plan, rounds, figures)
        ours = [peer for peer in present if peer.name.startswith("studytiny")]
        measure_flood(ours, plan, rounds, figures)
        memory = []
        for peer in ours:
            plain = measure_memory(peer.name, folder, arguments.threads, plan)
            with_page = measure_memory(peer.name, folder, arguments.threads, plan, "gradio")
            memory.append([NAMES[peer.name], *plain, *with_page])
            print(f"  内存：{'、'.join(memory[-1])}", flush=True)
    body = report(peers, plan, figures, memory, rounds, facts)
    save_section(arguments.out, "serve", "有人一起用时", body)


if __name__ == "__main__":
    run_command(main)
