"""Training in several processes, started by ``torchrun --nproc_per_node N -m train ...``.

Every process reads the same batches, works on its share of the rows, and adds its gradients to everybody's; then all
take the same step. One process is a group of one: nothing is sent, and the trainer reads the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from studytiny.errors import UserError
from train.dataset import IGNORED


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process: those that torchrun starts on one machine take one each. Other devices are shared."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


class Group:
    """This process and the others.

    Attributes:
        rank: number of this process; 0 speaks, measures and saves.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def from_environment(cls, device: torch.device) -> Group:
        """Joins the processes that torchrun started with this one; without torchrun a group of one."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), size)

    def share_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every ``size``-th row of the batch, (B, T) -> (about B / size, T); at least one."""
        if self.rank >= len(batch["targets"]):
            # The last batch of an epoch may be this short. A row with nothing to learn has gradients, all of them zero.
            nothing = {name: torch.full_like(batch[name][:1], IGNORED) for name in ("labels", "targets")}
            return {name: rows[:1] for name, rows in batch.items()} | nothing
        return {name: rows[self.rank :: self.size] for name, rows in batch.items()}

    def check_rows(self, rows: int) -> None:
        """Raises UserError if there are fewer rows than processes."""
        if rows < self.size:
            raise UserError(f"每步只有 {rows} 行，不够 {self.size} 个进程分；请把 --batch-size 调到 {self.size} 以上。")

    def add(self, values: Iterable[float], device: torch.device) -> list[float]:
        """The sum of each value over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64 if device.type == "cpu" else torch.float32).to(device)
        dist.all_reduce(total)
        return total.tolist()

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its sum over all processes: one message, as each costs a round trip."""
        if self.size == 1:
            return
        # All processes use the same parameters, as each has at least one row.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def same_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gives every process the weights of process 0: those it drew itself may differ in the last bit."""
        if self.size > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)

    def from_first(self, values: Iterable[float], device: torch.device) -> list[float]:
        """The values of process 0, so that all decide alike."""
        return self.add([value if self.rank == 0 else 0.0 for value in values], device)

    def leave(self) -> None:
        """Ends the connection to the others; torch complains of a process that ends without."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()
