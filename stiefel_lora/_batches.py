"""Batches as models and loss functions take them: tensors in mappings, sequences and dataclasses, and their samples."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def batch_size(batch: Any, loss_shape: Callable[[], tuple[int, ...]]) -> int:
    """Return how many samples a batch has; 1 if nothing in it says so.

    Args:
        batch: What a model or a loss function takes.
        loss_shape: Returns the shape of its loss, one number or one for each sample. It is only called where the
            structure of the batch leaves its size open, which one loss for each sample settles.

    Raises:
        InputError: If the size is left open and the loss is one number, or there is no batch dimension.
    """
    size, others = _sizes(batch)
    if not others:
        return 1 if size is None else size
    shape = loss_shape()
    if len(shape) == 1 and shape[0] in (others if size is not None else {1, *others}):
        return shape[0]
    if size is not None:
        return size
    got = f"has the shape {shape}" if shape else "is one number"
    raise InputError(
        f"a batch may have {' or '.join(map(str, sorted(others)))} samples, by the first dimensions of its tensors and "
        f"the lengths of its lists, and its loss {got}; the batch must be the first dimension of each tensor, or "
        "loss_fn must return one loss for each sample, of shape (1,) for a batch of one"
    )


def has_known_size(batch: Any) -> bool:
    """Tell whether anything in a batch says how many samples it has."""
    return _sizes(batch) != (None, set())


def check_rows(batch: Any) -> None:
    """Raise InputError if a batch is one row of a data set, without a batch dimension."""
    rows = [value for name, value in _named(batch) if name == "input_ids" and value.dim() == 1]
    if rows:
        raise InputError(
            f"input_ids of shape {tuple(rows[0].shape)} are a single row; batches need a batch dimension: take them "
            "from a DataLoader, or give row[None] for each of its tensors"
        )


def _sizes(batch: Any) -> tuple[int | None, set[int]]:
    """Return how many samples a batch has, or None, and what else it may be: what has as many losses."""
    size, others = _outer_sizes(batch)
    if size is not None or others:
        return size, others
    check_rows(batch)
    named = next((len(value) for _, value in _named(batch)), None)
    if named is not None:
        # Images cut into patches, or positions, may not have one entry a sample.
        return named, set()
    found = list(values(batch))
    lists = [value for value in found if isinstance(value, list)]
    lengths = {len(value) for value in found if isinstance(value, Tensor) and value.dim()}
    if len(lengths) > 1:
        return None, lengths.union(map(len, lists))
    return _sole(lengths or _common(lists))


def _outer_sizes(batch: Any) -> tuple[int | None, set[int]]:
    """Return the sizes of a list with one entry a sample, or of a list that torch's collate function made."""
    if not isinstance(batch, list) or not _are_alike(batch):
        return None, set()
    count, lengths = len(batch), _lengths(batch)
    is_collated = isinstance(batch[0], Tensor | list)
    if len(lengths) == 1 and is_collated:
        return next(iter(lengths)), {count} - lengths
    if not lengths and is_collated:
        return None, set()
    return _sole({count} if len(lengths) != 1 else {count, *lengths})


def _common(lists: Sequence[list[Any]]) -> set[int]:
    """Return the sizes that all lists in a batch allow, or else all that hold tensors, or else any."""
    for some in (lists, [value for value in lists if _lengths(value)]):
        sizes = set.intersection(*map(_list_sizes, some)) if some else set()
        if sizes:
            return sizes
    return set().union(*map(_list_sizes, lists))


def _list_sizes(value: list[Any]) -> set[int]:
    """Return how many samples there may be by a list in a batch: one in each entry, or all in each."""
    count, lengths = {len(value)}, _lengths(value)
    if lengths and not _are_alike(value):
        return lengths
    return count if len(lengths) != 1 or lengths == {1} else count | lengths


def _sole(sizes: set[int]) -> tuple[int | None, set[int]]:
    return (next(iter(sizes)), set()) if len(sizes) == 1 else (None, sizes)


def _lengths(value: Any) -> set[int]:
    """Return the first dimensions of all tensors in a structure, however deep."""
    if isinstance(value, Tensor):
        return {len(value)} if value.dim() else set()
    return set().union(*map(_lengths, _members(value).values())) if _is_structure(value) else set()


def _are_alike(entries: Sequence[Any]) -> bool:
    """Tell whether entries are of one kind, as samples are."""
    return len(set(map(_kind, entries))) == 1


def _kind(entry: Any) -> Any:
    if isinstance(entry, Tensor):
        return entry.dim(), entry.dtype
    return (type(entry), tuple(_members(entry))) if _is_structure(entry) else type(entry)


def _named(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of usual names, which have one entry a sample, the surest first."""
    for name, value in (_members(batch) if _is_structure(batch) else {}).items():
        if isinstance(value, Tensor) and name in _PER_SAMPLE and value.dim():
            yield name, value
        elif _is_structure(value) and not isinstance(value, list):
            yield from _named(value)


def sample(batch: Any, n: int, size: int) -> Any:
    """Return the n-th sample of a batch as a batch of one."""
    return take(batch, slice(n, n + 1), size)


def take(batch: Any, rows: slice, size: int) -> Any:
    """Return some samples of a batch; what does not have one entry a sample is passed on whole."""
    if isinstance(batch, Tensor) or _holds_samples(batch, size):
        return batch[rows]
    if not _is_structure(batch):
        raise InputError(
            f"the samples of a batch of type {type(batch).__name__} cannot be taken apart; "
            "let loss_fn return one loss for each sample, or give batches of one sample"
        )
    return _mapped(batch, lambda name, value: _cut(name, value, rows, size))


def undivided(batch: Any, size: int) -> list[str]:
    """Return the names of the tensors that do not have one entry for each of the samples."""
    members = _members(batch) if _is_structure(batch) and not _holds_samples(batch, size) else {}
    return [
        f"entry {name}" if isinstance(name, int) else str(name)
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
    if isinstance(batch, list | tuple):
        return dict(enumerate(batch))
    is_mapping = isinstance(batch, Mapping)
    members = batch if is_mapping else {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: members[name] for name in (*(name for name in _PER_SAMPLE if name in members), *members)}


def _mapped(batch: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return a structure like the one given with the function's values for its members, by name and value."""
    if isinstance(batch, Mapping):
        return _like(batch, {name: function(name, value) for name, value in batch.items()})
    if isinstance(batch, list | tuple):
        new = (function(i, value) for i, value in enumerate(batch))
        return type(batch)(*new) if hasattr(batch, "_fields") else type(batch)(new)
    record = copy.copy(batch)
    for name, value in _members(batch).items():
        object.__setattr__(record, name, function(name, value))  # frozen ones too
    return record


def _like(batch: Mapping[Any, Any], members: dict[Any, Any]) -> Any:
    """Return the members as a mapping of the batch's class, such as a BatchEncoding, or a dict where it has no copy."""
    if type(batch) is dict or not isinstance(batch, dict | UserDict):
        return members
    try:
        new = copy.copy(batch)
        for name, value in members.items():
            new[name] = value
    except Exception:  # a frozen one
        return members
    return new


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


def _holds_samples(batch: Any, size: int) -> bool:
    """Tell whether a batch is a list with one entry for each of its samples."""
    if not isinstance(batch, list) or len(batch) != size or not _are_alike(batch):
        return False
    return not isinstance(batch[0], Tensor | list) or _lengths(batch) != {size}


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
