"""Write files and folders so that a reader never sees half of one; read text."""

import ctypes
import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stiefel_lora.errors import InputError

if sys.platform != "win32":
    import fcntl

# Of renameat2 in linux/fcntl.h and linux/fs.h: paths are relative to the working directory; swap the two.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The disk, a person's part of it, or the largest file allowed is full.
_NO_ROOM = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder whose files appear in ``path`` when the context ends without an error.

    A new folder appears whole, by one rename, and on Linux takes the place of one with the same files by one rename. In
    a folder with other files, which are left alone, a mount point, one beside which nothing may be made, or on other
    systems each file is replaced whole, one after another. After an error or a kill the files that were there before
    are still there, complete. A link stays, and its target is written.

    Args:
        path: The folder to write; missing parents are made.

    Raises:
        InputError: If ``path`` is a file, or a link to nothing.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder; give the name of a folder to write")
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path} is a link to {path.readlink()}, which does not exist; make that folder or give another"
        )
    path = path.resolve()
    _make_parents(path)
    temporary = _folder_for(path)
    try:
        with _no_room_named(path):
            yield temporary
            if not path.exists():
                temporary.rename(path)
            elif not _swap(temporary, path):
                _fill(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _no_room_named(path: Path) -> Iterator[None]:
    """Name what was to be written in the error of a full disk, which by itself names nothing."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _make_parents(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"cannot write {path}: {error.filename} is no folder") from error


def _folder_for(path: Path) -> Path:
    """Make a temporary folder whose files can be moved into another: beside it, or else inside."""
    homes = [path.parent, path] if path.exists() else [path.parent]
    if path.exists() and path.stat().st_dev != path.parent.stat().st_dev:
        homes = [path]
    for home in homes:
        temporary = _temporary(home)
        try:
            temporary.mkdir()
        except OSError as error:  # nothing may be made there
            failure = error
        else:
            return temporary
    # By the name that the caller knows.
    raise OSError(failure.errno, failure.strerror, str(path)) from failure


def _swap(new: Path, old: Path) -> bool:
    """Put a folder in the place of one with the same files, unless someone here stands in that; False if it is not."""
    if new.parent == old or Path.cwd().is_relative_to(old):
        return False
    if {file.name for file in new.iterdir()} != {file.name for file in old.iterdir()}:
        return False
    shutil.copymode(old, new)
    return _exchange(new, old)


def _fill(folder: Path, new: Path) -> None:
    """Move files into a folder, each over the one of its name."""
    try:
        for file in sorted(new.iterdir()):
            file.replace(folder / file.name)
    except OSError as error:
        if error.errno != errno.EXDEV or new.parent == folder:
            raise
        # A mount point can be of the same device as its parent. Nothing has been moved so far.
        inside = _temporary(folder)
        try:
            shutil.copytree(new, inside)
            _fill(folder, inside)
        finally:
            shutil.rmtree(inside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):  # not Linux
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of ``path`` when the context ends without an error.

    A link stays, and its target is written.

    Args:
        path: The file to write; missing parents are made.

    Raises:
        InputError: If ``path`` is something else than a file.
    """
    path = Path(path).resolve()
    if other := other_than_a_file(path):
        raise InputError(f"{path} is {other}; give the name of a file")
    _make_parents(path)
    temporary = _temporary(path.parent)
    try:
        with _no_room_named(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def other_than_a_file(path: Path) -> str:
    """Say what stands where a file is to be, "" if nothing does, or a file."""
    if not path.exists() or path.is_file():
        return ""
    return "a folder" if path.is_dir() else "no regular file"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: If the file is missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    with atomic_file(path) as file:
        fill_json(file, content)


def fill_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON into a file that nobody reads yet, as one in a folder of `atomic_folder`."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _temporary(home: Path) -> Path:
    # Not after the name of what is written, which may be as long as the file system takes.
    return home / f".{uuid.uuid4().hex}.tmp"


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, of which the target stays; nothing happens if there is none."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files and folders that killed processes have left behind in a folder."""
    own = f"{'[0-9a-f]' * 32}.tmp"
    return [*folder.glob(f".{own}"), *folder.glob(f".*.{own}")]  # the latter from before names were short


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, until the context or the process ends.

    Raises:
        InputError: If another process is in it.
    """
    if sys.platform == "win32":  # has no such locks
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"another process is at work in {folder}; wait for it, or give another folder") from error
    except OSError:  # a file system that has no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def path_of(text: str) -> Path:
    """Read a path as it was typed: a shell leaves the ~ of ``--output=~/runs`` and of quoted ones as it is."""
    return Path(os.path.expanduser(text))


def read_text(file: Path) -> str:
    """Return what is in a text file.

    Raises:
        InputError: If it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
