"""Dense references for the geometry of the Stiefel manifold: one matrix at a time, n x n where the formula says so."""

import torch
from torch import Tensor


def project(x: Tensor, g: Tensor) -> Tensor:
    """Solve for the symmetric S that makes G - X S tangent, by least squares over all r x r symmetric matrices."""
    r = x.shape[1]
    basis = []
    for i in range(r):
        for j in range(i, r):
            s = torch.zeros(r, r, dtype=x.dtype)
            s[i, j] = s[j, i] = 1
            basis.append((x @ s).flatten())
    normal = torch.stack(basis, dim=1)
    coefficients = torch.linalg.lstsq(normal, g.flatten()[:, None]).solution
    return g - (normal @ coefficients).view_as(x)


def qr(x: Tensor, u: Tensor) -> Tensor:
    """Householder QR of X + U, with a positive diagonal of R."""
    q, r = torch.linalg.qr(x + u)
    return q * torch.sign(torch.diagonal(r))


def polar(x: Tensor, u: Tensor) -> Tensor:
    """The orthonormal factor of the polar decomposition of X + U, by its SVD."""
    a, _, bh = torch.linalg.svd(x + u, full_matrices=False)
    return a @ bh


def cayley(x: Tensor, u: Tensor) -> Tensor:
    """The Cayley transform of W = P U X^T - X U^T P, P = I - X X^T / 2 (Wen, Yin 2013; Absil et al. 2008)."""
    eye = torch.eye(x.shape[0], dtype=x.dtype)
    p = eye - x @ x.T / 2
    w = p @ u @ x.T - x @ u.T @ p
    return torch.linalg.solve(eye - w / 2, (eye + w / 2) @ x)


def exp(x: Tensor, u: Tensor) -> Tensor:
    """The geodesic of the Euclidean metric, Edelman et al. (1998), equation 2.42, with matrix exponentials."""
    r = x.shape[1]
    s = x.T @ u
    block = torch.cat((torch.cat((s, -u.T @ u), 1), torch.cat((torch.eye(r, dtype=x.dtype), s), 1)), 0)
    tall = torch.cat((torch.matrix_exp(-s), torch.zeros(r, r, dtype=x.dtype)), 0)
    return torch.cat((x, u), 1) @ torch.matrix_exp(block) @ tall


RETRACTIONS = {"qr": qr, "cayley": cayley, "polar": polar, "exp": exp}
