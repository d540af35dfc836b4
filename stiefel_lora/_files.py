"""Write folders so that a reader never sees half of one."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stiefel_lora.errors import InputError


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder whose files appear in ``path`` when the context ends without an error.

    A new folder appears whole, by one rename. In a folder that exists, each file is replaced whole and other files are
    left alone. After an error or a kill the files that were there before are still there, complete.

    Args:
        path: The folder to write; missing parents are made.

    Raises:
        InputError: If ``path`` is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder; give the name of a folder to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            for file in sorted(temporary.iterdir()):
                file.replace(path / file.name)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of ``path`` when the context ends without an error.

    Args:
        path: The file to write; missing parents are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes have left behind in a folder."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 32}.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
