"""Start the orthonormal factors from the directions in which a calibration set wants to move the weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stiefel_lora._losses import LossFn, to_device
from stiefel_lora._models import is_conv1d, undisturbed, unwrap
from stiefel_lora._targets import find_targets, module_ranks
from stiefel_lora.adapters import adapter_layers
from stiefel_lora.errors import InputError
from stiefel_lora.layer import Init, Orthonormal, leading_singular_vectors, plain_weight
from stiefel_lora.stiefel import check_choice


def gradient_init(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None,
    rank: int,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    orthonormal: Orthonormal = "A",
    rank_pattern: Mapping[str, int] | None = None,
    layers_path: str | None = None,
    loss_fn: LossFn | None = None,
) -> dict[str, Init]:
    """Return starts for `add_adapters`: leading singular vectors of the mean gradient of each weight to adapt.

    With A orthonormal the update can first move the weight only within the span of A's columns; these starts are the
    spans that hold most of the gradient. The memory is that of one gradient of the weights to adapt.

    Args:
        model: The bare base model; it comes back as it was.
        batches: Mappings for ``model(**batch)`` with a ``loss``, or whatever ``loss_fn`` takes.
        layers: As for `add_adapters`, like the rest.
        rank: As for `add_adapters`.
        target_modules: As for `add_adapters`.
        orthonormal: As for `add_adapters`: right singular vectors for "A", left for "B", pairs for "both".
        rank_pattern: As for `add_adapters`.
        layers_path: As for `add_adapters`.
        loss_fn: Computes the loss from the model and a batch.

    Returns:
        For each qualified name of a linear to adapt its start, to be given as ``init``.

    Raises:
        InputError: If the model has adapters, there is no batch, a base is quantised, a gradient is not finite, or for
            what `add_adapters` raises it.
    """
    model = unwrap(model)
    check_choice("orthonormal", orthonormal, ("A", "B", "both"))
    if adapter_layers(model):
        raise InputError("the model has adapters; take the gradients of the bare base (remove_adapters)")
    targets = find_targets(model, layers, target_modules, layers_path)
    ranks = module_ranks(targets, rank, rank_pattern or {})
    linears = {name: model.get_submodule(name) for name in targets}
    gradients = _gradients(model, [plain_weight(linear) for linear in linears.values()], batches, loss_fn)
    starts: dict[str, Init] = {}
    for (name, linear), gradient in zip(linears.items(), gradients, strict=True):
        limit = min(gradient.shape)
        if not 1 <= ranks[name] <= limit:
            raise InputError(f"{name}: rank must be in [1, {limit}], got {ranks[name]}")
        right, left = leading_singular_vectors(gradient.T if is_conv1d(linear) else gradient, ranks[name])
        starts[name] = (right, left) if orthonormal == "both" else right if orthonormal == "A" else left
    return starts


def _gradients(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    batches: Iterable[Any],
    loss_fn: LossFn | None,
) -> list[Tensor]:
    """Return the weights' gradients, summed over the batches, in evaluation mode; the model comes back as it was."""
    totals = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    empty = True
    with undisturbed(model):
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            empty = False
            batch = to_device(batch, weights[0].device)
            loss = model(**batch)["loss"] if loss_fn is None else loss_fn(model, batch)
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
                total.add_(gradient)
    if empty:
        raise InputError("no batches to take gradients of")
    return totals
