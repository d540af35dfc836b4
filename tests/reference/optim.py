"""Riemannian Adam and SGD on one n x r matrix at a time, written from the formulas with dense geometry."""

import math

import torch
from torch import Tensor

from tests.reference.stiefel import RETRACTIONS, project


def _rgrad(x: Tensor, g: Tensor, metric: str) -> Tensor:
    return project(x, g) if metric == "euclidean" else g - x @ g.T @ x


def adam(
    x: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    maximize: bool = False,
    retraction: str = "qr",
    metric: str = "euclidean",
    second_moment: str = "mean",
) -> Tensor:
    m, v, v_max = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(grads, start=1):
        r = _rgrad(x, -g if maximize else g, metric)
        m = betas[0] * m + (1 - betas[0]) * r
        rows = (r**2).mean(1, keepdim=True)
        square = {"mean": (r**2).mean(), "norm": (r**2).sum(), "row": rows, "element": r**2}[second_moment]
        v = betas[1] * v + (1 - betas[1]) * square
        v_max = torch.maximum(v, v_max)
        v_hat = (v_max if amsgrad else v) / (1 - betas[1] ** t)
        u = -lr * (m / (1 - betas[0] ** t)) / (v_hat.sqrt() + eps)
        if second_moment in ("row", "element"):
            u = project(x, u)
        x = RETRACTIONS[retraction](x, u)
        m = project(x, m)
    return x


def sgd(
    x: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    retraction: str = "qr",
    metric: str = "euclidean",
) -> Tensor:
    buffer = None
    for g in grads:
        r = _rgrad(x, -g if maximize else g, metric)
        direction = r
        if momentum != 0:
            buffer = r if buffer is None else momentum * buffer + (1 - dampening) * r
            direction = r + momentum * buffer if nesterov else buffer
        x = RETRACTIONS[retraction](x, -lr * direction)
        if buffer is not None:
            buffer = project(x, buffer)
    return x


def quarter_turn(u: Tensor) -> Tensor:
    """Shorten a step whose columns are longer than pi / 2 in the root mean square."""
    return u * min(1.0, math.pi / 2 * math.sqrt(u.shape[1]) / float(u.norm()))
