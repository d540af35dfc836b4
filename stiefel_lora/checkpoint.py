"""Save a model's adapters to a folder and load them: a safetensors file and a JSON configuration, never a pickle."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from stiefel_lora._base_model import check_description, describe_base
from stiefel_lora._files import atomic_folder, fill_json, read_json
from stiefel_lora._models import linear_shape, unwrap
from stiefel_lora._names import name_in, plain_name
from stiefel_lora._safetensors import read_safetensors, taken, write_safetensors
from stiefel_lora._sharing import check_shared, shared_in
from stiefel_lora._targets import wrappable_linears
from stiefel_lora.adapted import adapter_layers, base_tensors, required_layers, trained_tensors
from stiefel_lora.adapters import (
    DEFAULT_NAME,
    adapter_names,
    check_enabled,
    insert_adapters,
    keep_base_values,
    set_tensors,
    trained_in_place,
)
from stiefel_lora.config import ADAPTER_FILES
from stiefel_lora.errors import InputError, ManifoldError, listed
from stiefel_lora.factors import CONSTRAINED, FREE, factor_shapes, folded, manifold_error, orthonormal_factors
from stiefel_lora.layer import OFF_MANIFOLD, StiefelLoRALinear, check_options
from stiefel_lora.stiefel import orthogonality_error

logger = logging.getLogger("stiefel_lora")

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
FORMAT = "stiefel_lora"
FORMAT_VERSION = 2
# In the metadata of the weights: a digest of the modules in the configuration beside them.
_OF_ONE_SAVE = "stiefel_lora_modules"


@dataclass(frozen=True)
class AdapterState:
    """A set of adapters apart from any model, as a folder holds it.

    Names are those of the plain model, whatever its parts were wrapped in.

    Attributes:
        base_model: What is known of the base: its "class", "model_type" and "name_or_path", and as "task" the options
            of its configuration by which it differs from what the name alone gives, such as a classifier's labels.
        modules: For each adapted linear, by qualified name, the options of its `StiefelLoRALinear` and its
            "in_features" and "out_features".
        factors: For each adapted linear its factors by parameter name.
        parameters: The base's own parameters that were trained with the adapters, such as a classification head's, and
            the saved buffers of modules that were trained whole.
        tied: For each further name of a parameter that the base shares, as a head with the embedding, its name in
            ``parameters``. None if that is not known, as of folders written before this was kept.
        shared: For each adapted linear that has the very A of an earlier one, the name of that.
    """

    base_model: dict[str, Any]
    modules: dict[str, dict[str, Any]]
    factors: dict[str, dict[str, Tensor]]
    parameters: dict[str, Tensor]
    tied: dict[str, str] | None = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def whole_parameters(self) -> dict[str, Tensor]:
        """The parameters under all their names."""
        return {**self.parameters, **{other: self.parameters[name] for other, name in (self.tied or {}).items()}}


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapters in use to a folder, atomically; other files in the folder are left alone.

    Other parameters that require gradients, such as a classification head trained with the adapters, are saved as well,
    and the buffers of modules all of whose parameters do, such as a head's running statistics.
    Factors that something other than a Riemannian optimizer has moved off the manifold are replaced in the file by
    orthonormal ones of the same update, with a warning in the log.

    Args:
        model: A model with adapters, merged or not.
        path: The folder; its parents are made.

    Raises:
        InputError: If the model has no adapters, a tensor has a NaN or infinity, ``path`` is a file, a parameter of an
            adapted linear itself was trained, or a trained one is split over processes.
    """
    write_adapter(adapter_state(model), path)


def load_adapter(model: nn.Module, path: str | Path, *, name: str = DEFAULT_NAME) -> list[str]:
    """Put saved adapters into a model, in place: onto the bare base, or into adapters of the same form.

    Args:
        model: The base model; or one whose adapters in use have this name, the same modules and the same options, as
            when training is resumed: then the factors are copied into the parameters that are there.
        path: A folder written by `save_adapter`.
        name: Name of the set of adapters; see `stiefel_lora.adapters.use_adapter`.

    Returns:
        The qualified names of the adapted linears.

    Raises:
        InputError: If the folder is missing, damaged, of another kind or of a newer version, holds a factor that is not
            on the manifold, or does not fit the model (names or shapes are listed); or if something would become
            trainable in DistributedDataParallel. The model is left as it was.

    Saved parameters of the base, such as a head, overwrite the model's and are trainable again; the model has its own
    back when the set is removed, unless they were trainable before (being trained along with the adapters in use).
    """
    return insert_state(model, read_adapter(path), what=f"the adapter in {path}", name=name)


def adapter_state(model: nn.Module) -> AdapterState:
    """Return the adapters in use and what was trained with them, as views of the model's parameters.

    Raises:
        InputError: If the model has no adapters, or a parameter of an adapted linear itself was trained, or within
            `disable_adapters`.
    """
    return renamed(state_in_place(model), plain_name)


def state_in_place(model: nn.Module) -> AdapterState:
    """Return what `adapter_state` does, by the names that this very model has."""
    model = unwrap(model)
    check_enabled(model)
    layers = required_layers(model, with_values=True)
    modules = {name: _module_config(layer) for name, layer in layers.items()}
    factors, trained = _factors_to_save(layers), _trained(model, layers)
    tied = _other_names(model, trained)
    return AdapterState(describe_base(model), modules, factors, trained, tied, shared_in(layers))


def renamed(state: AdapterState, name_of: Callable[[str], str]) -> AdapterState:
    """Return the state with other names for its modules and parameters."""
    return replace(
        state,
        modules={name_of(name): options for name, options in state.modules.items()},
        factors={name_of(name): factors for name, factors in state.factors.items()},
        parameters={name_of(name): tensor for name, tensor in state.parameters.items()},
        tied=state.tied and {name_of(other): name_of(name) for other, name in state.tied.items()},
        shared={name_of(name): name_of(owner) for name, owner in state.shared.items()},
    )


def _factors_to_save(layers: Mapping[str, StiefelLoRALinear]) -> dict[str, dict[str, Tensor]]:
    """Return the factors of all layers; where something has moved them off the manifold, others of the same update."""
    found, errors = {}, {}
    for name, layer in layers.items():
        factors = found[name] = {key: factor.detach() for key, factor in layer.factors().items()}
        update, error = folded(factors), manifold_error(factors, layer.orthonormal)
        if OFF_MANIFOLD < error < math.inf:
            errors[name] = error
            found[name] = orthonormal_factors(*update, layer.orthonormal)
    if errors:
        logger.warning(
            "%s: off the manifold by |X^T X - I|_F up to %.2g, as after another optimizer or an average; the same "
            "updates are saved with orthonormal factors",
            listed(errors),
            max(errors.values()),
        )
    _warn_of_untrained(layers)
    return found


def _warn_of_untrained(layers: Mapping[str, StiefelLoRALinear]) -> None:
    """Log which updates are zero still while others are not: the model may have passed their linears by."""
    still = [name for name, layer in layers.items() if not layer.factors()[FREE[layer.orthonormal]].any()]
    if 0 < len(still) < len(layers):
        logger.warning(
            "%s: the update is zero as at the start, while others are trained; if it was to be trained as well, the "
            "model does not call this linear in training",
            listed(still),
        )


def _other_names(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the further names of trained parameters that stand in several places."""
    first = {id(p): name for name, p in model.named_parameters() if name in trained}
    everything = model.named_parameters(remove_duplicate=False)
    return {other: first[id(p)] for other, p in everything if id(p) in first and other not in trained}


def _trained(model: nn.Module, layers: Mapping[str, StiefelLoRALinear]) -> dict[str, Tensor]:
    trained = {name: tensor.detach() for name, tensor in trained_tensors(model).items()}
    split = [name for name, tensor in trained.items() if hasattr(tensor, "full_tensor")]  # a DTensor, slow to import
    if split:
        raise InputError(
            f"{listed(split)} is split over processes by FSDP; before saving, call unshard() in all of them, of the "
            "module that holds it and was given to fully_shard, and reshard() afterwards"
        )
    adapted = [name for name in trained if name.startswith(tuple(f"{layer}." for layer in layers))]
    if adapted:
        raise InputError(
            f"{listed(adapted)} is trainable beside its adapter, which a saved adapter cannot hold; freeze it"
        )
    return trained


def insert_state(model: nn.Module, state: AdapterState, *, what: str, name: str = DEFAULT_NAME) -> list[str]:
    """Put a set of adapters into a model; see `load_adapter`. ``what`` names it in errors."""
    given, model = model, unwrap(model)
    check_enabled(model)
    state = _without_tied(renamed(state, partial(name_in, model)), model, what)
    present = adapter_layers(model)
    _check_parameters(model, state, what)
    in_place = bool(present) and adapter_names(model)[0] == name
    unwrap(given, adding=not in_place or not state.parameters.keys() <= trained_tensors(model).keys())
    if in_place:
        _check_same(state, present)
        for layer in present.values():
            layer.unmerge()
    else:
        _check_fits(model, state, what)
        strange = trained_in_place(model).keys() - state.parameters
        starts = {key: _start(state, key) for key in state.modules}
        insert_adapters(model, starts, name=name, inherits=False, shared=state.shared)
        if strange:
            warn(
                f"{listed(sorted(strange))} was trained along with another set of adapters, and is not the base's own "
                f"any more, which {what} was made for",
                stacklevel=3,
            )
    keep_base_values(model, state.parameters)
    layers = adapter_layers(model)
    with torch.no_grad():
        for key, factors in state.factors.items():
            for factor, tensor in factors.items():
                layers[key].factors()[factor].copy_(tensor)
    set_tensors(model, state.parameters, trainable=True)
    return list(layers)


def _without_tied(state: AdapterState, model: nn.Module, what: str) -> AdapterState:
    """Return the state with one name for each parameter that the model shares: PEFT saves it under all its names."""
    if state.tied is None:
        return state
    shared: dict[int, list[str]] = {}
    for name, parameter in unwrap(model).named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    trained = state.whole_parameters
    for names in shared.values():
        values = [trained[name] for name in names if name in trained]
        if not values:
            continue
        if len(values) < len(names) or not all(torch.equal(value, values[0]) for value in values):
            raise InputError(
                f"{what} has {listed(names)} apart, which are one parameter of {type(model).__name__}; untie them first"
            )
        for name in names[1:]:
            del trained[name]
    return replace(state, parameters=trained, tied={})


def write_adapter(state: AdapterState, path: str | Path) -> None:
    """Write a set of adapters to a folder; see `save_adapter`."""
    tensors = {f"{name}.{key}": t for name, factors in state.factors.items() for key, t in factors.items()}
    for name in state.shared:
        del tensors[f"{name}.lora_A"]
    tensors.update(state.parameters)
    config = {
        "format": FORMAT,
        # What shares nothing is read by releases that know of no sharing.
        "format_version": FORMAT_VERSION if state.shared else 1,
        "base_model": state.base_model,
        "modules": state.modules,
        "parameters": {name: list(tensor.shape) for name, tensor in state.parameters.items()},
        **({} if state.tied is None else {"tied": state.tied}),
        **({"shared_A": state.shared} if state.shared else {}),
    }
    with atomic_folder(path) as folder:
        write_safetensors(folder / WEIGHTS_FILE, tensors, {_OF_ONE_SAVE: _digest(state.modules)})
        fill_json(folder / CONFIG_FILE, config)


def read_adapter(path: str | Path) -> AdapterState:
    """Read and check an adapter folder without a model.

    Raises:
        InputError: As `load_adapter`.
    """
    path = Path(path)
    config = _read_config(path)
    tensors = read_safetensors(path / WEIGHTS_FILE)
    modules = config["modules"]
    take, shared = partial(taken, path / WEIGHTS_FILE, tensors), config.get("shared_A", {})
    factors = {
        name: {
            key: take(f"{name}.{key}", shape, (torch.float32, torch.float64))
            for key, shape in factor_shapes(o["in_features"], o["out_features"], o["rank"], o["orthonormal"]).items()
            if key != "lora_A" or name not in shared
        }
        for name, o in modules.items()
    }
    for name, owner in shared.items():
        factors[name] = {"lora_A": factors[owner]["lora_A"], **factors[name]}
    parameters = {name: take(name, tuple(shape)) for name, shape in config["parameters"].items()}
    if tensors:
        raise InputError(f"{path / WEIGHTS_FILE} holds tensors that {CONFIG_FILE} does not name: {listed(tensors)}")
    _check_of_one_save(path, modules)
    _check_on_manifold(path / WEIGHTS_FILE, modules, factors)
    state = AdapterState(config["base_model"], modules, factors, parameters, config.get("tied"), shared)
    return renamed(state, plain_name)  # a file may be from before names were saved as the plain model's


def _digest(modules: Mapping[str, Any]) -> str:
    """Return a digest of how a configuration says that the factors beside it are used."""
    return hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()


def _check_of_one_save(path: Path, modules: Mapping[str, Any]) -> None:
    """Raise InputError if the files of an adapter do not belong together, as after a kill between the two."""
    from safetensors import safe_open

    with safe_open(path / WEIGHTS_FILE, "pt") as file:
        kept = (file.metadata() or {}).get(_OF_ONE_SAVE)
    if kept not in (None, _digest(modules)):  # None: from before it was kept
        raise InputError(
            f"{path} is damaged: {CONFIG_FILE} and {WEIGHTS_FILE} are not of one save. One was edited, or a save over "
            "them was cut off; its other file may be in a hidden folder (.*.tmp) in or beside this one"
        )


def _check_fits(model: nn.Module, state: AdapterState, what: str) -> None:
    """Raise unless the model has the named linears with the given shapes; the message lists what differs."""
    linears = dict(wrappable_linears(model))
    missing = [name for name in state.modules if name not in linears]
    what = f"{what} does not fit {type(model).__name__}"
    made_for = (
        f"it was made for {state.base_model.get('name_or_path') or state.base_model.get('class', 'another model')}"
    )
    if missing:
        raise InputError(f"{what}, which has no linear {listed(missing)}; {made_for}")
    wrong = []
    for name, options in state.modules.items():
        want, have = (options["in_features"], options["out_features"]), linear_shape(linears[name])
        if want != have:
            wrong.append(f"{name} is {have[0]} -> {have[1]}, not {want[0]} -> {want[1]}")
    if wrong:
        raise InputError(f"{what}: {listed(wrong)}; {made_for}")
    empty = [name for name in state.modules if any(p.is_meta for p in linears[name].parameters())]
    if empty:
        raise InputError(f"{listed(empty)} is on the meta device (offloaded, or not loaded yet); load the base first")


def _check_parameters(model: nn.Module, state: AdapterState, what: str) -> None:
    """Raise unless the model has the parameters that were trained with the adapters, in the same shapes."""
    have = {name: tuple(p.shape) for name, p in base_tensors(model).items()}
    wrong = [name for name, tensor in state.parameters.items() if have.get(name) != tuple(tensor.shape)]
    if wrong:
        shapes = {name: tuple(state.parameters[name].shape) for name in wrong}
        found = (f"{name} of shape {shape}, here {have.get(name, 'there is none')}" for name, shape in shapes.items())
        raise InputError(f"{what} does not fit {type(model).__name__}: it has {listed(found)}")


def _module_config(layer: StiefelLoRALinear) -> dict[str, Any]:
    return {**layer.options, "in_features": layer.in_features, "out_features": layer.out_features}


_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "rank": (int,),
    "alpha": (int, float),
    "dropout": (int, float),
    "rslora": (bool,),
    "orthonormal": (str,),
    "in_features": (int,),
    "out_features": (int,),
}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not path.is_dir():
        raise InputError(f"no adapter folder at {path}")
    if not file.is_file():
        is_peft = (path / "adapter_config.json").is_file()
        advice = " (this is a PEFT adapter: use import_peft, or stiefel-lora import)" if is_peft else ""
        raise InputError(f"{path} holds no {CONFIG_FILE}{advice}")
    config = read_json(file)
    if config.get("format") != FORMAT:
        raise InputError(f"{file} is not a {FORMAT} adapter: its format is {config.get('format')!r}")
    version = config.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1) or isinstance(version, bool):
        raise InputError(
            f"{file} has format version {version!r}, this {FORMAT} reads up to {FORMAT_VERSION}; upgrade {FORMAT}"
        )
    modules = config.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise InputError(f"{file} is damaged: it names no modules")
    check_description(file, config.get("base_model"))
    for name, options in modules.items():
        check_module_config(file, name, options)
    parameters = config.get("parameters")
    if not isinstance(parameters, dict) or not all(isinstance(shape, list) for shape in parameters.values()):
        raise InputError(f"{file} is damaged: its parameters should be an object of shapes")
    tied = config.get("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(name, str) and name in parameters for name in tied.values()):
        raise InputError(f"{file} is damaged: tied should be an object of names of its parameters, is {tied!r}")
    check_shared(file, modules, config.get("shared_A", {}))
    return config


def check_module_config(file: str | Path, name: str, options: Any) -> None:
    """Raise InputError unless the options of a linear, read from ``file``, are complete and in range."""
    if not isinstance(options, dict) or set(options) != set(_OPTION_TYPES):
        raise InputError(f"{file} is damaged: {name} should have the entries {', '.join(_OPTION_TYPES)}")
    for key, types in _OPTION_TYPES.items():
        # bool is an int to Python.
        if not isinstance(options[key], types) or (types != (bool,) and isinstance(options[key], bool)):
            raise InputError(f"{file} is damaged: {key} of {name} is {options[key]!r}")
    shape = options["in_features"], options["out_features"]
    try:
        check_options(*shape, *(options[key] for key in ("rank", "alpha", "dropout", "orthonormal")))
    except InputError as error:
        raise InputError(f"{file} is damaged: {name}: {error}") from None


def _check_on_manifold(file: Path, modules: Mapping[str, Any], factors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, tensors in factors.items():
        for key in CONSTRAINED[modules[name]["orthonormal"]]:
            error = float(orthogonality_error(tensors[key]))
            if error > OFF_MANIFOLD:
                raise ManifoldError(
                    f"{file}: {name}.{key} is not orthonormal, |X^T X - I|_F is {error:.2g} (at most {OFF_MANIFOLD}); "
                    "it was changed after it was saved"
                )


def _start(saved: AdapterState, name: str) -> dict[str, Any]:
    """Return the arguments of a layer that starts at the saved point, so that loading draws no random numbers."""
    options = {key: value for key, value in saved.modules[name].items() if not key.endswith("_features")}
    points = tuple(saved.factors[name][key] for key in CONSTRAINED[options["orthonormal"]])
    return {**options, "init": points if len(points) > 1 else points[0]}


def _check_same(saved: AdapterState, present: Mapping[str, StiefelLoRALinear]) -> None:
    have = {name: _module_config(layer) for name, layer in present.items()}
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys((*saved.modules, *have)):
        difference = _difference(saved.modules.get(name), have.get(name))
        if difference:
            alike.setdefault(difference, []).append(name)
    if alike:
        found = "; ".join(f"{listed(names)}: {difference}" for difference, names in alike.items())
        raise InputError(
            f"the model has other adapters in use than the file ({found}); remove them first (remove_adapters), or "
            "load under another name="
        )
    shared = shared_in(present)
    if saved.shared != shared:
        raise InputError(
            f"the adapters in use do not share A as the file's do: {len(shared)} have that of another here, "
            f"{len(saved.shared)} in the file; remove them first (remove_adapters), or load under another name="
        )


def _difference(saved: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> str:
    """Say how an adapter in a file differs from the one in the model; "" if it does not."""
    if saved is None or here is None:
        return "only in the model" if saved is None else "only in the file"
    return ", ".join(f"{key} {saved[key]} in the file, {here[key]} here" for key in here if saved[key] != here[key])
