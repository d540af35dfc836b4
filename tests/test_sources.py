"""What the source of classes says: of real ones in transformers, and of small ones that differ in one thing."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from stiefel_lora._sources import read_past_forward, takes_one_argument
from stiefel_lora.adapters import add_adapters, insert_adapters
from stiefel_lora.errors import InputError
from stiefel_lora.layer import StiefelLoRALinear

MAMBA = {"out_proj", "x_proj", "dt_proj"}


@pytest.mark.parametrize(
    ("family", "name", "linears"),
    [
        ("wavlm", "WavLMAttention", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("mamba", "MambaMixer", MAMBA),
        ("falcon_mamba", "FalconMambaMixer", MAMBA),
        ("mamba2", "Mamba2Mixer", {"out_proj"}),
        ("bamba", "BambaMixer", {"out_proj"}),
        ("falcon_h1", "FalconH1Mixer", {"out_proj"}),
        ("granitemoehybrid", "GraniteMoeHybridMambaLayer", {"out_proj"}),
        ("nemotron_h", "NemotronHMamba2Mixer", {"out_proj"}),
        ("zamba2", "Zamba2MambaMixer", {"out_proj"}),
        ("gemma3n", "Gemma3nTextAltUp", {"correction_coefs"}),
        # In use they call their linears; what they do with a weight besides is for other settings or for a check.
        ("bloom", "BloomMLP", set()),
        ("bloom", "BloomAttention", set()),
        ("deberta", "DisentangledSelfAttention", set()),
        ("t5", "T5DenseActDense", set()),
        ("llama", "LlamaAttention", set()),
    ],
)
def test_linears_whose_weights_are_read(family: str, name: str, linears: set[str]) -> None:
    cls = getattr(pytest.importorskip(f"transformers.models.{family}.modeling_{family}"), name)
    if family == "gemma3n" and "correction_coefs.weight.data" in inspect.getsource(cls.correct):
        pytest.skip("before transformers 5.20 it is called in training too")
    everything = MAMBA | {"q_proj", "k_proj", "v_proj", "in_proj", "dense", "dense_4h_to_h", "wi", "wo"}
    everything |= {"correction_coefs", "prediction_coefs", "modality_router"}
    assert read_past_forward(cls) & everything == linears


class Reads(nn.Module):
    """Has a linear for each thing that may be done with one."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "handed_on", "asked", "read", "both", "trained"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype))
        x = nn.Sequential(self.handed_on)(x) + self.handed_on.weight.sum()
        x = x * self.asked.weight.shape[0] if isinstance(self.asked.weight, Tensor) else x
        x = F.linear(x, self.read.weight, self.read.bias)
        x = self.both(x) if len(x) < 10 else F.linear(x, self.both.weight)
        if self.training and len(x) > 1:
            return x @ self.trained.weight.T
        return self.trained(x)


class Inherits(Reads):
    """Overrides what reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(self.read(x))


def test_what_counts_as_reading() -> None:
    assert read_past_forward(Reads) == {"read", "trained"}
    assert read_past_forward(Inherits) == set()
    no_file: dict[str, Any] = {}
    exec("from torch import nn\nclass M(nn.Module):\n def forward(self, x): return x @ self.p.weight", no_file)  # noqa: S102
    assert read_past_forward(no_file["M"]) == set()


def test_a_model_that_never_calls_its_linears_is_refused_with_its_names() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions: dict[str, Any] = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,)}
    convolutions |= {"num_feat_extract_layers": 1, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    model = transformers.WavLMModel(transformers.WavLMConfig(**sizes, intermediate_size=24, **convolutions))
    message = "layers.0.attention.v_proj, .*layers.1.attention.q_proj cannot have an adapter: WavLMAttention reads its"
    with pytest.raises(InputError, match=message):
        add_adapters(model, layers=None, rank=2, target_modules=["q_proj", "v_proj"])
    assert all(p.requires_grad for p in model.parameters())
    # The rest of the same layers can.
    assert len(add_adapters(model, layers=None, rank=2, target_modules=["intermediate_dense"])) == 2


class Needy(nn.Linear):
    """Needs two arguments."""

    def forward(self, x: Tensor, which: int) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Generous(nn.Linear):
    """Takes more, but does not need it."""

    def forward(self, x: Tensor, scale: float = 1.0, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


def test_a_linear_that_needs_more_than_the_input_is_refused() -> None:
    assert not takes_one_argument(Needy)
    with pytest.raises(TypeError, match="the base Needy is more than a linear map: its forward needs other arguments"):
        StiefelLoRALinear(Needy(4, 4), rank=2)
    model = nn.Sequential(Needy(4, 4))
    with pytest.raises(TypeError, match="0: the base"):
        insert_adapters(model, {"0": {"rank": 2}})
    assert all(p.requires_grad for p in model.parameters())


def test_linears_that_may_take_more_are_not() -> None:
    assert takes_one_argument(Generous) and takes_one_argument(nn.Linear)
    assert StiefelLoRALinear(Generous(4, 4), rank=2)(torch.ones(1, 4)).shape == (1, 4)


def test_iberts_linears_which_return_two_values_are_none() -> None:
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = transformers.IBertModel(transformers.IBertConfig(**sizes, num_hidden_layers=1))
    with pytest.raises(InputError, match="IBertModel has no ModuleList or Sequential of blocks with linear modules"):
        add_adapters(model, layers=None, rank=2)
