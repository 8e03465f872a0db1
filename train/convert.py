"""The raw formats of public corpora as dialogues, each a pure function, and the one file wanted out of an archive."""

from __future__ import annotations

import fnmatch
import io
import json
import re
import zipfile
import zlib

from studytiny.errors import UserError

MAX_BYTES = 256 * 1024 * 1024  # of a file or of an archive's entry; the largest corpus has a fifth of that

# Whoever speaks like this needs people, not a model: the page answers with a fixed text, so nothing of it is learnt.
_CRISIS = re.compile("自杀|自残|自伤|自尽|轻生|寻死|不想活|结束自己的生命|危机干预")
_LINE_BREAKS = re.compile(r"\s*[\r\n]+\s*")


def _one_line(text: str) -> str:
    return _LINE_BREAKS.sub(" ", text.strip())


def qna_dialogues(text: str) -> list[list[str]]:
    """Microsoft's ``.qna``: every way to ask, with the intent's one answer.

    An intent is ``## ? question``, more questions as ``- question``, ``**Filters:**`` with lines that are no questions,
    and the answer between fences. An intent that speaks of suicide or self-harm anywhere (``_CRISIS``) is left out
    whole, with its harmless-looking phrasings too.
    """
    dialogues: list[list[str]] = []
    questions: list[str] = []
    answer: list[str] = []
    part = ""  # of the intent: "questions", "filters", "answer"

    def close() -> None:
        reply = _one_line("\n".join(answer))
        if reply and not any(map(_CRISIS.search, [*questions, reply])):
            dialogues.extend([question, reply] for question in questions if question)
        questions.clear()
        answer.clear()

    for line in text.splitlines():
        if part == "answer":
            if line.startswith("```"):
                part = ""
            else:
                answer.append(line)
        elif line.startswith("## ?"):
            close()
            part = "questions"
            questions.append(_one_line(line[4:]))
        elif line.startswith("**Filters:**"):
            part = "filters"
        elif line.startswith("```"):
            part = "answer"
        elif line.startswith("- ") and part == "questions":
            questions.append(_one_line(line[2:]))
    close()
    return dialogues


def xpersona_dialogues(text: str) -> list[list[str]]:
    """XPersona's JSON: pairs of user and answer; the personas are left out."""
    return [[_one_line(turn) for pair in entry["dialogue"] for turn in pair] for entry in json.loads(text)]


def kdconv_dialogues(text: str) -> list[list[str]]:
    """KdConv's JSON: messages that alternate; the facts behind them are left out."""
    return [[_one_line(message["message"]) for message in entry["messages"]] for entry in json.loads(text)]


def unpack(archive: bytes, pattern: str) -> bytes:
    """The one entry of a zip or wheel whose name fits ``pattern``, read into memory; nothing is written or run.

    Raises:
        UserError: not a whole zip, no such entry or several, an entry that would leave its folder, or one too large.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            entries = zipped.infolist()
            for entry in entries:
                # orig_filename: ZipInfo tidies the name it shows.
                parts = re.split(r"[\\/]", entry.orig_filename)
                if ".." in parts or not parts[0] or ":" in parts[0]:
                    raise UserError(f"压缩包里有不安全的文件名 {entry.orig_filename!r}")
            found = [
                entry
                for entry in entries
                if fnmatch.fnmatchcase(entry.filename, pattern) and not entry.filename.startswith("__MACOSX/")
            ]
            if len(found) != 1:
                raise UserError(f"压缩包里应有一个 {pattern}，找到 {len(found)} 个")
            if found[0].file_size > MAX_BYTES:
                raise UserError(f"压缩包里的 {found[0].filename} 太大（{found[0].file_size / 2**20:.0f} MB）")
            return zipped.read(found[0])  # never more than the size it states, and its checksum is verified
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("压缩包不完整或不是 zip 文件") from error
