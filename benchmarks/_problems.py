"""Minimisation problems on St(n, r) whose optimum is known from how they are made, with costs that are cheap to get.

Every cost is scaled so that its largest curvature is about one, so one grid of learning rates fits all problems. Random
bases are products of Householder reflections, which cost O(n r) to apply: at 4096 x 64 a gradient must not hide the
optimizer.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks._peers import NotInstalledError
from stiefel_lora import stiefel

Cost = Callable[[Tensor], Tensor]
_REFLECTIONS = 16


class Oracle:
    """The gradient that a solver sees: of the whole cost, the same at every call."""

    def __init__(self, gradient: Cost) -> None:
        self._gradient = gradient

    def draw(self) -> None:
        """Take the next batch, where there are batches; not part of the time of a step."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the Euclidean gradient at ``x``, shape (n, r)."""
        return self._gradient(x)


class Stream(Oracle):
    """Gradients of -|A X|^2 / (2 b) on batches A of fresh rows z diag(sqrt(values)) V^T + sqrt(noise) w.

    Args:
        basis: V, shape (n, r), float32.
        values: Variances of the signal, shape (r,).
        noise: Variance of the white noise in each coordinate.
        batch: Rows of a batch, b.
        seed: All solvers see the same batches.
    """

    def __init__(self, basis: Tensor, values: Tensor, noise: float, batch: int, seed: int) -> None:
        self._factor = values.sqrt()[:, None] * basis.T
        self._deviation, self._batch = noise**0.5, batch
        self._generator = torch.Generator().manual_seed(seed)
        self.draw()

    def draw(self) -> None:
        """Draw the next batch, shape (b, n)."""
        r, n = self._factor.shape
        noise = torch.randn(self._batch, n, generator=self._generator).mul_(self._deviation)
        self.rows = noise.addmm_(torch.randn(self._batch, r, generator=self._generator), self._factor)

    def __call__(self, x: Tensor) -> Tensor:
        """Return -A^T (A X) / b, shape (n, r)."""
        return (self.rows.T @ (self.rows @ x)).div_(-self._batch)


@dataclass(frozen=True)
class Problem:
    """Minimise ``cost`` over St(n, r).

    Attributes:
        name: Its name, with the size.
        about: What it is and how hard.
        start: The common first point, shape (n, r), in the dtype that solvers work in.
        solution: One minimiser, shape (n, r), float64.
        optimum: The least cost, from a formula that does not use ``cost``.
        cost: Differentiable, of a float64 point.
        gradient: The Euclidean gradient of ``cost``.
        budget: Iterations that a first-order solver may take.
        oracle: Makes the gradients that a first-order solver sees.
        stochastic: Whether these are of batches.
        rehearsal: Makes those that its learning rate is tuned on, if others.
    """

    name: str
    about: str
    start: Tensor
    solution: Tensor
    optimum: float
    cost: Cost
    gradient: Cost
    budget: int
    oracle: Callable[[], Oracle]
    stochastic: bool = False
    rehearsal: Callable[[], Oracle] | None = None

    def gap(self, x: Tensor) -> float:
        """Return (cost - optimum) / |optimum| at the point of the manifold nearest to ``x``, in float64.

        Of ``x`` itself it would be meaningless where ``x`` is off the manifold: a longer matrix has a lower PCA cost.
        """
        point = nearest(x)
        return float("inf") if point is None else (float(self.cost(point)) - self.optimum) / abs(self.optimum)


def nearest(x: Tensor) -> Tensor | None:
    """Return the polar factor X (X^T X)^(-1/2) in float64, None where X is not of full rank or not finite."""
    x = x.detach().to(torch.float64)
    gram = x.mT @ x
    # A product of large entries overflows before they do.
    if not gram.isfinite().all():
        return None
    values, vectors = torch.linalg.eigh(gram)
    # A gap of 1e-9 is quadratic in the distance, so this loses nothing that counts down to |X|^2 eps.
    if values[0] <= 1e-12 * values[-1]:
        return None
    return x @ (vectors * values.rsqrt()) @ vectors.mT


class Rotation:
    """A product Q of Householder reflections I - 2 v v^T / |v|^2 with random v, applied in O(n r).

    Q = I - V T^-1 V^T with T the upper triangle of V^T V, half of its diagonal.

    Reference: Joffrain, Low, Quintana-Orti, van de Geijn, Van Zee (2006), "Accumulating Householder
    transformations, revisited".
    """

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self._v = torch.randn(n, min(n, _REFLECTIONS), dtype=torch.float64, generator=generator)
        gram = self._v.T @ self._v
        self._t = gram.triu(1) + gram.diagonal().diag() / 2

    def __call__(self, x: Tensor) -> Tensor:
        """Return Q X."""
        return x - self._v @ torch.linalg.solve_triangular(self._t, self._v.T @ x, upper=True)

    def inverse(self, x: Tensor) -> Tensor:
        """Return Q^T X."""
        return x - self._v @ torch.linalg.solve_triangular(self._t.T, self._v.T @ x, upper=False)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _start(n: int, r: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return stiefel.random_point(n, r, dtype=dtype, generator=_rng(seed + 1000))


def _linear(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64)


def pca(n: int, r: int, condition: float, *, seed: int = 0, budget: int = 600) -> Problem:
    """Top-r PCA, cost -tr(X^T C X)/2, of a covariance whose Hessian at the optimum has the given condition number.

    That number is (c_1 - c_n) / (c_r - c_(r+1)) for eigenvalues c_1 >= ... >= c_n: here 1 and 0 at the ends and a gap
    of 1 / condition in the middle, with both parts linear.
    """
    half = 0.5 / condition
    values = torch.cat([_linear(1, 0.5 + half, r), _linear(0.5 - half, 0, n - r)])
    rotation = Rotation(n, _rng(seed))

    def product(x: Tensor) -> Tensor:
        return rotation(values[:, None] * rotation.inverse(x))

    def gradient(x: Tensor) -> Tensor:
        return -product(x)

    return Problem(
        f"PCA, condition {condition:g}, {n} x {r}",
        f"Top-{r} PCA of a synthetic covariance, condition number {condition:g}",
        _start(n, r, seed),
        rotation(torch.eye(n, r, dtype=torch.float64)),
        -float(values[:r].sum()) / 2,
        lambda x: -(x * product(x)).sum() / 2,
        gradient,
        budget,
        lambda: Oracle(gradient),
    )


def digits(r: int = 10, *, seed: int = 0, budget: int = 600) -> Problem:
    """Top-r PCA of scikit-learn's 1797 handwritten digits of 8 x 8 pixels, centred.

    Raises:
        NotInstalledError: If scikit-learn is not there.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NotInstalledError("scikit-learn is not installed") from error
    data = torch.from_numpy(load_digits().data)
    data = data - data.mean(0)
    # From the singular values of the data; the cost uses the covariance.
    _, values, vh = torch.linalg.svd(data, full_matrices=False)
    covariance = data.T @ data / values[0] ** 2
    squares = (values / values[0]).square()

    def gradient(x: Tensor) -> Tensor:
        return -(covariance @ x)

    return Problem(
        f"PCA of digits, 64 x {r}",
        f"Top-{r} PCA of scikit-learn {importlib.metadata.version('scikit-learn')}'s digits, "
        f"condition number {float((1 - squares[-1]) / (squares[r - 1] - squares[r])):.0f}",
        _start(64, r, seed),
        vh[:r].T.contiguous(),
        -float(squares[:r].sum()) / 2,
        lambda x: -(x * (covariance @ x)).sum() / 2,
        gradient,
        budget,
        lambda: Oracle(gradient),
    )


def procrustes(n: int, r: int, *, seed: int = 0, budget: int = 600) -> Problem:
    """Orthogonal Procrustes, |A X^T - B|^2 / 2: points A (m x r) laid on their noisy images B (m x n).

    The optimum is the polar factor of B^T A, with cost (|A|^2 + |B|^2) / 2 - |B^T A|_*. The columns of A have variances
    from 1 to 0.1, which makes the condition number about 10.
    """
    rng, m = _rng(seed), 10 * r
    a = torch.randn(m, r, dtype=torch.float64, generator=rng) * (_linear(1, 0.1, r) / m).sqrt()
    b = a @ stiefel.random_point(n, r, dtype=torch.float64, generator=rng).T
    b = b + torch.randn(m, n, dtype=torch.float64, generator=rng) * (0.05 / (m * n)) ** 0.5
    gram, cross, norm = a.T @ a, b.T @ a, b.square().sum()
    u, values, vh = torch.linalg.svd(cross, full_matrices=False)

    def gradient(x: Tensor) -> Tensor:
        return x @ gram - cross

    return Problem(
        f"Procrustes, {n} x {r}",
        f"Orthogonal Procrustes, {m} points in {r} dimensions and their noisy images in {n}",
        _start(n, r, seed),
        u @ vh,
        float((a.square().sum() + norm) / 2 - values.sum()),
        lambda x: ((x @ gram - 2 * cross) * x).sum() / 2 + norm / 2,
        gradient,
        budget,
        lambda: Oracle(gradient),
    )


def brockett(n: int, r: int, *, seed: int = 0, budget: int = 600) -> Problem:
    """Brockett's cost tr(X^T A X N) / 2 with N = diag(r, ..., 1) / r: the lowest eigenvectors of A, in order.

    The eigenvalues of A are 1/(2r), ..., r/(2r) and then linear up to 1: condition number about 2 r^2.
    """
    values = torch.cat([_linear(1, r, r) / (2 * r), _linear((r + 1) / (2 * r), 1, n - r)])
    weights = _linear(r, 1, r) / r
    rotation = Rotation(n, _rng(seed))

    def gradient(x: Tensor) -> Tensor:
        return rotation(values[:, None] * rotation.inverse(x)) * weights

    return Problem(
        f"Brockett, {n} x {r}",
        f"Brockett cost, condition number about {2 * r * r}",
        _start(n, r, seed),
        rotation(torch.eye(n, r, dtype=torch.float64)),
        float((values[:r] * weights).sum()) / 2,
        lambda x: (x * gradient(x)).sum() / 2,
        gradient,
        budget,
        lambda: Oracle(gradient),
    )


def joint_diagonalisation(n: int, r: int, *, windows: int = 16, seed: int = 0, budget: int = 600) -> Problem:
    """Blind separation of r non-stationary sources in n sensors: -sum_k |diag(X^T C_k X)|^2, scaled.

    C_k = V diag(d_k) V^T + s I is the covariance in window k, d_kj the variance of source j there. The cost is concave
    in the squares of V^T X, which are doubly substochastic, so the optimum is at a permutation of V's columns:
    -sum_kj (d_kj + s)^2.
    """
    rng = _rng(seed)
    basis = stiefel.random_point(n, r, dtype=torch.float64, generator=rng)
    powers = 0.2 + torch.rand(windows, r, dtype=torch.float64, generator=rng)
    noise = 0.05
    scale = 1 / (powers + noise).square().sum(0).max()

    def energies(x: Tensor) -> Tensor:
        """Return x_i^T C_k x_i, shape (windows, r)."""
        return powers @ (basis.T @ x).square() + noise * x.square().sum(0)

    def gradient(x: Tensor) -> Tensor:
        parts = basis.T @ x
        energy = powers @ parts.square() + noise * x.square().sum(0)
        return -scale * (basis @ ((powers.T @ energy) * parts) + noise * x * energy.sum(0))

    return Problem(
        f"joint diagonalisation, {n} x {r}",
        f"Joint diagonalisation of {windows} covariances ({r} non-stationary sources in {n} sensors)",
        _start(n, r, seed),
        basis,
        -float(scale * (powers + noise).square().sum()) / 4,
        lambda x: -scale * energies(x).square().sum() / 4,
        gradient,
        budget,
        lambda: Oracle(gradient),
    )


def streaming_pca(n: int, r: int, batch: int, *, seed: int = 0, budget: int = 600) -> Problem:
    """Top-r PCA from fresh mini-batches, in float32; the gap is that of the population's covariance.

    Signal variances go from 1 to 1/2; the noise in each coordinate has variance 1e-4 b / n, about 0.1 % of the energy
    in all. A step size s then leaves a gap of the order of 1e-4 s, so that 1e-6 needs a decaying step and is in reach.
    """
    basis = Rotation(n, _rng(seed))(torch.eye(n, r, dtype=torch.float64))
    values, noise = _linear(1, 0.5, r), 1e-4 * batch / n

    def gradient(x: Tensor) -> Tensor:
        return -(basis @ (values[:, None] * (basis.T @ x)) + noise * x)

    return Problem(
        f"streaming PCA, {n} x {r}",
        f"Top-{r} PCA from batches of {batch} fresh rows, float32",
        _start(n, r, seed, torch.float32),
        basis,
        -float((values + noise).sum()) / 2,
        lambda x: (x * gradient(x)).sum() / 2,
        gradient,
        budget,
        lambda: Stream(basis.float(), values.float(), noise, batch, seed),
        stochastic=True,
        rehearsal=lambda: Stream(basis.float(), values.float(), noise, batch, seed + 1),
    )


# The suite, small to large within each family; none is built before it is asked for.
SUITE: dict[str, Callable[[int], Problem]] = {
    "digits": lambda seed: digits(seed=seed),
    "pca-50": lambda seed: pca(50, 5, 10, seed=seed),
    "pca-200": lambda seed: pca(200, 8, 1000, seed=seed, budget=1000),
    "pca-1000": lambda seed: pca(1000, 20, 100, seed=seed),
    "pca-4096": lambda seed: pca(4096, 64, 10, seed=seed, budget=400),
    "procrustes-50": lambda seed: procrustes(50, 5, seed=seed),
    "procrustes-512": lambda seed: procrustes(512, 32, seed=seed),
    "brockett-50": lambda seed: brockett(50, 5, seed=seed),
    "brockett-500": lambda seed: brockett(500, 10, seed=seed),
    "joint-50": lambda seed: joint_diagonalisation(50, 5, seed=seed),
    "joint-1024": lambda seed: joint_diagonalisation(1024, 16, seed=seed),
    "stream-50": lambda seed: streaming_pca(50, 5, 32, seed=seed),
    "stream-512": lambda seed: streaming_pca(512, 16, 64, seed=seed),
    "stream-4096": lambda seed: streaming_pca(4096, 64, 128, seed=seed, budget=400),
}
