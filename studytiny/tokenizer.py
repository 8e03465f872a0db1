"""Tokenizer: characters <-> ids, the vocab.txt file, and how a conversation becomes ids.

One token is one character (字), so everything the model reads and writes can be read by a person too::

    <|user|>你好<|end|><|assistant|>你好呀<|end|>

The seven special tokens are put there by this file only. The text ``<|end|>`` inside a message or a corpus is seven
ordinary characters and can therefore never end a turn or fake a role.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from studytiny.errors import UserError
from studytiny.files import write_atomically

SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<pad>", "<unk>", "<bos>", "<eos>")
USER_ID, ASSISTANT_ID, END_ID, PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(len(SPECIAL_TOKENS))
ROLES = {"user": (0, USER_ID), "assistant": (1, ASSISTANT_ID)}  # name -> (role id, the token that opens such a turn)
TURN_OVERHEAD = 2  # ids a turn needs beside its characters: the role mark and <|end|>
UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what <unk> looks like when decoded

# vocab.txt holds one token a line and a tab before the id, so these three cannot stand for themselves.
_ESCAPES = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped: character for character, escaped in _ESCAPES.items()}

Message = Mapping[str, str]  # {"role": "user" | "assistant", "content": text}


@dataclass(frozen=True)
class EncodedDialogue:
    """A conversation as the model sees it; the three lists have one entry a token.

    Attributes:
        ids: token ids.
        roles: who speaks: 0 user, 1 assistant; a turn's role mark and its ``<|end|>`` belong to the turn.
        reply_mask: True where the token is the assistant's to write: a reply's characters and its closing ``<|end|>``.
        turn_starts: index of each turn's role mark.
    """

    ids: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    reply_mask: list[bool] = field(default_factory=list)
    turn_starts: list[int] = field(default_factory=list)


class Tokenizer:
    """Character vocabulary: ids 0..6 are the special tokens, then one id a character."""

    def __init__(self, characters: Iterable[str] = ()) -> None:
        """``characters`` in the order of their ids, which start at 7.

        Raises:
            UserError: an entry is not a single character, or stands twice.
        """
        tokens = [*SPECIAL_TOKENS, *characters]
        self.vocab: dict[str, int] = {token: index for index, token in enumerate(tokens)}
        for index, token in enumerate(tokens[len(SPECIAL_TOKENS) :], len(SPECIAL_TOKENS)):
            if len(token) != 1:
                raise UserError(
                    f"词表第 {index} 号 {token!r} 不是单个字符；词表里除 7 个特殊标记外，每项只能是一个字。"
                )
        if len(self.vocab) != len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise UserError(f"词表里 {twice!r} 出现了两次；请删掉重复的一项。")
        self._tokens = tokens

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def sha256(self) -> str:
        """Identifies the vocabulary whatever the line endings of its file: a hash over the tokens in id order."""
        return hashlib.sha256("\0".join(self._tokens).encode("utf-8")).hexdigest()

    # text <-> ids

    def encode(self, text: str) -> list[int]:
        """One id a character, ``<unk>`` for a character outside the vocabulary; never any other special id."""
        return [self.vocab.get(character, UNK_ID) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``: special tokens are left out, ``<unk>`` becomes U+FFFD.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        pieces = []
        for index in ids:
            if not 0 <= index < len(self._tokens):
                raise IndexError(f"token id {index} is outside the vocabulary of {len(self._tokens)}")
            if index >= len(SPECIAL_TOKENS):
                pieces.append(self._tokens[index])
            elif index == UNK_ID:
                pieces.append(UNKNOWN_CHARACTER)
        return "".join(pieces)

    def token(self, index: int) -> str:
        """The token as it stands in the vocabulary, special tokens by their name."""
        return self._tokens[index]

    def encode_dialogue(self, messages: Sequence[Message], add_reply_mark: bool = False) -> EncodedDialogue:
        """The one place where a conversation becomes ids.

        Args:
            messages: turns in order; neither role has to come first or alternate.
            add_reply_mark: append ``<|assistant|>``, the question "what does the assistant say now?".

        Raises:
            UserError: a role other than user and assistant.
        """
        encoded = EncodedDialogue()
        for message in messages:
            if message["role"] not in ROLES:
                raise UserError(f"不认识的角色 {message['role']!r}；只能是 user 或 assistant。")
            role, mark = ROLES[message["role"]]
            turn = [mark, *self.encode(message["content"]), END_ID]
            encoded.turn_starts.append(len(encoded.ids))
            encoded.ids.extend(turn)
            encoded.roles.extend([role] * len(turn))
            encoded.reply_mask.extend([False] + [role == 1] * (len(turn) - 1))
        if add_reply_mark:
            encoded.turn_starts.append(len(encoded.ids))
            encoded.ids.append(ASSISTANT_ID)
            encoded.roles.append(1)
            encoded.reply_mask.append(False)
        return encoded

    # vocabulary files

    @classmethod
    def build(cls, texts: Iterable[str], max_vocab_size: int = 10_000) -> Tokenizer:
        """The most frequent characters of ``texts``, spaces included, most frequent first, ties by code point."""
        if max_vocab_size <= len(SPECIAL_TOKENS):
            raise UserError(f"词表大小 {max_vocab_size} 太小；至少要 {len(SPECIAL_TOKENS) + 1}。")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        # A lone surrogate (half of a broken emoji) is no character and could not be written to a UTF-8 file.
        characters = [character for character in counts if not "\ud800" <= character <= "\udfff"]
        characters.sort(key=lambda character: (-counts[character], character))
        return cls(characters[: max_vocab_size - len(SPECIAL_TOKENS)])

    def save_vocab(self, path: str | Path) -> None:
        """Writes vocab.txt: ``token<TAB>id`` a line; tab, newline and carriage return as ``\\t``, ``\\n``, ``\\r``."""
        lines = [f"{_ESCAPES.get(token, token)}\t{index}\n" for index, token in enumerate(self._tokens)]
        write_atomically(path, "".join(lines))

    @classmethod
    def load_vocab(cls, path: str | Path) -> Tokenizer:
        """Reads a vocab.txt of this project or of the published StudyTinyModel.

        Raises:
            UserError: names the line that is not ``token<TAB>id``, an id out of order, or a wrong special token.
            OSError: the file cannot be read.
        """
        try:
            content = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} 不是 UTF-8 文本，不能作为词表；请换成随模型一起发布的 vocab.txt。") from error
        tokens: list[str] = []
        # Not splitlines(): characters such as U+2028 are vocabulary entries, not line ends.
        for number, line in enumerate(content.split("\n"), 1):
            line = line.removesuffix("\r")
            if not line:
                continue
            token, tab, index = line.rpartition("\t")
            if not tab or index != str(len(tokens)):
                raise UserError(f"{path} 第 {number} 行应为“字、制表符、编号 {len(tokens)}”，实际是 {line[:40]!r}。")
            tokens.append(_UNESCAPES.get(token, token))
        if tuple(tokens[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise UserError(f"{path} 的前 7 行应依次是 {' '.join(SPECIAL_TOKENS)}；这不是 StudyTiny 的词表。")
        return cls(tokens[len(SPECIAL_TOKENS) :])
