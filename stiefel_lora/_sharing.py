"""One orthonormal factor A for several linear maps, each with a B of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stiefel_lora._models import first_tensor, linear_shape, split_at_layer
from stiefel_lora._names import plain_name
from stiefel_lora._precision import wide_dtype
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.errors import InputError, listed
from stiefel_lora.layer import StiefelLoRALinear


def sharers(model: nn.Module, ranks: Mapping[str, int], orthonormal: str, init: object) -> dict[str, str]:
    """Return which linears of a model, with which ranks, would have the A of which earlier one.

    Those at one place in their layers have one, if they agree in inputs, rank, device and precision.

    Raises:
        InputError: If A is not the one factor that is orthonormal, or does not start at random.
    """
    if orthonormal != "A":
        raise InputError(f"share_A needs orthonormal='A', whose B differ freely, got {orthonormal!r}")
    if init != "random":
        given = repr(init) if isinstance(init, str) else "starts for each linear"
        raise InputError(f"share_A needs init='random': one A starts at one point for all its linears; got {given}")
    first: dict[object, str] = {}
    found = {name: first.setdefault(_form(model.get_submodule(name), name, r), name) for name, r in ranks.items()}
    return _without_owners(found)


def _form(module: nn.Module, name: str, rank: int) -> object:
    """Return what linears that share A have in common."""
    base = module.base if isinstance(module, StiefelLoRALinear) else module
    stack, _, place = split_at_layer(plain_name(name))
    example = first_tensor(base)
    kept = None if example is None else (example.device, wide_dtype(example.dtype))
    return stack, place, linear_shape(base)[0], rank, kept


def share(layers: Mapping[str, StiefelLoRALinear], shared: Mapping[str, str]) -> None:
    """Let adapters have the very A of others, by name, among those on one device and of one precision."""
    first: dict[object, str] = {}
    owners = {owner: owner for owner in shared.values()}
    for name, owner in {**owners, **shared}.items():
        point = layers[name].lora_A
        holder = first.setdefault((owner, point.device, point.dtype), name)
        layers[name].lora_A = layers[holder].lora_A
        layers[name].shares_A_of = plain_name(holder)


def shared_in(layers: Mapping[str, StiefelLoRALinear]) -> dict[str, str]:
    """Return which adapters have the very A of an earlier one, and of which."""
    first: dict[int, str] = {}
    return _without_owners({name: first.setdefault(id(layer.lora_A), name) for name, layer in layers.items()})


def _without_owners(owners: Mapping[str, str]) -> dict[str, str]:
    return {name: owner for name, owner in owners.items() if name != owner}


def keep_shared(model: nn.Module) -> list[RemovableHandle]:
    """Let ``load_state_dict`` leave A shared in a model; returns what takes the hooks away."""
    return [
        model.register_load_state_dict_pre_hook(_fill),
        model.register_load_state_dict_post_hook(_share_again),
    ]


def _meant_to_share(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, layer in adapter_layers(model).items():
        if layer.shares_A_of is not None:
            found.setdefault(layer.shares_A_of, []).append(name)
    return found


def _fill(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a state that has a shared A once, as safetensors files do, the A of all its linears.

    Raises:
        InputError: If it has several A for linears that share theirs.
    """
    for names in _meant_to_share(model).values():
        # Blocks in checkpoint wrappers have the plain names in a state.
        for spell in (str, plain_name):
            keys = [f"{prefix}{spell(name)}.lora_A" for name in names]
            values = [state[key] for key in keys if key in state]
            if not values:
                continue
            if not all(_same(value, values[0]) for value in values[1:]):
                raise InputError(
                    f"the state has an A each for {listed(spell(name) for name in names)}, which share one here; load "
                    "it into adapters without share_A"
                )
            state.update(dict.fromkeys(keys, values[0]))
            break


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.is_meta == b.is_meta and (a.is_meta or torch.equal(a, b.to(a.device))))


def _share_again(model: nn.Module, *_: Any) -> None:
    """Undo what ``load_state_dict(assign=True)`` does, and a stay on the meta device: a parameter for each."""
    layers = adapter_layers(model)
    for owner, *others in _meant_to_share(model).values():
        share(layers, dict.fromkeys(others, owner))


def check_shared(file: object, modules: Mapping[str, Mapping[str, Any]], shared: Any) -> None:
    """Raise InputError unless what a file says is shared is the A of another linear of the same form."""
    form = {name: (o["in_features"], o["rank"], o["orthonormal"] == "A" or name) for name, o in modules.items()}
    if not isinstance(shared, dict) or not all(
        isinstance(owner, str) and owner not in shared and name in form and form[name] == form.get(owner)
        for name, owner in shared.items()
    ):
        raise InputError(f"{file} is damaged: shared_A should name linears by others whose A they have")
