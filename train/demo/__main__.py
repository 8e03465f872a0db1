"""`python -m train.demo OUT.conv [--count N] [--seed S]`: write the corpus of the bundled model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from . import generate, write_conv


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake in the arguments told in one Chinese sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"错误：参数写得不对（{message}），用 --help 看说明。\n")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        usage="python -m train.demo OUT.conv [--count N] [--seed S]",
        description="生成随附小模型的训练语料（.conv 格式），同样的种子得到同样的文件。",
        add_help=False,
    )
    group = parser.add_argument_group("参数")
    group.add_argument("out", type=Path, metavar="OUT.conv", help="写到哪个文件")
    group.add_argument("--count", type=int, default=8000, metavar="N", help="多少段对话（默认 8000）")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="随机种子（默认 0）")
    group.add_argument("-h", "--help", action="help", help="显示这段说明")
    options = parser.parse_args(arguments)
    try:
        if options.count < 1:
            raise ValueError("--count 要是大于 0 的整数。")
        if not options.out.parent.is_dir():
            raise ValueError(f"文件夹 {options.out.parent} 不存在，请先建好它。")
        if options.out.is_dir():
            raise ValueError(f"{options.out} 是一个文件夹，请写出文件名，例如 demo.conv。")
        dialogues = generate(options.count, options.seed)
        write_conv(options.out, dialogues)
    except ValueError as error:
        print(f"错误：{error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"错误：写不了 {options.out}（{error.strerror}）。", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("已停止，没有留下写了一半的文件。", file=sys.stderr)
        return 130
    print(f"写好了 {options.out}：{len(dialogues)} 段对话，{sum(map(len, dialogues))} 句话。")
    return 0


if __name__ == "__main__":
    sys.exit(main())
