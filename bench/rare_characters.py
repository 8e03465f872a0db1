"""Can a model repeat characters it has seldom seen? ``python bench/rare_characters.py MODEL_FOLDER CORPUS``.

A user tells something made of two characters drawn at random, which no one could know by heart, and asks for it. The
characters come from five parts of ``train/demo/values/any_char.txt``, from the most to the least frequent in the
corpus the model learnt from. Greedy, with the whole value to be found in the reply.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from studytiny.checkpoint import load_folder
from studytiny.command import CommandParser, run_command
from studytiny.generator import Generator
from studytiny.sampling import SamplingConfig
from train.sources import load_corpus

CHARACTERS = Path(__file__).parent.parent / "train" / "demo" / "values" / "any_char.txt"
TALKS = (
    ("我爱吃{}", "我爱吃什么？"),
    ("我老家在{}", "我老家在哪？"),
    ("明天我要去{}", "明天我要去哪？"),
    ("我叫{}", "我叫什么？"),
    ("我喜欢{}", "我喜欢什么？"),
)
PARTS = 5
VALUES = 100  # a part


def characters() -> list[str]:
    """The common characters that values are made of."""
    lines = CHARACTERS.read_text(encoding="utf-8").splitlines()
    return [char for line in lines if not line.startswith("#") for char in line.strip("()").split("|")]


def is_recalled(generator: Generator, value: str, told: str, asked: str) -> bool:
    sampling = SamplingConfig(temperature=0.0)
    turns = [{"role": "user", "content": told.format(value)}]
    turns.append({"role": "assistant", "content": generator.reply(turns, sampling)})
    turns.append({"role": "user", "content": asked})
    return value in generator.reply(turns, sampling)


def main() -> None:
    parser = CommandParser("python bench/rare_characters.py", "模型少见的字，它照样能跟着说吗？")
    parser.add_argument("folder", metavar="模型文件夹")
    parser.add_argument("corpus", metavar="语料", help="它学过的那一份")
    arguments = parser.parse_args()
    seen: Counter[str] = Counter()
    for dialogue in load_corpus(arguments.corpus).training_dialogues():
        for turn in dialogue:
            seen.update(turn)
    ranked = sorted(characters(), key=lambda char: -seen[char])
    model, tokenizer = load_folder(arguments.folder, "cpu")
    print("| 在语料里出现几次 | 说完问得出来 | 两两余弦 |\n|---|---|---|")
    rng = Random(0)
    with contextlib.closing(Generator(model, tokenizer, max_running=32)) as generator, ThreadPoolExecutor(32) as pool:
        for part in range(PARTS):
            chars = ranked[part * len(ranked) // PARTS : (part + 1) * len(ranked) // PARTS]
            values = ["".join(rng.sample(chars, 2)) for _ in range(VALUES)]
            talks = [TALKS[number % len(TALKS)] for number in range(VALUES)]
            right = sum(pool.map(lambda value, talk: is_recalled(generator, value, *talk), values, talks))
            known = [id_ for char in chars for id_ in tokenizer.encode(char)]
            vectors = torch.nn.functional.normalize(model.embed_tokens.weight[known].detach().float(), dim=1)
            cosine = ((vectors @ vectors.T).sum() - len(known)) / (len(known) * (len(known) - 1))
            print(f"| {seen[chars[-1]]}–{seen[chars[0]]} | {right / VALUES:.0%} | {cosine:.2f} |", flush=True)


if __name__ == "__main__":
    run_command(main)
