"""Work of the tests that several processes of one process group share."""

import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


def run_on_ranks(count: int, work: Callable[..., None], folder: str | Path, *args: Any, seconds: float = 100) -> None:
    """Run ``work(rank, folder, *args)`` in so many processes that can talk to each other; all have to end well."""
    context = get_context("spawn")
    ranks = [context.Process(target=_on_rank, args=(rank, count, work, str(folder), *args)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
    assert [process.exitcode for process in ranks] == [0] * count


def _on_rank(rank: int, count: int, work: Callable[..., None], folder: str, *args: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    work(rank, folder, *args)
    torch.distributed.barrier()
    # At an ordinary exit of the interpreter a thread of gloo now and then aborts the process, after all is done.
    os._exit(0)
