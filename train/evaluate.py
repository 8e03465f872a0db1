"""Measures a model folder: ``python -m train.evaluate MODEL_FOLDER --corpus FILE [--all] [--json]`` on a corpus, or
``python -m train.evaluate MODEL_FOLDER --probes [FOLDER] [--show] [--json]`` on held-out conversations
(``train.probes``)."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from studytiny.checkpoint import Model, load_folder
from studytiny.command import CommandParser, run_command
from studytiny.errors import UserError
from studytiny.generator import Generator
from studytiny.sampling import SamplingConfig
from studytiny.tokenizer import Tokenizer
from train.measures import bits_per_character, reply_statistics
from train.probes import FOLDER, Answer, describe, measure_probes
from train.sources import load_corpus

SAMPLED_REPLIES = 200
AT_ONCE = 32  # replies written together


def sample_replies(generator: Generator, dialogues: Sequence[Sequence[str]], seed: int = 0) -> list[str]:
    """Replies to the first turns of at most SAMPLED_REPLIES dialogues, drawn with the default settings."""
    chosen = random.Random(seed).sample(list(dialogues), min(SAMPLED_REPLIES, len(dialogues)))
    longest = generator.model.config.max_length // 2

    def answer(number: int) -> str:
        question = {"role": "user", "content": chosen[number][0][:longest]}
        return generator.reply([question], SamplingConfig(seed=seed + number))

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(answer, range(len(chosen))))


def measure(model: Model, tokenizer: Tokenizer, dialogues: Sequence[Sequence[str]]) -> dict[str, float]:
    """All measures of a model on complete dialogues; ``seconds`` is how long that took."""
    start = time.perf_counter()
    score = bits_per_character(model, tokenizer, dialogues)
    with contextlib.closing(Generator(model, tokenizer, "float32", max_running=AT_ONCE)) as generator:
        replies = sample_replies(generator, dialogues)
    return {**asdict(score), **asdict(reply_statistics(replies)), "seconds": round(time.perf_counter() - start, 2)}


def evaluate(folder: str, corpus: str, whole: bool = False, device: str = "auto") -> dict[str, float]:
    """All measures of the model in ``folder`` on the held-out dialogues (or the ``whole``) of a ``.conv`` file."""
    model, tokenizer = load_folder(folder, device)
    dataset = load_corpus(corpus)
    return measure(model, tokenizer, dataset.usable() if whole else dataset.held_out_dialogues())


def show(answers: Sequence[Answer]) -> str:
    """Conversations to be read and graded; of probes also the kind and what the last reply should have held."""
    text = ""
    for number, answer in enumerate(answers, 1):
        wanted = "；".join("|".join(group) for group in answer.probe.wanted)
        text += f"{number} {answer.probe.kind}" + f"，应有 {wanted}" * bool(wanted) + "\n"
        text += "".join(f"  > {a}\n  < {b}\n" for a, b in zip(answer.probe.turns, answer.replies, strict=True))
    return text


def evaluate_probes(folder: str, probes: Path, device: str, as_json: bool, with_replies: bool) -> None:
    """Print the figures of the probes; ``with_replies`` also what the model said."""
    result, answers, first = measure_probes(*load_folder(folder, device), folder=probes)
    if with_replies:
        wrong = [answer for answer in answers if not answer.is_right]
        text = f"答错的考题（默认抽样）\n{show(wrong)}\n第一句话\n{show(first)}"
        print(text, file=sys.stderr if as_json else sys.stdout)  # --json owns stdout
    print(json.dumps(result, ensure_ascii=False) if as_json else describe(result))


LABELS = {
    "bits_per_char": "比特/字（越低越好）",
    "perplexity": "困惑度（每个字平均在几个字之间犹豫）",
    "dialogues": "对话段数",
    "characters": "回答总字数",
    "unknown_rate": "词表外的字所占比例",
    "distinct_1": "不同的字 / 总字数",
    "distinct_2": "不同的两字组合 / 总数",
    "mean_reply_chars": "平均回答字数",
    "repetition_rate": "同一短语说三遍的回答比例",
    "profanity_rate": "含脏话的回答比例",
    "seconds": "用时（秒）",
}


def main() -> None:
    parser = CommandParser("python -m train.evaluate", "用一份语料，或用训练时没见过的考题，测一个模型。")
    parser.add_argument("model", metavar="模型文件夹", help="训练得到的文件夹")
    parser.add_argument("--corpus", metavar="语料", help=".conv 文件或语料的名字；默认只测其中训练时留出的约 2%% 对话")
    parser.add_argument("--all", action="store_true", help="测整个文件，而不只是留出的部分")
    parser.add_argument(
        "--probes",
        nargs="?",
        type=Path,
        const=FOLDER,
        metavar="考题文件夹",
        help="测它记不记得住：按类给出没见过的考题答对多少；不写文件夹就用 train/demo/probes",
    )
    parser.add_argument("--show", action="store_true", help="和 --probes 一起用：列出答错的考题、300 句开场白和回答")
    parser.add_argument("--json", action="store_true", help="输出一个 JSON 对象")
    parser.add_device()
    arguments = parser.parse_args()
    if bool(arguments.corpus) == bool(arguments.probes):
        raise UserError("请在 --corpus 语料 和 --probes 里选一个：前者测一份语料，后者测没见过的考题。")
    if (arguments.show and not arguments.probes) or (arguments.all and arguments.probes):
        raise UserError("--show 要和 --probes 一起用，--all 要和 --corpus 一起用。")
    if arguments.probes:
        evaluate_probes(arguments.model, arguments.probes, arguments.device, arguments.json, arguments.show)
        return
    result = evaluate(arguments.model, arguments.corpus, arguments.all, arguments.device)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{LABELS[name]}：{value:.4g}" if isinstance(value, float) else f"{LABELS[name]}：{value}")


if __name__ == "__main__":
    run_command(main)
