"""The measures, one definition for training, evaluation and benchmarks.

Bits per character: over every assistant turn of every dialogue, given all that stands before it, the sum of
-log2 p(token), the closing ``<|end|>`` included, divided by the characters of those turns. Unlike a loss per token it
can be compared between vocabularies: an unknown character counts as ``<unk>`` in the sum and as one in the divisor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from studytiny.checkpoint import Model
from studytiny.errors import UserError
from studytiny.tokenizer import PAD_ID, UNK_ID, EncodedDialogue, Tokenizer
from train.clean import is_rude
from train.corpus import Unlearnt, encode_turns

TOKENS_A_BATCH = 4096


@dataclass(frozen=True)
class Score:
    """How well a model predicts the assistant's words.

    Attributes:
        bits_per_char: see the module; lower is better.
        perplexity: 2 to the bits per token: among how many equally likely tokens the model hesitates.
        dialogues, characters: what was measured.
        unknown_rate: share of those characters that are not in the vocabulary.
    """

    bits_per_char: float
    perplexity: float
    dialogues: int
    characters: int
    unknown_rate: float


@dataclass(frozen=True)
class ReplyStatistics:
    """What sampled replies look like.

    Attributes:
        distinct_1, distinct_2: different characters / pairs of characters, divided by all of them (Li et al. 2016).
        mean_reply_chars: mean length.
        repetition_rate: share of replies that hold some phrase of three or more characters three times.
        profanity_rate: share of replies with a word of ``rude_words.txt``.
    """

    distinct_1: float
    distinct_2: float
    mean_reply_chars: float
    repetition_rate: float
    profanity_rate: float


def scored_windows(encoded: EncodedDialogue, max_length: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, score_from): windows that together score every token of the dialogue once.

    The first window holds all whole turns that fit. Each later one ends with the next turn and reaches back over as
    many whole turns as fit; a turn that does not fit a window is taken in halves of it.
    """
    total = len(encoded.ids)
    ends = [*encoded.turn_starts[1:], total]
    done = 0
    while done < total:
        fitting = [end for end in ends if done < end <= max_length] if done == 0 else []
        stop = fitting[-1] if fitting else min(next(end for end in ends if end > done), done + max(1, max_length // 2))
        start = min((turn for turn in encoded.turn_starts if stop - turn <= max_length), default=stop)
        start = start if start < max(done, 1) else max(0, stop - max_length)
        yield start, stop, done
        done = stop


@torch.inference_mode()
def bits_per_character(model: Model, tokenizer: Tokenizer, dialogues: Sequence[Sequence[str]]) -> Score:
    """Scores complete dialogues (turns, user first); the model is left in eval mode.

    Raises:
        UserError: there is no dialogue.
    """
    if not dialogues:
        raise UserError("没有可测的对话：留出的部分是空的；语料太小时请加 --all 用全部对话来测。")
    model.eval()
    windows: list[tuple[list[int], list[bool]]] = []  # ids, and which of them to score
    characters = unknown = 0
    for turns in dialogues:
        encoded = encode_turns(tokenizer, turns)
        for start, stop, score_from in scored_windows(encoded, model.config.max_length):
            wanted = [encoded.reply_mask[i] and i >= score_from for i in range(start, stop)]
            if any(wanted):
                windows.append((encoded.ids[start:stop], wanted))
        replies = "".join(turn for turn in turns[1::2] if not isinstance(turn, Unlearnt))
        characters += len(replies)
        unknown += sum(index == UNK_ID for index in tokenizer.encode(replies))

    bits, tokens = 0.0, 0
    windows.sort(key=lambda window: len(window[0]))  # rows of similar length waste little padding
    while windows:
        longest = len(windows[-1][0])
        rows = max(1, TOKENS_A_BATCH // longest)
        batch, windows = windows[-rows:], windows[:-rows]
        ids = torch.full((len(batch), longest), PAD_ID)
        wanted = torch.zeros((len(batch), longest), dtype=torch.bool)
        for row, (row_ids, row_wanted) in enumerate(batch):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            wanted[row, : len(row_ids)] = torch.tensor(row_wanted)
        # Padding stands to the right of everything, where no causal model looks.
        logits = model.independent_logits(ids.to(model.device)).cpu()[:, :-1][wanted[:, 1:]]  # (N, V)
        targets = ids[:, 1:][wanted[:, 1:]]
        bits += F.cross_entropy(logits.float(), targets, reduction="sum").item() / math.log(2)
        tokens += len(targets)
    return Score(bits / characters, 2 ** (bits / tokens), len(dialogues), characters, unknown / characters)


def repeats_itself(text: str) -> bool:
    """True if a phrase of three or more characters stands in ``text`` three times."""
    return re.search(r"(.{3,}).*\1.*\1", text, re.DOTALL) is not None


def reply_statistics(replies: Sequence[str]) -> ReplyStatistics:
    """Statistics of sampled replies; there must be at least one."""
    singles = [character for reply in replies for character in reply]
    pairs = [reply[i : i + 2] for reply in replies for i in range(len(reply) - 1)]
    return ReplyStatistics(
        distinct_1=len(set(singles)) / max(1, len(singles)),
        distinct_2=len(set(pairs)) / max(1, len(pairs)),
        mean_reply_chars=len(singles) / len(replies),
        repetition_rate=sum(map(repeats_itself, replies)) / len(replies),
        profanity_rate=sum(map(is_rude, replies)) / len(replies),
    )
