"""What the processes of a distributed job, torch.distributed's ranks, do together."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from stiefel_lora.errors import InputError

T = TypeVar("T")


def is_distributed() -> bool:
    """Tell whether this process is one of a job's."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(value: T) -> list[T]:
    """Return what each process of a job gives, in the order of their ranks; what is given if there is no job."""
    if not is_distributed():
        return [value]
    values: list[T] = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """Let an error in one process of a job be one in all of them, where the others would wait for it.

    Raises:
        InputError: In the others, which says what happened in the first that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    # Not while an error is handled here: what the others say is not its consequence.
    failures = gathered(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise InputError(f"process {rank} of the job failed with {failure}")


def add_up(tensors: Iterable[Tensor]) -> None:
    """Add up tensors over all processes of a job, in place; each process needs as many, of the same shapes."""
    if is_distributed():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
