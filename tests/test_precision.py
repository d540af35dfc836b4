"""Products that keep a point orthonormal have full precision, whatever a training script allows for its model's."""

from collections.abc import Callable, Iterator

import geoopt
import pytest
import torch
from torch import Tensor, nn

from stiefel_lora import StiefelLoRALinear, _precision, stiefel
from stiefel_lora._precision import exact_products
from stiefel_lora.factors import leading_singular_vectors
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD

SWITCHES = {"cuda": torch.backends.cuda.matmul, "mkldnn": getattr(torch.backends.mkldnn, "matmul", None)}
needs_switches = pytest.mark.skipif(
    not hasattr(SWITCHES["mkldnn"], "fp32_precision"), reason="this torch has no precision switch for each backend"
)


def settings() -> dict[str, str]:
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "refused"
    return {"old": old, **{name: getattr(switch, "fp32_precision", "") for name, switch in SWITCHES.items()}}


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Give a function that allows reduced precision in one of the ways there are; all is undone afterwards."""

    def allow(way: str) -> None:
        if way in ("high", "medium"):
            torch.set_float32_matmul_precision(way)
        elif way == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        elif way == "all backends":
            torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
        else:
            SWITCHES[way].fp32_precision = "tf32"  # type: ignore[union-attr]

    yield allow
    if hasattr(SWITCHES["mkldnn"], "fp32_precision"):
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
        for switch in SWITCHES.values():
            switch.fp32_precision = "none"  # type: ignore[union-attr]
    torch.set_float32_matmul_precision("highest")


WAYS = [
    "high",
    "medium",
    "allow_tf32",
    *(pytest.param(way, marks=needs_switches) for way in ("all backends", "cuda", "mkldnn")),
]


def test_singular_vectors_are_exact_under_autocast() -> None:
    matrix = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    expected = leading_singular_vectors(matrix, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = leading_singular_vectors(matrix, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_precision_is_full_inside_and_what_it_was_outside(way: str, precision: Callable[[str], None]) -> None:
    precision(way)
    before = settings()
    with exact_products(["cpu"]):
        inside = settings()
    assert before == settings()
    assert "tf32" not in inside.values()
    assert "bf16" not in inside.values()
    assert inside["old"] == "highest"
    with pytest.raises(KeyError), exact_products(["cpu"]):
        raise KeyError
    assert before == settings()


@pytest.mark.parametrize("way", ["high", "medium"])
def test_the_older_switch_alone(way: str, precision: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """As before torch 2.9, which had no other."""
    monkeypatch.setattr(_precision, "_SWITCHES", ())
    precision(way)
    with exact_products(["cpu"]):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == way


@needs_switches
def test_a_switch_that_followed_another_follows_it_again(precision: Callable[[str], None]) -> None:
    precision("all backends")
    with exact_products(["cpu"]):
        pass
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert {switch.fp32_precision for switch in SWITCHES.values()} == {"ieee"}  # type: ignore[union-attr]


def steps(kind: type[torch.optim.Optimizer], count: int) -> list[geoopt.ManifoldParameter]:
    generator = torch.Generator().manual_seed(0)
    points = [stiefel.random_point(576, 16, generator=generator) for _ in range(count)]
    params = [geoopt.ManifoldParameter(x, manifold=geoopt.EuclideanStiefel()) for x in points]
    optimizer = kind(params, lr=0.01)  # type: ignore[call-arg]
    for _ in range(20):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", [RiemannianAdam, RiemannianSGD])
@pytest.mark.parametrize("way", ["medium", "autocast"])
def test_steps_are_the_same(
    way: str, kind: type[torch.optim.Optimizer], count: int, precision: Callable[[str], None]
) -> None:
    """Where the processor has no products in reduced precision, "medium" changes nothing; autocast does everywhere."""
    expected = steps(kind, count)
    if way == "medium":
        precision(way)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = steps(kind, count)
    for p, q in zip(expected, found, strict=True):
        assert torch.equal(p.detach(), q.detach())


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "project": stiefel.project,
    "canonical": lambda x, g: stiefel.riemannian_gradient(x, g, "canonical"),
    "project_point": lambda x, g: stiefel.project_point(g),
    "orthogonality_error": lambda x, g: stiefel.orthogonality_error(x),
    **{
        name: lambda x, g, name=name: stiefel.retract(x, stiefel.project(x, g), name)  # type: ignore[misc]
        for name in stiefel.RETRACTIONS
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", ["medium", "autocast"])
def test_geometry_is_the_same(way: str, name: str, precision: Callable[[str], None]) -> None:
    x, g = stiefel.random_point(96, 8), torch.randn(96, 8) / 10
    expected = FUNCTIONS[name](x, g)
    if way == "medium":
        precision(way)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        assert torch.equal(FUNCTIONS[name](x, g), expected)


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_the_update_to_merge_is_the_same(orthonormal: str) -> None:
    layer = StiefelLoRALinear(nn.Linear(32, 24), 4, orthonormal=orthonormal)  # type: ignore[arg-type]
    nn.init.normal_(getattr(layer, {"A": "lora_B", "B": "lora_A", "both": "lora_S"}[orthonormal]))
    expected = layer.delta_weight()
    assert expected.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta_weight(), expected)
