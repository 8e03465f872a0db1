"""What rounding costs: ``python bench/precision.py MODEL_FOLDER CORPUS [MODEL_FOLDER CORPUS ...]``.

Every held-out reply is scored character by character, given all that stands before it, by the model in float32 and in
each other precision: bits per character, how often the most probable character is another one, and the distance
between the two predictions (Kullback-Leibler, in bits). Dialogues longer than the window are left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from studytiny.checkpoint import Model, load_folder
from studytiny.command import CommandParser, run_command
from studytiny.engine import KernelEngine
from studytiny.kernel import KernelUnavailable, why_not
from studytiny.precision import in_precision
from studytiny.tokenizer import Tokenizer
from train.corpus import to_messages
from train.sources import load_corpus

Reader = Callable[[list[int]], Tensor]  # ids of a dialogue -> logits (T, V) behind every one of them


@dataclass
class Tally:
    """Sums over the scored places of one precision."""

    bits: float = 0.0
    same: int = 0
    divergence: float = 0.0

    def add(self, exact: Tensor, rounded: Tensor, targets: Tensor) -> None:
        """Log-probabilities (N, V) of N places, and the characters (N,) that stand there."""
        self.bits -= rounded.gather(1, targets.unsqueeze(1)).sum().item() / math.log(2)
        self.same += int((exact.argmax(1) == rounded.argmax(1)).sum())
        self.divergence += (exact.exp() * (exact - rounded)).sum().item() / math.log(2)


def readers(model: Model) -> Iterator[tuple[str, Reader]]:
    """The precisions this machine has, float32 first."""
    for precision in ("float32", "bfloat16", "int8"):
        made = in_precision(model, precision)
        yield precision, lambda ids, made=made: made.independent_logits(torch.tensor([ids]))[0].float()
    if model.architecture == "studytiny":
        try:
            kernel = KernelEngine(model, 1).kernel
        except KernelUnavailable:
            print(f"没有测 int8 的内核：{why_not()}")
            return

        def read(ids: list[int]) -> Tensor:
            places = list(range(len(ids)))
            return kernel.step(ids, [0] * len(ids), places, places)

        yield "int8，C 内核", read


@torch.inference_mode()
def compare(model: Model, tokenizer: Tokenizer, dialogues: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    names, functions = zip(*readers(model), strict=True)
    tallies = [Tally() for _ in names]
    characters = places = 0
    for turns in dialogues:
        encoded = tokenizer.encode_dialogue(to_messages(turns))
        if len(encoded.ids) > model.config.max_length:
            continue
        scored = torch.tensor(encoded.reply_mask)[1:]  # a place predicts the token behind it
        targets = torch.tensor(encoded.ids)[1:][scored]
        exact = None
        for read, tally in zip(functions, tallies, strict=True):
            log_probabilities = read(encoded.ids)[:-1][scored].log_softmax(-1)
            exact = log_probabilities if exact is None else exact
            tally.add(exact, log_probabilities, targets)
        characters += sum(len(text) for text in turns[1::2])
        places += len(targets)
    lines = ["| 精度 | 比特/字 | 比 float32 多 | 最有把握的字相同 | 预测的差别，比特 |", "|---|---|---|---|---|"]
    for name, tally in zip(names, tallies, strict=True):
        more = tally.bits / tallies[0].bits - 1
        lines.append(
            f"| {name} | {tally.bits / characters:.4f} | {more:+.2%} | {tally.same / places:.2%} "
            f"| {tally.divergence / places:.5f} |"
        )
    return "\n".join(lines) + f"\n\n{len(dialogues)} 段对话，{places} 处。"


def main() -> None:
    parser = CommandParser(
        "python bench/precision.py", "比较同一个模型在各种精度下的预测：比特/字、最有把握的字、差别。"
    )
    parser.add_argument("pairs", nargs="+", metavar="模型文件夹 语料", help="一对或几对")
    pairs = parser.parse_args().pairs
    if len(pairs) % 2:
        parser.error("模型文件夹和语料要成对给出。")
    for folder, corpus in zip(pairs[::2], pairs[1::2], strict=True):
        model, tokenizer = load_folder(folder)
        held_out = load_corpus(corpus).held_out_dialogues()
        print(f"\n{Path(folder).name}，语料 {Path(corpus).name}：\n\n{compare(model.eval(), tokenizer, held_out)}")


if __name__ == "__main__":
    run_command(main)
