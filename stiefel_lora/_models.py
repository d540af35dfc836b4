"""Find the repeated layers of a model and the linear maps inside them, by structure alone.

No model class is named here: a stack of layers is the longest list of repeated blocks that hold linear maps, and a
linear map is a leaf module with an input and an output width, which takes rows of the one to rows of the other.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim.swa_utils import AveragedModel

from stiefel_lora.errors import InputError

Layers: TypeAlias = nn.ModuleList | nn.Sequential

# So many rows that they divide into groups of most numbers, which a block-diagonal map needs.
_ROWS = 5040


def is_linear(module: nn.Module) -> bool:
    """Tell whether ``module`` is a linear map: ``nn.Linear``, GPT-2's ``Conv1D`` or a quantised linear.

    A quantised linear is any leaf module with integer ``in_features`` and ``out_features``. Wrappers around a linear
    have a child module and are not linears themselves; the linear inside is. Nor are modules of these widths that make
    something else of rows: a mixture's router that returns its choice as well, or a block-diagonal map.
    """
    return _has_widths(module) and _keeps_rows(module)


def _has_widths(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    if next(module.children(), None) is not None:
        return False
    return is_conv1d(module) or all(
        isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")
    )


def _keeps_rows(module: nn.Module) -> bool:
    """Tell whether a ``forward`` of its own takes rows (n, in) to rows (n, out), as far as can be told without data."""
    known = type(module).forward is nn.Linear.forward or is_conv1d(module)
    if known or next(module.children(), None) is not None or not is_plain(module):
        return True
    n_in, n_out = linear_shape(module)
    # A copy, called past its hooks: the module itself sees nothing of this.
    empty: Any = copy.copy(module)
    try:
        empty.training = False
        empty._parameters = {name: _without_data(p) for name, p in module._parameters.items()}
        empty._buffers = {name: _without_data(b) for name, b in module._buffers.items()}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            rows = type(module).forward(empty, empty.weight.new_empty(_ROWS, n_in))
    except Exception:  # kernels that need data, say
        return True
    return isinstance(rows, Tensor) and rows.shape == (_ROWS, n_out)


def _without_data(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, device="meta")


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether ``module`` is transformers' ``Conv1D``: a linear whose weight is stored as (in, out)."""
    if type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and tuple(weight.shape) == (getattr(module, "nx", 0), getattr(module, "nf", 0))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear map, whichever way it stores its weight.

    Raises:
        TypeError: If ``module`` does not have the two widths of a linear map, or not yet.
    """
    if not _has_widths(module):
        raise TypeError(f"expected a linear module, got {type(module).__name__}")
    if isinstance(getattr(module, "weight", None), UninitializedParameter):
        raise TypeError(f"a {type(module).__name__} has no weights yet; run a forward pass or initialise it first")
    names = ("nx", "nf") if is_conv1d(module) else ("in_features", "out_features")
    return int(getattr(module, names[0])), int(getattr(module, names[1]))


def first_tensor(module: nn.Module) -> Tensor | None:
    """Return a module's first parameter or, as of linears that hold quantised data, buffer; None without any."""
    return next(chain(module.parameters(), module.buffers()), None)


def is_plain(linear: nn.Module) -> bool:
    """Tell whether a linear map's weight is an ordinary floating-point matrix, not a quantised one."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter):
        return False
    # torchao's quantised weights pass for floating point, but their data is a tensor subclass.
    if type(weight.data) is not Tensor or weight.dim() != 2:
        return False
    # Floating-point numbers of 8 bits have a scale beside them.
    return weight.is_floating_point() and weight.itemsize >= 2 and weight.numel() == math.prod(linear_shape(linear))


def plain_weight(linear: nn.Module) -> nn.Parameter:
    """Return the weight if it is a parameter and an ordinary floating-point matrix.

    Raises:
        InputError: If it is not: nothing can be merged into it or taken from it then.
    """
    weight = getattr(linear, "weight", None)
    if type(weight) is nn.Parameter and is_plain(linear):
        return weight
    if hasattr(weight, "full_tensor"):
        raise InputError(
            f"the weight of {type(linear).__name__} is split over the processes of a distributed job; merge an "
            "adapter, or take a start from weights or their gradients, where the model is whole"
        )
    kind = f"a {type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
    raise InputError(
        f"the weight of {type(linear).__name__} is {kind}, not a plain floating-point matrix (it is "
        f"{'parametrized' if is_plain(linear) else 'quantised'}); dequantise the base model, or remove the "
        "parametrization, to merge into it or to start from its singular vectors"
    )


def named_linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (qualified name, linear map) for ``module`` and all it holds, in order of registration.

    ``nn.MultiheadAttention`` is passed over with its ``out_proj``: it reads the weights and never calls a linear's
    ``forward``, so nothing can be hooked or wrapped there.

    Args:
        module: Where to look; a linear map is yielded as itself, under the name ``prefix``.
        prefix: The qualified name of ``module`` in the model.

    Raises:
        InputError: If PEFT has put an adapter there, whose factors are no linear maps of the model.
    """
    if isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "adapter_layer_names"):
        raise InputError(
            f"{prefix or type(module).__name__} holds an adapter of PEFT; make it one of this package's with from_peft "
            "of stiefel_lora.convert, or take it off with PEFT's unload() or merge_and_unload()"
        )
    if is_linear(module):
        yield prefix, module
    if isinstance(module, nn.MultiheadAttention):
        return
    for name, child in module.named_children():
        yield from named_linears(child, join(prefix, name))


def own_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return for each name the first that its module has in the model: one may stand in several places."""
    first = {module: name for name, module in model.named_modules()}
    return [first[model.get_submodule(name)] for name in names]


def join(prefix: str, name: object) -> str:
    """Join a qualified name and a child's name; the root's name is empty."""
    return f"{prefix}.{name}" if prefix else str(name)


def unwrap(model: nn.Module, *, adding: bool = False) -> nn.Module:
    """Return the model inside ``torch.compile``, ``(Distributed)DataParallel`` and ``AveragedModel``.

    Raises:
        TypeError: If ``model`` is not a module.
        InputError: If parameters are to be added under DistributedDataParallel, which would not synchronise them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel) and adding:
        raise InputError(
            "DistributedDataParallel synchronises only the parameters it was made with: "
            "add the adapters to model.module and wrap it again"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        return unwrap(model.module, adding=adding)
    inner = getattr(model, "_orig_mod", None)
    return unwrap(inner, adding=adding) if isinstance(inner, nn.Module) else model


def find_layers(model: nn.Module, layers: str | None = None) -> tuple[str, Layers]:
    """Find the list of repeated blocks that the model stacks, such as ``model.layers`` of a LLaMA.

    The longest list wins, counted by its most frequent class of block that holds a linear map. Lists inside a repeated
    block, such as a mixture's experts, do not compete with the list they repeat in, nor do those outside the language
    model of one of transformers' models that read images or sound as well and generate text. Of two equally long ones
    the outer wins, if one is within the other.

    Args:
        model: Any module.
        layers: Qualified name of the list, where the longest is not the one wanted; "" for the model itself.

    Returns:
        The qualified name of the list and the list itself.

    Raises:
        InputError: If the name is not a ``ModuleList`` or ``Sequential``, no list holds linear maps, or two lists apart
            are equally long. The message lists what the model has.
    """
    found = dict(layer_lists(model))
    if layers is not None:
        return layers, _named_list(model, layers, found)
    if not found:
        raise InputError(f"{type(model).__name__} has no ModuleList or Sequential of blocks with linear modules")
    competing = _in_language_model(model, found) or found
    longest = max(_repeats(blocks) for blocks in competing.values())
    best = [name for name, blocks in competing.items() if _repeats(blocks) == longest]
    # Of one list in another, as in an ALBERT's single group, the outer.
    best = [name for name in best if not any(is_within(name, other) for other in best)]
    if len(best) > 1:
        raise InputError(
            f"{type(model).__name__} has {len(best)} equally long lists of layers: {_describe(model, found)}; "
            f"name the one meant, such as {best[0]!r}, with layers_path= (of fisher_scores: layers=)"
        )
    return best[0], found[best[0]]


def is_within(name: str, other: str) -> bool:
    """Tell whether the module of one qualified name is inside that of another; all are inside the model, ""."""
    return name != other and name.startswith(other and f"{other}.")


def _in_language_model(model: nn.Module, found: Mapping[str, Layers]) -> dict[str, Layers]:
    """Return the lists inside the language model of a model that has one and generates with it."""
    reads_more = getattr(getattr(model, "config", None), "text_config", None) is not None
    generates = getattr(model, "can_generate", lambda: False)
    if not reads_more or not generates() or not hasattr(model, "get_decoder"):
        return {}
    decoder = model.get_decoder()  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    return {name: blocks for name, blocks in found.items() if id(blocks) in inside}


def find_linears(
    model: nn.Module, *, layers: str | None = None, targets: Sequence[str] | None = None
) -> dict[int, dict[str, nn.Module]]:
    """Find the linear maps of each layer, optionally only those that end in one of the given names.

    Args:
        model: Any module.
        layers: Qualified name of the list of layers, or None to find it by `find_layers`.
        targets: Names such as "q_proj" or "mlp.down_proj"; each is matched against the end of the qualified name, by
            whole components. None takes all linear maps.

    Returns:
        For each position in the list that holds a match, its matches by qualified name.

    Raises:
        InputError: If a target matches nothing or no layer has a linear map. The message lists what there is.
        TypeError: If ``targets`` is a single string.
    """
    if isinstance(targets, str):
        raise TypeError(f"target modules must be a sequence of names, got the string {targets!r}")
    prefix, blocks = find_layers(model, layers)
    linears = {i: dict(named_linears(block, join(prefix, i))) for i, block in enumerate(blocks)}
    if not any(linears.values()):
        raise InputError(f"the layers in {prefix or type(model).__name__!r} have no linear modules")
    if targets is not None:
        names = [name for layer in linears.values() for name in layer]
        wanted, known = set(targets), all_endings(names)
        missing = [target for target in targets if target not in known]
        if missing or not targets:
            have = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise InputError(
                f"no linear module is named {', '.join(missing) or '(none given)'}; the layers have: {have}"
            )
        linears = {i: {name: m for name, m in layer.items() if ends_in(name, wanted)} for i, layer in linears.items()}
    return {i: layer for i, layer in linears.items() if layer}


def split_at_layer(name: str) -> tuple[str, int, str]:
    """Return what stands before the first number in a qualified name, that number, and what stands behind it.

    Without a number all of the name stands before it, and -1 is in its place.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:at]), int(parts[at]) if at < len(parts) else -1, ".".join(parts[at + 1 :])


def endings(name: str) -> Iterator[str]:
    """Yield what matches a qualified name: the name and all that it ends in by whole components, the longest first."""
    while name:
        yield name
        name = name.partition(".")[2]


def all_endings(names: Iterable[str]) -> set[str]:
    """Return what matches at least one of the names, of which a mixture's experts have thousands."""
    return {ending for name in names for ending in endings(name)}


def ends_in(name: str, targets: Set[str]) -> bool:
    """Tell whether one of the targets matches a qualified name."""
    return any(ending in targets for ending in endings(name))


def _named_list(model: nn.Module, name: str, found: dict[str, Layers]) -> Layers:
    try:
        blocks = model.get_submodule(name)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        what = "does not exist" if blocks is None else f"is a {type(blocks).__name__}"
        raise InputError(
            f"the list of layers {name!r} {what}; {type(model).__name__} has: {_describe(model, found) or 'no list'}"
        )
    return blocks


def layer_lists(module: nn.Module, name: str = "") -> Iterator[tuple[str, Layers]]:
    """Yield the lists of blocks with linears, without those nested in a repeated block of another."""
    inner = dict(module.named_children())
    if isinstance(module, nn.ModuleList | nn.Sequential):
        counts = _block_counts(module)
        if counts:
            yield name, module
        inner = {key: child for key, child in inner.items() if counts[type(child)] < 2}
    for key, child in inner.items():
        yield from layer_lists(child, join(name, key))


def _block_counts(blocks: Layers) -> Counter[type]:
    return Counter(type(block) for block in blocks if _holds_linear(block))


def _holds_linear(module: nn.Module) -> bool:
    return any(is_linear(m) or isinstance(m, nn.MultiheadAttention) for m in module.modules())


def _repeats(blocks: Layers) -> int:
    return max(_block_counts(blocks).values())


def _describe(model: nn.Module, found: dict[str, Layers]) -> str:
    parts = []
    for name, blocks in found.items():
        kind, count = _block_counts(blocks).most_common(1)[0]
        parts.append(f"{name or type(model).__name__!r} ({count} x {kind.__name__})")
    return ", ".join(parts)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the context the model is frozen and in eval mode; afterwards it is as it was, whatever happened.

    That is: training modes, ``requires_grad`` of the parameters, the configuration, and the random state of torch.
    Gradients can be taken in it, even within ``torch.inference_mode``.
    """
    training = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    devices = sorted({p.device.index for p in trainable if p.device.type == "cuda"})
    try:
        # Compiled modules run as they are written: hooks and losses are looked into.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.inference_mode(False), torch.random.fork_rng(devices=devices):
            model.requires_grad_(False).eval()
            if cached:
                # A cache of keys and values would only take memory.
                config.use_cache = False  # type: ignore[union-attr]
            yield
    finally:
        if cached:
            config.use_cache = cached  # type: ignore[union-attr]
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        for module, mode in training.items():
            module.training = mode
