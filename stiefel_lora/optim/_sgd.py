"""Riemannian stochastic gradient descent."""

from typing import Any, ClassVar

import torch
from geoopt import ManifoldTensor
from torch import Tensor

from stiefel_lora._types import Metric, Retraction
from stiefel_lora.optim._base import Params, RiemannianOptimizer, bounded_scale, rate_for
from stiefel_lora.optim._batch import COUNT, MATRIX, Piece, StateSpec
from stiefel_lora.optim._kinds import Group


class RiemannianSGD(RiemannianOptimizer):
    """SGD with momentum on the Stiefel manifold, and torch's SGD on everything else, in one optimizer.

    For a point X of shape (..., n, r) with Riemannian gradient R, each matrix by itself:

        M <- R at the first update, then momentum M + (1 - dampening) R,
        X <- retract(X, -lr M)  (nesterov: -lr (R + momentum M)),    M <- P_X(M).

    The momentum is tangent from the first update on and is transported to each new point by projection. A step is
    at most a quarter turn (root mean square over the columns).

    Args:
        params: Parameters or groups; which update each gets, see ``RiemannianAdam`` (torch's SGD for ordinary ones).
        lr: Learning rate, a float or a tensor.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty on ordinary parameters, as in torch's SGD, and on other manifolds; it has no tangent
            part on a Stiefel manifold.
        nesterov: Use Nesterov momentum. With ``momentum=0.9`` it is the choice for problems on the manifold itself, of
            which smooth ones need a half to a third of the iterations (``benchmarks/results``, manifold).
        retraction: "qr", "cayley", "polar" or "exp"; see ``stiefel_lora.stiefel.retract``.
        metric: "euclidean" or "canonical": which Riemannian gradient a Stiefel parameter follows.
        maximize: Ascend instead of descend.
        foreach, fused: Handed to torch's SGD for the ordinary parameters.
        differentiable: Refused when True, with the reason.
        stabilize, project, error_if_nonfinite: As in ``RiemannianAdam``.

    Raises:
        InputError: For an option that is not allowed, a wide matrix, or a point off the manifold.

    Reference: Bonnabel, arXiv:1111.5280, for SGD on manifolds; Absil, Mahony, Sepulchre, "Optimization Algorithms on
    Matrix Manifolds" (2008), section 8.1.3, for the transport by projection.
    """

    _ordinary_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.SGD

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        stabilize: int | None = None,  # at geoopt's place
        *,
        retraction: Retraction = "qr",
        metric: Metric = "euclidean",
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        project: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "foreach": foreach,
                "differentiable": differentiable,
                "fused": fused,
            },
            retraction=retraction,
            metric=metric,
            stabilize=stabilize,
            project=project,
            error_if_nonfinite=error_if_nonfinite,
        )

    def _state_spec(self, group: Group) -> dict[str, StateSpec | None]:
        if group["momentum"] == 0:
            return {"step": None, "momentum_buffer": None}
        return {"step": COUNT, "momentum_buffer": MATRIX}

    def _finish_loading(self, state_dict: dict[str, Any], groups_before: list[Group]) -> None:
        super()._finish_loading(state_dict, groups_before)
        for state in self.state.values():
            # torch and geoopt count no steps, but a momentum has been begun.
            if isinstance(buffer := state.get("momentum_buffer"), Tensor) and "step" not in state:
                state["step"] = torch.ones((), device=buffer.device)

    def _momentum(self, state: dict[str, Tensor]) -> Tensor | None:
        return state.get("momentum_buffer")

    def _stiefel_step(
        self, piece: Piece, rgrad: Tensor, square: Tensor | float, moves: Tensor | None, group: Group
    ) -> tuple[Tensor, Tensor | float]:
        lr = rate_for(group, rgrad)
        size = lr if moves is None else moves.to(rgrad.dtype) * lr
        if piece.alone:
            size = float(size)
        if group["momentum"] == 0:
            return rgrad, bounded_scale(rgrad, size, square)
        momentum, buffer, step = group["momentum"], piece.state["momentum_buffer"], piece.state["step"]
        if piece.alone:
            count = step.item()
            if group["dampening"] == 0:
                torch.add(rgrad, buffer, alpha=momentum, out=buffer)  # in one call
            else:
                buffer.mul_(momentum).add_(rgrad, alpha=1 - group["dampening"] * (count > 0))
            step.fill_(count + 1)
        else:
            # The buffer of a skipped matrix stays: its factor is one and what is added is zero.
            weight = torch.ones_like(step, dtype=rgrad.dtype) if moves is None else moves.to(rgrad.dtype)
            fresh = weight * (1 - group["dampening"] * (step > 0).to(rgrad.dtype))
            kept = 1 - weight * (1 - momentum)
            buffer.mul_(kept[:, None, None]).addcmul_(rgrad, fresh[:, None, None])
            step += weight
        direction = rgrad.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
        return direction, bounded_scale(direction, size)

    def _step_ordinary(self, params: list[list[Tensor]]) -> None:
        super()._step_ordinary(params)
        if not any(any(group["manifolds"]) for group in self.param_groups):
            return
        # torch.distributed.checkpoint loads the state of all parameters or of none, and those on a manifold have one.
        for group, own in zip(self.param_groups, params, strict=True):
            for p in own if group["momentum"] == 0 else ():
                if p.grad is not None and not self.state[p]:
                    self.state[p]["skipped"] = torch.zeros((), dtype=torch.int64, device=p.device)

    def _geoopt_step(self, p: ManifoldTensor, rgrad: Tensor, group: Group) -> tuple[Tensor, dict[str, Tensor]]:
        momentum, state = group["momentum"], self.state[p]
        if momentum == 0:
            return p.manifold.retr(p, -group["lr"] * rgrad), {}
        step = state.get("step", torch.zeros((), device=p.device))
        fresh = 1 - group["dampening"] * (step > 0).to(p.dtype.to_real())
        buffer = momentum * state.get("momentum_buffer", torch.zeros_like(p)) + fresh * rgrad
        direction = rgrad + momentum * buffer if group["nesterov"] else buffer
        new, buffer = p.manifold.retr_transp(p, -group["lr"] * direction, buffer)
        return new, {"momentum_buffer": buffer, "step": step + 1}
