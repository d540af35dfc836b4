"""How many samples of real text does early stopping take to choose the layers?

On SmolLM2-135M (or --model) and the standard library's source, in blocks of 128 tokens: the samples that
`fisher_scores(tol=...)` takes to choose some of the layers, and how far its choice is that of all samples.

    python -m benchmarks early_stopping
"""

import argparse
import sys
from typing import Any

from tqdm import tqdm

from benchmarks import _harness, _tasks
from stiefel_lora import FisherScores, fisher_scores
from stiefel_lora.errors import InputError
from stiefel_lora.pretrained import load_pretrained

# The best layer, the best three, a fifth and half of them.
BUDGETS = (1, 3, 0.2, 0.5)
# From loose to strict: what is not certain at one is not certain at the next.
TOLERANCES = (0.5, 0.1, 0.01)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this study's options."""
    _harness.add_model(parser)
    parser.add_argument(
        "--samples", type=_harness.positive(int), default=64, help="samples of 128 tokens (default: 64)"
    )
    parser.add_argument(
        "--batch-size", type=_harness.positive(int), default=4, help="samples between two decisions (default: 4)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Select with each budget and tolerance, and from all samples."""
    if args.quick:
        model: Any
        model, task = _tasks.tiny()
        samples = len(task.train)
    else:
        model, tokenizer = load_pretrained(args.model)
        task, samples = _tasks.code(tokenizer, 128), args.samples
    if samples < args.batch_size:
        raise InputError(f"--samples must be at least --batch-size, {args.batch_size}, got {samples}")
    steps = range(samples // args.batch_size)
    batches = [task.train.shuffled_batch(args.batch_size, step, args.seed) for step in steps]
    full = fisher_scores(model, batches, progress=False)
    rows = []
    with tqdm(total=len(BUDGETS) * len(TOLERANCES), desc="selections", leave=False, disable=None) as bar:
        for budget in BUDGETS:
            stopped = full
            for i, tol in enumerate(TOLERANCES):
                # Once all samples did not suffice, they will not suffice for a stricter tolerance.
                if i == 0 or stopped.stable:
                    stopped = fisher_scores(model, batches, budget=budget, tol=tol, progress=False)
                rows.append(_row(stopped, full, budget, tol))
                bar.update()
    return {
        "model": "tiny" if args.quick else model.config._name_or_path.rsplit("/", 1)[-1],
        "data": task.train.description,
        "batch": args.batch_size,
        "rows": rows,
    }


def _row(stopped: FisherScores, full: FisherScores, budget: float | int, tol: float) -> dict[str, Any]:
    chosen, wanted = set(stopped.select(budget)), set(full.select(budget))
    return {
        "layers": len(chosen),
        "tol": tol,
        "samples": stopped.n_samples,
        "of": full.n_samples,
        "stable": stopped.stable,
        "jaccard": len(wanted & chosen) / len(wanted | chosen),
    }


def report(results: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    rows = [
        [r["layers"], r["tol"], f"{r['samples']} of {r['of']}", "yes" if r["stable"] else "no", r["jaccard"]]
        for r in results["rows"]
    ]
    header = ["layers to choose", "tol", "samples", "told apart", "Jaccard overlap with the choice of all samples"]
    title = f"{results['model']}, batches of {results['batch']}: {results['data']}"
    return f"{title}\n\n" + _harness.markdown(header, rows)


if __name__ == "__main__":
    _harness.main(sys.modules[__name__])
