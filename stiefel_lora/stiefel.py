"""Geometry of the Stiefel manifold St(n, r) = {X in R^(n x r) : X^T X = I}.

Pure functions on tensors of shape (..., n, r) with n >= r; leading dimensions are a batch of independent points.
Nothing larger than the given n x r tensors is built: every r x r matrix below is a Gram matrix of them. The public
functions compute in the precision of their arguments, under autocast and with TF32 or bf16 products allowed as well.

References:
    [AMS] Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", Princeton 2008.
    [EAS] Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIAM J. Matrix Anal. 1998.
    [WY] Wen, Yin, "A feasible method for optimization with orthogonality constraints", Math. Program. 2013.
    [CHKL] Cheng, Higham, Kenney, Laub, "Approximating the logarithm of a matrix ...", SIAM J. Matrix Anal. 2001.
    [RV] Roy, Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from stiefel_lora._precision import exact_products, reads_at_no_cost, wide_dtype
from stiefel_lora._types import Metric, Retraction
from stiefel_lora.errors import InputError, check_choice

# Iterations of the product Denman-Beavers recursion in `_inverse_sqrt`. After its scaling the eigenvalues of I + U^T U
# lie in [k^-1/2, k^1/2] with k = 1 + |U|^2. The first steps bring them closer to 1 by a factor of about 4 each: seven
# do for k = 1e8, and five more, which are quadratic, reach float64 rounding.
_DENMAN_BEAVERS_STEPS = 12


# From how many rows on `_inner` cuts them into blocks, and the least number of rows of one.
_BLOCKED_ROWS, _BLOCK_ROWS = 2048, 256

# Up to so many entries of a float32 matrix a triangular solve takes no longer than the product with an inverse.
_SOLVED_ENTRIES = 6000

METRICS: tuple[Metric, ...] = get_args(Metric)


def sym(z: Tensor) -> Tensor:
    """Return the symmetric part (Z + Z^T)/2 of square matrices, shape (..., r, r)."""
    return (z + z.mT) / 2


def _eye_like(z: Tensor) -> Tensor:
    return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)


def project(x: Tensor, g: Tensor) -> Tensor:
    """Project ambient vectors onto the tangent space at ``x``: P_X(G) = G - X sym(X^T G).

    The projection is orthogonal under the Euclidean and the canonical metric alike. It is the Riemannian gradient of
    a function with Euclidean gradient ``g`` under the Euclidean metric, and the vector transport used throughout.

    Args:
        x: Points with orthonormal columns, shape (..., n, r).
        g: Ambient vectors, same shape.

    Returns:
        Tangent vectors U at ``x``, shape (..., n, r): X^T U + U^T X = 0.

    Reference: [AMS], example 3.6.2.
    """
    _check_pair(x, g)
    with exact_products([x.device.type]):
        return g - x @ sym(x.mT @ g)


def project_(x: Tensor, g: Tensor, out: Tensor | None = None) -> Tensor:
    """Project ``g`` as ``project`` does, into ``out`` or else in place, and return that; all ([k,] n, r)."""
    z = _inner(x, g)
    return add_product(g, x, z + z.transpose(-2, -1), -0.5, g if out is None else out)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return A^T B; of single matrices without the detours that ``mT`` and ``@`` are, which count for small ones."""
    if a.dim() == 2:
        return torch.mm(a.t(), b)
    blocks = 1 if a.dim() != 3 or reads_at_no_cost(a) else _row_blocks(a.shape[1])
    if blocks == 1 or not (a.is_contiguous() and b.is_contiguous()):
        return a.mT @ b
    k, n, r = a.shape
    a, b = (z.view(k * blocks, n // blocks, r) for z in (a, b))
    return (a.mT @ b).view(k, blocks, r, r).sum(1)


def _row_blocks(n: int) -> int:
    """Return into how many blocks of rows, all alike, an inner product on an accelerator is cut.

    Its matrix product computes each r x r result in one place, one row after the other. With the blocks side by side
    the products of LLaMA-3.1-8B's matrices of rank 32 took a tenth of the time on an H100.
    """
    blocks = 1
    while n >= _BLOCKED_ROWS and n % (2 * blocks) == 0 and n // (2 * blocks) >= _BLOCK_ROWS:
        blocks *= 2
    return blocks


def add_product(z: Tensor, a: Tensor, b: Tensor, alpha: float, out: Tensor) -> Tensor:
    """Write Z + alpha A B into ``out``, which may be ``z``; matrices or batches of them, (k, ., .). Returns it."""
    return (torch.addmm if z.dim() == 2 else torch.baddbmm)(z, a, b, alpha=alpha, out=out)


def riemannian_gradient(x: Tensor, g: Tensor, metric: Metric = "euclidean") -> Tensor:
    """Turn a Euclidean gradient into the Riemannian gradient at ``x``.

    Args:
        x: Points with orthonormal columns, shape (..., n, r).
        g: Euclidean gradients, same shape.
        metric: "euclidean" (G - X sym(X^T G)) or "canonical" (G - X G^T X, [EAS] equation 2.53).

    Returns:
        Tangent vectors at ``x``, shape (..., n, r).

    Raises:
        InputError: If the shapes differ or the metric is unknown.
    """
    check_choice("metric", metric, METRICS)
    if metric == "euclidean":
        return project(x, g)
    _check_pair(x, g)
    with exact_products([x.device.type]):
        return g - x @ (g.mT @ x)


def riemannian_gradient_(x: Tensor, g: Tensor, metric: str, out: Tensor) -> Tensor:
    """Write what ``riemannian_gradient`` gives into ``out``, which may be ``g``, and return it; all ([k,] n, r)."""
    return add_product(g, x, _inner(g, x), -1, out) if metric == "canonical" else project_(x, g, out)


def retract(x: Tensor, u: Tensor, method: Retraction = "qr") -> Tensor:
    """Move from ``x`` along the tangent vector ``u`` and return to the Stiefel manifold.

    Args:
        x: Points with orthonormal columns, shape (..., n, r), n >= r.
        u: Tangent vectors at ``x``, same shape, dtype and device; a step, so already scaled by the learning rate.
        method: A key of ``RETRACTIONS``. All agree with x + u to first order; "polar" and "exp" to second.
            "qr": the Q factor of x + u with a positive diagonal of R. "polar": the nearest point to x + u.
            "cayley": the Cayley transform of the skew n x n matrix W with W x = u, applied to x. "exp": the geodesic
            of the Euclidean metric.

    Returns:
        New points, shape (..., n, r). |X^T X - I|_F is a few eps * sqrt(r) for steps of up to about a quarter turn and
        grows like eps * |u|_2^2 beyond ("polar": up to |u|_2 = 1e4); an error of ``x`` itself is corrected, not
        carried on. bf16 and fp16 are computed in float32.

    Raises:
        InputError: If the shapes differ, n < r, or the method is unknown.

    Reference: [AMS], section 4.1; for "cayley" [WY], for "exp" [EAS] equation 2.42 (due to R. Lippert).
    """
    _check_pair(x, u)
    check_choice("retraction", method, tuple(RETRACTIONS))
    function, of_sum = RETRACTIONS[method]
    wide = wide_dtype(x.dtype)
    y, v = x.to(wide), u.to(wide)
    with exact_products([x.device.type]):
        return (function(y + v) if of_sum else function(y, v)).to(x.dtype)


def retract_(
    x: Tensor,
    direction: Tensor,
    scale: Tensor | float,
    method: Retraction,
    *,
    work: Tensor,
    into: Tensor,
    moves: Tensor | None = None,
) -> Tensor:
    """Write what ``retract`` gives for the step scale * direction into ``into``, and return it.

    Args:
        x: Points, shape ([k,] n, r).
        direction: Tangent vectors at ``x``, same shape.
        scale: One number for each matrix, shape (k, 1, 1); or one number.
        method: A key of ``RETRACTIONS``.
        work: Scratch memory of the same shape; may be ``direction``.
        into: Where the new points go; ``x`` itself is possible if the retraction is one of the sum x + u alone.
        moves: Which points move, shape (k,); the others, whose scale is zero, stay to the very bit. None: all do.
    """
    function, of_sum = RETRACTIONS[method]
    if not of_sum:
        return function(x, torch.mul(direction, scale, out=work), into, moves)
    if isinstance(scale, Tensor):
        return function(torch.addcmul(x, direction, scale, out=work), into, moves)
    return function(torch.add(x, direction, alpha=scale, out=work), into, moves)


# Each retraction below is a function of x and u, or of their sum y = x + u alone. With ``into`` given, all of shape
# ([k,] n, r), it writes the new point there; without, it allocates and can be differentiated. Where ``moves``, shape
# (k,), is false, u is zero and the factor that x is multiplied by, which rounding leaves next to I, is I.


def _qr(y: Tensor, into: Tensor | None = None, moves: Tensor | None = None) -> Tensor:
    # CholeskyQR. Y^T Y = I + U^T U >= I, so its condition is 1 + |U|^2 and one pass is enough. Y^T Y is measured, not
    # assumed, so an error of x is removed here instead of piling up.
    chol, _ = torch.linalg.cholesky_ex(_inner(y, y))
    if into is not None and y.dim() == 2 and (y.dtype == torch.float64 or y.numel() <= _SOLVED_ENTRIES):
        return torch.linalg.solve_triangular(chol.t(), y, upper=True, left=False, out=into)
    eye = _eye_like(chol)
    return torch.matmul(y, _or_eye(torch.linalg.solve_triangular(chol, eye, upper=False).mT, eye, moves), out=into)


def _polar(y: Tensor, into: Tensor | None = None, moves: Tensor | None = None) -> Tensor:
    gram = _inner(y, y)
    if into is None:
        root = _inverse_sqrt(gram)
    elif reads_at_no_cost(gram):
        root = _inverse_sqrt_by_eigenvalues(gram)
    else:
        root = _inverse_sqrt(gram, _inverse_without_waiting)
    return torch.matmul(y, _or_eye(root, _eye_like(root), moves), out=into)


def _cayley(x: Tensor, u: Tensor, into: Tensor | None = None, moves: Tensor | None = None) -> Tensor:
    # (I - W/2)^-1 (I + W/2) X = X (I - Q B / 2) + U B with S = X^T U, Q = U^T (I - X X^T) U and
    # B = (I - S/2 + Q/4)^-1. The symmetric part of B^-1 is I + Q/4 >= I: never singular, however long the step.
    repair, s, h, n = _tangent_grams(x, u)
    eye = _eye_like(s)
    q = n + s @ s
    inverse = _inverse if into is None or reads_at_no_cost(x) else _inverse_without_waiting
    b = inverse(eye - s / 2 + q / 4)
    return _combine(x, _or_eye(repair @ (eye - q @ b / 2 - h @ b), eye, moves), u, b, into)


def _exp(x: Tensor, u: Tensor, into: Tensor | None = None, moves: Tensor | None = None) -> Tensor:
    # [X U] expm([[S, -U^T U], [I, S]]) [expm(-S); 0]. U / t in place of U is a similarity of the 2r x 2r matrix
    # that brings its norm from |U|^2 down to |U|.
    r = x.shape[-1]
    repair, s, h, n = _tangent_grams(x, u)
    t = torch.linalg.matrix_norm(u, keepdim=True).clamp_min(1)
    top = torch.cat((s, n / -t), dim=-1)
    eye = _eye_like(s)
    bottom = torch.cat((t * eye, s), dim=-1)
    flow = torch.linalg.matrix_exp(torch.cat((top, bottom), dim=-2))[..., :r] @ torch.linalg.matrix_exp(-s)
    c1, c2 = flow.split(r, dim=-2)
    c2 = c2 / t
    # A matrix exponential errs by a few eps of its largest entries; one Newton-Schulz step takes that out of the point.
    fix = _newton_schulz(sym(c1.mT @ (c1 + 2 * s @ c2)) + c2.mT @ n @ c2)
    return _combine(x, _or_eye(repair @ (c1 - h @ c2) @ fix, eye, moves), u, c2 @ fix, into)


class _Method(NamedTuple):
    function: Callable[..., Tensor]
    of_sum: bool


RETRACTIONS = {
    "qr": _Method(_qr, of_sum=True),
    "cayley": _Method(_cayley, of_sum=False),
    "polar": _Method(_polar, of_sum=True),
    "exp": _Method(_exp, of_sum=False),
}


def _or_eye(factor: Tensor, eye: Tensor, moves: Tensor | None) -> Tensor:
    return factor if moves is None else torch.where(moves[:, None, None], factor, eye)


def _combine(x: Tensor, c1: Tensor, u: Tensor, c2: Tensor, into: Tensor | None) -> Tensor:
    """Return X C1 + U C2."""
    return x @ c1 + u @ c2 if into is None else add_product(torch.matmul(x, c1, out=into), u, c2, 1, into)


def _tangent_grams(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what a retraction needs that relies on U being tangent, which it is only up to rounding.

    Where a gradient is almost normal to the manifold, as near an optimum, its projection has lost most of its digits,
    and the step would leave the manifold by what is left of the normal part. So U is replaced by V = U - X H.

    Returns:
        The factor that repairs X, S = X^T V (skew), H = sym(X^T U), and V^T V, all (..., r, r).
    """
    repair = _newton_schulz(_inner(x, x))
    z = repair @ _inner(x, u)
    h = sym(z)
    return repair, z - h, h, _inner(u, u) - z.mT @ h - h @ z + h @ h


def _newton_schulz(gram: Tensor) -> Tensor:
    """Return (3 I - X^T X)/2 for a Gram matrix X^T X: X times it has the square of the orthogonality error of X."""
    return (3 * _eye_like(gram) - gram) / 2


def _inverse(z: Tensor) -> Tensor:
    return torch.linalg.inv_ex(z).inverse


def _inverse_without_waiting(z: Tensor) -> Tensor:
    """Return Z^-1 of matrices with a symmetric part of at least I and norms as a step of the optimizers makes them.

    On CUDA the LU factorization of an inverse is, for some sizes (32 x 32), one that waits for the device. Through the
    Cholesky factor of Z^T Z it squares Z's condition, at most 200 for steps of a quarter turn and 256 columns, and one
    Newton step makes up for that.
    """
    eye = _eye_like(z)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(z.mT @ z)[0], eye, upper=False)
    inverse = half.mT @ (half @ z.mT)
    return inverse @ (2 * eye - z @ inverse)


def _inverse_sqrt(a: Tensor, inverse_of: Callable[[Tensor], Tensor] = _inverse) -> Tensor:
    """Return A^(-1/2) of symmetric positive definite matrices, shape (..., r, r).

    The product form of the Denman-Beavers iteration ([CHKL], equation 3.1): a fixed number of r x r inversions by the
    given function, where an eigendecomposition would wait for the device. It can be differentiated.
    """
    eye = _eye_like(a)
    scale = torch.linalg.matrix_norm(a, keepdim=True).sqrt()
    m = a / scale
    root = eye.expand_as(a)
    for _ in range(_DENMAN_BEAVERS_STEPS):
        inverse = sym(inverse_of(m))
        root = root @ (eye + inverse) / 2
        m = (2 * eye + m + inverse) / 4
    return root / scale.sqrt()


def _inverse_sqrt_by_eigenvalues(a: Tensor) -> Tensor:
    """Return what `_inverse_sqrt` returns, where waiting costs nothing and no derivative is asked for.

    That of an eigendecomposition is infinite where eigenvalues meet, as at U = 0.
    """
    try:
        # In float64 it costs the same and leaves the rounding of A alone.
        values, vectors = torch.linalg.eigh(a.double())
    except torch.linalg.LinAlgError:  # a NaN in one matrix of the batch, whose others are to go on
        return _inverse_sqrt(a)
    return ((vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT).to(a.dtype)


def project_point(x: Tensor) -> Tensor:
    """Return the point of the Stiefel manifold nearest to ``x``: the orthonormal polar factor of its SVD.

    Args:
        x: Matrices of full column rank, shape (..., n, r), n >= r.

    Returns:
        Points with orthonormal columns, same shape, dtype and device; bf16 and fp16 are computed in float32.

    Raises:
        InputError: If n < r, or ``x`` has a NaN or infinity, or is rank deficient (no nearest point is unique then).
    """
    check_tall(x)
    wide = x.to(wide_dtype(x.dtype))
    if not wide.isfinite().all():
        raise InputError(f"cannot project a matrix of shape {tuple(x.shape)} with NaN or infinite entries")
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    if (s[..., -1] <= s[..., 0] * torch.finfo(wide.dtype).eps * x.shape[-2]).any():
        raise InputError(f"cannot project a rank-deficient matrix of shape {tuple(x.shape)}: its columns are dependent")
    with exact_products([x.device.type]):
        return (u @ vh).to(x.dtype).contiguous()


def random_point(
    n: int,
    r: int,
    *,
    batch: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw points uniformly (Haar measure) from St(n, r).

    Args:
        n: Number of rows.
        r: Number of columns, at most ``n``.
        batch: Leading dimensions.
        dtype: Floating dtype, default torch's; bf16 and fp16 are drawn in float32 and rounded.
        device: Where the points live.
        generator: Source of randomness.

    Returns:
        Points, shape (*batch, n, r).

    Raises:
        InputError: If not 1 <= r <= n.
    """
    if not 1 <= r <= n:
        raise InputError(f"r must be in [1, n] for points of St(n, r), got n={n}, r={r}")
    dtype = dtype or torch.get_default_dtype()
    wide = wide_dtype(dtype)
    gauss = torch.randn(*batch, n, r, dtype=wide, device=device, generator=generator)
    q, upper = torch.linalg.qr(gauss)
    # Without the signs LAPACK's Q is not Haar distributed (Mezzadri, Notices of the AMS 2007).
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(wide)
    # LAPACK's Q is column-major; every other tensor a point meets is row-major.
    return (q * signs.unsqueeze(-2)).to(dtype).contiguous()


def orthogonality_error(x: Tensor) -> Tensor:
    """Return |X^T X - I|_F for each matrix, shape x.shape[:-2]; bf16 and fp16 are measured in float32."""
    check_tall(x)
    wide = x.detach().to(wide_dtype(x.dtype))
    with exact_products([x.device.type]):
        gram = wide.mT @ wide
    return torch.linalg.matrix_norm(gram - _eye_like(gram))


def effective_rank(x: Tensor) -> Tensor:
    """Return the effective rank of matrices: the exponential of the entropy of their normalised singular values.

    Between 1 (rank one) and min(m, n) (all singular values equal); 0 for a zero matrix, NaN for one with a NaN or
    infinity.

    Args:
        x: Matrices, shape (..., m, n); bf16 and fp16 are measured in float32.

    Returns:
        Effective ranks, shape x.shape[:-2].

    Raises:
        InputError: If ``x`` has fewer than two dimensions, or is complex.

    Reference: [RV].
    """
    if x.dim() < 2:
        raise InputError(f"matrices have a shape (..., m, n), got {tuple(x.shape)}")
    _check_real(x)
    wide = x.detach().to(wide_dtype(x.dtype))
    finite = wide.isfinite().all(-1).all(-1)
    wide = torch.where(finite[..., None, None], wide, 0)
    if wide.numel():
        # The sum of the values must not overflow.
        largest = wide.abs().amax((-2, -1), keepdim=True)
        wide = wide / torch.where(largest > 0, largest, 1)
    s = torch.linalg.svdvals(wide)
    total = s.sum(-1, keepdim=True)
    p = s / torch.where(total > 0, total, 1)
    rank = torch.special.entr(p).sum(-1).exp() * (total.squeeze(-1) > 0)
    return rank.masked_fill(~finite, torch.nan)


def _check_real(x: Tensor) -> None:
    if x.is_complex():
        raise InputError(f"a matrix must be real, got {x.dtype}")


def check_tall(x: Tensor) -> None:
    """Raise InputError unless ``x`` is real and its last two dimensions (n, r) have n >= r >= 1."""
    _check_real(x)
    if x.dim() < 2 or not 1 <= x.shape[-1] <= x.shape[-2]:
        raise InputError(
            f"a point of the Stiefel manifold is tall, shape (..., n, r) with n >= r >= 1, got {tuple(x.shape)}"
            + ("; transpose it" if x.dim() >= 2 and x.shape[-1] > x.shape[-2] >= 1 else "")
        )


def _check_pair(x: Tensor, u: Tensor) -> None:
    check_tall(x)
    if x.shape != u.shape:
        raise InputError(f"a point and its vectors have one shape, got {tuple(x.shape)} and {tuple(u.shape)}")
