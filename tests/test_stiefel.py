"""The geometry against dense references, its order of accuracy and its behaviour at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiefel_lora import stiefel
from stiefel_lora.errors import InputError
from tests.reference import stiefel as reference

METHODS = tuple(stiefel.RETRACTIONS)
SHAPES = [(1, 1), (9, 1), (2, 2), (5, 5), (12, 4), (40, 7)]


def tangent(x: Tensor, length: float) -> Tensor:
    u = stiefel.project(x, torch.randn_like(x))
    norm = torch.linalg.matrix_norm(u, keepdim=True)
    # The tangent space at a 1 x 1 point is {0}.
    return u * (length / norm.clamp_min(1e-30)) if x.shape[-2:] != (1, 1) else torch.zeros_like(x)


def gram_error(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_matches_least_squares(shape: tuple[int, int]) -> None:
    x = stiefel.random_point(*shape, dtype=torch.float64)
    g = torch.randn_like(x)
    # 1e-12: least squares in float64 over at most 28 unknowns.
    torch.testing.assert_close(stiefel.project(x, g), reference.project(x, g), atol=1e-12, rtol=0)


@given(n=st.integers(1, 30), r=st.integers(1, 30), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_projection_is_tangent_idempotent_and_orthogonal(n: int, r: int, scale: float, seed: int) -> None:
    n, r = max(n, r), min(n, r)
    generator = torch.Generator().manual_seed(seed)
    x = stiefel.random_point(n, r, dtype=torch.float64, generator=generator)
    g = scale * torch.randn(n, r, dtype=torch.float64, generator=generator)
    u = stiefel.project(x, g)
    # Relative to |G|: a few roundings in sums of up to 30 terms.
    bound = 1e-13 * float(g.norm()) + 1e-300
    assert float((x.T @ u + u.T @ x).norm()) <= bound
    assert float((stiefel.project(x, u) - u).norm()) <= bound
    v = stiefel.project(x, torch.randn(n, r, dtype=torch.float64, generator=generator))
    assert abs(float(((g - u) * v).sum())) <= bound * float(v.norm())


def test_in_place_projection_matches() -> None:
    x = stiefel.random_point(12, 4, batch=(3,), dtype=torch.float64)
    g = torch.randn_like(x)
    expected = stiefel.project(x, g)
    assert stiefel.project_(x, g) is g
    # 1e-14: the same sums in another order.
    torch.testing.assert_close(g, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_riemannian_gradient_represents_the_differential(metric: str) -> None:
    """<rgrad, V>_X = <G, V> for every tangent V, in the metric's own inner product."""
    x = stiefel.random_point(12, 4, dtype=torch.float64)
    g = torch.randn_like(x)
    rgrad = stiefel.riemannian_gradient(x, g, metric)
    weight = torch.eye(12, dtype=torch.float64) - (0.5 * x @ x.T if metric == "canonical" else 0)
    for _ in range(5):
        v = stiefel.project(x, torch.randn_like(x))
        assert float((rgrad * (weight @ v)).sum()) == pytest.approx(float((g * v).sum()), abs=1e-12)
    assert float((x.T @ rgrad + rgrad.T @ x).norm()) < 1e-13 * float(g.norm()) * 10


@pytest.mark.parametrize("length", [1e-8, 1e-3, 0.3, 1.5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_retraction_matches_the_dense_reference(method: str, shape: tuple[int, int], length: float) -> None:
    x = stiefel.random_point(*shape, dtype=torch.float64)
    u = tangent(x, length)
    new = stiefel.retract(x, u, method)
    torch.testing.assert_close(new, reference.RETRACTIONS[method](x, u), atol=1e-10, rtol=0)
    # float64 rounding of r x r Gram matrices, with room.
    assert gram_error(new) < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_batched_retraction_is_the_one_of_each_matrix(method: str) -> None:
    x = stiefel.random_point(12, 4, batch=(2, 3), dtype=torch.float64)
    u = tangent(x, 0.7)
    new = stiefel.retract(x, u, method)
    assert new.shape == (2, 3, 12, 4)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(new[i, j], stiefel.retract(x[i, j], u[i, j], method), atol=1e-14, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_retracted_in_float32(method: str, dtype: torch.dtype) -> None:
    x, u = stiefel.random_point(12, 4, dtype=dtype), (0.1 * torch.randn(12, 4)).to(dtype)
    assert torch.equal(stiefel.retract(x, u, method), stiefel.retract(x.float(), u.float(), method).to(dtype))


@pytest.mark.parametrize("method", METHODS)
def test_retraction_into_given_memory_is_the_same(method: str) -> None:
    x = stiefel.random_point(12, 4, batch=(3,), dtype=torch.float64)
    u = tangent(x, 0.7)
    scale = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)[:, None, None]
    expected = stiefel.retract(x, scale * u, method)
    into, work, before = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan), (x.clone(), u.clone())
    assert stiefel.retract_(x, u, scale, method, work=work, into=into) is into
    torch.testing.assert_close(into, expected, atol=1e-14, rtol=0)
    one = stiefel.retract_(x[2], u[2], -2.0, method, work=work[2], into=into[2])
    torch.testing.assert_close(one, expected[2], atol=1e-14, rtol=0)
    assert torch.equal(x, before[0])
    assert torch.equal(u, before[1])
    # The direction itself may be what is written over.
    stiefel.retract_(x, u, scale, method, work=u, into=into)
    torch.testing.assert_close(into, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [40, 4096, 2048 + 24])
def test_what_an_accelerator_computes_is_the_same(method: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner products of many rows in blocks, and inverses that do not wait; steps of up to a quarter turn."""
    x = stiefel.random_point(n, 6, batch=(3,), dtype=torch.float64)
    u = torch.stack([tangent(x[0], 0.3), tangent(x[1], 6**0.5 * torch.pi / 2), 0 * x[2]])
    expected = stiefel.retract(x, u, method)
    monkeypatch.setattr(stiefel, "reads_at_no_cost", lambda _: False)
    moves, scale = torch.tensor([True, True, False]), torch.ones(3, 1, 1, dtype=x.dtype)
    into = torch.full_like(x, torch.nan)
    stiefel.retract_(x, u, scale, method, work=torch.empty_like(x), into=into, moves=moves)
    torch.testing.assert_close(into[:2], expected[:2], atol=1e-13, rtol=0)
    assert torch.equal(into[2], x[2])


def test_an_inverse_that_does_not_wait_is_the_inverse() -> None:
    # Of a Cayley transform of the longest step, all in one direction, which makes its condition the largest.
    x = stiefel.random_point(50, 16)
    u = stiefel.project(x, torch.outer(torch.randn(50), torch.randn(16)))
    u *= 16**0.5 * torch.pi / 2 / u.norm()
    s = x.T @ u
    z = torch.eye(16) - s / 2 + (u.T @ u + s @ s) / 4
    assert torch.linalg.cond(z) > 5
    product = z.double() @ stiefel._inverse_without_waiting(z).double()
    # The condition, of at most 12, times the rounding of a sum of 16 products.
    torch.testing.assert_close(product, torch.eye(16).double(), atol=12 * 16 * 6e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [50, 2000])
def test_a_matrix_alone_is_retracted_in_place_at_any_size(n: int, dtype: torch.dtype) -> None:
    # The triangular factor is divided by or inverted, whichever is faster.
    x = stiefel.random_point(n, 5, dtype=dtype)
    u = tangent(x, 1.5)
    expected = stiefel.retract(x.double(), -u.double(), "qr")
    assert stiefel.retract_(x, u, -1.0, "qr", work=u, into=x) is x
    # A few roundings of entries below one, through a factor of condition 1 + 1.5^2.
    torch.testing.assert_close(x.double(), expected, atol=10 * torch.finfo(dtype).eps, rtol=0)
    # Of sums over n products.
    assert stiefel.orthogonality_error(x) < 2 * n**0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("method", "order"), [("qr", 2), ("cayley", 2), ("polar", 3), ("exp", 3)])
def test_order_of_the_retraction(method: str, order: int) -> None:
    """|R(tU) - geodesic(tU)| falls as t^2 for a first-order retraction and as t^3 for a second-order one.

    A retraction with a wrong derivative at zero (such as a Cayley transform without the - X S X^T term) has slope 1.
    Against the geodesic itself "exp" would be zero, so it is held against its Taylor expansion, whose normal
    acceleration is -X U^T U under the Euclidean metric.
    """
    x = stiefel.random_point(12, 4, dtype=torch.float64)
    u = tangent(x, 1.0)
    # From 0.5 down to where t^3 is still far above float64 rounding.
    steps = torch.logspace(-3, -1, 9, dtype=torch.float64)
    errors = []
    for t in steps:
        expansion = x + t * u - t**2 / 2 * x @ (u.T @ u)
        errors.append(float((stiefel.retract(x, t * u, method) - expansion).norm()))
    logs = torch.tensor(errors, dtype=torch.float64).log()
    centred = steps.log() - steps.log().mean()
    slope = float((centred * logs).sum() / (centred**2).sum())
    assert slope == pytest.approx(order, abs=0.1)


def test_cayley_is_second_order_on_the_canonical_geodesic() -> None:
    """The Cayley curve has the acceleration W^2 X, that of the canonical metric's geodesic, not the Euclidean one's."""
    x = stiefel.random_point(12, 4, dtype=torch.float64)
    u = tangent(x, 1.0)
    eye = torch.eye(12, dtype=torch.float64)
    p = eye - x @ x.T / 2
    w = p @ u @ x.T - x @ u.T @ p
    t = 1e-3
    # The next term of the expansion is t^3 |W|^3 / 4, and |W| is at most sqrt(2) here.
    expansion = x + t * u + t**2 / 2 * w @ w @ x
    assert float((stiefel.retract(x, t * u, "cayley") - expansion).norm()) < t**3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_of_the_point_is_corrected(method: str, dtype: torch.dtype) -> None:
    x = stiefel.random_point(64, 8, dtype=dtype)
    off = x + 1e-4 * torch.randn_like(x)
    error = gram_error(off)
    new = stiefel.retract(off, tangent(x, 0.01), method)
    # QR and polar remove the error; one Newton-Schulz factor leaves 3/4 of its square, what of the step (of length
    # 0.01) is not tangent at the corrected point, and the rounding of the dtype.
    assert gram_error(new) < error * (error + 0.01) + 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4096, 32), (7, 7)])
def test_quarter_turn_in_float32_stays_on_the_manifold(method: str, shape: tuple[int, int]) -> None:
    x = stiefel.random_point(*shape)
    new = stiefel.retract(x, tangent(x, math.pi / 2 * math.sqrt(shape[1])), method)
    # eps (1 + |U|_2^2) in each of r directions, with room for the sums over n.
    assert gram_error(new) < 3e-5


def test_polar_is_the_same_with_and_without_a_derivative() -> None:
    """At U = 0, too, where all eigenvalues of the Gram matrix are equal."""
    x = stiefel.random_point(12, 4, batch=(3,), dtype=torch.float64)
    u = stiefel.project(x, torch.randn_like(x))
    u[1] = 0
    in_place = stiefel.retract_(x, u, 1.0, "polar", work=torch.empty_like(x), into=torch.empty_like(x))
    torch.testing.assert_close(in_place, stiefel.retract(x, u, "polar"), atol=1e-13, rtol=0)
    u.requires_grad_()
    stiefel.retract(x, u, "polar").square().sum().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_retraction_is_equivariant(method: str) -> None:
    """R_{QXV}(QUV) = Q R_X(U) V for orthogonal Q; V any rotation of the columns, except for QR (R is triangular)."""
    x = stiefel.random_point(12, 4, dtype=torch.float64)
    u = tangent(x, 0.7)
    q = stiefel.random_point(12, 12, dtype=torch.float64)
    v = torch.eye(4, dtype=torch.float64) if method == "qr" else stiefel.random_point(4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        stiefel.retract(q @ x @ v, q @ u @ v, method), q @ stiefel.retract(x, u, method) @ v, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_retraction_can_be_differentiated(method: str) -> None:
    x = stiefel.random_point(5, 2, dtype=torch.float64)
    u = tangent(x, 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: stiefel.retract(x, v, method), (u,))


def test_random_points_are_orthonormal_and_reproducible() -> None:
    for dtype, bound in [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]:
        x = stiefel.random_point(64, 8, batch=(2,), dtype=dtype, generator=torch.Generator().manual_seed(3))
        assert x.shape == (2, 64, 8)
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert float(stiefel.orthogonality_error(x).max()) < bound
    again = stiefel.random_point(64, 8, batch=(2,), dtype=dtype, generator=torch.Generator().manual_seed(3))
    assert torch.equal(x, again)


def test_random_points_are_haar_distributed() -> None:
    """Both signs appear for r = n = 1, where an uncorrected QR gives one, and E[X_ij] = 0, E[X_ij^2] = 1/n."""
    signs = stiefel.random_point(1, 1, batch=(400,)).sign().mean()
    assert abs(float(signs)) < 0.25  # five standard deviations of a fair coin
    x = stiefel.random_point(6, 3, batch=(4000,), dtype=torch.float64)
    # Each mean of 4000 squares has a standard deviation below 0.004; 18 of them, five deviations.
    torch.testing.assert_close((x**2).mean(0), torch.full((6, 3), 1 / 6, dtype=torch.float64), atol=0.02, rtol=0)
    torch.testing.assert_close(x.mean(0), torch.zeros(6, 3, dtype=torch.float64), atol=0.035, rtol=0)


def test_orthogonality_error_is_the_frobenius_norm() -> None:
    x = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    assert float(stiefel.orthogonality_error(x)) == pytest.approx(math.sqrt(9 + 1))


def test_project_point_is_the_polar_factor() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    point = stiefel.project_point(x)
    for i in range(2):
        expected = reference.polar(x[i], torch.zeros_like(x[i]))
        torch.testing.assert_close(point[i], expected, atol=1e-13, rtol=0)


def test_effective_rank() -> None:
    assert float(stiefel.effective_rank(torch.eye(5))) == pytest.approx(5)
    assert float(stiefel.effective_rank(torch.ones(4, 3))) == pytest.approx(1, abs=1e-4)
    assert float(stiefel.effective_rank(torch.zeros(4, 3))) == 0
    assert float(stiefel.effective_rank(torch.full((10, 10), 1e38))) == pytest.approx(1, abs=1e-4)
    with pytest.raises(InputError, match="must be real, got torch.complex64"):
        stiefel.effective_rank(torch.eye(3, dtype=torch.complex64))
    with pytest.raises(InputError, match="must be real, got torch.complex64"):
        stiefel.orthogonality_error(torch.eye(3, dtype=torch.complex64))
    broken = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan), torch.full((3, 3), torch.inf)])
    ranks = stiefel.effective_rank(broken)
    assert ranks[0] == pytest.approx(3)
    assert ranks[1:].isnan().all()
    with pytest.raises(InputError, match=r"shape \(\.\.\., m, n\), got \(3,\)"):
        stiefel.effective_rank(torch.ones(3))
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    entropy = -(p * p.log()).sum()
    both = torch.stack((torch.diag(4 * p), torch.eye(3, dtype=torch.float64)))
    expected = torch.stack((entropy.exp(), torch.tensor(3.0, dtype=torch.float64)))
    torch.testing.assert_close(stiefel.effective_rank(both), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stiefel.random_point(3, 4), "r must be in"),
        (lambda: stiefel.random_point(3, 0), "r must be in"),
        (lambda: stiefel.project(torch.eye(3), torch.eye(2)), "one shape"),
        (lambda: stiefel.project(torch.ones(2, 3), torch.ones(2, 3)), r"got \(2, 3\); transpose it"),
        (lambda: stiefel.orthogonality_error(torch.ones(3)), r"got \(3,\)"),
        (lambda: stiefel.retract(torch.eye(3), torch.zeros(3, 3), "svd"), "'qr', 'cayley', 'polar', 'exp', got 'svd'"),
        (lambda: stiefel.riemannian_gradient(torch.eye(3), torch.eye(3), "flat"), "metric must be one of"),
        (lambda: stiefel.project_point(torch.ones(3, 2)), "rank-deficient"),
        (lambda: stiefel.project_point(torch.full((3, 2), torch.nan)), "NaN"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
