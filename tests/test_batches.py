"""Batches of every structure are taken apart into the samples that they hold, and score as these do one by one."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from stiefel_lora._batches import batch_size, sample, take, to_device
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import fisher_scores
from tests.models import FAMILIES, causal_batch, plain_batch
from tests.reference import fisher as reference
from tests.test_fisher import by_module, linear_weights

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor


def each(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).square().mean((1, 2))


# How a batch of (x, y) is put together, and what takes it apart again.
STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "named tuple": (Pair, lambda b: b),
    "dataclass": (Record, lambda b: (b.x, b.y)),
    "mapping in a mapping": (lambda x, y: {"n": 2, "inputs": {"x": x, "y": y}}, lambda b: tuple(b["inputs"].values())),
    "inputs and target": (lambda x, y: ({"x": x}, y), lambda b: (b[0]["x"], b[1])),
    "tuple in a mapping": (lambda x, y: {"both": (x, y)}, lambda b: b["both"]),
    "collated": (
        lambda x, y: default_collate([((a, a.sum()), (b, b.sum())) for a, b in zip(x, y, strict=True)]),
        lambda b: (b[0][0], b[1][0]),
    ),
    "images in a list": (lambda x, y: {"images": list(x), "y": y}, lambda b: (torch.stack(b["images"]), b["y"])),
    "with a number": (lambda x, y: {"n": torch.tensor(3.0), "x": x, "y": y}, lambda b: (b["x"], b["y"])),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_structure_is_scored_by_its_samples(structure: str, size: int) -> None:
    together, apart = STRUCTURES[structure]
    net = FAMILIES["sequential"].build().double().net
    x, y = (v.double() for v in plain_batch(size, 5).values())
    samples = [(x[n : n + 1], y[n : n + 1]) for n in range(size)]
    expected = reference.squared_norms(net, linear_weights(net), samples, lambda net, b: each(net, *b)).mean(0)
    options = {"loss_fn": lambda net, batch: each(net, *apart(batch)).mean(), "progress": False}
    scores = fisher_scores(net, [together(x, y)], granularity="module", **options)
    assert scores.n_samples == size
    torch.testing.assert_close(torch.tensor(scores.scores).double(), expected, rtol=1e-6, atol=0)
    limited = fisher_scores(net, [together(x, y)], max_samples=1, **options)
    assert limited.n_samples == 1


def test_what_has_no_entry_for_each_sample_stays_whole() -> None:
    batch = {
        "attention_mask": torch.ones(1, 1, 7, 7),
        "labels": torch.zeros(4, 7),
        "positions": torch.arange(7)[None],
        "position_ids": torch.zeros(3, 4, 7),
        "texts": ["a", "b", "c", "d"],
        "past": ((torch.zeros(4, 2), torch.ones(4, 2)),) * 3,
        "scale": torch.tensor(2.0),
        "name": "four",
    }
    assert batch_size(batch) == 4
    one = sample(batch, 2, 4)
    assert one["texts"] == ["c"] and one["name"] == "four" and one["scale"] is batch["scale"]
    assert one["position_ids"].shape == (3, 1, 7) and one["labels"].shape == (1, 7)
    assert one["attention_mask"] is batch["attention_mask"] and one["positions"] is batch["positions"]
    assert len(one["past"]) == 3 and all(entry.shape == (1, 2) for pair in one["past"] for entry in pair)
    assert batch_size({"texts": ["a", "b"]}) == 2 and batch_size({"n": 3}) == 1
    images = {"images": list(torch.zeros(3, 3, 8, 8)), "ids": torch.zeros(3, 4)}
    assert [image.shape for image in take(images, slice(0, 2), 3)["images"]] == [(3, 8, 8)] * 2
    moved = to_device(batch, torch.device("meta"))
    assert moved["past"][0][0].is_meta and moved["texts"] == batch["texts"]


def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = token_losses(model, batch)
    mask = batch["mask"][:, 1:]
    return (losses * mask).sum() / mask.sum()


def weighted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (token_losses(model, batch).mean(1) * batch["weight"]).sum() / batch["weight"].sum()


def smoothed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits, wanted = model(batch["input_ids"]).logits[:, :-1], batch["input_ids"][:, 1:]
    return cross_entropy(logits.transpose(1, 2), wanted, ignore_index=0, label_smoothing=0.1)


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"]).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")


@pytest.mark.parametrize("loss_fn", [masked, weighted, smoothed])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_first_batch_of_equal_weights_says_nothing_about_the_next(loss_fn: Any, dtype: torch.dtype) -> None:
    model = FAMILIES["llama"].build().double()
    ids = causal_batch(8, 9)["input_ids"].clamp_min(1)
    mask, weight = torch.ones(8, 9, dtype=dtype), torch.ones(8)
    for n, length in ((4, 4), (5, 3), (6, 8)):
        mask[n, length:] = 0
        ids[n, length:] = 0
        weight[n] = length / 4
    batches = [{"input_ids": ids[i : i + 4], "mask": mask[i : i + 4], "weight": weight[i : i + 4]} for i in (0, 4)]
    singles = [sample(batch, n, 4) for batch in batches for n in range(4)]
    expected = reference.squared_norms(model, linear_weights(model), singles, loss_fn).mean(0)
    for order in (batches, batches[::-1]):
        got = by_module(model, order, loss_fn=loss_fn)
        torch.testing.assert_close(got, expected.double(), rtol=1e-6, atol=0)


class Opaque:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def test_a_batch_that_cannot_be_looked_into_needs_a_loss_for_each_sample() -> None:
    net = FAMILIES["sequential"].build().double().net
    x, y = (v.double() for v in plain_batch(1, 5).values())
    got = by_module(net, [Opaque(x, y)], loss_fn=lambda net, b: each(net, b.x, b.y))
    assert torch.equal(got, by_module(net, [(x, y)], loss_fn=lambda net, b: each(net, *b)))
    with pytest.raises(InputError, match=r"a batch of type Opaque has cannot be told; .* of shape \(1,\) for a batch"):
        by_module(net, [Opaque(x, y)], loss_fn=lambda net, b: each(net, b.x, b.y).mean())


def test_images_of_many_patches_are_scored_alone_and_named_otherwise() -> None:
    torch.manual_seed(0)
    text = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 2, "mlp_ratio": 2}
    marks = {"image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks))
    ids = torch.randint(30, (3, 9))
    positions = torch.arange(9).expand(3, 3, 9).contiguous()
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    options = {"layers": "model.language_model.layers", "progress": False}
    scores = fisher_scores(model, [batch], **options)
    alone = fisher_scores(model, [{**sample(batch, n, 3)} for n in range(3)], **options)
    assert scores.n_samples == 3 and scores.scores == pytest.approx(alone.scores, rel=1e-5)
    ids[:, 2:6] = 39
    images = {
        "input_ids": ids,
        "labels": ids,
        "mm_token_type_ids": (ids == 39).int(),
        "pixel_values": torch.randn(48, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
    }
    one = {key: value[: len(value) // 3] for key, value in images.items()}
    assert fisher_scores(model, [one], **options).n_samples == 1
    with pytest.raises(InputError, match="if pixel_values is not the same for all of them; give batches of one sample"):
        fisher_scores(model, [images], **options)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_modules_are_scored_as_they_are_written(whole: bool) -> None:
    model, batch = FAMILIES["llama"].build(), causal_batch(3, 7)
    expected = by_module(model, [batch])
    if whole:
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    assert torch.equal(by_module(model, [batch]), expected)
