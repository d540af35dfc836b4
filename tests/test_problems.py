"""The problems of the manifold study: optimum, gradient and gap against dense formulas that they do not use."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import _problems, _solvers, manifold
from benchmarks._problems import Problem
from stiefel_lora import stiefel

N, R = 14, 3
SMALL: dict[str, Callable[[], Problem]] = {
    "pca": lambda: _problems.pca(N, R, 20),
    "procrustes": lambda: _problems.procrustes(N, R),
    "brockett": lambda: _problems.brockett(N, R),
    "joint": lambda: _problems.joint_diagonalisation(N, R),
    "stream": lambda: _problems.streaming_pca(N, R, 8),
}


def built(name: str) -> Problem:
    """Build a small problem, or the one on real data where its package is there."""
    if name == "digits":
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
        return _problems.digits()
    return SMALL[name]()


def quadratic_form(problem: Problem) -> Tensor:
    """Return the dense matrix A of a cost that is a quadratic form tr(X^T A X) / 2 for one column."""
    n, r = problem.start.shape

    def column(i: int) -> Tensor:
        # In the first of r columns, the others zero: gradients of these costs are linear and act on each column alone.
        x = torch.zeros(n, r, dtype=torch.float64)
        x[i, 0] = 1
        return problem.gradient(x)[:, 0]

    return torch.stack([column(i) for i in range(n)], dim=1)


@pytest.mark.parametrize("name", ["digits", "pca", "stream"])
def test_optimum_of_pca_is_the_sum_of_the_dense_eigenvalues(name: str) -> None:
    problem = built(name)
    a = quadratic_form(problem)
    torch.testing.assert_close(a, a.T, rtol=0, atol=1e-14)  # rounding of numbers below one
    r = problem.start.shape[1]
    dense = float(torch.linalg.eigvalsh(a)[:r].sum()) / 2
    assert problem.optimum == pytest.approx(dense, rel=1e-12)  # n eps


def test_condition_number_of_pca_is_as_stated() -> None:
    values = torch.linalg.eigvalsh(-quadratic_form(_problems.pca(N, R, 20))).flip(0)
    condition = (values[0] - values[-1]) / (values[R - 1] - values[R])
    assert float(condition) == pytest.approx(20, rel=1e-11)  # a gap of 0.05 known to n eps


def test_optimum_of_brockett_pairs_small_eigenvalues_with_large_weights() -> None:
    problem = _problems.brockett(N, R)
    # The first column has weight one.
    values = torch.linalg.eigvalsh(quadratic_form(problem))
    dense = sum(float(v) * w for v, w in zip(values[:R], (1, 2 / 3, 1 / 3), strict=True)) / 2
    assert problem.optimum == pytest.approx(dense, rel=1e-12)


def test_optimum_of_procrustes_is_that_of_the_dense_polar_factor() -> None:
    problem = _problems.procrustes(N, R)
    zero = torch.zeros(N, R, dtype=torch.float64)
    # The gradient is X A^T A - B^T A and the cost of zero |B|^2 / 2.
    cross = -problem.gradient(zero)
    x = stiefel.project_point(cross)
    assert problem.optimum == pytest.approx(float(problem.cost(x)), rel=1e-12)
    torch.testing.assert_close(problem.solution, x, rtol=0, atol=1e-12)  # the condition number of B^T A is about 10


def test_optimum_of_joint_diagonalisation_is_that_of_dense_covariances() -> None:
    problem = _problems.joint_diagonalisation(N, R, windows=5)
    # The covariances from scratch, in the order in which the problem draws its numbers.
    rng = torch.Generator().manual_seed(0)
    basis = stiefel.random_point(N, R, dtype=torch.float64, generator=rng)
    powers = 0.2 + torch.rand(5, R, dtype=torch.float64, generator=rng)
    eye = torch.eye(N, dtype=torch.float64)
    covariances = [basis @ torch.diag(d) @ basis.T + 0.05 * eye for d in powers]

    def dense(x: Tensor) -> float:
        return -sum(float((x.T @ c @ x).diagonal().square().sum()) for c in covariances)

    # Any generic combination has the common eigenvectors.
    mixed = sum(w * c for w, c in zip((0.3, 1.1, 0.7, 0.2, 0.9), covariances, strict=True))
    common = torch.linalg.eigh(mixed).eigenvectors[:, -R:]
    ratio = problem.optimum / dense(common)
    # The same ratio at any point: the cost is the dense one but for its scale.
    x = stiefel.random_point(N, R, dtype=torch.float64)
    assert float(problem.cost(x)) == pytest.approx(ratio * dense(x), rel=1e-12)
    assert problem.gap(common) == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("name", ["digits", *SMALL])
def test_gradient_is_that_of_autograd(name: str) -> None:
    problem = built(name)
    # Off the manifold too: a gradient that is right only on it could hide an error in a normal direction.
    x = torch.randn_like(problem.start, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(problem.cost(x), x)
    torch.testing.assert_close(problem.gradient(x.detach()), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["digits", *SMALL])
def test_gap_is_zero_at_the_solution_and_positive_elsewhere(name: str) -> None:
    problem = built(name)
    assert abs(problem.gap(problem.solution)) < 1e-13  # a few eps
    assert float(stiefel.orthogonality_error(problem.solution)) < 1e-13
    near = stiefel.retract(
        problem.solution, 1e-4 * stiefel.project(problem.solution, torch.randn_like(problem.solution))
    )
    points = [
        problem.start,
        near,
        *(stiefel.random_point(*problem.start.shape, dtype=torch.float64) for _ in range(50)),
    ]
    gaps = [problem.gap(x) for x in points]
    # Even the near one, whose gap is about the square of its distance, is far above rounding.
    assert min(gaps) > 1e-11
    assert problem.gap(near) < 1e-5


def test_gap_is_that_of_the_nearest_point_and_infinite_where_there_is_none() -> None:
    problem = _problems.pca(N, R, 20)
    x = stiefel.random_point(N, R, dtype=torch.float64)
    stretched = x @ torch.tensor([[2.0, 0.3, 0], [0.3, 1, 0], [0, 0, 0.5]], dtype=torch.float64)
    assert problem.gap(stretched) == pytest.approx(problem.gap(x), rel=1e-12)
    assert problem.gap(torch.full_like(x, torch.nan)) == torch.inf
    assert problem.gap(torch.ones_like(x)) == torch.inf
    assert problem.gap(1e200 * x) == torch.inf, "finite, but its products are not"


def test_a_solver_is_not_measured_on_the_batches_that_it_was_tuned_on() -> None:
    problem = _problems.streaming_pca(N, R, 8)
    seen: list[bytes] = []

    class Spy(_problems.Stream):
        def draw(self) -> None:
            super().draw()
            seen.append(self.rows.numpy().tobytes())

    spies = [lambda seed=seed: Spy(torch.eye(N, R), torch.ones(R), 0.1, 8, seed) for seed in (0, 1)]
    problem = replace(problem, oracle=spies[0], rehearsal=spies[1], budget=5)
    manifold._tune(problem, _solvers.geoopt_sgd, 5, 1e-6, (16, 2), quick=True)
    tuned_on = set(seen)
    seen.clear()
    manifold._descend(problem, _solvers.geoopt_sgd(problem), 1.0, None, 5, 1e-6)
    assert len(seen) == 6 and len(tuned_on) == 6  # the first one when the stream is made
    assert not tuned_on & set(seen)


def test_stream_draws_the_same_batches_for_all_and_has_the_population_gradient_as_its_mean() -> None:
    problem = _problems.streaming_pca(N, R, 8)
    one, other = problem.oracle(), problem.oracle()
    x = problem.start
    torch.testing.assert_close(one(x), other(x), rtol=0, atol=0)
    assert problem.rehearsal is not None and not torch.equal(problem.rehearsal()(x), one(x))
    count = 4000
    total = torch.zeros_like(x)
    for _ in range(count):
        total += one(x)
        one.draw()
    # Entries of a batch's gradient deviate by less than one; four standard errors of the mean.
    torch.testing.assert_close(total / count, problem.gradient(x.double()).float(), rtol=0, atol=4 / count**0.5)


@pytest.mark.parametrize("name", list(_solvers.FIRST_ORDER))
def test_every_solver_descends_from_the_common_start(name: str) -> None:
    problem = _problems.pca(N, R, 5)
    try:
        descent = _solvers.FIRST_ORDER[name](problem)
    except _solvers._peers.NotInstalledError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(descent.point(), problem.start, rtol=0, atol=1e-12)  # geotorch completes a basis
    for _ in range(60):
        descent.step(0.03)
    assert problem.gap(descent.point()) < 0.9 * problem.gap(problem.start)


@pytest.mark.parametrize("name", list(_solvers.BATCH))
def test_pymanopt_reaches_the_optimum_and_tells_its_way(name: str) -> None:
    pytest.importorskip("pymanopt", reason="a peer of the bench extra")
    problem = _problems.pca(N, R, 5)
    path = _solvers.BATCH[name](problem, 100, 20)
    assert len(path.points) == len(path.seconds) > 3
    assert path.seconds == sorted(path.seconds)
    torch.testing.assert_close(path.points[0], problem.start, rtol=0, atol=0)
    assert problem.gap(path.points[-1]) < 1e-9
