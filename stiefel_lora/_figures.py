"""Draw pictures with matplotlib, which is only loaded when one is drawn."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stiefel_lora._files import atomic_file
from stiefel_lora.errors import InputError

logger = logging.getLogger("stiefel_lora")


def has_matplotlib() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def can_draw() -> bool:
    """Tell whether matplotlib can be loaded; if it is installed and cannot, that is logged as a warning."""
    if not has_matplotlib():
        return False
    try:
        _load()
    except Exception as error:  # whatever a broken installation raises
        logger.warning("there will be no pictures: matplotlib cannot be loaded (%s)", error)
        return False
    return True


def _load() -> None:
    """Load matplotlib, whatever it is told to show pictures with: they are only written to files."""
    try:
        import matplotlib.figure  # noqa: F401
    except ValueError:
        # A notebook's shell commands inherit a backend that only the notebook has.
        backend = os.environ.pop("MPLBACKEND", None)
        if backend is None:
            raise
        try:
            import matplotlib.figure  # noqa: F401
        finally:
            os.environ["MPLBACKEND"] = backend


def check_picture(path: Path) -> None:
    """Raise InputError unless a picture of that name could be drawn."""
    if not can_draw():
        raise InputError("pictures need matplotlib: pip install 'stiefel-lora[demo]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # Whether there is a LaTeX that can draw "pgf" is only known once it is run.
    forms = sorted(FigureCanvasAgg.get_supported_filetypes().keys() - {"pgf"})
    if _form(path) not in forms:
        raise InputError(f"{path} is no picture; its ending must be one of {', '.join(forms)}")


def _form(path: str | Path) -> str:
    return Path(path).suffix[1:].lower()


@contextmanager
def drawing(path: str | Path, width: float = 7.0) -> Iterator[Any]:
    """Yield the axes of a picture ``width`` inches wide, which is written at the end, whole or not at all.

    The ending of ``path`` decides its format, PNG if it has none.
    """
    _load()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format=_form(path) or "png")
