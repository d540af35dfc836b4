"""Adapters over whole models: what is chosen, and that taking them out, merging and switching are exact."""

import copy
import io
import logging
import math
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import geoopt
import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from stiefel_lora.adapted import adapter_factors, adapter_layers, adapter_metrics
from stiefel_lora.adapters import (
    adapter_names,
    add_adapters,
    disable_adapters,
    insert_adapters,
    remove_adapters,
    unwrap,
    use_adapter,
)
from stiefel_lora.checkpoint import load_adapter, read_adapter, save_adapter
from stiefel_lora.convert import export_peft, import_peft
from stiefel_lora.errors import InputError, ManifoldError
from stiefel_lora.layer import StiefelLoRALinear
from stiefel_lora.merging import merge_adapters, refactor_adapters, unmerge_adapters
from stiefel_lora.optim import RiemannianAdam
from stiefel_lora.stiefel import random_point
from tests.models import FAMILIES, FULL_GRAPH
from tests.test_layer import QuantisedLinear

LLAMA = FAMILIES["llama"]
BATCH = LLAMA.batch(2, 7)
DEFAULTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def train(model: nn.Module, seed: int = 5) -> None:
    """Give the free factors values, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        for name, factor in layer.factors().items():
            if name not in layer.manifold_parameters():
                nn.init.normal_(factor, generator=generator)


def adapted(**options: Any) -> nn.Module:
    model = LLAMA.build()
    add_adapters(model, **{"layers": [0, 2], "rank": 4, **options})
    train(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def names(layers: list[int], targets: tuple[str, ...] = DEFAULTS) -> list[str]:
    return [f"model.layers.{i}.{target}" for i in layers for target in targets]


# Adding


def test_defaults_wrap_the_papers_targets_and_freeze_the_rest() -> None:
    model = LLAMA.build()
    before = logits(model)
    assert add_adapters(model, layers=[2, 0], rank=4) == names([0, 2])
    assert list(adapter_layers(model)) == names([0, 2])
    assert torch.equal(logits(model), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in names([0, 2]) for factor in ("lora_A", "lora_B")}
    assert all(layer.alpha == 8 for layer in adapter_layers(model).values())


def test_initial_factors_by_name() -> None:
    model = LLAMA.build()
    points = {name: random_point(32, 2) for name in names([1], ("self_attn.q_proj", "self_attn.k_proj"))}
    add_adapters(model, layers=[1], rank=2, target_modules=["q_proj", "k_proj"], init=points)
    for name, layer in adapter_layers(model).items():
        torch.testing.assert_close(layer.lora_A.data, points[name], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="init must name the adapted linears, .*k_proj; got model"):
        add_adapters(LLAMA.build(), layers=[1], rank=2, target_modules=["k_proj"], init=points)


def test_adding_again_extends_the_set_and_keeps_it_trainable() -> None:
    model = adapted(layers=[0])
    before = logits(model)
    assert add_adapters(model, layers=[0, 1], rank=2, target_modules=["o_proj"]) == names([0, 1], ("self_attn.o_proj",))
    assert len(adapter_layers(model)) == 7
    assert all(f.requires_grad for layer in adapter_layers(model).values() for f in layer.factors().values())
    assert torch.equal(logits(model), before)
    with pytest.raises(InputError, match="q_proj has an adapter already"):
        add_adapters(model, layers=[0], rank=2, target_modules=["q_proj"])


def test_adding_again_leaves_a_head_trainable_and_a_factor_frozen() -> None:
    model = adapted(layers=[0])
    model.lm_head.weight.requires_grad_(True)
    frozen = adapter_layers(model)[names([0])[0]].lora_A.requires_grad_(False)
    add_adapters(model, layers=[1], rank=2)
    assert model.lm_head.weight.requires_grad
    assert not frozen.requires_grad
    trainable = sum(p.requires_grad for p in model.parameters())
    assert trainable == 2 * len(adapter_layers(model))  # one factor less, one head more


def test_the_mode_of_the_base_is_kept() -> None:
    for mode in (True, False):
        model = LLAMA.build().train(mode)
        add_adapters(model, layers=[0], rank=2, dropout=0.1)
        assert all(m.training == mode for m in model.modules())


def test_modules_that_never_call_their_linears_are_refused() -> None:
    model = FAMILIES["transformer-encoder"].build()
    with pytest.raises(InputError, match="MultiheadAttention reads its weight"):
        insert_adapters(model, {"net.layers.0.self_attn.out_proj": {"rank": 2}})


def test_insert_refuses_what_is_not_a_linear() -> None:
    model = LLAMA.build()
    with pytest.raises(InputError, match="no module model.layers.7; its linears are named q_proj"):
        insert_adapters(model, {"model.layers.7": {"rank": 2}})
    with pytest.raises(TypeError, match="model.embed_tokens: the base must be a linear layer .*, got Embedding"):
        insert_adapters(model, {"lm_head": {"rank": 2}, "model.embed_tokens": {"rank": 2}})
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        add_adapters("model", layers=[0], rank=2)  # type: ignore[arg-type]


# Taking out, disabling, merging


def test_remove_brings_back_the_very_modules_and_flags() -> None:
    model = LLAMA.build()
    model.model.embed_tokens.requires_grad_(False)
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = logits(model)
    add_adapters(model, layers=[0, 2], rank=4)
    train(model)
    next(iter(adapter_layers(model).values())).merge()
    assert remove_adapters(model) is model
    assert all(module is modules[name] for name, module in model.named_modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "_stiefel_adapters")
    with pytest.raises(InputError, match="no adapter to remove; the model has: none"):
        remove_adapters(model)
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapters"):
        unmerge_adapters(model)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_exactly(merged: bool) -> None:
    model = adapted()
    if merged:
        merge_adapters(model, keep=True)
    base, before = logits(LLAMA.build()), logits(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
        with disable_adapters(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert torch.equal(logits(model), before)


def test_unmerging_while_disabled_is_exact_and_switching_is_refused() -> None:
    model = LLAMA.build()
    base = logits(model)
    add_adapters(model, layers=[0], rank=4)
    train(model)
    expected = logits(model)
    merge_adapters(model, keep=True)
    with disable_adapters(model):
        unmerge_adapters(model)
        assert torch.equal(logits(model), base)
        with pytest.raises(InputError, match="leave disable_adapters"):
            add_adapters(model, layers=[1], rank=2, name="second")
        with pytest.raises(InputError, match="leave disable_adapters"):
            remove_adapters(model)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(remove_adapters(model)), base)


def test_a_merged_model_that_was_converted_is_disabled_in_its_new_type() -> None:
    model = LLAMA.build()
    expected = logits(copy.deepcopy(model).bfloat16())
    add_adapters(model, layers=[0], rank=4)
    train(model)
    merge_adapters(model, keep=True).bfloat16()
    with disable_adapters(model):
        assert torch.equal(logits(model), expected)


def test_a_second_set_starts_from_the_weight_itself_not_a_merged_one() -> None:
    fresh, model = LLAMA.build(), adapted(layers=[1])
    merge_adapters(model, keep=True)
    for each in (fresh, model):
        add_adapters(each, layers=[1], rank=2, init="svd", name="second")
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.lora_A, adapter_layers(fresh)[name].lora_A)


def test_merge_gives_a_plain_model_that_saves_and_loads(tmp_path: Path) -> None:
    model = adapted()
    expected = logits(model)
    assert merge_adapters(model) is model
    classes = [type(m) for m in LLAMA.build().modules()]
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    # float32 logits of size 1 after three layers: a few hundred eps.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_merge_with_keep_can_be_undone() -> None:
    model = adapted()
    base = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    merge_adapters(model, keep=True)
    assert all(layer.merged for layer in adapter_layers(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), expected)


def test_merge_into_low_precision_says_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted().to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="stiefel_lora"):
        merge_adapters(model)
    assert "merging into torch.bfloat16 rounds the updates" in caplog.text
    assert model.dtype == torch.bfloat16
    caplog.clear()
    merge_adapters(adapted())
    assert not caplog.text


def test_merge_is_all_or_nothing() -> None:
    model = LLAMA.build()
    model.model.layers[2].mlp.up_proj = QuantisedLinear(nn.Linear(32, 56, bias=False))
    add_adapters(model, layers=[0, 2], rank=4)
    train(model)
    before = logits(model)
    with pytest.raises(InputError, match="quantised"):
        merge_adapters(model)
    assert not any(layer.merged for layer in adapter_layers(model).values())
    assert torch.equal(logits(model), before)
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapters"):
        merge_adapters(LLAMA.build())


def test_tied_weights_are_warned_about_and_untied_by_merging(tmp_path: Path) -> None:
    model = FAMILIES["llama-tied"].build()
    with pytest.warns(UserWarning, match="weight of lm_head is shared with another module"):
        insert_adapters(model, {"lm_head": {"rank": 4}})
    train(model)
    embedding, expected = model.model.embed_tokens.weight.clone(), logits(model)
    merge_adapters(model)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_adapters_beside_tied_weights_do_not_warn() -> None:
    model = FAMILIES["llama-tied"].build()
    add_adapters(model, layers=[0], rank=4)
    train(model)
    assert merge_adapters(model).config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Several adapters


def test_named_adapters_switch_exactly() -> None:
    model = LLAMA.build()
    base = logits(model)
    add_adapters(model, layers=[0], rank=2, name="first")
    train(model, seed=1)
    first = logits(model)
    add_adapters(model, layers=[0, 1], rank=4, orthonormal="B", name="second")
    assert torch.equal(logits(model), base)
    train(model, seed=2)
    second = logits(model)
    assert adapter_names(model) == ["second", "first"]
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(adapter_layers(model))

    use_adapter(model, "first")
    assert torch.equal(logits(model), first)
    merge_adapters(model, keep=True)
    use_adapter(model, "second")
    assert torch.equal(logits(model), second)
    clone = copy.deepcopy(model)
    use_adapter(clone, "first")
    assert torch.equal(logits(clone), first)
    assert adapter_names(model) == ["second", "first"]

    with pytest.raises(InputError, match="no adapter is named 'third'; the model has: second, first"):
        use_adapter(model, "third")
    with pytest.raises(InputError, match="'first' exists already"):
        add_adapters(model, layers=[0], rank=2, name="first")
    with pytest.raises(InputError, match=r"holds other adapters \(first\)"):
        merge_adapters(model)
    remove_adapters(model, "second")
    assert torch.equal(logits(model), base)
    assert adapter_names(model) == ["first"]
    assert not all(p.requires_grad for p in model.parameters())
    use_adapter(model, "first")
    assert torch.equal(logits(model), first)
    remove_adapters(model)
    assert adapter_names(model) == []
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("change", ["replaced", "cut off", "head"])
def test_a_set_whose_linears_are_not_there_any_more_is_not_put_in(change: str) -> None:
    model = LLAMA.build()
    add_adapters(model, layers=[0, 2], rank=2, name="first")
    model.lm_head.weight.requires_grad_(True)
    add_adapters(model, layers=[0], rank=2, name="second")
    if change == "replaced":  # as by a library that quantises
        model.model.layers[2].mlp.up_proj = copy.deepcopy(model.model.layers[2].mlp.up_proj)
        message = r"linears that are not in the model any more, model\.layers\.2\.mlp\.up_proj; put back"
    elif change == "cut off":
        model.model.layers = model.model.layers[:2]
        message = r"linears that are not in the model any more, model\.layers\.2\.self_attn"
    else:
        model.lm_head = nn.Identity()
        message = r"lm_head\.weight had shape .* and is gone; bring it back"
    layers = adapter_layers(model)
    with pytest.raises(InputError, match=message):
        use_adapter(model, "first")
    assert adapter_names(model) == ["second", "first"]
    assert adapter_layers(model) == layers
    remove_adapters(model, "first")
    assert adapter_names(model) == ["second"]


def _train_head(model: nn.Module, value: float) -> torch.Tensor:
    head = model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        head.fill_(value)
    return logits(model)


def test_a_head_that_was_trained_along_is_switched_with_its_set(tmp_path: Path) -> None:
    model = adapted(name="first")
    first = _train_head(model, 0.1)
    add_adapters(model, layers=[1], rank=2, name="second")
    # Its own from now on, or what is saved would not have the head that it was trained with.
    assert model.lm_head.weight.requires_grad
    save_adapter(model, tmp_path)
    other = LLAMA.build()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    second = _train_head(model, 0.2)
    for name, expected in (("first", first), ("second", second), ("first", first)):
        use_adapter(model, name)
        assert torch.equal(logits(model), expected)
        assert model.lm_head.weight.requires_grad


def test_a_head_that_was_loaded_gives_the_base_its_own_back(tmp_path: Path) -> None:
    trained = adapted()
    expected = _train_head(trained, 0.1)
    save_adapter(trained, tmp_path)
    model = LLAMA.build()
    base = logits(model)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    add_adapters(model, layers=[1], rank=2, name="second")
    assert torch.equal(logits(model), base)
    use_adapter(model, "default")
    assert torch.equal(logits(model), expected)
    remove_adapters(model)
    assert torch.equal(logits(model), base)


def test_stored_adapters_follow_the_model() -> None:
    model = adapted(name="first")
    expected = logits(model.double())
    add_adapters(model, layers=[1], rank=2, name="second", dropout=0.5)
    model.train()
    use_adapter(model, "first")
    assert all(m.training for m in model.modules())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_stored_adapters_take_the_precision_of_a_model_that_was_converted(orthonormal: Any) -> None:
    model = LLAMA.build()
    for name in ("first", "second"):
        add_adapters(model, layers=[0], rank=3, orthonormal=orthonormal, name=name)
    # Float64's eps of 2e-16, and float32's of 1e-7, over sums of up to 64 products.
    for convert, dtype, most in (("double", torch.float64, 1e-14), ("bfloat16", torch.float32, 1e-5)):
        getattr(model, convert)()
        use_adapter(model, "first")
        assert {factor.dtype for factor in adapter_factors(model).values()} == {dtype}
        assert all(m["orthogonality_error"] < most for m in adapter_metrics(model).values())
        for layer in adapter_layers(model).values():
            assert all(isinstance(p, geoopt.ManifoldParameter) for p in layer.manifold_parameters().values())
        use_adapter(model, "second")


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_metrics_are_those_of_the_update(orthonormal: Any) -> None:
    model = adapted(orthonormal=orthonormal)
    with torch.no_grad():
        first = next(iter(adapter_layers(model).values()))
        next(iter(first.manifold_parameters().values())).mul_(1.5)
    metrics = adapter_metrics(model)
    for i, (name, layer) in enumerate(adapter_layers(model).items()):
        values = torch.linalg.svdvals(layer.delta_weight().detach().double())[: layer.rank]
        p = values / values.sum()
        # Scaling an orthonormal factor as a whole leaves the singular values' proportions.
        assert metrics[name]["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
        # |2.25 I - I|_F = 1.25 sqrt(4)
        assert metrics[name]["orthogonality_error"] == pytest.approx(2.5 if i == 0 else 0, abs=1e-5)


# What torch and other tools do to a model


def test_copies_and_pickles_of_a_model() -> None:
    model = adapted()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]  # noqa: S301
    for clone in clones:
        assert torch.equal(logits(clone), logits(model))
        for layer in adapter_layers(clone).values():
            assert isinstance(layer.lora_A, geoopt.ManifoldParameter)
        remove_adapters(clone)
        assert torch.equal(logits(clone), logits(LLAMA.build()))
    assert len(adapter_layers(model)) == 10


def test_state_dict_round_trip() -> None:
    model, other = adapted(), LLAMA.build()
    add_adapters(other, layers=[0, 2], rank=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_wrapped_models() -> None:
    model = LLAMA.build()
    parallel = nn.DataParallel(model)
    assert add_adapters(parallel, layers=[0], rank=2) == names([0])
    assert list(adapter_layers(parallel)) == names([0])
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is unwrap(parallel) is model
    assert merge_adapters(compiled) is model
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        add_adapters(model, layers=[0], rank=2)
        assert remove_adapters(wrap(model)) is model


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    model = adapted()
    expected = adapted()
    for m in (nn.parallel.DistributedDataParallel(model), expected):
        m(**BATCH).loss.backward()
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    with pytest.raises(InputError, match=r"add the adapters to model.module"):
        add_adapters(nn.parallel.DistributedDataParallel(LLAMA.build()), layers=[0], rank=2)


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_takes_no_adapters_from_elsewhere(tmp_path: Path) -> None:
    """Whatever was not trainable when it was made is not synchronised: the processes would drift apart."""
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    save_adapter(model, tmp_path)
    export_peft(model, tmp_path)
    bare = nn.parallel.DistributedDataParallel(LLAMA.build())
    for load in (load_adapter, import_peft):
        with pytest.raises(InputError, match=r"add the adapters to model.module"):
            load(bare, tmp_path)
    assert not adapter_names(bare)
    two = adapted()
    add_adapters(two, layers=[1], rank=2, name="second")
    wrapped = nn.parallel.DistributedDataParallel(two)
    use_adapter(wrapped, "second")  # is in use
    with pytest.raises(InputError, match=r"add the adapters to model.module"):
        use_adapter(wrapped, "default")
    assert adapter_names(wrapped) == ["second", "default"]
    frozen = nn.parallel.DistributedDataParallel(adapted())
    with pytest.raises(InputError, match=r"add the adapters to model.module"):
        load_adapter(frozen, tmp_path)  # the head would become trainable
    resumed = adapted()
    resumed.lm_head.weight.requires_grad_(True)
    load_adapter(nn.parallel.DistributedDataParallel(resumed), tmp_path)
    assert torch.equal(logits(resumed), logits(model))


def test_compiled_model_trains_without_graph_breaks_in_adapters() -> None:
    model, expected = adapted(), adapted()
    torch.compile(model, backend="aot_eager", fullgraph=FULL_GRAPH)(**BATCH).loss.backward()
    expected(**BATCH).loss.backward()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        if b.grad is not None:
            # The compiled graph may order float32 sums differently.
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_export_and_tracing_of_a_merged_model() -> None:
    model = merge_adapters(adapted())
    ids = BATCH["input_ids"]
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, expected)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and transformers' Python branches are noted
        traced = torch.jit.trace(Logits(), (ids,))
    torch.testing.assert_close(traced(ids), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, expected = adapted().train(), adapted().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renames the method; older 5.x has this one
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for m in (model, expected):
        m(**BATCH).loss.backward()
    for name, layer in adapter_layers(model).items():
        torch.testing.assert_close(layer.lora_A.grad, adapter_layers(expected)[name].lora_A.grad)


def test_generation_is_that_of_the_merged_model() -> None:
    model = adapted()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = BATCH["input_ids"][:1]
    generated = model.generate(ids, **options)
    assert torch.equal(generated, merge_adapters(model).generate(ids, **options))


@pytest.mark.parametrize("still", [False, True])
def test_a_base_that_was_dequantised_while_loading_can_be_saved(still: bool, tmp_path: Path) -> None:
    """transformers keeps its quantiser on a model read from a GGUF file, and refuses to save that."""
    model = LLAMA.build()
    if still:
        model.model.layers[1].mlp.up_proj = QuantisedLinear(model.model.layers[1].mlp.up_proj)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gguf"))
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    add_adapters(model, layers=[0], rank=4)
    train(model)
    merge_adapters(model)
    if still:
        assert model.is_quantized and model.hf_quantizer is not None
        return
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_quantised_linears_forward_and_train() -> None:
    model = LLAMA.build()
    for layer in model.model.layers:
        layer.mlp.up_proj = QuantisedLinear(layer.mlp.up_proj)
    before = logits(model)
    add_adapters(model, layers=[0, 2], rank=4)
    assert isinstance(adapter_layers(model)["model.layers.0.mlp.up_proj"], StiefelLoRALinear)
    assert torch.equal(logits(model), before)
    model(**BATCH).loss.backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in adapter_layers(model).values())


class SharedHeads(nn.Module):
    """A head that stands in several places, as in Deformable DETR."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.head = nn.Linear(16, 4)
        self.heads = nn.ModuleList([self.head] * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(())
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = torch.tanh(layer(x))
            out = out + head(x)
        return out


def test_a_module_in_several_places_has_one_adapter_in_all_of_them() -> None:
    model, x = SharedHeads(), torch.randn(5, 16)
    before = model(x)
    assert insert_adapters(model, {"heads.1": {"rank": 2}}) == ["head"]
    nn.init.normal_(adapter_layers(model)["head"].lora_B)
    after = model(x)
    assert (after - before).abs().max() > 0.1
    merge_adapters(model, keep=True)
    torch.testing.assert_close(model(x), after, rtol=1e-5, atol=1e-5)
    unmerge_adapters(model)
    with pytest.raises(InputError, match="heads.0 and head are one module"):
        insert_adapters(model, {"head": {"rank": 2}, "heads.0": {"rank": 2}}, name="other")
    assert torch.equal(remove_adapters(model)(x), before)
    assert all(type(head) is nn.Linear for head in model.heads)


def test_layers_that_share_a_block_are_adapted_once() -> None:
    block = nn.ModuleDict({"fc": nn.Linear(16, 16)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block] * 4)})
    for layers in (None, [2]):
        assert add_adapters(model, layers=layers, rank=2, target_modules=["fc"]) == ["layers.0.fc"]
        remove_adapters(model)


def test_parameters_of_the_base_keep_their_names_beneath_adapters(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].build()
    attention = model.transformer.h[0].attn
    add_adapters(model, layers=[0], rank=2, name="first")
    attention.c_attn.base.bias.requires_grad_(True)
    with torch.no_grad():
        attention.c_attn.base.bias.fill_(1.0)
    add_adapters(model, layers=[1], rank=2, name="second")
    use_adapter(model, "first")
    assert adapter_names(model) == ["first", "second"]
    assert attention.c_attn.base.bias.eq(1).all()
    # A head that is trained along in one set, and adapted in another.
    head = LLAMA.build()
    add_adapters(head, layers=[0], rank=2)
    head.lm_head.weight.requires_grad_(True)
    head.lm_head.weight.data.fill_(1.0)
    save_adapter(head, tmp_path / "head")
    for with_head_first in (True, False):
        model, expected = LLAMA.build(), LLAMA.build()(**BATCH).logits
        if with_head_first:
            load_adapter(model, tmp_path / "head", name="first")
        insert_adapters(model, {"lm_head": {"rank": 4}}, name="second")
        if not with_head_first:
            load_adapter(model, tmp_path / "head", name="first")
            assert model.lm_head.weight.eq(1).all()
            use_adapter(model, "second")
        with disable_adapters(model):
            assert torch.equal(model(**BATCH).logits, expected)


def test_running_statistics_and_linears_that_are_not_called_are_named() -> None:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)]
    with pytest.warns(UserWarning, match="while in training mode, running statistics change in 0.1, 1.1, which"):
        add_adapters(nn.Sequential(*blocks), layers=None, rank=2, target_modules=["0"])
    config = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=4, time_step_rank=4)
    with pytest.raises(
        InputError, match="1.mixer.dt_proj cannot have an adapter: MambaMixer reads its weight, at least"
    ):
        add_adapters(MambaForCausalLM(config), layers=None, rank=2, target_modules=["dt_proj"])


def test_an_offloaded_base_is_refused() -> None:
    model = LLAMA.build()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match="q_proj.* is offloaded, where an adapter cannot be trained"):
        add_adapters(model, layers=[0], rank=2)
    assert not adapter_layers(model)


def test_a_linear_that_is_compiled_by_itself_is_refused(tmp_path: Path) -> None:
    """What is compiled goes on calling the linear that it was made of."""
    save_adapter(adapted(), tmp_path)
    model = LLAMA.build()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = torch.compile(mlp.up_proj, backend="eager")
    refused = r"layers.0.mlp.up_proj._orig_mod is compiled by itself.*compile the block instead"
    with pytest.raises(InputError, match=refused):
        add_adapters(model, layers=[0], rank=2, target_modules="all-linear")
    with pytest.raises(InputError, match=refused):
        load_adapter(model, tmp_path)
    assert not adapter_layers(model) and all(p.requires_grad for p in model.parameters())


def test_an_averaged_model_is_unwrapped() -> None:
    model = adapted()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    add_adapters(averaged.module, layers=[1], rank=2, name="two")
    assert adapter_names(averaged) == ["two", "default"]
    use_adapter(averaged, "default")
    assert torch.equal(logits(averaged), logits(model))


class Around(nn.Module):
    """Stands for a module of a user's, or of Lightning's, around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward = model.forward


def test_a_module_around_the_adapted_one_disables_and_names_it(tmp_path: Path) -> None:
    model = LLAMA.build()
    model.lm_head.requires_grad_(True)
    before = logits(model)
    other = adapted(alpha=3)
    other.lm_head.requires_grad_(True)
    nn.init.normal_(other.lm_head.weight)
    save_adapter(other, tmp_path)
    model.requires_grad_(False)
    load_adapter(model, tmp_path)
    around = Around(model)
    with disable_adapters(around):
        assert torch.equal(logits(around), before)
        with pytest.raises(InputError, match="leave disable_adapters"):
            save_adapter(around, tmp_path)
    for change in (
        lambda: use_adapter(around, "default"),
        lambda: remove_adapters(around),
        lambda: merge_adapters(around),
        lambda: add_adapters(around, layers=[1], rank=2, layers_path="model.model.layers"),
    ):
        with pytest.raises(InputError, match="the adapters were put into model, a part of Around; give that part"):
            change()
    assert torch.equal(logits(around), logits(other))


def test_a_part_of_the_adapted_model_is_refused_and_layers_put_in_by_hand_are_not() -> None:
    model = adapted()
    expected, flags = logits(model), [p.requires_grad for p in model.parameters()]
    for change in (
        lambda: remove_adapters(model.model),
        lambda: merge_adapters(model.model),
        lambda: use_adapter(model.model, "default"),
        lambda: add_adapters(model.model, layers=[1], rank=2),
    ):
        with pytest.raises(
            InputError, match="this LlamaModel is a part of the model .*; give the model that add_adapt"
        ):
            change()
    assert torch.equal(logits(model), expected) and [p.requires_grad for p in model.parameters()] == flags
    by_hand = nn.Sequential(StiefelLoRALinear(nn.Linear(4, 4), rank=2), nn.Linear(4, 4))
    assert type(remove_adapters(by_hand)[0]) is nn.Linear
    by_hand = nn.Sequential(StiefelLoRALinear(nn.Linear(4, 4), rank=2), nn.Linear(4, 4))
    assert type(merge_adapters(by_hand)[0]) is nn.Linear


def test_a_head_that_was_resized_meanwhile_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    trained = adapted()
    trained.lm_head.requires_grad_(True)
    save_adapter(trained, tmp_path)
    model = LLAMA.build()
    load_adapter(model, tmp_path)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    now = logits(model)
    for change in (
        lambda: remove_adapters(model),
        lambda: add_adapters(model, layers=[1], rank=2, name="two"),
        lambda: disable_adapters(model).__enter__(),
    ):
        with pytest.raises(
            InputError, match=rf"lm_head.weight had shape \({size}, .* has \({size + 3}, .*bring it back"
        ):
            change()
    assert torch.equal(logits(model), now) and adapter_names(model) == ["default"]
    model.resize_token_embeddings(size)
    remove_adapters(model)
    assert torch.equal(logits(model), logits(LLAMA.build()))


def test_nothing_is_frozen_by_adapters_that_failed() -> None:
    model = LLAMA.build()
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qk"]
    with pytest.raises(InputError, match="k_proj: rank must be"):
        insert_adapters(model, {names[0]: {"rank": 2}, names[1]: {"rank": 10**6}})
    assert all(p.requires_grad for p in model.parameters()) and not adapter_layers(model)


def test_a_set_that_is_loaded_beside_a_trained_head_stays_what_it_is(tmp_path: Path) -> None:
    save_adapter(adapted(name="second"), tmp_path / "second")
    model = adapted(name="first")
    _train_head(model, 0.1)
    with pytest.warns(UserWarning, match="lm_head.weight was trained along with another set of adapters"):
        load_adapter(model, tmp_path / "second", name="second")
    assert not model.lm_head.weight.requires_grad
    save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again").parameters == {}


def test_factors_without_values_are_neither_saved_nor_merged(tmp_path: Path) -> None:
    model = adapted().to("meta")
    for use in (lambda: save_adapter(model, tmp_path / "adapter"), lambda: merge_adapters(model)):
        with pytest.raises(InputError, match=r"the adapters of model.layers.0.* are on the meta device"):
            use()
    assert not (tmp_path / "adapter").exists()


def test_an_average_that_is_copied_in_keeps_its_updates() -> None:
    model = adapted()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
    assert refactor_adapters(model) == []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in adapter_layers(model).values():
                layer.lora_A.copy_(random_point(*layer.lora_A.shape))
                nn.init.normal_(layer.lora_B)
        average.update_parameters(model)
    with torch.no_grad():
        for own, mean in zip(model.parameters(), average.module.parameters(), strict=True):
            own.copy_(mean)
    expected = model(**BATCH).logits
    optimizer = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ManifoldError, match=r"call stiefel_lora\.refactor_adapters\(model\), which keeps the product"):
        RiemannianAdam(optimizer)
    assert refactor_adapters(model) == list(adapter_layers(model))
    torch.testing.assert_close(model(**BATCH).logits, expected, rtol=1e-4, atol=1e-4)  # float32, four blocks deep
    RiemannianAdam(optimizer)
    next(iter(adapter_layers(model).values())).lora_B.data[0, 0] = math.nan
    assert refactor_adapters(model) == []
    next(iter(adapter_layers(model).values())).lora_A.data[0, 0] = math.nan
    with pytest.raises(InputError, match="q_proj have NaN or infinite entries"):
        refactor_adapters(model)


@pytest.mark.parametrize("normed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_power_iteration_that_goes_on_is_named(normed: Any) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), normed(nn.Linear(8, 8))) for _ in range(2)])
    with pytest.warns(UserWarning, match=r"running statistics change in 0\.1.*, 1\.1"):
        add_adapters(model, layers=None, rank=2, target_modules=["0"])
