"""Batches of every structure are taken apart into the samples that they hold, and score as these do one by one."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import BatchEncoding, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from stiefel_lora._batches import batch_size, sample, take, to_device
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import fisher_scores
from stiefel_lora.initialisation import gradient_init
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


def size_of(batch: Any, *losses: int) -> int:
    """The size of a batch whose loss has this shape."""
    return batch_size(batch, lambda: losses)


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
    assert size_of(batch) == 4
    one = sample(batch, 2, 4)
    assert one["texts"] == ["c"] and one["name"] == "four" and one["scale"] is batch["scale"]
    assert one["position_ids"].shape == (3, 1, 7) and one["labels"].shape == (1, 7)
    assert one["attention_mask"] is batch["attention_mask"] and one["positions"] is batch["positions"]
    assert len(one["past"]) == 3 and all(entry.shape == (1, 2) for pair in one["past"] for entry in pair)
    assert size_of({"texts": ["a", "b"]}) == 2 and size_of({"n": 3}) == 1
    images = {"images": list(torch.zeros(3, 3, 8, 8)), "ids": torch.zeros(3, 4)}
    assert [image.shape for image in take(images, slice(0, 2), 3)["images"]] == [(3, 8, 8)] * 2
    moved = to_device(batch, torch.device("meta"))
    assert moved["past"][0][0].is_meta and moved["texts"] == batch["texts"]


class Attributes(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Frozen(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("frozen")


@pytest.mark.parametrize("kind", [BatchEncoding, Attributes, OrderedDict])
def test_a_batch_reaches_the_loss_as_the_class_that_it_has(kind: type[Any]) -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    batch = kind({"x": rows, "name": "three"})
    for new, expected in ((take(batch, slice(1, 2), 3), rows[1:2]), (to_device(batch, torch.device("cpu")), rows)):
        assert type(new) is kind
        assert torch.equal(new["x"], expected) and new["name"] == "three"
        if kind is not OrderedDict:
            assert torch.equal(new.x, expected)
    assert batch["x"] is rows


@pytest.mark.parametrize("kind", [Frozen, MappingProxyType])
def test_a_batch_that_cannot_be_changed_reaches_the_loss_as_a_dict(kind: Any) -> None:
    new = take(kind({"x": torch.arange(3)}), slice(1, 2), 3)
    assert new == {"x": torch.tensor([1])} and type(new) is dict


# How samples of different length are put together in lists, and what takes them apart again.
LISTS: dict[str, tuple[Callable[[list[Tensor]], Any], Callable[[Any], list[Tensor]]]] = {
    "list in a mapping": (lambda rows: {"rows": rows}, lambda b: b["rows"]),
    "list": (lambda rows: rows, lambda b: b),
    "rows of one in a mapping": (lambda rows: {"rows": [r[None] for r in rows]}, lambda b: [r[0] for r in b["rows"]]),
    "list of mappings": (lambda rows: [{"x": row, "n": len(row)} for row in rows], lambda b: [one["x"] for one in b]),
    "list of tuples": (lambda rows: [(row, len(row)) for row in rows], lambda b: [row for row, _ in b]),
    "two lists": (lambda rows: {"x": rows, "n": [len(row) for row in rows]}, lambda b: b["x"]),
}


@pytest.mark.parametrize("form", ["each", "mean", "mean over positions"])
@pytest.mark.parametrize("structure", LISTS)
def test_a_list_with_one_entry_a_sample_is_scored_by_its_samples(structure: str, form: str) -> None:
    together, apart = LISTS[structure]
    net = FAMILIES["sequential"].build().double().net
    rows = [torch.randn(n, 12, dtype=torch.float64) for n in (6, 2, 5, 3)]

    def loss_fn(net: nn.Module, batch: Any) -> Tensor:
        positions = [net(row[None])[0].square().mean(1) for row in apart(batch)]
        each = torch.stack([losses.mean() for losses in positions])
        return {"each": each, "mean": each.mean(), "mean over positions": torch.cat(positions).mean()}[form]

    samples = [together([row]) for row in rows]
    expected = reference.squared_norms(net, linear_weights(net), samples, loss_fn).mean(0)
    scores = fisher_scores(net, [together(rows)], granularity="module", loss_fn=loss_fn, progress=False)
    assert scores.n_samples == 4
    torch.testing.assert_close(torch.tensor(scores.scores).double(), expected.double(), rtol=1e-6, atol=0)
    assert fisher_scores(net, [together(rows)], loss_fn=loss_fn, max_samples=3, progress=False).n_samples == 3


def test_where_the_structure_of_a_batch_leaves_its_size_open_the_losses_tell_it() -> None:
    rows = lambda *lengths: [torch.zeros(n, 3) for n in lengths]  # noqa: E731
    image, sequence = torch.zeros(3, 8, 8), torch.zeros(7, 4, 8)
    sure: list[tuple[Any, int]] = [
        ({"x": [image] * 5, "texts": list("abcde")}, 5),  # the texts tell that images are entries
        ({"x": [image] * 5, "names": list("ab"), "y": torch.zeros(5)}, 5),
        ({"pair": [torch.zeros(4, 2), torch.zeros(4)], "names": ["a", "b"]}, 4),
        (list("abc"), 3),
        ([list("abc"), [1, 2, 3]], 3),
        (Record(torch.zeros(4, 2), torch.zeros(4)), 4),
    ]
    for batch, size in sure:
        assert size_of(batch) == size
    for batch, sizes in (
        ({"x": [image] * 5}, (3, 5)),
        ({"rows": rows(6)}, (1, 6)),
        ([(image, 1), (image, 2)], (2, 3)),
        ((sequence, torch.zeros(4)), (4, 7)),
        ((sequence[:, :1], torch.zeros(1)), (1, 7)),
        ((torch.zeros(6, 3), torch.zeros(2, 9)), (1, 2, 6)),  # a graph: nodes and edges
    ):
        for n in sizes:
            assert size_of(batch, n) == n
        with pytest.raises(InputError, match="a batch may have .* one number; the batch must be the first dimension"):
            size_of(batch)
        with pytest.raises(InputError, match=r"its loss has the shape \(9,\)"):
            size_of(batch, 9)
    # What torch's collate function makes of pairs and of single tensors, unless there is a loss for each entry.
    for batch in (rows(5, 5), [rows(5, 5), rows(5, 5)]):
        assert [size_of(batch, *shape) for shape in ((), (5,), (2,), (1,))] == [5, 5, 2, 5]
        one, other = take(batch, slice(1, 2), 2), take(batch, slice(1, 3), 5)
        assert (len(one), len(other)) == (1, 2)


class SequenceFirst(nn.Module):
    """Three layers that read (T, batch, 8) in order, and a class for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.GRU(8, 8)]) for _ in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for up, mix in self.layers:
            x = mix(torch.tanh(up(x)))[0]
        return self.head(x.mean(0))


def test_sequences_before_the_batch_are_refused_or_scored_one_by_one() -> None:
    model, x, y = SequenceFirst().double(), torch.randn(7, 4, 8, dtype=torch.float64), torch.randint(3, (4,))
    loss_fn = lambda model, b: cross_entropy(model(b[0]), b[1])  # noqa: E731
    samples = [(x[:, n : n + 1], y[n : n + 1]) for n in range(4)]
    for batch in ((x, y), [x, y]):
        with pytest.raises(InputError, match="4 or 7 samples, .* the batch must be the first dimension"):
            fisher_scores(model, [batch], loss_fn=loss_fn, progress=False)
    expected = reference.squared_norms(model, linear_weights(model), samples, loss_fn).mean(0)
    got = by_module(model, samples, loss_fn=lambda model, b: loss_fn(model, b)[None])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_a_row_of_a_data_set_is_refused_and_the_way_out_named() -> None:
    model, rows = FAMILIES["llama"].build(), [{"input_ids": row, "labels": row} for row in torch.randint(97, (2, 8))]
    for call in (
        lambda: fisher_scores(model, rows, progress=False),
        lambda: gradient_init(model, rows, layers=[0], rank=2),
    ):
        with pytest.raises(InputError, match=r"shape \(8,\) are a single row; .* DataLoader, or give row\[None\]"):
            call()


def test_what_is_no_entry_for_each_sample_is_named_in_tuples_too() -> None:
    model, ids, shared = FAMILIES["llama"].build(), torch.randint(97, (3, 8)), torch.zeros(4)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]["input_ids"]) == 1:
            raise ValueError("needs all four")
        return model(**batch[0], labels=batch[0]["input_ids"]).loss

    with pytest.raises(InputError, match=r"if entry 1 is not the same for all of them; .* \(needs all four\)"):
        fisher_scores(model, [({"input_ids": ids}, shared)], loss_fn=loss_fn, progress=False)


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
    # Of a compiled model the logits are not deferred; transformers takes the loss in float32.
    torch.testing.assert_close(by_module(model, [batch]), expected, rtol=1e-5 if whole else 0, atol=0)
