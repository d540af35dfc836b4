"""The leading singular vectors of mean gradients, from sketches taken while the samples pass by once.

With the inputs a (T x in) and the output gradients g (T x out) of a linear map, its gradient is G = g^T a. Three
products with Gaussian matrices are kept instead of it, none of which forms it,

    Y = G^T Omega = a^T (g Omega),   Z = G Gamma = g^T (a Gamma),   W = Phi^T G Psi = (g Phi)^T (a Psi),

of the shapes (in, k), (out, k) and (s, s) with s = 2k + 1. They are linear in G, so those of a mean are the means of
those of the samples. From P = orth(Y) and Q = orth(Z) follows G ~ Q C P^T, with the C that explains W best,

    C = (Phi^T Q)^+ W ((Psi^T P)^+)^T,

and the singular vectors of the small C give those of G. If G has a rank of at most k, this is exact. (Halko,
Martinsson, Tropp, "Finding structure with randomness", 2011, section 5.5, passes over a matrix once with Y and Z
alone, by an ill-conditioned equation for C; W is what Tropp, Yurtsever, Udell, Cevher, "Streaming low-rank matrix
approximation with an application to scientific simulation", 2019, section 2, put in its place.)
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Sketch = tuple[Tensor, Tensor, Tensor]


class GradientSketches:
    """Sketches of the gradients of linear maps, summed over samples.

    What a backward pass brings is first staged sample by sample, as the weights of the samples in the loss are found
    out later; then kept, when these are known; then committed, when the batch is known to be evaluated rightly.

    Args:
        columns: For each linear map to sketch, by qualified name, the number k of columns, at most min(in, out).
        seed: Seed of the Gaussian matrices, which do not touch torch's global generators.
    """

    def __init__(self, columns: Mapping[str, int], seed: int = 0) -> None:
        self._columns = dict(columns)
        self._seed = seed
        self._gaussians: dict[tuple[object, ...], Tensor] = {}
        self._staged: dict[str, Sketch] = {}
        self._kept: dict[str, Sketch] = {}
        self._total: dict[str, Sketch] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def stage(self, name: str, a: Tensor, g: Tensor) -> None:
        """Take up one use of a linear map: inputs (batch, T, in) and output gradients (batch, T, out)."""
        k = self._columns[name]
        # Autocast would round the sums to a low precision.
        with torch.autocast(a.device.type, enabled=False):
            of_a, of_g = a @ self._gaussian(0, k, a), g @ self._gaussian(1, k, g)
            sketch = (a.mT @ of_g[..., :k], g.mT @ of_a[..., :k], of_g[..., k:].mT @ of_a[..., k:])
        _add(self._staged, name, sketch)

    def unstage(self) -> None:
        """Forget what is staged."""
        self._staged.clear()

    def keep(self, samples: Tensor, scale: Tensor) -> None:
        """Keep what is staged of some samples, shape (n,), each times its factor, shape (n,)."""
        for name, parts in self._staged.items():
            y, z, w = (
                torch.tensordot(scale.to(part), part.index_select(0, samples.to(part.device)), dims=1) for part in parts
            )
            _add(self._kept, name, (y, z, w))
        self._staged.clear()

    def commit(self) -> None:
        """Count what is kept."""
        for name, sketch in self._kept.items():
            _add(self._total, name, sketch)
        self._kept.clear()

    def drop(self) -> None:
        """Forget what is kept and not committed."""
        self._kept.clear()

    def add_other_ranks(self) -> None:
        """Add up the sketches of all ranks of a distributed job, one linear map at a time."""
        for name in self._columns:
            mine = self._total.pop(name, None)
            parts: list[tuple[np.ndarray, ...] | None] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, None if mine is None else [x.cpu().numpy() for x in mine])
            for part in parts:
                if part is not None:
                    y, z, w = map(torch.from_numpy, part)
                    _add(self._total, name, (y, z, w))

    def leading(self, name: str, rank: int) -> tuple[Tensor, Tensor] | None:
        """Return orthonormal leading right and left singular vectors, (in, rank) and (out, rank).

        They are in the sketches' type, at least float32, and those of G up to a common positive factor. None if no
        gradient has arrived, or only zeros.
        """
        if name not in self._total:
            return None
        y, z, w = (x.double().cpu() for x in self._total[name])
        if not w.any():
            return None
        k = self._columns[name]
        p, q = torch.linalg.qr(y).Q, torch.linalg.qr(z).Q
        psi, phi = (self._gaussian(side, k, x)[:, k:] for side, x in ((0, y.T), (1, z.T)))
        half = torch.linalg.lstsq(phi.T @ q, w).solution
        core = torch.linalg.lstsq(psi.T @ p, half.T).solution.T
        u, _, vh = torch.linalg.svd(core)
        like = self._total[name][0]
        return (p @ vh[:rank].T).to(like), (q @ u[:, :rank]).to(like)

    def _gaussian(self, side: int, k: int, x: Tensor) -> Tensor:
        """Return [Gamma, Psi] for inputs (side 0) or [Omega, Phi] for output gradients (1), (width of x, k + 2k + 1).

        Linear maps of the same width share theirs, which are independent of the gradients all the same.
        """
        key = (side, k, x.shape[-1], x.dtype, x.device)
        if key not in self._gaussians:
            seed = np.random.SeedSequence((self._seed, side, k, x.shape[-1])).generate_state(1)
            generator = torch.Generator().manual_seed(int(seed[0]))
            self._gaussians[key] = torch.randn(x.shape[-1], 3 * k + 1, generator=generator).to(x)
        return self._gaussians[key]


def _add(sums: dict[str, Sketch], name: str, sketch: Sketch) -> None:
    if name not in sums:
        sums[name] = sketch
    else:
        for total, part in zip(sums[name], sketch, strict=True):
            total.add_(part)
