"""What the processes of a distributed job, torch.distributed's ranks, do together."""

from collections.abc import Iterable

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Tell whether this process is one of a job's."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def add_up(tensors: Iterable[Tensor]) -> None:
    """Add up tensors over all processes of a job, in place; each process needs as many, of the same shapes."""
    if is_distributed():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
