"""The planted heads: a new model already copies what it has never seen, and is otherwise as before."""

import random

import pytest
import torch

from studytiny import DialogueModel
from train import ConvDataset, DialogueDataset
from train.induction import character_shares, main_directions, plant_copying_heads
from train.initialise import company_embeddings, prepare

CHARACTERS = "".join(chr(ord("一") + i) for i in range(600))


@pytest.fixture(scope="module")
def dataset() -> DialogueDataset:
    """Each character is followed by a near one, so that embeddings have something to say."""
    rng = random.Random(0)

    def turn() -> str:
        at = rng.randrange(580)
        return "".join(CHARACTERS[at + rng.randrange(20)] for _ in range(10))

    corpus = ConvDataset.from_dialogues([[turn(), turn()] for _ in range(1500)])
    return DialogueDataset(corpus, corpus.build_vocab(), 64)


def new_model(dataset: DialogueDataset, **sizes: int) -> DialogueModel:
    torch.manual_seed(0)
    return DialogueModel(dataset.tokenizer.vocab_size, **{"d_model": 128, "n_head": 4, "max_length": 128, **sizes})


def places_of_the_copy(model: DialogueModel) -> torch.Tensor:
    """40 random characters, twice: at which place of 606 stands what followed the last time; 0: the most probable."""
    rng = random.Random(1)
    first = torch.tensor([rng.sample(range(10, 600), 40) for _ in range(16)])
    logits = model(torch.cat((first, first), 1))[:, 40:-1]  # (16, 39, V)
    right = logits.gather(-1, first[:, 1:, None])
    return (logits > right).sum(-1).float()


def test_a_new_model_copies_from_the_start(dataset):
    model = new_model(dataset, d_model=256)
    assert places_of_the_copy(model).median() > 200  # by chance it is 303
    prepare(model, dataset)
    model.depth = 2
    # Its neighbours in the corpus, twenty or so, look alike to a model that has not learnt anything yet.
    assert places_of_the_copy(model).median() < 20


def test_the_first_head_looks_at_the_place_before(dataset):
    model = new_model(dataset)
    prepare(model, dataset)
    block = model.layers[0]
    ids = dataset[0]["input_ids"][None]
    seen = []
    block.self_attn.o_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(ids)
    width = model.config.d_model // model.config.n_head
    values = block.self_attn.v_proj(block.input_layernorm(model.embed_tokens(ids)))[0, :, :width]
    near = torch.nn.functional.cosine_similarity(seen[0][0, 1:, :width], values[:-1])
    assert near.median() > 0.97


def test_what_all_embeddings_get_in_common_changes_no_prediction(dataset):
    model = new_model(dataset, n_layers=1)
    prepare(model, dataset)  # one block: no heads are planted, and it adds nothing yet
    ids = dataset[0]["input_ids"][None]
    hidden = model.hidden_states(ids)
    before = model.unembed(hidden).softmax(-1)
    model.embed_tokens.weight.data += 0.3
    assert torch.allclose(model.unembed(hidden).softmax(-1), before, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"n_head": 1}, {"n_layers": 1}, {"d_model": 8, "n_head": 4}, {"max_length": 1}], ids=str
)
def test_models_too_small_for_it_are_left_alone(dataset, sizes):
    model = new_model(dataset, **sizes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plant_copying_heads(model, dataset)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_directions_are_orthogonal_and_the_common_one_is_the_last(dataset):
    torch.manual_seed(0)
    embeddings = company_embeddings(dataset, 64) + 0.02
    common, directions, spread = main_directions(embeddings, character_shares(dataset))
    assert torch.allclose(directions.T @ directions, torch.eye(64), atol=1e-4)
    assert abs(float(common @ directions[:, -1])) > 0.999
    assert (spread[:-1] >= spread[1:]).all() and (spread > 0).all()
    assert character_shares(dataset).sum().item() == pytest.approx(1)
