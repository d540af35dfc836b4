"""Choose the linears of a model that get adapters: which layers, which names, which ranks, and which cannot."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from torch import nn

from stiefel_lora._models import (
    Layers,
    all_endings,
    endings,
    ends_in,
    find_layers,
    is_within,
    join,
    layer_lists,
    linear_shape,
    named_linears,
    own_names,
    split_at_layer,
)
from stiefel_lora._sources import read_past_forward
from stiefel_lora.errors import InputError, listed
from stiefel_lora.layer import StiefelLoRALinear, check_rank

logger = logging.getLogger("stiefel_lora")

# The paper's choice is query, key, value, up and down; one line for each way in which architectures name these. In each
# layer the first line counts of which it has every name, so that a hybrid's layers may differ.
DEFAULT_TARGETS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),  # LLaMA, Qwen, Gemma, Mistral
    ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),  # Phi, OPT, ViT
    ("q_proj", "k_proj", "v_proj", "fc_in", "fc_out"),  # GPT-J
    ("q_proj", "k_proj", "v_proj", "c_fc", "c_proj"),  # StarCoder2
    ("q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj"),  # GLM
    ("q_proj", "k_proj", "v_proj", "w3", "w2"),  # LFM2
    ("q_proj", "k_proj", "v_proj", "Wi", "mlp.Wo"),  # ModernBERT's decoder
    ("in_proj_qkv", "up_proj", "down_proj"),  # Qwen3.5's linear attention
    ("in_proj_qkvz", "up_proj", "down_proj"),  # Qwen3-Next's
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "up_proj", "down_proj"),  # DeepSeek-V3
    ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "up_proj", "down_proj"),  # DeepSeek-V2-Lite
    ("q_proj", "up_proj", "down_proj"),  # layers of Gemma 3n and 4 that take keys and values from others
    ("qkv_proj", "gate_up_proj", "down_proj"),  # Phi-3
    ("qkv_proj", "fc_in", "fc_out"),  # CodeGen
    ("Wqkv", "up_proj", "down_proj"),  # MPT
    ("Wqkv", "Wi", "mlp.Wo"),  # ModernBERT
    ("c_attn", "c_fc", "mlp.c_proj"),  # GPT-2
    ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    ("query", "key", "value", "intermediate.dense", "output.dense"),  # BERT, RoBERTa: attention.output.dense as well
    ("query", "key", "value", "ffn", "ffn_output"),  # ALBERT
    ("query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"),  # DeBERTa
    ("q_lin", "k_lin", "v_lin", "lin1", "lin2"),  # DistilBERT
    ("q", "k", "v", "intermediate.dense", "output.dense"),  # MPNet
    ("q", "k", "v", "wi", "wo"),  # T5
    ("q", "k", "v", "wi_0", "wi_1", "wo"),  # T5 1.1
)


def find_targets(
    model: nn.Module, layers: Sequence[int] | None, targets: Sequence[str] | str | None, path: str | None
) -> list[str]:
    """Return the qualified names of the linears to adapt, layer by layer; see `add_adapters`.

    A warning is logged of what matches in some of the layers only (a hybrid model's layers are not alike), of layers
    that no default is known for, and of what "all-linear" leaves out because it cannot have an adapter.

    Raises:
        InputError: If a layer does not exist, a target matches in no layer of the list, a layer that was named has
            none of the targets, or a linear that was named cannot have an adapter. The message lists what there is.
        TypeError: If ``targets`` is a string other than "all-linear", a layer is not an int, or one of the two is an
            iterator, which could be gone through but once.
    """
    if isinstance(targets, str) and targets != "all-linear":
        raise TypeError(f"target_modules must be a sequence of names or 'all-linear', got the string {targets!r}")
    for option, given in (("target_modules", targets), ("layers", layers)):
        if isinstance(given, Iterator):
            raise TypeError(f"{option} must be a sequence, got the {type(given).__name__} {given!r}; make a list of it")
    if layers is not None and not (isinstance(layers, Iterable) and all(map(_is_int, layers))):
        raise TypeError(f"layers must be a sequence of ints or None, got {layers!r}")
    prefix, blocks = find_layers(model, path)
    chosen = _layer_indices(blocks, layers, prefix)
    linears = {i: [name for name, _ in wrappable_linears(b, join(prefix, i))] for i, b in enumerate(blocks)}
    found = {i: linears[i] for i in chosen}
    if targets is None or isinstance(targets, str):
        found = _default_targets(model, found) if targets is None else _all_linear(model, found)
        _warn_of_experts(blocks[i] for i in chosen)
    else:
        wanted = list(targets)
        _check_targets(model, linears, wanted)
        found = {i: _ending_in(names, set(wanted)) for i, names in found.items()}
        _warn_of_gaps(found, wanted)
    empty = [i for i, names in found.items() if not names]
    if empty and (layers is not None or len(empty) == len(found)):
        have = last_names(_flat({i: linears[i] for i in empty}))
        if have and (targets is None or isinstance(targets, str)):
            have += ", of one input or output or such as cannot have an adapter"
        raise InputError(
            f"no target module is in layer {ranges(sorted(empty))} of {prefix!r}, which has {have or 'no linear'}"
        )
    names = _each_once(model, _flat(found))
    check_called(dict(model.named_modules()), names)
    return names


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _warn_of_experts(blocks: Iterable[nn.Module]) -> None:
    """Log where a mixture's experts are kept as one tensor, which is no linear map to put an adapter on."""
    kept = {
        join(name, key): None
        for block in blocks
        for name, module in block.named_modules()
        if "expert" in name
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    if kept:
        logger.warning("no adapter can be put on experts that are kept as one tensor: %s", listed(kept))


def _each_once(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names without those of modules that were named before, as where layers share one."""
    return list(dict.fromkeys(own_names(model, names)))


def _ending_in(names: Iterable[str], targets: Set[str]) -> list[str]:
    return [name for name in names if ends_in(name, targets)]


def _flat(linears: Mapping[int, Sequence[str]]) -> list[str]:
    return [name for names in linears.values() for name in names]


def _layer_indices(blocks: Layers, layers: Sequence[int] | None, prefix: str) -> list[int]:
    count = len(blocks)
    if layers is None:
        return list(range(count))
    bad = [i for i in layers if not -count <= i < count]
    if bad or not layers:
        what = f"layer {', '.join(map(str, bad))} does not exist" if bad else "no layer is given"
        raise InputError(f"{what}: {prefix or type(blocks).__name__} has the layers 0 to {count - 1}")
    indices = [i % count for i in layers]
    twice = [str(i) for i, n in Counter(indices).items() if n > 1]
    if twice:
        raise InputError(f"layer {', '.join(twice)} is given twice")
    return indices


def wrappable_linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (qualified name, linear) for all linears; one that has an adapter goes by the adapter's name."""
    for name, linear in named_linears(module, prefix):
        parent = name.removesuffix(".base")
        inner = parent[len(prefix) + 1 :] if prefix else parent
        adapted = parent != name and isinstance(module.get_submodule(inner), StiefelLoRALinear)
        yield parent if adapted else name, linear


def check_called(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Raise InputError if the parents of linears read their weights past the ``forward`` of an adapter.

    Args:
        modules: All modules of the model, by qualified name.
        names: Those of the linears.
    """
    if readers := _readers(modules, names):
        raise InputError(f"{_not_called(readers)}; leave it out")


def _readers(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """Return the linears whose parents read their weights, each with the name of the parent's class."""
    readers: dict[str, str] = {}
    for name in names:
        above, _, child = name.rpartition(".")
        parent = modules[above]
        # Jamba calls it only where it is quantised.
        in_mamba = child == "dt_proj" and "Mamba" in type(parent).__name__
        read = read_past_forward(type(parent))  # type: ignore[arg-type]  # a class is hashable
        if in_mamba or child in read:
            readers[name] = type(parent).__name__
    return readers


def _not_called(readers: Mapping[str, str]) -> str:
    return (
        f"{listed(readers)} cannot have an adapter: {listed(set(readers.values()))} reads its weight, at least in "
        "training, where it should call it"
    )


def _default_targets(model: nn.Module, linears: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Return for each layer the linears of the first default that it has, or all of them."""
    found, unknown = {}, {}
    for i, names in linears.items():
        known = all_endings(names)
        targets = next((each for each in DEFAULT_TARGETS if known.issuperset(each)), None)
        if targets is None:
            unknown[i] = names
        else:
            found[i] = _ending_in(names, set(targets))
    everything = _all_linear(model, unknown)
    if have := last_names(_flat(everything)):
        logger.warning(
            "no default target modules are known for layers %s, of which all linear maps are taken: %s "
            "(target_modules names others)",
            ranges([i for i in sorted(everything) if everything[i]]),
            have,
        )
    return {i: found[i] if i in found else everything[i] for i in linears}


def _all_linear(model: nn.Module, linears: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Return the linears that can have an adapter, without gates of one output, which are of rank one as they are."""
    found = {i: [name for name in names if min(_shape(model, name)) > 1] for i, names in linears.items()}
    readers = _readers(dict(model.named_modules(remove_duplicate=False)), _flat(found))
    if readers:
        logger.warning("%s; it is left out", _not_called(readers))
    return {i: [name for name in names if name not in readers] for i, names in found.items()}


def _check_targets(model: nn.Module, linears: Mapping[int, Sequence[str]], targets: Sequence[str]) -> None:
    """Raise InputError unless there are targets, each of which matches in at least one of all the layers."""
    names = _flat(linears)
    have = last_names(names) or "no linear"
    if not targets:
        raise InputError(f"target_modules is empty; the layers have: {have}")
    known = all_endings(names)
    missing = [target for target in targets if target not in known]
    if missing:
        what = ", ".join(map(repr, missing))
        raise InputError(
            f"target module {what} matches nothing: the layers have {have}{_elsewhere(model, set(missing))}"
        )


def _warn_of_gaps(found: Mapping[int, Sequence[str]], targets: Sequence[str]) -> None:
    """Say which targets match in some of the layers only; a target with a layer's number is meant for that one."""
    places: dict[str, list[int]] = {target: [] for target in targets}
    for i in sorted(found):
        for target in places.keys() & all_endings(found[i]):
            places[target].append(i)
    for target, layers in places.items():
        if len(layers) < len(found) and not any(part.isdigit() for part in target.split(".")):
            where = f"in layers {ranges(layers)} of {len(found)} only" if layers else "in none of the layers"
            logger.warning("target module %r matches %s", target, where)


def _elsewhere(model: nn.Module, missing: Set[str]) -> str:
    """Return where targets that the layers lack are, such as the output head, and how to adapt them all the same."""
    lists = [path for path, _ in layer_lists(model) if path]
    places: dict[str, list[str]] = {}
    for name in _ending_in((name for name, _ in wrappable_linears(model)), missing):
        around = [path for path in lists if is_within(name, path)]
        places.setdefault(max(around, key=len, default=""), []).append(name)
    hints = {
        path: f"is in another list of layers: layers_path={path!r} takes it"
        if path
        else "is not in them: stiefel_lora.adapters.insert_adapters takes it"
        for path in places
    }
    return "".join(f"; {listed(names)} {hints[path]}" for path, names in places.items())


def describe(names: Iterable[str]) -> str:
    """Return qualified names in short, layers with the same linears together: "model.layers 0-2, 5: q_proj, k_proj"."""
    stacks: dict[tuple[str, int], list[str]] = {}
    others = []
    for name in names:
        stack, layer, inner = split_at_layer(name)
        if inner:
            stacks.setdefault((stack, layer), []).append(inner)
        else:
            others.append(name)
    alike: dict[tuple[str, str], list[int]] = {}
    for (stack, layer), inside in stacks.items():
        alike.setdefault((stack, ", ".join(inside)), []).append(layer)
    blocks = [f"{stack} {ranges(layers)}".strip() + f": {inner}" for (stack, inner), layers in alike.items()]
    return "; ".join(blocks + others)


def ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers with runs shortened: 3-5, 9."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def last_names(names: Iterable[str]) -> str:
    """Return what a user can name: the last components of qualified names, each once."""
    return ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def module_ranks(
    model: nn.Module, targets: Sequence[str], rank: int, pattern: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the rank of each target: that of the longest key of ``pattern`` that matches its name, or ``rank``.

    Raises:
        InputError: If a key matches no target, nor its like in another layer, or a rank is out of range for one.
        TypeError: If a rank is not an int.
    """
    pattern = pattern or {}
    known = all_endings(targets)
    unused = [key for key in pattern if key not in known]
    if unused:
        # The same linears of layers left out are no mistake: which layers are chosen may depend on the data.
        kinds = {_without_numbers(target) for target in targets}
        alike = all_endings(name for name, _ in wrappable_linears(model) if _without_numbers(name) in kinds)
        unused = [key for key in unused if key not in alike]
    if unused:
        raise InputError(f"rank_pattern {', '.join(unused)} matches none of the adapted linears: {listed(targets)}")
    # The longest ending comes first.
    best = {target: next((ending for ending in endings(target) if ending in pattern), None) for target in targets}
    ranks = {target: rank if key is None else pattern[key] for target, key in best.items()}
    shapes = {target: _shape(model, target) for target in ranks}
    # The smallest first: its limit is the one to know.
    for target in sorted(ranks, key=lambda target: min(shapes[target])):
        try:
            check_rank(ranks[target], *shapes[target])
        except (InputError, TypeError) as error:
            raise type(error)(f"{target}: {error}") from None
    return ranks


def _without_numbers(name: str) -> str:
    return ".".join("" if part.isdigit() else part for part in name.split("."))


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    module = model.get_submodule(name)
    return linear_shape(module.base if isinstance(module, StiefelLoRALinear) else module)
