"""Which linears get adapters: defaults, names, layers, ranks, and what is said where they do not match."""

import logging
from typing import Any

import pytest
import transformers
from torch import nn

from stiefel_lora._targets import describe
from stiefel_lora.adapters import adapter_layers, add_adapters
from stiefel_lora.errors import InputError
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


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "target": (
        {"target_modules": ["q_proj", "query"]},
        InputError,
        "'query' matches nothing: layer 0 has q_proj, k_proj",
    ),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, InputError, "lm_head is not in them: .*insert_adapters"),
    "no target": ({"target_modules": []}, InputError, "target_modules is empty; the layers have: q_proj"),
    "string": ({"target_modules": "q_proj"}, TypeError, "sequence of names or 'all-linear', got the string 'q_proj'"),
    "layer": ({"layers": [0, 3, -4]}, InputError, "layer 3, -4 does not exist: model.layers has the layers 0 to 2"),
    "no layer": ({"layers": []}, InputError, "no layer is given: model.layers has the layers 0 to 2"),
    "twice": ({"layers": [1, -2]}, InputError, "layer 1 is given twice"),
    "a name for layers": ({"layers": "decoder.block"}, TypeError, "sequence of ints or None, got 'decoder.block'"),
    "float layer": ({"layers": [0.5]}, TypeError, "layers must be a sequence of ints"),
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


def test_a_target_must_match_in_each_named_layer(caplog: pytest.LogCaptureFixture) -> None:
    model = LLAMA.build()
    model.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(
        InputError, match="'up_proj' matches nothing: layer 1 has q_proj, k_proj, v_proj, o_proj, gate_proj"
    ):
        add_adapters(model, layers=[0, 1], rank=2, target_modules=["up_proj"])
    with caplog.at_level(logging.INFO, logger="stiefel_lora"):
        added = add_adapters(model, layers=None, rank=2, target_modules=["up_proj", "layers.1.mlp.down_proj", "v_proj"])
    assert len(added) == 6
    # What matched is logged, and what did not; a target that names its layer is not missed elsewhere.
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "target module 'up_proj' matches in layers 0, 2 of 3 only"),
        (
            "INFO",
            "adapter 'default' is on model.layers 0, 2: self_attn.v_proj, mlp.up_proj; "
            "model.layers 1: self_attn.v_proj, mlp.down_proj",
        ),
    ]


def test_names_are_described_by_layer() -> None:
    inner = [f"h.{i}.{n}" for i in (0, 1, 2, 5) for n in ("attn.q", "mlp")]
    assert describe([*inner, "head", "h.6.mlp"]) == "h 0-2, 5: attn.q, mlp; h 6: mlp; head"
    assert describe(["0.1", "2.1"]) == "0, 2: 1"
