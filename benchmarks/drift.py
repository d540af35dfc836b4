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
    parser.add_argument("--steps", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: 1e-3")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 32), metavar=("N", "R"), help="default: 4096 32")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Step one matrix for each retraction and dtype and record its orthogonality error."""
    steps = 300 if args.quick else args.steps
    rows = [
        _drift(retraction, dtype, steps, args.lr, tuple(args.shape))
        for dtype in (torch.float32, torch.float64)
        for retraction in stiefel.RETRACTIONS
    ]
    return {"shape": list(args.shape), "lr": args.lr, "steps": steps, "rows": rows}


def _drift(retraction: str, dtype: torch.dtype, steps: int, lr: float, shape: tuple[int, int]) -> dict[str, Any]:
    x = stiefel.random_point(*shape, dtype=dtype)
    p = geoopt.ManifoldParameter(x, manifold=geoopt.EuclideanStiefel())
    optimizer = RiemannianAdam([p], lr=lr, retraction=retraction)  # type: ignore[arg-type]
    name = str(dtype).removeprefix("torch.")
    worst, curve = 0.0, []
    for step in tqdm(range(1, steps + 1), desc=f"{retraction}, {name}", leave=False, disable=None):
        p.grad = torch.randn_like(x)
        optimizer.step()
        if step % EVERY == 0:
            error = float(stiefel.orthogonality_error(p))
            worst = max(worst, error)
            if step * 10 % steps < EVERY * 10:
                curve.append([step, error])
    last = float(stiefel.orthogonality_error(p))
    row = {"retraction": retraction, "dtype": name, "largest": max(worst, last), "last": last, "curve": curve}
    return {**row, "bound": BOUNDS[name], "within": max(worst, last) <= BOUNDS[name]}


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
