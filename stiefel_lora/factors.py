"""The factors of one low-rank update, B A^T or B S A^T: their shapes and sizes, and how they are had from a matrix."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from stiefel_lora._precision import exact_products, wide_dtype
from stiefel_lora._types import Orthonormal
from stiefel_lora.errors import InputError
from stiefel_lora.stiefel import effective_rank, orthogonality_error

# The factors that lie on the manifold, by the value of `orthonormal`.
CONSTRAINED: dict[str, tuple[str, ...]] = {"A": ("lora_A",), "B": ("lora_B",), "both": ("lora_A", "lora_B")}
# The factor that starts at zero and carries the size of the update.
FREE: dict[str, str] = {"A": "lora_B", "B": "lora_A", "both": "lora_S"}


def factor_shapes(n_in: int, n_out: int, rank: int, orthonormal: str) -> dict[str, tuple[int, int]]:
    """Return the shapes of the factors of one update, by name."""
    shapes = {"lora_A": (n_in, rank), "lora_B": (n_out, rank)}
    return {**shapes, "lora_S": (rank, rank)} if orthonormal == "both" else shapes


def folded(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A and B of the update B A^T, with S, if there is one, folded into B.

    Raises:
        InputError: If one is not a parameter, and so not among the factors.
    """
    for name in ("lora_A", "lora_B"):
        if name not in factors:
            raise InputError(
                f"{name} of an adapter is computed from another parameter (it is parametrized or pruned) and cannot be "
                f"merged or saved as it is; call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) "
                "or torch.nn.utils.prune.remove first"
            )
    a, b = factors["lora_A"], factors["lora_B"]
    if "lora_S" not in factors:
        return a, b
    with exact_products([b.device.type]):
        return a, b @ factors["lora_S"]


def adapter_size(n_in: int, n_out: int, rank: int, orthonormal: str = "A") -> int:
    """Return the number of parameters of one update."""
    return sum(rows * columns for rows, columns in factor_shapes(n_in, n_out, rank, orthonormal).values())


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """Return what an update is multiplied by: alpha / rank, or rsLoRA's alpha / sqrt(rank)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def leading_singular_vectors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading right and left singular vectors of a matrix, and their singular values.

    They come from an eigendecomposition of the smaller Gram matrix, several times cheaper than an SVD of a weight.

    Args:
        matrix: Shape (out, in), finite.
        rank: How many, at most min(out, in).

    Returns:
        Orthonormal columns (in, rank) and (out, rank), and values (rank,), in the promoted type of the matrix and
        float32. Where the matrix has a rank below ``rank``, the rest completes the basis.

    Raises:
        InputError: If the matrix has a NaN or infinity.
    """
    wide = matrix.detach().to(wide_dtype(matrix.dtype))
    if not wide.isfinite().all():
        raise InputError(f"cannot take singular vectors of a matrix of shape {tuple(wide.shape)} with NaN or infinity")
    if wide.shape[0] < wide.shape[1]:
        left, right, values = leading_singular_vectors(wide.T, rank)
        return right, left, values
    # The Gram matrix has the squares, which must neither overflow nor vanish. A power of two costs no rounding.
    largest = wide.abs().max()
    size = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    size = size.clamp(min=torch.finfo(wide.dtype).smallest_normal)
    wide = wide / size
    with exact_products([wide.device.type]):
        right = torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(-1)[:, :rank]
        # The squares have lost the directions of values below the root of the rounding. An iteration with W itself, as
        # W v = s u and W^T u = s v, finds them, to some eps of the largest value; QR completes the bases below.
        left = torch.linalg.qr(wide @ right).Q
        right, core = torch.linalg.qr(wide.T @ left)
        inner = torch.linalg.svd(core.T)
        return right @ inner.Vh.T, left @ inner.U, size * inner.S


def orthonormal_factors(a: Tensor, b: Tensor, orthonormal: Orthonormal = "A") -> dict[str, Tensor]:
    """Factor the product B A^T again, with the wanted factors orthonormal; computed in float64.

    Args:
        a: Shape (in, r), of any rank.
        b: Shape (out, r).
        orthonormal: Which factor to make orthonormal.

    Returns:
        ``lora_A`` (in, k) and ``lora_B`` (out, k), and for "both" ``lora_S`` (k, k), with k = min(r, in, out) and
        lora_B [lora_S] lora_A^T = B A^T; float64 if ``a`` is, else float32.
    """
    left, upper = torch.linalg.qr(a.double())
    right = b.double() @ upper.T
    if right.shape[1] > right.shape[0]:
        inner, lower = torch.linalg.qr(right.T)
        left, right = left @ inner, lower.T
    factors = {"lora_A": left, "lora_B": right}
    if orthonormal != "A":
        q, upper = torch.linalg.qr(right)
        factors = (
            {"lora_A": left @ upper.T, "lora_B": q}
            if orthonormal == "B"
            else {"lora_A": left, "lora_B": q, "lora_S": upper}
        )
    return {name: factor.to(wide_dtype(a.dtype)).contiguous() for name, factor in factors.items()}


def manifold_error(factors: Mapping[str, Tensor], orthonormal: Orthonormal) -> float:
    """Return the greatest |X^T X - I|_F of the constrained factors of one update."""
    return max(float(orthogonality_error(factors[name])) for name in CONSTRAINED[orthonormal])


def rounding_error(factor: Tensor) -> float:
    """Return how far off the manifold, |X^T X - I|_F, rounding alone may put a factor."""
    return torch.finfo(factor.dtype).eps * sum(factor.shape)


def factor_metrics(factors: Mapping[str, Tensor], orthonormal: Orthonormal) -> dict[str, float]:
    """Measure the factors of one update.

    Args:
        factors: lora_A, lora_B, and lora_S if both are orthonormal.
        orthonormal: Which of them are constrained.

    Returns:
        "orthogonality_error": as `manifold_error`; "effective_rank": that of the update, which is that of its free
        factor (0 while it is zero).
    """
    error, rank = manifold_error(factors, orthonormal), float(effective_rank(factors[FREE[orthonormal]]))
    return {"orthogonality_error": error, "effective_rank": rank}
