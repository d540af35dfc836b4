"""Riemannian optimizers that take manifold and ordinary parameters together."""

from stiefel_lora.optim._adam import RiemannianAdam as RiemannianAdam
from stiefel_lora.optim._sgd import RiemannianSGD as RiemannianSGD

__all__ = ["RiemannianAdam", "RiemannianSGD"]
