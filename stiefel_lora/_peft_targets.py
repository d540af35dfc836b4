"""What PEFT makes of the names of targets, and how to name linear maps so that it adapts exactly those."""

import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from torch import nn

from stiefel_lora._names import name_in, parents
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.errors import InputError, listed

# Linear maps of which PEFT 0.19 and later take the name for that of a part of the fused experts, by what transformers
# says that a kind of model is loaded like. It does so even where a dense layer or a shared expert has such linear maps.
_EXPERTS: dict[str, Set[str]] = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def check_not_for_experts(kind: str | None, names: Iterable[str]) -> None:
    """Raise InputError if PEFT would give the adapters of some linear maps to the fused experts of such a model."""
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as loaded_like
    except ImportError:
        return
    taken = _EXPERTS.get(loaded_like.get(str(kind), ""), set())
    found = [name for name in names if name.rsplit(".", 1)[-1] in taken]
    if found:
        raise InputError(
            f"PEFT takes targets named {', '.join(sorted(taken))} for the fused experts of a {kind}, and "
            f"these adapters would be lost: {listed(found)}; keep them with save_adapter, or leave them out"
        )


def exactly(name: str, others: Iterable[str]) -> str:
    """Return a key of PEFT's patterns, regular expressions for the end of a name, that matches no other adapted one."""
    return f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in others) else name


def describe_targets(names: list[str], model: nn.Module | None, spell: Callable[[str], str]) -> dict[str, Any]:
    """Return target_modules, layers_to_transform and layers_pattern that mean exactly the named linears."""
    by_name: dict[str, Any] = {"target_modules": names, "layers_to_transform": None, "layers_pattern": None}
    if model is None:
        return by_name
    everything = outside_of_adapters(model, spell)
    if [name for name in everything if _peft_would_adapt({**by_name, "target_modules": set(names)}, name)] != names:
        # A list takes all names that end in one of its own; a string is a regular expression for whole names.
        by_name["target_modules"] = "|".join(map(re.escape, names))
    # PEFT finds the layer's number only behind a component in front of the list.
    found = [re.fullmatch(r"(.+?\.(\w+))\.(\d+)\.(.+)", name) for name in names]
    lists = {match and match[1] for match in found}
    if len(lists) != 1 or None in lists:
        return by_name
    matches = [match for match in found if match]
    layers = sorted({int(match[3]) for match in matches})
    some_left_out = len(layers) < len(list(model.get_submodule(name_in(model, matches[0][1])).children()))
    for shorten in (lambda name: name.rsplit(".", 1)[-1], lambda name: name):
        short = {
            "target_modules": sorted({shorten(match[4]) for match in matches}),
            "layers_to_transform": layers if some_left_out else None,
            "layers_pattern": matches[0][2] if some_left_out else None,
        }
        if [name for name in everything if _peft_would_adapt(short, name)] == names:
            return short
    return by_name


def outside_of_adapters(model: nn.Module, spell: Callable[[str], str]) -> list[str]:
    """Return the names of all modules, adapted linears among them, but not of those inside of adapters."""
    adapted = adapter_layers(model)
    outside = [name for name, _ in model.named_modules() if not any(above in adapted for above in parents(name))]
    return list(dict.fromkeys(map(spell, outside)))


def _peft_would_adapt(config: Mapping[str, Any], name: str) -> bool:
    """Follow PEFT's rule for a list of targets (``peft.tuners.tuners_utils.check_target_module_exists``)."""
    parts = name.split(".")
    if not any(".".join(parts[i:]) in config["target_modules"] for i in range(len(parts))):
        return False
    if config["layers_to_transform"] is None:
        return True
    match = re.match(rf".*?\.{config['layers_pattern']}\.(\d+)\.", name)
    return match is not None and int(match[1]) in config["layers_to_transform"]
