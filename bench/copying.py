"""When a model learns to copy, with and without the planted heads: ``python bench/copying.py [--tokens 2500000]``.

Two mini models learn from the same rows of the corpus of this project, taking turns. In dialogues that neither has
seen, whose names and other facts are new, how many characters of a repeated fact does each find the most probable?
``train.induction`` explains the heads.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench.ablation import without_copying_heads
from bench.learning import endless
from studytiny.command import CommandParser, number, run_command
from studytiny.cores import use_granted_cores
from studytiny.model import DialogueModel
from studytiny.tokenizer import PAD_ID, Tokenizer
from train.__main__ import GROW, PRESETS, TOKENS_A_STEP
from train.config import TrainConfig, learning_rate
from train.corpus import ConvDataset, to_messages
from train.dataset import DialogueDataset
from train.demo import Dialogue, compose_dialogues
from train.initialise import prepare
from train.trainer import TransformerTrainer

LEARNT, ASKED = 20_000, 250  # dialogues
MOMENTS = 10
ROWS = 16


Asked = tuple[list[int], list[tuple[int, bool]]]  # ids; places of characters of repeated facts: is it the first?


def facts_in(dialogue: Dialogue, tokenizer: Tokenizer) -> Asked:
    """The dialogue's ids, and where its replies repeat what the user told."""
    encoded = tokenizer.encode_dialogue(to_messages(dialogue.turns))
    places = []
    for turn, fact in dialogue.recalled:
        value = [value for at, name, value in dialogue.told if name == fact and at < turn][-1]
        start = encoded.turn_starts[turn] + 1 + dialogue.turns[turn].index(value)
        places += [(start + i, i == 0) for i in range(len(value))]
    return encoded.ids, places


@torch.inference_mode()
def share_copied(
    model: DialogueModel, asked: Sequence[tuple[list[int], list[tuple[int, bool]]]]
) -> tuple[float, float]:
    """Shares of first and of later characters of facts that are the most probable ones."""
    model.eval()
    right: dict[bool, list[bool]] = {True: [], False: []}
    for begin in range(0, len(asked), ROWS):
        part = asked[begin : begin + ROWS]
        ids = torch.full((len(part), max(len(row) for row, _ in part)), PAD_ID)
        for number_of_row, (row, _) in enumerate(part):
            ids[number_of_row, : len(row)] = torch.tensor(row)
        best: Tensor = model(ids).argmax(-1)  # (B, T)
        for number_of_row, (row, places) in enumerate(part):
            for place, first in places:
                right[first].append(int(best[number_of_row, place - 1]) == row[place])
    return tuple(sum(found) / len(found) for found in (right[True], right[False]))


def main() -> None:
    parser = CommandParser("python bench/copying.py", "种下会抄写的头，和不种：各练多少字才记得住新的名字。")
    parser.add_argument("--tokens", type=number(int), default=2_500_000, metavar="字", help="各练多少字（默认 250 万）")
    arguments = parser.parse_args()
    torch.set_num_threads(use_granted_cores())
    corpus = ConvDataset.from_dialogues([dialogue.turns for dialogue in compose_dialogues(LEARNT, 1)])
    tokenizer = corpus.build_vocab(PRESETS["mini"][1])
    asked = [facts_in(dialogue, tokenizer) for dialogue in compose_dialogues(ASKED, 777)]
    sizes = PRESETS["mini"][0]
    dataset = DialogueDataset(corpus, tokenizer, sizes["max_length"])
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, begin in (("种下", prepare), ("不种", without_copying_heads)):
            torch.manual_seed(0)
            model = DialogueModel(tokenizer.vocab_size, **sizes)
            begin(model, dataset)
            rows = TOKENS_A_STEP // sizes["max_length"]
            config = TrainConfig(batch_size=rows, grow=GROW, out=f"{folder}/{name}")
            loader = DataLoader(dataset, rows, shuffle=True, generator=torch.Generator())
            trainer = TransformerTrainer(model, loader, "cpu", config)
            trainer.total_steps = arguments.tokens // TOKENS_A_STEP
            trainers[name] = (trainer, endless(loader, 0))
        print("| 练过的字 | 种下：第一个字 | 后面的字 | 不种：第一个字 | 后面的字 |\n|---|---|---|---|---|")
        for moment in range(1, MOMENTS + 1):
            cells = []
            for trainer, batches in trainers.values():
                while trainer.steps < trainer.total_steps * moment // MOMENTS:
                    trainer.step([next(batches)], learning_rate(trainer.progress, trainer.config))
                cells += [f"{share:.1%}" for share in share_copied(trainer.model, asked)]
            print(f"| {trainer.tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
