"""Progress bars on a terminal, silence elsewhere."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


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
