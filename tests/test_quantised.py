"""Real quantised linears, where their libraries are installed; tests/test_adapters.py has a stand-in for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import add_adapters, remove_adapters
from stiefel_lora.checkpoint import load_adapter, save_adapter
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import fisher_scores, fisher_select
from stiefel_lora.layer import StiefelLoRALinear
from stiefel_lora.merging import merge_adapters
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


class Wrapped(torch.Tensor):
    """A weight like torchao's: it passes for bfloat16, has no storage of its own, and knows only a few functions."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].inner.float())
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def test_weights_without_storage() -> None:
    """Select, adapt and train where torchao's weights would be; this one needs no library."""
    model, plain, batch = LLAMA.build(), LLAMA.build(), LLAMA.batch(3, 7)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(Wrapped(layer.mlp.up_proj.weight.detach()), requires_grad=False)
    scores = [fisher_scores(m, [batch], progress=False).scores for m in (model, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)  # the same float32 sums
    for m in (model, plain):
        add_adapters(m, layers=[0, 2], rank=4, generator=torch.Generator().manual_seed(0))
        optimizer = RiemannianAdam([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            m(**batch).loss.backward()
            optimizer.step()
    for name, layer in adapter_layers(plain).items():
        assert torch.equal(adapter_layers(model)[name].lora_A, layer.lora_A)
    with pytest.raises(InputError, match=r"Wrapped|quantised"):
        merge_adapters(model)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        return linear(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None


class OnlyForward(nn.Module):
    """A quantised linear as bitsandbytes' 4-bit one is in evaluation mode on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.hidden = (linear.requires_grad_(False),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NoBackward.apply(x, self.hidden[0])


def test_a_linear_without_a_backward_pass_cannot_be_scored() -> None:
    model = LLAMA.build()
    model.model.layers[1].self_attn.o_proj = OnlyForward(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(InputError, match=r"no gradient goes back through an operation behind a linear map"):
        fisher_scores(model, [LLAMA.batch(3, 7)], progress=False)


class Detached(nn.Linear):
    """A linear whose output has no graph, as that of torchao's with quantised inputs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).detach()


def test_a_linear_that_cuts_the_graph_is_named() -> None:
    """A residual path around it brings gradients to what is before it, so that no gradient is missing."""
    model, batch = LLAMA.build(), LLAMA.batch(3, 7)
    attention = model.model.layers[1].self_attn
    attention.o_proj = Detached(attention.o_proj.in_features, attention.o_proj.out_features)
    with pytest.raises(InputError, match=r"goes back through model\.layers\.1\.self_attn\.o_proj: it has no backward"):
        fisher_scores(model, [batch], progress=False)
    add_adapters(model, layers=[1], target_modules=["o_proj"], rank=2)
    model(**batch)  # nothing before it is trained, nor asks for a gradient
    model.enable_input_require_grads()
    with pytest.raises(InputError, match="no gradient goes back through the base Detached"):
        model.train()(**batch)
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)


@pytest.mark.parametrize("kind", ["bitsandbytes-4bit", "torchao-int8"])
def test_a_base_that_transformers_quantises(kind: str, tmp_path: Path) -> None:
    """Adapt and train over a quantised base; bitsandbytes' can be dequantised under the adapter and merged."""
    # Widths that 4-bit blocks of 64 divide.
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    settings: Any
    if kind == "torchao-int8":
        settings = transformers.TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype="bfloat16")
    batch = LLAMA.batch(3, 7)
    layers = [0, 2]
    if kind == "torchao-int8":  # on a CPU bitsandbytes' 4-bit linears have no backward pass in evaluation mode
        layers = fisher_select(model, [batch], budget=2, progress=False)
    add_adapters(model, layers=layers, rank=4)
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    with pytest.raises(InputError, match="quantised"):
        merge_adapters(model)
    if kind == "torchao-int8":
        return  # transformers cannot dequantise it
    with torch.no_grad():
        # In evaluation mode on a CPU bitsandbytes repacks the weights, and transformers then dequantises them wrongly.
        trained = model.train()(**batch).logits
    model.eval().dequantize()
    merged = merge_adapters(model)
    with torch.no_grad():
        # Logits of size 2 in bf16, whose eps is 2^-8.
        torch.testing.assert_close(merged(**batch).logits, trained, rtol=0, atol=0.03)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="bfloat16")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, merged(**batch).logits)


def test_numbers_of_8_bits_count_as_quantised() -> None:
    """Such a weight has a scale of its own beside it, so that nothing can be merged into it."""
    model = LLAMA.build()
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer = StiefelLoRALinear(linear, 2)
    assert layer.lora_A.dtype == torch.float32
    with pytest.raises(InputError, match="it is quantised"):
        layer.merge()


def test_linears_that_hold_buffers_only_take_adapters() -> None:
    """As those of GPTQ and AWQ do."""

    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("packed", linear.weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.packed)

    model, batch = LLAMA.build(), LLAMA.batch(3, 7)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    before = model(**batch).logits
    names = add_adapters(model, layers=[0, 1], rank=2, target_modules=["q_proj"])
    assert torch.equal(model(**batch).logits, before)
    assert len(names) == 2
    remove_adapters(model)
    assert type(model.model.layers[0].self_attn.q_proj) is Packed
