"""A user's mistake, and the sentence for it."""

from __future__ import annotations


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
