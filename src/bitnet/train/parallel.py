"""One process or many: `torchrun --nproc-per-node N -m bitnet train ...`.

A step's batch is that of all processes together, cut among them, so that the tokens of a step do not depend on their number. DDP keeps
the model whole in every process, FSDP (torch's fully_shard) a part of every parameter. Checkpoints hold whole tensors by name: they are
read by any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from bitnet.errors import BitNetError, UsageError

LONGEST_WAIT = timedelta(days=7)  # while the first process encodes texts or scores a model; one that has died is noticed at once


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes."""
        if self.count > 1:
            distributed.all_reduce(value)
        return value

    def wait(self) -> None:
        if self.count > 1:
            try:
                distributed.barrier()
            except RuntimeError:  # the connection is closed
                raise BitNetError(f"process {self.rank} of {self.count}: another one has stopped; its message says why") from None


def join(device: str) -> Processes:
    """As torchrun started us, or alone. Raises `UsageError` where the device is not there."""
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    where = torch.device("cpu")
    if device != "cpu":
        from bitnet.train.device import torch_device

        where = torch_device(device)
        if device == "cuda":
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(where)
    if count > 1 and not distributed.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    return Processes(rank, count, where)


def leave(processes: Processes) -> None:
    if processes.count > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


def spread(model: nn.Module, how: str, processes: Processes) -> nn.Module:
    """The model as all processes train it together: "ddp" or "fsdp"; as it is where there is one process."""
    if processes.count == 1:
        return model
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how != "fsdp":
        raise UsageError(f"--parallel is {how!r}; expected ddp or fsdp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The layers of the decoder."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def whole(value: Any) -> Any:
    """A tensor that is spread over processes as one, on the CPU; all processes must ask."""
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is spread, on its device."""
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return value.to(like.device)
