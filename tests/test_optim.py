"""The updates on the Stiefel manifold against one-matrix references, their invariances, and the edges."""

import itertools
import math
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor

from stiefel_lora import stiefel
from stiefel_lora.errors import InputError, ManifoldError
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD, _batch
from stiefel_lora.optim._batch import Workspace
from tests.reference import optim as reference

METHODS = tuple(stiefel.RETRACTIONS)
OPTIMIZERS: dict[str, tuple[type[RiemannianAdam] | type[RiemannianSGD], dict[str, Any]]] = {
    "adam": (RiemannianAdam, {}),
    "rows": (RiemannianAdam, {"second_moment": "row"}),
    "sgd": (RiemannianSGD, {}),
    "momentum": (RiemannianSGD, {"momentum": 0.9}),
}


def parameter(*shape: int, dtype: torch.dtype = torch.float64, manifold: Any = None) -> geoopt.ManifoldParameter:
    x = stiefel.random_point(shape[-2], shape[-1], batch=shape[:-2], dtype=dtype)
    return geoopt.ManifoldParameter(x, manifold=manifold or geoopt.EuclideanStiefel())


def make(kind: str, params: Any, **options: Any) -> RiemannianAdam | RiemannianSGD:
    optimizer, extra = OPTIMIZERS[kind]
    return optimizer(params, **{"lr": 0.05, **extra, **options})


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("second_moment", ["mean", "norm", "row", "element"])
@pytest.mark.parametrize("beta2", [0.0, 1e-3])
def test_a_gradient_that_shrinks_is_not_lost_in_the_rounding_of_the_one_before(
    second_moment: Any, beta2: float
) -> None:
    p, q = parameter(4, 12, 4, dtype=torch.float32), parameter(4, 12, 4)
    with torch.no_grad():
        p.copy_(q)
    generator = torch.Generator().manual_seed(0)
    grads = [size * torch.randn(4, 12, 4, generator=generator) for size in (1e3, 1e-1)]
    for x in (p, q):
        optimizer = RiemannianAdam([x], lr=1e-3, betas=(0.0, beta2), second_moment=second_moment)
        run(optimizer, [x], [[g.to(x.dtype)] for g in grads])
    # Steps of 1e-3 an entry in float32, of which the second was 0.27 long.
    torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=1e-5)


def gram_error(x: Tensor) -> float:
    return float(stiefel.orthogonality_error(x).max())


ADAM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"metric": "canonical"},
    {"second_moment": "norm"},
    {"second_moment": "row"},
    {"second_moment": "row", "amsgrad": True},
    {"second_moment": "element"},
    {"second_moment": "element", "amsgrad": True},
    {"betas": (0.5, 0.9), "eps": 1e-3},
]
SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "maximize": True, "metric": "canonical"},
]


@pytest.mark.parametrize("retraction", METHODS)
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
def test_adam_matches_the_reference(options: dict[str, Any], retraction: str) -> None:
    p = parameter(12, 4)
    start = p.detach().clone()
    grads = [torch.randn(12, 4, dtype=torch.float64) * 10 ** (i % 3) for i in range(10)]
    run(RiemannianAdam([p], lr=0.02, retraction=retraction, **options), [p], [[g] for g in grads])
    expected = reference.adam(start, grads, lr=0.02, retraction=retraction, **options)
    # Ten steps of float64 rounding, amplified where the second moment divides by small entries.
    torch.testing.assert_close(p.detach().as_subclass(Tensor), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("retraction", METHODS)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_matches_the_reference(options: dict[str, Any], retraction: str) -> None:
    p = parameter(12, 4)
    start = p.detach().clone()
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in range(10)]
    run(RiemannianSGD([p], lr=0.02, retraction=retraction, **options), [p], [[g] for g in grads])
    expected = reference.sgd(start, grads, lr=0.02, retraction=retraction, **options)
    torch.testing.assert_close(p.detach().as_subclass(Tensor), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_long_step_is_a_quarter_turn(kind: str) -> None:
    p = parameter(12, 4)
    start, g = p.detach().clone(), torch.randn(12, 4, dtype=torch.float64)
    run(make(kind, [p], lr=1e6), [p], [[g]])
    u = stiefel.project(start, g)
    if kind == "rows":
        u = stiefel.project(start, u / (u.square().mean(1, keepdim=True).sqrt() + 1e-8))
    expected = stiefel.retract(start, reference.quarter_turn(-1e9 * u))
    torch.testing.assert_close(p.detach().as_subclass(Tensor), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("retraction", METHODS)
def test_batched_update_is_the_one_of_each_matrix(kind: str, retraction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many matrices of mixed shapes, with leading dimensions and gaps, in pieces of a few, equal one at a time."""
    # Room for three 12 x 4 float64 matrices a piece, so that there are several pieces and runs.
    monkeypatch.setitem(_batch._PIECE_BYTES, "cpu", 3 * 12 * 4 * 8)
    together = [parameter(*shape) for shape in [(12, 4)] * 7 + [(9, 1)] * 2 + [(5, 5)] + [(2, 2, 12, 4)]]
    alone = [geoopt.ManifoldParameter(p.detach().clone(), manifold=p.manifold) for p in together]
    grouped = make(kind, together, retraction=retraction)
    single = [make(kind, [p], retraction=retraction) for p in alone]
    for step in range(6):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            # A third of the matrices have no gradient at any step, a different third each time.
            p.grad = None if (i + step) % 3 == 0 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        grouped.step()
        for optimizer in single:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        # Batched matrix products may sum in another order; torch.matrix_exp chooses its degree by the batch and
        # errs by up to 1e-11 on one small matrix.
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-10 if retraction == "exp" else 1e-13, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
@pytest.mark.parametrize("retraction", METHODS)
def test_momentum_is_tangent_from_the_first_step_on(kind: str, metric: str, retraction: str) -> None:
    p = parameter(12, 4)
    optimizer = make(kind, [p], metric=metric, retraction=retraction)
    for _ in range(5):
        run(optimizer, [p], [[torch.randn(12, 4, dtype=torch.float64)]])
        m = optimizer.state[p].get("exp_avg", optimizer.state[p].get("momentum_buffer"))
        if kind == "sgd":
            assert m is None
            continue
        assert float(m.norm()) > 0.1
        x = p.detach()
        assert float((x.T @ m + m.T @ x).norm()) < 1e-12


@pytest.mark.parametrize("count", [1, 3])  # three are updated as two together and one alone
def test_sgd_momentum_starts_as_the_riemannian_gradient(count: int) -> None:
    points = [parameter(12, 4) for _ in range(count)]
    starts = [p.detach().clone() for p in points]
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in points]
    optimizer = RiemannianSGD(points, lr=0.0, momentum=0.9, dampening=0.5)
    run(optimizer, points, [grads])
    for p, start, g in zip(points, starts, grads, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer, stiefel.project(start, g), atol=1e-13, rtol=0)


def test_scratch_memory_that_has_grown_is_one_block() -> None:
    space = Workspace()
    (small,) = space.take(1, (4, 2), torch.float32, torch.device("cpu"))
    space.take(2, (4, 2), torch.float32, torch.device("cpu"))
    (again,) = space.take(1, (4, 2), torch.float32, torch.device("cpu"))
    assert space.nbytes == 64 and again.untyped_storage().nbytes() == 64
    assert again.data_ptr() != small.data_ptr(), "the memory of before is given back"


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("retraction", ["cayley", "polar", "exp"])
def test_update_is_equivariant(kind: str, retraction: str) -> None:
    """X -> X V, G -> G V with V orthogonal turns every iterate into X V: no basis of the columns is preferred."""
    v = stiefel.random_point(4, 4, dtype=torch.float64)
    p = parameter(12, 4)
    q = geoopt.ManifoldParameter(p.detach() @ v, manifold=geoopt.EuclideanStiefel())
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in range(8)]
    run(make(kind, [p], retraction=retraction), [p], [[g] for g in grads])
    run(make(kind, [q], retraction=retraction), [q], [[g @ v] for g in grads])
    # torch.matrix_exp errs by up to 1e-11 on a small matrix, see above.
    atol = 1e-9 if retraction == "exp" else 1e-12
    torch.testing.assert_close((p @ v).detach(), q.detach().as_subclass(Tensor), atol=atol, rtol=0)


def test_the_qr_update_spans_the_same_space_in_any_basis() -> None:
    """The Q factor depends on the order of the columns, its span does not (for one step from one point)."""
    v = stiefel.random_point(4, 4, dtype=torch.float64)
    p = parameter(12, 4)
    q = geoopt.ManifoldParameter(p.detach() @ v, manifold=geoopt.EuclideanStiefel())
    g = torch.randn(12, 4, dtype=torch.float64)
    run(RiemannianAdam([p], lr=0.05), [p], [[g]])
    run(RiemannianAdam([q], lr=0.05), [q], [[g @ v]])
    torch.testing.assert_close((p @ p.T).detach(), (q @ q.T).detach(), atol=1e-12, rtol=0)


def test_one_learning_rate_serves_both_kinds() -> None:
    """The first Adam step has the root mean square lr on a manifold parameter as on an ordinary one."""
    p, w = parameter(200, 8), torch.nn.Parameter(torch.zeros(200, 8, dtype=torch.float64))
    start = p.detach().clone()
    run(RiemannianAdam([p, w], lr=1e-5), [p, w], [[torch.randn_like(start), torch.randn_like(start)]])
    # 1e-4: to first order in the step, and eps = 1e-8 against moments of order one.
    assert float((p - start).detach().square().mean().sqrt()) == pytest.approx(1e-5, rel=1e-4)
    assert float(w.detach().square().mean().sqrt()) == pytest.approx(1e-5, rel=1e-4)


def test_second_moment_norm_takes_steps_of_frobenius_norm_lr() -> None:
    p = parameter(200, 8)
    start = p.detach().clone()
    run(RiemannianAdam([p], lr=1e-4, second_moment="norm"), [p], [[torch.randn_like(start)]])
    assert float((p - start).detach().norm()) == pytest.approx(1e-4, rel=1e-4)


@pytest.mark.parametrize("shape", [(200, 8), (3, 200, 8)], ids=str)
@pytest.mark.parametrize("then", ["norm", "row", "element"])
def test_a_second_moment_that_is_changed_midway_keeps_its_unit(then: Any, shape: tuple[int, ...]) -> None:
    """All entries of the gradient are of one size, so that every form holds the same mean square."""
    signs = torch.randint(2, shape).double() * 2 - 1
    lengths = []
    for first in ("mean", then):
        p = parameter(*shape)
        optimizer = RiemannianAdam([p], lr=1e-4, second_moment=first)
        run(optimizer, [p], [[signs]] * 3)
        optimizer.param_groups[0]["second_moment"] = then
        before = p.detach().clone()
        run(optimizer, [p], [[signs]])
        lengths.append(float((p - before).detach().norm()))
    # Two random points, at which the tangent parts of the gradient differ.
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "manifold", [geoopt.EuclideanStiefel(), geoopt.CanonicalStiefel(), geoopt.EuclideanStiefelExact()]
)
def test_every_stiefel_manifold_of_geoopt_moves_with_our_geometry(kind: str, manifold: Any) -> None:
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in range(4)]
    p = parameter(12, 4)
    q = geoopt.ManifoldParameter(p.detach().clone(), manifold=manifold)
    run(make(kind, [p]), [p], [[g] for g in grads])
    run(make(kind, [q]), [q], [[g] for g in grads])
    assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(6, 1), (5, 5), (1, 1)])
def test_sphere_and_orthogonal_group(kind: str, shape: tuple[int, int]) -> None:
    p = parameter(*shape)
    run(make(kind, [p]), [p], [[torch.randn(*shape, dtype=torch.float64)] for _ in range(20)])
    assert gram_error(p) < 1e-13


@pytest.mark.parametrize("retraction", METHODS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_no_drift(retraction: str, dtype: torch.dtype, bound: float) -> None:
    """2,000 Adam steps; `python -m benchmarks drift` takes 100,000 at 4096 x 32 with the same bounds."""
    p = parameter(256, 16, dtype=dtype)
    optimizer = RiemannianAdam([p], lr=1e-2, retraction=retraction)
    worst = 0.0
    for _ in range(2000):
        p.grad = torch.randn_like(p)
        optimizer.step()
        worst = max(worst, gram_error(p))
    assert worst < bound


@pytest.mark.parametrize("retraction", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_a_float32_master(retraction: str, dtype: torch.dtype) -> None:
    # A point that every dtype can hold exactly.
    p, exact = (
        geoopt.ManifoldParameter(torch.eye(64, 8, dtype=d), manifold=geoopt.EuclideanStiefel())
        for d in (dtype, torch.float32)
    )
    low, high = (RiemannianAdam([q], lr=1e-4, retraction=retraction) for q in (p, exact))
    for _ in range(50):
        g = torch.randn(64, 8).to(dtype)
        p.grad, exact.grad = g, g.float()
        low.step()
        high.step()
    state = low.state[p]
    assert {state[key].dtype for key in ("master", "exp_avg", "exp_avg_sq")} == {torch.float32}
    # The master of float32 steps that bf16 could not even represent is the float32 run's.
    torch.testing.assert_close(state["master"], exact.detach().as_subclass(Tensor), atol=1e-6, rtol=0)
    assert torch.equal(p.detach().as_subclass(Tensor), state["master"].to(dtype))
    assert gram_error(state["master"]) < 5e-6


def test_a_value_written_by_someone_else_wins_over_the_master() -> None:
    p = parameter(16, 3, dtype=torch.bfloat16)
    optimizer = RiemannianAdam([p], lr=1e-6)
    run(optimizer, [p], [[torch.randn(16, 3).bfloat16()]])
    other = stiefel.random_point(16, 3, dtype=torch.bfloat16)
    p.data.copy_(other)
    run(optimizer, [p], [[torch.randn(16, 3).bfloat16()]])
    # The step is far below bf16's resolution, so what is seen is the loaded value, re-orthonormalised (|dX| < 0.02).
    assert float((p.detach().float() - other.float()).norm()) < 0.02


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("retraction", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(kind: str, retraction: str, bad: float) -> None:
    """float32: 1e30 is finite but its square is not."""
    good, hurt = parameter(12, 4, dtype=torch.float32), parameter(12, 4, dtype=torch.float32)
    twin = geoopt.ManifoldParameter(hurt.detach().clone(), manifold=hurt.manifold)
    optimizer, reference_run = (make(kind, ps, retraction=retraction) for ps in ([good, hurt], [twin]))
    for step in range(6):
        g = torch.randn(12, 4)
        good.grad, twin.grad, hurt.grad = torch.randn(12, 4), g, g.clone()
        if step in (0, 3):  # also at the very first update, before there is any state
            before, unhurt = hurt.detach().clone(), good.detach().clone()
            hurt.grad[5, 1] = bad
            optimizer.step()
            assert torch.equal(hurt.detach(), before)
            assert not torch.equal(good.detach(), unhurt)
        else:
            optimizer.step()
            reference_run.step()
    assert optimizer.skipped_updates == 2
    assert int(optimizer.state[hurt]["skipped"]) == 2
    # As if the skipped steps had not been: the momentum is re-projected, which rounds.
    torch.testing.assert_close(hurt.detach(), twin.detach(), atol=1e-6, rtol=0)
    assert gram_error(good) < 5e-6


@pytest.mark.parametrize("retraction", METHODS)
def test_a_point_that_is_not_finite_does_no_harm_to_others(retraction: str) -> None:
    good, hurt = parameter(12, 4), parameter(12, 4)
    twin = geoopt.ManifoldParameter(good.detach().clone(), manifold=good.manifold)
    optimizers = [make("adam", ps, retraction=retraction) for ps in ([good, hurt], [twin])]
    hurt.data[3, 1] = math.nan
    for p in (good, hurt, twin):
        p.grad = torch.ones(12, 4, dtype=torch.float64).tril()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(good.detach(), twin.detach(), atol=1e-10, rtol=0)
    assert optimizers[0].skipped_updates == 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_error_if_nonfinite_names_the_parameter_and_changes_nothing(kind: str) -> None:
    p, q = parameter(12, 4), parameter(9, 2)
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = make(kind, [("w", w), ("p", p), ("q", q)], error_if_nonfinite=True)
    p.grad, q.grad, w.grad = torch.randn_like(p), torch.full_like(q, torch.nan), torch.ones(3)
    before = [t.detach().clone() for t in (p, q, w)]
    with pytest.raises(InputError, match=r"parameter 2 \(q\) of group 0, shape \(9, 2\), has a NaN"):
        optimizer.step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, (p, q, w), strict=True))


@pytest.mark.parametrize("retraction", METHODS)
def test_a_gradient_that_is_almost_normal_keeps_the_manifold(retraction: str) -> None:
    """Near an optimum the projection cancels nearly all of a gradient, and Adam makes a full step of what is left."""
    x = stiefel.random_point(576, 16)
    symmetric = torch.randn(16, 16)
    normal = x @ (symmetric + symmetric.T)
    p = geoopt.ManifoldParameter(x, manifold=geoopt.EuclideanStiefel())
    optimizer = RiemannianAdam([p], lr=1e-2, retraction=retraction)
    for _ in range(5):
        p.grad = 1e4 * normal + 1e-2 * torch.randn(576, 16)
        optimizer.step()
        # The bound that holds for any other gradient.
        assert gram_error(p) < 5e-6


def concentrated(where: str, n: int, r: int) -> Tensor:
    if where == "rank one":
        return torch.randn(n, 1) @ torch.randn(1, r)
    index = {"rows": (slice(3), slice(None)), "column": (slice(None), 3), "entry": (5, 3)}[where]
    g = torch.zeros(n, r)
    g[index] = torch.randn(n, r)[index]
    return g


@pytest.mark.parametrize("retraction", METHODS)
@pytest.mark.parametrize("where", ["rank one", "rows", "column", "entry"])
def test_a_gradient_in_few_directions_keeps_the_manifold(where: str, retraction: str) -> None:
    """All of the step's length is then in few singular values, whose exponential is the least exact."""
    p = parameter(4096, 32, dtype=torch.float32)
    optimizer = RiemannianAdam([p], lr=1e-2, retraction=retraction)
    for _ in range(20):
        p.grad = concentrated(where, 4096, 32)
        optimizer.step()
        # The bound that holds for any other gradient.
        assert gram_error(p) < 5e-6


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-25])
def test_zero_and_tiny_gradients(kind: str, scale: float) -> None:
    p = parameter(12, 4, dtype=torch.float32)
    start = p.detach().clone()
    optimizer = make(kind, [p], **({"eps": 0.0} if kind == "adam" else {}))
    run(optimizer, [p], [[scale * torch.randn(12, 4)] for _ in range(3)])
    assert gram_error(p) < 5e-6
    if scale == 0:
        # Three times re-orthonormalised, which rounds.
        torch.testing.assert_close(p.detach(), start, atol=1e-6, rtol=0)


def test_adam_does_not_depend_on_the_scale_of_the_gradient() -> None:
    start = parameter(12, 4)
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in range(5)]
    ends = []
    for scale in (1.0, 1e-12):
        p = geoopt.ManifoldParameter(start.detach().clone(), manifold=start.manifold)
        run(RiemannianAdam([p], lr=0.05, eps=0.0), [p], [[scale * g] for g in grads])
        ends.append(p.detach())
    torch.testing.assert_close(*ends, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_late_first_gradient_starts_its_own_bias_correction(kind: str) -> None:
    early, late = parameter(12, 4), parameter(12, 4)
    twin = geoopt.ManifoldParameter(late.detach().clone(), manifold=late.manifold)
    optimizer = make(kind, [early, late])
    for _ in range(5):
        early.grad = torch.randn_like(early)
        optimizer.step()
    assert torch.equal(late.detach(), twin.detach())
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in range(3)]
    run(optimizer, [early, late], [[torch.randn(12, 4, dtype=torch.float64), g] for g in grads])
    run(make(kind, [twin]), [twin], [[g] for g in grads])
    torch.testing.assert_close(late.detach(), twin.detach(), atol=1e-13, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_leaves_a_stiefel_parameter_alone(kind: str) -> None:
    """It has no tangent part: P_X(X) = 0."""
    p = parameter(12, 4)
    q = geoopt.ManifoldParameter(p.detach().clone(), manifold=p.manifold)
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in range(3)]
    run(make(kind, [p], weight_decay=0.0), [p], [[g] for g in grads])
    run(make(kind, [q], weight_decay=0.3), [q], [[g] for g in grads])
    assert torch.equal(p.detach(), q.detach())


def test_gradients_are_only_read() -> None:
    for kind, metric in itertools.product(OPTIMIZERS, ["euclidean", "canonical"]):
        p, w = parameter(12, 4), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        s = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0, 0.0]), manifold=geoopt.Sphere())
        optimizer = make(kind, [p, w, s], metric=metric, weight_decay=0.1, maximize=True)
        grads = [torch.randn_like(t) for t in (p, w, s)]
        for t, g in zip((p, w, s), grads, strict=True):
            t.grad = g.clone()
        optimizer.step()
        assert all(torch.equal(t.grad, g) for t, g in zip((p, w, s), grads, strict=True))


def test_non_contiguous_parameters() -> None:
    x = stiefel.random_point(12, 4, dtype=torch.float64)
    p = geoopt.ManifoldParameter(x.T.contiguous().T, manifold=geoopt.EuclideanStiefel())
    q = geoopt.ManifoldParameter(x.clone(), manifold=geoopt.EuclideanStiefel())
    assert not p.is_contiguous()
    grads = [torch.randn(12, 4, dtype=torch.float64) for _ in range(3)]
    run(RiemannianAdam([p]), [p], [[g] for g in grads])
    run(RiemannianAdam([q]), [q], [[g] for g in grads])
    torch.testing.assert_close(p.detach(), q.detach(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("manifold", "shape"), [(geoopt.EuclideanStiefel(), (0, 12, 4)), (geoopt.Sphere(), (0, 5))])
def test_an_empty_parameter_is_left_alone(kind: str, manifold: Any, shape: tuple[int, ...]) -> None:
    """As torch's optimizers do."""
    p, empty = parameter(12, 4), geoopt.ManifoldParameter(torch.zeros(*shape), manifold=manifold)
    start = p.detach().clone()
    optimizer = make(kind, [p, empty])
    run(optimizer, [p, empty], [[torch.randn_like(start), torch.zeros(*shape)]])
    optimizer.stabilize()
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, [p, empty], [[torch.randn_like(start), torch.zeros(*shape)]])
    assert not torch.equal(p.detach(), start)
    assert optimizer.skipped_updates == 0


def test_a_wide_matrix_is_refused() -> None:
    p = parameter(12, 4)
    p.data = p.data.T
    with pytest.raises(InputError, match=r"parameter 0 of group 0: .* tall.* got \(4, 12\); transpose it"):
        RiemannianAdam([p])


def test_a_point_off_the_manifold_is_refused_or_projected() -> None:
    p = parameter(12, 4)
    p.data += 0.01
    error = float(torch.linalg.matrix_norm(p.T @ p - torch.eye(4)).detach())
    nearest = stiefel.project_point(p.detach())
    with pytest.raises(ManifoldError, match=rf"off the Stiefel manifold: \|X\^T X - I\|_F = {error:.3g}.*project=True"):
        RiemannianSGD([p])
    RiemannianSGD([p], project=True)
    torch.testing.assert_close(p.detach().as_subclass(Tensor), nearest.as_subclass(Tensor), atol=1e-13, rtol=0)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_point_that_is_not_finite_is_refused(bad: float, project: bool) -> None:
    p = parameter(12, 4)
    p.data[2, 1] = bad
    with pytest.raises(ManifoldError, match=r"parameter 0 of group 0, shape \(12, 4\), has a NaN or infinity"):
        RiemannianAdam([p], project=project)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_to_refuse(dtype: torch.dtype) -> None:
    RiemannianAdam([parameter(2048, 64, dtype=dtype), parameter(4, 4, dtype=dtype)])


def test_stabilize_puts_points_and_momenta_back() -> None:
    p = parameter(12, 4)
    optimizer = RiemannianAdam([p], lr=0.05)
    run(optimizer, [p], [[torch.randn(12, 4, dtype=torch.float64)]])
    p.data += 0.01
    optimizer.stabilize()
    x, m = p.detach(), optimizer.state[p]["exp_avg"]
    assert gram_error(x) < 1e-13
    assert float((x.T @ m + m.T @ x).norm()) < 1e-13
