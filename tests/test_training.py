"""The training loop on a tiny model: exact resumption, accumulation, schedule, metrics."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from stiefel_lora import allocate_ranks, report, selection, training
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.checkpoint import load_adapter, read_adapter
from stiefel_lora.config import CHECKPOINT_FILE, FinetuneConfig
from stiefel_lora.data import Dataset, load_data
from stiefel_lora.errors import InputError
from stiefel_lora.pretrained import load_pretrained
from stiefel_lora.selection import adaptable, select
from stiefel_lora.training import evaluate, finetune, learning_rate
from tests.models import FAMILIES
from tests.tiny import TEXT, save_tiny_model, tiny_run, write_jsonl


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    return tiny_run(tmp_path_factory.mktemp("data"))


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    state = read_adapter(folder / "adapter")
    return {f"{name}.{key}": t for name, factors in state.factors.items() for key, t in factors.items()}


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in metrics.items() if k not in ("seconds", "tokens_per_second")}
    return {**kept, "fisher": {k: v for k, v in (metrics["fisher"] or {}).items() if k != "seconds"}}


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam"},
        {"optimizer": "sgd"},
        {"second_moment": "element"},
        {"init": "gradient"},
        {"init": "gradient", "granularity": "module", "lr_ratio": 2.0},
        {"granularity": "direction"},
        {"granularity": "direction", "dtype": "float16", "init": "gradient"},
        {"dtype": "float16"},
        {"share_A": True, "budget": 1.0},
    ],
)
def test_a_run_that_broke_off_ends_with_the_same_bits(
    config: FinetuneConfig, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, **options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = finetune(config, whole, save_every=2)

    step, calls = training._Run._step, []

    def failing(run: Any) -> int:
        calls.append(run.step)
        if run.step == 5 and calls.count(5) == 1:
            raise RuntimeError("power cut")
        return step(run)

    monkeypatch.setattr(training._Run, "_step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(config, broken, save_every=2)
    # Scoring is in the checkpoint.
    monkeypatch.setattr(training, "select", lambda *_: pytest.fail("selected twice"))
    resumed = finetune(config, broken, save_every=2)
    assert calls == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert without_times(resumed) == without_times(expected)
    for name, tensor in adapters(whole).items():
        assert torch.equal(tensor, adapters(broken)[name]), name


def test_a_run_goes_on_with_its_own_data_and_base_alone(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = tmp_path / "text.py", save_tiny_model(tmp_path / "model")
    data.write_text(TEXT)
    config = replace(config, data=str(data), model=str(model))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Run, "train", stopped)
        finetune(config, tmp_path)
    saved = (tmp_path / CHECKPOINT_FILE).read_bytes()
    weights = (model / "model.safetensors").read_bytes()
    data.write_text(TEXT.replace("total = left + right + 7", "total = left + right + 8"))
    with pytest.raises(InputError, match="cannot resume: the data changed since it began"):
        finetune(config, tmp_path)
    network = load_pretrained(model)[0]
    network.model.layers[3].mlp.up_proj.weight.data *= 1.05
    network.save_pretrained(model)
    with pytest.raises(InputError, match="cannot resume: the base model and the data changed since it began"):
        finetune(config, tmp_path)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == saved
    data.write_text(TEXT)
    (model / "model.safetensors").write_bytes(weights)
    assert len(finetune(config, tmp_path)["loss_curve"]) == config.steps


def test_a_base_is_known_again_in_another_precision(config: FinetuneConfig) -> None:
    """A run that began on a device with another default dtype can go on."""
    single, half = (training.fingerprints(load_pretrained(config.model, dtype=d)[0]) for d in ("float32", "bfloat16"))
    assert single == half


def test_gradients_of_float16_below_its_range_train_all_the_same(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaForCausalLM.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss * 1e-4
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", small)
    found = {}
    for dtype in ("float32", "float16"):
        (tmp_path / dtype).mkdir()
        finetune(replace(config, dtype=dtype, steps=3, dropout=0.0), tmp_path / dtype)
        found[dtype] = adapters(tmp_path / dtype)
    for name, factor in found["float32"].items():
        # Of entries that are next to zero the sign may be another, which is all that Adam looks at in its first steps.
        change = torch.linalg.norm(found["float16"][name] - factor)
        assert change <= 0.1 * torch.linalg.norm(factor), name


@pytest.mark.parametrize("content", [[], {"step": 3}, "half", b"", b"\x80\x02garbage", b"{"])
def test_a_damaged_checkpoint_is_named(config: FinetuneConfig, content: Any, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        torch.save({"x": torch.zeros(9)}, path)
        path.write_bytes(path.read_bytes()[:300])
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="checkpoint.pt is damaged; --overwrite starts the run anew"):
        finetune(config, tmp_path)


def test_training_lowers_the_loss_and_stays_on_the_manifold(config: FinetuneConfig, tmp_path: Path) -> None:
    metrics = finetune(replace(config, steps=30, dropout=0.0, lr=3e-2), tmp_path)
    # Of a random model only the inside of two layers is trained; 0.17 were seen.
    assert metrics["held_out"]["after"]["loss"] < metrics["held_out"]["before"]["loss"] - 0.1
    assert metrics["perplexity_change"] < -0.08
    assert len(metrics["loss_curve"]) == 30
    assert 0 < metrics["greatest_orthogonality_error"] < 5e-6
    assert 1 <= metrics["mean_effective_rank"] <= 4
    assert metrics["selected_layers"] == sorted(metrics["selected_layers"])
    assert len(metrics["selected_layers"]) == 2
    assert metrics["ranks"] == dict.fromkeys(metrics["ranks"], 4)
    assert len(metrics["ranks"]) == 14
    assert metrics["seconds"].keys() >= {"loading", "selection", "training", "optimizer", "evaluation", "total"}
    json.dumps(metrics, allow_nan=False)


def test_single_linear_maps_fill_the_share_of_the_parameters_by_score_per_parameter(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    metrics = finetune(replace(config, granularity="module", steps=2, warmup=0), tmp_path)
    scores, selected = metrics["fisher"], metrics["selected"]
    assert list(metrics["ranks"]) == [scores["names"][i] for i in selected]
    assert metrics["selected_layers"] == sorted({scores["layers"][i] for i in selected})
    cost = [config.rank * size for size in scores["parameters_per_rank"]]
    worth = [score / size for score, size in zip(scores["scores"], scores["parameters_per_rank"], strict=True)]
    left_out = sorted(set(range(len(cost))) - set(selected))
    # Nothing that is worth more was left out, but what did not fit.
    spent = sum(cost[i] for i in selected)
    assert spent == metrics["trainable_parameters"] <= sum(cost) / 2
    for i in left_out:
        better = sum(cost[j] for j in selected if worth[j] > worth[i])
        assert better + cost[i] > sum(cost) / 2
    table = report.table(metrics)
    assert f"linear maps adapted   {len(selected)} of {len(cost)}" in table


@pytest.mark.parametrize(
    ("granularity", "more", "row"),
    [
        ("layer", ("o_proj", "gate_proj"), "layers adapted        4 of 4: 0-3"),
        ("module", (), "linear maps adapted   20 of 20"),
    ],
)
def test_a_budget_for_all_scores_nothing(
    config: FinetuneConfig,
    granularity: Any,
    more: tuple[str, ...],
    row: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selection, "fisher_scores", lambda *_, **__: pytest.fail("scored"))
    metrics = finetune(replace(config, granularity=granularity, budget=1.0, steps=1, warmup=0), tmp_path)
    model, _ = load_pretrained(config.model)
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", *more)
    assert list(metrics["ranks"]) == [name for name, _ in model.named_modules() if name.endswith(targets)]
    assert metrics["fisher"] is None
    assert metrics["selected_layers"] == [0, 1, 2, 3]
    assert f"{row}\n" in report.table(metrics)
    assert [file.name for file in report.write_run(tmp_path, metrics)] == ["metrics.json", "loss.png"]


def test_single_directions_are_those_of_allocate_ranks(config: FinetuneConfig, tmp_path: Path) -> None:
    # At such a rate nothing moves, so the adapter that is saved is the one of the start.
    config = replace(config, granularity="direction", init="gradient", lr=1e-12, steps=1, warmup=0)
    metrics = finetune(config, tmp_path)
    model, tokenizer = load_pretrained(config.model)
    train, _ = load_data(config.data, tokenizer, seq_len=config.seq_len)
    batches = [train.shuffled_batch(2, i, config.seed) for i in range(3)]
    ranks, starts = allocate_ranks(model, batches, rank=4, budget=0.5, oversampling=8)
    assert metrics["ranks"] == ranks
    assert len(set(ranks.values())) > 1
    assert metrics["fisher"] is None
    assert metrics["selected_layers"] == [0, 1, 2, 3]
    saved = adapters(tmp_path)
    for name, start in starts.items():
        torch.testing.assert_close(saved[f"{name}.lora_A"], start, rtol=0, atol=1e-6)
    table = report.table(metrics)
    assert f"directions            {sum(ranks.values())} in {len(ranks)} linear maps, " in table
    assert f"of {sum(ranks.values()) / len(ranks):.3g}\n" in table
    files = report.write_run(tmp_path, metrics)
    assert [file.name for file in files] == ["metrics.json", "ranks.png", "loss.png"]


def test_single_directions_may_start_elsewhere(config: FinetuneConfig, tmp_path: Path) -> None:
    metrics = finetune(replace(config, granularity="direction", init="svd", steps=1, warmup=0, lr=1e-12), tmp_path)
    model, _ = load_pretrained(config.model)
    name, rank = next(iter(metrics["ranks"].items()))
    leading = torch.linalg.svd(model.get_submodule(name).weight).Vh[:rank]
    cosines = torch.linalg.svdvals(leading @ adapters(tmp_path)[f"{name}.lora_A"])
    torch.testing.assert_close(cosines, torch.ones(rank), rtol=0, atol=1e-4)


def test_rate_and_start_by_default(config: FinetuneConfig) -> None:
    for options, lr, ratio, start in (
        ({}, 2e-3, 1.0, "random"),
        ({"init": "gradient"}, 5e-4, 4.0, "gradient"),
        ({"granularity": "direction"}, 2e-3, 1.0, "random"),
        ({"granularity": "direction", "init": "gradient"}, 5e-4, 4.0, "gradient"),
        ({"init": "gradient", "lr": 1e-3, "lr_ratio": 2.0}, 1e-3, 2.0, "gradient"),
    ):
        known = FinetuneConfig(**options).resolved()
        assert (known.lr, known.lr_ratio, known.init) == (lr, ratio, start)
        assert learning_rate(known, known.warmup_steps) == lr


@pytest.mark.parametrize(
    ("options", "scalings"),
    [
        # Steps of one length: the scaling falls with the root of the rank, and is 2 at the mean.
        ({}, lambda r, mean: 2 * (mean / r) ** 0.5),
        ({"alpha": 6.0}, lambda r, mean: 6 / r**0.5),
        ({"rslora": False}, lambda r, mean: 2.0),
        ({"rslora": False, "alpha": 6.0}, lambda r, mean: 6 / r),
        ({"init": "gradient"}, lambda r, mean: 2.0),
        ({"init": "gradient", "rslora": True}, lambda r, mean: 2 * (mean / r) ** 0.5),
        ({"granularity": "module"}, lambda r, mean: 2.0),
        ({"granularity": "module", "rslora": True}, lambda r, mean: 2 * r**0.5),
    ],
    ids=str,
)
def test_scaling_by_default(
    options: dict[str, Any], scalings: Callable[[int, float], float], config: FinetuneConfig, tmp_path: Path
) -> None:
    config = replace(config, **{"granularity": "direction", "steps": 1, "warmup": 0, **options})
    ranks = finetune(config.resolved(), tmp_path)["ranks"]
    model, _ = load_pretrained(config.model)
    layers = load_adapter(model, tmp_path / "adapter")
    assert set(ranks) == set(layers)
    mean = sum(ranks.values()) / len(ranks)
    for name, rank in ranks.items():
        assert model.get_submodule(name).scaling == pytest.approx(scalings(rank, mean), rel=1e-12)
    assert config.granularity != "direction" or len(set(ranks.values())) > 1


def test_a_gradient_start_spans_the_leading_directions_of_the_calibration_gradient(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    # At such a rate nothing moves, so the adapter that is saved is the one of the start.
    config = replace(config, init="gradient", lr=1e-12, steps=1, warmup=0, calibration_samples=6)
    metrics = finetune(config, tmp_path)
    model, tokenizer = load_pretrained(config.model)
    train, _ = load_data(config.data, tokenizer, seq_len=config.seq_len)
    model.requires_grad_(True)
    for start in range(3):
        model(**train.shuffled_batch(2, start, config.seed)).loss.backward()
    for name in metrics["ranks"]:
        gradient = model.get_submodule(name).weight.grad.double()
        start = adapters(tmp_path)[f"{name}.lora_A"].double()
        captured = (gradient @ start).square().sum()
        # The best that rank 4 can capture, up to float32 gradients.
        assert float(captured) == pytest.approx(float(torch.linalg.svdvals(gradient)[:4].square().sum()), rel=1e-4)


def test_the_saved_adapter_gives_the_reported_loss(config: FinetuneConfig, tmp_path: Path) -> None:
    metrics = finetune(config, tmp_path)
    model, tokenizer = load_pretrained(config.model)
    _, held_out = load_data(config.data, tokenizer, seq_len=config.seq_len)
    assert evaluate(model, held_out, config, "") == metrics["held_out"]["before"]
    load_adapter(model, tmp_path / "adapter")
    assert evaluate(model, held_out, config, "") == metrics["held_out"]["after"]
    # A is one for all layers.
    parameters = {f for layer in adapter_layers(model).values() for f in layer.factors().values()}
    assert metrics["trainable_parameters"] == sum(f.numel() for f in parameters)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_orthonormal_factors_have_a_rate_of_their_own(config: FinetuneConfig, optimizer: Any, tmp_path: Path) -> None:
    """In the first step B = 0 and A stays; in the second both have the same gradients, whatever the ratio is."""
    config = replace(config, optimizer=optimizer, steps=2, warmup=0, lr=1e-3 if optimizer == "adam" else 1.0)
    a, b = {}, {}
    for ratio in (1e-6, 1.0, 3.0):
        (tmp_path / str(ratio)).mkdir()
        finetune(replace(config, lr_ratio=ratio), tmp_path / str(ratio))
        found = adapters(tmp_path / str(ratio))
        a[ratio] = torch.cat([t.flatten() for name, t in found.items() if name.endswith("lora_A")])
        b[ratio] = torch.cat([t.flatten() for name, t in found.items() if name.endswith("lora_B")])
    assert torch.equal(b[1.0], b[3.0])
    moved = (a[3.0] - a[1e-6]).norm() / (a[1.0] - a[1e-6]).norm()
    # A retraction is straight to first order; float32 has three digits of so short a step.
    assert float(moved) == pytest.approx(3, rel=0.05)


def test_accumulated_batches_are_one_large_batch(config: FinetuneConfig, tmp_path: Path) -> None:
    """Also with unequal numbers of label tokens, where a mean of means would be another loss."""
    records = [{"instruction": f"add {i}", "output": "total " * (1 + 3 * (i % 3))} for i in range(24)]
    data = str(write_jsonl(tmp_path / "d.jsonl", records))
    config = replace(config, data=data, dropout=0.0, steps=4, calibration_samples=4)
    curves = []
    for batch_size, grad_accum in ((4, 1), (1, 4)):
        folder = tmp_path / str(grad_accum)
        folder.mkdir()
        metrics = finetune(replace(config, batch_size=batch_size, grad_accum=grad_accum, budget=1.0), folder)
        curves.append(metrics["loss_curve"])
    # float32 sums in another order, four steps of them.
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize(
    ("asked", "tail"),
    [
        ({"second_moment": "mean"}, 0),
        ({"second_moment": "row"}, 1),
        ({"second_moment": "element"}, 4),
        ({}, 1),
        ({"init": "gradient"}, 0),
    ],
)
def test_the_second_moment_is_the_one_asked_for(
    config: FinetuneConfig, asked: dict[str, Any], tail: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    metrics = training._Run.metrics

    def spy(run: Any, after: dict[str, float]) -> dict[str, Any]:
        kept.extend(run.optimizer.state[p]["exp_avg_sq"] for p in run.points.values())
        return metrics(run, after)

    monkeypatch.setattr(training._Run, "metrics", spy)
    finetune(replace(config, **asked, steps=1, warmup=0), tmp_path)
    assert {moment.shape[-1] if moment.dim() else 0 for moment in kept} == {tail}


@pytest.mark.parametrize(("optimizer", "option"), [("adam", "betas"), ("sgd", "momentum")])
def test_the_momentum_is_the_one_asked_for(
    config: FinetuneConfig, optimizer: Any, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the groups of both kinds of factors."""
    seen: list[Any] = []
    monkeypatch.setattr(
        training._Run, "train", lambda run, _: seen.extend(group[option] for group in run.optimizer.param_groups)
    )
    monkeypatch.setattr(training._Run, "metrics", lambda run, after: {})
    for asked in ({}, {"share_A": False}, {"momentum": 0.5}):
        finetune(replace(config, optimizer=optimizer, **asked), tmp_path, resume=False)
    shared = 0.6 if optimizer == "adam" else 0.9
    assert [value[0] if option == "betas" else value for value in seen] == [shared, shared, 0.9, 0.9, 0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, ["k_proj", "v_proj"]),
        ({"rank": 17}, ["k_proj", "v_proj"]),
        ({"rank": 16}, []),
        ({"budget": 0.5, "share_A": False, "rank": 16}, ["o_proj", "gate_proj"]),
    ],
)
def test_what_is_too_small_for_the_rank_is_left_out_unless_it_was_named(
    config: FinetuneConfig, options: dict[str, Any], left_out: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, **{"rank": None, **options})
    model, _ = load_pretrained(config.model)
    names = adaptable(model, config)
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {name.rsplit(".", 1)[-1] for name in names} == set(everything) - set(left_out)
    if options.get("share_A", True):
        told = [f"smaller than rank {config.adapter_rank}, and so left out: k_proj, v_proj"] if left_out else []
        assert [record.getMessage() for record in caplog.records] == told
    with pytest.raises(InputError, match=r"k_proj: rank must be in \[1, 16\]"):
        adaptable(model, replace(config, rank=20, target_modules=("all-linear",)))
    with pytest.raises(InputError, match=r"_proj: rank must be in \[1, (16|32)\] .*, got 33"):
        adaptable(model, replace(config, rank=33))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (True, 20, 0.6, "all-linear")),
        ({"budget": 1.0, "granularity": "layer"}, (True, 20, 0.6, "all-linear")),
        ({"optimizer": "sgd"}, (True, 20, 0.9, "all-linear")),
        ({"rank": 8, "momentum": 0.8, "target_modules": ["q_proj"]}, (True, 8, 0.8, ("q_proj",))),
        ({"share_A": False}, (False, 16, 0.9, None)),
        ({"granularity": "module"}, (False, 16, 0.9, None)),
        ({"granularity": "module", "share_A": True}, (True, 20, 0.6, "all-linear")),
        ({"granularity": "direction"}, (False, 16, 0.9, None)),
        ({"orthonormal": "both"}, (False, 16, 0.9, None)),
        ({"init": "gradient"}, (False, 16, 0.9, None)),
    ],
)
def test_whole_layers_share_A_by_default(options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    for config in (FinetuneConfig(**options), FinetuneConfig(**options).resolved()):
        assert (config.shares_A, config.adapter_rank, config.decay, config.targets) == expected


def test_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = FinetuneConfig(steps=20, warmup=4, lr=1.0)
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5)
    assert rates[19] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))


def test_the_default_warm_up_is_5_steps_but_at_most_a_tenth() -> None:
    for steps, warmup in ((3, 0), (20, 2), (50, 5), (500, 5)):
        config = FinetuneConfig(steps=steps)
        assert config.warmup_steps == warmup
        assert learning_rate(config, warmup) == config.highest_lr
    with pytest.raises(InputError, match=r"warmup must be in \[0, 3\], the number of steps, got 5"):
        FinetuneConfig(steps=3, warmup=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"calibration_samples": 0}, "--calibration-samples must be at least 1, got 0"),
        ({"seq_len": 1}, "--seq-len must be at least 2 tokens, got 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive and at most 1e.18, got inf"),
        ({"lr": 1e39}, "lr must be positive and at most 1e.18, got 1e.39"),
        ({"lr": math.nan}, "lr must be positive and at most 1e.18, got nan"),
        ({"alpha": math.inf}, "alpha must be positive and at most 1e.18, got inf"),
        ({"alpha": math.nan}, "alpha must be positive and at most 1e.18, got nan"),
        ({"warmup": 10}, r"warmup must be in \[0, 9\]"),
        ({"budget": 0.0}, r"\(0, 1\], got 0.0"),
        ({"budget": 1.5}, r"share of the layers must be in \(0, 1\], got 1.5"),
        ({"budget": 1.5, "granularity": "module"}, r"share of the adapters' parameters must be in \(0, 1\], got 1.5"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"lr_ratio": 0.0}, "--lr-ratio must be positive and at most 1e.18, got 0.0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"momentum": 1.0}, r"--momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": math.nan}, r"--momentum must be in \[0, 1\), got nan"),
        ({"optimizer": "lion"}, "optimizer must be one of 'adam', 'sgd'"),
        ({"retraction": "svd"}, "retraction must be one of"),
        ({"second_moment": "max"}, "second-moment must be one of 'mean', 'norm', 'row', 'element'"),
        (
            {"second_moment": "element", "optimizer": "sgd"},
            "--second-moment is an option of --optimizer adam, got 'element' with sgd",
        ),
        ({"init": "zeros"}, "init must be one of 'random', 'svd', 'gradient'"),
        ({"retraction": None}, "retraction must be one of"),
        ({"granularity": "module", "stratified": True}, "stratified chooses whole layers, .* got 'module'"),
        ({"granularity": None}, "granularity must be one of 'layer', 'module', 'direction', got None"),
        ({"granularity": "direction", "budget": 8}, "budget must be a share of the adapters' parameters .*, got 8"),
        ({"dtype": "int8"}, "dtype must be one of 'float32', 'bfloat16', 'float16'"),
        ({"target_modules": "q_proj"}, "--target-modules must be a list of names, got the string 'q_proj'"),
    ],
)
def test_values_that_can_never_be_right_are_named(config: FinetuneConfig, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(config, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 33}, r"q_proj: rank must be in \[1, 32\] .*, got 33"),
        ({"target_modules": ("wq",)}, "q_proj"),
        ({"budget": 5}, r"in \[1, 4\].*got 5"),
        ({"budget": 21, "granularity": "module"}, r"in \[1, 20\], the number of linear maps; got 21"),
        (
            {"budget": 0.001, "granularity": "module"},
            "share of the adapters' parameters must be at least 0.0375, for one",
        ),
        ({"budget": 1e-4, "granularity": "direction"}, r"must be at least 0\.\d+, for one direction; got"),
        ({"seq_len": 129}, "--seq-len must be at most 128, the positions of the model, got 129"),
        ({"batch_size": 10**6}, r"--batch-size must be at most \d+, the number of training samples, got 1000000"),
    ],
)
def test_what_does_not_fit_the_model_is_named_before_anything_is_trained(
    config: FinetuneConfig, change: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        finetune(replace(config, **change), tmp_path, on_start=lambda: pytest.fail("started"))
    assert list(tmp_path.iterdir()) == []


def test_all_linears_are_one_word(config: FinetuneConfig, tmp_path: Path) -> None:
    config = replace(config, target_modules=["all-linear"], steps=1, warmup=0)
    for granularity in ("layer", "module", "direction"):
        metrics = finetune(replace(config, granularity=granularity), tmp_path, resume=False)
        adapted = {name.split(".")[-1] for name in metrics["ranks"]}
        assert {"o_proj", "gate_proj"} <= adapted, granularity


def test_a_run_that_diverges_stops_and_says_so(config: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loss at step \d is (nan|inf); a lower learning rate"):
        finetune(replace(config, lr=1e18), tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_an_orthogonality_error_that_is_not_finite_stays(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one factor after the first of three steps: every comparison with NaN is false, in either order."""
    own, seen = training.orthogonality_error, []

    def error(factor: Tensor) -> Tensor:
        seen.append(own(factor))
        return seen[-1] * torch.nan if len(seen) == 6 else seen[-1]

    monkeypatch.setattr(training, "orthogonality_error", error)
    metrics = finetune(replace(config, steps=3, warmup=0), tmp_path)
    assert len(seen) > 12 and math.isnan(metrics["greatest_orthogonality_error"])


@pytest.mark.parametrize(("available", "batch_size", "sizes"), [(20, 2, [2, 2, 1]), (20, 4, [4, 1]), (3, 4, [3])])
def test_as_many_calibration_samples_are_taken_as_were_asked_for(
    config: FinetuneConfig, available: int, batch_size: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each sample once: where there are fewer, no one counts twice."""
    ids = [torch.full((4,), 3 + i) for i in range(available)]
    data = Dataset(ids, ids, "")
    seen: list[Tensor] = []

    def spied(own: Any) -> Any:
        def calibrated(model: Any, batches: Any, **options: Any) -> Any:
            given = list(batches)
            seen.extend(batch["input_ids"] for batch in given)
            return own(model, given, **options)

        return calibrated

    for name in ("gradient_init", "allocate_ranks"):
        monkeypatch.setattr(selection, name, spied(getattr(selection, name)))
    for change in ({"init": "gradient"}, {"granularity": "direction"}):
        seen.clear()
        some = replace(config, calibration_samples=5, batch_size=batch_size, **change)
        chosen, _ = select(FAMILIES["llama"].build(), data, some)
        assert [len(batch) for batch in seen] == sizes
        assert len(torch.cat(seen).unique()) == sum(sizes)
        assert chosen.scores is None or chosen.scores.n_samples == sum(sizes)
