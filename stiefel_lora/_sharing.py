"""One orthonormal factor A for several linear maps, each with a B of its own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from stiefel_lora._models import first_tensor, linear_shape
from stiefel_lora._names import plain_name
from stiefel_lora.errors import InputError
from stiefel_lora.layer import StiefelLoRALinear


def sharers(model: nn.Module, ranks: Mapping[str, int], orthonormal: str, init: object) -> dict[str, str]:
    """Return which linears of a model, with which ranks, would have the A of which earlier one.

    Those of one last name, number of inputs, rank and device have one, as all "q_proj" do.

    Raises:
        InputError: If A is not the one factor that is orthonormal, or does not start at random.
    """
    if orthonormal != "A":
        raise InputError(f"share_A needs orthonormal='A', whose B differ freely, got {orthonormal!r}")
    if init != "random":
        given = repr(init) if isinstance(init, str) else "starts for each linear"
        raise InputError(f"share_A needs init='random': one A starts at one point for all its linears; got {given}")
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        example = first_tensor(module)
        alike = plain_name(name).split(".")[-1], linear_shape(module)[0], rank, example is not None and example.device
        found[name] = first.setdefault(alike, name)
    return {name: owner for name, owner in found.items() if name != owner}


def share(layers: Mapping[str, StiefelLoRALinear], shared: Mapping[str, str]) -> None:
    """Let adapters have the very A of others, by name."""
    for name, owner in shared.items():
        layers[name].lora_A = layers[owner].lora_A


def shared_in(layers: Mapping[str, StiefelLoRALinear]) -> dict[str, str]:
    """Return which adapters have the very A of an earlier one, and of which."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(layer.lora_A), name) for name, layer in layers.items()}
    return {name: owner for name, owner in found.items() if name != owner}


def check_shared(file: object, modules: Mapping[str, Mapping[str, Any]], shared: Any) -> None:
    """Raise InputError unless what a file says is shared is the A of another linear of the same form."""
    form = {name: (o["in_features"], o["rank"], o["orthonormal"] == "A" or name) for name, o in modules.items()}
    if not isinstance(shared, dict) or not all(
        isinstance(owner, str) and owner not in shared and name in form and form[name] == form.get(owner)
        for name, owner in shared.items()
    ):
        raise InputError(f"{file} is damaged: shared_A should name linears by others whose A they have")
