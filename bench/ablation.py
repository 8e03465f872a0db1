"""What each part of the recipe buys: ``python bench/ablation.py [--tokens 400000] [--seeds 3]``.

Every variant changes one thing of what ``python -m train --preset standard`` does and trains on the same number of
tokens; held-out bits per character (train.measures, every held-out dialogue), mean and spread over the seeds. By
tokens, not by time: a change that costs time must be worth it, and the tokens/s beside it tell.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.utils.data import DataLoader

from bench.learning import endless
from studytiny.command import CommandParser, number, run_command
from studytiny.model import DialogueModel
from train.__main__ import GROW
from train.config import TrainConfig, learning_rate
from train.corpus import ConvDataset
from train.dataset import DialogueDataset
from train.induction import plant_copying_heads
from train.initialise import company_embeddings, prepare, silence_blocks
from train.measures import bits_per_character
from train.optimizer import BETAS
from train.sources import load_corpus
from train.trainer import TransformerTrainer


class AdamWTrainer(TransformerTrainer):
    """AdamW for everything, at the rate that was best for it."""

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
        optimizer.param_groups[0]["rate_scale"] = 1e-3 / self.config.lr
        return [optimizer]


class SeparateAdamTrainer(TransformerTrainer):
    """Adam's step size of its own for every number of the embeddings."""

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        muon, coupled, gains = super().build_optimizers()
        adam = torch.optim.Adam(coupled.param_groups[0]["params"], self.config.lr, BETAS, fused=True)
        adam.param_groups[0]["rate_scale"] = 1.0
        return [muon, adam, gains]


def random_embeddings(model: DialogueModel, dataset: DialogueDataset) -> None:
    """``prepare`` without the embeddings that know which characters keep company."""
    silence_blocks(model)
    plant_copying_heads(model, dataset)


@torch.no_grad()
def without_copying_heads(model: DialogueModel, dataset: DialogueDataset) -> None:
    """``prepare`` without the heads that copy from the start."""
    model.embed_tokens.weight.copy_(company_embeddings(dataset, model.config.d_model))
    silence_blocks(model)


@dataclass(frozen=True)
class Variant:
    """One change of the recipe."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    begin: Callable[[DialogueModel, DialogueDataset], None] = prepare
    trainer: type[TransformerTrainer] = TransformerTrainer


VARIANTS = (
    Variant("现在的做法"),
    Variant("AdamW（1e-3）代替 Muon", trainer=AdamWTrainer),
    Variant("嵌入用 Adam，步长各算各的", trainer=SeparateAdamTrainer),
    Variant("嵌入从随机数开始", begin=random_embeddings),
    Variant("不种会抄写的头", begin=without_copying_heads),
    Variant("一开始就用全部的层", {"grow": 0.0}),
    Variant("只学回答", {"user_share": 0.0}),
    Variant("用户的话全学", {"user_share": 1.0}),
)


def run(variant: Variant, corpus: ConvDataset, tokens: int, seed: int, folder: str) -> tuple[float, float]:
    """Held-out bits per character after ``tokens`` tokens, and tokens per second."""
    torch.manual_seed(seed)
    dataset = DialogueDataset(corpus, corpus.tokenizer, 256, seed)
    model = DialogueModel(corpus.tokenizer.vocab_size, max_length=256)
    settings = {"grow": GROW, "seed": seed, **variant.settings}
    config = TrainConfig(out=f"{folder}/{VARIANTS.index(variant)}-{seed}", **settings)
    variant.begin(model, dataset)
    loader = DataLoader(dataset, config.batch_size, shuffle=True, generator=torch.Generator())
    trainer = variant.trainer(model, loader, "cpu", config)
    trainer.total_steps = tokens // (config.batch_size * 256)
    batches = endless(loader, seed)
    start = time.perf_counter()
    while trainer.steps < trainer.total_steps:
        trainer.step([next(batches)], learning_rate(trainer.progress, config))
    speed = trainer.tokens / (time.perf_counter() - start)
    return bits_per_character(model, corpus.tokenizer, corpus.held_out_dialogues()).bits_per_char, speed


def main() -> None:
    parser = CommandParser("python bench/ablation.py", "训练方法里的每一招各值多少：每次只改一处。")
    parser.add_argument("--corpus", default="xiaohuangji-50k", metavar="语料", help="默认 xiaohuangji-50k")
    parser.add_argument(
        "--tokens", type=number(int), default=400_000, metavar="字", help="每次训练多少字（默认 40 万）"
    )
    parser.add_argument("--seeds", type=number(int), default=3, metavar="个", help="每种做法用几个种子（默认 3）")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.corpus)
    corpus.build_vocab()
    results: dict[str, list[tuple[float, float]]] = {variant.name: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):  # a whole round a seed: what changes on the machine hits all alike
            for variant in VARIANTS:
                bits, speed = run(variant, corpus, arguments.tokens, seed, folder)
                results[variant.name].append((bits, speed))
                print(f"种子 {seed}　{variant.name}：{bits:.3f} 比特/字，{speed:.0f} 字/秒", flush=True)
    print(
        f"\n| 每次 {arguments.tokens} 字，{arguments.seeds} 个种子 | 比特/字（平均） | 最小到最大 | 字/秒（中位数） |"
    )
    print("|---|---|---|---|")
    for name, pairs in results.items():
        bits, speeds = zip(*pairs, strict=True)
        spread = f"{min(bits):.3f}–{max(bits):.3f}"
        print(f"| {name} | {statistics.mean(bits):.3f} | {spread} | {statistics.median(speeds):.0f} |")


if __name__ == "__main__":
    run_command(main)
