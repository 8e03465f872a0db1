"""ConvDataset: dialogues from ``.conv`` files, read so that a turn never changes its speaker in silence.

The format: a line ``E`` between dialogues, a line ``M text`` for each turn; the user speaks first, then they alternate.
A line without ``M`` continues the turn above it. What does not fit is counted with its line number in ``problems``.

    python -m train.corpus FILE_OR_NAME [--clean] [--json]      the doctor: what is in it, what is wrong, by line
"""

from __future__ import annotations

import codecs
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studytiny.errors import UserError
from studytiny.tokenizer import SPECIAL_TOKENS, EncodedDialogue, Message, Tokenizer

# ``python -m`` finds this module loaded already, by the package's __init__, and would warn of it, to no use.
warnings.filterwarnings("ignore", "'train.corpus' found in sys.modules", RuntimeWarning)

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
    "invisible_character": "看不见的零宽字符（行首的去掉，文字中的保留）",
    "broken_character": "已经坏掉的字 \N{REPLACEMENT CHARACTER}（原样保留）",
    "special_token": "文字里写着 <|end|> 之类的特殊标记（当作普通文字）",
    "no_separator": "整个文件没有 E 行（当作一段对话）",
    "doubtful_encoding": "按 GB18030 读出来大多是生僻字（编码可能是别的，请打开看看）",
}

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # a tab is a space
# A zero-width joiner that holds an emoji together is left out of this.
INVISIBLE = re.compile(
    "[\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
    "|\u200d(?![\u2190-\u2bff\U0001f000-\U0001faff])"
)
_SPECIAL_TOKEN = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
# What is looked for in every line; most lines have none of it, which one search tells.
_IN_TEXT = {
    "control_character": _CONTROL,
    "invisible_character": INVISIBLE,
    "broken_character": re.compile("\ufffd"),
    "special_token": _SPECIAL_TOKEN,
}
_ANY_IN_TEXT = re.compile("|".join(pattern.pattern for pattern in _IN_TEXT.values()))
_HALF_WIDTH = {"Ｅ": "E", "Ｍ": "M"}


@dataclass(frozen=True)
class Problem:
    """Something in a file that had to be decided: where (1-based line) and which of PROBLEMS."""

    line: int
    kind: str


class Unlearnt(str):
    """A reply that is context for what follows and no example of how to answer: no part of it is ever learnt.

    A ``.conv`` file cannot say so; only corpora composed in memory have such turns.
    """


def encode_turns(tokenizer: Tokenizer, turns: Sequence[str]) -> EncodedDialogue:
    """The turns, user first, as ids; ``reply_mask`` leaves out what is ``Unlearnt``."""
    encoded = tokenizer.encode_dialogue(to_messages(turns))
    for turn, start, end in zip(turns, encoded.turn_starts, [*encoded.turn_starts[1:], len(encoded.ids)], strict=True):
        if isinstance(turn, Unlearnt):
            encoded.reply_mask[start:end] = [False] * (end - start)
    return encoded


def to_messages(turns: Sequence[str]) -> list[Message]:
    """Turns, user first, as openai-style messages."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]


def is_held_out(turns: Sequence[str]) -> bool:
    """True for the about 2 % of dialogues that training never sees, decided by the first turn alone, so that the same
    question is never on both sides."""
    digest = hashlib.sha1(turns[0].strip().encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
    return int(digest, 16) % HELD_OUT_EVERY == 0


_BOMS = {  # the 4-byte ones first: UTF-32 begins like UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF8: "UTF-8-SIG",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def find_encoding(data: bytes) -> str | None:
    """The encoding of a corpus file: by its byte order mark, UTF-16 without one if its lines then begin as they should,
    else UTF-8, else GB18030 (which accepts almost anything, and is therefore last); None if nothing fits.

    UTF-8 with a few damaged bytes is None too: GB18030 would read it as other characters, without a word.
    """
    for mark, encoding in _BOMS.items():
        if data.startswith(mark):
            return encoding if _decodes(data, encoding) else None
    if b"\0" in data:
        for encoding in ("UTF-16-LE", "UTF-16-BE"):
            beginning = data[: min(len(data), 65536) & ~1].decode(encoding, "replace")
            if re.search(r"^[EM]\s", beginning, re.MULTILINE):
                return encoding if _decodes(data, encoding) else None
    if _decodes(data, "UTF-8"):
        return "UTF-8"
    return "GB18030" if not _is_damaged_utf8(data) and _decodes(data, "GB18030") else None


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_damaged_utf8(data: bytes) -> bool:
    """True if most of what is not ASCII is good UTF-8 all the same; in GB18030 next to nothing is."""
    text = data.decode("utf-8", "replace")
    other = sum(len(run) for run in re.findall(r"[^\x00-\x7f]+", text))
    return text.count("\ufffd") * 4 < other


def decode_text(data: bytes, name: str) -> str:
    """Text of a corpus file: UTF-8, UTF-16 or GB18030, see ``find_encoding``; never with replacement characters.

    Raises:
        UserError: none of them fits, or the file is damaged; the first bad line is named.
    """
    encoding = find_encoding(data)
    if encoding is not None:
        return data.decode(encoding)
    if _is_damaged_utf8(data):
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{name} 是 UTF-8，但第 {line} 行有坏掉的字节（可能没有下载完整）；请重新下载，或修好这一行再试。"
            ) from error
    raise UserError(f"{name} 既不是 UTF-8 也不是 GB18030 文本；请用编辑器另存为 UTF-8 再试。")


def looks_misread(text: str) -> bool:
    """True if few of the Chinese characters are among the 6,763 common ones (GB 2312): text read in a wrong encoding,
    Big5 for instance."""
    chinese = re.findall("[\u3400-\u9fff\ue000-\uf8ff]", text[:200_000])
    common = len("".join(chinese).encode("gb2312", "ignore")) // 2
    return common * 2 < len(chinese)


def parse_conv(text: str) -> tuple[list[list[str]], list[Problem]]:
    """Dialogues exactly as they stand in ``text`` (empty turns kept as ``""``), and what was odd about it, by line."""
    dialogues: list[list[str]] = []
    problems: list[Problem] = []
    turns: list[tuple[int, list[str]]] = []  # of the dialogue being read: line, and the text with its continued lines
    separators = 0

    def close() -> None:
        if not turns:
            return
        dialogue = [" ".join(filter(None, parts)) for _, parts in turns]
        problems.extend(
            Problem(line, "empty_turn") for (line, _), content in zip(turns, dialogue, strict=True) if not content
        )
        if len(dialogue) % 2:
            problems.append(Problem(turns[-1][0], "single_turn" if len(dialogue) == 1 else "odd_turns"))
        dialogues.append(dialogue)
        turns.clear()

    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ").split("\n"), 1):
        if _ANY_IN_TEXT.search(line):
            problems.extend(Problem(number, kind) for kind, pattern in _IN_TEXT.items() if pattern.search(line))
            line = _mend(line)
        line = line.strip()
        if not line:
            continue
        mark, content = _split_mark(line)
        if mark and line[0] in _HALF_WIDTH:
            problems.append(Problem(number, "full_width_mark"))
        if mark == "E":
            separators += 1
            close()
        elif mark == "M":
            if content and not content[0].isspace():
                problems.append(Problem(number, "missing_space"))
            turns.append((number, [content.strip()]))
        elif turns:
            problems.append(Problem(number, "continuation"))
            turns[-1][1].append(content)
        else:
            problems.append(Problem(number, "stray_line"))
    close()
    if dialogues and not separators:
        problems.append(Problem(1, "no_separator"))
    problems.sort(key=lambda problem: problem.line)
    return dialogues, problems


def _mend(line: str) -> str:
    """Control characters as spaces; and no zero-width characters before the mark: a byte order mark left there by
    joining files would turn ``E`` or ``M`` into text."""
    line = _CONTROL.sub(" ", line)
    start = 0
    while start < len(line) and (line[start].isspace() or INVISIBLE.match(line, start)):
        start += 1
    return line[start:]


def _split_mark(line: str) -> tuple[str, str]:
    """A line as ("E", ""), ("M", text) or, without a mark, ("", line)."""
    mark, following = _HALF_WIDTH.get(line[0], line[0]), line[1:2]
    if mark == "E" and not following:
        return "E", ""
    # "M字" is a turn whose space was forgotten; "My" and "MB" begin a continued English line.
    latin = following.isalnum() and (following.isascii() or "０" <= following <= "ｚ")
    return ("M", line[1:]) if mark == "M" and not latin else ("", line)


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
        self.encoding = ""  # of the file
        self.tokenizer = Tokenizer()
        self._split: tuple[list[list[str]], list[list[str]]] | None = None  # training and held out, if given so

    @classmethod
    def from_split(cls, training: list[list[str]], held_out: list[list[str]], name: str) -> ConvDataset:
        """A dataset that was split already: ``training`` may have been cleaned, ``held_out`` not."""
        dataset = cls.from_dialogues([*training, *held_out], name)
        dataset._split = complete_dialogues(training), complete_dialogues(held_out)
        return dataset

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
        self.read_file()
        if not self.usable():
            raise UserError(
                f"{self.file_path} 里没有可学的对话；每段对话前写一行 E，每句话写成一行“M 文字”，一问一答至少两句。"
            )
        return self

    def read_file(self) -> ConvDataset:
        """Reads the file, whether or not there is anything to learn in it.

        Raises:
            UserError: it is missing or not text.
        """
        if self.file_path.is_dir():
            raise UserError(f"{self.file_path} 是一个文件夹；请给出其中的 .conv 文件。")
        if not self.file_path.is_file():
            raise UserError(f"找不到语料文件 {self.file_path}；请检查路径。")
        data = self.file_path.read_bytes()
        text = decode_text(data, str(self.file_path))
        self.encoding = find_encoding(data) or ""
        self.dialogues, self.problems = parse_conv(text)
        if self.encoding == "GB18030" and looks_misread(text):
            self.problems.insert(0, Problem(1, "doubtful_encoding"))
        return self

    def usable(self) -> list[list[str]]:
        """Complete dialogues, see ``complete_dialogues``."""
        return complete_dialogues(self.dialogues)

    def training_dialogues(self) -> list[list[str]]:
        """The usable dialogues without the held-out ones."""
        if self._split:
            return self._split[0]
        return [turns for turns in self.usable() if not is_held_out(turns)]

    def held_out_dialogues(self) -> list[list[str]]:
        """The usable dialogues kept for measuring."""
        if self._split:
            return self._split[1]
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
        for kind, count in counts.items():
            examples = [str(problem.line) for problem in self.problems if problem.kind == kind][:3]
            lines.append(f"  {PROBLEMS[kind]}：{count} 处，例如第 {'、'.join(examples)} 行")
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.dialogues)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


if __name__ == "__main__":
    from studytiny.command import run_command
    from train.doctor import main

    run_command(main)
