"""Put adapters into a model, switch them, merge them, and take them out again.

One set of adapters is in the model at a time: its layers stand where the linears were. Other named sets wait in a
registry on the model object, off its parameters and its state, so optimizers, ``state_dict`` and every other tool see a
model with one adapter.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stiefel_lora._bases import by_own_name, named_bases
from stiefel_lora._models import unwrap
from stiefel_lora._names import name_in, plain_name
from stiefel_lora._sharing import keep_shared, share, sharers
from stiefel_lora._targets import describe, find_targets, module_ranks
from stiefel_lora._types import Orthonormal
from stiefel_lora.adapted import adapter_layers, base_tensors, trained_tensors
from stiefel_lora.errors import InputError, listed
from stiefel_lora.layer import Init, StiefelLoRALinear

logger = logging.getLogger("stiefel_lora")

Model = TypeVar("Model", bound=nn.Module)

DEFAULT_NAME = "default"


@dataclass
class _Aside:
    """A set of adapters that is not in use."""

    layers: dict[str, StiefelLoRALinear]
    tensors: dict[str, Tensor]  # values of the base's own that were trained along, such as a head's


@dataclass
class _Registry:
    """What a model's adapters need to know beyond the layers themselves."""

    active: str = DEFAULT_NAME
    stored: dict[str, _Aside] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()  # parameters that required gradients before the first adapter came
    base: dict[str, Tensor] = field(default_factory=dict)  # the base's values of what a loaded set has overwritten
    disabled: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)  # that keep what is shared shared


def add_adapters(
    model: nn.Module,
    *,
    layers: Sequence[int] | None,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    orthonormal: Orthonormal = "A",
    init: Literal["random", "svd"] | Mapping[str, Init] = "random",
    rank_pattern: Mapping[str, int] | None = None,
    share_A: bool = False,
    layers_path: str | None = None,
    generator: torch.Generator | None = None,
    name: str = DEFAULT_NAME,
) -> list[str]:
    """Freeze a model and put adapters on the named linears of the given layers, in place.

    Calling it again adds to the adapters that are there, so that different layers can have different targets or ranks;
    what else is trainable by then, such as a head, stays so. With another ``name`` it starts another set and puts the
    present one aside; what was trained along with that one is trained along with the new one too, from where it is, and
    each set keeps its own; see `use_adapter`.

    Args:
        model: Any module that stacks layers.
        layers: Positions in the list of layers, negative ones counted from the end; None for all.
        rank: Rank of the updates.
        alpha: Numerator of the scaling (default: twice the module's rank).
        target_modules: Names such as "q_proj" or "mlp.down_proj", matched against the end of the qualified name by
            whole components; "all-linear" for every linear in the layers (which the output head is not) but those of
            one input or output, as gates, and those that cannot have an adapter, which is logged as a warning. By
            default the query, key, value, up and down projections: ("q_proj", "k_proj", "v_proj", "up_proj",
            "down_proj") in LLaMA-like models, the names of the same maps in others, and in layers where those are not
            known "all-linear", with a warning.
        dropout: Probability of dropping an entry of the update's input while training.
        rslora: Scale by alpha / sqrt(rank).
        orthonormal: Which factor is orthonormal: "A", "B" or "both"; see `StiefelLoRALinear`.
        init: Start of the orthonormal factors: "random", "svd", or for each qualified name a tensor (a pair for
            "both"), such as `gradient_init` returns.
        rank_pattern: Ranks that differ, by names matched like targets; the longest match counts. It may name targets
            of layers that are not adapted.
        share_A: Let a linear of all layers, such as "self_attn.q_proj", have one orthonormal A, and a B for each layer,
            where the layers agree in its number of inputs, rank, device and precision: about half the parameters. It
            stays one in folders of `save_adapter`, in ``load_state_dict`` and in copies of the model.
        layers_path: Qualified name of the list of layers, where the longest is not the one meant.
        generator: CPU source of randomness for "random".
        name: Name of this set of adapters.

    Returns:
        The qualified names of the adapted linears, in the model's order. They are also logged, at level INFO; a target
        that some of the layers lack, as in a hybrid model, is logged as a warning.

    Raises:
        InputError: If a target matches in no layer of the list, a layer does not exist or is named and has none of the
            targets, a rank is too large for a target, or a linear has an adapter already or cannot have one, or within
            `disable_adapters`, or with ``share_A`` where A is not the one orthonormal factor or does not start at
            random. The model is left as it was.
    """
    model = unwrap(model, adding=True)
    targets = find_targets(model, layers, target_modules, layers_path)
    ranks = module_ranks(model, targets, rank, rank_pattern)
    if not isinstance(init, str) and set(init) != set(targets):
        raise InputError(f"init must name the adapted linears, {listed(targets)}; got {listed(init)}")
    shared = sharers(model, ranks, orthonormal, init) if share_A else {}
    common = {"dropout": dropout, "rslora": rslora, "orthonormal": orthonormal, "generator": generator}
    options = {
        target: {
            **common,
            "rank": ranks[target],
            "alpha": alpha,
            "init": init if isinstance(init, str) else init[target],
        }
        for target in targets
    }
    return insert_adapters(model, options, name=name, shared=shared)


def insert_adapters(
    model: nn.Module,
    options: Mapping[str, Mapping[str, Any]],
    *,
    name: str = DEFAULT_NAME,
    inherits: bool = True,
    shared: Mapping[str, str] | None = None,
) -> list[str]:
    """Put adapters on linears given by qualified name; what `add_adapters` does once it knows the names.

    Args:
        model: Any module.
        options: For each qualified name the arguments of `StiefelLoRALinear` after ``base``.
        name: Name of the set of adapters to add to or start.
        inherits: Whether a new set goes on training what was trained along with the one before.
        shared: Names whose adapters are to have the very A of another's, by the name of that one.

    Returns:
        The names.

    Raises:
        InputError: If a name is not a linear of the model, has an adapter already, or an option is out of range, or
            within `disable_adapters`. The model is left as it was.
    """
    model = unwrap(model, adding=True)
    check_enabled(model)
    check_home(model)
    registry = _registry(model, name)
    if name in registry.stored:
        raise InputError(f"the adapter {name!r} exists already; switch to it with use_adapter, or remove it")
    present = adapter_layers(model) if registry.active == name else {}
    own = by_own_name(model, options)
    own_name = dict(zip(options, own, strict=True))
    bases = named_bases(model, own, present)
    if registry.active != name:
        _check_shapes(model, registry.base)
    trainable: dict[str, Tensor] = {key: p for key, p in model.named_parameters() if p.requires_grad}
    try:
        with _original_weights(model):
            new = {key: _wrap(key, base, own[key]) for key, base in bases.items()}
        share(new, {own_name[key]: own_name[owner] for key, owner in (shared or {}).items()})
    except BaseException:
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        raise
    if not adapter_layers(model) and not registry.stored:
        registry.trainable = tuple(trainable)
    along = trainable if present else {}
    if registry.active != name:
        # They are not the base's own, so they have to be the new set's to be saved and switched with it.
        along = trained_in_place(model) if inherits else {}
        _take_out(model, registry)
        registry.active = name
    if shared and not registry.hooks:
        registry.hooks = keep_shared(model)
    model._stiefel_adapters = registry  # type: ignore[assignment]
    model.requires_grad_(False)
    _put_in(model, {**present, **new})
    wrapped = {id(p) for base in bases.values() for p in base.parameters()}
    for tensor in along.values():
        _let_train(tensor, id(tensor) not in wrapped)
    logger.info("adapter %r is on %s", name, describe(map(plain_name, new)))
    return list(new)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the model's sets of adapters, the one in use first; empty without adapters."""
    registry = _registry(model)
    return ([registry.active] if adapter_layers(model) else []) + list(registry.stored)


def check_enabled(model: nn.Module) -> None:
    """Raise InputError within `disable_adapters`, where the model's parameters are not those of its adapters."""
    if any(_registry(part).disabled for part in _homes(model).values()):
        raise InputError("leave disable_adapters before you add, switch, remove, save or load adapters")


def check_no_others(model: nn.Module, instead: str) -> None:
    """Raise InputError if sets of adapters besides the one in use would be lost; ``instead`` says what to do."""
    others = adapter_names(model)[1:]
    if others:
        raise InputError(f"the model holds other adapters ({', '.join(others)}); remove them first, or {instead}")


def use_adapter(model: nn.Module, name: str) -> None:
    """Put the named set of adapters into the model, and the one in use aside; a merged one is unmerged first.

    Parameters of the base that were trained along with a set, such as a head, are switched with it.

    Raises:
        InputError: If the model has no such set or is in DistributedDataParallel, a parameter that is to be switched
            has gone or has another shape now, a linear map of the set has gone or is another module now, or within
            `disable_adapters`. The model is left as it was.
    """
    given, model, registry = model, unwrap(model), _registry(model)
    check_home(model)
    if name not in adapter_names(model):
        raise InputError(f"no adapter is named {name!r}; the model has: {', '.join(adapter_names(model)) or 'none'}")
    if name != registry.active:
        unwrap(given, adding=True)
        _check_bases(model, registry.stored[name].layers)
        _check_shapes(model, registry.stored[name].tensors)
        _take_out(model, registry)
        aside = registry.stored.pop(name)
        registry.active = name
        _put_in(model, aside.layers)
        set_tensors(model, aside.tensors, trainable=True)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as its base does, exactly, whether the adapters are merged or not.

    Parameters of the base that a loaded set has overwritten, such as a head, have the base's values again; what was
    trained without being loaded stays, and so do running statistics of the base that moved in training.

    Raises:
        InputError: If one of these has another shape now, as after ``resize_token_embeddings``.
    """
    parts = list(_homes(model).values())
    for part in parts:
        _check_shapes(part, _registry(part).base)
    with _original_weights(model), ExitStack() as stack:
        for layer in adapter_layers(model).values():
            stack.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        for part in parts:
            registry, tensors = _registry(part), base_tensors(part)
            for name, value in registry.base.items():
                stack.callback(setattr, tensors[name], "data", tensors[name].data)
                tensors[name].data = value.to(tensors[name], copy=True)
            stack.callback(setattr, registry, "disabled", registry.disabled)
            registry.disabled = True
        yield


@contextmanager
def _original_weights(model: nn.Module) -> Iterator[None]:
    """Within the context the adapted linears have their own weights, even if they are merged."""
    with ExitStack() as stack:
        for layer in adapter_layers(model).values():
            stack.enter_context(layer.original_weight())
        yield


def trained_in_place(model: nn.Module) -> dict[str, Tensor]:
    """Return what was trained along with the adapters in use without being loaded: the base's own values are gone."""
    if not adapter_layers(model):
        return {}
    known = _registry(model).base
    return {name: tensor for name, tensor in trained_tensors(model).items() if name not in known}


def keep_base_values(model: nn.Module, names: Iterable[str]) -> None:
    """Remember tensors of the base that a set of adapters is about to overwrite.

    What is trained is no longer the base's own: it is being trained along with the set that is there.
    """
    registry, tensors, trained = _registry(model), base_tensors(model), trained_tensors(model)
    for name in names:
        if name not in trained:
            registry.base.setdefault(name, tensors[name].detach().clone())


def remove_adapters(model: Model, name: str | None = None) -> Model:
    """Take adapters out: the very base modules come back, unmerged.

    When the last adapter goes, parameters are trainable again as they were before the first one came. Parameters of
    the base that a loaded set had overwritten get their values back; what was trained without being loaded stays.

    Args:
        model: A model with adapters.
        name: The set to remove (default: all). If it is in use, the model is left as its base, the others aside.

    Returns:
        The model given, unwrapped from DataParallel and the like.

    Raises:
        InputError: If the model has no adapters, or none of that name, or is only a part of the one that has them, a
            parameter that a set has overwritten has another shape now, or within `disable_adapters`. The model is left
            as it was.
    """
    bare, registry = unwrap(model), _registry(model)
    check_home(bare)
    names = adapter_names(bare)
    if not names or (name is not None and name not in names):
        which = "" if name is None else f"{name!r} "
        raise InputError(f"no adapter {which}to remove; the model has: {', '.join(names) or 'none'}")
    if name is None or name == registry.active:
        _take_out(bare, registry)
    for gone in names if name is None else [name]:
        del registry.stored[gone]
    if not registry.stored and not adapter_layers(bare):
        forget_adapters(bare)
    return bare  # type: ignore[return-value]


def _wrap(name: str, base: nn.Module, options: Mapping[str, Any]) -> StiefelLoRALinear:
    try:
        return StiefelLoRALinear(base, **options)
    except (InputError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error


def _registry(model: nn.Module, name: str = DEFAULT_NAME) -> _Registry:
    """Return what a model knows of its adapters, by present names: blocks may have been wrapped since it was noted."""
    model = unwrap(model)
    registry = getattr(model, "_stiefel_adapters", None) or _Registry(active=name)
    now = partial(name_in, model)
    registry.trainable = tuple(map(now, registry.trainable))
    registry.base = {now(key): value for key, value in registry.base.items()}
    for aside in registry.stored.values():
        aside.layers = {now(key): layer for key, layer in aside.layers.items()}
        aside.tensors = {now(key): value for key, value in aside.tensors.items()}
    return registry


def _homes(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that adapters were put into by name: the model itself, as "", or parts of it."""
    return {name: m for name, m in unwrap(model).named_modules() if "_stiefel_adapters" in vars(m)}


def check_home(model: nn.Module) -> None:
    """Raise InputError unless it is the module that knows about its adapters, not one around it or a part of it."""
    parts = [name for name in _homes(model) if name]
    if parts:
        raise InputError(
            f"the adapters were put into {listed(parts)}, a part of {type(model).__name__}; give that part of the model"
        )
    if "_stiefel_adapters" not in vars(model) and any(layer.is_known for layer in adapter_layers(model).values()):
        raise InputError(
            f"this {type(model).__name__} is a part of the model that has the adapters; give the model that "
            "add_adapters or load_adapter was given"
        )


def forget_adapters(model: nn.Module) -> None:
    """Drop the registry and its hooks, and let train what trained before."""
    registry, parameters = _registry(model), dict(model.named_parameters())
    for handle in registry.hooks:
        handle.remove()
    for name in registry.trainable:
        if name in parameters:
            parameters[name].requires_grad_(True)
    if hasattr(model, "_stiefel_adapters"):
        del model._stiefel_adapters


def _put_in(model: nn.Module, layers: Mapping[str, StiefelLoRALinear]) -> None:
    for layer in layers.values():
        # The model may have been moved or converted, or changed mode, while the layer was aside.
        layer.follow_base()
        layer.is_known = True
    replace_modules(model, layers)


def _take_out(model: nn.Module, registry: _Registry) -> None:
    check_enabled(model)
    layers = adapter_layers(model)
    if not layers:
        return
    _check_shapes(model, registry.base)
    for layer in layers.values():
        layer.unmerge()
    replace_modules(model, {name: layer.base for name, layer in layers.items()})
    trained = {name: tensor.detach().clone() for name, tensor in trained_tensors(model).items()}
    registry.stored[registry.active] = _Aside(layers, trained)
    set_tensors(model, {**trained, **registry.base}, trainable=False)


def _check_bases(model: nn.Module, layers: Mapping[str, StiefelLoRALinear]) -> None:
    """Raise InputError if the linears that a set put aside was made for are not in the model any more."""
    there = dict(model.named_modules(remove_duplicate=False))
    found = {name: module.base if isinstance(module, StiefelLoRALinear) else module for name, module in there.items()}
    changed = [name for name, layer in layers.items() if found.get(name) is not layer.base]
    if changed:
        raise InputError(
            f"these adapters were made for linears that are not in the model any more, {listed(changed)}; put back "
            "what was replaced or cut off, or remove the set (remove_adapters)"
        )


def _check_shapes(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raise InputError if a tensor of the base has gone, or is no longer of the shape that it is to have again."""
    tensors = base_tensors(model)
    shapes = {name: tuple(tensors[name].shape) if name in tensors else None for name in values}
    changed = [
        f"{name} had shape {tuple(value.shape)} and "
        + ("is gone" if shapes[name] is None else f"has {shapes[name]} now")
        for name, value in values.items()
        if shapes[name] != tuple(value.shape)
    ]
    if changed:
        raise InputError(f"{listed(changed)}; bring it back to what it was (resize_token_embeddings) first")


@torch.no_grad()
def set_tensors(model: nn.Module, values: Mapping[str, Tensor], *, trainable: bool) -> None:
    """Give tensors of the base their values in a set of adapters, or the base's own."""
    tensors = base_tensors(model)
    for name, value in values.items():
        tensors[name].copy_(value)
        _let_train(tensors[name], trainable)


def _let_train(tensor: Tensor, trainable: bool) -> None:
    if isinstance(tensor, nn.Parameter):  # not a buffer
        tensor.requires_grad_(trainable)


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules where others are, by name; in all places where one of those stands in several."""
    successors = {id(model.get_submodule(name)): module for name, module in modules.items()}
    for parent in list(model.modules()):
        for child, held in list(parent._modules.items()):
            if id(held) in successors:
                setattr(parent, child, successors[id(held)])
