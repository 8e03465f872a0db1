"""``python -m train``: trains a model on a laptop and ends with a few replies of it."""

from __future__ import annotations

import time

import torch
from torch.utils.data import DataLoader

from studytiny.checkpoint import pick_device
from studytiny.command import CommandParser, number, run_command
from studytiny.errors import UserError
from studytiny.generator import Generator
from studytiny.model import DialogueModel
from studytiny.sampling import SamplingConfig
from train.corpus import ConvDataset
from train.dataset import DialogueDataset
from train.sources import DEMO, NAMES, load_corpus
from train.trainer import TrainConfig, TransformerTrainer

# name -> sizes of the model, and the most entries its vocabulary may have
PRESETS = {
    "mini": ({"d_model": 256, "n_head": 4, "n_layers": 4, "max_length": 256}, 5_000),
    "standard": ({"d_model": 512, "n_head": 8, "n_layers": 4, "max_length": 256}, 10_000),
}
SAMPLE_PROMPTS = ("你好", "你是谁", "今天心情不好", "你喜欢什么", "谢谢", "再见")


def build_parser() -> CommandParser:
    parser = CommandParser("python -m train", "训练一个中文对话模型；不加参数就用自带的语料训练小模型（mini）。")
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=[DEMO],
        metavar="语料",
        help=f".conv 文件，或语料的名字：{'、'.join(NAMES)}（默认 demo）；可给几个",
    )
    parser.add_argument("--preset", choices=PRESETS, default="mini", help="模型大小：mini（默认，几分钟）或 standard")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=number(float), metavar="分钟", help="训练多久（默认 10 分钟）")
    length.add_argument("--epochs", type=number(int), metavar="遍", help="把语料学几遍")
    parser.add_argument("--out", metavar="文件夹", help="模型写到哪里（默认 runs/大小-日期-时间）")
    parser.add_argument("--lr", type=number(float), metavar="数", help=f"学习率的最大值（默认 {TrainConfig.lr}）")
    parser.add_argument(
        "--batch-size",
        type=number(int),
        metavar="行",
        default=TrainConfig.batch_size,
        help="每步几行，每行 256 字（默认 4）",
    )
    parser.add_argument("--half", action="store_true", help="权重用 bfloat16 存，文件小一半")
    parser.add_argument("--seed", type=number(int), metavar="整数", default=0, help="随机种子（默认 0）")
    parser.add_argument("--threads", type=number(int), metavar="个", help="用几个 CPU 线程（默认由 PyTorch 决定）")
    parser.add_device()
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UserError(f"--threads {arguments.threads} 不对；应是 1 以上的整数。")
        torch.set_num_threads(arguments.threads)
    sizes, max_vocab_size = PRESETS[arguments.preset]
    config = TrainConfig(
        lr=arguments.lr if arguments.lr is not None else TrainConfig.lr,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs if arguments.epochs is not None else TrainConfig.epochs,
        minutes=10.0 if arguments.minutes is None and arguments.epochs is None else arguments.minutes,
        half=arguments.half,
        out=arguments.out or f"runs/{arguments.preset}-{time.strftime('%Y%m%d-%H%M%S')}",
    )
    parts = [load_corpus(name) for name in arguments.corpus]
    for part in parts:
        print(part.summary())
    corpus = ConvDataset.from_dialogues(
        (turns for part in parts for turns in part.dialogues), "、".join(arguments.corpus)
    )
    tokenizer = corpus.build_vocab(max_vocab_size)
    dataset = DialogueDataset(corpus, tokenizer, sizes["max_length"], arguments.seed)

    torch.manual_seed(arguments.seed)
    model = DialogueModel(tokenizer.vocab_size, **sizes)
    order = torch.Generator().manual_seed(arguments.seed)
    loader = DataLoader(dataset, batch_size=config.batch_size, shuffle=True, generator=order)
    device = pick_device(arguments.device)
    trainer = TransformerTrainer(model, loader, device, config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"模型 {arguments.preset}：{parameters / 1e6:.1f} 百万参数，词表 {tokenizer.vocab_size}；"
        f"语料 {dataset.tokens} 个字（其中 {dataset.labels} 个要学），留出 {len(corpus.held_out_dialogues())} 段来测；"
        f"设备 {device}，精度 {'bfloat16' if trainer.amp else 'float32'}。"
    )
    trainer.train()

    print("\n训练结束，听它说几句：")
    generator = Generator(model, tokenizer)
    for prompt in SAMPLE_PROMPTS:
        reply = generator.reply([{"role": "user", "content": prompt}], SamplingConfig(seed=arguments.seed))
        print(f"  您：{prompt}\n  它：{reply}")
    print(f"\n和它聊天：python -m studytiny.chat --model {config.out}")


if __name__ == "__main__":
    run_command(main)
