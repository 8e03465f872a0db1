"""A pair of heads that can copy from the start: what stood after this character the last time?

A chat model that should remember a name it has never seen cannot know it by heart; it must copy it from the
conversation. Trained models do so with two heads that work together, an "induction head" (Olsson et al. 2022):

1. in the first block, a head that looks at the place before and leaves a note: "the character before me is 陈";
2. in the second block, a head at 陈 that asks "who has 陈 before them?", finds 雨 by that note, and proposes 雨.

Left alone, training finds them late: neither is of use without the other. Both are simple enough to be written down,
so they are planted, and training makes of them what it needs. Nothing is fixed: all weights go on learning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from studytiny.model import DialogueModel, rotary_table
from train.dataset import DialogueDataset

COMMON = 0.7  # length of what all embeddings get in common, in units of their own
FAST, MOST_FAST = 0.05, 6  # rotary pairs that turn by more than so many radians a place tell neighbours apart
SLOW, FAR = 1.0, 128  # pairs that turn by less than a radian in 128 places compare characters at any distance
LOOK_GAIN, FIND_GAIN = 1.7, 1.6  # how decided the two heads are
NOTE, PROPOSAL = 0.04, 0.1  # how loudly they speak; embeddings have 0.02 an entry


@torch.no_grad()
def plant_copying_heads(model: DialogueModel, dataset: DialogueDataset) -> None:
    """Sets head 0 of the first two blocks and adds one vector to all embeddings; models too small are left as they are.

    Args:
        model: a new model whose embeddings say which characters are alike.
        dataset: what it will learn from; how often a character occurs decides how exactly it is told from others.
    """
    config = model.config
    size = config.d_model // config.n_head  # K, the width of a head
    half = size // 2
    cosine, sine = (table[1, :half] for table in rotary_table(config)) if config.max_length > 1 else (None, None)
    if config.n_head < 2 or config.n_layers < 2 or cosine is None:
        return
    angles = torch.atan2(sine, cosine)  # (K/2,) of one place; pair i of a head's entries is (i, i + K/2)
    fast = (angles > FAST).nonzero().flatten()[:MOST_FAST]
    slow = (angles * FAR < SLOW).nonzero().flatten()
    if not len(fast) or not len(slow):
        return
    slow = torch.cat((slow, slow + half))

    # A head sees only vectors, so "always look one place back" needs something that all vectors have. One vector added
    # to all embeddings is that; it raises all logits alike and so changes no prediction.
    embeddings = model.embed_tokens.weight
    everywhere = torch.nn.functional.normalize(torch.randn(config.d_model), dim=0).to(embeddings)
    embeddings += everywhere * embeddings.norm(dim=1).mean() * COMMON
    common, directions, spread = main_directions(embeddings, character_shares(dataset))
    loud, quiet = directions[:, :size], directions[:, -size - 1 : -1]  # (D, K) each; the last of all is `common`

    # Query and key are the same everywhere but for their place. Pair i of the query is set back by the angle of one
    # place, so that it meets the key of the place before in full.
    look = model.layers[0].self_attn
    key, query = torch.zeros(size), torch.zeros(size)
    key[fast], query[fast], query[fast + half] = 1.0, cosine[fast], -sine[fast]
    look.q_proj.weight[:size] = torch.outer(query.to(common), common)
    look.k_proj.weight[:size] = torch.outer(key.to(common), common)
    for norm in (look.q_norm, look.k_norm):
        norm.weight[torch.cat((fast, fast + half))] = LOOK_GAIN
    # The note is the character's vector, written where embeddings hardly ever are.
    look.v_proj.weight[:size] = loud.T
    look.o_proj.weight[:, :size] = quiet * NOTE

    # The query is the character itself, the key the note; each direction counts alike, or the loudest would decide.
    find = model.layers[1].self_attn
    count = len(slow)
    for projection, source in ((find.q_proj, loud), (find.k_proj, quiet)):
        rows = (source[:, :count] / spread[:count]).T  # (count, D)
        projection.weight[:size] = 0
        projection.weight[slow] = rows / rows.norm(dim=1).mean()
    for norm in (find.q_norm, find.k_norm):
        norm.weight[slow] = FIND_GAIN
    # What is proposed is the vector of the character found, which is what the output layer compares with.
    find.v_proj.weight[:size] = loud.T
    find.o_proj.weight[:, :size] = loud * PROPOSAL


def character_shares(dataset: DialogueDataset) -> Tensor:
    """(V,), their sum is 1: between all characters alike and each as often as it occurs."""
    ids, _, segments = dataset.table
    counts = torch.bincount(ids[segments >= 0].long(), minlength=dataset.tokenizer.vocab_size).float().sqrt()
    return counts / counts.sum()


def main_directions(embeddings: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How embeddings (V, D) lie once a norm has made them equally long.

    Returns:
        Their common direction (D,); their main directions apart from it, columns of (D, D), the strongest first and the
        common one last; how far they spread along each, (D,), never zero.
    """
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    weights = shares.to(unit).unsqueeze(1)
    common = torch.nn.functional.normalize((unit * weights).sum(0), dim=0)
    rest = unit - torch.outer(unit @ common, common)
    covariance = (rest * weights).T @ rest
    # Pushed below all others, `common` comes out as the last direction whatever rounding does.
    variances, directions = torch.linalg.eigh(covariance - torch.outer(common, common))
    return common, directions.flip(1), variances.flip(0).clamp(min=1e-8).sqrt()
