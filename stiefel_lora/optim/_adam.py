"""Riemannian Adam."""

import math
from typing import Any, ClassVar, TypeAlias, get_args

import torch
from geoopt import ManifoldTensor
from torch import Tensor

from stiefel_lora._types import Metric, Retraction, SecondMoment
from stiefel_lora.errors import check_choice
from stiefel_lora.optim._base import Params, RiemannianOptimizer, bounded_scale, rate_for
from stiefel_lora.optim._batch import COUNT, MATRIX, ROWS, SCALAR, Piece, StateSpec
from stiefel_lora.optim._kinds import Group, is_stiefel
from stiefel_lora.stiefel import project_

# A tensor, or a Python number that does the same in the same formula.
Number: TypeAlias = Any

_SECOND_MOMENTS: dict[str, StateSpec] = {"mean": SCALAR, "norm": SCALAR, "row": ROWS, "element": MATRIX}


class RiemannianAdam(RiemannianOptimizer):
    """Adam on the Stiefel manifold, and torch's AdamW on everything else, in one optimizer.

    For a point X of shape (..., n, r) with Riemannian gradient R, each matrix by itself:

        M <- beta1 M + (1 - beta1) R,    v <- beta2 v + (1 - beta2) mean(R^2),
        U = -lr * (M / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),
        X <- retract(X, U),    M <- P_X(M)  (vector transport to the new point by projection).

    The second moment is one number a matrix, so that the step is tangent and does not depend on the basis of the
    columns (X -> X Q gives U -> U Q); as a mean square it gives a step the root mean square lr that AdamW gives
    an ordinary parameter, so one learning rate serves both. A step is at most a quarter turn (root mean square over
    the columns).

    Args:
        params: Parameters or groups. A ``geoopt.ManifoldParameter`` on a Stiefel manifold, shape (..., n, r) with
            n >= r, gets the update above; one on another manifold the update of geoopt's Riemannian Adam through
            geoopt's own interface; the others exactly that of ``torch.optim.AdamW``.
        lr: Learning rate, a float or a tensor; per step, in units of the parameter.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, for ordinary parameters. It has no tangent part on a Stiefel manifold (|X| is
            constant), so nothing is done there; on other manifolds it is added to the gradient, as in geoopt.
        amsgrad: Divide by the largest second moment so far.
        retraction: "qr", "cayley", "polar" or "exp"; see ``stiefel_lora.stiefel.retract``. "exp" waits for the device
            on CUDA, inside ``torch.linalg.matrix_exp``.
        metric: "euclidean" or "canonical": which Riemannian gradient a Stiefel parameter follows.
        second_moment: "mean" as above; "norm" takes |R|^2 for mean(R^2), which makes steps of Frobenius norm lr (the
            scale of geoopt, for settings tuned there; what is kept is the mean square all the same). "row" keeps the
            mean square of each row, shape (n, 1), and projects the quotient: each input feature of an adapter has a
            step of its own, and the basis of the columns still does not matter (the one-sided form of RASA, with Adam's
            averages). "element" keeps one an entry (the form of StelLA), and depends on the basis.
        maximize: Ascend instead of descend.
        foreach, fused: Handed to AdamW for the ordinary parameters.
        capturable: Whether ``step`` may be captured in a CUDA graph, once a first call has made its state. As in torch,
            ``lr`` must be a tensor on the device if it is to change, and gradients must stay where they are. Not with
            "exp", ``error_if_nonfinite`` or other manifolds, whose steps wait for the device.
        differentiable: Refused when True, with the reason.
        stabilize: Every how many steps a parameter on another manifold is projected back, as in geoopt. Stiefel
            parameters do not drift and need none.
        project: Move a Stiefel parameter that is off its manifold to the nearest point instead of refusing it.
        error_if_nonfinite: Raise if a manifold parameter's gradient has a NaN or infinity; this waits for the device.
            By default such a matrix, like one whose gradient has a norm that overflows, keeps its value and state for
            that step, and ``skipped_updates`` counts it.

    Raises:
        InputError: For an option that is not allowed, a wide matrix, or a point off the manifold.

    Reference: Kingma, Ba, arXiv:1412.6980; Becigneul, Ganea, arXiv:1810.00760, for Adam on manifolds; Loshchilov,
    Hutter, arXiv:1711.05101, for AdamW; Kasai, Jawanpuria, Mishra, arXiv:1902.01144, for RASA; arXiv:2510.01938 for
    StelLA.
    """

    _ordinary_class: ClassVar[type[torch.optim.Optimizer]] = torch.optim.AdamW

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        retraction: Retraction = "qr",
        metric: Metric = "euclidean",
        second_moment: SecondMoment = "mean",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stabilize: int | None = None,
        project: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
            },
            retraction=retraction,
            metric=metric,
            second_moment=second_moment,
            stabilize=stabilize,
            project=project,
            error_if_nonfinite=error_if_nonfinite,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_choice("second_moment", group["second_moment"], get_args(SecondMoment))

    def _state_spec(self, group: Group) -> dict[str, StateSpec | None]:
        second = _SECOND_MOMENTS[group["second_moment"]]
        largest = second if group["amsgrad"] else None
        return {"step": COUNT, "exp_avg": MATRIX, "exp_avg_sq": second, "max_exp_avg_sq": largest}

    def _finish_loading(self, state_dict: dict[str, Any], groups_before: list[Group]) -> None:
        super()._finish_loading(state_dict, groups_before)
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if "stabilize" in saved and "second_moment" not in saved:  # geoopt's
                for p in group["params"]:
                    if is_stiefel(p):
                        _port_second_moments(self.state[p], p, group["second_moment"])

    def _momentum(self, state: dict[str, Tensor]) -> Tensor | None:
        return state.get("exp_avg")

    def _stiefel_step(
        self, piece: Piece, rgrad: Tensor, square: Tensor | float, moves: Tensor | None, group: Group
    ) -> tuple[Tensor, Tensor | float]:
        return adam_step(
            piece.point,
            rgrad,
            square,
            moves,
            step=piece.state["step"],
            exp_avg=piece.state["exp_avg"],
            exp_avg_sq=piece.state["exp_avg_sq"],
            max_exp_avg_sq=piece.state.get("max_exp_avg_sq"),
            lr=rate_for(group, piece.point),
            betas=group["betas"],
            eps=group["eps"],
            second_moment=group["second_moment"],
        )

    def _geoopt_step(self, p: ManifoldTensor, rgrad: Tensor, group: Group) -> tuple[Tensor, dict[str, Tensor]]:
        state = self.state[p]
        beta1, beta2 = group["betas"]
        # geoopt counts with an integer of Python's.
        step = torch.as_tensor(state.get("step", 0), dtype=torch.float32, device=p.device) + 1
        exp_avg = state.get("exp_avg", torch.zeros_like(p)) * beta1 + rgrad * (1 - beta1)
        square = p.manifold.component_inner(p, rgrad)
        exp_avg_sq = state.get("exp_avg_sq", torch.zeros_like(p)) * beta2 + square * (1 - beta2)
        new_state = {"step": step, "exp_avg_sq": exp_avg_sq}
        if group["amsgrad"]:
            exp_avg_sq = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(p)), exp_avg_sq)
            new_state["max_exp_avg_sq"] = exp_avg_sq
        t = step.to(p.dtype.to_real())
        denominator = (exp_avg_sq / _one_minus_power(beta2, t)).sqrt() + group["eps"]
        direction = exp_avg / _one_minus_power(beta1, t) / denominator
        new, new_state["exp_avg"] = p.manifold.retr_transp(p, -group["lr"] * direction, exp_avg)
        return new, new_state


def adam_step(
    x: Tensor,
    rgrad: Tensor,
    square: Tensor | float,
    moves: Tensor | None,
    *,
    step: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    second_moment: SecondMoment,
) -> tuple[Tensor, Tensor | float]:
    """Update the moments of k matrices in place and return their tangent steps; may overwrite ``rgrad``.

    Args:
        x: Points, shape (k, n, r), or one alone, shape (n, r), and likewise below.
        rgrad: Riemannian gradients, same shape.
        square: Their squared norms, shape (k,), or a number.
        moves: Whether a matrix is updated, shape (k,); where not, its moments stay and its step is zero. None: all are.
        step: Number of updates so far, shape (k,).
        exp_avg: First moment, tangent at ``x``, shape (k, n, r).
        exp_avg_sq: Second moment, a mean square with "norm" as well: shape (k,); (k, n, 1) with "row", (k, n, r) with
            "element".
        max_exp_avg_sq: The largest ``exp_avg_sq`` so far (AMSGrad), same shape, or None.
        lr: Learning rate.
        betas: Decay rates.
        eps: Added to the root of the second moment.
        second_moment: "mean", "norm", "row" or "element".

    Returns:
        Directions, shape (k, n, r), and what to multiply them by, shape (k, 1, 1), or one number for a matrix alone.
    """
    if moves is None:
        exp_avg.lerp_(rgrad, 1 - betas[0])
    else:
        exp_avg.lerp_(rgrad, (moves.to(x.dtype) * (1 - betas[0]))[:, None, None])
    if second_moment == "element":
        square = rgrad.square()
    elif second_moment == "row":
        square = torch.linalg.vector_norm(rgrad, dim=-1, keepdim=True).square_() / rgrad.shape[-1]
    else:
        entries = rgrad.shape[-2:].numel()
        square = square / entries
        if second_moment == "norm":
            lr, eps = lr / entries**0.5, eps / entries**0.5
    if moves is not None:
        # What is kept all the same must not make a NaN of the step.
        square = torch.where(_like(moves, square), square, exp_avg_sq)
    kept = [step, exp_avg_sq] if max_exp_avg_sq is None else [step, exp_avg_sq, max_exp_avg_sq]
    old: list[Number] = [square, *kept]
    if x.dim() == 2:
        # The few numbers of a matrix alone are Python's, at a tenth of the cost.
        old, lr = [z if isinstance(z, float) or z.dim() else z.item() for z in old], float(lr)
    else:
        old[1] = step.to(x.dtype)
    least = torch.finfo(x.dtype).tiny ** 0.75
    new, size, root = adam_numbers(*old, lr=lr, betas=betas, eps=eps, least=least)
    for tensor, value in zip(kept, new, strict=True):
        if isinstance(value, Tensor):
            tensor.copy_(value if moves is None else torch.where(_like(moves, tensor), value, tensor))
        else:
            tensor.fill_(value)
    if moves is not None:
        size = torch.where(moves, size, 0)
    if second_moment in ("row", "element"):
        direction = project_(x, torch.div(exp_avg, root, out=rgrad))
        return direction, bounded_scale(direction, size)
    return exp_avg, bounded_scale(exp_avg, size / root)


def adam_numbers(
    square: Number,
    step: Number,
    exp_avg_sq: Number,
    max_exp_avg_sq: Number | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    least: float,
) -> tuple[list[Number], Number, Number]:
    """Advance what Adam keeps besides the first moment by one update.

    Args:
        square: Squares of the gradients, shape (k,), or (k, n, 1) or (k, n, r) for more than one a matrix; or one
            number.
        step: Number of updates so far, shape (k,); or one number.
        exp_avg_sq: Second moment, like ``square``.
        max_exp_avg_sq: The largest so far (AMSGrad), like ``square``, or None.
        lr: Learning rate.
        betas: Decay rates.
        eps: Added to the root of the second moment.
        least: The least root: eps = 0 with a gradient of zeros must not make 0/0 of a point.

    Returns:
        The next step, second moment and (if given) largest one; the size of the step that the first moment is to be
        multiplied by, shape (k,), and the root that it is to be divided by, like ``square``.
    """
    beta1, beta2 = betas
    t = step + 1
    # Not as a difference, of which beta2 = 0 would leave rounding where the gradients shrink.
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * square
    kept = [t, exp_avg_sq]
    if max_exp_avg_sq is not None:
        exp_avg_sq = _maximum(exp_avg_sq, max_exp_avg_sq)
        kept.append(exp_avg_sq)
    root = (exp_avg_sq / _like(_one_minus_power(beta2, t), exp_avg_sq)) ** 0.5 + eps
    # In this order a rate gives the same bits as a number and as a tensor.
    return kept, 1 / _one_minus_power(beta1, t) * lr, _maximum(root, least)


def _one_minus_power(beta: float, t: Number) -> Number:
    """Return 1 - beta^t without the cancellation that costs float32 four digits at beta = 0.999, t = 1."""
    if beta == 0:
        return t**0
    exponent = t * math.log(beta)
    return -torch.expm1(exponent) if isinstance(exponent, Tensor) else -math.expm1(exponent)


def _maximum(a: Number, b: Number) -> Number:
    if not isinstance(a, Tensor):
        return max(a, b)
    return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp_min(b)


def _like(number: Any, state: Any) -> Any:
    """Shape one number a matrix, (k,), so that it broadcasts against state of shape (k,) or (k, n, .)."""
    return number[:, None, None] if isinstance(state, Tensor) and state.dim() == 3 else number


def _port_second_moments(state: dict[str, Any], p: Tensor, second_moment: str) -> None:
    """Turn geoopt's second moments, |R|^2 in every entry of a matrix, into ours, which are mean squares."""
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        value = state.get(key)
        if value is None or value.shape != p.shape:
            continue
        value = value / p.shape[-2:].numel()
        state[key] = {"row": value[..., :1], "element": value}.get(second_moment, value[..., 0, 0])
