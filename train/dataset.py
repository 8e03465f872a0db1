"""DialogueDataset: dialogues packed into rows of equal length, with labels on the assistant's words only.

Padding a batch of short dialogues wastes most of the work, so several dialogues share a row; ``segments`` keeps them
from reading each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from studytiny.errors import UserError
from studytiny.tokenizer import ASSISTANT_ID, PAD_ID, EncodedDialogue, Tokenizer
from train.corpus import ConvDataset, encode_turns

IGNORED = -100  # the label that cross_entropy skips
NEVER = -101  # the label in a reply that is Unlearnt: it is not drawn with the user's words either
BLOCKS = (64, 128, 256)  # a row shorter dialogues share is divided into blocks of one of these sizes; see fold


def nothing_to_learn(corpus: ConvDataset) -> UserError:
    """What to tell a user whose corpus has no label for the model."""
    return UserError(f"{corpus.file_path} 里没有可学的回答（去掉留作测试的部分之后）；请换一个更大的语料。")


def label_of(encoded: EncodedDialogue, index: int) -> int:
    """What the model should say after token ``index``: the next token if that is the assistant's to write."""
    following = index + 1
    if following >= len(encoded.ids):
        return IGNORED
    if encoded.reply_mask[following]:
        return encoded.ids[following]
    is_unlearnt = encoded.roles[following] == 1 and encoded.ids[following] != ASSISTANT_ID
    return NEVER if is_unlearnt else IGNORED


def pieces(encoded: EncodedDialogue, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of parts that fit a row: as many whole turns as possible, each part beginning with a user turn.

    A single exchange longer than the row is cut at the row's end.
    """
    # A dialogue alternates, user first: every second turn is a place to begin.
    starts = encoded.turn_starts[::2]
    ends = [*starts[1:], len(encoded.ids)]
    begin = 0
    for i, end in enumerate(ends):
        following = ends[i + 1] if i + 1 < len(ends) else None
        if following is not None and following - starts[begin] <= max_length:
            continue
        part = range(starts[begin], min(end, starts[begin] + max_length))
        labels = [label_of(encoded, index) for index in part]
        labels[-1] = IGNORED  # what follows the part stands in no row
        yield encoded.ids[part.start : part.stop], labels
        begin = i + 1


def block_sizes(max_length: int) -> list[int]:
    """Sizes of the blocks that a row of ``max_length`` places can be divided into, the whole row last."""
    return [*(size for size in BLOCKS if size < max_length and max_length % size == 0), max_length]


def pack(lengths: Iterable[int], max_length: int) -> list[tuple[int, list[list[int]]]]:
    """Best fit, the longest first if they come so: each piece goes where the least room is left after it, and if there
    is none, into a new block of the smallest size that holds it.

    Returns:
        The rows: (size of its blocks, its blocks), a block being a list of piece numbers.
    """
    sizes = block_sizes(max_length)
    opened: dict[int, list[list[int]]] = {size: [] for size in sizes}  # size -> blocks
    with_room: list[list[list[int]]] = [[] for _ in range(max_length + 1)]  # free places -> blocks
    for piece, length in enumerate(lengths):
        free = next((room for room in range(length, max_length + 1) if with_room[room]), None)
        if free is None:
            free = next(size for size in sizes if size >= length)
            block: list[int] = []
            opened[free].append(block)
        else:
            block = with_room[free].pop()
        block.append(piece)
        with_room[free - length].append(block)
    return [
        (size, opened[size][i : i + max_length // size])
        for size in reversed(sizes)
        for i in range(0, len(opened[size]), max_length // size)
    ]


def fold(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(B, T) -> (B * T / size, size), with the smallest size of block that no dialogue crosses.

    What is computed stays the same, but attention, whose cost grows with the square of a row, takes much less time.
    """
    segments = batch["segments"]
    rows, length = segments.shape
    for size in block_sizes(length)[:-1]:
        ends, starts = segments[:, size - 1 : -1 : size], segments[:, size::size]
        if not ((ends == starts) & (ends >= 0)).any():
            return {name: values.reshape(rows * length // size, size) for name, values in batch.items()}
    return dict(batch)


class AlikeRows(Sampler[list[int]]):
    """Batches of rows whose blocks have one size, so that a batch can be folded as far as its rows; in random order.

    A ``batch_sampler`` for the DataLoader of a DialogueDataset.
    """

    def __init__(self, dataset: DialogueDataset, batch_size: int, generator: torch.Generator) -> None:
        self.batch_size, self.generator = batch_size, generator
        sizes = torch.tensor(dataset.row_blocks)
        self._kinds = [(sizes == size).nonzero().flatten() for size in sizes.unique()]

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.batch_size) for rows in self._kinds)

    def __iter__(self) -> Iterator[list[int]]:
        batches: list[list[int]] = []
        for rows in self._kinds:
            order = rows[torch.randperm(len(rows), generator=self.generator)].tolist()
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for index in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[index]


class DialogueDataset(Dataset):
    """Rows of ``max_length`` tokens for a DataLoader; held-out dialogues are left out.

    An item is ``{"input_ids", "labels", "segments"}``, each a LongTensor (max_length,). ``labels[t]`` is the token that
    should follow ``input_ids[t]``, or -100, in an `Unlearnt` reply -101. Padding has a segment of its own.

    Attributes:
        table: ids, labels and segments of all rows, (3, rows, max_length).
        row_blocks: of each row, the size of its blocks: no dialogue of it crosses a multiple of that.
        tokens: tokens in all rows that are not padding.
        labels: of them, those with something to learn.
    """

    def __init__(self, conv_dataset: ConvDataset, tokenizer: Tokenizer, max_length: int = 256, seed: int = 0) -> None:
        """
        Raises:
            UserError: nothing in the corpus can be learnt.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.conv_dataset = conv_dataset
        parts: list[tuple[list[int], list[int]]] = []
        for turns in conv_dataset.training_dialogues():
            encoded = encode_turns(tokenizer, turns)
            parts.extend(part for part in pieces(encoded, max_length) if any(label >= 0 for label in part[1]))
        if not parts:
            raise nothing_to_learn(conv_dataset)
        # Neighbours in the file should not always share a row; the longest first, so that short ones fill the gaps.
        random.Random(seed).shuffle(parts)
        parts.sort(key=lambda part: -len(part[0]))
        rows = pack((len(ids) for ids, _ in parts), max_length)
        # One table for all rows, (3, rows, max_length) in 4-byte numbers: a corpus of 450,000 dialogues takes 130 MB.
        self.table = torch.full((3, len(rows), max_length), PAD_ID, dtype=torch.int32)
        self.table[1] = IGNORED
        self.table[2] = -1
        self.row_blocks = [size for size, _ in rows]
        for row, (size, blocks) in enumerate(rows):
            segment = 0  # counted through the row: no two dialogues of it may have one number
            for index, numbers in enumerate(blocks):
                start = index * size
                ids = [token for number in numbers for token in parts[number][0]]
                labels = [label for number in numbers for label in parts[number][1]]
                segments = [segment + i for i, number in enumerate(numbers) for _ in parts[number][0]]
                segment += len(numbers)
                self.table[:, row, start : start + len(ids)] = torch.tensor([ids, labels, segments], dtype=torch.int32)
        self.tokens = int((self.table[2] >= 0).sum())
        self.labels = int((self.table[1] >= 0).sum())

    def __len__(self) -> int:
        return self.table.shape[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, labels, segments = self.table[:, index].long()
        return {"input_ids": ids, "labels": labels, "segments": segments}
