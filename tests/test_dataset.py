"""Packing and labels: everything the assistant says is learnt once, nothing else."""

import random

import pytest
import torch
from torch.utils.data import default_collate

from studytiny import DialogueModel, Tokenizer, UserError
from studytiny.tokenizer import END_ID, PAD_ID
from train import ConvDataset, DialogueDataset
from train.corpus import Unlearnt, is_held_out, to_messages
from train.dataset import IGNORED, AlikeRows, block_sizes, fold, pack
from train.trainer import add_targets


def made_dialogues(count=200, turns=(2, 4, 6), length=12, seed=0):
    rng = random.Random(seed)

    def text():
        return "".join(rng.choice("一二三四五六七八九十") for _ in range(rng.randint(1, length)))

    dialogues = [[text() for _ in range(rng.choice(turns))] for _ in range(count)]
    return [turns for turns in dialogues if not is_held_out(turns)]


def make(dialogues, max_length=64):
    corpus = ConvDataset.from_dialogues(dialogues)
    tokenizer = corpus.build_vocab()
    return DialogueDataset(corpus, tokenizer, max_length), tokenizer


def learnt(dataset, tokenizer):
    """Every run of labels, as text, read back from the rows."""
    replies = []
    for item in dataset:
        reply = []
        for label in item["labels"].tolist():
            if label != IGNORED:
                reply.append(label)
            if label == END_ID:
                replies.append(tokenizer.decode(reply))
                reply = []
        assert not reply
    return sorted(replies)


def test_every_reply_is_learnt_exactly_once():
    dialogues = made_dialogues()
    dataset, tokenizer = make(dialogues, max_length=128)
    assert learnt(dataset, tokenizer) == sorted(text for turns in dialogues for text in turns[1::2])


def test_labels_follow_their_token_within_the_dialogue():
    dataset, _ = make(made_dialogues())
    for item in dataset:
        ids, labels, segments = item["input_ids"], item["labels"], item["segments"]
        places = (labels != IGNORED).nonzero().flatten()
        assert torch.equal(labels[places], ids[places + 1])
        assert torch.equal(segments[places], segments[places + 1])
        assert (segments[places] >= 0).all()


def test_rows_hold_whole_dialogues_and_little_padding():
    dialogues = made_dialogues(turns=(2, 4))
    dataset, tokenizer = make(dialogues)
    assert dataset.tokens / (len(dataset) * 64) > 0.95
    assert dataset.tokens == sum(len(tokenizer.encode_dialogue(to_messages(turns)).ids) for turns in dialogues)
    for item in dataset:
        padding = item["segments"] == -1
        assert (item["input_ids"][padding] == PAD_ID).all()
        assert (item["labels"][padding] == IGNORED).all()


def test_long_dialogue_is_split_before_a_user_turn():
    turns = ["问" * 10, "答" * 10] * 10
    dataset, tokenizer = make([turns])
    assert len(dataset) > 1
    assert learnt(dataset, tokenizer) == ["答" * 10] * 10
    for item in dataset:
        assert item["input_ids"][0] == 0


def test_exchange_longer_than_a_row_is_cut_not_lost():
    dataset, tokenizer = make([["问" * 10, "答" * 100, "问", "好"]])
    labels = torch.cat([item["labels"] for item in dataset])
    assert (labels == tokenizer.vocab["答"]).sum() > 40
    assert (labels == tokenizer.vocab["好"]).sum() == 1


@pytest.mark.parametrize(("longest", "max_length"), [(50, 50), (64, 256), (200, 256), (500, 512)])
def test_best_fit_packs_everything_once(longest, max_length):
    rng = random.Random(1)
    lengths = sorted((rng.randint(1, longest) for _ in range(500)), reverse=True)
    rows = pack(lengths, max_length)
    assert sorted(piece for _, row in rows for block in row for piece in block) == list(range(500))
    for size, row in rows:
        assert size in block_sizes(max_length) and len(row) * size <= max_length
        assert all(sum(lengths[piece] for piece in block) <= size for block in row)
    assert len(rows) <= 1.08 * sum(lengths) / max_length + len(block_sizes(max_length))


def test_dialogues_fold_into_the_smallest_blocks_that_hold_them():
    short, _ = make(made_dialogues(turns=(2,)), max_length=256)
    batch = default_collate([short[0], short[1]])
    folded = fold(batch)
    assert folded["input_ids"].shape == (8, 64)
    assert all(torch.equal(folded[name].reshape(2, 256), batch[name]) for name in batch)
    middle, _ = make([["问" * 40, "答" * 40] for _ in range(8)], max_length=256)
    assert fold(default_collate([middle[0], middle[1]]))["input_ids"].shape == (4, 128)
    long, _ = make([["问" * 90, "答" * 90], *made_dialogues()], max_length=256)
    batch = default_collate([long[0], long[1]])
    assert torch.equal(fold(batch)["input_ids"], batch["input_ids"])


def test_rows_of_a_batch_are_alike_and_each_comes_once():
    dialogues = [*made_dialogues(turns=(2,)), *[["问" * 90, "答" * 90], ["问" * 40, "答" * 40]] * 9]
    dataset, _ = make(dialogues, max_length=256)
    assert set(dataset.row_blocks) == {64, 128, 256}
    batches = AlikeRows(dataset, 2, torch.Generator().manual_seed(0))
    first = list(batches)
    assert len(first) == len(batches) and max(map(len, first)) == 2
    assert sorted(row for batch in first for row in batch) == list(range(len(dataset)))
    for batch in first:
        sizes = {dataset.row_blocks[row] for row in batch}
        folded = fold(default_collate([dataset[row] for row in batch]))
        assert len(sizes) == 1 and folded["input_ids"].shape[1] <= sizes.pop()
    assert list(batches) != first
    batches.generator.manual_seed(0)
    assert list(batches) == first


def test_folding_changes_no_logits():
    dataset, tokenizer = make(made_dialogues(turns=(2,)), max_length=256)
    model = DialogueModel(tokenizer.vocab_size, 32, 4, 2, max_length=256)
    batch = default_collate([dataset[0], dataset[1]])
    folded = fold(batch)
    logits = model(batch["input_ids"], batch["segments"]).reshape(8, 64, -1)
    torch.testing.assert_close(model(folded["input_ids"], folded["segments"]), logits, atol=1e-5, rtol=1e-4)


def test_nothing_to_learn_is_said():
    with pytest.raises(UserError, match="没有可学的回答"):
        make([["问" * 100, "答"]])  # the answer never fits a row
    held_out = next([f"{i}", "答"] for i in range(1000) if is_held_out([f"{i}"]))
    with pytest.raises(UserError, match="没有可学的回答"):
        make([held_out])


def test_unknown_characters_of_the_corpus_are_learnt_as_unknown():
    corpus = ConvDataset.from_dialogues([["你好", "好呀"]])
    dataset = DialogueDataset(corpus, Tokenizer("好"), 16)
    assert dataset.labels == 3


def test_a_reply_that_is_not_to_be_learnt_is_read_all_the_same():
    turns = ["我叫小明", Unlearnt("今天下雨。"), "我叫什么", "你叫小明。"]
    corpus = ConvDataset.from_split([turns], [], "two replies")
    tokenizer = corpus.build_vocab()
    row = DialogueDataset(corpus, tokenizer, max_length=64)[0]
    learnt = [index for index in row["labels"].tolist() if index >= 0]
    assert tokenizer.decode(row["input_ids"].tolist()).count("今天下雨。") == 1
    assert tokenizer.decode(learnt).startswith("你叫小明。") and len(learnt) == len("你叫小明。") + 1
    drawn = add_targets({name: values[None] for name, values in row.items()}, user_share=1.0)
    said = tokenizer.decode([target for target in drawn["targets"][0].tolist() if target != IGNORED])
    assert "我叫小明" in said and "我叫什么" in said and "你叫小明。" in said and not set("今天下雨") & set(said)
    assert (drawn["labels"] >= IGNORED).all()
