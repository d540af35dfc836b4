"""Matrix products by oneDNN where torch's own choice, MKL, leaves half of the processor unused.

torch multiplies float32 matrices on a CPU by MKL, which uses AVX-512 on Intel's processors alone. oneDNN, which is in
the same build and computes convolutions and what ``torch.compile`` makes of a linear map, uses it on AMD's as well, and
takes half the time there, at the same precision.
"""

import platform
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from stiefel_lora._precision import is_reduced

# Where the second matrix has fewer entries and there are fewer multiplications, what Python's part of a call costs
# outweighs what is gained.
_ENTRIES = 1 << 18
_MULTIPLICATIONS = 1 << 21

_lock = Lock()
_uses = 0
_overrides = ExitStack()


@contextmanager
def onednn_products() -> Iterator[None]:
    """Return a context in which oneDNN multiplies float32 matrices on a CPU where it is the faster library.

    That is on AMD's processors with AVX-512 with a build of torch that multiplies by MKL; elsewhere nothing changes.
    torch's kernels of ``mm`` and ``addmm``, by which linear maps and their gradients are computed, are replaced for the
    whole process while any thread is inside. Autograd, autocast and checkpoints are above kernels and see no
    difference; nor do other types and devices, small matrices, products in batches, compiled functions, and products
    for which ``torch.set_float32_matmul_precision`` allows less than float32 or ``torch.backends.mkldnn`` is switched
    off. Results differ by rounding alone.

    `fisher_scores`, `StiefelTrainer` and the ``stiefel-lora`` command enter it themselves; for a loop of your own:

        with stiefel_lora.onednn_products():
            model(**batch).loss.backward()
    """
    if not is_faster():
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _uses
    with _lock:
        if _uses == 0:
            _use_up_the_warning()
            library = _overrides.enter_context(torch.library._scoped_library("aten", "IMPL"))
            library.impl("mm", _mm, "CPU")
            library.impl("addmm", _addmm, "CPU")
        _uses += 1


@cache
def _use_up_the_warning() -> None:
    """Let torch say, as it does once in a process, that a kernel is replaced.

    Not each time: whoever changes the filters of warnings makes Python show again what it shows once a line.
    """
    with warnings.catch_warnings(), torch.library._scoped_library("aten", "IMPL") as library:
        warnings.simplefilter("ignore", UserWarning)
        library.impl("mm", _mm, "CPU")


def _leave() -> None:
    global _uses
    with _lock:
        _uses -= 1
        if _uses == 0:
            _overrides.close()


@cache
def is_faster() -> bool:
    """Tell whether oneDNN multiplies faster than MKL, which torch takes: that is so where MKL has no AVX-512."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and "AVX512" in torch.backends.cpu.get_cpu_capability() and _is_amd()


def _is_amd() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        described = platform.processor()
    return "AuthenticAMD" in described


def batched_products(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b^T`` of each sample in the precision of the operands, which autocast would lower.

    Args:
        a: Shape (batch, m, k).
        b: Shape (batch, n, k).
    """
    if is_faster() and _fits(a[0], b[0].mT):
        return torch.stack([_product(x, y.mT) for x, y in zip(a, b, strict=True)])
    # Autocast leaves alone what is given a place for its result.
    return torch.bmm(a, b.mT, out=a.new_empty(len(a), a.shape[1], b.shape[1]))


# Kernels are below autograd and dispatch: their operands are plain matrices. With ``out=`` torch's own are called.


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _fits(a, b):
        return _product(a, b)
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _fits(a, b) and beta == alpha == 1 and bias.shape == b.shape[1:] and bias.dtype == a.dtype:
        return _product(a, b, bias)
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(len(a), b.shape[1]))


def _fits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and (b.numel() >= _ENTRIES or len(a) * b.numel() >= _MULTIPLICATIONS)
        # What torch would refuse, or oneDNN has to rearrange, is left to torch.
        and a.shape[1] == b.shape[0]
        and all(z.is_contiguous() or z.mT.is_contiguous() for z in (a, b))
        and a.numel() > 0
        # Both may change at any time.
        and bool(torch.backends.mkldnn.enabled)
        and not is_reduced()
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``a @ b + bias``."""
    if bias is None and not a.is_contiguous() and len(a) > b.shape[1]:
        # oneDNN copies the first factor of such a product, as of a weight's gradient: let that be the smaller one.
        return _product(b.mT, a.mT).mT.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, bias, "none", [], "")
    return product
