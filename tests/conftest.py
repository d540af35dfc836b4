"""Every test starts from the same seed, on one thread, and puts torch's global settings back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    # Matrices this small gain nothing from a second thread, and lose much when the machine is busy.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Make a process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
