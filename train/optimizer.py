"""Muon for the matrices of a DialogueModel, Adam for all else: how a gradient becomes a change of the weights.

AdamW scales each number of a matrix by itself. A matrix, though, acts as a whole: it turns and stretches vectors, and
its gradient mostly pulls in a few directions again and again. Muon takes the momentum of the gradient and makes its
directions equally strong (orthogonal), so that rare ones are learnt as fast as frequent ones (Jordan et al. 2024).

Doing so costs as much as a matrix's own forward and backward pass here, unless it is done in blocks: each head of the
attention by itself, which is also how attention uses its matrices, and the feed-forward matrices in groups of rows.

The embeddings need Adam with one step size for all characters, see ``CoupledAdam``: with a step size of its own, a rare
character's vector is worn down to that of any other rare one, and the model can no longer repeat it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from studytiny.model import DialogueModel

MUON_RATE = 20 / 3  # its learning rate in units of Adam's
BETAS = (0.9, 0.95)  # of Adam: what is kept of the means of the gradient and of its square at each step
MOMENTUM = 0.9
MOST_BLOCK_ROWS = 192
# Each step takes a singular value s to a s + b s^3 + c s^5; the three together take 0.003 to 1 into 0.2 to 1.9.
# The factors are the first of Polar Express (Amsel et al. 2025); five of Jordan's steps learnt no better.
STEPS = ((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518))


def orthogonalise(blocks: Tensor) -> Tensor:
    """(N, R, D) with R <= D -> matrices whose rows are nearly orthogonal and of length 1 (Newton-Schulz)."""
    length = torch.linalg.vector_norm(blocks, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = blocks / (length * 1.02 + 1e-7).to(blocks.dtype)  # now no singular value is above 1
    for a, b, c in STEPS:
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal in blocks of rows.

    A group's matrices have one shape. ``block``: rows of a block. ``columns``: the blocks are made of columns instead,
    for a matrix whose input is what is divided into heads or neurons.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            # In a group of several processes or after a frozen part, a matrix may have no gradient.
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov: one step ahead
            # What comes out is rounded to two digits anyhow; bfloat16 is enough where it is faster.
            device = parameters[0].device.type
            half = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if half else torch.float32
            matrices = torch.stack([direction.to(dtype) for direction in directions])  # (P, rows, columns)
            if group["columns"]:
                matrices = matrices.mT
            blocks = matrices.reshape(-1, group["block"], matrices.shape[-1])
            updates = orthogonalise(blocks).reshape(matrices.shape)
            if group["columns"]:
                # Rows of length 1 however many columns there are: what the matrix adds to the stream stays alike.
                updates = updates.mT * min(1.0, matrices.shape[-1] / matrices.shape[-2]) ** 0.5
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.sub_(update, alpha=group["lr"])


class CoupledAdam(torch.optim.Optimizer):
    """Adam for a table of vectors, (V, D), whose rows share their mean squared gradient, (1, D).

    Each step, the output layer pushes down every character that did not come, all in one direction and each by about
    its probability: for a rare one that is next to nothing. Adam divides the gradient of each number by how large it
    usually is, so this next to nothing moves a rare character as far as others are moved by what they mean, always the
    same way, until all rare ones point there. Divided by the mean of all rows it stays next to nothing
    (Stollenwerk & Stollenwerk 2025, Better Embeddings with Coupled Adam). Measured in ``bench/README.md``.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(table)  # (V, D)
                    state["exp_avg_sq"] = torch.zeros_like(table[:1])  # (1, D)
                state["step"] += 1
                steps = state["step"].item()
                state["exp_avg"].lerp_(table.grad, 1 - BETAS[0])
                state["exp_avg_sq"].lerp_(table.grad.square().mean(0, keepdim=True), 1 - BETAS[1])
                # The means begin at zero; divided by what they have seen so far, they do not.
                scale = (state["exp_avg_sq"] / (1 - BETAS[1] ** steps)).sqrt_().add_(1e-8)
                table.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - BETAS[0] ** steps))


def block_rows(rows: int) -> int:
    """The largest part of ``rows``, all parts alike, of at most MOST_BLOCK_ROWS."""
    return next(rows // parts for parts in itertools.count(1) if rows % parts == 0 and rows // parts <= MOST_BLOCK_ROWS)


def build_optimizers(model: DialogueModel, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Optimizers for all parameters; each group's ``rate_scale`` is its learning rate in units of ``lr``."""
    layers, config = model.layers, model.config
    head, neurons = config.d_model // config.n_head, block_rows(config.d_ff)
    attention, feed_forward = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]

    def weights(modules: Sequence[nn.Module], *names: str) -> list[nn.Parameter]:
        return [getattr(module, name).weight for module in modules for name in names]

    muon = [
        {"params": weights(attention, "q_proj", "k_proj", "v_proj"), "block": head, "columns": False},
        {"params": weights(attention, "o_proj"), "block": head, "columns": True},
        {"params": weights(feed_forward, "gate_proj", "up_proj"), "block": neurons, "columns": False},
        {"params": weights(feed_forward, "down_proj"), "block": neurons, "columns": True},
    ]
    gains = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    fused = model.device.type in ("cpu", "cuda")
    optimizers = [
        Muon(muon, lr * MUON_RATE, weight_decay),
        # No decay: it would silence rare characters, and norms.
        CoupledAdam([model.embed_tokens.weight], lr),
        torch.optim.Adam(gains, lr, BETAS, fused=fused),
    ]
    for optimizer, scale in zip(optimizers, (MUON_RATE, 1.0, 1.0), strict=True):
        for group in optimizer.param_groups:
            group["rate_scale"] = scale
    return optimizers


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember, by name, to be saved: ``optimizer.0.3.momentum`` and so on."""
    return {
        f"optimizer.{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``; names of anything else are passed over."""
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            prefix, _, rest = key.partition(f"optimizer.{number}.")
            if not prefix and rest:
                index, _, name = rest.partition(".")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
