"""Which linears get adapters: defaults, names, layers, ranks, and what is said where they do not match."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from stiefel_lora._models import find_linears
from stiefel_lora._targets import describe, find_targets, module_ranks
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import add_adapters
from stiefel_lora.config import FinetuneConfig
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import fisher_select
from stiefel_lora.initialisation import allocate_ranks, gradient_init, select_and_start
from stiefel_lora.selection import adaptable
from tests.models import FAMILIES
from tests.test_adapters import LLAMA, adapted, names


@pytest.mark.parametrize(
    ("kind", "options", "path", "expected"),
    [
        (
            "DistilBertForSequenceClassification",
            transformers.DistilBertConfig(vocab_size=97, dim=32, hidden_dim=56, n_layers=2, n_heads=4),
            None,
            "distilbert.transformer.layer 1: attention.q_lin, attention.k_lin, attention.v_lin, ffn.lin1, ffn.lin2",
        ),
        (
            "DebertaV2ForSequenceClassification",
            transformers.DebertaV2Config(
                vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4
            ),
            None,
            "deberta.encoder.layer 1: attention.self.query_proj, attention.self.key_proj, attention.self.value_proj, "
            "attention.output.dense, intermediate.dense, output.dense",
        ),
        (
            "T5ForConditionalGeneration",
            transformers.T5Config(vocab_size=97, d_model=32, d_ff=56, num_layers=2, num_heads=4, d_kv=8),
            "encoder.block",
            "encoder.block 1: layer.0.SelfAttention.q, layer.0.SelfAttention.k, layer.0.SelfAttention.v, "
            "layer.1.DenseReluDense.wi, layer.1.DenseReluDense.wo",
        ),
        (
            "T5ForConditionalGeneration",
            transformers.T5Config(
                vocab_size=97, d_model=32, d_ff=56, num_layers=2, num_heads=4, d_kv=8, feed_forward_proj="gated-gelu"
            ),
            "encoder.block",
            "encoder.block 1: layer.0.SelfAttention.q, layer.0.SelfAttention.k, layer.0.SelfAttention.v, "
            "layer.1.DenseReluDense.wi_0, layer.1.DenseReluDense.wi_1, layer.1.DenseReluDense.wo",
        ),
    ],
    ids=["distilbert", "deberta", "t5", "t5-1.1"],
)
def test_defaults_of_more_families(kind: str, options: Any, path: str | None, expected: str) -> None:
    model = getattr(transformers, kind)(options)
    assert describe(add_adapters(model, layers=[1], rank=2, layers_path=path)) == expected


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
OPENAI_SIZES = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
QKV = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
# Class of the model, that of its configuration with options, and what of the layers is adapted by default.
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPTJ": ("GPTJForCausalLM", OPENAI_SIZES, "0-1: attn.k_proj, attn.v_proj, attn.q_proj, mlp.fc_in, mlp.fc_out"),
    "CodeGen": ("CodeGenForCausalLM", OPENAI_SIZES, "0-1: attn.qkv_proj, mlp.fc_in, mlp.fc_out"),
    "Starcoder2": ("Starcoder2ForCausalLM", SIZES, f"0-3: {QKV}, mlp.c_fc, mlp.c_proj"),
    "Glm": ("GlmForCausalLM", {**SIZES, "head_dim": 8}, f"0-3: {QKV}, mlp.gate_up_proj, mlp.down_proj"),
    "Mpt": (
        "MptForCausalLM",
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
        "0-1: attn.Wqkv, ffn.up_proj, ffn.down_proj",
    ),
    "ModernBert": ("ModernBertForMaskedLM", SIZES, "0-3: attn.Wqkv, mlp.Wi, mlp.Wo"),
    "ModernBertDecoder": (
        "ModernBertDecoderForCausalLM",
        SIZES,
        "0-3: attn.q_proj, attn.k_proj, attn.v_proj, mlp.Wi, mlp.Wo",
    ),
    "MPNet": (
        "MPNetForMaskedLM",
        SIZES,
        "0-3: attention.attn.q, attention.attn.k, attention.attn.v, intermediate.dense, output.dense",
    ),
    "Albert": (
        "AlbertForMaskedLM",
        {**SIZES, "embedding_size": 16},
        "0: albert_layers.0.attention.query, albert_layers.0.attention.key, albert_layers.0.attention.value, "
        "albert_layers.0.ffn, albert_layers.0.ffn_output",
    ),
    # Hybrids, whose layers differ.
    "Lfm2": (
        "Lfm2ForCausalLM",
        {**SIZES, "layer_types": ["full_attention"] * 4},
        f"0-3: {QKV}, feed_forward.w3, feed_forward.w2",
    ),
    "Qwen3_5Text": (
        "Qwen3_5ForCausalLM",
        {**SIZES, "head_dim": 8},
        f"0-2: linear_attn.in_proj_qkv, mlp.up_proj, mlp.down_proj; model.layers 3: {QKV}, mlp.up_proj, mlp.down_proj",
    ),
    "Gemma3nText": (
        "Gemma3nForCausalLM",
        {**SIZES, "intermediate_size": [48] * 4, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2,
         "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
         "activation_sparsity_pattern": [0.0] * 4},
        f"0-1: {QKV}, mlp.up_proj, mlp.down_proj; model.layers 2-3: self_attn.q_proj, mlp.up_proj, mlp.down_proj",
    ),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        {**SIZES, **LATENT, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1},
        "0: self_attn.q_a_proj, self_attn.q_b_proj, self_attn.kv_a_proj_with_mqa, self_attn.kv_b_proj, mlp.up_proj, "
        "mlp.down_proj; model.layers 1-3: self_attn.q_a_proj, self_attn.q_b_proj, self_attn.kv_a_proj_with_mqa, "
        "self_attn.kv_b_proj, mlp.shared_experts.up_proj, mlp.shared_experts.down_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_defaults_of_layers(family: str) -> None:
    name, options, expected = MORE_FAMILIES[family]
    if not hasattr(transformers, name):
        pytest.skip(f"this release of transformers has no {name}")
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**options))
    if family == "Gemma3nText" and hasattr(model.model.layers[3].self_attn, "k_proj"):
        pytest.skip("in this release of transformers all layers have keys of their own")
    got = describe(add_adapters(model, layers=None, rank=2))
    assert got.split(" ", 1)[1] == expected


def test_explicit_targets_by_suffix_or_full_name() -> None:
    assert add_adapters(LLAMA.build(), layers=[1], rank=2, target_modules=["o_proj", "mlp.gate_proj"]) == names(
        [1], ("self_attn.o_proj", "mlp.gate_proj")
    )
    one = names([1], ("self_attn.o_proj",))
    assert add_adapters(LLAMA.build(), layers=None, rank=2, target_modules=one) == one


@pytest.mark.parametrize("layers", [None, [-1, 0]])
def test_all_linear_takes_every_linear_but_the_head(layers: list[int] | None) -> None:
    model = LLAMA.build()
    got = add_adapters(model, layers=layers, rank=2, target_modules="all-linear")
    expected = [n for n, m in LLAMA.build().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert got == [n for n in expected if layers is None or "layers.1." not in n]


def test_all_linear_leaves_out_gates_of_one_output() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 8}
    config = transformers.Qwen2MoeConfig(
        vocab_size=32, num_attention_heads=2, num_key_value_heads=2, **sizes, **experts
    )
    build = partial(transformers.Qwen2MoeForCausalLM, config)
    found = add_adapters(build(), layers=None, rank=2, target_modules="all-linear")
    gates = [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)]
    linears = [name for name, module in build().named_modules() if isinstance(module, nn.Linear)]
    assert found == [name for name in linears if name not in ["lm_head", *gates]]
    named = add_adapters(build(), layers=None, rank=1, target_modules=["shared_expert_gate"])
    assert named == gates, "whoever names them gets them"
    nothing_else = nn.Sequential(*(nn.Sequential(nn.Linear(4, 1)) for _ in range(2)))
    with pytest.raises(InputError, match="no target module is in layer 0-1 of '', which has 0, of one input or output"):
        add_adapters(nothing_else, layers=None, rank=1, target_modules="all-linear")


def test_linears_without_weights_yet_are_refused_by_name() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.LazyLinear(4), nn.ReLU()) for _ in range(3)))
    with pytest.raises(TypeError, match="a LazyLinear has no weights yet; run a forward pass"):
        add_adapters(net, layers=None, rank=1, target_modules="all-linear")
    with pytest.raises(TypeError, match="a LazyLinear has no weights yet; run a forward pass"):
        fisher_select(net, [(torch.ones(2, 4),)], loss_fn=lambda net, batch: net(batch[0]).square().mean(1))


def test_rank_pattern_takes_the_longest_match() -> None:
    pattern = {"q_proj": 2, "layers.2.self_attn.q_proj": 3}
    model = adapted(rank_pattern=pattern)
    ranks = {name: layer.rank for name, layer in adapter_layers(model).items()}
    assert ranks == {
        name: 3 if name.endswith("2.self_attn.q_proj") else 2 if name.endswith("q_proj") else 4 for name in ranks
    }
    assert all(layer.alpha == 2 * layer.rank for layer in adapter_layers(model).values())
    with pytest.raises(InputError, match=r"rank_pattern o_proj matches none of .* and 4 more"):
        add_adapters(LLAMA.build(), layers=[0, 2], rank=4, rank_pattern={"o_proj": 2})


def test_rank_pattern_may_name_layers_left_out_wherever_their_number_stands() -> None:
    model = nn.Sequential(FAMILIES["bert"].build(), nn.Linear(97, 5))
    names = add_adapters(model, layers=[0], rank=4, rank_pattern={"layer.2.attention.self.query": 2})
    assert all(name.startswith("0.bert.encoder.layer.0.") for name in names)
    with pytest.raises(InputError, match="rank_pattern layer.2.attention.self.kei matches none"):
        add_adapters(model, layers=[1], rank=4, rank_pattern={"layer.2.attention.self.kei": 2})


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target": (
        {"target_modules": ["q_proj", "query"]},
        InputError,
        "'query' matches nothing: the layers have q_proj, k_proj",
    ),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, InputError, "lm_head is not in them: .*insert_adapters"),
    "no target": ({"target_modules": []}, InputError, "target_modules is empty; the layers have: q_proj"),
    "generator": ({"target_modules": (n for n in ["q_proj"])}, TypeError, "target_modules .* the generator .* a list"),
    "iterator": ({"layers": iter([0])}, TypeError, "layers must be a sequence, got the list_iterator"),
    "string": ({"target_modules": "q_proj"}, TypeError, "sequence of names or 'all-linear', got the string 'q_proj'"),
    "layer": ({"layers": [0, 3, -4]}, InputError, "layer 3, -4 does not exist: model.layers has the layers 0 to 2"),
    "no layer": ({"layers": []}, InputError, "no layer is given: model.layers has the layers 0 to 2"),
    "twice": ({"layers": [1, -2]}, InputError, "layer 1 is given twice"),
    "a name for layers": ({"layers": "decoder.block"}, TypeError, "sequence of ints or None, got 'decoder.block'"),
    "float layer": ({"layers": [0.5]}, TypeError, "layers must be a sequence of ints"),
    "one layer": ({"layers": 0}, TypeError, "layers must be a sequence of ints or None, got 0"),
    "rank": ({"rank": 17}, InputError, r"layers.0.self_attn.k_proj: rank must be in \[1, 16\].* got 17"),
    "dropout": ({"dropout": 2.0}, InputError, "dropout must be in"),
    "gradient": ({"init": "gradient"}, InputError, "give init=gradient_init"),
    "path": ({"layers_path": "model.blocks"}, InputError, "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_leave_the_model_alone(case: str) -> None:
    options, error, match = BAD[case]
    model = LLAMA.build()
    modules = list(model.modules())
    with pytest.raises(error, match=match):
        add_adapters(model, **{"layers": [0, 2], "rank": 4, **options})
    assert list(model.modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "_stiefel_adapters")


def without_one_up_proj() -> Any:
    """A model whose layers are not alike, as those of hybrid models."""
    model = LLAMA.build()
    model.model.layers[1].mlp.up_proj = nn.Identity()
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], None])
def test_experts_that_get_no_adapter_are_logged(targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    config = transformers.MixtralConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **sizes)
    add_adapters(transformers.MixtralForCausalLM(config), layers=None, rank=2, target_modules=targets)
    told = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    kept = "mlp.experts.gate_up_proj, mlp.experts.down_proj"
    expected = [f"no adapter can be put on experts that are kept as one tensor: {kept}"]
    if targets is None:
        expected.insert(
            0,
            "no default target modules are known for layers 0-1, of which all linear maps are taken: "
            "q_proj, k_proj, v_proj, o_proj (target_modules names others)",
        )
    assert told == ([] if targets == ["q_proj"] else expected)


def test_defaults_of_a_layer_do_not_depend_on_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """A layer that no default is known for has adapters on all its linears, beside others on which they are known."""
    every = {i: add_adapters(without_one_up_proj(), layers=[i], rank=2) for i in range(3)}
    assert every[0] == names([0]) and every[2] == names([2])
    odd = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert every[1] == names([1], (*odd, "mlp.gate_proj", "mlp.down_proj"))
    caplog.clear()
    assert add_adapters(without_one_up_proj(), layers=None, rank=2) == every[0] + every[1] + every[2]
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith("no default target modules are known for layers 1, of which all linear maps are taken: q_")


def test_linears_that_cannot_have_an_adapter_are_left_out_of_all(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=4, time_step_rank=4)
    for targets in ("all-linear", None):
        caplog.clear()
        added = add_adapters(transformers.MambaForCausalLM(config), layers=None, rank=2, target_modules=targets)
        assert added == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
        told = [r.getMessage() for r in caplog.records if r.name == "stiefel_lora" and r.levelno == logging.WARNING]
        assert "mixer.dt_proj" in told[0] and told[0].endswith("where it should call it; it is left out")
        assert len(told) == (1 if targets else 2)


def test_a_target_that_only_some_layers_have_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    targets = ["up_proj", "layers.1.mlp.down_proj", "v_proj"]
    for layers, where in ((None, "in layers 0, 2 of 3 only"), ([1, 0], "in layers 0 of 2 only"), ([1], "in none")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="stiefel_lora"):
            added = add_adapters(without_one_up_proj(), layers=layers, rank=2, target_modules=targets)
        stacks = {i: {"self_attn.v_proj", "mlp.down_proj" if i == 1 else "mlp.up_proj"} for i in layers or range(3)}
        assert set(added) == {f"model.layers.{i}.{name}" for i, names in stacks.items() for name in names}
        # What matched is logged, and what did not; a target that names its layer is not missed elsewhere.
        warning, info = caplog.records
        assert (warning.levelname, info.levelname) == ("WARNING", "INFO")
        assert warning.getMessage().startswith(f"target module 'up_proj' matches {where}")
        assert info.getMessage() == f"adapter 'default' is on {describe(added)}"


def test_a_named_layer_holds_one_target_at_least() -> None:
    model = without_one_up_proj()
    with pytest.raises(
        InputError,
        match="no target module is in layer 1 of 'model.layers', which has q_proj, k_proj, v_proj, o_proj, gate_proj",
    ):
        add_adapters(model, layers=[0, 1], rank=2, target_modules=["up_proj"])
    with pytest.raises(InputError, match="'upp_proj' matches nothing: the layers have q_proj, .*, up_proj, down_proj$"):
        add_adapters(model, layers=[0], rank=2, target_modules=["up_proj", "upp_proj"])
    assert add_adapters(model, layers=[0], rank=2, target_modules=["up_proj"]) == ["model.layers.0.mlp.up_proj"]


class Hybrid(nn.Module):
    """Three layers of one linear each, of which the second has no other name than "conv", and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(4, 4)}) for n in ("q_proj", "conv", "q_proj")])
        self.others = nn.ModuleList([nn.ModuleDict({"qkv": nn.Linear(4, 4)}) for _ in range(2)])
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in [*self.blocks, *self.others]:
            # The layer without a target has by far the largest gradients.
            x = x + sum((100 * m(x / 100) if n == "conv" else 0.01 * m(x)) for n, m in block.items())
        return {"loss": self.head(x).square().mean()}


def test_layers_without_a_target_are_not_chosen() -> None:
    model, targets = Hybrid(), ["q_proj"]
    batches = [{"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}]
    assert fisher_select(model, batches, budget=1, progress=False) == [1]
    layers, starts = select_and_start(model, batches, rank=2, budget=1, target_modules=targets, progress=False)
    assert layers == fisher_select(model, batches, budget=1, modules=targets, progress=False)
    assert add_adapters(model, layers=layers, rank=2, target_modules=targets, init=starts) == list(starts)


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_layers_with_nothing_to_adapt_are_not_chosen(targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Hybrid()
    model.blocks[1]["conv"] = nn.Linear(4, 1)  # of rank one as it is
    batches = [{"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}]
    where: Any = {"rank": 2, "target_modules": targets, "layers_path": "blocks"}
    assert fisher_select(model, batches, budget=1, layers="blocks", progress=False) == [1]
    layers, starts = select_and_start(model, batches, budget=1, **where, progress=False)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == (targets is None), messages
    assert add_adapters(model, layers=layers, **where, init=starts) == list(starts)


def test_another_list_of_layers_is_named() -> None:
    message = r"have q_proj, conv; others.0.qkv, others.1.qkv is in another list of layers: layers_path='others' takes"
    with pytest.raises(InputError, match=message):
        add_adapters(Hybrid(), layers=None, rank=2, target_modules=["qkv"])
    with pytest.raises(InputError, match=rf"{message} it; head is not in them: .*insert_adapters takes it$"):
        add_adapters(Hybrid(), layers=[0], rank=2, target_modules=["qkv", "head", "q_proj"])
    assert add_adapters(Hybrid(), layers=[1], rank=2, target_modules=["qkv"], layers_path="others") == ["others.1.qkv"]


class Past(nn.Module):
    """Reads the weight of one of its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.past = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) @ self.past.weight


@pytest.mark.parametrize(
    "early",
    [
        lambda model, batches, targets: select_and_start(model, batches, rank=2, target_modules=targets),
        lambda model, batches, targets: gradient_init(model, batches, layers=[0], rank=2, target_modules=targets),
        lambda model, batches, targets: allocate_ranks(model, batches, rank=2, target_modules=targets),
        lambda model, _, targets: adaptable(model, FinetuneConfig(rank=2, target_modules=targets)),
    ],
    ids=["select_and_start", "gradient_init", "allocate_ranks", "adaptable"],
)
def test_what_cannot_have_an_adapter_is_refused_before_the_pass(early: Any) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Past(), Past()])
    batches = iter([{"x": torch.ones(2, 4)}])
    with pytest.raises(InputError, match="layers.0.past.* cannot have an adapter: Past reads its weight"):
        early(model, batches, ("used", "past"))
    assert next(batches)


class Counted(str):
    """A name that counts with what it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_matching_takes_time_in_proportion_to_the_names() -> None:
    """As many targets as linears, as `allocate_ranks` returns them for a mixture's experts."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2, device="meta") for _ in range(64)]) for _ in range(2)])
    targets = [Counted(f"layers.{i}.{j}") for i in range(2) for j in range(64)]
    for work in (
        lambda: find_targets(model, None, targets, None),
        lambda: [name for layer in find_linears(model, targets=targets).values() for name in layer],
        lambda: list(module_ranks(model, targets, 1, dict.fromkeys(targets, 2))),
    ):
        Counted.comparisons = 0
        assert work() == targets
        Counted.comparisons -= len(targets)  # those of the line above
        assert Counted.comparisons < 20 * len(targets)


def test_names_are_described_by_layer() -> None:
    inner = [f"h.{i}.{n}" for i in (0, 1, 2, 5) for n in ("attn.q", "mlp")]
    assert describe([*inner, "head", "h.6.mlp"]) == "h 0-2, 5: attn.q, mlp; h 6: mlp; head"
    assert describe(["0.1", "2.1"]) == "0, 2: 1"
