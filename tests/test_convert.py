"""Against the real PEFT library: what we write it reads, what it writes we read, with the same function."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import adapter_names, add_adapters, insert_adapters, remove_adapters
from stiefel_lora.checkpoint import load_adapter, read_adapter, save_adapter, write_adapter
from stiefel_lora.convert import (
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILE,
    export_peft,
    from_peft,
    import_peft,
    read_peft,
    to_peft,
    write_peft,
)
from stiefel_lora.errors import InputError
from stiefel_lora.factors import orthonormal_factors
from stiefel_lora.merging import merge_adapters
from stiefel_lora.stiefel import orthogonality_error
from tests.models import DECODER, FAMILIES, OLD_VIT
from tests.test_adapters import logits, train

pytestmark = [
    # PEFT 0.21 asks transformers 5.23 for names that the next major version drops.
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    # PEFT 0.18 on every head of a model whose configuration ties it.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

LLAMA = FAMILIES["llama"]

# The bar for the same logits in float32; logits are of size 1 here.
SAME = {"rtol": 1e-5, "atol": 1e-5}


def adapted(family: str = "llama", **options: Any) -> nn.Module:
    model = FAMILIES[family].build()
    add_adapters(model, **{"layers": [0, 2], "rank": 4, **options})
    train(model)
    return model


def outputs(model: nn.Module, family: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].batch(2, 7)).logits


def peft_layers(model: nn.Module) -> dict[str, Any]:
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear))
    return {n.removeprefix("base_model.model."): m for n, m in found}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / PEFT_CONFIG_FILE).read_text())


EXPORTS: dict[str, dict[str, Any]] = {
    "default": {},
    "B": {"orthonormal": "B"},
    "both": {"orthonormal": "both"},
    "rslora": {"rslora": True, "alpha": 3},
    "rslora, ranks": {"rslora": True, "rank_pattern": {"q_proj": 2}},
    "ranks": {"alpha": 5, "rank_pattern": {"q_proj": 2, "layers.2.mlp.up_proj": 7}},
    "all": {"layers": None, "target_modules": "all-linear"},
    "full names": {"layers": None, "target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
}


@pytest.mark.parametrize("case", EXPORTS)
def test_peft_loads_what_we_export(case: str, tmp_path: Path) -> None:
    model = adapted(**EXPORTS[case])
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert isinstance(loaded, peft.PeftModelForCausalLM)
    got = [
        n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    ]
    assert got == list(adapter_layers(model))
    expected = outputs(model)
    torch.testing.assert_close(outputs(loaded), expected, **SAME)
    torch.testing.assert_close(outputs(loaded.merge_and_unload()), expected, **SAME)
    torch.testing.assert_close(outputs(merge_adapters(model)), expected, **SAME)


def test_layers_are_named_shortly_where_that_is_exact(tmp_path: Path) -> None:
    def described(**options: Any) -> tuple[Any, ...]:
        export_peft(adapted(**options), tmp_path)
        config = config_of(tmp_path)
        return config["target_modules"], config["layers_to_transform"], config["layers_pattern"]

    short = ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert described() == (short, [0, 2], "layers")
    assert described(layers=None) == (short, None, None)
    assert described(family="gpt2", target_modules=["mlp.c_proj"]) == (["mlp.c_proj"], [0, 2], "h")
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert described(layers=None, target_modules=names) == (names, None, None)


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "phi", "gemma3"])
def test_export_and_import_of_other_families(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path)
    torch.testing.assert_close(outputs(loaded, family), outputs(model, family), **SAME)
    back = FAMILIES[family].build()
    assert import_peft(back, tmp_path) == list(adapter_layers(model))
    torch.testing.assert_close(outputs(back, family), outputs(model, family), **SAME)


def _peft_model(**options: Any) -> peft.PeftModel:
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(LLAMA.build(), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(6)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


IMPORTS: dict[str, dict[str, Any]] = {
    "default": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 7}},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers", "lora_dropout": 0.25},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rank above a width": {"r": 40, "target_modules": ["k_proj", "up_proj"]},
    "rank above a width, rslora": {"r": 40, "use_rslora": True, "target_modules": ["k_proj", "v_proj"]},
    "head": {"target_modules": ["lm_head"]},
}


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
@pytest.mark.parametrize("case", IMPORTS)
def test_we_load_what_peft_saves(case: str, orthonormal: Any, tmp_path: Path) -> None:
    source = _peft_model(**IMPORTS[case])
    source.save_pretrained(tmp_path, save_embedding_layers=False)
    model = LLAMA.build()
    names = import_peft(model, tmp_path, orthonormal=orthonormal)
    assert names == list(peft_layers(source))
    torch.testing.assert_close(outputs(model), outputs(source), **SAME)
    for name, layer in adapter_layers(model).items():
        update = peft_layers(source)[name].get_delta_weight("default")
        # Entries of the update are up to 30; float32 factors of a float64 factorisation.
        torch.testing.assert_close(layer.delta_weight(), update, rtol=1e-5, atol=1e-5)
        assert all(orthogonality_error(factor) < 1e-5 for factor in layer.manifold_parameters().values())
        assert layer.rank <= min(layer.in_features, layer.out_features)
        assert layer.options["dropout"] == IMPORTS[case].get("lora_dropout", 0.0)
        assert layer.orthonormal == orthonormal


def test_round_trip_keeps_scaling_options(tmp_path: Path) -> None:
    _peft_model(use_rslora=True).save_pretrained(tmp_path / "a")
    model = LLAMA.build()
    import_peft(model, tmp_path / "a")
    export_peft(model, tmp_path / "b")
    before, after = config_of(tmp_path / "a"), config_of(tmp_path / "b")
    for key in (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_dropout",
        "layers_to_transform",
    ):
        assert before[key] == after[key], key
    assert sorted(before["target_modules"]) == after["target_modules"]


def test_import_into_a_trained_adapters_place(tmp_path: Path) -> None:
    _peft_model().save_pretrained(tmp_path)
    model = adapted()
    with pytest.raises(InputError, match="other adapters in use"):
        import_peft(model, tmp_path)
    import_peft(model, tmp_path, name="second")
    torch.testing.assert_close(outputs(model), outputs(_peft_model()), **SAME)


def test_models_in_memory() -> None:
    source = _peft_model()
    expected = outputs(source)
    for peft_model in (source, source.get_base_model()):  # as transformers' load_adapter makes the latter
        copy = LLAMA.build()
        import_peft(copy, peft_model)
        torch.testing.assert_close(outputs(copy), expected, **SAME)
    model = from_peft(source, orthonormal="B")
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())
    torch.testing.assert_close(outputs(model), expected, **SAME)
    back = to_peft(model)
    assert isinstance(back, peft.PeftModelForCausalLM)
    assert not adapter_layers(back)
    assert all(p.requires_grad == ("lora_" in name) for name, p in back.named_parameters())
    torch.testing.assert_close(outputs(back), expected, **SAME)
    with pytest.raises(InputError, match="no PEFT adapter is named 'x'; there are: default"):
        from_peft(back, adapter_name="x")


def test_the_adapter_in_use_is_taken() -> None:
    source = _peft_model()
    first = outputs(source)
    source.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    source.set_adapter("second")
    second = outputs(source)
    for name, expected in ((None, second), ("default", first)):
        copy = LLAMA.build()
        import_peft(copy, source, adapter_name=name)
        torch.testing.assert_close(outputs(copy), expected, **SAME)
    source.base_model.set_adapter(["default", "second"])
    with pytest.raises(InputError, match="has 2 adapters in use, default, second; give adapter_name"):
        from_peft(source)
    source.set_adapter("second")
    torch.testing.assert_close(outputs(from_peft(source)), second, **SAME)


def test_other_sets_are_not_lost_to_peft() -> None:
    model = adapted()
    add_adapters(model, layers=[1], rank=2, name="second")
    with pytest.raises(InputError, match=r"the model holds other adapters \(default\); remove them first"):
        to_peft(model)
    remove_adapters(model, "default")
    expected = outputs(model)
    torch.testing.assert_close(outputs(to_peft(model)), expected, **SAME)


def test_an_adapter_that_peft_refuses_stays_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = peft.get_peft_model

    def refuse(*args: Any) -> None:
        wrap(*args)
        raise ValueError("incompatible")  # after it has wrapped some linears, as one by one

    monkeypatch.setattr(peft, "get_peft_model", refuse)
    model = LLAMA.build()
    add_adapters(model, layers=[1], rank=4, name="mine")
    train(model)
    expected = outputs(model)
    with pytest.raises(ValueError, match="incompatible"):
        to_peft(model)
    assert adapter_names(model) == ["mine"]
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules())
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    assert torch.equal(outputs(model), expected)


def test_a_mixture_of_experts_in_memory() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=97, **sizes, **heads)).eval()
    add_adapters(model, layers=None, rank=4, target_modules=["q_proj", "v_proj"])
    train(model)
    expected = outputs(model)
    source = to_peft(model)
    assert source.peft_config["default"].target_parameters in (None, set())  # PEFT itself fills it in for such models
    torch.testing.assert_close(outputs(source), expected, **SAME)
    torch.testing.assert_close(outputs(from_peft(source)), expected, **SAME)


def dense_layer_of_a_mixture() -> nn.Module:
    """Return a mixture with adapters on a dense layer, whose linear maps are named as parts of the others' experts."""
    experts: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**DECODER, **experts, mlp_only_layers=[0])
    model = Qwen3MoeForCausalLM(config).eval()
    add_adapters(model, layers=None, rank=2, target_modules=["q_proj", "up_proj"])
    train(model)
    return model


def test_linears_that_peft_takes_for_fused_experts_are_refused(tmp_path: Path) -> None:
    model = dense_layer_of_a_mixture()
    before = logits(model)
    for convert in (to_peft, lambda model: export_peft(model, tmp_path / "peft")):
        with pytest.raises(InputError, match="would be lost: model.layers.0.mlp.up_proj; keep them with save_adapter"):
            convert(model)
    assert not (tmp_path / "peft").exists()
    assert torch.equal(logits(model), before)
    # What is not named like them is taken.
    remove_adapters(model)
    add_adapters(model, layers=None, rank=2, target_modules=["q_proj"])
    train(model)
    before = logits(model)
    torch.testing.assert_close(logits(to_peft(model).eval()), before, atol=1e-6, rtol=1e-5)


def test_conversion_without_a_model(tmp_path: Path) -> None:
    source = _peft_model()
    source.save_pretrained(tmp_path / "peft")
    write_adapter(read_peft(tmp_path / "peft"), tmp_path / "ours")
    model = LLAMA.build()
    load_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(outputs(model), outputs(source), **SAME)
    write_peft(read_peft(tmp_path / "ours" / ".." / "peft"), tmp_path / "again")
    again = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "again")
    torch.testing.assert_close(outputs(again), outputs(source), **SAME)


def test_layers_are_read_in_numerical_order(tmp_path: Path) -> None:
    _peft_model(target_modules=["q_proj"]).save_pretrained(tmp_path)
    tensors = {
        name.replace("layers.2.", "layers.10."): t for name, t in load_file(tmp_path / PEFT_WEIGHTS_FILE).items()
    }
    save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / PEFT_WEIGHTS_FILE)
    names = list(read_peft(tmp_path).modules)
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1, 10)]
    with pytest.raises(TypeError, match="a folder or a PeftModel, got int"):
        read_peft(3)  # type: ignore[arg-type]


def test_an_untrained_adapter_of_bf16_factors(tmp_path: Path) -> None:
    source = peft.get_peft_model(LLAMA.build(), peft.LoraConfig(r=4, target_modules=["q_proj"])).to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    for orthonormal in ("A", "B", "both"):
        model = LLAMA.build()
        import_peft(model, tmp_path, orthonormal=orthonormal)
        assert torch.equal(outputs(model), outputs(LLAMA.build()))


def test_a_trained_head_becomes_a_module_to_save(tmp_path: Path) -> None:
    model = adapted("vit")
    model.classifier.requires_grad_(True)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    export_peft(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier"]
    loaded = peft.PeftModel.from_pretrained(FAMILIES["vit"].build(), tmp_path)
    torch.testing.assert_close(outputs(loaded, "vit"), outputs(model, "vit"), **SAME)
    torch.testing.assert_close(outputs(loaded.merge_and_unload(), "vit"), outputs(model, "vit"), **SAME)
    model.classifier.bias.requires_grad_(False)
    with pytest.raises(InputError, match="PEFT saves modules whole: classifier.bias was not trained"):
        export_peft(model, tmp_path)


def test_a_trained_embedding_that_is_tied_to_the_head_is_exported_as_both(tmp_path: Path) -> None:
    model = adapted("llama-tied")
    model.model.embed_tokens.weight.requires_grad_(True)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    expected = outputs(model, "llama-tied")
    export_peft(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on saving modules that were tied
        loaded = peft.PeftModel.from_pretrained(FAMILIES["llama-tied"].build(), tmp_path)
        torch.testing.assert_close(outputs(loaded, "llama-tied"), expected, **SAME)
        torch.testing.assert_close(outputs(to_peft(model), "llama-tied"), expected, **SAME)
    imported = FAMILIES["llama-tied"].build()
    import_peft(imported, tmp_path)
    torch.testing.assert_close(outputs(imported, "llama-tied"), expected, **SAME)
    assert imported.lm_head.weight is imported.model.embed_tokens.weight
    # And without a model: from folder to folder.
    save_adapter(imported, tmp_path / "ours")
    write_peft(read_adapter(tmp_path / "ours"), tmp_path / "peft")
    write_adapter(read_peft(tmp_path / "peft"), tmp_path / "back")
    back = FAMILIES["llama-tied"].build()
    load_adapter(back, tmp_path / "back")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        loaded = peft.PeftModel.from_pretrained(FAMILIES["llama-tied"].build(), tmp_path / "peft")
    for other in (loaded, back):
        torch.testing.assert_close(outputs(other, "llama-tied"), expected, **SAME)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_module_that_peft_untied_is_refused_over_a_tied_base(modules: list[str]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on saving modules that were tied
        source = peft.get_peft_model(FAMILIES["llama-tied"].build(), config).eval()
    for name, parameter in source.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    expected = outputs(source, "llama-tied")
    model = FAMILIES["llama-tied"].build()
    with pytest.raises(InputError, match="has model.embed_tokens.weight, lm_head.weight apart, .* untie them first"):
        import_peft(model, source)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    import_peft(model, source)
    torch.testing.assert_close(outputs(model, "llama-tied"), expected, **SAME)


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("roberta", ["query", "output.dense"], {"task_type": "SEQ_CLS"}),  # PEFT adds the head by itself
        ("vit", ["query" if OLD_VIT else "q_proj"], {"modules_to_save": ["classifier"]}),
        ("llama", ["q_proj"], {"modules_to_save": ["lm_head", "norm"]}),  # "norm" is the end of every norm's name
    ],
)
def test_modules_that_peft_saved_whole(
    family: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    base = FAMILIES[family].build()
    source = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, **options)).eval()
    torch.manual_seed(6)
    for p in source.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    expected = outputs(source, family)
    source.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    model = FAMILIES[family].build()
    import_peft(model, tmp_path / "peft")
    torch.testing.assert_close(outputs(model, family), expected, **SAME)
    # Trained parameters go the same ways as before: into our folder, out to PEFT, and with a PeftModel in memory.
    save_adapter(model, tmp_path / "ours")
    loaded = FAMILIES[family].build()
    load_adapter(loaded, tmp_path / "ours")
    assert torch.equal(outputs(loaded, family), outputs(model, family))
    export_peft(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path / "again")
    torch.testing.assert_close(outputs(again, family), expected, **SAME)
    model = from_peft(source)
    torch.testing.assert_close(outputs(model, family), expected, **SAME)
    assert torch.equal(outputs(remove_adapters(model), family), outputs(FAMILIES[family].build(), family))


def test_a_peft_model_that_cannot_be_converted_is_left_as_it_was() -> None:
    family = FAMILIES["transformer-encoder"]
    config = peft.LoraConfig(
        r=2, target_modules=["linear1", "out_proj"], modules_to_save=["norm2"], init_lora_weights=False
    )
    source = peft.get_peft_model(family.build(), config)
    for name, parameter in source.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    with pytest.raises(InputError, match="no linear net.layers.0.self_attn.out_proj"):
        from_peft(source)
    after = source.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_merged_peft_model_is_refused_in_place() -> None:
    source = _peft_model()
    expected = outputs(source)
    source.merge_adapter()
    with pytest.raises(InputError, match="PeftModel is merged, .* unmerge_adapter"):
        from_peft(source)
    source.unmerge_adapter()
    torch.testing.assert_close(outputs(from_peft(source)), expected, **SAME)


@pytest.mark.parametrize("shape", [(12, 9, 4), (9, 12, 4), (3, 9, 5), (9, 3, 5), (3, 4, 9)])
@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_orthonormal_factors_keep_the_product(shape: tuple[int, int, int], orthonormal: Any) -> None:
    n_in, n_out, rank = shape
    a, b = torch.randn(n_in, rank), torch.randn(n_out, rank)
    factors = orthonormal_factors(a, b, orthonormal)
    k = min(shape)
    middle = factors.get("lora_S", torch.eye(k))
    assert factors["lora_A"].shape == (n_in, k) and factors["lora_B"].shape == (n_out, k)
    product = factors["lora_B"].double() @ middle.double() @ factors["lora_A"].double().T
    # Three float32 roundings of factors whose product has entries of size 10.
    torch.testing.assert_close(product, b.double() @ a.double().T, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """A linear whose name ends those of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(16, 16)}) for _ in range(3)])
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block["proj"](x))
        return self.proj(x)


@pytest.mark.parametrize("others", [{"blocks.0.proj": {"rank": 2}, "blocks.2.proj": {"rank": 2}}, {}])
@pytest.mark.parametrize("own", [{"rank": 2, "alpha": 16.0}, {"rank": 4}])
def test_a_name_that_ends_another_one_keeps_its_own_options(own: Any, others: Any, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(5, 16)
    insert_adapters(model, {**others, "proj": own})
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    export_peft(model, tmp_path)
    imported = Net()
    assert import_peft(imported, tmp_path) == list(adapter_layers(model))
    for other in (imported, peft.PeftModel.from_pretrained(Net(), tmp_path)):
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", ["proj", "in_proj"])
def test_a_trained_module_whose_name_ends_others_is_refused(adapted: str, tmp_path: Path) -> None:
    """PEFT would take those for modules that it saved, and miss them in the file or leave them without an adapter."""
    model, x = Net(), torch.randn(5, 16)
    for block in model.blocks:
        block[adapted] = block.pop("proj")
    add_adapters(model, layers=None, rank=2, target_modules=[adapted])
    train(model)
    model.proj.requires_grad_(True)
    expected = model(x) if adapted == "proj" else None
    refused = rf"PEFT cannot save proj apart from blocks.0.{adapted}, whose name ends alike; freeze it"
    for convert in (lambda m: export_peft(m, tmp_path / "peft"), to_peft):
        with pytest.raises(InputError, match=refused):
            convert(model)
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(InputError, match=refused):
        write_peft(read_adapter(tmp_path / "ours"), tmp_path / "peft")
    assert not (tmp_path / "peft").exists() and len(adapter_layers(model)) == 3
    assert expected is None or torch.equal(model(x), expected)


class Deeper(Net):
    """Has linears of other names as well."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block["out"] = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block["out"](block["proj"](x)))
        return self.proj(x)


def test_modules_whose_names_end_alike_are_saved_together(tmp_path: Path) -> None:
    model, x = Deeper(), torch.randn(5, 16)
    add_adapters(model, layers=None, rank=2, target_modules=["out"])
    train(model)
    for module in (model.proj, *(block["proj"] for block in model.blocks)):
        nn.init.normal_(module.requires_grad_(True).weight)
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Deeper(), tmp_path)
    # Numbers of size 4 that are sums of 16 products of such.
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = config_of(folder)
        change(config)
        (folder / PEFT_CONFIG_FILE).write_text(json.dumps(config))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / PEFT_WEIGHTS_FILE).items()}
        change(tensors)
        save_file(tensors, folder / PEFT_WEIGHTS_FILE)

    return damage


def _also_saved(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        _edit(lambda c: c.update(modules_to_save=["lm_head"]))(folder)
        _tensors(lambda t: t.update(tensors))(folder)

    return damage


def _to_pickle(folder: Path) -> None:
    (folder / PEFT_WEIGHTS_FILE).rename(folder / "adapter_model.bin")


K = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (_edit(lambda c: c.update(use_dora=True)), "use_dora=True cannot be imported"),
    "bias": (_edit(lambda c: c.update(bias="all")), "bias='all' cannot"),
    "lora_bias": (_edit(lambda c: c.update(lora_bias=True)), "lora_bias=True cannot"),
    "modules_to_save": (
        _also_saved({"base_model.model.lm_head.weight": torch.full((97, 32), torch.nan)}),
        "lm_head.weight has NaN",
    ),
    "modules_to_save of another shape": (
        _also_saved({"base_model.model.lm_head.weight": torch.ones(98, 32)}),
        r"it has lm_head.weight of shape \(98, 32\), here \(97, 32\)",
    ),
    "layer_replication": (_edit(lambda c: c.update(layer_replication=[[0, 2]])), "layer_replication=.* cannot"),
    "an option to come": (_edit(lambda c: c.update(use_xlora=3)), "use_xlora=3 cannot"),
    "pissa": (
        _edit(lambda c: c.update(init_lora_weights="pissa")),
        "='pissa', which changed the base",
    ),
    "IA3": (_edit(lambda c: c.update(peft_type="IA3")), "of type 'IA3'; only LORA"),
    "an infinite alpha": (_edit(lambda c: c.update(lora_alpha=math.inf)), "damaged: lora_alpha is 'inf'"),
    "alphas": (
        _edit(lambda c: c.update(alpha_pattern={"q_proj": "4"})),
        "damaged: alpha_pattern is \"{'q_proj': '4'}\"",
    ),
    "a truth as alpha": (_edit(lambda c: c.update(alpha_pattern={"q_proj": True})), "damaged: alpha_pattern is"),
    "a huge alpha": (_edit(lambda c: c.update(lora_alpha=10**400)), "damaged: lora_alpha is '1000"),
    "another rank": (_edit(lambda c: c.update(r=8)), "has rank 4 in the weights, 8 in the configuration"),
    "another pattern": (
        _edit(lambda c: c.update(rank_pattern={"q_proj": 3})),
        "4 in the weights, 3 in the configuration",
    ),
    "rslora in words": (_edit(lambda c: c.update(use_rslora="false")), "damaged: use_rslora is 'false'"),
    "dropout in words": (_edit(lambda c: c.update(lora_dropout="high")), "damaged: lora_dropout is 'high'"),
    "two bases": (_edit(lambda c: c.update(base_model_name_or_path=["a"])), "damaged: base_model_name_or_path is"),
    "whole numbers": (
        _tensors(lambda t: t.update({f"{K}.lora_A.weight": t[f"{K}.lora_A.weight"].to(torch.int8)})),
        "lora_A.weight is torch.int8; factors are of 16 bits",
    ),
    "float8": (
        _tensors(lambda t: t.update({f"{K}.lora_A.weight": t[f"{K}.lora_A.weight"].to(torch.float8_e4m3fn)})),
        "lora_A.weight is torch.float8_e4m3fn; factors are of 16 bits",
    ),
    "no pattern": (
        _edit(lambda c: c.update(alpha_pattern={"(": 4})),
        r"'\(' in alpha_pattern is no regular expression",
    ),
    "a huge pattern": (
        _edit(lambda c: c.update(rank_pattern={"a{99999999999999999999}": 4})),
        "in rank_pattern is no regular expression: the repetition number is too large",
    ),
    "whole modules": (_edit(lambda c: c.update(modules_to_save="lm_head")), "damaged: modules_to_save is 'lm_head'"),
    "NaN alpha": (
        _edit(lambda c: c.update(alpha_pattern={"q_proj": float("nan")})),
        "damaged: alpha_pattern is .*nan",
    ),
    "dropout": (_edit(lambda c: c.update(lora_dropout=1.0)), r"dropout must be in \[0, 1\), got 1.0"),
    "no rank": (_edit(lambda c: c.pop("r")), "r is 'None'"),
    "no configuration": (lambda f: (f / PEFT_CONFIG_FILE).unlink(), "holds no adapter_config.json"),
    "pickle": (_to_pickle, "pickle, adapter_model.bin, which is not read"),
    "damaged": (lambda f: (f / PEFT_WEIGHTS_FILE).write_bytes(b"xx"), "damaged or not a safetensors file"),
    "embedding": (
        _tensors(lambda t: t.update({"base_model.model.x.lora_embedding_A": torch.ones(2, 3)})),
        r"x.lora_embedding_A of shape \(2, 3\), which is not a low-rank factor",
    ),
    "convolution": (_tensors(lambda t: t.update({f"{K}.lora_A.weight": torch.ones(4, 3, 1, 1)})), "is not a low-rank"),
    "base weights": (
        _tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(97, 32)})),
        "save_embedding_layers=False",
    ),
    "half": (_tensors(lambda t: t.pop(f"{K}.lora_A.weight")), "damaged: model.layers.0.self_attn.q_proj has"),
    "ranks": (_tensors(lambda t: t.update({f"{K}.lora_A.weight": torch.ones(3, 32)})), "damaged: model.layers.0"),
    "NaN": (_tensors(lambda t: t[f"{K}.lora_A.weight"].fill_(torch.nan)), "has NaN"),
    "empty": (_tensors(lambda t: t.clear()), "holds no factors"),
    "shape": (
        _tensors(lambda t: t.update({f"{K}.lora_A.weight": torch.ones(4, 33)})),
        "q_proj is 32 -> 32, not 33 -> 32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_by_name(case: str, tmp_path: Path) -> None:
    _peft_model().save_pretrained(tmp_path)
    damage, match = REFUSED[case]
    damage(tmp_path)
    model = LLAMA.build()
    with pytest.raises(InputError, match=match):
        import_peft(model, tmp_path)
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_export_refuses_what_cannot_be_written(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        next(iter(adapter_layers(model).values())).lora_B[0, 0] = torch.inf
    with pytest.raises(InputError, match="not saved: .*q_proj.lora_B.weight has NaN"):
        export_peft(model, tmp_path / "peft")
    with pytest.raises(InputError, match="has no adapters; call add_adapters or load_adapter"):
        export_peft(LLAMA.build(), tmp_path / "peft")
    with pytest.raises(InputError, match="no adapter folder at"):
        import_peft(LLAMA.build(), tmp_path / "peft")
    save_adapter(adapted(), tmp_path / "ours")
    with pytest.raises(InputError, match="so it is not a PEFT adapter"):
        import_peft(LLAMA.build(), tmp_path / "ours")


def test_an_adapter_on_the_head_is_exported(tmp_path: Path) -> None:
    model = LLAMA.build()
    insert_adapters(model, {"lm_head": {"rank": 4}})
    train(model)
    export_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    torch.testing.assert_close(outputs(loaded), logits(model), **SAME)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_scale_that_was_changed_in_memory_counts(rslora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=rslora)
    model = peft.get_peft_model(LLAMA.build(), config)
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            nn.init.normal_(module.lora_B["default"].weight)
            if name.endswith("up_proj"):
                module.scale_layer(0.25)
    wanted = logits(model)
    back = LLAMA.build()
    import_peft(back, model)
    torch.testing.assert_close(logits(back), wanted, **SAME)
    assert {layer.alpha for name, layer in adapter_layers(back).items() if "q_proj" in name} == {6.0}
    torch.testing.assert_close(logits(from_peft(model)), wanted, **SAME)


@pytest.mark.parametrize("alpha", [-6, 0])
@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_a_scale_that_is_negative_or_zero_goes_into_the_free_factor(
    alpha: int, orthonormal: Any, tmp_path: Path
) -> None:
    source = peft.get_peft_model(
        LLAMA.build(), peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False)
    )
    source.save_pretrained(tmp_path)
    wanted = logits(source)
    for adapter in (tmp_path, source):
        model = LLAMA.build()
        import_peft(model, adapter, orthonormal=orthonormal)
        torch.testing.assert_close(logits(model), wanted, **SAME)
        assert all(layer.alpha > 0 for layer in adapter_layers(model).values())


def test_a_model_without_a_head_over_words_keeps_its_configuration() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    source = peft.get_peft_model(FAMILIES["roberta"].build(), config)
    before = source.config.to_dict()
    assert from_peft(source).config.to_dict() == before


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens"])
def test_a_head_that_peft_took_off_the_embedding_stays_so(trained: str, tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=97, tie_word_embeddings=True, **sizes)).eval()

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[trained], init_lora_weights=False)
    source = peft.get_peft_model(build(), config)
    for name, parameter in source.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    wanted = logits(source)
    merge_adapters(from_peft(source)).save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), wanted, **SAME)


def test_layers_come_back_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(8, 2)
    save_file(tensors, tmp_path / PEFT_WEIGHTS_FILE)
    (tmp_path / PEFT_CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    assert list(read_peft(tmp_path).modules) == names
