"""Tiny, randomly initialised models of real classes, each with a batch to train it on.

``FAMILIES`` maps a name to a `Family`; ``build()`` gives a fresh seeded model in evaluation mode and
``batch(n, length)`` a batch with labels. Configurations are as small as the classes allow; the classes are real.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 97

# Grouped-query attention and a feed-forward width that is no multiple of the hidden size, so that a transposed or
# swapped shape cannot go unnoticed.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "num_labels": 5,
}


@dataclass(frozen=True)
class Family:
    """A kind of model: how to build one, how to make a batch for it, and what its layers look like."""

    build: Callable[[], Any]
    batch: Callable[[int, int], dict[str, Tensor]]
    layers: str  # qualified name of the list of layers
    linears: tuple[str, ...]  # names of the linear maps inside the first layer
    n_layers: int = 3


def _hf(model: str, config: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**options)
        return getattr(transformers, model)(settings).eval()

    return build


def _tokens(n: int, length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def causal_batch(n: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Make a batch for a causal language model; row i is padded on the right by i positions (labels -100)."""
    ids = _tokens(n, length, seed=1)
    mask = torch.ones_like(ids)
    for row in range(n):
        mask[row, length - min(row, length - 3) :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def masked_batch(n: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Make a batch for a masked language model; row i asks for i + 1 tokens."""
    batch = causal_batch(n, length)
    keep = torch.arange(length)[None] <= torch.arange(n)[:, None]
    return {**batch, "labels": batch["labels"].masked_fill(~keep, -100)}


def class_batch(n: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Make a batch for a sequence classifier with five classes."""
    batch = causal_batch(n, length)
    return {**batch, "labels": torch.arange(n) % 5}


def image_batch(n: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Make a batch of 16 x 16 images with five classes; ``length`` is not used."""
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.arange(n) % 5}


class Loss(nn.Module):
    """Give a plain torch model the interface of a model with a loss: ``model(x=..., y=...)`` returns {"loss": ...}."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the mean squared error over all entries, as a mapping with the key "loss"."""
        out = self.net(x)
        return {"loss": nn.functional.mse_loss(out, y), "out": out}


def plain_batch(n: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Make inputs and targets of width 12 for the plain torch stacks."""
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(n, length, 12, generator=generator) for key in ("x", "y")}


def _sequential() -> nn.Module:
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))  # noqa: E731
    return Loss(nn.Sequential(block(), block(), block())).eval()


def _transformer_encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.1, batch_first=True, norm_first=True)
    return Loss(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).eval()


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# Before 2.8 torch breaks a compiled graph at every parameter of a class of its own.
FULL_GRAPH = torch.__version__ >= "2.8"  # compared as versions, not as strings
# transformers gave it other names in the course of version 5.
OLD_VIT = hasattr(transformers.models.vit.modeling_vit, "ViTEncoder")
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 56}
_VIT = {k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")}
_NEOX = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
_OPT = {k: v for k, v in _NEOX.items() if k != "intermediate_size"}
_PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Family] = {
    "llama": Family(_hf("LlamaForCausalLM", "LlamaConfig", **DECODER), causal_batch, "model.layers", _GATED),
    "llama-tied": Family(
        _hf("LlamaForCausalLM", "LlamaConfig", **DECODER, tie_word_embeddings=True),
        causal_batch,
        "model.layers",
        _GATED,
    ),
    "qwen3": Family(_hf("Qwen3ForCausalLM", "Qwen3Config", **DECODER), causal_batch, "model.layers", _GATED),
    "mistral": Family(
        _hf("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=4), causal_batch, "model.layers", _GATED
    ),
    "gemma": Family(_hf("GemmaForCausalLM", "GemmaConfig", **DECODER), causal_batch, "model.layers", _GATED),
    "gemma2": Family(
        _hf("Gemma2ForCausalLM", "Gemma2Config", **DECODER, sliding_window=4, layer_types=_PATTERN),
        causal_batch,
        "model.layers",
        _GATED,
    ),
    "gemma3": Family(
        _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, sliding_window=4, layer_types=_PATTERN),
        causal_batch,
        "model.layers",
        _GATED,
    ),
    "phi": Family(
        _hf("PhiForCausalLM", "PhiConfig", **{k: v for k, v in DECODER.items() if k != "head_dim"}),
        causal_batch,
        "model.layers",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    ),
    "gpt2": Family(
        _hf("GPT2LMHeadModel", "GPT2Config", **_GPT2, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        causal_batch,
        "transformer.h",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt-neox": Family(
        _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_NEOX, bos_token_id=1, eos_token_id=2),
        causal_batch,
        "gpt_neox.layers",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "opt": Family(
        _hf("OPTForCausalLM", "OPTConfig", **_OPT, ffn_dim=56, word_embed_proj_dim=32),
        causal_batch,
        "model.decoder.layers",
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
    ),
    "bert": Family(_hf("BertForMaskedLM", "BertConfig", **ENCODER), masked_batch, "bert.encoder.layer", _BERT),
    "roberta": Family(
        _hf("RobertaForSequenceClassification", "RobertaConfig", **ENCODER, pad_token_id=1),
        class_batch,
        "roberta.encoder.layer",
        _BERT,
    ),
    "vit": Family(
        _hf("ViTForImageClassification", "ViTConfig", **_VIT, image_size=16, patch_size=8),
        image_batch,
        "vit.encoder.layer" if OLD_VIT else "vit.layers",
        tuple(name.replace(".self.", ".attention.") for name in _BERT)
        if OLD_VIT
        else ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    ),
    "sequential": Family(_sequential, plain_batch, "net", ("1", "3")),
    "transformer-encoder": Family(_transformer_encoder, plain_batch, "net.layers", ("linear1", "linear2")),
}


def side_by_side(*sizes: float) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return layers side by side with gradients of these sizes, and fifty batches of noisy samples."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in sizes])

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            outs = [layer(part) for layer, part in zip(self.layers, x.unbind(1), strict=True)]
            return {"loss": sum(size * (o * y).sum() for size, o in zip(sizes, outs, strict=True)) / len(x)}

    generator = torch.Generator().manual_seed(0)
    shapes = ("x", (4, len(sizes), 4)), ("y", (4, 4))
    return Branches(), [{name: torch.randn(shape, generator=generator) for name, shape in shapes} for _ in range(50)]
