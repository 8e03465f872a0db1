"""`python -m train.demo OUT.conv [--count N] [--seed S]`: writes the corpus of the bundled model as a file."""

from __future__ import annotations

from studytiny.command import CommandParser, number, run_command
from studytiny.errors import UserError
from train.demo import generate, write_conv


def main() -> None:
    parser = CommandParser("python -m train.demo", "生成自带模型的训练语料（.conv 格式）；同样的种子得到同样的文件。")
    parser.add_argument("out", metavar="OUT.conv", help="写到哪个文件")
    parser.add_argument("--count", type=number(int), default=8000, metavar="段数", help="多少段对话（默认 8000）")
    parser.add_argument("--seed", type=number(int), default=0, metavar="整数", help="随机种子（默认 0）")
    options = parser.parse_args()
    if options.count < 1:
        raise UserError(f"--count {options.count} 不对；应是 1 以上的整数。")
    dialogues = generate(options.count, options.seed)
    write_conv(options.out, dialogues)
    print(f"已写好 {options.out}：{len(dialogues)} 段对话，{sum(map(len, dialogues))} 句话。")


if __name__ == "__main__":
    run_command(main)
