"""A drop-in for geoopt's optimizers: its other manifolds move as with geoopt itself."""

import copy
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor

from stiefel_lora.optim import RiemannianAdam, RiemannianSGD


def point_on(name: str) -> geoopt.ManifoldParameter:
    d = torch.float64
    manifolds: dict[str, tuple[Any, Any]] = {
        "Lorentz": (geoopt.Lorentz().double(), lambda m: m.random_normal(4, 5)),
        "PoincareBall": (geoopt.PoincareBall().double(), lambda m: m.random_normal(4, 3)),
        "Sphere": (geoopt.Sphere(), lambda m: m.random_uniform(3, 6, dtype=d)),
        "SphereExact": (geoopt.SphereExact(), lambda m: m.random_uniform(3, 6, dtype=d)),
        "SPD": (geoopt.SymmetricPositiveDefinite(), lambda m: m.random(4, 4, dtype=d)),
        "Scaled": (geoopt.Scaled(geoopt.PoincareBall().double(), 2.0), lambda m: m.random_normal(4, 3)),
        "Product": (
            geoopt.ProductManifold((geoopt.Sphere(), 4), (geoopt.Euclidean(ndim=1), 3)),
            lambda m: m.pack_point(geoopt.Sphere().random_uniform(2, 4, dtype=d), torch.randn(2, 3, dtype=d)),
        ),
    }
    manifold, draw = manifolds[name]
    return geoopt.ManifoldParameter(draw(manifold).as_subclass(Tensor), manifold=manifold)


MANIFOLDS = ["Lorentz", "PoincareBall", "Sphere", "SphereExact", "SPD", "Scaled", "Product"]


def run(optimizer: torch.optim.Optimizer, p: Tensor, n: int = 12) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(n):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"stabilize": 5}], ids=str)
def test_adam_moves_other_manifolds_as_geoopt_does(name: str, options: dict[str, Any]) -> None:
    p = point_on(name)
    q = copy.deepcopy(p)
    run(RiemannianAdam([p], lr=0.01, **options), p)
    run(geoopt.optim.RiemannianAdam([q], lr=0.01, **options), q)
    # float64 rounding over twelve steps: sums are formed in another order.
    torch.testing.assert_close(p.detach().as_subclass(Tensor), q.detach().as_subclass(Tensor), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_options_that_a_state_does_not_name_stay_as_they_are(kind: str) -> None:
    ours, theirs = {"SGD": RiemannianSGD, "Adam": RiemannianAdam}[kind], getattr(geoopt.optim, f"Riemannian{kind}")
    p = point_on("Sphere")
    optimizer = ours([p], lr=0.1, maximize=True, foreach=False, retraction="polar")
    optimizer.load_state_dict(theirs([p], lr=0.3).state_dict())
    (group,) = optimizer.param_groups
    # geoopt's Adam, which is made of torch's, names maximize and foreach itself.
    named = kind == "Adam"
    assert group["lr"] == 0.3
    assert group["retraction"] == "polar"
    assert (group["maximize"], group["foreach"]) == ((False, None) if named else (True, False))


@pytest.mark.parametrize("name", ["Sphere", "PoincareBall"])
def test_dampening_is_for_all_but_the_first_gradient_that_is_used(name: str) -> None:
    p = point_on(name)
    q = copy.deepcopy(p)
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
    optimizers = [RiemannianSGD([x], **options) for x in (p, q)]
    p.grad = torch.full_like(p, torch.nan)
    optimizers[0].step()
    for x, optimizer in zip((p, q), optimizers, strict=True):
        run(optimizer, x, 3)
    assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("name", MANIFOLDS)
def test_plain_sgd_moves_other_manifolds_as_geoopt_does(name: str) -> None:
    """Without momentum; with it geoopt's first step is (momentum + 1 - dampening) times torch's."""
    p = point_on(name)
    q = copy.deepcopy(p)
    run(RiemannianSGD([p], lr=0.01, stabilize=4), p)
    run(geoopt.optim.RiemannianSGD([q], lr=0.01, stabilize=4), q)
    torch.testing.assert_close(p.detach().as_subclass(Tensor), q.detach().as_subclass(Tensor), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_sgd_with_momentum_starts_like_torchs_and_stays_on_the_manifold(name: str) -> None:
    p, q = point_on(name), None
    q = copy.deepcopy(p)
    run(RiemannianSGD([p], lr=0.01, momentum=0.9, nesterov=False), p, n=1)
    run(RiemannianSGD([q], lr=0.01), q, n=1)
    torch.testing.assert_close(p.detach(), q.detach(), atol=1e-13, rtol=0)
    run(RiemannianSGD([p], lr=0.01, momentum=0.9, nesterov=True), p)
    p.manifold.assert_check_point_on_manifold(p.detach())


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("optimizer_class", [RiemannianAdam, RiemannianSGD])
def test_other_manifolds_survive_a_nan_and_a_checkpoint(name: str, optimizer_class: Any) -> None:
    p = point_on(name)
    optimizer = optimizer_class([p], lr=0.01)
    run(optimizer, p, n=3)
    before = p.detach().clone()
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert optimizer.skipped_updates == 1
    q = copy.deepcopy(p)
    other = optimizer_class([q], lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, p, n=3)
    run(other, q, n=3)
    assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (RiemannianAdam, geoopt.optim.RiemannianAdam, {}),
        (RiemannianAdam, geoopt.optim.RiemannianAdam, {"amsgrad": True, "stabilize": 2}),
        (RiemannianSGD, geoopt.optim.RiemannianSGD, {"momentum": 0.9}),
    ],
)
def test_a_checkpoint_of_geoopts_optimizer_goes_on(name: str, ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    q = point_on(name)
    geoopts = theirs([q], lr=0.01, **options)
    run(geoopts, q, n=4)
    p = copy.deepcopy(q)
    optimizer = ours([p], lr=7.0)
    optimizer.load_state_dict(copy.deepcopy(geoopts.state_dict()))
    run(geoopts, q, n=4)
    run(optimizer, p, n=4)
    torch.testing.assert_close(p.detach().as_subclass(Tensor), q.detach().as_subclass(Tensor), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_checkpoint_of_geoopts_adam_on_stiefel_goes_on(amsgrad: bool) -> None:
    """Its second moment is ours of second_moment="norm"; the mean square is that over the number of entries."""
    x = geoopt.EuclideanStiefel().random_naive(6, 2, dtype=torch.float64)
    points = [geoopt.ManifoldParameter(x.clone().as_subclass(Tensor), manifold=geoopt.EuclideanStiefel())]
    geoopts = geoopt.optim.RiemannianAdam(points, lr=0.01, amsgrad=amsgrad, eps=0.0)
    run(geoopts, points[0], n=4)
    saved, start = copy.deepcopy(geoopts.state_dict()), copy.deepcopy(points[0])
    run(geoopts, points[0], n=4)
    # geoopt's step of Frobenius norm lr has the root mean square lr / sqrt(12).
    for second_moment, lr in (("norm", 0.01), ("mean", 0.01 / 12**0.5)):
        p = copy.deepcopy(start)
        optimizer = RiemannianAdam([p], second_moment=second_moment, amsgrad=amsgrad)  # type: ignore[arg-type]
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.param_groups[0]["lr"] = lr
        run(optimizer, p, n=4)
        torch.testing.assert_close(p.detach(), points[0].detach(), atol=1e-11, rtol=1e-11)
    for second_moment in ("row", "element"):
        optimizer = RiemannianAdam([copy.deepcopy(start)], second_moment=second_moment, amsgrad=amsgrad)  # type: ignore[arg-type]
        optimizer.load_state_dict(copy.deepcopy(saved))
        run(optimizer, optimizer.param_groups[0]["params"][0], n=1)


@pytest.mark.parametrize("optimizer_class", [RiemannianAdam, RiemannianSGD])
def test_low_precision_state_on_other_manifolds_loads_as_it_was(optimizer_class: Any) -> None:
    """geoopt computes in the parameter's dtype; only a count must not be rounded to it."""
    p = geoopt.ManifoldParameter(torch.nn.functional.normalize(torch.ones(3, 6)).bfloat16(), manifold=geoopt.Sphere())
    optimizer = optimizer_class([p], lr=0.01, **({"momentum": 0.9} if optimizer_class is RiemannianSGD else {}))
    run(optimizer, p, n=3)
    q = copy.deepcopy(p)
    other = optimizer_class([q], lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept, loaded = optimizer.state[p], other.state[q]
    assert {key: v.dtype for key, v in loaded.items()} == {key: v.dtype for key, v in kept.items()}
    run(optimizer, p, n=3)
    run(other, q, n=3)
    assert torch.equal(p.detach(), q.detach())


def test_a_euclidean_manifold_parameter_is_an_ordinary_one() -> None:
    p = geoopt.ManifoldParameter(torch.randn(3, 4), manifold=geoopt.Euclidean())
    q = torch.nn.Parameter(p.detach().clone().as_subclass(Tensor))
    run(RiemannianAdam([p], weight_decay=0.1), p)
    run(torch.optim.AdamW([q], weight_decay=0.1), q)
    assert torch.equal(p.detach().as_subclass(Tensor), q.detach())


def test_geoopts_hyperbolic_training_program_runs_unchanged() -> None:
    """Pull points of the ball together, the typical program written for geoopt.optim.RiemannianAdam."""
    ball = geoopt.PoincareBall().double()
    points = geoopt.ManifoldParameter(ball.random_normal(6, 2).as_subclass(Tensor), manifold=ball)
    offset = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = RiemannianAdam([points, offset], lr=5e-2, stabilize=10)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ball.dist(points, ball.expmap0(offset)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    ball.assert_check_point_on_manifold(points.detach())
