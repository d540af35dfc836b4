"""Folders and files are written whole wherever one may write: through links, in mount points, beside nothing."""

import errno
import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stiefel_lora import _files
from stiefel_lora._files import atomic_file, atomic_folder
from stiefel_lora.errors import InputError

SHARED = Path("/dev/shm")  # noqa: S108
NAMES = ("a", "b")


def write(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        for name in NAMES:
            (folder / name).write_text(text)


def texts(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


@pytest.fixture
def other_device(tmp_path: Path) -> Iterator[Path]:
    if not os.access(SHARED, os.W_OK) or SHARED.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHARED) as folder:
        yield Path(folder)


def test_a_link_stays_and_its_folder_is_written(tmp_path: Path, other_device: Path) -> None:
    for target in (tmp_path / "folder", other_device / "folder"):
        target.mkdir()
        link = tmp_path / "link"
        link.symlink_to(target)
        for text in ("first", "second"):
            write(link, text)
            assert texts(target) == dict.fromkeys(NAMES, text)
        (target / "other").write_text("kept")
        write(link, "third")
        assert texts(target) == {**dict.fromkeys(NAMES, "third"), "other": "kept"}
        assert link.is_symlink() and [path.name for path in target.parent.iterdir() if path != link] == ["folder"]
        link.unlink()


def test_what_lies_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        for write_one in (atomic_file, atomic_folder):
            with pytest.raises(InputError, match=f"cannot write {path}: .*file.* is no folder"), write_one(path):
                pass
    assert texts(tmp_path) == {"file": "kept"}


def test_a_link_to_a_file_stays(tmp_path: Path, other_device: Path) -> None:
    (tmp_path / "link").symlink_to(other_device / "file")
    for text in ("first", "second"):
        with atomic_file(tmp_path / "link") as file:
            file.write_text(text)
        assert texts(other_device) == {"file": text}
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 1


def test_a_mount_point_is_filled_from_inside(other_device: Path) -> None:
    if SHARED.parent.stat().st_dev == SHARED.stat().st_dev:
        pytest.skip(f"{SHARED} is no mount point")
    own = SHARED / f"test-{uuid.uuid4().hex}"
    before = set(SHARED.iterdir())
    try:
        with atomic_folder(SHARED) as folder:
            (folder / own.name).write_text("x")
            assert folder.parent == SHARED
        assert own.read_text() == "x" and not {p for p in set(SHARED.iterdir()) - before if p.name.endswith(".tmp")}
    finally:
        own.unlink(missing_ok=True)


def test_a_mount_point_of_the_same_device_is_filled_from_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux neither swaps it nor moves files from outside into it."""
    folder, replace = tmp_path / "mounted", Path.replace

    def moved(source: Path, target: Path) -> Path:
        if folder in target.parents and folder not in source.parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(source, target)

    write(folder, "first")
    monkeypatch.setattr(Path, "replace", moved)
    monkeypatch.setattr(_files, "_exchange", lambda a, b: False)
    write(folder, "second")
    assert texts(folder) == dict.fromkeys(NAMES, "second")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_beside_which_nothing_may_be_made_is_filled_from_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mkdir = tmp_path / "folder", Path.mkdir

    def made(path: Path, *args: Any, **options: Any) -> None:
        if path.parent == tmp_path and not path.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        mkdir(path, *args, **options)

    def refused(path: Path, *_: Any, **__: Any) -> None:
        if not path.exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    write(folder, "first")
    monkeypatch.setattr(Path, "mkdir", made)
    write(folder, "second")
    assert texts(folder) == dict.fromkeys(NAMES, "second")
    with pytest.raises(KeyError), atomic_folder(folder) as temporary:
        (temporary / "a").write_text("third")
        raise KeyError
    assert texts(folder) == dict.fromkeys(NAMES, "second")
    # By its own name, not by that of the temporary folder.
    with pytest.raises(PermissionError, match=f"{re.escape(str(tmp_path / 'new'))}'$"):
        write(tmp_path / "new", "first")
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(PermissionError, match=f"{re.escape(str(folder))}'$"):
        write(folder, "third")
    assert texts(folder) == dict.fromkeys(NAMES, "second")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
@pytest.mark.parametrize("write_one", ["atomic_file", "atomic_folder"])
def test_a_full_disk_is_an_error_that_names_what_was_to_be_written(write_one: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    # A limit on the size of files stands for the end of the disk. The error is of the write, which knows no name.
    script = f"""
import resource
from pathlib import Path
from stiefel_lora._files import {write_one}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
with {write_one}({str(target)!r}) as path:
    (path / "file" if path.is_dir() else path).write_bytes(bytes(2000))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    expected = f"OSError: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: {str(target)!r}"
    assert done.stderr.splitlines()[-1] == expected
    assert list(tmp_path.iterdir()) == []
