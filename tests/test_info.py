"""What an adapter folder is said to hold."""

from pathlib import Path

import peft
import pytest

from stiefel_lora.adapted import adapter_layers, adapter_metrics
from stiefel_lora.checkpoint import save_adapter
from stiefel_lora.convert import export_peft
from stiefel_lora.errors import InputError
from stiefel_lora.info import adapter_info
from tests.models import FAMILIES
from tests.test_convert import adapted

# PEFT 0.21 asks transformers 5.23 for names that the next major version drops.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


@pytest.mark.parametrize("form", ["ours", "peft"])
def test_modules_and_totals(form: str, tmp_path: Path) -> None:
    model = adapted(orthonormal="B", rslora=True, alpha=3, rank_pattern={"k_proj": 2})
    (save_adapter if form == "ours" else export_peft)(model, tmp_path)
    info = adapter_info(tmp_path)
    layers, metrics = adapter_layers(model), adapter_metrics(model)
    names = [module.name for module in info.modules]
    assert names == list(layers) if form == "ours" else set(names) == set(layers)
    assert info.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for module in info.modules:
        layer = layers[module.name]
        assert (module.shape, module.rank) == ((layer.out_features, layer.in_features), layer.rank)
        assert module.scaling == pytest.approx(layer.scaling)
        # The singular values of the update, from factors that were rounded to float32 twice.
        assert module.effective_rank == pytest.approx(metrics[module.name]["effective_rank"], rel=1e-5)
        if form == "ours":
            assert module.orthonormal == "B"
            assert module.orthogonality_error == metrics[module.name]["orthogonality_error"]
        else:
            assert module.orthonormal is module.orthogonality_error is None
    lines = info.table().splitlines()
    kind, base = ("stiefel_lora", "LlamaForCausalLM") if form == "ours" else ("PEFT LoRA", "an unnamed model")
    assert lines[0] == f"{kind} adapter for {base}: 10 linears, {info.parameters:,} parameters"
    assert len(lines) == 12
    assert all(module.name in line for module, line in zip(info.modules, lines[2:], strict=True))


def test_other_parameters_and_an_untrained_lora(tmp_path: Path) -> None:
    model = adapted("vit")
    model.classifier.requires_grad_(True)
    save_adapter(model, tmp_path / "head")
    info = adapter_info(tmp_path / "head")
    assert info.others == {"classifier.weight": (5, 32), "classifier.bias": (5,)}
    assert info.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert info.table().splitlines()[-2] == "classifier.weight  [5, 32], trained whole"
    fresh = peft.get_peft_model(FAMILIES["llama"].build(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    fresh.save_pretrained(tmp_path / "peft")
    assert {module.effective_rank for module in adapter_info(tmp_path / "peft").modules} == {0.0}


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither adapter.json nor adapter_config.json"):
        adapter_info(tmp_path)
