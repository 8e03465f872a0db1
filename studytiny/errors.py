"""A user's mistake, and how a command reports it: one sentence, no traceback, a non-zero exit."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """What the user can mend. The message is one Chinese sentence: what is wrong, where, and what to do next."""


def describe_os_error(error: OSError) -> str:
    """One Chinese sentence for a failed file operation."""
    reasons = {
        "FileNotFoundError": "找不到这个文件或文件夹",
        "PermissionError": "没有权限",
        "IsADirectoryError": "这是一个文件夹，不是文件",
        "NotADirectoryError": "路径中有一段不是文件夹",
        "FileExistsError": "已经存在",
    }
    reason = reasons.get(type(error).__name__, error.strerror or str(error))
    return f"文件操作失败：{reason}（{error.filename}）。" if error.filename else f"操作失败：{reason}。"


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; exits with 2 after a user's mistake, 130 after Ctrl-C."""
    # A Windows console with a legacy code page must not crash on a character it cannot show.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        print(f"错误：{error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"错误：{describe_os_error(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\n已中断。", file=sys.stderr)
        sys.exit(130)
