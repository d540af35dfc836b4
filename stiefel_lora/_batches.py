"""Batches as models and loss functions take them: tensors in mappings, sequences and dataclasses, and their samples."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stiefel_lora.errors import InputError

# What transformers' models take with one entry a sample, the surest first.
_PER_SAMPLE = ("labels", "input_ids", "inputs_embeds", "pixel_values")


def values(batch: Any) -> Iterator[Any]:
    """Yield what a batch holds, however deep, except in lists inside it, which hold one entry a sample more often."""
    for value in _members(batch).values() if _is_structure(batch) else [batch]:
        if _is_structure(value) and not isinstance(value, list):
            yield from values(value)
        else:
            yield value


def batch_size(batch: Any) -> int:
    """Return the first dimension of the first tensor in a batch, else the length of its first list, else 1.

    The usual names go first: images cut into patches, or positions, may not have one entry a sample.
    """
    found = list(values(batch))
    lists = [value for value in found if isinstance(value, list)]
    for value in chain(found, *map(values, lists)):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    return len(lists[0]) if lists else 1


def has_known_size(batch: Any) -> bool:
    """Tell whether anything in a batch says how many samples it has."""
    return any(isinstance(value, list) or (isinstance(value, Tensor) and value.dim()) for value in values(batch))


def sample(batch: Any, n: int, size: int) -> Any:
    """Return the n-th sample of a batch as a batch of one."""
    return take(batch, slice(n, n + 1), size)


def take(batch: Any, rows: slice, size: int) -> Any:
    """Return some samples of a batch; what does not have one entry a sample is passed on whole."""
    if isinstance(batch, Tensor):
        return batch[rows]
    if not _is_structure(batch):
        raise InputError(
            f"the samples of a batch of type {type(batch).__name__} cannot be taken apart; "
            "let loss_fn return one loss for each sample, or give batches of one sample"
        )
    return _mapped(batch, lambda name, value: _cut(name, value, rows, size))


def undivided(batch: Any, size: int) -> list[str]:
    """Return the names of the tensors that do not have one entry for each of the samples."""
    members = _members(batch) if _is_structure(batch) else {}
    return [
        name
        for name, value in members.items()
        if isinstance(value, Tensor) and value.dim() and _cut(name, value, slice(0, 1), size) is value
    ]


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device and out of any graph."""
    if isinstance(batch, Tensor):
        # A tensor of inference mode can take no part in a graph.
        return (batch.clone() if batch.is_inference() else batch.detach()).to(device)
    return _mapped(batch, lambda _, value: to_device(value, device)) if _is_structure(batch) else batch


def _is_structure(value: Any) -> bool:
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, Mapping | list | tuple) or is_record


def _members(batch: Any) -> dict[Any, Any]:
    """Return the direct members of a structure by name, those first that are the surest to have an entry a sample."""
    if isinstance(batch, Mapping):
        return {name: batch[name] for name in (*(name for name in _PER_SAMPLE if name in batch), *batch)}
    if isinstance(batch, list | tuple):
        return dict(enumerate(batch))
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _mapped(batch: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return a structure like the one given with the function's values for its members, by name and value."""
    if isinstance(batch, Mapping):
        return {name: function(name, value) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        new = (function(i, value) for i, value in enumerate(batch))
        return type(batch)(*new) if hasattr(batch, "_fields") else type(batch)(new)
    record = copy.copy(batch)
    for name, value in _members(batch).items():
        object.__setattr__(record, name, function(name, value))  # frozen ones too
    return record


def _cut(name: Any, value: Any, rows: slice, size: int) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        if name == "position_ids" and value.ndim == 3 and value.shape[1] == size:
            return value[:, rows]  # one row for each of time, height and width in front of the samples
        return value[rows] if value.ndim and len(value) == size else value
    if _is_structure(value) and not _has_an_entry_for_each(name, value, size):
        return _mapped(value, lambda inner, entry: _cut(inner, entry, rows, size))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == size:
        return value[rows]
    return value


def _has_an_entry_for_each(name: Any, value: Any, size: int) -> bool:
    """Tell whether a sequence has one entry a sample, and is not a structure of whole batches, if the lengths agree."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields") or len(value) != size:
        return False
    if not all(isinstance(entry, Tensor) and entry.shape[:1] == (size,) for entry in value):
        return True
    # As many images as they have rows are entries; what torch's collate function made of pairs or of numbers is whole.
    unlike = len({(entry.dim(), entry.dtype) for entry in value}) > 1
    collated = isinstance(name, int) or all(entry.dim() == 1 for entry in value)
    return not (isinstance(value, tuple) or unlike or collated)
