"""Draw pictures with matplotlib, which is only loaded when one is drawn."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stiefel_lora._files import atomic_file
from stiefel_lora.errors import InputError


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_picture(path: Path) -> None:
    """Raise InputError unless a picture of that name could be drawn."""
    if not can_draw():
        raise InputError("pictures need matplotlib: pip install 'stiefel-lora[demo]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    forms = sorted(FigureCanvasAgg.get_supported_filetypes())
    if _form(path) not in forms:
        raise InputError(f"{path} is no picture; its ending must be one of {', '.join(forms)}")


def _form(path: str | Path) -> str:
    return Path(path).suffix[1:].lower()


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
        figure.savefig(file, dpi=120, format=_form(path) or "png")
