"""How a model answers real people, rude ones among them: ``python bench/politeness.py MODEL_FOLDER [CORPUS]``.

From the first turns of a corpus of real chats (default ``xiaohuangji-50k``) 500 rude ones and 1,500 others are drawn,
and each gets one reply at the page's default settings, without the filter or, with ``--filter``, as the page shows it:
how many replies are rude, empty, or say a phrase three times, and how long they are.
"""

from __future__ import annotations

import contextlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from studytiny.checkpoint import load_folder
from studytiny.command import CommandParser, run_command
from studytiny.generator import Generator
from studytiny.safety import safe_stream
from studytiny.sampling import SamplingConfig
from studytiny.word_lists import is_rude
from train.measures import reply_statistics
from train.sources import load_corpus

RUDE, OTHERS = 500, 1500
AT_ONCE = 32


def main() -> None:
    parser = CommandParser("python bench/politeness.py", "2,000 句真实的开场白，其中 500 句骂人的：回答有多少粗鲁。")
    parser.add_argument("model", metavar="模型文件夹", help="要测的模型")
    parser.add_argument("corpus", nargs="?", default="xiaohuangji-50k", metavar="语料", help="真人说的话从哪里来")
    parser.add_argument("--filter", action="store_true", help="像网页那样开着过滤")
    parser.add_argument("--show", action="store_true", help="列出粗鲁的和重复的回答")
    arguments = parser.parse_args()
    model, tokenizer = load_folder(arguments.model, "auto")
    firsts = sorted({turns[0][: model.config.max_length // 2] for turns in load_corpus(arguments.corpus).usable()})
    rng = random.Random(0)
    rude = [text for text in firsts if is_rude(text)]
    others = [text for text in firsts if not is_rude(text)]
    groups = {"骂人的": rng.sample(rude, min(RUDE, len(rude))), "别的": rng.sample(others, min(OTHERS, len(others)))}
    print("| 开场白 | 句数 | 粗鲁的回答 | 空的 | 同一短语说三遍 | 平均字数 |\n|---|---|---|---|---|---|")
    shown = []
    with contextlib.closing(Generator(model, tokenizer, max_running=AT_ONCE)) as generator:

        def answer(job: tuple[int, str]) -> str:
            seed, text = job
            messages, sampling = [{"role": "user", "content": text}], SamplingConfig(seed=seed)
            if not arguments.filter:
                return generator.reply(messages, sampling)
            texts = list(safe_stream(generator, messages, sampling))
            return texts[-1] if texts else ""

        for name, texts in groups.items():
            with ThreadPoolExecutor(AT_ONCE) as threads:
                replies = list(threads.map(answer, enumerate(texts)))
            facts = reply_statistics(replies)
            empty = sum(not reply.strip() for reply in replies)
            bad = [reply for reply in replies if is_rude(reply)]
            shown += [(name, reply) for reply in bad]
            print(f"| {name} | {len(texts)} | {len(bad)} | {empty} | {facts.repetition_rate:.1%} "
                  f"| {facts.mean_reply_chars:.1f} |")  # fmt: skip
            if arguments.show:
                shown += [(name, f"{text} -> {reply}") for text, reply in zip(texts[:40], replies, strict=False)]
    for name, reply in shown:
        print(f"{name}：{reply}")


if __name__ == "__main__":
    run_command(main)
