"""What adapters may be put on: the modules that given names mean, checked."""

from collections.abc import Mapping
from typing import Any
from warnings import warn

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from stiefel_lora._models import own_names
from stiefel_lora._names import is_compiled
from stiefel_lora._targets import check_called, last_names, wrappable_linears
from stiefel_lora.errors import InputError, listed
from stiefel_lora.layer import StiefelLoRALinear


def by_own_name(model: nn.Module, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the options by the first name of each module that there is."""
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}.intersection(options)
    first = dict(zip(known, own_names(model, known), strict=True))
    found: dict[str, Mapping[str, Any]] = {}
    for name, own in options.items():
        if first.get(name, name) in found:
            raise InputError(f"{name} and {first[name]} are one module, which takes one adapter; name it once")
        found[first.get(name, name)] = own
    return found


def named_bases(model: nn.Module, names: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the modules to wrap, in the model's order, or list what is wrong with the names."""
    everything = dict(model.named_modules())
    missing = [name for name in names if name not in everything]
    if missing or not names:
        linears = last_names(n for n, _ in wrappable_linears(model))
        raise InputError(
            f"the model has no module {listed(missing) or '(none given)'}; its linears are named {linears}"
        )
    again = [name for name in names if name in present]
    if again:
        raise InputError(f"{listed(again)} has an adapter already; remove it first or choose another name=")
    check_called(everything, names)
    _warn_of_statistics(everything)
    bases = {name: module for name, module in everything.items() if name in names}
    bases = {name: m.base if isinstance(m, StiefelLoRALinear) else m for name, m in bases.items()}
    # On the meta device without accelerate's hook, a model is one that is to be loaded later.
    away = [name for name, m in bases.items() if hasattr(m, "_hf_hook") and any(p.is_meta for p in m.parameters())]
    if away:
        raise InputError(f"{listed(away)} is offloaded, where an adapter cannot be trained; load the base as a whole")
    compiled = [name for name in bases if is_compiled(name)]
    if compiled:
        raise InputError(
            f"{listed(compiled)} is compiled by itself, where an adapter has no effect; compile the block instead"
        )
    tied = tied_names(model, bases)
    if tied:
        warn(
            f"the weight of {listed(tied)} is shared with another module, which the adapter does not change; "
            "merging will untie them",
            stacklevel=4,
        )
    return bases


def _warn_of_statistics(modules: Mapping[str, nn.Module]) -> None:
    """Warn of what training changes in a frozen base besides its parameters."""
    moving = [name for name, module in modules.items() if _moves(module)]
    if moving:
        warn(
            f"while in training mode, running statistics change in {listed(moving)}, which a saved adapter holds only "
            "of a module that is trained whole, as a head; put it into eval mode after each model.train(), or where a "
            "Trainer calls that, set a norm's momentum to 0",
            stacklevel=5,
        )


def _moves(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    # The vectors of a power iteration.
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)


def tied_names(model: nn.Module, names: Mapping[str, nn.Module]) -> list[str]:
    """Return those names whose own weight is a parameter of another module too."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    tied = []
    for name, module in names.items():
        adapted = isinstance(module, StiefelLoRALinear)
        base = module.base if adapted else module
        weight = module.base_weight if adapted else module._parameters.get("weight")
        if weight is not None and any(owner is not base for owner in owners.get(id(weight), ())):
            tied.append(name)
    return tied
