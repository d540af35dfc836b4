"""Adapters of models whose blocks are compiled or checkpointed one by one are those of the plain model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from stiefel_lora import _names, checkpoint
from stiefel_lora._names import name_in, plain_name
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import adapter_names, add_adapters, disable_adapters, remove_adapters, use_adapter
from stiefel_lora.checkpoint import load_adapter, read_adapter, save_adapter
from stiefel_lora.convert import export_peft, from_peft, import_peft, to_peft
from stiefel_lora.errors import InputError
from tests.models import FAMILIES
from tests.test_adapters import train

LLAMA = FAMILIES["llama"]
BATCH = LLAMA.batch(2, 7)
# Float32 logits of size up to 12: compiled graphs, and factors that were factored again, add in another order.
SAME = {"rtol": 1e-4, "atol": 1e-4}

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda block: block,
    "compiled": lambda block: torch.compile(block, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "both": lambda block: torch.compile(checkpoint_wrapper(block), backend="eager"),
}
Form = tuple[str, bool]  # of a wrapper, and whether the blocks are in it before the adapters come


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**BATCH, use_cache=False).logits


def wrapped(model: Any, how: str) -> Any:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = WRAPPERS[how](block)
    return model


def trained(how: str, *, first: bool = True) -> Any:
    """Adapt a model in wrapped blocks, with norms inside and outside of them that are trained along."""
    model = LLAMA.build()
    if first:
        wrapped(model, how)
    add_adapters(model, layers=[0, 2], rank=4, rank_pattern={"up_proj": 3})
    if not first:
        wrapped(model, how)
    train(model)
    with torch.no_grad():
        for module in (model.model.norm, model.get_submodule(name_in(model, "model.layers.1.input_layernorm"))):
            module.weight.requires_grad_(True).normal_()
    return model


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return outputs(trained("none"))


def test_names_there_and_back() -> None:
    model = nn.ModuleDict({"a": wrapped(LLAMA.build(), "both")})
    name = "a.model.layers.1._orig_mod._checkpoint_wrapped_module.mlp.up_proj.weight"
    plain = "a.model.layers.1.mlp.up_proj.weight"
    assert plain_name(name) == plain
    assert name_in(model, plain) == name_in(model, name) == name_in(model, plain.replace("1.", "1._orig_mod.")) == name
    assert name_in(model, "a.model.layers.1") == name.removesuffix(".mlp.up_proj.weight")
    assert name_in(model, "no.such.name") == "no.such.name"
    linear = nn.ModuleDict({"up": torch.compile(nn.Linear(2, 2), backend="eager")})
    assert name_in(linear, "up") == "up._orig_mod" and name_in(linear, "up.weight") == "up._orig_mod.weight"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("how", ["compiled", "checkpointed", "both"])
def test_saved_adapters_are_the_plain_models(how: str, first: bool, expected: Tensor, tmp_path: Path) -> None:
    save_adapter(trained(how, first=first), tmp_path / "wrapped")
    save_adapter(trained("none"), tmp_path / "plain")
    for file in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("how", WRAPPERS)
def test_any_file_loads_into_any_model(
    how: str, old: bool, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if old:  # as files were before the names were the plain model's
            patch.setattr(checkpoint, "plain_name", str)
        save_adapter(trained("both"), tmp_path)
    assert ("_orig_mod" in (tmp_path / "adapter.json").read_text()) == old
    assert not any(part in name for part in _names._WRAPPED for name in read_adapter(tmp_path).modules)
    model = wrapped(LLAMA.build(), how)
    names = load_adapter(model, tmp_path)
    assert names == list(adapter_layers(model))
    torch.testing.assert_close(outputs(model), expected, **SAME)
    load_adapter(model, tmp_path)  # into the adapters that are there
    torch.testing.assert_close(outputs(model), expected, **SAME)


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_exports_and_imports(how: str, expected: Tensor, tmp_path: Path) -> None:
    export_peft(trained(how), tmp_path / "wrapped")
    export_peft(trained("none"), tmp_path / "plain")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    served = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "wrapped")
    torch.testing.assert_close(outputs(served), expected, **SAME)
    model = wrapped(LLAMA.build(), how)
    import_peft(model, tmp_path / "plain")
    torch.testing.assert_close(outputs(model), expected, **SAME)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("how", ["compiled", "checkpointed", "both"])
def test_blocks_may_be_wrapped_once_the_adapters_are_in(how: str, loaded: bool, tmp_path: Path) -> None:
    """Parameters in the blocks that are trained along, or are to train again, are found by their new names."""
    model = LLAMA.build()
    base = outputs(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    if loaded:
        save_adapter(trained("none"), tmp_path)
        load_adapter(model, tmp_path)
    else:
        add_adapters(model, layers=[0], rank=2)
        train(model)
        model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    expected = outputs(model)
    add_adapters(model, layers=[1], rank=2, name="second")
    wrapped(model, how)
    use_adapter(model, "default")
    torch.testing.assert_close(outputs(model), expected, **SAME)
    assert model.get_parameter(name_in(model, "model.layers.1.input_layernorm.weight")).requires_grad
    with disable_adapters(model):
        torch.testing.assert_close(outputs(model), base, **SAME)
    remove_adapters(model, "default")
    torch.testing.assert_close(outputs(model), base, **SAME)
    remove_adapters(model)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_models_in_memory(tmp_path: Path) -> None:
    model = wrapped(LLAMA.build(), "compiled")
    add_adapters(model, layers=[0, 2], rank=4, rank_pattern={"up_proj": 3})
    train(model)
    expected = outputs(model)
    back = to_peft(model)
    torch.testing.assert_close(outputs(back), expected, **SAME)
    back.save_pretrained(tmp_path)
    plain = LLAMA.build()
    import_peft(plain, tmp_path)
    torch.testing.assert_close(outputs(plain), expected, **SAME)
    model = from_peft(back, name="mine")
    assert adapter_names(model) == ["mine"]
    torch.testing.assert_close(outputs(model), expected, **SAME)
    # PEFT 0.21 names what it loads with the wrapper's component, which torch adds to it once more.
    checkpointed = trained("checkpointed")
    with pytest.raises(InputError, match="inside checkpoint wrappers; unwrap the blocks or use export_peft"):
        to_peft(checkpointed)
    assert len(adapter_layers(checkpointed)) == 10
