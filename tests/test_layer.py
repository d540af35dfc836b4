"""The layer against dense float64 formulas, and everything that torch does to a module's parameters."""

import copy
import io
import pickle
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from stiefel_lora.errors import InputError, ManifoldError
from stiefel_lora.factors import leading_singular_vectors
from stiefel_lora.layer import StiefelLoRALinear
from stiefel_lora.merging import merge_adapters
from stiefel_lora.stiefel import orthogonality_error, random_point
from tests.models import FULL_GRAPH

# Householder QR and a polish by SVD leave |X^T X - I|_F at about 1e-6 for 12 x 4 in float32; 1e-5 is geoopt's own bar.
ON_MANIFOLD = 1e-5


class QuantisedLinear(nn.Module):
    """Stands for bitsandbytes' and torchao's linears: packed integers, a scale and ``in_features``/``out_features``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale: Tensor
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def make_base(kind: str = "linear", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    if kind == "conv1d":
        base: nn.Module = Conv1D(9, 12)
    else:
        base = nn.Linear(12, 9)
    if kind == "quantised":
        base = QuantisedLinear(base)
    return base if kind == "quantised" else base.to(dtype)


def make_layer(kind: str = "linear", dtype: torch.dtype = torch.float64, **options: Any) -> StiefelLoRALinear:
    """A layer whose free factor is not zero, as after training."""
    layer = StiefelLoRALinear(make_base(kind, dtype), 4, **options)
    torch.manual_seed(4)
    for name, factor in layer.named_parameters(recurse=False):
        if name not in layer.manifold_parameters():
            nn.init.normal_(factor)
    return layer


def dense_update(layer: StiefelLoRALinear) -> Tensor:
    """The update as a dense float64 matrix, written out from the definition, shape (out, in)."""
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    s = layer.lora_S.detach().double() if layer.orthonormal == "both" else torch.eye(layer.rank, dtype=torch.float64)
    scale = layer.alpha / layer.rank**0.5 if layer.rslora else layer.alpha / layer.rank
    return scale * torch.einsum("or,rs,is->oi", b, s, a)


KINDS = ["linear", "conv1d", "quantised"]
FORMS = ["A", "B", "both"]


@pytest.mark.parametrize("orthonormal", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_exactly(kind: str, orthonormal: Any) -> None:
    base = make_base(kind, torch.float32)
    layer = StiefelLoRALinear(base, 4, dropout=0.5, orthonormal=orthonormal)
    x = torch.randn(5, 12)
    assert torch.equal(layer.train()(x), base(x))
    assert torch.equal(layer.eval()(x), base(x))
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"} | ({"lora_S"} if orthonormal == "both" else set())


def test_default_shapes_types_and_scaling() -> None:
    layer = StiefelLoRALinear(nn.Linear(12, 9), 4)
    assert isinstance(layer.lora_A, geoopt.ManifoldParameter)
    assert isinstance(layer.lora_A.manifold, geoopt.EuclideanStiefel)
    assert layer.lora_A.shape == (12, 4)
    assert orthogonality_error(layer.lora_A) < ON_MANIFOLD
    assert type(layer.lora_B) is nn.Parameter
    assert torch.equal(layer.lora_B, torch.zeros(9, 4))
    assert (layer.alpha, layer.scaling, layer.merged) == (8.0, 2.0, False)
    assert StiefelLoRALinear(nn.Linear(12, 9), 4, alpha=3).scaling == 3 / 4
    assert StiefelLoRALinear(nn.Linear(12, 9), 4, alpha=3, rslora=True).scaling == 3 / 2


def test_the_input_has_the_name_that_it_has_in_a_linear() -> None:
    layer, x = StiefelLoRALinear(nn.Linear(6, 4), rank=2), torch.randn(3, 6)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("orthonormal", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_delta_weight_against_the_dense_formula(kind: str, orthonormal: Any) -> None:
    layer = make_layer(kind, orthonormal=orthonormal, alpha=5, rslora=kind == "conv1d")
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    update = dense_update(layer)
    # float32 factors under the quantised base, float64 under the others.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "quantised" else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(layer.delta_weight().double(), update, **tolerance)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ update.T, **tolerance)


@pytest.mark.parametrize("orthonormal", FORMS)
def test_gradients_against_autograd_of_the_dense_formula(orthonormal: Any) -> None:
    layer = make_layer(orthonormal=orthonormal)
    x = torch.randn(5, 12, dtype=torch.float64)
    layer(x).square().sum().backward()
    factors = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters(recurse=False)}
    middle = factors.get("lora_S", torch.eye(4, dtype=torch.float64))
    y = layer.base(x) + layer.scaling * x @ factors["lora_A"] @ middle.T @ factors["lora_B"].T
    y.square().sum().backward()
    for name, factor in factors.items():
        torch.testing.assert_close(getattr(layer, name).grad, factor.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", [True, False])
def test_takes_the_mode_of_its_base(mode: bool) -> None:
    layer = StiefelLoRALinear(make_base().train(mode), 4, dropout=0.5)
    assert layer.training == layer.dropout.training == mode


def test_dropout_acts_on_the_update_only_and_only_in_training() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.ones(1, 12, dtype=torch.float64)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    mean = torch.stack([layer.train()(x) for _ in range(4000)]).mean(0)
    # The mean of 4000 draws has a standard error of |update| / sqrt(4000), below 0.1 here.
    torch.testing.assert_close(mean, layer.eval()(x), rtol=0, atol=0.5)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), layer.base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(5, 12, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    # The update is computed in float32 and rounded once, so it is exact in the output's dtype.
    expected = layer.base(x) + (x.double() @ dense_update(layer).T).to(dtype)
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    x = torch.randn(5, 12, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        assert layer._update(x).dtype == torch.bfloat16
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_A.grad.dtype == torch.float32
    # Two chained bf16 products over 12 and 4 terms: a few times bf16's eps of 8e-3, times values of size up to 30.
    torch.testing.assert_close(
        out.double(), layer.base(x).double() + x.double() @ dense_update(layer).T, rtol=0.05, atol=0.5
    )


def test_autocast_makes_no_wide_copy_of_the_input() -> None:
    class Casts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[torch.Size] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and out.dtype == torch.float32:
                self.shapes.append(out.shape)
            return out

    layer, x = make_layer(dtype=torch.bfloat16), torch.randn(5, 12, dtype=torch.bfloat16)
    with Casts() as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert x.shape not in casts.shapes
    with Casts() as casts:
        layer(x)
    assert x.shape in casts.shapes


@pytest.mark.parametrize("orthonormal", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_unmerge(kind: str, orthonormal: Any, dtype: torch.dtype) -> None:
    layer = make_layer(kind, dtype, orthonormal=orthonormal)
    x = torch.randn(5, 12, dtype=dtype)
    parameter, before, expected = layer.weight, layer.weight.clone(), layer(x)
    exact = before.double() + (dense_update(layer).T if kind == "conv1d" else dense_update(layer))

    error = layer.merge()
    assert layer.merged
    assert layer.weight.dtype == dtype
    assert torch.equal(layer(x), layer.base(x))
    # The sum is rounded once, on top of rounding in the float32 or float64 product of the factors.
    wide = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    torch.testing.assert_close(layer.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=20 * wide)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), expected, rtol=20 * eps, atol=100 * eps)
    dense_error = float((layer.weight.double() - exact).norm() / dense_update(layer).norm())
    assert error == pytest.approx(dense_error if dtype == torch.bfloat16 else 0, rel=1e-3, abs=wide)

    layer.merge()  # no second time
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is parameter
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), expected)
    layer.unmerge()


def test_merging_a_zero_update_has_no_error() -> None:
    assert StiefelLoRALinear(make_base(), 4).merge() == 0.0


def test_forward_does_not_change_the_state() -> None:
    layer = make_layer(dropout=0.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    for prepare in (lambda: None, layer.merge):
        prepare()
        state = copy.deepcopy(layer.state_dict())
        attributes = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
        layer(x)
        assert {k: v for k, v in vars(layer).items() if not k.startswith("_")} == attributes
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in state.items())


def test_disabled_is_the_base() -> None:
    layer = make_layer()
    x = torch.randn(5, 12, dtype=torch.float64)
    layer.enabled = False
    with pytest.raises(InputError, match="disabled"):
        layer.merge()
    assert torch.equal(layer(x), layer.base(x))


def test_merge_of_a_quantised_base_is_refused() -> None:
    layer = make_layer("quantised")
    with pytest.raises(InputError, match=r"QuantisedLinear is a Parameter of torch.int8.*it is quantised"):
        layer.merge()
    assert not layer.merged
    with pytest.raises(InputError, match="dequantise"):
        StiefelLoRALinear(make_base("quantised"), 4, init="svd")


def test_merge_that_overflows_is_refused() -> None:
    layer = make_layer(dtype=torch.float16)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B.fill_(1e6)
    with pytest.raises(InputError, match="overflows torch.float16"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_state_dict_names_and_merged_state() -> None:
    layer = make_layer(orthonormal="both")
    names = ["lora_A", "lora_B", "lora_S", "base.weight", "base.bias"]
    assert list(layer.state_dict()) == names
    before = layer.weight.clone()
    layer.merge()
    assert list(layer.state_dict()) == names
    assert torch.equal(layer.state_dict()["base.weight"], before)
    assert not torch.equal(layer.weight, before)
    x = torch.randn(3, layer.in_features, dtype=layer.weight.dtype)
    expected = layer(x)
    layer.load_state_dict(layer.state_dict())
    assert not layer.merged
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # float32: merged sums round elsewhere


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_keeps_the_manifold(assign: bool) -> None:
    source, target = make_layer(), StiefelLoRALinear(make_base(), 4)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert isinstance(target.lora_A, geoopt.ManifoldParameter)
    assert target.lora_A.requires_grad
    assert torch.equal(target.lora_A, source.lora_A)
    narrow = {k: v.bfloat16() for k, v in source.state_dict().items()}
    target.load_state_dict(narrow, assign=assign)
    assert isinstance(target.lora_A, geoopt.ManifoldParameter)
    # bf16 factors are widened and put back on the manifold
    assert target.lora_A.dtype == (torch.float32 if assign else torch.float64)
    assert orthogonality_error(target.lora_A) < ON_MANIFOLD


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conversion_keeps_factors_wide_and_on_the_manifold(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=torch.float32, orthonormal="both")
    layer = layer.to(dtype)
    assert layer.weight.dtype == dtype
    for factor in layer.manifold_parameters().values():
        assert isinstance(factor, geoopt.ManifoldParameter)
        assert factor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # After a conversion to float64 the factors are put on the manifold to float64's precision.
        assert orthogonality_error(factor) < (1e-14 if dtype == torch.float64 else ON_MANIFOLD)


def test_unmerge_after_a_conversion() -> None:
    layer = make_layer(dtype=torch.float32)
    before = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16).unmerge()
    assert torch.equal(layer.weight, before.bfloat16())


@pytest.mark.parametrize(
    "change", [torch.nn.utils.parametrizations.weight_norm, lambda base: prune.l1_unstructured(base, "weight", 0.5)]
)
def test_a_merged_weight_that_was_made_something_else_stays_until_that_is_undone(change: Any) -> None:
    layer = make_layer(dtype=torch.float32)
    layer.merge()
    change(layer.base)
    with pytest.raises(InputError, match="was parametrized or pruned while the adapter was merged"):
        layer.unmerge()
    assert layer.merged


def test_meta_device() -> None:
    with torch.device("meta"):
        layer = StiefelLoRALinear(nn.Linear(12, 9), 4)
    assert layer.lora_A.is_meta and layer.lora_B.is_meta
    source = make_layer(dtype=torch.float32)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert isinstance(layer.lora_A, geoopt.ManifoldParameter)
    assert torch.equal(layer(torch.ones(1, 12)), source(torch.ones(1, 12)))
    empty = source.to("meta").to_empty(device="cpu")
    assert isinstance(empty.lora_A, geoopt.ManifoldParameter)


def _clones(layer: StiefelLoRALinear) -> dict[str, StiefelLoRALinear]:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),  # noqa: S301
        "torch": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles(merged: bool) -> None:
    layer = make_layer()
    x = torch.randn(5, 12, dtype=torch.float64)
    plain = layer(x)
    if merged:
        layer.merge()
    for clone in _clones(layer).values():
        assert isinstance(clone.lora_A, geoopt.ManifoldParameter)
        assert isinstance(clone.lora_A.manifold, geoopt.EuclideanStiefel)
        assert clone.lora_A.requires_grad and not clone.weight.requires_grad
        assert torch.equal(clone(x), layer(x))
        clone.unmerge()
        assert torch.equal(clone(x), plain)
        assert layer.merged == merged


@pytest.mark.parametrize("orthonormal", FORMS)
def test_svd_initialisation(orthonormal: Any) -> None:
    for kind in ("linear", "conv1d"):
        base = make_base(kind)
        layer = StiefelLoRALinear(base, 4, orthonormal=orthonormal, init="svd")
        weight = base.weight.T if kind == "conv1d" else base.weight
        u, _, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        expected = {"lora_A": vh[:4].T, "lora_B": u[:, :4]}
        for name, factor in layer.manifold_parameters().items():
            # Singular vectors are unique up to sign; the projector is unique.
            torch.testing.assert_close(factor @ factor.T, expected[name] @ expected[name].T, rtol=0, atol=1e-10)
        if orthonormal == "both":  # the signs belong together: B^T W A = S
            s = layer.lora_B.T @ weight @ layer.lora_A
            torch.testing.assert_close(s, torch.linalg.svdvals(weight)[:4].diag(), rtol=0, atol=1e-10)


def test_leading_singular_vectors_of_a_rank_deficient_matrix() -> None:
    matrix = torch.outer(torch.arange(1.0, 7.0), torch.ones(5))
    right, left, values = leading_singular_vectors(matrix, 3)
    assert orthogonality_error(right) < ON_MANIFOLD and orthogonality_error(left) < ON_MANIFOLD
    torch.testing.assert_close(right[:, 0].abs(), torch.full((5,), 5**-0.5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix)[:3], rtol=1e-5, atol=1e-4)  # float32, |W| is 21
    with pytest.raises(InputError, match="NaN"):
        leading_singular_vectors(torch.full((4, 3), torch.nan), 2)


def test_singular_vectors_of_values_far_below_the_largest() -> None:
    """The Gram matrix has the squares, 1e-8 of the largest here, which is float32 rounding."""
    left, right = random_point(40, 3, dtype=torch.float64), random_point(30, 3, dtype=torch.float64)
    sizes = torch.tensor([1.0, 1e-3, 1e-4], dtype=torch.float64)
    found = leading_singular_vectors(((left * sizes) @ right.T).float(), 3)
    torch.testing.assert_close(found[2].double(), sizes, rtol=1e-2, atol=0)
    for vectors, exact in zip(found, (right, left), strict=False):
        # An SVD in float32 has the third to eps * 1e4, 1e-3.
        torch.testing.assert_close((vectors.double() * exact).sum(0).abs(), torch.ones_like(sizes), rtol=0, atol=1e-4)


def test_a_random_start_is_drawn_on_the_cpu_whatever_the_default_device_is() -> None:
    base = make_base()
    expected = StiefelLoRALinear(base, 2, generator=torch.Generator().manual_seed(0)).lora_A
    with torch.device("meta"):
        layer = StiefelLoRALinear(base, 2, generator=torch.Generator("cpu").manual_seed(0))
    assert torch.equal(layer.lora_A, expected)


def test_initialisation_by_tensors() -> None:
    a, b = random_point(12, 4), random_point(9, 4)
    layer = StiefelLoRALinear(nn.Linear(12, 9), 4, init=a)
    assert torch.equal(layer.lora_A, a)
    assert layer.lora_A.data_ptr() != a.data_ptr()
    layer = StiefelLoRALinear(nn.Linear(12, 9), 4, init=b, orthonormal="B")
    torch.testing.assert_close(layer.lora_B.data, b, rtol=0, atol=1e-6)
    layer = StiefelLoRALinear(nn.Linear(12, 9), 4, init=(a.bfloat16(), b), orthonormal="both")
    assert orthogonality_error(layer.lora_A) < ON_MANIFOLD
    # bf16 has an eps of 8e-3 relative to entries below 1.
    torch.testing.assert_close(layer.lora_A.data, a, rtol=0, atol=1e-2)
    with pytest.raises(InputError, match=r"init of lora_A must have shape \(12, 4\), got \(4, 12\)"):
        StiefelLoRALinear(nn.Linear(12, 9), 4, init=a.T)
    with pytest.raises(ManifoldError, match=r"orthonormal columns.* is 6,"):
        StiefelLoRALinear(nn.Linear(12, 9), 4, init=2 * a)
    with pytest.raises(InputError, match="must hold 2 tensor"):
        StiefelLoRALinear(nn.Linear(12, 9), 4, init=a, orthonormal="both")


def test_random_start_follows_the_generator() -> None:
    def start(seed: int) -> Tensor:
        return StiefelLoRALinear(nn.Linear(12, 9), 4, generator=torch.Generator().manual_seed(seed)).lora_A

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, InputError, r"rank must be in \[1, 9\].*got 0"),
        ({"rank": 10}, InputError, r"rank must be in \[1, 9\].*got 10"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got float"),
        ({"rank": 2, "alpha": 0}, InputError, "alpha must be positive and finite, got 0"),
        ({"rank": 2, "alpha": float("nan")}, InputError, "alpha"),
        ({"rank": 2, "dropout": 1.0}, InputError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"rank": 2, "orthonormal": "C"}, InputError, "orthonormal must be one of 'A', 'B', 'both', got 'C'"),
        ({"rank": 2, "init": "zeros"}, InputError, "init must be one of 'random', 'svd', got 'zeros'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        StiefelLoRALinear(nn.Linear(12, 9), **options)


@pytest.mark.parametrize(
    "base", [nn.Embedding(5, 3), nn.Conv2d(3, 3, 1), nn.LayerNorm(4), "q_proj", nn.LazyLinear(4)], ids=str
)
def test_bases_that_are_not_linear_are_refused(base: Any) -> None:
    with pytest.raises(TypeError, match="linear layer|initialise"):
        StiefelLoRALinear(base, 1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kept", ["itself", "copy", "pickle"])
def test_an_encoder_layer_calls_its_adapters_in_inference(kept: str, padded: bool) -> None:
    torch.manual_seed(3)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = padded
    bare = encoder(x, src_key_padding_mask=padding).detach()[~padding]
    for layer in encoder.layers:
        for name in ("linear1", "linear2"):
            adapted = StiefelLoRALinear(getattr(layer, name), 4)
            nn.init.normal_(adapted.lora_B)
            setattr(layer, name, adapted)
    if kept != "itself":
        encoder = copy.deepcopy(encoder) if kept == "copy" else pickle.loads(pickle.dumps(encoder))  # noqa: S301
    expected = encoder(x, src_key_padding_mask=padding).detach()[~padding]
    assert (expected - bare).abs().max() > 0.1
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            # float32, two layers of other kernels: 5e-7.
            torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[~padding], expected, rtol=0, atol=1e-5)


def test_the_output_of_an_attention_that_reads_its_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="the out_proj of an nn.MultiheadAttention, which reads its weight"):
        StiefelLoRALinear(nn.MultiheadAttention(16, 2).out_proj, 4)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_parametrized_factor_is_used_and_refused_by_name_in_a_merge(name: str) -> None:
    layer, x = make_layer(), torch.randn(3, 12, dtype=torch.float64)
    nn.utils.parametrize.register_parametrization(layer, name, nn.Tanh())
    with torch.no_grad():
        expected = layer.base(x) + layer.scaling * x @ layer.lora_A @ layer.lora_B.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)  # sums in another order
    with pytest.raises(InputError, match=f"{name} of an adapter is computed from another.*remove_parametrizations"):
        layer.merge()
    nn.utils.parametrize.remove_parametrizations(layer, name)
    layer.merge()


def test_a_wrapped_layer_is_not_wrapped_again() -> None:
    with pytest.raises(TypeError, match="got StiefelLoRALinear, which has modules inside"):
        StiefelLoRALinear(make_layer(), 2)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    layer = make_layer()
    x = torch.randn(5, 12, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = layer.lora_A.grad
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_breaks(autocast: bool) -> None:
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(5, 12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=FULL_GRAPH)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, expected = compiled(x), layer(x)
        torch.testing.assert_close(out, expected)
        out.float().square().sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None


def test_export_and_tracing_of_a_merged_layer() -> None:
    layer = make_layer(dtype=torch.float32).eval()
    x = torch.randn(5, 12)
    layer.merge()
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_data_parallel_replicas_see_the_factors() -> None:
    layer = make_layer()
    replica = layer._replicate_for_data_parallel()
    for name, factor in layer._parameters.items():
        setattr(replica, name, factor)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(replica(x), layer(x))


def test_repr_shows_the_options() -> None:
    layer = make_layer()
    assert "in_features=12, out_features=9, rank=4, alpha=8, rslora=False, orthonormal='A'\n" in repr(layer)
    layer.merge()
    assert "orthonormal='A', merged=True\n" in repr(layer)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_singular_vectors_of_entries_whose_squares_have_no_float32(size: float) -> None:
    matrix = size * torch.randn(30, 3) @ torch.randn(3, 20)
    right, left, values = leading_singular_vectors(matrix, 3)
    exact = torch.linalg.svd(matrix.double())
    # The Gram matrix has twice the digits lost: sqrt(eps) of the largest value is 3e-4, and the three are alike.
    torch.testing.assert_close(values.double(), exact.S[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close((left * values) @ right.T, matrix, rtol=0, atol=1e-5 * float(exact.S[0]))


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_a_loaded_state_off_the_manifold_keeps_its_update(orthonormal: Any) -> None:
    layer = StiefelLoRALinear(make_base(), 4, orthonormal=orthonormal)
    state = {n: torch.randn_like(v) if "lora" in n else v for n, v in layer.state_dict().items()}
    a, b = state["lora_A"], state["lora_B"] @ state.get("lora_S", torch.eye(4, dtype=torch.float64))
    with pytest.warns(UserWarning, match="off the manifold"):
        layer.load_state_dict(state)
    assert all(float(orthogonality_error(p)) < 1e-12 for p in layer.manifold_parameters().values())
    torch.testing.assert_close(layer.delta_weight(), layer.scaling * b @ a.T)


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_a_state_off_the_manifold_is_the_callers_and_keeps_its_digits_under_autocast(orthonormal: Any) -> None:
    layer = StiefelLoRALinear(make_base(dtype=torch.float32), 4, orthonormal=orthonormal)
    state = {n: torch.randn_like(v) if "lora" in n else v for n, v in layer.state_dict().items()}
    before = copy.deepcopy(state)
    expected = copy.deepcopy(layer)
    with pytest.warns(UserWarning, match="off the manifold"):
        expected.load_state_dict(state)
    with pytest.warns(UserWarning, match="off the manifold"), torch.autocast("cpu", torch.bfloat16):
        layer.load_state_dict(state, assign=True)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name
    torch.testing.assert_close(layer.delta_weight(), expected.delta_weight(), rtol=0, atol=0)


def test_one_factor_loaded_off_the_manifold_is_put_on_it() -> None:
    layer = StiefelLoRALinear(make_base(), 4)
    with torch.no_grad():
        layer.lora_B.normal_()
    a, b = torch.randn_like(layer.lora_A), layer.lora_B.detach().clone()
    with pytest.warns(UserWarning, match="off the manifold"):
        layer.load_state_dict({"lora_A": a}, strict=False)
    assert float(orthogonality_error(layer.lora_A)) < 1e-12
    torch.testing.assert_close(layer.delta_weight(), layer.scaling * b @ a.T)


@pytest.mark.parametrize("way", ["swap", "overwrite"])
def test_conversions_in_torchs_other_ways(way: str) -> None:
    layer = StiefelLoRALinear(make_base(dtype=torch.float32), 4)
    point = layer.lora_A
    get = getattr(torch.__future__, f"get_{way}_module_params_on_conversion")
    set_ = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
    set_(True)
    try:
        layer.to(torch.bfloat16).double()
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
        assert get()
    finally:
        set_(False)
    assert layer.lora_A is point and isinstance(point, geoopt.ManifoldParameter) and point.dtype == torch.float64
    assert layer.weight.dtype == torch.float64


def test_layers_over_one_base_are_merged_one_at_a_time() -> None:
    base = nn.Linear(8, 6)
    weight, x = base.weight.detach().clone(), torch.randn(3, 8)
    first, second = StiefelLoRALinear(base, 2), StiefelLoRALinear(base, 2)
    for layer in (first, second):
        nn.init.normal_(layer.lora_B)
    before = second(x)
    first.merge()
    for use in (second.merge, lambda: second(x)):
        with pytest.raises(InputError, match="another adapter over the same linear is merged into it"):
            use()
    first.unmerge()
    assert torch.equal(base.weight, weight)
    assert torch.equal(second(x), before)
    second.merge()
    torch.testing.assert_close(second(x), before)
    second.unmerge()
    with pytest.raises(InputError, match="another adapter over the same linear"):
        merge_adapters(nn.ModuleList([first, second]))
    assert torch.equal(base.weight, weight)
    # What is merged for good is a base as any other.
    plain = merge_adapters(nn.Sequential(first))[0]
    assert plain is base
    StiefelLoRALinear(plain, 2).merge()


def test_a_layer_that_was_merged_in_inference_mode_can_be_differentiated() -> None:
    layer, x = StiefelLoRALinear(nn.Linear(8, 6), 2), torch.randn(3, 8, requires_grad=True)
    with torch.inference_mode():
        layer.merge()
    layer(x).sum().backward()
    assert x.grad is not None
    layer.base.requires_grad_(True)


def test_a_complex_base_is_refused() -> None:
    with pytest.raises(TypeError, match="the base Linear has complex weights; factors are real"):
        StiefelLoRALinear(nn.Linear(8, 6, dtype=torch.complex64), 2)


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_refactoring_keeps_the_update(orthonormal: Any) -> None:
    layer = StiefelLoRALinear(nn.Linear(12, 9), 3, orthonormal=orthonormal)
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.add_(torch.randn_like(factor))
    expected, parameters = layer.delta_weight(), layer.factors()
    with torch.inference_mode():
        layer.refactor()
    assert not any(factor.is_inference() for factor in layer.factors().values())
    torch.testing.assert_close(layer.delta_weight(), expected, rtol=1e-5, atol=1e-5)  # float32 factors
    for name, factor in layer.manifold_parameters().items():
        assert float(orthogonality_error(factor)) < 2e-6
        assert factor is parameters[name] and isinstance(factor, geoopt.ManifoldParameter)


def test_factors_over_a_base_that_was_made_wide_and_narrow_again_are_float32() -> None:
    layer = StiefelLoRALinear(nn.Linear(12, 8), 4).double().half()
    assert (layer.base.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (torch.float16, *[torch.float32] * 2)
    assert isinstance(layer.lora_A, geoopt.ManifoldParameter)
    assert float(orthogonality_error(layer.lora_A)) < 1e-6
