"""Speed of a training step: ``python bench/training_speed.py [--corpus FILE]``.

Real tokens/s (padding not counted, optimizer step included) of our step and of nanoGPT's on the same shape, taken in
turns, and the share of the machine's bfloat16 matrix rate that our step's matrix products reach.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.utils.data import DataLoader

from bench.nanogpt import NanoConfig, NanoGPT, NanoTrainer, text_stream
from studytiny.command import CommandParser, number, run_command
from studytiny.model import DialogueModel
from train.config import TrainConfig
from train.dataset import IGNORED, DialogueDataset
from train.sources import load_corpus
from train.trainer import TransformerTrainer, add_targets


def matmul_rate(seconds: float = 1.0) -> float:
    """Multiply-adds times two per second of a product the size of a layer's, in bfloat16; the best of many."""
    left, right = torch.randn(2048, 512).bfloat16(), torch.randn(512, 2048).bfloat16()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(left, right)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * 2048 * 512 * 2048 / best


def main() -> None:
    parser = CommandParser("python bench/training_speed.py", "比较训练一步的速度：本项目和 nanoGPT，交替着测。")
    parser.add_argument("--corpus", default="xiaohuangji-50k", metavar="语料", help="默认 xiaohuangji-50k")
    parser.add_argument("--rows", type=number(int), default=8, metavar="行", help="每步几行，每行 256 字（默认 8）")
    parser.add_argument("--rounds", type=number(int), default=30, metavar="轮", help="测几轮，取中位数（默认 30）")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.corpus)
    tokenizer = corpus.build_vocab()
    dataset = DialogueDataset(corpus, tokenizer, 256)
    torch.manual_seed(0)
    loader = DataLoader(dataset, arguments.rows, shuffle=True, drop_last=True)
    nano = NanoGPT(NanoConfig(tokenizer.vocab_size))
    nano_trainer = NanoTrainer(nano, text_stream(corpus.training_dialogues(), tokenizer), arguments.rows, seed=0)
    ours: list[float] = []
    theirs: list[float] = []
    rates: list[float] = []
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = DialogueModel(tokenizer.vocab_size, max_length=256)
        config = TrainConfig(out=f"{folder}/run")
        trainer = TransformerTrainer(model, loader, "cpu", config)
        matrices = sum(parameter.numel() for parameter in model.layers.parameters() if parameter.dim() == 2)
        for number_of_round, batch in zip(range(arguments.rounds + 3), loader, strict=False):
            tokens = int((batch["segments"] >= 0).sum())
            targets = int((add_targets(batch, config.user_share)["targets"] != IGNORED).sum())
            start = time.perf_counter()
            trainer.step([batch], config.lr)
            middle = time.perf_counter()
            nano_tokens = nano_trainer.step(0.0)
            end = time.perf_counter()
            rate = matmul_rate(0.05)
            if number_of_round < 3:  # the first steps allocate
                continue
            # Forward once, backward twice: the layers for every token, the output layer for what is learnt.
            work = 6 * (matrices * tokens + model.embed_tokens.weight.numel() * targets)
            ours.append(tokens / (middle - start))
            theirs.append(nano_tokens / (end - middle))
            rates.append(rate)
            shares.append(work / (middle - start) / rate)
    print(f"语料 {arguments.corpus}，词表 {tokenizer.vocab_size}，每步 {arguments.rows}×256，{len(ours)} 轮的中位数")
    print(f"  本项目（Muon + AdamW）  {statistics.median(ours):7.0f} 字/秒")
    print(f"  nanoGPT（AdamW）        {statistics.median(theirs):7.0f} 字/秒")
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"  倍数                    {ratio:7.2f}（目标 1.3）")
    print(f"  这台机器 bfloat16 矩阵乘法 {statistics.median(rates) / 1e9:.0f} GFLOP/s，")
    print(f"  训练一步用到其中的      {statistics.median(shares):7.0%}（目标 50%）")


if __name__ == "__main__":
    run_command(main)
