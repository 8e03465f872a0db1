"""Embeddings to start with: characters that keep the same company are near each other."""

import random

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from studytiny import DialogueModel
from train import ConvDataset, DialogueDataset, TrainConfig, TransformerTrainer
from train.initialise import company_embeddings, neighbour_counts, prepare


def made_dataset():
    """Animals stand before verbs, colours before things; each pair of words is drawn at random."""
    rng = random.Random(0)
    sentences = ["".join((rng.choice("猫狗鸟鱼"), rng.choice("跑吃睡叫"))) for _ in range(400)]
    sentences += ["".join((rng.choice("红黄蓝绿"), rng.choice("花灯车衣"))) for _ in range(400)]
    rng.shuffle(sentences)
    corpus = ConvDataset.from_dialogues([sentences[i : i + 2] for i in range(0, 800, 2)])
    tokenizer = corpus.build_vocab()
    return DialogueDataset(corpus, tokenizer, 64), tokenizer


def test_characters_in_the_same_company_start_alike():
    dataset, tokenizer = made_dataset()
    torch.manual_seed(0)
    vectors = F.normalize(company_embeddings(dataset, 16), dim=1)
    near = vectors @ vectors.T

    def likeness(left, right):
        ids = [[tokenizer.vocab[c] for c in group] for group in (left, right)]
        return near[ids[0]][:, ids[1]].mean().item()

    assert likeness("猫狗", "鸟鱼") > likeness("猫狗", "红黄") + 0.3
    assert likeness("花灯", "车衣") > likeness("花灯", "跑吃") + 0.3


def test_characters_in_the_same_company_can_be_told_apart():
    dataset, tokenizer = made_dataset()
    torch.manual_seed(0)
    model = DialogueModel(tokenizer.vocab_size, 64, 4, n_layers=1, max_length=64)  # too small for copying heads
    prepare(model, dataset)
    pair = [tokenizer.vocab[char] for char in "猫狗"]
    alone, together = company_embeddings(dataset, 64)[pair], model.embed_tokens.weight[pair]
    assert F.cosine_similarity(*alone, dim=0) > 0.6
    assert F.cosine_similarity(*together, dim=0) < 0.35


def test_embeddings_have_the_size_asked_for_even_when_the_vocabulary_is_smaller():
    dataset, tokenizer = made_dataset()
    torch.manual_seed(0)
    embeddings = company_embeddings(dataset, 128, std=0.05)
    assert embeddings.shape == (tokenizer.vocab_size, 128)
    assert torch.isfinite(embeddings).all()
    assert 0.03 < embeddings.std() < 0.07
    assert (embeddings.norm(dim=1) > 0).all()


def test_neighbours_in_different_dialogues_do_not_count():
    corpus = ConvDataset.from_dialogues([["天地", "玄黄"], ["宇宙", "洪荒"]])
    tokenizer = corpus.build_vocab()
    counts = neighbour_counts(DialogueDataset(corpus, tokenizer, 64))
    ids = tokenizer.vocab
    assert counts[ids["天"], ids["地"]] == counts[ids["地"], ids["天"]] == 1
    assert counts[[ids[c] for c in "天地玄黄"]][:, [ids[c] for c in "宇宙洪荒"]].sum() == 0


def test_blocks_that_join_later_change_nothing_until_they_learn(tmp_path):
    dataset, tokenizer = made_dataset()
    torch.manual_seed(0)
    model = DialogueModel(tokenizer.vocab_size, 32, 4, n_layers=4, max_length=64)
    prepare(model, dataset)
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    config = TrainConfig(epochs=3, grow=0.5, out=str(tmp_path / "run"))
    trainer = TransformerTrainer(model, loader, "cpu", config)
    for batch in loader:
        trainer.step([batch], 3e-3)
    ids = dataset[0]["input_ids"][None]
    assert model.depth == 2
    half = model(ids)
    model.depth = 4
    assert torch.equal(model(ids), half)

    trainer = TransformerTrainer(model, loader, "cpu", config)
    trainer.train()
    assert model.depth == 4
    assert all(layer.self_attn.o_proj.weight.abs().max() > 0 for layer in model.layers)
    assert not torch.equal(model(ids), half)
