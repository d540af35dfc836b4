"""One life of an adapter on the real class of each family: select, adapt, train, save, load, export, import, merge."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from stiefel_lora.adapted import adapter_layers, adapter_metrics
from stiefel_lora.adapters import add_adapters, remove_adapters
from stiefel_lora.checkpoint import load_adapter, save_adapter
from stiefel_lora.convert import export_peft, import_peft
from stiefel_lora.fisher import fisher_select
from stiefel_lora.initialisation import gradient_init
from stiefel_lora.merging import merge_adapters
from stiefel_lora.optim import RiemannianAdam
from tests.models import FAMILIES, OLD_VIT

# PEFT 0.21 asks transformers 5.23 for names that the next major version drops.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": LLAMA_LIKE,
    "llama-tied": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3": LLAMA_LIKE,
    "phi": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "gpt-neox": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
    "bert": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "roberta": ["query", "key", "value", "intermediate.dense", "output.dense"],
    "vit": ["query", "key", "value", "intermediate.dense", "output.dense"]
    if OLD_VIT
    else ["q_proj", "k_proj", "v_proj", "fc1", "fc2"],
}

# Float32 logits of size up to 10 through three layers that were factored or merged in another order.
SAME = {"rtol": 1e-4, "atol": 1e-4}


def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def reloaded(model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    return getattr(transformers, type(model).__name__).from_pretrained(path)


@pytest.mark.parametrize("family", TARGETS)
def test_life_of_an_adapter(family: str, tmp_path: Path) -> None:
    build, batch = FAMILIES[family].build, FAMILIES[family].batch(3, 7)
    model = build()
    base = outputs(model, batch)
    layers = fisher_select(model, [batch], budget=2, progress=False)
    assert len(layers) == 2
    names = add_adapters(model, layers=layers, rank=4)
    assert all(any(name.endswith(f".{t}") for t in TARGETS[family]) for name in names)
    assert all(sum(name.endswith(f".{t}") for name in names) >= 2 for t in TARGETS[family])
    assert torch.equal(outputs(model, batch), base)

    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # QR in float32; geoopt's own bar for membership.
    assert all(m["orthogonality_error"] < 1e-5 for m in adapter_metrics(model).values())
    trained = outputs(model, batch)
    assert not torch.allclose(trained, base)

    save_adapter(model, tmp_path / "ours")
    loaded = build()
    assert load_adapter(loaded, tmp_path / "ours") == names
    assert torch.equal(outputs(loaded, batch), trained)
    assert torch.equal(outputs(remove_adapters(loaded), batch), base)

    export_peft(model, tmp_path / "peft")
    torch.testing.assert_close(
        outputs(peft.PeftModel.from_pretrained(build(), tmp_path / "peft"), batch), trained, **SAME
    )
    imported = build()
    assert import_peft(imported, tmp_path / "peft") == names
    torch.testing.assert_close(outputs(imported, batch), trained, **SAME)

    merged = merge_adapters(model)
    assert not adapter_layers(merged)
    torch.testing.assert_close(outputs(merged, batch), trained, **SAME)
    torch.testing.assert_close(outputs(reloaded(merged, tmp_path / "merged"), batch), trained, **SAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["random", "svd", "gradient"])
@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_every_form_trains(orthonormal: Any, start: str, dtype: torch.dtype) -> None:
    model, batch = FAMILIES["llama"].build().to(dtype), FAMILIES["llama"].batch(3, 7)
    options: dict[str, Any] = {"layers": [0, 2], "rank": 4, "orthonormal": orthonormal}
    init: Any = gradient_init(model, [batch], **options) if start == "gradient" else start
    add_adapters(model, **options, init=init)
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {id(f): f.detach().clone() for layer in adapter_layers(model).values() for f in layer.factors().values()}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for layer in adapter_layers(model).values():
        assert all(not torch.equal(f, before[id(f)]) for f in layer.factors().values())
        assert all(f.dtype == torch.float32 for f in layer.factors().values())
    assert all(m["orthogonality_error"] < 1e-5 for m in adapter_metrics(model).values())
