"""The optimizers that ours are measured against, each behind one function; an absent package says so."""

from collections.abc import Sequence

import geoopt
import torch
from torch import Tensor


class NotInstalledError(Exception):
    """A peer's package is not there."""


def fused_adamw(params: Sequence[Tensor], *, capturable: bool = False) -> torch.optim.Optimizer:
    """Torch's AdamW, one kernel for all parameters; no geometry, the floor."""
    return torch.optim.AdamW(params, fused=True, capturable=capturable)


def foreach_adamw(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Torch's AdamW with the multi-tensor implementation."""
    return torch.optim.AdamW(params, foreach=True)


def geoopt_adam(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Take geoopt's RiemannianAdam; the manifold of each parameter decides between QR and geoopt's Cayley."""
    return geoopt.optim.RiemannianAdam(params)


def geoopt_sgd(params: Sequence[Tensor], *, nesterov: bool = False) -> torch.optim.Optimizer:
    """Take geoopt's RiemannianSGD with momentum 0.9; the retraction as for Adam."""
    return geoopt.optim.RiemannianSGD(params, lr=1e-3, momentum=0.9, nesterov=nesterov)


def pogo(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """POGO with Vector Adam (pogo-torch), on column-orthonormal matrices; it keeps orthogonality approximately."""
    return _pogo(params, "VectorAdam")


def pogo_sgd(params: Sequence[Tensor], *, nesterov: bool = False) -> torch.optim.Optimizer:
    """POGO with SGD of momentum 0.9."""
    return _pogo(params, "SGD", momentum=0.9, nesterov=nesterov)


def _pogo(params: Sequence[Tensor], kind: str, **options: float) -> torch.optim.Optimizer:
    try:
        from pogo import POGO, base
    except ImportError as error:
        raise NotInstalledError("pogo-torch is not installed") from error
    return POGO(params, getattr(base, kind)(**options), 1e-3, flatten_fn=lambda x: x.unsqueeze(0), rows=False)
