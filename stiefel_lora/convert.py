"""Stiefel adapters to PEFT's LoRA format and back.

A Stiefel adapter is a plain LoRA adapter: PEFT's ``lora_A.weight`` is A^T (r, in), its ``lora_B.weight`` is B (out, r).
The other way any LoRA is a Stiefel adapter exactly: with the thin QR A = Q R, B A^T = (B R^T) Q^T. PEFT itself is only
needed for adapters in memory; its folders are read and written here.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stiefel_lora._files import atomic_folder, fill_json, read_json
from stiefel_lora._models import is_conv1d, unwrap
from stiefel_lora._names import is_checkpointed, name_in, parents, plain_name
from stiefel_lora._peft_targets import check_not_for_experts, describe_targets, exactly, outside_of_adapters
from stiefel_lora._safetensors import read_safetensors, write_safetensors
from stiefel_lora._types import Orthonormal
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import DEFAULT_NAME, adapter_names, check_no_others, remove_adapters, replace_modules
from stiefel_lora.checkpoint import (
    CONFIG_FILE,
    AdapterState,
    adapter_state,
    check_module_config,
    insert_state,
    renamed,
    state_in_place,
)
from stiefel_lora.errors import InputError, listed
from stiefel_lora.factors import folded, orthonormal_factors, scaling

if TYPE_CHECKING:
    from peft import PeftModel

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What a LoraConfig may say without changing the function of the trained adapter beyond A, B and the scaling.
_UNDERSTOOD = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "megatron_core",
    "qalora_group_size", "init_lora_weights", "eva_config", "runtime_config",
}  # fmt: skip

# Other initialisations subtract the start from the base weights, which this adapter would not find in its base.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# PEFT may put copies of these weights of the base beside the factors.
_BASE_WEIGHTS = ("base_layer.weight", "embed_tokens.weight", "lm_head.weight")


def export_peft(model: nn.Module, path: str | Path) -> None:
    """Write the adapters in use as a PEFT LoRA folder that ``PeftModel.from_pretrained`` loads onto the base model.

    Adapted layers are named by ``layers_to_transform`` and ``layers_pattern`` where that means exactly the adapted
    linears, otherwise by their full names. With both factors orthonormal S is folded into B. Modules of the base that
    were trained with the adapters, such as a classification head, become ``modules_to_save``.

    Args:
        model: A model with adapters, merged or not.
        path: The folder; other files in it are left alone.

    Raises:
        InputError: If the model has no adapters, a tensor has a NaN or infinity, ``path`` is a file, only a part of a
            module was trained, or PEFT would take linear maps for the fused experts of a mixture.
    """
    model = unwrap(model)
    write_peft(adapter_state(model), path, model)


def import_peft(
    model: nn.Module,
    source: "str | Path | PeftModel",
    *,
    orthonormal: Orthonormal = "A",
    name: str = DEFAULT_NAME,
    adapter_name: str | None = None,
) -> list[str]:
    """Put a PEFT LoRA adapter into a base model as a Stiefel adapter: the same function, with orthonormal factors.

    The factorisation is computed in float64. A rank above the smaller dimension of a linear is reduced to it. Modules
    that PEFT trained whole (``modules_to_save``, such as a classification head) overwrite the model's, as
    `stiefel_lora.checkpoint.load_adapter` does.

    Args:
        model: The bare base model.
        source: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a PeftModel over another
            copy of the base (for one over this very base see `from_peft`).
        orthonormal: Which factor to make orthonormal.
        name: Name of the set of adapters.
        adapter_name: Which of a PeftModel's adapters (default: the one in use).

    Returns:
        The qualified names of the adapted linears.

    Raises:
        InputError: If the source is missing or damaged, is not a LoRA, uses an option that is more than a low-rank
            update of linears (it is named), or does not fit the model. The model is left as it was.
    """
    what = f"the PEFT adapter in {source}" if isinstance(source, str | Path) else "the PEFT adapter"
    state = read_peft(source, orthonormal=orthonormal, adapter_name=adapter_name)
    return insert_state(model, state, what=what, name=name)


def from_peft(
    peft_model: "PeftModel",
    *,
    adapter_name: str | None = None,
    orthonormal: Orthonormal = "A",
    name: str = DEFAULT_NAME,
) -> nn.Module:
    """Take PEFT's wrappers off a model and put the same update back as a Stiefel adapter, in place.

    Args:
        peft_model: A PeftModel with a LoRA adapter.
        adapter_name: Which of its adapters (default: the one in use); all are taken off.
        orthonormal: Which factor to make orthonormal.
        name: Name of the set of adapters.

    Returns:
        The base model with the Stiefel adapter.

    Raises:
        InputError: As `import_peft`, or if the PeftModel is merged. It is left as it was.
    """
    if any(getattr(module, "merged", False) for module in peft_model.modules()):
        raise InputError(
            "the PeftModel is merged, so its base weights hold the update; call its unmerge_adapter() first"
        )
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    state = read_peft(peft_model, orthonormal=orthonormal, adapter_name=adapter_name)
    modules = peft_model.get_base_model().named_modules()
    wrappers: dict[str, Any] = {n: m for n, m in modules if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)}
    base: nn.Module = peft_model.unload()
    try:
        for place, wrapper in wrappers.items():
            # PEFT leaves its trained copy in the base, which is to have its own values beneath the adapter.
            if isinstance(wrapper, ModulesToSaveWrapper) and base.get_submodule(place) is not wrapper.original_module:
                replace_modules(base, {place: deepcopy(wrapper.original_module)})
        insert_state(base, state, what="the PEFT adapter", name=name)
    except BaseException:
        for place, wrapper in wrappers.items():
            replace_modules(base, {place: wrapper})
        raise
    _say_if_untied(base)
    # PEFT 0.18 leaves it there, and then takes the base for a model with adapters of its own.
    vars(base).pop("peft_config", None)
    return base


def _say_if_untied(base: Any) -> None:
    """Let a model whose head and embedding PEFT took apart, to train one of them, not tie them when it is loaded."""
    if getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        base.config.tie_word_embeddings = head is None or head.weight is embedding.weight


def to_peft(model: nn.Module) -> "PeftModel":
    """Take the Stiefel adapters off a model and put the same update back as a PEFT adapter, in place.

    Returns:
        A PeftModel around the base model, whose adapter can be trained on.

    Raises:
        InputError: If the model has no adapters, other named sets of adapters would be lost, or a block is in torch's
            checkpoint wrapper, or PEFT would put the adapters elsewhere. The model is left as it was.
        ValueError: If PEFT refuses one of the linears. The adapter is in the model all the same.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    model = unwrap(model)
    state = state_in_place(model)
    check_no_others(model, "use export_peft")
    if any(map(is_checkpointed, [*state.modules, *state.parameters])):
        raise InputError("PEFT cannot fill adapters inside checkpoint wrappers; unwrap the blocks or use export_peft")
    config = _peft_config(state, model, str)
    tensors = {name: tensor.clone() for name, tensor in _peft_tensors(state).items()}
    name, bases = adapter_names(model)[0], {key: layer.base for key, layer in adapter_layers(model).items()}
    remove_adapters(model)
    config["inference_mode"] = False
    peft_model: Any = None
    try:
        peft_model = get_peft_model(model, LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"}))
        filled: Any = set_peft_model_state_dict(peft_model, tensors)
        if strangers := filled.unexpected_keys:
            raise InputError(f"PEFT has no place for {listed(strangers)}; keep the adapter with save_adapter")
    except BaseException:
        if peft_model is not None:
            peft_model.unload()
        replace_modules(model, bases)
        insert_state(model, state, what="the adapter", name=name)
        raise
    return peft_model


def write_peft(state: AdapterState, path: str | Path, model: nn.Module | None = None) -> None:
    """Write a set of adapters as a PEFT folder; see `export_peft`.

    Args:
        state: The adapters.
        path: The folder.
        model: The model they belong to, for a short description of the targets; without it they have their full names.
    """
    with atomic_folder(path) as folder:
        write_safetensors(folder / PEFT_WEIGHTS_FILE, _peft_tensors(state))
        fill_json(folder / PEFT_CONFIG_FILE, _peft_config(state, model))


def read_peft(
    source: "str | Path | PeftModel", *, orthonormal: Orthonormal = "A", adapter_name: str | None = None
) -> AdapterState:
    """Read a PEFT LoRA adapter as a set of Stiefel adapters, without a model; see `import_peft`."""
    if isinstance(source, str | Path):
        where, config, tensors = str(source), *_read_peft_folder(Path(source))
        scales = {}
    elif not hasattr(source, "peft_config"):
        raise TypeError(f"a PEFT adapter is a folder or a PeftModel, got {type(source).__name__}")
    else:
        from peft import get_peft_model_state_dict

        adapter_name = _in_use(source) if adapter_name is None else adapter_name
        if adapter_name not in source.peft_config:
            raise InputError(f"no PEFT adapter is named {adapter_name!r}; there are: {', '.join(source.peft_config)}")
        where, config = f"the PEFT adapter {adapter_name!r}", source.peft_config[adapter_name].to_dict()
        tensors = get_peft_model_state_dict(source, adapter_name=adapter_name, save_embedding_layers=False)
        scales = _scales_in_use(source, adapter_name)
    _check_peft_config(where, config)
    state = AdapterState({}, {}, {}, {})
    if config.get("base_model_name_or_path"):
        state.base_model["name_or_path"] = config["base_model_name_or_path"]
    dropout = float(config.get("lora_dropout") or 0.0)
    state.parameters.update(_saved_modules(where, config, tensors))
    factors_only = {key: tensor for key, tensor in tensors.items() if key.removeprefix(_PREFIX) not in state.parameters}
    for name, (a, b) in _pairs(where, factors_only).items():
        options = _scaling(where, config, name, a.shape[1], min(*a.shape, *b.shape))
        if name in scales and not math.isclose(scales[name], scaling(**options)):
            options["alpha"] = scales[name] / scaling(options["rank"], 1.0, options["rslora"])
        # A negative scale negates a task, and one of zero switches a module off: ours are positive.
        sign = (options["alpha"] > 0) - (options["alpha"] < 0)
        options["alpha"] = abs(options["alpha"]) if sign else float(options["rank"])
        state.factors[name] = orthonormal_factors(a, sign * b, orthonormal)
        shape = {"in_features": a.shape[0], "out_features": b.shape[0]}
        state.modules[name] = {**options, "dropout": dropout, "orthonormal": orthonormal, **shape}
        check_module_config(where, name, state.modules[name])
    return renamed(state, plain_name)


def _scales_in_use(peft_model: "PeftModel", adapter_name: str) -> dict[str, float]:
    """Return what each module multiplies its update by, which PEFT lets one change apart from the configuration."""
    found = {}
    for name, module in peft_model.named_modules():
        scales = getattr(module, "scaling", None)
        if isinstance(scales, dict) and adapter_name in scales:
            found[name.removeprefix(_PREFIX)] = float(scales[adapter_name])
    return found


def _in_use(peft_model: "PeftModel") -> str:
    names = list(peft_model.peft_config)
    if len(names) > 1:
        active: Any = peft_model.active_adapters  # a method of transformers' models that PEFT put adapters into
        names = active() if callable(active) else active
    if len(names) != 1:
        raise InputError(f"the PeftModel has {len(names)} adapters in use, {listed(names)}; give adapter_name")
    return names[0]


def _read_peft_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_dir():
        raise InputError(f"no adapter folder at {path}")
    if not (path / PEFT_CONFIG_FILE).is_file():
        ours = "; it is a Stiefel adapter already, as load_adapter takes it" if (path / CONFIG_FILE).is_file() else ""
        raise InputError(f"{path} holds no {PEFT_CONFIG_FILE}, so it is not a PEFT adapter{ours}")
    if not (path / PEFT_WEIGHTS_FILE).is_file() and (path / "adapter_model.bin").is_file():
        raise InputError(f"{path} holds a pickle, adapter_model.bin, which is not read; save it with safetensors")
    return read_json(path / PEFT_CONFIG_FILE), read_safetensors(path / PEFT_WEIGHTS_FILE)


def _check_peft_config(where: str, config: Mapping[str, Any]) -> None:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise InputError(f"{where} is of type {kind!r}; only LORA can be imported")
    # PEFT itself fills some options of a model in memory with empty sets.
    more = {key: value for key, value in config.items() if key not in _UNDERSTOOD and value}
    if more.get("bias") == "none":
        del more["bias"]
    if more:
        listing = ", ".join(f"{key}={value!r}" for key, value in more.items())
        raise InputError(f"{where} is more than low-rank updates of linears: {listing} cannot be imported")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise InputError(
            f"{where} has init_lora_weights={start!r}, which changed the base weights; save it in PEFT with "
            "path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    for key, is_right in _OPTION_CHECKS.items():
        if not is_right(config.get(key)):
            raise InputError(f"{where} is damaged: {key} is {str(config.get(key))[:80]!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_pattern_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: not value or (isinstance(value, dict) and all(map(is_right, value.values())))


# What an import relies on.
_OPTION_CHECKS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "rank_pattern": _is_pattern_of(_is_rank),
    "alpha_pattern": _is_pattern_of(_is_number),
    "lora_dropout": lambda value: value is None or _is_number(value),
    "use_rslora": lambda value: value is None or isinstance(value, bool),
    "base_model_name_or_path": lambda value: value is None or isinstance(value, str),
    "modules_to_save": lambda value: (
        not value or (isinstance(value, list | set | tuple) and all(isinstance(name, str) and name for name in value))
    ),
}


def _scaling(where: str, config: Mapping[str, Any], name: str, peft_rank: int, rank: int) -> dict[str, Any]:
    """Return the rank and the alpha that gives it the scaling that PEFT gives the module."""
    said = _by_pattern(where, config, name, "r", "rank_pattern")
    if said != peft_rank:
        raise InputError(f"{where} is damaged: {name} has rank {peft_rank} in the weights, {said} in the configuration")
    alpha = _by_pattern(where, config, name, "lora_alpha", "alpha_pattern")
    rslora = bool(config.get("use_rslora"))
    reduced = math.sqrt(rank / peft_rank) if rslora else rank / peft_rank
    return {"rank": rank, "alpha": float(alpha * reduced), "rslora": rslora}


def _by_pattern(where: str, config: Mapping[str, Any], name: str, key: str, patterns: str) -> Any:
    """Return an option of one module, by PEFT's rule: that of the first pattern that matches its name."""
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(
                f"{where} is damaged: {pattern!r} in {patterns} is no regular expression: {error}"
            ) from error
        if found:
            return value
    return config[key]


def _saved_modules(where: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the modules that PEFT saved whole, by their names in the base."""
    modules = tuple(config.get("modules_to_save") or ())
    names = {key: key.removeprefix(_PREFIX) for key in tensors}
    # PEFT's rule: the end of the module's name, not by whole components.
    saved = {
        name: tensors[key]
        for key, name in names.items()
        if ".lora_" not in name and any(parent.endswith(modules) for parent in parents(name))
    }
    bad = [name for name, tensor in saved.items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(f"{where}: {listed(bad)} has NaN or infinite entries")
    return saved


def _pairs(where: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (in, r) and B (out, r) by module name, or say which tensor is of another kind."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(_PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None or tensor.dim() != 2:
            hint = "; save it in PEFT with save_embedding_layers=False" if key.endswith(_BASE_WEIGHTS) else ""
            shape = tuple(tensor.shape)
            raise InputError(f"{where} holds {key} of shape {shape}, which is not a low-rank factor of a linear{hint}")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise InputError(f"{where}: {key} is {tensor.dtype}; factors are of 16 bits a number or more")
        if not tensor.isfinite().all():
            raise InputError(f"{where}: {key} has NaN or infinite entries")
        found.setdefault(match[1], {})[match[2]] = tensor
    pairs = {}
    for name in sorted(found, key=_natural):
        factors = found[name]
        if set(factors) != {"A", "B"} or factors["A"].shape[0] != factors["B"].shape[1]:
            shapes = {f"lora_{k}": tuple(t.shape) for k, t in factors.items()}
            raise InputError(f"{where} is damaged: {name} has the factors {shapes}")
        pairs[name] = (factors["A"].T, factors["B"])
    if not pairs:
        raise InputError(f"{where} holds no factors")
    return pairs


def _natural(name: str) -> list[tuple[int, str]]:
    """Order layer 2 before layer 10, where a file has its names by the alphabet."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _peft_tensors(state: AdapterState) -> dict[str, Tensor]:
    tensors = {}
    for name, factors in state.factors.items():
        a, b = folded(factors)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.T
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
    # Under all names: PEFT unties a module that it saves whole.
    tensors.update({_PREFIX + name: tensor for name, tensor in state.whole_parameters.items()})
    return tensors


def _peft_config(
    state: AdapterState, model: nn.Module | None, spell: Callable[[str], str] = plain_name
) -> dict[str, Any]:
    """Return a LoraConfig's options; ``spell`` makes a name in the model one of those that PEFT is to find."""
    modules = state.modules
    check_not_for_experts(state.base_model.get("model_type"), modules)
    # PEFT has one use_rslora and patterns of alpha that do not go with it everywhere: keep it only where all agree.
    forms = {(o["rank"], o["alpha"], o["rslora"]) for o in modules.values()}
    rslora = len(forms) == 1 and next(iter(forms))[2]
    ranks = {name: o["rank"] for name, o in modules.items()}
    alphas = {
        name: o["alpha"] * math.sqrt(o["rank"]) if o["rslora"] and not rslora else o["alpha"]
        for name, o in modules.items()
    }
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    causal = state.base_model.get("class", "").endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": state.base_model.get("name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": max(o["dropout"] for o in modules.values()),
        "use_rslora": rslora,
        "bias": "none",
        "modules_to_save": _modules_to_save(state, model, spell),
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in _layers_of(model)),
        "rank_pattern": {exactly(name, ranks): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(name, alphas): a for name, a in alphas.items() if a != alpha},
        **describe_targets(list(modules), model, spell),
    }


def _modules_to_save(state: AdapterState, model: nn.Module | None, spell: Callable[[str], str]) -> list[str] | None:
    """Return the modules whose parameters were trained, as PEFT can name them: whole."""
    whole = state.whole_parameters
    around = {name.rpartition(".")[0] for name in whole}
    # PEFT saves all that is in a module, and cannot wrap a part of it once more.
    names = sorted(name for name in around if around.isdisjoint(parents(name)))
    for name in names:
        # Without a model it is taken that modules were trained whole.
        place = "" if model is None else name_in(model, name)
        rest = [] if model is None else model.get_submodule(place).named_parameters()
        frozen = [key for inner, _ in rest if (key := spell(f"{place}.{inner}")) not in whole]
        if frozen or not name:
            raise InputError(f"PEFT saves modules whole: {listed(frozen) or 'the root'} was not trained with the rest")
    # PEFT takes all modules whose names end in one of these, by letters, and leaves such linears without adapters.
    for other in state.modules if model is None else outside_of_adapters(model, spell):
        ends = [name for name in names if other.endswith(name)]
        if ends and other not in names:
            raise InputError(f"PEFT cannot save {listed(ends)} apart from {other}, whose name ends alike; freeze it")
    return names or None


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _layers_of(model: nn.Module | None) -> Iterable[Any]:
    return adapter_layers(model).values() if model is not None else ()
