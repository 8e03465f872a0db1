"""ConvDataset: dialogues from ``.conv`` files, read so that a turn never changes its speaker in silence.

The format: a line ``E`` between dialogues, a line ``M text`` for each turn; the user speaks first, then they alternate.
A line without ``M`` continues the turn above it. What does not fit is counted with its line number in ``problems``.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studytiny.errors import UserError
from studytiny.tokenizer import Message, Tokenizer

HELD_OUT_EVERY = 50

PROBLEMS = {
    "empty_turn": "空的一句（整段对话不用于训练）",
    "odd_turns": "句数是奇数（去掉没有回答的最后一句）",
    "single_turn": "只有一句，没有回答（不用于训练）",
    "continuation": "没有 M 的行（接到上一句后面）",
    "stray_line": "对话开始前没有 M 的行（略过）",
    "missing_space": "M 后面缺空格（仍当作一句）",
    "full_width_mark": "全角的 Ｅ 或 Ｍ（按半角处理）",
    "control_character": "控制字符（换成空格）",
    "no_separator": "整个文件没有 E 行（当作一段对话）",
}

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Problem:
    """Something in a file that had to be decided: where (1-based line) and which of PROBLEMS."""

    line: int
    kind: str


def to_messages(turns: Sequence[str]) -> list[Message]:
    """Turns, user first, as openai-style messages."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]


def is_held_out(turns: Sequence[str]) -> bool:
    """True for the about 2 % of dialogues that training never sees, decided by the first turn alone, so that the same
    question is never on both sides."""
    digest = hashlib.sha1(turns[0].strip().encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
    return int(digest, 16) % HELD_OUT_EVERY == 0


def decode_text(data: bytes, name: str) -> str:
    """Text of a corpus file: UTF-8, UTF-16 with a byte order mark, or GB18030; never with replacement characters.

    Raises:
        UserError: none of them fits.
    """
    marked_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # UTF-8 before GB18030, which accepts almost anything.
    candidates = ["utf-16"] if marked_utf16 else ["utf-8-sig", "gb18030"]
    for encoding in candidates:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise UserError(f"{name} 既不是 UTF-8 也不是 GB18030 文本；请用编辑器另存为 UTF-8 再试。")


def parse_conv(text: str) -> tuple[list[list[str]], list[Problem]]:
    """Dialogues exactly as they stand in ``text`` (empty turns kept as ``""``), and what was odd about it."""
    dialogues: list[list[str]] = []
    problems: list[Problem] = []
    turns: list[str] = []
    separators = 0

    def close() -> None:
        nonlocal turns
        if turns:
            dialogues.append(turns)
        turns = []

    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        mark = line.strip()
        if line[0] in "ＥＭ":
            problems.append(Problem(number, "full_width_mark"))
            mark = {"Ｅ": "E", "Ｍ": "M"}[line[0]] + mark[1:]
        if mark == "E":
            separators += 1
            close()
            continue
        # "M字" is a turn whose space was forgotten; "My" and "MB" begin a continued English line.
        is_turn = mark == "M" or (mark[0] == "M" and not (mark[1].isascii() and mark[1].isalnum()))
        content = mark[1:] if is_turn else mark
        if is_turn and content and not content[0].isspace():
            problems.append(Problem(number, "missing_space"))
        if _CONTROL.search(content.replace("\t", " ")):
            problems.append(Problem(number, "control_character"))
        content = _CONTROL.sub(" ", content).strip()
        if is_turn:
            if not content:
                problems.append(Problem(number, "empty_turn"))
            turns.append(content)
        elif turns:
            problems.append(Problem(number, "continuation"))
            turns[-1] = f"{turns[-1]} {content}".strip()
        else:
            problems.append(Problem(number, "stray_line"))
    close()
    if dialogues and not separators:
        problems.append(Problem(1, "no_separator"))
    return dialogues, problems


def complete_dialogues(dialogues: Iterable[Sequence[str]]) -> list[list[str]]:
    """What can be learnt from: no empty turn, an odd last turn cut, at least one answer."""
    cut = (list(turns[: len(turns) - len(turns) % 2]) for turns in dialogues if all(turns))
    return [turns for turns in cut if turns]


class ConvDataset:
    """The dialogues of one ``.conv`` file, or of several joined by ``from_dialogues``."""

    def __init__(self, file_path: str | Path) -> None:
        self.file_path = Path(file_path)
        self.dialogues: list[list[str]] = []  # as they stand in the file
        self.problems: list[Problem] = []
        self.tokenizer = Tokenizer()

    @classmethod
    def from_dialogues(cls, dialogues: Iterable[Sequence[str]], name: str = "dialogues") -> ConvDataset:
        """A dataset of turns that are already in memory, user first."""
        dataset = cls(name)
        dataset.dialogues = [list(turns) for turns in dialogues]
        return dataset

    def process_file(self) -> ConvDataset:
        """Reads the file.

        Raises:
            UserError: it is missing, not text, or holds no dialogue with an answer.
        """
        if self.file_path.is_dir():
            raise UserError(f"{self.file_path} 是一个文件夹；请给出其中的 .conv 文件。")
        if not self.file_path.is_file():
            raise UserError(f"找不到语料文件 {self.file_path}；请检查路径。")
        text = decode_text(self.file_path.read_bytes(), str(self.file_path))
        self.dialogues, self.problems = parse_conv(text)
        if not self.usable():
            raise UserError(
                f"{self.file_path} 里没有可学的对话；每段对话前写一行 E，每句话写成一行“M 文字”，一问一答至少两句。"
            )
        return self

    def usable(self) -> list[list[str]]:
        """Complete dialogues, see ``complete_dialogues``."""
        return complete_dialogues(self.dialogues)

    def training_dialogues(self) -> list[list[str]]:
        """The usable dialogues without the held-out ones."""
        return [turns for turns in self.usable() if not is_held_out(turns)]

    def held_out_dialogues(self) -> list[list[str]]:
        """The usable dialogues kept for measuring."""
        return [turns for turns in self.usable() if is_held_out(turns)]

    def build_vocab(self, max_vocab_size: int = 10_000, vocab_file: str | Path | None = None) -> Tokenizer:
        """The tokenizer of the training dialogues; written to ``vocab_file`` if one is given (an old one is replaced:
        a vocabulary of another corpus would not fit)."""
        texts = ("".join(turns) for turns in self.training_dialogues())
        self.tokenizer = Tokenizer.build(texts, max_vocab_size)
        if vocab_file is not None:
            self.tokenizer.save_vocab(vocab_file)
        return self.tokenizer

    def summary(self) -> str:
        """What was found, in Chinese, a few lines."""
        usable = self.usable()
        turns = sum(map(len, usable))
        lines = [f"{self.file_path}：{len(self.dialogues)} 段对话，可用于学习 {len(usable)} 段，共 {turns} 句。"]
        counts = Counter(problem.kind for problem in self.problems)
        counts["odd_turns"] = sum(len(turns) % 2 == 1 and len(turns) > 1 for turns in self.dialogues)
        counts["single_turn"] = sum(len(turns) == 1 for turns in self.dialogues)
        for kind, count in counts.items():
            if count:
                examples = [str(problem.line) for problem in self.problems if problem.kind == kind][:3]
                where = f"，例如第 {'、'.join(examples)} 行" if examples else ""
                lines.append(f"  {PROBLEMS[kind]}：{count} 处{where}")
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.dialogues)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size
