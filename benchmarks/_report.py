"""``python -m benchmarks report``: one page with the tables and pictures of all committed results."""

import importlib
import json
from pathlib import Path
from typing import Any

from benchmarks import _harness

PAGE = "README.md"
_INTRO = (
    "# Results\n\n"
    "Made by `python -m benchmarks report` from the JSON files in this folder alone. Machines differ and are noisy: "
    "read the ratios, which come from turns within one run, rather than the seconds."
)


def render(results: Path = _harness.RESULTS) -> str:
    """Return the page as Markdown."""
    files = sorted(results.glob("*.json"))
    return "\n\n".join([_INTRO, *(_section(path) for path in files)]) + "\n"


def write(results: Path = _harness.RESULTS) -> list[Path]:
    """Draw the pictures beside the results and write the page; return the files."""
    written = []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        plot = getattr(_study(content), "plot", None)
        if plot is not None:
            picture = path.with_suffix(".png")
            plot(content["results"], picture)
            written.append(picture)
    page = results / PAGE
    page.write_text(render(results), encoding="utf-8")
    return [page, *written]


def _study(content: dict[str, Any]) -> Any:
    return importlib.import_module(f"benchmarks.{content['study']}")


def _section(path: Path) -> str:
    content = json.loads(path.read_text())
    study = _study(content)
    machine = content["machine"]
    packages = ", ".join(f"{name} {version.split()[0]}" for name, version in content["packages"].items())
    source = (
        f"[{path.name}]({path.name}), by `{content['command']}` at revision {content['revision']}, "
        f"{content['started'][:10]}, on {machine['processor']} with {machine['threads']} thread(s)"
        + (f" and {machine['cuda']}" if machine["cuda"] else "")
        + f"; {packages}."
    )
    pictures = [f"![{path.stem}]({path.stem}.png)"] if hasattr(study, "plot") else []
    question = (study.__doc__ or "").strip().splitlines()[0]
    return "\n\n".join([f"## {path.stem}: {question}", *pictures, study.report(content["results"]), source])
