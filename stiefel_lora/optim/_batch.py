"""Matrices of one shape, dtype and device as one batch, with their optimizer state in stacked buffers."""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from stiefel_lora._precision import reads_at_no_cost, wide_dtype
from stiefel_lora.errors import InputError

# Matrices are updated in pieces of about this size, so that on a CPU the handful of passes over a piece stay in its
# cache and everywhere the scratch memory is a few pieces instead of a few copies of the whole group.
_PIECE_BYTES = {"cpu": 4 << 20}
# Of an accelerator, where the time to start the operations on a piece counts.
_PIECE_BYTES_ACCELERATOR = 128 << 20


@dataclass(frozen=True)
class StateSpec:
    """One tensor of optimizer state: (n, r) for a "matrix", (n, 1) for its "rows", or a "scalar" for each matrix."""

    kind: Literal["matrix", "rows", "scalar"]
    dtype: torch.dtype | None = None  # None: the dtype that the update is computed in

    def shape(self, n: int, r: int) -> tuple[int, ...]:
        """Return the shape of it for one matrix."""
        return {"matrix": (n, r), "rows": (n, 1), "scalar": ()}[self.kind]


MATRIX = StateSpec("matrix")
ROWS = StateSpec("rows")
SCALAR = StateSpec("scalar")
COUNT = StateSpec("scalar", torch.float32)  # of updates, as torch keeps it
SKIPPED = StateSpec("scalar", torch.int64)


@dataclass
class Piece:
    """A run of k matrices that are updated together, or one matrix alone.

    Attributes:
        params: The parameters they belong to.
        point: The matrices in the compute dtype, shape (k, n, r): scratch memory, or the one parameter itself; (n, r)
            for a matrix alone, and likewise below.
        grad: Their Euclidean gradients, same shape and dtype: scratch memory, or the one parameter's own gradient.
        work: Scratch memory of the same shape and dtype, the same as ``grad`` where that is scratch memory.
        into: Where the new points go: ``point`` itself, or more scratch memory.
        state: Views of the state buffers, shape (k, n, r), (k, n, 1) or (k,), to be changed in place.
        master: The float32 copies of low-precision matrices, or None.
    """

    params: list[Tensor]
    point: Tensor
    grad: Tensor
    work: Tensor
    into: Tensor
    state: dict[str, Tensor]
    master: Tensor | None

    @property
    def alone(self) -> bool:
        """Whether it is one matrix alone, whose few numbers may be read as Python's."""
        return self.point.dim() == 2

    def write_back(self, new: Tensor) -> None:
        """Store new points, shape (k, n, r), in the parameters."""
        if new.data_ptr() == self.params[0].data_ptr():
            return
        if self.master is not None:
            self.master.copy_(new)
        if len(self.params) == 1:
            self.params[0].copy_(new.view(self.params[0].shape))
            return
        r = new.shape[-1]
        parts = new.view(-1, r).split([p.numel() // r for p in self.params])
        torch._foreach_copy_(
            self.params, [x if p.dim() == 2 else x.view(p.shape) for x, p in zip(parts, self.params, strict=True)]
        )


def is_capturing(p: Tensor) -> bool:
    """Tell whether what is done on a parameter's device now goes into a CUDA graph instead."""
    return p.is_cuda and torch.cuda.is_current_stream_capturing()


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Tell whether two sequences hold the same objects, not only equal ones."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


class Workspace:
    """Scratch memory that is kept from step to step.

    On a CPU, fresh memory of some megabytes costs more (page faults) than the arithmetic that is done in it.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[int, Sequence[int], torch.dtype, torch.device], Sequence[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Return how much memory is kept, in bytes."""
        return sum(memory.numel() * memory.element_size() for memory in self._memory.values())

    def take(self, count: int, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        """Return tensors of the given size with arbitrary content, valid until the next call."""
        views = self._views.get((count, size, dtype, device))
        if views is None:
            needed = count * math.prod(size)
            memory = self._memory.get((dtype, device))
            if memory is None or memory.numel() < needed:
                memory = self._memory[dtype, device] = torch.empty(needed, dtype=dtype, device=device)
                self._views.clear()
            views = self._views[count, size, dtype, device] = memory[:needed].view(count, *size).unbind()
        return views


class Bucket:
    """The parameters of one group that share (n, r), dtype and device.

    The state of all of them lies in one buffer a key; what ``optimizer.state[p]`` holds are views of these buffers,
    so that a step neither gathers nor scatters state.

    Args:
        params: Parameters of shape (..., n, r), equal but for the leading dimensions.
        spec: The state that the update keeps; None for what it keeps with other options only, which is dropped.
        state: The optimizer's state; existing entries are taken over, missing ones start at zero, others stay.
    """

    def __init__(self, params: list[Tensor], spec: dict[str, StateSpec | None], state: dict[Tensor, Any]) -> None:
        if is_capturing(params[0]):
            # A replay would begin with this state anew.
            raise InputError("take a step before one is captured in a CUDA graph: the first one makes the state")
        self.params = params
        self._spec = spec
        self._placement = _placement(params)
        self.dtype = wide_dtype(params[0].dtype)
        self.ends = list(accumulate(p.shape[:-2].numel() for p in params))
        self.starts = [0, *self.ends[:-1]]
        # The size of all matrices in the compute dtype, in bytes.
        self.nbytes = self.ends[-1] * params[0].shape[-2:].numel() * self.dtype.itemsize
        spec = {**spec, "master": MATRIX if self.dtype != params[0].dtype else None}
        self.buffers = {key: self._gather_state(key, entry, state) for key, entry in spec.items() if entry is not None}
        self._views = []
        for p, start, end in zip(params, self.starts, self.ends, strict=True):
            views = {
                key: buffer[start:end].view(p.shape[:-2] + buffer.shape[1:]) for key, buffer in self.buffers.items()
            }
            others = {key: value for key, value in state.get(p, {}).items() if key not in spec}
            state[p] = {**views, **others}
            self._views.append(views)
        self._held = [view for views in self._views for view in views.values()]

    def is_current(self, spec: dict[str, StateSpec | None], state: dict[Tensor, Any]) -> bool:
        """Tell whether the optimizer still wants this state and still holds this bucket's buffers.

        Not so after loading a state, replacing or clearing it, changing an option that adds a buffer, or moving the
        model.
        """
        held = [own.get(key) for own in [state.get(p, {}) for p in self.params] for key in self.buffers]
        return spec == self._spec and _placement(self.params) == self._placement and same(held, self._held)

    def _gather_state(self, key: str, entry: StateSpec, state: dict[Tensor, Any]) -> Tensor:
        first = self.params[0]
        tail = torch.Size(entry.shape(*first.shape[-2:]))
        buffer = torch.zeros((self.ends[-1], *tail), dtype=entry.dtype or self.dtype, device=first.device)
        for p, start, end in zip(self.params, self.starts, self.ends, strict=True):
            saved = state.get(p, {}).get(key)
            if saved is None:
                if key == "master":
                    buffer[start:end].copy_(p.reshape(-1, *tail))
                continue
            expected = p.shape[:-2] + tail
            # A step counter may come as one number for all matrices of a parameter, and a second moment as one a
            # matrix, which then holds for each of its rows or entries.
            saved = torch.as_tensor(saved)
            if tail and saved.shape == p.shape[:-2]:
                saved = saved[..., None, None].expand(expected)
            if saved.shape != expected and saved.dim() > 0:
                raise InputError(
                    f"state {key!r} of a parameter of shape {tuple(p.shape)} has shape {tuple(saved.shape)}, expected "
                    f"{tuple(expected)}; was it saved by another optimizer or with other options?"
                )
            buffer[start:end].view(expected).copy_(saved)
        return buffer

    def pieces(self, workspace: Workspace, largest: int, *, in_place: bool) -> Iterator[Piece]:
        """Yield the parameters that have a gradient, in runs of neighbours of bounded size.

        Args:
            workspace: Where the pieces' scratch memory is.
            largest: The size of the largest bucket in bytes. The scratch memory of a piece, of two tensors or three, is
                to be at most two copies of it.
            in_place: Whether new points are to be written over the old ones.
        """
        if len(self.params) == 1:  # the same as below, at less cost
            if self.params[0].grad is not None:
                yield self._piece([0], workspace, in_place=in_place)
            return
        copies = 2 * largest // (2 if in_place else 3)
        limit = min(_PIECE_BYTES.get(self.params[0].device.type, _PIECE_BYTES_ACCELERATOR), copies)
        # Alike in size: a small rest would cost as many operations.
        most = max(1, math.ceil(self.ends[-1] / math.ceil(self.nbytes / limit)))
        run: list[int] = []
        for i, p in enumerate(self.params):
            joins = p.grad is not None and (not run or self.ends[i] - self.starts[run[0]] <= most)
            if run and not joins:
                yield self._piece(run, workspace, in_place=in_place)
                run = []
            if p.grad is not None:
                run.append(i)
        if run:
            yield self._piece(run, workspace, in_place=in_place)

    def _piece(self, run: list[int], workspace: Workspace, *, in_place: bool) -> Piece:
        params = self.params[run[0] : run[-1] + 1]
        first = params[0]
        grads = [p.grad for p in params if p.grad is not None]
        as_it_lies = len(run) == 1 and first.dtype == grads[0].dtype == self.dtype
        if as_it_lies and first.dim() == 2 and reads_at_no_cost(first):
            point = first.detach()
            work, into = _scratch(workspace, point, in_place=in_place)
            return Piece(params, point, grads[0], work, into, self._views[run[0]], None)
        begin, end = self.starts[run[0]], self.ends[run[-1]]
        whole = len(run) == len(self.params)
        state = {key: buffer if whole else buffer[begin:end] for key, buffer in self.buffers.items()}
        master = state.pop("master", None)
        size = (end - begin, *first.shape[-2:])
        if as_it_lies and first.is_contiguous() and grads[0].is_contiguous():
            point = first.detach().view(size)
            work, into = _scratch(workspace, point, in_place=in_place)
            return Piece(params, point, grads[0].view(size), work, into, state, None)
        point, grad, *more = workspace.take(2 if in_place else 3, size, self.dtype, first.device)
        _stack(params, point)
        _stack(grads, grad)
        if master is not None:
            current(point, master, first.dtype, out=point)
        return Piece(params, point, grad, grad, more[0] if more else point, state, master)


def _scratch(workspace: Workspace, point: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
    """Return scratch memory of the size of a point that stays where it is, and where its new value goes."""
    work, *more = workspace.take(1 if in_place else 2, point.shape, point.dtype, point.device)
    return work, more[0] if more else point


def _placement(params: list[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(p.shape, p.dtype, p.device) for p in params]


def current(point: Tensor, master: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return master copies, or where someone else has written to the parameters since the last step, their values.

    Args:
        point: The parameters' values in the dtype of ``master``.
        master: Their master copies as of the last step.
        dtype: The parameters' own dtype.
        out: Where to.
    """
    return torch.where(master.to(dtype) == point, master, point, out=out)


def _stack(tensors: list[Tensor], out: Tensor) -> None:
    """Copy tensors of shape (..., n, r) into one of shape (k, n, r) and perhaps another dtype."""
    r = out.shape[-1]
    torch.cat([t if t.dim() == 2 else t.reshape(-1, r) for t in tensors], out=out.view(-1, r))
