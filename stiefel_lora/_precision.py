"""The precision to compute in: types, and products that autocast and the TF32 and bf16 switches leave exact."""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

# torch 2.9 gave each backend a switch of its own, beside the older one for all of them.
_SWITCHES: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
if not all(hasattr(switch, "fp32_precision") for switch in _SWITCHES):
    _SWITCHES = ()

# Gradients of float16 are taken of the loss times a factor, as most are below the type's range and would be zeros: the
# first of these that is not too much for any of them. Powers of two change nothing else.
LOSS_SCALES = (2.0**12, 2.0**6, 1.0)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in for data of one: float64 for float64, float32 for anything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_like(model: torch.nn.Module) -> torch.autocast:
    """Compute the adapters of a low-precision model in its precision on CUDA; elsewhere leave all as it is."""
    first = next(model.parameters())
    low = first.device.type == "cuda" and first.dtype != torch.float32
    return torch.autocast(first.device.type, dtype=first.dtype if low else None, enabled=low)


def reads_at_no_cost(x: torch.Tensor) -> bool:
    """Tell whether looking at a value does not wait for a device."""
    return x.device.type == "cpu"


def under_autocast(device: str) -> bool:
    """Tell whether autocast is on for a type of device."""
    # The one type of device that has none; torch 2.6 cannot compile a call of is_autocast_available.
    return device != "meta" and torch.is_autocast_enabled(device)


def exact_products(devices: Collection[str]) -> AbstractContextManager[object]:
    """Return a context in which products on these types of devices have the precision of their operands.

    A point is orthonormal to float32 rounding only if its Gram matrices are. ``set_float32_matmul_precision("high")``,
    as training scripts often have it, would leave three digits of them, and autocast two. What was set comes back.
    """
    if not devices:
        return nullcontext()
    autocast = [device for device in devices if under_autocast(device)]
    # A compiled function keeps the precision that it was compiled under.
    reduced = not torch.compiler.is_compiling() and is_reduced()
    if not autocast and not reduced:
        return nullcontext()
    stack = ExitStack()
    for device in autocast:
        stack.enter_context(torch.autocast(device, enabled=False))
    if reduced:
        stack.enter_context(_full_float32())
    return stack


def product_eps(product: torch.Tensor) -> float:
    """Return the relative rounding error of a matrix product, by its dtype and what is allowed for float32."""
    reduced = product.dtype == torch.float32 and is_reduced()
    # TF32 has the mantissa of float16; bf16 products may be allowed as well.
    return torch.finfo(torch.bfloat16 if reduced else product.dtype).eps


def is_reduced() -> bool:
    """Tell whether products of float32 may have a lower precision."""
    if not _SWITCHES:
        return torch.get_float32_matmul_precision() != "highest"
    return any(switch.fp32_precision not in {"none", "ieee"} for switch in _SWITCHES)


@contextmanager
def _full_float32() -> Iterator[None]:
    before = [switch.fp32_precision for switch in _SWITCHES]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say where the newer switches alone were used
        legacy = "highest"
    try:
        if legacy != "highest":
            # Both kinds of switches have to agree, or torch refuses to multiply.
            torch.set_float32_matmul_precision("highest")
        for switch in _SWITCHES:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for switch, value in zip(_SWITCHES, before, strict=True):
            _restore(switch, value)


def _restore(switch: Any, value: str) -> None:
    # What came from a wider switch is to follow that one again.
    switch.fp32_precision = "none"
    if switch.fp32_precision != value:
        switch.fp32_precision = value
