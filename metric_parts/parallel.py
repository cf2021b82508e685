"""The processes of a run: one, or those that torchrun started.

A batch is one batch however many processes share it: each takes every n-th row, the vectors are gathered for the
contrast set, and the gradients are summed. So two processes give the gradients of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from common.backend import choose_device


@dataclass(frozen=True)
class Share:
    """What one process does of a batch; all shares are of one length, as gathering wants it."""

    rows: np.ndarray  # [b] int64; a share that is too short is filled up with a row of the batch
    is_real: np.ndarray  # [b] bool; false for what fills up


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    n: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process: its own GPU where there are several."""
        chosen = choose_device(asked)
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if chosen == "cuda" and self.n > 1 else chosen

    def share(self, batch: np.ndarray) -> Share:
        """The rows of `batch` that are this process's."""
        length = -(-len(batch) // self.n)
        rows = batch[self.rank :: self.n]
        filled = np.concatenate([rows, np.repeat(batch[:1], length - len(rows))])
        return Share(filled, np.arange(length) < len(rows))

    def gather(self, vectors: torch.Tensor, *, n_rows: int) -> torch.Tensor:
        """The vectors of a whole batch of `n_rows`, in its order, out of each process's share; without a gradient."""
        if self.n == 1:
            return vectors.detach()
        shares = [torch.empty_like(vectors) for _ in range(self.n)]
        dist.all_gather(shares, vectors.detach().contiguous())
        return torch.stack(shares, dim=1).flatten(0, 1)[:n_rows]  # [b, processes, d] -> [n_rows, d]

    def own(self, gathered: torch.Tensor, *, share: Share) -> torch.Tensor:
        """What belongs to this process's share of values gathered in the order of the batch; zeros where filled up."""
        mine = gathered[self.rank :: self.n]
        missing = len(share.rows) - len(mine)
        return torch.cat([mine, mine.new_zeros(missing, *mine.shape[1:])]) if missing else mine

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place."""
        if self.n == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)

    def take_from_first(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the first one's values, in place."""
        if self.n == 1:
            return
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Add up numbers over all processes; the keys are the same everywhere."""
        if self.n == 1:
            return values
        total = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            total = total.cuda()
        dist.all_reduce(total)
        return dict(zip(sorted(values), total.tolist(), strict=True))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.n > 1:
            dist.barrier()


def join_processes(device: str) -> Processes:
    """Join the processes that torchrun started; alone where it did not."""
    n = int(os.environ.get("WORLD_SIZE", "1"))
    if n == 1:
        return Processes()
    if not dist.is_initialized():
        on_gpu = choose_device(device).startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size())


def leave_processes() -> None:
    """End the connection to the other processes, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
