"""``python -m benchmarks list | all [--quick] | report | STUDY [options]``: the one entry to all studies."""

import importlib
import sys
from pathlib import Path

from benchmarks import _harness, _report


def studies() -> dict[str, str]:
    """Return the names of the studies with the question each one asks (the first line of its docstring)."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        module = importlib.import_module(f"benchmarks.{path.stem}")
        if hasattr(module, "run"):
            found[path.stem] = (module.__doc__ or "").strip().splitlines()[0]
    return found


def main(argv: list[str]) -> None:
    """List the studies, run all of them or one with its own options, or render the page of the results."""
    known = studies()
    usage = (
        "usage: python -m benchmarks list | all [--quick] | report | STUDY [options, see STUDY --help]\n\nstudies:\n"
        + "\n".join(f"  {name:18} {question}" for name, question in known.items())
    )
    if not argv or argv[0] in ("list", "-h", "--help"):
        print(usage)
    elif argv[0] == "report":
        print("\n".join(map(str, _report.write())))
    elif argv[0] == "all":
        for name in known:
            _harness.main(importlib.import_module(f"benchmarks.{name}"), argv[1:])
    elif argv[0] in known:
        _harness.main(importlib.import_module(f"benchmarks.{argv[0]}"), argv[1:])
    else:
        print(f"there is no study {argv[0]!r}\n\n{usage}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
