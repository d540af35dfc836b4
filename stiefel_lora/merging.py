"""Merge adapters into the weights of their base, take them out again, and factor their updates anew."""

import logging
import math
from collections.abc import Mapping

import torch
from torch import nn

from stiefel_lora._bases import tied_names
from stiefel_lora._models import is_plain, named_linears, unwrap
from stiefel_lora.adapted import required_layers
from stiefel_lora.adapters import Model, check_home, check_no_others, forget_adapters, replace_modules
from stiefel_lora.errors import InputError, listed
from stiefel_lora.factors import manifold_error, rounding_error
from stiefel_lora.layer import StiefelLoRALinear

logger = logging.getLogger("stiefel_lora")


def merge_adapters(model: Model, *, keep: bool = False) -> Model:
    """Merge the adapters in use into the base weights and return the plain model, in place.

    The sums are taken in float32 and rounded once to the base's dtype. Where that is a low precision, the part of the
    updates that is lost is logged as a warning. The output head is untied from the embedding if it had an adapter. A
    model that transformers dequantised while loading it (GGUF) can be saved afterwards.

    Args:
        model: A model with adapters.
        keep: Keep the adapters, merged, so that `unmerge_adapters` can restore the exact base. Nothing trains them
            while they are merged.

    Returns:
        The model given, unwrapped from DataParallel and the like: with its original classes (unless ``keep``), for
        ``save_pretrained``, tracing or export.

    Raises:
        InputError: If there are no adapters, a base is quantised, a merged weight overflows, or (unless ``keep``) other
            named sets of adapters would be lost, or the model is only a part of the one that has the adapters. The
            model is left as it was.
    """
    bare = unwrap(model)
    layers = required_layers(bare, with_values=True)
    if not keep:
        check_home(bare)
        check_no_others(bare, "merge with keep=True")
    fresh = {name: layer for name, layer in layers.items() if not layer.merged}
    try:
        errors = {name: layer.merge() for name, layer in fresh.items()}
    except BaseException:
        for layer in fresh.values():
            layer.unmerge()
        raise
    _log_rounding(errors, layers)
    if not keep:
        config = getattr(bare, "config", None)
        if config is not None and tied_names(bare, layers):
            config.tie_word_embeddings = False
        replace_modules(bare, {name: layer.release() for name, layer in layers.items()})
        forget_adapters(bare)
        _forget_quantiser(bare)
    return bare  # type: ignore[return-value]


def unmerge_adapters(model: nn.Module) -> None:
    """Take merged updates out of the base weights, bit for bit; raises InputError if there are no adapters."""
    for layer in required_layers(model).values():
        layer.unmerge()


def _forget_quantiser(model: nn.Module) -> None:
    """Let a model save itself that was dequantised while it was loaded, as GGUF files are.

    transformers still takes such a model for a quantised one and refuses to write it.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    if any(not is_plain(linear) for _, linear in named_linears(model)):
        return
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (getattr(model, "config", None), "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]


def _log_rounding(errors: Mapping[str, float], layers: Mapping[str, StiefelLoRALinear]) -> None:
    low = {name: e for name, e in errors.items() if torch.finfo(layers[name].weight.dtype).bits < 32}
    if low:
        worst = max(low, key=low.__getitem__)
        logger.warning(
            "merging into %s rounds the updates: a share of %.2g of an update is lost on average, %.2g in %s; "
            "merge a float32 copy of the base to keep it",
            layers[worst].weight.dtype,
            sum(low.values()) / len(low),
            low[worst],
            worst,
        )


def refactor_adapters(model: nn.Module) -> list[str]:
    """Give the same updates orthonormal factors where they have others, as in an average of adapted models.

    A projection of the factors (``project=True`` of the optimizers, or their ``stabilize``) would change the updates.

    Returns:
        The names of the linears where that was so.

    Raises:
        InputError: If the model has no adapters, or a factor has a NaN or infinity.
    """
    layers = required_layers(model, with_values=True)
    errors = {name: manifold_error(layer.factors(), layer.orthonormal) for name, layer in layers.items()}
    bad = [name for name, error in errors.items() if not math.isfinite(error)]
    if bad:
        raise InputError(f"the factors of {listed(bad)} have NaN or infinite entries")
    allowed = {name: max(map(rounding_error, layer.manifold_parameters().values())) for name, layer in layers.items()}
    moved = [name for name, error in errors.items() if error > allowed[name]]
    # All of them first: several may share A, from which each takes its own B.
    factors = {name: layers[name].refactored() for name in moved}
    for name in moved:
        layers[name].put(factors[name])
    return moved
