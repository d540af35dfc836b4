"""Draw pictures with matplotlib, which is only loaded when one is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stiefel_lora._files import atomic_file


@contextmanager
def drawing(path: str | Path, width: float = 7.0) -> Iterator[Any]:
    """Yield the axes of a picture ``width`` inches wide, which is written at the end, whole or not at all.

    The ending of ``path`` decides its format, PNG if it has none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:].lower() or "png")
