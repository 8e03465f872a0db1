"""Muon: updates are orthogonal in blocks, whatever the gradient. CoupledAdam: what is rare stays what it was. What they
remember can be saved."""

import torch

from studytiny import DialogueModel
from train.optimizer import (
    CoupledAdam,
    block_rows,
    build_optimizers,
    load_optimizers,
    optimizer_tensors,
    orthogonalise,
)


def test_every_direction_of_an_update_is_about_equally_strong():
    torch.manual_seed(0)
    gradient = torch.randn(3, 16, 64) * torch.logspace(0, -1.5, 16)[:, None]  # some directions are 30 times stronger
    strengths = torch.linalg.svdvals(orthogonalise(gradient))
    assert strengths.min() > 0.15
    assert strengths.max() < 2
    assert torch.linalg.svdvals(gradient).max() / torch.linalg.svdvals(gradient).min() > 20


def test_no_gradient_is_no_update():
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def test_blocks_divide_the_rows():
    assert [block_rows(rows) for rows in (1376, 672, 96, 191, 192, 193)] == [172, 168, 96, 191, 192, 1]


def test_alone_in_its_table_a_row_is_moved_as_by_adam():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(1, 8)) for _ in range(2))
    optimizers = [CoupledAdam([ours], 1e-2), torch.optim.Adam([theirs], 1e-2, (0.9, 0.95))]
    for _ in range(20):
        ours.grad = torch.randn(1, 8)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def angles_after_training(optimizer_of):
    """Mean cosine of the 50 characters of 60 that never come, with a table that is both input and output."""
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(60, 16) * 0.1)
    optimizer = optimizer_of(table)
    for _ in range(300):
        ids = torch.randint(10, (64,))
        logits = (table[ids] + 0.5) @ table.T
        torch.nn.functional.cross_entropy(logits, torch.randint(10, (64,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    rare = torch.nn.functional.normalize(table.detach()[10:], dim=1)
    cosines = rare @ rare.T
    return ((cosines.sum() - 50) / (50 * 49)).item()


def test_characters_that_hardly_ever_come_can_still_be_told_apart():
    adam = angles_after_training(lambda table: torch.optim.Adam([table], 1e-2, (0.9, 0.95)))
    ours = angles_after_training(lambda table: CoupledAdam([table], 1e-2))
    assert adam > 0.9
    assert ours < adam - 0.3


def take_steps(model, optimizers, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(model.config.vocab_size, (2, 8))
        model(ids).logsumexp(-1).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def test_saved_optimizers_go_on_as_if_they_had_not_stopped():
    torch.manual_seed(0)
    straight = DialogueModel(30, 32, 4, 2)
    optimizers = build_optimizers(straight, 1e-2, 0.01)
    take_steps(straight, optimizers, 3, seed=1)
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizers).items()}
    take_steps(straight, optimizers, 3, seed=2)

    resumed = DialogueModel(30, 32, 4, 2)
    resumed.load_state_dict(weights)
    fresh = build_optimizers(resumed, 1e-2, 0.01)
    load_optimizers(fresh, tensors)
    take_steps(resumed, fresh, 3, seed=2)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_saved_when_one_adam_learnt_embeddings_and_gains_goes_on():
    torch.manual_seed(0)
    model = DialogueModel(30, 32, 4, 2)
    optimizers = build_optimizers(model, 1e-2, 0.0)
    table, gains = (optimizer.param_groups[0]["params"] for optimizer in optimizers[1:])
    earlier = [optimizers[0], torch.optim.Adam([*table, *gains], 1e-2, (0.9, 0.95))]
    take_steps(model, earlier, 3, seed=1)
    load_optimizers(optimizers, optimizer_tensors(earlier))
    assert torch.equal(optimizers[1].state[table[0]]["exp_avg"], earlier[1].state[table[0]]["exp_avg"])
    before = model.embed_tokens.weight.detach().clone()
    take_steps(model, optimizers, 3, seed=2)
    assert torch.isfinite(model.embed_tokens.weight).all()
    assert not torch.equal(model.embed_tokens.weight, before)


def test_every_parameter_is_learnt_by_exactly_one_optimizer():
    model = DialogueModel(30, 32, 4, 2)
    learnt = [p for o in build_optimizers(model, 1e-3, 0.0) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, learnt)) == sorted(map(id, model.parameters()))
