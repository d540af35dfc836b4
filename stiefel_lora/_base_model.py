"""What an adapter's file says of the base model that it was made for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from stiefel_lora.errors import InputError

# What a base may be loaded with, as ``from_pretrained(name, num_labels=5)``, and the name alone does not say. No more
# than this is taken from a file: it is handed to ``from_pretrained``, which can be told to run code.
_TASK_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "id2label": lambda value: isinstance(value, dict) and all(str(number).isdecimal() for number in value),
    "label2id": lambda value: isinstance(value, dict),
    "problem_type": lambda value: isinstance(value, str),
    "is_decoder": lambda value: isinstance(value, bool),
}


def describe_base(model: nn.Module) -> dict[str, Any]:
    """Return what can be said of the base model, for people, for error messages, and to load it again."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    known = {
        "class": type(model).__name__,
        "model_type": getattr(config, "model_type", None),
        "name_or_path": str(Path(name).absolute()) if name and Path(name).exists() else name,
    }
    described: dict[str, Any] = {key: value for key, value in known.items() if isinstance(value, str) and value}
    changed: dict[str, Any] = getattr(config, "to_diff_dict", dict)()
    task = {key: changed[key] for key, fits in _TASK_OPTIONS.items() if changed.get(key) and fits(changed[key])}
    return {**described, "task": task} if task else described


def check_description(file: Path, described: Any) -> None:
    """Raise InputError unless what was read from ``file`` is a description of a base model."""
    if not isinstance(described, dict) or not all(
        isinstance(described[key], str) for key in described if key != "task"
    ):
        raise InputError(f"{file} is damaged: it names no base model")
    task = described.get("task", {})
    if not isinstance(task, dict) or not all(key in _TASK_OPTIONS and _TASK_OPTIONS[key](task[key]) for key in task):
        raise InputError(f"{file} is damaged: a base's task has {', '.join(_TASK_OPTIONS)}, got {task!r}")
