"""Learning per minute: ``python bench/learning.py [--minutes 4] [--nano-minutes 20] [--seeds 3]``.

Held-out bits per character (train.measures, every held-out dialogue) against minutes of training, ours against
nanoGPT's architecture and recipe. All runs share one process and take turns, ten seconds each, so that whatever else
the machine does hits all of them alike; only steps count as time, measuring does not. Ours is what ``python -m train
--preset standard --minutes M`` does, without cleaning: the held-out text is not cleaned either.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from torch.utils.data import DataLoader

from bench.nanogpt import NanoConfig, NanoGPT, NanoTrainer, text_stream
from studytiny.command import CommandParser, number, run_command
from studytiny.model import DialogueModel
from studytiny.tokenizer import Tokenizer
from train.__main__ import GROW
from train.config import TrainConfig, learning_rate
from train.corpus import ConvDataset
from train.dataset import DialogueDataset
from train.initialise import prepare
from train.measures import bits_per_character
from train.sources import load_corpus
from train.trainer import TransformerTrainer

SLICE = 10.0  # seconds of a turn


@dataclass
class Run:
    """One training run. ``step(progress)`` takes a step and returns its real tokens.

    Attributes:
        minutes: of training, for which its schedule is made.
        marks: minutes at which to measure; the last is ``minutes``.
        bits: minute -> held-out bits per character.
    """

    name: str
    model: nn.Module
    step: Callable[[float], int]
    minutes: float
    marks: list[float]
    seconds: float = 0.0
    tokens: int = 0
    bits: dict[float, float] = field(default_factory=dict)

    def turn(self) -> None:
        """Trains for SLICE seconds or to the next mark."""
        end = min(self.seconds + SLICE, self.marks[len(self.bits)] * 60)
        while self.seconds < end:
            start = time.perf_counter()
            self.tokens += self.step(self.seconds / (self.minutes * 60))
            self.seconds += time.perf_counter() - start

    @property
    def mark_reached(self) -> bool:
        return self.seconds >= self.marks[len(self.bits)] * 60

    @property
    def done(self) -> bool:
        return len(self.bits) == len(self.marks)


def endless(loader: DataLoader, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The loader's batches, epoch after epoch."""
    random = loader.generator.manual_seed(seed)
    while random is not None:
        yield from loader


def our_run(
    corpus: ConvDataset, tokenizer: Tokenizer, minutes: float, marks: list[float], seed: int, folder: str
) -> Run:
    """As ``python -m train`` trains."""
    torch.manual_seed(seed)
    model = DialogueModel(tokenizer.vocab_size, max_length=256)
    config = TrainConfig(minutes=minutes, seed=seed, grow=GROW, out=f"{folder}/{seed}-{minutes}")
    dataset = DialogueDataset(corpus, tokenizer, 256, seed)
    start = time.perf_counter()
    prepare(model, dataset)
    preparing = time.perf_counter() - start
    loader = DataLoader(dataset, config.batch_size, shuffle=True, generator=torch.Generator())
    trainer = TransformerTrainer(model, loader, "cpu", config)
    batches = endless(loader, seed)

    def step(progress: float) -> int:
        batch = next(batches)
        trainer.total_steps = round(trainer.steps / max(progress, 1e-6))  # time is the plan here
        trainer.step([batch], learning_rate(progress, config))
        return int((batch["segments"] >= 0).sum())

    return Run(f"本项目 {minutes:g} 分钟，种子 {seed}", model, step, minutes, marks, preparing)


def nano_run(
    corpus: ConvDataset, tokenizer: Tokenizer, minutes: float, marks: list[float], rows: int, seed: int = 0
) -> Run:
    """As nanoGPT trains."""
    torch.manual_seed(seed)
    model = NanoGPT(NanoConfig(tokenizer.vocab_size))
    trainer = NanoTrainer(model, text_stream(corpus.training_dialogues(), tokenizer), rows, seed)
    return Run(f"nanoGPT {minutes:g} 分钟", model, trainer.step, minutes, marks)


def take_turns(runs: Sequence[Run], tokenizer: Tokenizer, held_out: Sequence[Sequence[str]]) -> None:
    """Trains all runs to their end, measuring at their marks."""
    while any(not run.done for run in runs):
        for run in runs:
            if run.done:
                continue
            run.turn()
            if run.mark_reached:
                mark = run.marks[len(run.bits)]
                run.bits[mark] = bits_per_character(run.model, tokenizer, held_out).bits_per_char
                speed = run.tokens / run.seconds
                print(f"{run.name}：{mark:g} 分钟 {run.bits[mark]:.3f} 比特/字（{speed:.0f} 字/秒）", flush=True)


def main() -> None:
    parser = CommandParser("python bench/learning.py", "比较每分钟学到多少：本项目和 nanoGPT，交替着训练。")
    parser.add_argument("--corpus", default="xiaohuangji-50k", metavar="语料", help="默认 xiaohuangji-50k")
    parser.add_argument("--minutes", type=number(float), default=4.0, metavar="分钟", help="本项目训练多久（默认 4）")
    parser.add_argument("--nano-minutes", type=number(float), default=20.0, metavar="分钟", help="默认 20")
    parser.add_argument("--seeds", type=number(int), default=3, metavar="个", help="本项目用几个种子（默认 3）")
    parser.add_argument("--nano-rows", type=number(int), default=4, metavar="行", help="nanoGPT 每步几行（默认 4）")
    parser.add_argument("--long", action="store_true", help="也让本项目训练和 nanoGPT 一样久")
    parser.add_argument("--json", metavar="文件", help="把结果写到这里")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.corpus)
    tokenizer = corpus.build_vocab()
    held_out = corpus.held_out_dialogues()
    short, long = arguments.minutes, arguments.nano_minutes
    marks = [mark for mark in (short, 8.0, 12.0, 16.0) if short <= mark < long] + [long]
    with tempfile.TemporaryDirectory() as folder:
        ours = [our_run(corpus, tokenizer, short, [short], seed, folder) for seed in range(arguments.seeds)]
        nano = nano_run(corpus, tokenizer, long, marks, arguments.nano_rows)
        nano_short = nano_run(corpus, tokenizer, short, [short], arguments.nano_rows)
        runs = [*ours, nano_short, nano]
        if arguments.long:
            runs.append(our_run(corpus, tokenizer, long, marks, 0, folder))
        take_turns(runs, tokenizer, held_out)
    bits = statistics.median(run.bits[short] for run in ours)
    print(f"\n留出的 {len(held_out)} 段对话，词表 {tokenizer.vocab_size}，{torch.get_num_threads()} 个线程：")
    print(f"  本项目 {short:g} 分钟 {bits:.3f}（中位数），nanoGPT {long:g} 分钟 {nano.bits[long]:.3f} 比特/字")
    for name, run in (("按同样时间排的日程", nano_short), (f"{long:g} 分钟日程的中途", nano)):
        less = 1 - bits / run.bits[short]
        print(f"  同为 {short:g} 分钟（nanoGPT {name}）：{run.bits[short]:.3f}，少 {less:.0%}（目标 20%）")
    if arguments.long:
        ours_long = runs[-1].bits[long]
        print(
            f"  同为 {long:g} 分钟：{ours_long:.3f} 对 {nano.bits[long]:.3f}，少 {1 - ours_long / nano.bits[long]:.0%}"
        )
    if arguments.json:
        results = [{"name": r.name, "bits": r.bits, "tokens": r.tokens, "seconds": r.seconds} for r in runs]
        Path(arguments.json).write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
