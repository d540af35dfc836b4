"""The folder of a run: who may write into it, and how one that is there goes on."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stiefel_lora._files import leftovers, read_json, remove, write_json
from stiefel_lora.config import (
    ADAPTER_FILES,
    ADAPTER_FOLDER,
    CHECKPOINT_FILE,
    METRICS_FILE,
    PICTURES,
    RUN_FILE,
    FinetuneConfig,
    option,
)
from stiefel_lora.errors import InputError


def config_of_run(folder: Path, given: dict[str, Any]) -> FinetuneConfig:
    """Return the configuration of the run in a folder, or raise InputError if it cannot go on as the options say."""
    run_file = folder / RUN_FILE
    if not run_file.is_file():
        raise InputError(f"there is no run to resume in {folder}")
    if (folder / METRICS_FILE).is_file():
        raise InputError(f"the run in {folder} is finished; --overwrite starts it anew")
    try:
        config = FinetuneConfig(**read_json(run_file))
    except (InputError, TypeError) as error:
        raise InputError(f"{run_file} is damaged; --overwrite starts the run anew") from error
    own = asdict(config)
    now = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if key in own}
    was = from_anywhere(own)
    changed = sorted(key for key, value in from_anywhere(now).items() if value != was[key])
    if changed:
        differences = ", ".join(f"{option(key)} was {own[key]!r}, now {now[key]!r}" for key in changed)
        raise InputError(f"cannot resume with another configuration: {differences}")
    return config


def from_anywhere(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with files and folders that they name made absolute, to be found from another folder too."""
    named = {key: value for key in ("model", "data") if (value := options.get(key)) and Path(value).exists()}
    return {**options, **{key: os.path.abspath(value) for key, value in named.items()}}


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a new run may go into the folder; change nothing."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder as --output")
    is_run = any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE))
    if is_run and not overwrite:
        raise InputError(f"{folder} holds another run; use --overwrite, --resume or --output")
    if folder.exists() and not is_run and set(folder.iterdir()) - set(leftovers(folder)):
        raise InputError(f"{folder} is not empty and holds no run; give another folder as --output")


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder that is writable, and leave no trace of it and those above it if nothing comes of it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from error
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it holds something by now, or was never made
                path.rmdir()


def take_folder(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Put a run that is about to train in the place of what the folder holds of another, or of a killed one."""
    if not resume:
        for name in (METRICS_FILE, CHECKPOINT_FILE, *PICTURES):
            remove(folder / name)
        _remove_adapter(folder / ADAPTER_FOLDER)
    for path in leftovers(folder):
        remove(path)
    # Last: until then this is a folder of the run before, and may be overwritten again.
    write_json(folder / RUN_FILE, config)


def _remove_adapter(folder: Path) -> None:
    """Remove an adapter's files, and their folder if it holds nothing else; of a link only the link."""
    if folder.is_symlink() or not folder.is_dir():
        remove(folder)
        return
    for name in ADAPTER_FILES:
        remove(folder / name)
    for path in leftovers(folder):
        remove(path)
    with suppress(OSError):  # it holds something else
        folder.rmdir()
