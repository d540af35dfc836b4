"""Both optimizers reach the known optimum of three classical problems with every retraction."""

from collections.abc import Callable

import geoopt
import pytest
import torch
from torch import Tensor

from stiefel_lora import stiefel
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD

N, R = 12, 3
Problem = tuple[Callable[[Tensor], Tensor], float]


def _spectrum() -> tuple[Tensor, Tensor]:
    values = torch.linspace(1, 3, N, dtype=torch.float64)
    vectors = stiefel.random_point(N, N, dtype=torch.float64)
    return values, vectors @ torch.diag(values) @ vectors.T


def brockett() -> Problem:
    """Minimise tr(X^T A X D): the smallest eigenvalue of A goes with the largest weight."""
    values, a = _spectrum()
    weights = torch.arange(1.0, R + 1, dtype=torch.float64)
    return lambda x: (x * (a @ x * weights)).sum(), float((values[:R] * weights.flip(0)).sum())


def procrustes() -> Problem:
    """Minimise |A X - B|^2 over r = n; the optimum is the polar factor of A^T B."""
    a, b = torch.randn(9, R, dtype=torch.float64), torch.randn(9, R, dtype=torch.float64)
    # Well-conditioned, so that a fixed number of steps is enough, and not solved exactly.
    a = a + 3 * torch.eye(9, R, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(a.T @ b)
    best = float((a @ u @ vh - b).square().sum())
    return lambda x: (a @ x - b).square().sum(), best


def pca() -> Problem:
    """Minimise -tr(X^T A X): the span of the leading eigenvectors."""
    values, a = _spectrum()
    return lambda x: -(x * (a @ x)).sum(), -float(values[-R:].sum())


PROBLEMS = {"brockett": brockett, "procrustes": procrustes, "pca": pca}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("retraction", list(stiefel.RETRACTIONS))
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_reaches_the_optimum(kind: str, retraction: str, problem: str, metric: str) -> None:
    cost, best = PROBLEMS[problem]()
    rows = R if problem == "procrustes" else N
    start = stiefel.random_point(rows, R, dtype=torch.float64)
    if problem == "procrustes":
        # O(r) has two components and no path between them: start in that of the optimum, which has the better cost.
        flipped = start * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)
    starts = [start, flipped] if problem == "procrustes" else [start]
    gaps = []
    for x0 in starts:
        p = geoopt.ManifoldParameter(x0.clone(), manifold=geoopt.EuclideanStiefel())
        optimizer: torch.optim.Optimizer
        if kind == "adam":
            optimizer = RiemannianAdam([p], lr=0.1, betas=(0.9, 0.99), retraction=retraction, metric=metric)
        else:
            optimizer = RiemannianSGD([p], lr=0.02, momentum=0.9, retraction=retraction, metric=metric)
        # Adam's steps do not shrink by themselves; its rate must.
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99 if kind == "adam" else 1.0)
        for _ in range(1500):
            optimizer.zero_grad()
            loss = cost(p)
            loss.backward()
            optimizer.step()
            scheduler.step()
        gaps.append((float(cost(p.detach())) - best) / abs(best))
        assert float(stiefel.orthogonality_error(p)) < 1e-13
    # From below only rounding; from above the relative gap asked for.
    assert -1e-13 < min(gaps) < 1e-9
