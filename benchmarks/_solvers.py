"""The solvers of the manifold study: first-order ones that take one step at a given rate, and pymanopt's own loops."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import geoopt
import torch
from torch import Tensor

from benchmarks import _peers
from benchmarks._problems import Oracle, Problem
from stiefel_lora import stiefel
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD

# Rows above which a solver that works with an n x n matrix at every step is left out.
SQUARE_LIMIT = 100


class LeftOutError(Exception):
    """A solver is not run on a problem, for the reason given."""


@dataclass
class Descent:
    """A run of a first-order solver.

    Attributes:
        oracle: Gives the gradients.
        optimizer: Moves ``parameter``.
        parameter: The point, shape (n, r).
    """

    oracle: Oracle
    optimizer: torch.optim.Optimizer
    parameter: Tensor

    def point(self) -> Tensor:
        """Return where the run is, shape (n, r)."""
        return self.parameter.detach().as_subclass(Tensor)

    def step(self, lr: float) -> None:
        """Take one step on the batch that was drawn last."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.parameter.grad = self.oracle(self.point())
        self.optimizer.step()


@dataclass
class Parametrised(Descent):
    """A run on the free parameter of a module whose ``weight`` is computed from it at every step."""

    module: torch.nn.Module = field(kw_only=True)

    def point(self) -> Tensor:
        """Return where the run is, shape (n, r)."""
        with torch.no_grad():
            return self.module.weight  # type: ignore[return-value]

    def step(self, lr: float) -> None:
        """Take one step on the batch that was drawn last."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        x = self.module.weight
        x.backward(self.oracle(x.detach()))  # type: ignore[operator]
        self.optimizer.step()


def _descent(problem: Problem, make: Callable[[list[Tensor]], torch.optim.Optimizer], manifold: Any = None) -> Descent:
    manifold = manifold or geoopt.EuclideanStiefel()
    parameter = geoopt.ManifoldParameter(problem.start.clone(), manifold=manifold)
    return Descent(problem.oracle(), make([parameter]), parameter)


def _check_rows(problem: Problem, why: str) -> None:
    if problem.start.shape[0] > SQUARE_LIMIT:
        raise LeftOutError(f"not run above {SQUARE_LIMIT} rows: {why} at every step")


def our_adam(problem: Problem, retraction: str) -> Descent:
    """RiemannianAdam with its defaults."""
    return _descent(problem, lambda p: RiemannianAdam(p, retraction=retraction))  # type: ignore[arg-type]


def our_sgd(problem: Problem, retraction: str, *, nesterov: bool = False) -> Descent:
    """RiemannianSGD with momentum 0.9."""
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "retraction": retraction}
    return _descent(problem, lambda p: RiemannianSGD(p, **options))


def geoopt_adam(problem: Problem) -> Descent:
    """Take geoopt's RiemannianAdam with its QR retraction."""
    return _descent(problem, _peers.geoopt_adam)


def geoopt_sgd(problem: Problem, *, nesterov: bool = False) -> Descent:
    """Take geoopt's RiemannianSGD with its QR retraction and momentum 0.9."""
    return _descent(problem, partial(_peers.geoopt_sgd, nesterov=nesterov))


def geoopt_canonical_adam(problem: Problem) -> Descent:
    """Take geoopt's RiemannianAdam with its Cayley retraction (first-order wrong in 0.5.1)."""
    _check_rows(problem, "it solves an n x n system")
    return _descent(problem, _peers.geoopt_adam, geoopt.CanonicalStiefel())


def geoopt_canonical_sgd(problem: Problem, *, nesterov: bool = False) -> Descent:
    """Take geoopt's RiemannianSGD with its Cayley retraction and momentum 0.9."""
    _check_rows(problem, "it solves an n x n system")
    return _descent(problem, partial(_peers.geoopt_sgd, nesterov=nesterov), geoopt.CanonicalStiefel())


def pogo_adam(problem: Problem) -> Descent:
    """POGO with Vector Adam."""
    return _descent(problem, _peers.pogo)


def pogo_sgd(problem: Problem, *, nesterov: bool = False) -> Descent:
    """POGO with SGD, momentum 0.9."""
    return _descent(problem, partial(_peers.pogo_sgd, nesterov=nesterov))


def geotorch_adam(problem: Problem) -> Descent:
    """Adam of torch on geotorch's orthogonal parametrisation (matrix exponential)."""
    try:
        import geotorch
    except ImportError as error:
        raise _peers.NotInstalledError("geotorch is not installed") from error
    _check_rows(problem, "it takes the exponential of an n x n matrix")
    n, r = problem.start.shape
    module = torch.nn.Linear(r, n, bias=False, dtype=problem.start.dtype)
    geotorch.orthogonal(module, "weight")
    # It completes the start to a square matrix with random columns.
    torch.manual_seed(0)
    module.weight = problem.start.clone()
    optimizer = torch.optim.Adam(module.parameters())
    return Parametrised(problem.oracle(), optimizer, next(module.parameters()), module=module)


FIRST_ORDER: dict[str, Callable[[Problem], Descent]] = {
    **{f"ours, Nesterov, {name}": partial(our_sgd, retraction=name, nesterov=True) for name in stiefel.RETRACTIONS},
    "ours, SGD, qr": partial(our_sgd, retraction="qr"),
    **{f"ours, Adam, {name}": partial(our_adam, retraction=name) for name in stiefel.RETRACTIONS},
    "geoopt Nesterov, Euclidean": partial(geoopt_sgd, nesterov=True),
    "geoopt SGD, Euclidean": geoopt_sgd,
    "geoopt Adam, Euclidean": geoopt_adam,
    "geoopt Nesterov, canonical": partial(geoopt_canonical_sgd, nesterov=True),
    "geoopt SGD, canonical": geoopt_canonical_sgd,
    "geoopt Adam, canonical": geoopt_canonical_adam,
    "POGO, Nesterov": partial(pogo_sgd, nesterov=True),
    "POGO, SGD": pogo_sgd,
    "POGO, VectorAdam": pogo_adam,
    "geotorch, torch Adam": geotorch_adam,
}


@dataclass
class Path:
    """What a batch solver went through: its distinct points, the CPU seconds at which it came to each, and in all."""

    points: list[Tensor]
    seconds: list[float]
    total: float = 0.0


def conjugate_gradient(problem: Problem, iterations: int, seconds: float) -> Path:
    """Run pymanopt's conjugate gradient with its line search."""
    return _pymanopt(problem, "ConjugateGradient", iterations, seconds)


def trust_regions(problem: Problem, iterations: int, seconds: float) -> Path:
    """Run pymanopt's trust regions, with Hessian products by double backpropagation; an iteration is an outer one."""
    return _pymanopt(problem, "TrustRegions", iterations, seconds)


def _pymanopt(problem: Problem, name: str, iterations: int, seconds: float) -> Path:
    try:
        import pymanopt
    except ImportError as error:
        raise _peers.NotInstalledError("pymanopt is not installed") from error
    if problem.stochastic:
        raise LeftOutError("not run: it needs the whole cost, not batches")
    manifold = pymanopt.manifolds.Stiefel(*problem.start.shape)
    path = Path([], [])

    @pymanopt.function.pytorch(manifold)
    def cost(x: Tensor) -> Tensor:
        return problem.cost(x)

    # Neither solver tells its points (trust regions keeps no log); both take the gradient at each, some more than once.
    @pymanopt.function.pytorch(manifold)
    def gradient(x: Tensor) -> Tensor:
        if not path.points or not torch.equal(path.points[-1], x):
            path.points.append(x.clone())
            path.seconds.append(time.process_time() - begin)
        return problem.gradient(x)

    solver = getattr(pymanopt.optimizers, name)(
        max_iterations=iterations, max_time=seconds, min_gradient_norm=1e-8, min_step_size=1e-14, verbosity=0
    )
    begin = time.process_time()
    solver.run(
        pymanopt.Problem(manifold, cost, euclidean_gradient=gradient), initial_point=problem.start.numpy().copy()
    )
    path.total = time.process_time() - begin
    return path


BATCH: dict[str, Callable[[Problem, int, float], Path]] = {
    "pymanopt, conjugate gradient": conjugate_gradient,
    "pymanopt, trust regions": trust_regions,
}
