"""Squared gradient norms of linear maps, for each sample of a batch, without any weight gradient.

For y = x W^T with the inputs a (T x in) and the output gradients g (T x out) of one sample, dL/dW = g^T a, so

    |dL/dW|_F^2 = sum((a a^T) * (g g^T)),

which costs O(T^2 (in + out)) and never forms the (out x in) matrix; both products are symmetric, so that of long ones
five eighths are computed. Where T is so long that forming the matrix is cheaper, it is formed for one linear map at a
time. (Goodfellow, "Efficient per-example gradient computations", 2015; for sequences Li et al., "Large language
models can be strong differentially private learners", ICLR 2022, section 4.)
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from stiefel_lora._entropy import LeanCrossEntropy, Rows
from stiefel_lora._models import linear_shape, split_at_layer
from stiefel_lora._precision import LOSS_SCALES, product_eps
from stiefel_lora._sketches import GradientSketches
from stiefel_lora.errors import InputError, listed
from stiefel_lora.onednn import batched_products

# A symmetric product is computed in so many blocks of rows, if they have at least so many rows each.
_BLOCKS = 4
_BLOCK_ROWS = 64

# Python's part of the time is that of many small calls, each of which would take the way through LeanCrossEntropy.
_unwatched = torch._C.DisableTorchFunction


class NotBatchedError(Exception):
    """A linear map's input does not have the batch as its first dimension, so samples cannot be told apart."""


class _UsedAgainError(Exception):
    """A weight of which only the Gram matrix of its input was kept is used a second time in one forward pass."""


class _OverwrittenError(Exception):
    """What the backward pass needs was written to after it had been kept."""


@dataclass
class _Weight:
    """One weight matrix and its uses in the forward pass at hand; several modules and calls may share it."""

    rows: list[int] = field(default_factory=list)
    uses: int = 0
    arrived: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # inputs and output gradients, (batch, T, width)


class _Kept:
    """A tensor that is kept for the backward pass, and must not be written to in between.

    Autograd does not look after what is kept in hooks.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._version = x._version

    def get(self) -> Tensor:
        if self.x._version != self._version:
            raise _OverwrittenError
        return self.x


class _KeptAgain(_Kept):
    """An activation that is computed again from its input, which is kept anyway."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        super().__init__(x)
        self._function = function

    def get(self) -> Tensor:
        return self._function(super().get())


class GradientNorms:
    """Measures per-sample squared gradient norms while it is entered as a context.

    Args:
        model: The model that holds the linear maps.
        linears: Linear maps by qualified name; a weight that several of them share has one gradient, the sum over all
            its uses, which is counted for each of them.
        sketches: Has its sketches of these gradients staged by each `measure`; the inputs are kept for it.

    Raises:
        InputError: If a weight is shared with a module that is not among ``linears`` (an embedding, say): its gradient
            would not be seen whole.
    """

    def __init__(
        self, model: nn.Module, linears: Mapping[str, nn.Module], sketches: GradientSketches | None = None
    ) -> None:
        self.sketches = sketches
        self._linears = linears
        self._names = list(linears)
        # Linear maps that no forward pass has called so far, so that nothing is known of them.
        self.unused = dict.fromkeys(self._names)
        # Those that did not take an input of the one width to an output of the other.
        self.unlike: dict[str, None] = {}
        self._weights: dict[Hashable, _Weight] = {}
        for row, module in enumerate(linears.values()):
            self._weights.setdefault(_key(module), _Weight()).rows.append(row)
        _check_not_shared(model, linears)
        self._handles: list[Any] = []
        self._batch_size = 0
        self._norms: dict[int, Tensor] = {}  # shape (batch,), by the row of the linear map
        self._in_backward = False
        self._is_half = False  # Whether float16 takes part in the loss
        # The relative rounding error of the coarsest output of the linear maps.
        self.eps = 0.0
        self._scale = 1.0
        self._keep_inputs = len(self._weights) < len(linears)
        self._parameters = {_address(p) for p in model.parameters()}
        self._saved: dict[int, int] = {}
        self._over_logits = True
        self.rows: Rows | None = None
        # The last input, its version and its Gram matrix: query, key and value projections share theirs.
        self._last: tuple[Tensor, int, list[Tensor]] | None = None

    def __enter__(self) -> "GradientNorms":
        for module in dict.fromkeys(self._linears.values()):
            hook = self._hook(self._weights[_key(module)], module)
            # First of all hooks: what others make of the output is no part of the linear map.
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def measure(self, forward: Callable[[], Tensor], batch_size: int) -> Tensor:
        """Run a forward pass and the backward pass of its loss.

        Args:
            forward: Returns the loss, a scalar. If that is a mean cross entropy, ``rows`` then holds its rows; else
                None. May be called a second time.
            batch_size: Number of samples that the forward pass sees.

        Returns:
            The squared norms, shape (batch_size, number of linears), in float32 or wider.

        Raises:
            NotBatchedError: If the first dimension of an input is not ``batch_size``, unless that is 1.
            InputError: If the loss is not a scalar or depends on none of the linear maps, or the model changes
                activations in place that the backward pass needs.
        """
        self._batch_size = batch_size
        try:
            try:
                return self._measure(forward)
            except _OverwrittenError:
                # Logits that something besides one cross entropy needs: a second one, a penalty, or their own last
                # operation if its gradient is that of its output.
                self._over_logits = False
                return self._measure(forward)
        except _OverwrittenError as error:
            raise InputError(
                "an activation that the backward pass needs, such as the input of a linear map, was changed in place "
                "after its use, so the model cannot be scored"
            ) from error
        finally:
            self._forget()

    def _measure(self, forward: Callable[[], Tensor]) -> Tensor:
        if self.sketches is not None:
            self.sketches.unstage()
        largest, *smaller = LOSS_SCALES
        loss, norms = self._measure_at(largest, forward)
        for scale in smaller:
            if self._scale == 1 or not loss.isfinite() or (finite := norms.isfinite().all(1)).all():
                break
            staged = {} if self.sketches is None else self.sketches.unstage()
            loss, found = self._measure_at(scale, forward)
            # Samples that are finite at a larger factor are measured with it, whatever is beside them.
            norms = torch.where(finite[:, None], norms, found)
            if self.sketches is not None:
                self.sketches.restage(finite, staged)
        return norms

    def _measure_at(self, scale: float, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the norms, measured with the loss times ``scale`` where float16 takes part in it."""
        try:
            loss = self._forward(forward)
        except _UsedAgainError:
            self._keep_inputs = True
            loss = self._forward(forward)
        self._scale = scale if self._is_half else 1.0
        self._in_backward = True
        with _own_gradients(loss):
            loss.backward(torch.full_like(loss, self._scale))
        for weight in self._weights.values():
            self._finish(weight)
        return loss, self._measured()

    def _forward(self, forward: Callable[[], Tensor]) -> Tensor:
        self._forget()
        self._saved.clear()
        self._is_half, self.eps = False, 0.0
        entropy = LeanCrossEntropy(in_place=self._over_logits)
        with torch.enable_grad(), entropy, torch.autograd.graph.saved_tensors_hooks(self._save, methodcaller("get")):
            loss = forward()
        self._last, self.rows = None, entropy.rows_of(loss)
        if loss.dim() != 0:
            raise InputError(f"the loss must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise InputError(
                f"{self._no_use()}; or they ran without gradients (as in a checkpoint with use_reentrant=True; "
                "use_reentrant=False keeps them)"
            )
        return loss

    @property
    def saved_bytes(self) -> int:
        """What the latest forward pass kept for its backward pass, besides parameters, and what that staged."""
        return sum(self._saved.values()) + (0 if self.sketches is None else self.sketches.staged_bytes)

    def _save(self, x: Tensor) -> _Kept:
        """Keep a tensor for the backward pass, or what it is cheaply computed from."""
        with _unwatched():
            self._is_half |= x.dtype == torch.float16
            node = x.grad_fn
            if node is not None and node.name() == "SiluBackward0" and x._version == 0:
                return _KeptAgain(silu, node._saved_self.detach())  # type: ignore[attr-defined]
            self._count(x)
            return _Kept(x)

    def _count(self, x: Tensor) -> None:
        if _address(x) not in self._parameters:
            self._saved[_address(x)] = x.untyped_storage().nbytes()

    def _measured(self) -> Tensor:
        """Return the norms found, shape (batch, linears); those of a linear map that was not used are zero."""
        if not self._norms:
            raise InputError(self._no_use())
        zero = torch.zeros_like(next(iter(self._norms.values())))
        # The layers of a model may be on several devices.
        return torch.stack([self._norms.get(row, zero).to(zero.device) for row in range(len(self._linears))], dim=1)

    def _no_use(self) -> str:
        stacks = dict.fromkeys(split_at_layer(name)[0] or "the model" for name in self._names)
        return (
            "the loss depends on none of the linear maps to score, which are in "
            f"{listed(stacks)}; layers= names another list of layers"
        )

    def _forget(self) -> None:
        self._last, self._in_backward = None, False
        self._norms.clear()
        for weight in self._weights.values():
            weight.uses = 0
            weight.arrived.clear()

    def _hook(self, weight: _Weight, module: nn.Module) -> Callable[..., Tensor | None]:
        n_in, n_out = linear_shape(module)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            for row in weight.rows:
                self.unused.pop(self._names[row], None)
            x: Any = args[0] if args else next(iter(kwargs.values()), None)
            with _unwatched():
                if not (_is_of_width(x, n_in) and _is_of_width(output, n_out)):
                    self.unlike.update({self._names[row]: None for row in weight.rows})
                    return None
                if self._in_backward:
                    # A checkpointed segment runs again. Its first run is what counts, but the same must be saved.
                    return _tap(output, lambda g: None)
                if x.requires_grad and not output.requires_grad:
                    # A path around it may bring gradients to the linear maps before it, but not all of them.
                    raise InputError(_no_gradient(self._names[weight.rows[0]]))
                weight.uses += 1
                self._is_half |= output.dtype == torch.float16
                self.eps = max(self.eps, product_eps(output))
                arrive = self._arrival(weight, x, n_in, n_out)
                return _tap(output, self._with_sketches(arrive, weight, x, n_in, n_out))

        return hook

    def _arrival(self, weight: _Weight, x: Tensor, n_in: int, n_out: int) -> Callable[[Tensor], None]:
        """Return what to do with the output gradient of a linear map; what it holds is let go when that is done."""
        if not self._keep_inputs and weight.uses > 1:
            raise _UsedAgainError
        if not self._keep_inputs and self._gram_is_cheaper(x.numel() // n_in // self._batch_size, n_in, n_out):
            held = [self._input_gram(x, n_in)]
            return lambda g: self._add(weight, _gram_norms(held.pop(), self._gradient(g, n_out)))
        kept = [_Kept(self._by_sample(x, n_in))]
        self._count(kept[0].x)
        if self._keep_inputs:
            return lambda g: weight.arrived.append((kept.pop().get(), self._gradient(g, n_out)))
        return lambda g: self._add(weight, _direct_norms(kept.pop().get(), self._gradient(g, n_out)))

    def _with_sketches(
        self, arrive: Callable[[Tensor], None], weight: _Weight, x: Tensor, n_in: int, n_out: int
    ) -> Callable[[Tensor], None]:
        """Return what to do with an output gradient where the weight's gradient is sketched as well."""
        sketches = self.sketches
        names = [self._names[row] for row in weight.rows if sketches is not None and self._names[row] in sketches]
        if sketches is None or not names:
            return arrive
        kept = [_Kept(x)]  # in its own type: linear maps with the same input share it
        self._count(x)

        def arrive_and_stage(g: Tensor) -> None:
            arrive(g)
            inputs, gradients = self._by_sample(kept.pop().get(), n_in), self._gradient(g, n_out)
            for name in names:
                sketches.stage(name, inputs, gradients)

        return arrive_and_stage

    def _gradient(self, g: Tensor | None, width: int) -> Tensor:
        """Return an output gradient as (batch, T, width) in float32 or wider, without the factor of the loss."""
        g = self._by_sample(g, width)
        return g if self._scale == 1 else g / self._scale

    def _by_sample(self, x: Tensor | None, width: int) -> Tensor:
        """Return ``x`` as (batch, T, width) in float32 or wider."""
        if x is None:
            raise InputError(_no_gradient("an operation behind a linear map"))
        if self._batch_size > 1 and (x.dim() < 2 or x.shape[0] != self._batch_size):
            raise NotBatchedError
        x = x.detach()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        return x if x.dim() == 3 and len(x) == self._batch_size else x.reshape(self._batch_size, -1, width)

    def _gram_is_cheaper(self, length: int, n_in: int, n_out: int) -> bool:
        entries = sum((end - start) * end for start, end in _row_blocks(length))
        return entries * (n_in + n_out) < length * n_in * n_out

    def _input_gram(self, x: Tensor, width: int) -> list[Tensor]:
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = (x, x._version, _gram(self._by_sample(x, width)))
            for block in self._last[2]:
                self._count(block)
        return self._last[2]

    def _finish(self, weight: _Weight) -> None:
        """Add up a weight whose inputs were kept: its uses, one after another, are one longer sequence."""
        if not weight.arrived:
            return
        a, g = (torch.cat(parts, dim=1) for parts in zip(*weight.arrived, strict=True))
        weight.arrived.clear()
        cheaper = self._gram_is_cheaper(a.shape[1], a.shape[2], g.shape[2])
        self._add(weight, _gram_norms(_gram(a), g) if cheaper else _direct_norms(a, g))

    def _add(self, weight: _Weight, norms: Tensor) -> None:
        for row in weight.rows:
            self._norms[row] = norms


@contextmanager
def _own_gradients(loss: Tensor) -> Iterator[None]:
    """Within the context a backward pass leaves no gradient in what a loss depends on, as a trainable ``loss_fn``."""
    leaves, seen, nodes = [], set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.append((leaf, leaf.grad))
            leaf.grad = None
        nodes.extend(after for after, _ in node.next_functions)
    try:
        yield
    finally:
        for leaf, gradient in leaves:
            leaf.grad = gradient


def _address(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr()
    except RuntimeError:  # a quantised weight of torchao has its data in other tensors
        return id(x)


def _is_of_width(x: Any, width: int) -> bool:
    return isinstance(x, Tensor) and x.shape[-1:] == (width,)


def _no_gradient(where: str) -> str:
    return (
        f"no gradient goes back through {where}: it has no backward pass, as bitsandbytes' 4-bit linears in evaluation "
        "mode on a CPU and linears that quantise their inputs; score the model before it is quantised, or on a GPU"
    )


def _tap(output: Tensor, arrive: Callable[[Tensor], None]) -> Tensor:
    """Hand the gradient of ``output`` to a function, and start the graph here if there is none below."""
    if output._is_view():
        # Of a view that is then changed in place, as by ReLU(inplace=True), autograd would leave out the hook.
        output = output.clone()
    if not output.requires_grad:
        output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
    output.register_hook(arrive)
    return output


def _row_blocks(length: int) -> list[tuple[int, int]]:
    """Return where each block of the rows of a symmetric matrix starts and ends."""
    rows = max(_BLOCK_ROWS, -(-length // _BLOCKS))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _gram(a: Tensor) -> list[Tensor]:
    """Return a a^T of each sample by blocks of rows, each up to the block's own columns: the rest is their mirror."""
    return [batched_products(a[:, start:end], a[:, :end]) for start, end in _row_blocks(a.shape[1])]


def _gram_norms(gram: list[Tensor], g: Tensor) -> Tensor:
    total = g.new_zeros(len(g))
    for block, other in zip(gram, _gram(g), strict=True):
        product = other.mul_(block)
        before = block.shape[2] - block.shape[1]
        # What is left of the diagonal block stands for its mirror image as well.
        total = total + product.sum(dim=(1, 2)) + product[:, :, :before].sum(dim=(1, 2))
    return total


def _direct_norms(a: Tensor, g: Tensor) -> Tensor:
    # One sample at a time: the gradient of a weight is as large as the weight. The first factor has to be turned.
    first, second = sorted((a.mT, g.mT), key=lambda x: x.shape[1])
    parts = zip(first.split(1), second.split(1), strict=True)
    return torch.cat([batched_products(x, y).square_().sum(dim=(1, 2)) for x, y in parts])


def _key(module: nn.Module) -> Hashable:
    # A parametrized weight is another tensor whenever it is asked for.
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    return id(module if weight is None else weight)


def _check_not_shared(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    scored = {id(getattr(module, "weight", None)): name for name, module in linears.items()}
    inside = set(map(id, linears.values()))
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in scored and id(module) not in inside:
                raise InputError(
                    f"the weight of {scored[id(parameter)]} is shared with {name}, which is not scored, so its "
                    "gradient would not be seen whole; leave it out with modules="
                )
