"""Gradient starts against a dense SVD of autograd's gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stiefel_lora.adapters import adapter_layers, add_adapters
from stiefel_lora.errors import InputError
from stiefel_lora.initialisation import gradient_init
from tests.models import FAMILIES
from tests.test_layer import QuantisedLinear


def dense_gradient(family: str, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """The sum of the batches' gradients of one weight, shape (out, in)."""
    model = FAMILIES[family].build().double()
    for batch in batches:
        model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).loss.backward()
    gradient = model.get_submodule(name).weight.grad
    return gradient.T if family == "gpt2" else gradient


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_spans_are_those_of_the_gradient(family: str, orthonormal: Any) -> None:
    model = FAMILIES[family].build().double()
    batches = [FAMILIES[family].batch(2, 7), FAMILIES[family].batch(3, 9)]
    options = {"layers": [1], "rank": 3, "orthonormal": orthonormal}
    starts = gradient_init(model, iter(batches), **options)
    add_adapters(model, **options, init=starts)
    for name, layer in adapter_layers(model).items():
        u, _, vh = torch.linalg.svd(dense_gradient(family, name, batches))
        expected = {"lora_A": vh[:3].T, "lora_B": u[:, :3]}
        for key, factor in layer.manifold_parameters().items():
            # float64; the Gram matrix squares the condition of the leading three values, which is below 1e3.
            projector = expected[key] @ expected[key].T
            torch.testing.assert_close(factor @ factor.T, projector, rtol=0, atol=1e-8)


def test_the_model_comes_back_as_it_was_also_after_an_error() -> None:
    model = FAMILIES["llama"].build().train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if batch is None:
            raise KeyError
        return model(**batch).logits.square().mean()

    batch = FAMILIES["llama"].batch(2, 7)
    gradient_init(model, [batch], layers=[0], rank=2, loss_fn=loss)
    with pytest.raises(KeyError):
        gradient_init(model, [batch, None], layers=[0], rank=2, loss_fn=loss)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]


def test_bad_input() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(2, 7)
    with pytest.raises(InputError, match="no batches"):
        gradient_init(model, [], layers=[0], rank=2)
    with pytest.raises(InputError, match=r"k_proj: rank must be in \[1, 16\], got 17"):
        gradient_init(model, [batch], layers=[0], rank=17)
    with pytest.raises(InputError, match="NaN"):
        gradient_init(model, [batch], layers=[0], rank=2, loss_fn=lambda m, b: m(**b).loss * torch.nan)
    with pytest.raises(InputError, match="orthonormal must be one of"):
        gradient_init(model, [batch], layers=[0], rank=2, orthonormal="C")  # type: ignore[arg-type]
    model.model.layers[0].mlp.up_proj = QuantisedLinear(nn.Linear(32, 56))
    with pytest.raises(InputError, match="quantised"):
        gradient_init(model, [batch], layers=[0], rank=2)
    add_adapters(model, layers=[1], rank=2)
    with pytest.raises(InputError, match="the model has adapters"):
        gradient_init(model, [batch], layers=[1], rank=2)
