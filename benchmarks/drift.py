"""How far does a point drift off the Stiefel manifold in 100,000 optimizer steps?

Adam steps on random gradients at 4096 x 32, for every retraction in float32 and float64, with nothing that restores
orthonormality switched on: |X^T X - I|_F, the largest seen and the last. Both must stay below the stated bounds.

    python -m benchmarks drift
"""

import argparse
import sys
from typing import Any

import geoopt
import torch
from tqdm import tqdm

from benchmarks import _harness
from stiefel_lora import stiefel
from stiefel_lora.optim import RiemannianAdam

BOUNDS = {"float32": 5e-6, "float64": 1e-12}
# How often the error is measured; it is smooth in time.
EVERY = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this study's options."""
    count, rate = _harness.positive(int), _harness.positive(float)
    parser.add_argument("--steps", type=count, default=100_000, help="default: 100000")
    parser.add_argument("--lr", type=rate, default=1e-3, help="default: 1e-3")
    parser.add_argument("--shape", type=count, nargs=2, default=(4096, 32), metavar=("N", "R"), help="default: 4096 32")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Step one matrix for each retraction and dtype and record its orthogonality error; saved after each dtype."""
    settings = {"shape": list(args.shape), "lr": args.lr, "steps": 300 if args.quick else args.steps}
    done = args.interrupted or {}
    rows = done.get("rows", []) if all(done.get(key) == value for key, value in settings.items()) else []
    for name in BOUNDS:
        if not any(row["dtype"] == name for row in rows):
            rows += _drift(name, settings["steps"], args.lr, tuple(args.shape))
            args.save({**settings, "rows": rows})
    return {**settings, "rows": rows}


def _drift(dtype: str, steps: int, lr: float, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Step one matrix for each retraction, all from the same point along the same gradients."""
    x = stiefel.random_point(*shape, dtype=getattr(torch, dtype))
    params = {
        retraction: geoopt.ManifoldParameter(x.clone(), manifold=geoopt.EuclideanStiefel())
        for retraction in stiefel.RETRACTIONS
    }
    groups = [{"params": [p], "retraction": retraction} for retraction, p in params.items()]
    optimizer = RiemannianAdam(groups, lr=lr)
    rows: list[dict[str, Any]] = [
        {"retraction": retraction, "dtype": dtype, "largest": 0.0, "curve": [], "bound": BOUNDS[dtype]}
        for retraction in params
    ]
    for step in tqdm(range(1, steps + 1), desc=dtype, leave=False, disable=None):
        gradient = torch.randn_like(x)
        for p in params.values():
            p.grad = gradient
        optimizer.step()
        if step % EVERY and step < steps:
            continue
        for row in rows:
            row["last"] = float(stiefel.orthogonality_error(params[row["retraction"]]))
            row["largest"] = max(row["largest"], row["last"])
            if step * 10 % steps < EVERY * 10:
                row["curve"].append([step, row["last"]])
    return [{**row, "within": row["largest"] <= row["bound"]} for row in rows]


def report(results: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    rows: list[list[object]] = [
        [row["retraction"], row["dtype"], row["largest"], row["last"], row["bound"], "yes" if row["within"] else "NO"]
        for row in results["rows"]
    ]
    title = f"Orthogonality error over {results['steps']} steps at {tuple(results['shape'])}, lr {results['lr']}"
    return f"{title}\n\n" + _harness.markdown(["retraction", "dtype", "largest", "last", "bound", "within"], rows)


if __name__ == "__main__":
    _harness.main(sys.modules[__name__])
