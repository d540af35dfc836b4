"""Layers and linear maps are found by structure in every family, and what cannot be decided is refused by name."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from stiefel_lora._models import find_layers, find_linears, is_linear, linear_shape, named_linears
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import add_adapters
from stiefel_lora.convert import from_peft
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import fisher_scores
from tests.models import FAMILIES, causal_batch


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_and_linears_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    found, blocks = find_layers(model)
    assert found == family.layers
    assert len(blocks) == family.n_layers
    prefix = f"{found}.0."
    assert set(find_linears(model)[0]) == {prefix + linear for linear in family.linears}


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_vision_language_model_is_adapted_in_its_language_model(depth: int) -> None:
    """However many layers read the images."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4}
    images = CLIPVisionConfig(**sizes, num_hidden_layers=depth, image_size=16, patch_size=8)
    text = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=97)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=images, text_config=text))
    assert find_layers(model)[0] == "model.language_model.layers"
    add_adapters(model, layers=None, rank=2)
    assert all(".language_model." in name for name in adapter_layers(model))


def test_two_encoders_compete() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=8),
        text_config=CLIPTextConfig(**sizes, num_hidden_layers=3, vocab_size=97),
    )
    with pytest.raises(InputError, match="2 equally long lists of layers"):
        find_layers(CLIPModel(config))


def test_conv1d_has_its_shape_the_other_way_round() -> None:
    block = FAMILIES["gpt2"].build().transformer.h[0]
    assert linear_shape(block.attn.c_attn) == (32, 96)
    assert tuple(block.attn.c_attn.weight.shape) == (32, 96)
    assert linear_shape(nn.Linear(5, 3)) == (5, 3)


def test_what_is_no_linear_map() -> None:
    for module in (nn.Conv1d(2, 3, 1), nn.Embedding(3, 4), nn.Bilinear(2, 2, 3), nn.Sequential(nn.Linear(2, 2))):
        assert not is_linear(module)
    with pytest.raises(TypeError, match="expected a linear module, got Embedding"):
        linear_shape(nn.Embedding(3, 4))
    assert dict(named_linears(nn.MultiheadAttention(4, 2))) == {}


def test_two_equally_long_lists_are_refused_and_can_be_named() -> None:
    model = nn.ModuleDict({side: nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for side in ("left", "right")})
    with pytest.raises(InputError, match="2 equally long lists of layers: 'left' .2 x Linear., 'right'"):
        find_layers(model)
    assert find_layers(model, "right")[0] == "right"
    with pytest.raises(InputError, match="the list of layers 'middle' does not exist"):
        find_layers(model, "middle")


def test_of_equally_long_lists_the_outer_one_is_taken() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = AlbertModel(AlbertConfig(vocab_size=32, embedding_size=8, num_hidden_layers=3, **sizes))
    assert find_layers(model)[0] == "encoder.albert_layer_groups"
    assert len(add_adapters(model, layers=None, rank=2, target_modules="all-linear")) == 6
    pair = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    assert find_layers(pair)[0] == ""


def _own(forward: Callable[..., Any]) -> nn.Linear:
    """Return a linear of a class with a forward pass of its own, that counts how often it is called with data."""

    def counted(self: Any, x: Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, x)

    return type("Own", (nn.Linear,), {"forward": counted})(8, 12)


def _grouped(linear: nn.Linear, x: Tensor) -> Tensor:
    """Three blocks: rows (..., 3, 8) to (..., 3, 4)."""
    y = torch.bmm(x.reshape(-1, 3, 8).transpose(0, 1), linear.weight.view(3, 4, 8).mT)
    return y.transpose(0, 1).reshape(*x.shape[:-1], 4)


@pytest.mark.parametrize(
    ("forward", "is_map"),
    [
        (lambda linear, x: x @ linear.weight.T + linear.bias, True),
        (lambda linear, x: nn.functional.linear(x, linear.weight.sign(), linear.bias), True),
        (lambda linear, x: x @ linear.weight.T if float(x.sum()) > 0 else x @ linear.weight.T, True),  # needs data
        (lambda linear, x: (x @ linear.weight.T).topk(2, dim=1), False),
        (lambda linear, x: (x @ linear.weight.T).topk(2, dim=1).values, False),
        (_grouped, False),
    ],
)
def test_a_forward_pass_of_its_own_is_asked_what_it_makes_of_rows(forward: Callable[..., Any], is_map: bool) -> None:
    linear = _own(forward).train()
    linear.register_forward_hook(lambda *_: pytest.fail("called"))
    before = dict(vars(linear))
    assert is_linear(linear) is is_map
    assert vars(linear) == before and linear.weight.device.type == "cpu"


def test_a_mixtures_router_is_neither_scored_nor_adapted() -> None:
    """Llama 4's returns its choice along with its logits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    moe = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "pad_token_id": 0}
    model, batch = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **moe)), causal_batch(2, 7)
    scores = fisher_scores(model, [batch], granularity="module", progress=False)
    names = add_adapters(model, layers=None, rank=1, target_modules="all-linear")
    assert names == scores.names and len(names) == 14 and not any("router" in name for name in names)
    model(**batch).loss.backward()
    assert all(layer.lora_B.grad is not None for layer in adapter_layers(model).values())


@pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
def test_a_model_with_adapters_of_peft_is_refused_and_the_way_out_named() -> None:
    model, batch = FAMILIES["llama"].build(), causal_batch(2, 7)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for call in (
        lambda: fisher_scores(wrapped, [batch], progress=False),
        lambda: add_adapters(wrapped, layers=None, rank=2, target_modules="all-linear"),
        lambda: add_adapters(model, layers=None, rank=2, target_modules=["v_proj"]),
    ):
        with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj holds an adapter of PEFT; .* from_peft"):
            call()
    base = from_peft(wrapped)
    assert add_adapters(base, layers=None, rank=2, target_modules=["v_proj"])
