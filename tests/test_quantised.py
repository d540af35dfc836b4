"""Real quantised linears, where their libraries are installed; tests/test_adapters.py has a stand-in for all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from stiefel_lora.adapters import adapter_layers, add_adapters, merge_adapters, remove_adapters
from stiefel_lora.checkpoint import load_adapter, save_adapter
from stiefel_lora.errors import InputError
from stiefel_lora.optim import RiemannianAdam
from tests.models import FAMILIES

# Both libraries warn at import about kernels that this machine lacks.
pytestmark = pytest.mark.filterwarnings("default")

LLAMA = FAMILIES["llama"]


def _torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())


def _bitsandbytes(name: str, **options: object) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        nn_bnb = pytest.importorskip("bitsandbytes").nn
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for child, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear):
                        new = getattr(nn_bnb, name)(linear.in_features, linear.out_features, bias=False, **options)
                        new.load_state_dict(linear.state_dict())
                        setattr(parent, child, new.to("cpu"))

    return quantise


@pytest.mark.parametrize(
    "quantise",
    [
        pytest.param(_torchao, id="torchao-int8"),
        pytest.param(
            _bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.float32), id="bitsandbytes-4bit"
        ),
        pytest.param(_bitsandbytes("Linear8bitLt", has_fp16_weights=False), id="bitsandbytes-8bit"),
    ],
)
def test_life_over_a_quantised_base(quantise: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model, batch = LLAMA.build(), LLAMA.batch(3, 7)
    quantise(model)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits

    base = logits()
    add_adapters(model, layers=[0, 2], rank=4)
    assert torch.equal(logits(), base)
    assert all(layer.lora_A.dtype == torch.float32 for layer in adapter_layers(model).values())
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match="quantised"):
        merge_adapters(model)
    trained = logits()
    save_adapter(model, tmp_path)
    remove_adapters(model)
    assert torch.equal(logits(), base)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(), trained)
