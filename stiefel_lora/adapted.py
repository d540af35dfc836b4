"""What adapters a model has in use: their layers and factors, and what is trained beside them."""

from torch import Tensor, nn

from stiefel_lora._models import join, unwrap
from stiefel_lora._names import parents
from stiefel_lora.errors import InputError, listed
from stiefel_lora.factors import factor_metrics
from stiefel_lora.layer import StiefelLoRALinear


def adapter_layers(model: nn.Module) -> dict[str, StiefelLoRALinear]:
    """Return the adapters that are in the model, by the qualified names of the linears they stand for."""
    found = unwrap(model).named_modules()
    return {name: module for name, module in found if isinstance(module, StiefelLoRALinear)}


def required_layers(model: nn.Module, *, with_values: bool = False) -> dict[str, StiefelLoRALinear]:
    """Return the adapters that are in the model, as `adapter_layers` does.

    Raises:
        InputError: If there are none, or, ``with_values``, if their factors are on the meta device.
    """
    layers = adapter_layers(model)
    if not layers:
        raise InputError(f"{type(unwrap(model)).__name__} has no adapters; call add_adapters or load_adapter first")
    empty = with_values and [name for name, x in layers.items() if any(f.is_meta for f in x.factors().values())]
    if empty:
        raise InputError(
            f"the adapters of {listed(empty)} are on the meta device; load them, or take accelerate's offloading hooks "
            "off (remove_hook_from_submodules)"
        )
    return layers


def adapter_factors(model: nn.Module) -> dict[str, Tensor]:
    """Return the factors of the adapters that are in the model, by their qualified names beneath the linears.

    One that several share has the first of its names, as in ``named_parameters``.
    """
    found: dict[Tensor, str] = {}
    for name, layer in adapter_layers(model).items():
        for key, factor in layer.factors().items():
            found.setdefault(factor, f"{name}.{key}")
    return {name: factor for factor, name in found.items()}


def adapter_metrics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return the "orthogonality_error" and the "effective_rank" of each adapter in use, by name."""
    return {name: factor_metrics(layer.factors(), layer.orthonormal) for name, layer in adapter_layers(model).items()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own parameters and saved buffers, by the names that they have without adapters."""
    model = unwrap(model)
    inside: dict[str, str | None] = {}
    for name, layer in adapter_layers(model).items():
        inside.update(dict.fromkeys(f"{name}.{key}" for key in layer.factors()))
        inside.update({f"{name}.base.{key}": f"{name}.{key}" for key in _own_tensors(layer.base)})
    found = {inside.get(name, name): tensor for name, tensor in _own_tensors(model).items()}
    return {name: tensor for name, tensor in found.items() if name is not None}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained beside the adapters in use, by the names that it has now.

    That is parameters, and the saved buffers of modules that are trained whole, such as running statistics.
    """
    model = unwrap(model)
    factors, parameters = adapter_factors(model), dict(model.named_parameters())
    trained: dict[str, Tensor] = {n: p for n, p in parameters.items() if p.requires_grad and n not in factors}
    partly = {parent for name in parameters.keys() - trained.keys() for parent in parents(name)}
    whole = {parent for name in trained for parent in parents(name)} - partly
    return {**trained, **{n: b for n, b in _saved_buffers(model).items() if not whole.isdisjoint(parents(n))}}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **_saved_buffers(module)}


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state of the module has."""
    return {
        join(place, key): buffer
        for place, part in module.named_modules()
        for key, buffer in part._buffers.items()
        if buffer is not None and key not in part._non_persistent_buffers_set
    }
