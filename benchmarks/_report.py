"""``python -m benchmarks report``: one page with the tables and pictures of all results in a folder."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from benchmarks import _harness
from stiefel_lora._figures import can_draw
from stiefel_lora._files import atomic_file, path_of
from stiefel_lora.errors import InputError

PAGE = "README.md"
_INTRO = (
    "# Results\n\n"
    "Made by `python -m benchmarks report` from the JSON files in this folder alone. Machines differ and are noisy: "
    "read the ratios, which come from turns within one run, rather than the seconds."
)


def main(argv: list[str]) -> None:
    """Write the page of the folder named on the command line, and say what was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument(
        "folder",
        type=path_of,
        nargs="?",
        default=_harness.RESULTS,
        help="of JSON files (default: the committed results)",
    )
    folder = parser.parse_args(argv).folder
    try:
        print("\n".join(map(str, write(folder))))
    except InputError as error:
        parser.error(str(error))


def render(results: Path = _harness.RESULTS) -> str:
    """Return the page as Markdown."""
    return "\n\n".join([_INTRO, *(_section(path, content) for path, content in _read(results).items())]) + "\n"


def write(results: Path = _harness.RESULTS) -> list[Path]:
    """Draw the pictures beside the results and write the page; return the files."""
    page = results / PAGE
    text = render(results)
    with atomic_file(page) as file:
        file.write_text(text, encoding="utf-8")
    if not can_draw():
        raise InputError(f"{page} is written; its pictures need matplotlib: pip install 'stiefel-lora[bench]'")
    written = [page]
    for path, content in _read(results).items():
        plot = getattr(_study(content), "plot", None)
        if plot is not None:
            picture = path.with_suffix(".png")
            plot(content["results"], picture)
            written.append(picture)
    return written


def _read(results: Path) -> dict[Path, dict[str, Any]]:
    """Return what is in each result of a folder.

    Raises:
        InputError: If there is none, or a JSON file there is something else.
    """
    found = {path: _harness.read_result(path) for path in sorted(results.glob("*.json"))}
    if not found:
        raise InputError(f"{results} has no results (files *.json)")
    return found


def _study(content: dict[str, Any]) -> Any:
    try:
        return importlib.import_module(f"benchmarks.{content['study']}")
    except ModuleNotFoundError as error:
        raise InputError(f"there is no study {content['study']!r}, whose result is to be shown") from error


def _section(path: Path, content: dict[str, Any]) -> str:
    study = _study(content)
    try:
        return _rendered(path, content, study)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is no complete result of the study {content['study']} ({what})") from error


def _rendered(path: Path, content: dict[str, Any], study: Any) -> str:
    machine = content["machine"]
    packages = ", ".join(f"{name} {version.split()[0]}" for name, version in content["packages"].items())
    source = (
        f"[{path.name}]({path.name}), by `{content['command']}` at revision {content['revision']}, "
        f"{content['started'][:10]}, on {machine['processor']} with {machine['threads']} thread(s)"
        + (f" and {machine['cuda']}" if machine["cuda"] else "")
        + f"; {packages}."
        + ("" if content["status"] == "finished" else " **Not finished.**")
        + (" **A quick run, whose numbers mean nothing.**" if content["quick"] else "")
    )
    pictures = [f"![{path.stem}]({path.stem}.png)"] if hasattr(study, "plot") else []
    question = (study.__doc__ or "").strip().splitlines()[0]
    return "\n\n".join([f"## {path.stem}: {question}", *pictures, study.report(content["results"]), source])
