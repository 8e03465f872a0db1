"""Where training starts: blocks that add nothing yet, embeddings that know which characters keep company, and a pair of
heads that can copy (``train.induction``).

A block whose two output matrices are zero leaves the stream of vectors as it is. So nothing random is in the way at
first, and training can begin with the lower half of the blocks, at half the cost: the others join later unnoticed.

Random embeddings say nothing, and a rare character is seen too seldom to move its vector far. But who stands beside
whom can be counted in a second: characters with the same neighbours get similar vectors when the table of how much
more often than by chance two characters meet (pointwise mutual information) is cut down to its main directions. That
is what word2vec computes in a roundabout way (Levy & Goldberg 2014). To that comes something random and larger: rare
characters that keep the same company must still be told apart, or the model cannot repeat what it is told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from studytiny.model import DialogueModel
from train.dataset import DialogueDataset
from train.induction import plant_copying_heads

WINDOW = 2  # neighbours on each side; the second counts half
SMOOTHING = 0.75  # of the frequencies of neighbours, or rare ones would seem too good company
NIBBLE = 1e-9
APART = 0.05  # standard deviation of what tells characters apart; it outweighs what they have in common, 0.02


@torch.no_grad()
def prepare(model: DialogueModel, dataset: DialogueDataset) -> None:
    """Makes a new model ready to learn from ``dataset``."""
    embeddings = company_embeddings(dataset, model.config.d_model)
    model.embed_tokens.weight.copy_(embeddings + torch.randn_like(embeddings) * APART)
    silence_blocks(model)
    plant_copying_heads(model, dataset)


@torch.no_grad()
def silence_blocks(model: DialogueModel) -> None:
    """Makes every block add nothing to the stream until it learns."""
    for layer in model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def neighbour_counts(dataset: DialogueDataset) -> Tensor:
    """How often two characters stand near each other within a dialogue, (V, V), symmetric."""
    size = dataset.tokenizer.vocab_size
    ids, _, segments = dataset.table
    counts = torch.zeros(size * size)
    for distance in range(1, WINDOW + 1):
        together = (segments[:, distance:] == segments[:, :-distance]) & (segments[:, distance:] >= 0)
        pairs = (ids[:, :-distance].long() * size + ids[:, distance:])[together]
        counts.index_add_(0, pairs, torch.full((len(pairs),), 1 / distance))
    counts = counts.view(size, size)
    return counts + counts.T


def company_embeddings(dataset: DialogueDataset, width: int, std: float = 0.02) -> Tensor:
    """Embeddings (V, width) of standard deviation ``std``; characters that never occur get random ones."""
    counts = neighbour_counts(dataset)
    totals = counts.sum(1)
    by_chance = totals**SMOOTHING
    by_chance /= by_chance.sum()
    table = counts / (totals[:, None] + NIBBLE) / (by_chance + NIBBLE)
    table = table.clamp_(min=NIBBLE).log_().clamp_(min=0)
    table = (table + table.T) / 2
    size = min(width, len(table))
    directions, strengths, _ = torch.svd_lowrank(table, size, niter=2)
    # Turned at random: the first entries of a vector would else be the loudest, and each head gets some of them.
    turn = torch.linalg.qr(torch.randn(width, width))[0][:size]
    embeddings = (directions * strengths.sqrt()) @ turn
    embeddings *= std / embeddings.std()
    return torch.where(totals[:, None] > 0, embeddings, torch.randn_like(embeddings) * std)
