"""What a command shows while it works: progress bars on a terminal, and each warning once."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("stiefel_lora")


@contextmanager
def warnings_once() -> Iterator[None]:
    """Keep back, within the context, what the package logs again: a command looks for its targets several times."""
    logged: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        count = len(logged)
        logged.add(record.getMessage())
        return len(logged) > count

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    label: str,
    initial: int = 0,
    enabled: bool | None = None,
) -> "tqdm[Any]":
    """Return a progress bar on stderr.

    Args:
        iterable: What to go through; without it the caller calls ``update``.
        total: How many steps there are, if known.
        label: What is going on.
        initial: Steps done before.
        enabled: Show it; None for only when stderr is a terminal.
    """
    return tqdm(
        iterable,
        total=total,
        desc=label,
        initial=initial,
        disable=None if enabled is None else not enabled,
        dynamic_ncols=True,
        leave=False,
    )
