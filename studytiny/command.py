"""What every command has in common: help in Chinese, and one sentence instead of a traceback for a user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from studytiny.errors import UserError, describe_os_error


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        # Every explanation on a line of its own: argparse cannot align text whose characters are two columns wide.
        super().__init__(prog, max_help_position=8, width=96)

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, actions, groups, "用法：")


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that speaks Chinese; what it refuses is a UserError."""

    def __init__(self, prog: str, description: str, **options) -> None:
        super().__init__(
            prog, description=description, formatter_class=_Formatter, add_help=False, allow_abbrev=False, **options
        )
        # argparse has no public way to name its two groups.
        self._positionals.title, self._optionals.title = "参数", "选项"
        self.add_argument("-h", "--help", action="help", help="显示这份说明")

    def add_device(self) -> None:
        """The option that every command with a model has."""
        choices = ("auto", "cpu", "cuda", "mps")
        self.add_argument("--device", default="auto", choices=choices, help="在哪里计算（默认 auto：有显卡就用显卡）")

    def error(self, message: str) -> None:
        raise UserError(f"命令的参数不对：{message}。运行 {self.prog} --help 查看用法。")


def number(kind: type) -> Callable[[str], float]:
    """The ``type`` of an option that takes an ``int`` or ``float``, with a Chinese complaint."""

    def parse(value: str) -> float:
        try:
            return kind(value)
        except ValueError as error:
            wanted = "整数" if kind is int else "数"
            raise argparse.ArgumentTypeError(f"应是{wanted}，收到的是 {value!r}") from error

    return parse


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; exits with 2 after a user's mistake, 130 after Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A console with a legacy code page must not crash on a character it cannot show, nor on bytes that are no text.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        print(f"错误：{error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        sys.exit(1)
    except OSError as error:
        print(f"错误：{describe_os_error(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\n已中断。", file=sys.stderr)
        sys.exit(130)
