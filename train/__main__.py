"""``python -m train``: trains a model on a laptop, and ends with a report and a few replies of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from studytiny.checkpoint import pick_device
from studytiny.command import CommandParser, number, run_command
from studytiny.cores import use_granted_cores
from studytiny.errors import UserError
from studytiny.model import DialogueModel
from studytiny.published import PublishedModel
from train.clean import RULES, clean
from train.config import TrainConfig
from train.corpus import ConvDataset
from train.dataset import AlikeRows, DialogueDataset
from train.evaluate import measure
from train.initialise import prepare
from train.original_recipe import PUBLISHED, SETTINGS, PublishedDataset, PublishedTrainer, check_options, pad_rows
from train.report import RunFacts, write_facts, write_report
from train.run_log import read_samples
from train.sources import DEMO, NAMES, OWN, licence_of, load_corpus
from train.trainer import TransformerTrainer, check_new_run, read_run

# name -> sizes of the model, and the most entries its vocabulary may have
PRESETS = {
    "mini": ({"d_model": 256, "n_head": 4, "n_layers": 4, "max_length": 512}, 5_000),
    "standard": ({"d_model": 512, "n_head": 8, "n_layers": 4, "max_length": 256}, 10_000),
    PUBLISHED: ({"d_model": 512, "n_head": 8, "n_layers": 4, "max_length": 256}, 10_000),
}
# What a run is made of: its data, its model, its trainer.
RECIPE = (DialogueDataset, DialogueModel, TransformerTrainer)
ORIGINAL_RECIPE = (PublishedDataset, PublishedModel, PublishedTrainer)
TOKENS_A_STEP = 2048  # rows of 256 or half as many of 512: smaller steps learn more in the same time
GROW = 0.5  # of a run begins with half of the blocks; see train.initialise
SHOWN_SAMPLES = 6
ALL = "all"
PATIENCE_SECONDS = 10.0  # that another process has to say what is wrong before this one does


def build_parser() -> CommandParser:
    parser = CommandParser("python -m train", "训练一个中文对话模型；不加参数就用自带的语料训练小模型（mini）。")
    parser.add_argument(
        "--corpus",
        nargs="+",
        metavar="语料",
        help=f".conv 文件，或语料的名字：{'、'.join(NAMES)}（默认 demo）；可给几个",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="模型大小：mini（默认，几分钟）或 standard；published 照原项目的模型和练法重做，错误也照旧，用来比较"
        "（默认练 {epochs} 遍，学习率 {lr}，每批 {batch_size} 段对话，{grad_accum_steps} 批一步）".format(**SETTINGS),
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=number(float), metavar="分钟", help="训练多久（默认 10 分钟）")
    length.add_argument("--epochs", type=number(int), metavar="遍", help="把语料学几遍")
    parser.add_argument("--out", metavar="文件夹", help="模型写到哪里（默认 runs/大小-日期-时间）")
    parser.add_argument("--resume", action="store_true", help="接着做 --out 里没做完的训练；设置都沿用原来的，不用再写")
    names = "、".join(f"{rule.name}（{rule.title}）" for rule in RULES if rule.default)
    parser.add_argument(
        "--no-clean",
        nargs="+",
        metavar="规则",
        help=f"学之前不用这些规则清洗语料：{names}；{ALL} 表示一条都不用。自带的语料不清洗",
    )
    parser.add_argument("--sessions", action="store_true", help="把相邻的对话接成一段，学着看上文")
    parser.add_argument("--vocab-size", type=number(int), metavar="项", help="词表最多几项（默认用满所选大小的上限）")
    parser.add_argument("--lr", type=number(float), metavar="数", help=f"学习率的最大值（默认 {TrainConfig.lr}）")
    parser.add_argument(
        "--batch-size",
        type=number(int),
        metavar="行",
        help=f"每步几行；mini 每行 512 字，别的每行 256 字（默认一步 {TOKENS_A_STEP} 字）",
    )
    parser.add_argument(
        "--user-share", type=number(float), metavar="数", help="除了回答，还学用户的话中的几成（默认 0.3；0 只学回答）"
    )
    parser.add_argument("--dropout", type=number(float), metavar="数", help="随机丢弃的比例；小语料反复学时用 0.1")
    parser.add_argument("--half", action="store_true", help="权重用 bfloat16 存，文件小一半")
    parser.add_argument("--tensorboard", action="store_true", help="另写一份给 TensorBoard 看的记录")
    parser.add_argument("--seed", type=number(int), metavar="整数", help="随机种子（默认 0）")
    parser.add_argument("--threads", type=number(int), metavar="个", help="用几个 CPU 线程（默认按这个进程能用的核数）")
    parser.add_device()
    return parser


def settings_from(arguments: argparse.Namespace) -> tuple[TrainConfig, dict[str, Any]]:
    """The trainer's settings, and what else a run needs to know to be begun, or begun again."""
    preset = arguments.preset or "mini"
    limit = PRESETS[preset][1]
    vocab_size = arguments.vocab_size or limit
    if not 8 <= vocab_size <= limit:
        raise UserError(f"--vocab-size {arguments.vocab_size} 不对；{preset} 的词表最多 {limit} 项，最少 8 项。")
    names = ("lr", "batch_size", "user_share", "dropout", "seed", "epochs")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    minutes = arguments.minutes
    if preset == PUBLISHED:
        check_options(vars(arguments))
        given = {**SETTINGS, **given}
    else:
        given["grow"] = GROW
        given.setdefault("batch_size", TOKENS_A_STEP // PRESETS[preset][0]["max_length"])
        if arguments.minutes is None and arguments.epochs is None:
            minutes = 10.0
    out = arguments.out or f"runs/{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = TrainConfig(minutes=minutes, half=arguments.half, tensorboard=arguments.tensorboard, out=out, **given)
    facts = {
        "corpus": arguments.corpus or [DEMO],
        "preset": preset,
        "vocab_size": vocab_size,
        # The original learns from its corpus as it stands.
        "no_clean": [ALL] if preset == PUBLISHED else arguments.no_clean or [],
        "sessions": arguments.sessions,
        "threads": arguments.threads or use_granted_cores(),
        # For the report, which may be given to others: a file by its name, not by where it lies here.
        "command": shlex.join(
            ["python", "-m", "train", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]
        ),
    }
    return config, facts


def settings_to_resume(arguments: argparse.Namespace) -> tuple[TrainConfig, dict[str, Any]]:
    """Those of the run in ``--out``; anything else that was given would make it another run."""
    if arguments.out is None:
        raise UserError("--resume 要和 --out 一起用：请写出要接着训练的文件夹。")
    free = {"out", "resume", "threads", "device"}
    given = [n for n, value in vars(arguments).items() if value is not None and value is not False and n not in free]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UserError(f"接着训练时不能改 {option}：设置都沿用原来的；要改请用 --out 换一个文件夹重新训练。")
    config, facts = read_run(arguments.out)
    return config, {**facts, "threads": arguments.threads or facts["threads"]}


def prepare_corpus(facts: Mapping[str, Any]) -> tuple[ConvDataset, list[dict], list[dict]]:
    """Reads, splits and cleans.

    Returns:
        One dataset of all corpora, its training dialogues cleaned and its held-out ones as they stand in the files;
        a description of each corpus; the rows of the cleaning tables.

    Raises:
        UserError: a rule or corpus is unknown, or cleaning leaves nothing.
    """
    off = {rule.name for rule in RULES} if ALL in facts["no_clean"] else set(facts["no_clean"])
    on = {"sessions"} if facts["sessions"] else set()
    clean([], off=off, on=on)  # a rule that does not exist should be said before anything is fetched
    training: list[list[str]] = []
    held_out: list[list[str]] = []
    about, table = [], []
    for name in facts["corpus"]:
        corpus = load_corpus(name)
        print(corpus.summary())
        dialogues = corpus.training_dialogues()
        if name not in OWN:  # written by this project, clean, and its many alike replies are meant
            result = clean(dialogues, off - on, on)
            dialogues = result.dialogues
            if result.table:
                print(f"清洗 {name} 中用来学的部分（留作测试的不动）：\n{result}")
            table += [asdict(row) for row in result.table]
        kept = corpus.held_out_dialogues()
        about.append(
            {
                "name": Path(name).name,
                "license": licence_of(name),
                "dialogues": len(corpus),
                "training": len(dialogues),
                "held_out": len(kept),
            }
        )
        training += dialogues
        held_out += kept
    if not training:
        raise UserError(
            f"{'、'.join(facts['corpus'])} 清洗之后没有剩下可学的对话；请用 --no-clean {ALL} 再试，或换一份语料。"
        )
    names = "、".join(row["name"] for row in about)
    return ConvDataset.from_split(training, held_out, names), about, table


def unknown_rate(corpus: ConvDataset) -> float:
    """Share of the training characters that the vocabulary does not have."""
    known = corpus.tokenizer.vocab.keys()
    texts = [turn for turns in corpus.training_dialogues() for turn in turns]
    return sum(character not in known for text in texts for character in text) / max(1, sum(map(len, texts)))


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads {arguments.threads} 不对；应是 1 以上的整数。")
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes that torchrun started; the others keep silent
    if not first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  to the end of the process
    device = pick_device(arguments.device)
    if arguments.resume:
        config, facts = settings_to_resume(arguments)
    else:
        config, facts = settings_from(arguments)
        check_new_run(config.out)
    torch.set_num_threads(facts["threads"])
    sizes, _ = PRESETS[facts["preset"]]

    corpus, about, table = prepare_corpus(facts)
    tokenizer = corpus.build_vocab(facts["vocab_size"])
    recipe = ORIGINAL_RECIPE if facts["preset"] == PUBLISHED else RECIPE
    dataset_class, model_class, trainer_class = recipe
    dataset = dataset_class(corpus, tokenizer, sizes["max_length"], config.seed)
    torch.manual_seed(config.seed)
    model = model_class(tokenizer.vocab_size, **sizes)
    if model_class is DialogueModel and not arguments.resume:
        prepare(model, dataset)
    order = torch.Generator()
    if model_class is DialogueModel:
        batches = AlikeRows(dataset, config.batch_size, order)
        loader = DataLoader(dataset, batch_sampler=batches, generator=order)
    else:
        loader = DataLoader(dataset, config.batch_size, shuffle=True, generator=order, collate_fn=pad_rows)
    trainer = trainer_class(model, loader, device, config, arguments.resume, facts)

    unknown = unknown_rate(corpus)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"模型 {facts['preset']}：{parameters / 1e6:.1f} 百万参数，词表 {tokenizer.vocab_size}"
        f"（词表外的字占 {unknown:.2%}）；语料 {dataset.tokens} 个字（其中 {dataset.labels} 个是要学的回答），"
        f"留出 {len(corpus.held_out_dialogues())} 段来测；设备 {device}。"
    )

    def report(evaluation: Mapping[str, float], finished: bool) -> None:
        precision = "bfloat16" if trainer.amp else "float32"
        machine = {"device": device.type, "threads": facts["threads"], "precision": precision}
        machine |= {"torch": torch.__version__, "python": platform.python_version()}
        run = RunFacts(
            about, table, tokenizer.vocab_size, unknown, dataset.tokens, dataset.labels, parameters,
            asdict(config), facts["command"], machine, facts["preset"], dict(evaluation), finished,
            trainer.seconds / 60,
        )  # fmt: skip
        write_facts(config.out, run)
        write_report(config.out)

    finished = False
    try:
        trainer.train()
        finished = True
    finally:
        if first and trainer.history and not finished:  # a run that was stopped has a report as well
            with contextlib.suppress(OSError):  # what stopped the run, a full disk perhaps, is what should be said
                report({}, False)
    trainer.group.leave()
    if first:
        report({}, True)
        _say_goodbye(trainer, corpus, report)


def _say_goodbye(trainer: TransformerTrainer, corpus: ConvDataset, report: Any) -> None:
    out = trainer.config.out
    held_out: Sequence[Sequence[str]] = corpus.held_out_dialogues()
    if held_out:
        print("训练结束，正在用留出的对话测量 ……")
        evaluation = measure(trainer.model, trainer.tokenizer, held_out)
        report(evaluation, True)
        print(f"留出的 {evaluation['dialogues']} 段对话：{evaluation['bits_per_char']:.3f} 比特/字。")
    print("\n听它说几句：")
    for prompt, reply in read_samples(out)[-1]["replies"][:SHOWN_SAMPLES]:
        print(f"  您：{prompt}\n  它：{reply}")
    print(f"\n报告：{Path(out) / 'README.md'}\n和它聊天：python -m studytiny.chat --model {shlex.quote(out)}")


def speak_once() -> None:
    """Runs main. What is wrong is mostly wrong in every process; then the first one says it, and ends the others."""
    try:
        main()
    except UserError:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(PATIENCE_SECONDS)
        raise


if __name__ == "__main__":
    run_command(speak_once)
