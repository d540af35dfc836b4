"""``python -m benchmarks list | all [--quick] | report [FOLDER] | STUDY [options]``: the entry to all studies."""

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from benchmarks import _harness, _report


def studies() -> dict[str, str]:
    """Return the names of the studies with the question each one asks (the first line of its docstring)."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        module = importlib.import_module(f"benchmarks.{path.stem}")
        found[path.stem] = (module.__doc__ or "").strip().splitlines()[0]
    return found


def main(argv: list[str]) -> None:
    """List the studies, run all of them or one with its own options, or render the page of the results."""
    known = studies()
    usage = (
        "usage: python -m benchmarks list | all [--quick] | report [FOLDER] | STUDY [options, see STUDY --help]\n\n"
        "studies:\n" + "\n".join(f"  {name:18} {question}" for name, question in known.items())
    )
    if not argv or argv in (["list"], ["-h"], ["--help"]):
        print(usage)
    elif argv[0] == "report":
        _report.main(argv[1:])
    elif argv[0] == "all":
        run_all(list(known), argv[1:])
    elif argv[0] in known:
        _harness.main(importlib.import_module(f"benchmarks.{argv[0]}"), argv[1:])
    else:
        wrong = f"list takes no more words, got {argv[1:]}" if argv[0] == "list" else f"there is no study {argv[0]!r}"
        print(f"{wrong}\n\n{usage}", file=sys.stderr)
        sys.exit(2)


def run_all(names: list[str], argv: list[str]) -> None:
    """Run the studies in turn; one that fails does not cost the others, and is named at the end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description="Run all studies.")
    _harness.add_common(parser)
    parser.parse_args(argv)
    failed = []
    for name in names:
        try:
            _harness.main(importlib.import_module(f"benchmarks.{name}"), argv)
        except SystemExit as stopped:
            if stopped.code in _harness.STOPPED:
                raise
            # sys.exit(text) leaves it to the interpreter to print the text.
            failed.append(f"{name}: {stopped.code}" if isinstance(stopped.code, str) else name)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        sys.exit(f"{len(failed)} of {len(names)} studies failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
