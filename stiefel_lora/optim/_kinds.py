"""The kinds of parameters that a Riemannian optimizer takes, and what is asked of each."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from geoopt import Euclidean, ManifoldTensor
from geoopt import Stiefel as GeooptStiefel
from torch import Tensor

from stiefel_lora.errors import InputError, ManifoldError
from stiefel_lora.stiefel import check_tall, orthogonality_error, project_point

Group: TypeAlias = dict[str, Any]


def is_stiefel(p: Tensor) -> bool:
    """Tell whether a parameter is declared to lie on a Stiefel manifold of geoopt (any metric)."""
    return isinstance(p, ManifoldTensor) and isinstance(p.manifold, GeooptStiefel)


def is_ordinary(p: Tensor) -> bool:
    """Tell whether a parameter lies in plain Euclidean space."""
    return not isinstance(p, ManifoldTensor) or type(p.manifold) is Euclidean


def is_other_manifold(p: Tensor) -> bool:
    """Tell whether a parameter lies on a manifold that is left to geoopt."""
    return not is_ordinary(p) and not is_stiefel(p)


def manifold_name(p: Tensor) -> str | None:
    """Return the name of the class of a parameter's manifold, None for an ordinary parameter."""
    return None if is_ordinary(p) else type(p.manifold).__name__  # type: ignore[attr-defined]


class Kinds:
    """The parameters of a group, sorted by what updates them; an empty one on a manifold is left out."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = list(params)
        self.ordinary = [p for p in params if is_ordinary(p)]
        self.stiefel = [p for p in params if is_stiefel(p) and p.numel() > 0]
        self.other = [p for p in params if is_other_manifold(p) and p.numel() > 0]


def place(group: Group, g: int, i: int) -> str:
    """Say which parameter of which group is meant."""
    name = f" ({group['param_names'][i]})" if "param_names" in group else ""
    return f"parameter {i}{name} of group {g}"


def check_dense(params: Iterable[Tensor]) -> None:
    """Raise unless all gradients are dense."""
    for p in params:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise InputError(f"the gradient of a manifold parameter of shape {tuple(p.shape)} must be dense")


def _family(manifold: str | None) -> str | None:
    """Name what manifolds share whose points are the same, whatever their metric and retraction."""
    if manifold is None:
        return None
    return "Stiefel" if "Stiefel" in manifold else manifold.removesuffix("Exact")


def check_manifolds(saved: Group, group: Group, g: int) -> None:
    """Raise unless the parameters of a saved group were on the manifolds that they are on now."""
    then, now = saved.get("manifolds"), [manifold_name(p) for p in group["params"]]
    # torch refuses another number of them itself, and in another order the state may have been mapped by their names.
    if then is None or len(then) != len(now) or Counter(map(_family, then)) == Counter(map(_family, now)):
        return
    for i, (old, new) in enumerate(zip(then, now, strict=True)):
        if _family(old) == _family(new):
            continue
        was = "an ordinary one" if old is None else f"on manifold {old}"
        if new is None:
            raise ManifoldError(
                f"{place(group, g, i)} was {was} when this state was saved and is an ordinary one now; re-attach it, "
                "module.weight = geoopt.ManifoldParameter(module.weight.data, manifold=geoopt.EuclideanStiefel()), and "
                "make the optimizer anew"
            )
        raise ManifoldError(f"{place(group, g, i)} was {was} when this state was saved and is on {new} now")


def check_point(p: Tensor, where: str, *, project: bool) -> None:
    """Raise unless a Stiefel parameter is tall, real and on its manifold up to rounding; ``where`` names it."""
    try:
        check_tall(p)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not p.is_floating_point():
        raise InputError(f"{where}: a Stiefel parameter must be real floating, got {p.dtype}")
    if p.is_meta or p.numel() == 0:
        return
    # Half the digits of the dtype: far above what rounding leaves, far below what any real mistake makes.
    tolerance = (torch.finfo(p.dtype).eps * p.shape[-1]) ** 0.5
    measured = float(orthogonality_error(p).max())
    if measured <= tolerance:
        return
    if not p.isfinite().all():
        raise ManifoldError(f"{where}, shape {tuple(p.shape)}, has a NaN or infinity")
    if not project:
        raise ManifoldError(
            f"{where}, shape {tuple(p.shape)}, is off the Stiefel manifold: |X^T X - I|_F = {measured:.3g}, "
            f"allowed {tolerance:.3g}; pass project=True to move it to the nearest point, or, where another factor "
            "goes with it as in averaged adapters, call stiefel_lora.refactor_adapters(model), which keeps the product"
        )
    with torch.no_grad():
        p.copy_(project_point(p))
