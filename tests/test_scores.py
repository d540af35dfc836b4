"""Ranking, budgets, normalisation, table, plot and file of Fisher scores."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from stiefel_lora._budget import count_of
from stiefel_lora._files import write_json
from stiefel_lora.config import FinetuneConfig
from stiefel_lora.errors import InputError
from stiefel_lora.report import plot_loss
from stiefel_lora.scores import FisherScores, strata
from stiefel_lora.selection import choose


def scores(**changes: Any) -> FisherScores:
    fields: dict[str, Any] = {
        "scores": [3.0, 1.0, 4.0, 1.0],
        "stderr": [0.3, 0.1, 0.4, 0.1],
        "names": [f"layers.{i}" for i in range(4)],
        "layers": [0, 1, 2, 3],
        "parameters": [300, 10, 1000, 20],
        "parameters_per_rank": [30, 10, 50, 20],
        "squared_weight_norm": [30.0, 1.0, 2.0, 8.0],
        "granularity": "layer",
        "n_samples": 7,
        "n_skipped": 0,
        "seconds": 1.5,
        "stable": True,
        "budget": 0.5,
        "confidence": 0.95,
    }
    return FisherScores(**{**fields, **changes})


@pytest.mark.parametrize(
    ("budget", "chosen"),
    # Of the equal scores of layers 1 and 3 the lower index comes first; shares are rounded, to at least one.
    [
        (1, [2]),
        (2, [0, 2]),
        (3, [0, 1, 2]),
        (4, [0, 1, 2, 3]),
        (0.5, [0, 2]),
        (0.7, [0, 1, 2]),
        (0.01, [2]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_budget_as_count_and_share(budget: float | int, chosen: list[int]) -> None:
    assert scores().select(budget) == chosen


@pytest.mark.parametrize(
    ("budget", "chosen"),
    # Runs of (0, 1) and (2, 3) for two; (0), (1), (2, 3) for three; all for one.
    [(1, [2]), (2, [0, 2]), (0.5, [0, 2]), (3, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_a_stratified_budget_takes_the_best_of_each_depth(budget: float | int, chosen: list[int]) -> None:
    assert scores().select(budget, stratified=True) == chosen
    assert scores(layers=[1, 3, 4, 7]).select(budget, stratified=True) == [[1, 3, 4, 7][i] for i in chosen]


def test_a_stratified_choice_is_of_each_depth_where_the_highest_scores_are_not() -> None:
    steep = scores(scores=[9.0, 8.0, 1.0, 1.0])
    assert steep.select(2) == [0, 1]
    assert steep.select(2, stratified=True) == [0, 2]  # of equal scores the lower
    assert steep.select(2, stratified=True, normalize="params") == [1, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 2]),
        ({"stratified": False}, [0, 1]),
        ({"granularity": "module"}, [0, 1]),
        ({"granularity": "module", "stratified": False}, [0, 1]),
    ],
)
def test_whole_layers_are_chosen_from_each_depth_by_default(options: dict[str, Any], expected: list[int]) -> None:
    config = FinetuneConfig(budget=2, **options)
    falling = scores(scores=[4.0, 3.0, 2.0, 1.0], granularity=config.granularity)
    assert choose(falling, config) == choose(falling, config.resolved()) == expected


@pytest.mark.parametrize(("available", "count"), [(1, 1), (5, 2), (5, 3), (30, 15), (30, 7), (32, 31)])
def test_strata_are_even_and_hold_each_position_once(available: int, count: int) -> None:
    runs = strata(available, count)
    assert [i for run in runs for i in run] == list(range(available))
    assert len(runs) == count
    assert {len(run) for run in runs} <= {available // count, -(-available // count)}


def test_normalisation_changes_the_order() -> None:
    assert scores().ranking() == [2, 0, 1, 3]
    assert scores().normalized("params") == pytest.approx([0.01, 0.1, 0.004, 0.05])
    assert scores().ranking("params") == [1, 3, 0, 2]
    assert scores().ranking("weight") == [2, 1, 3, 0]
    assert scores().select(2, normalize="params") == [1, 3]


def test_budget_of_parameters_is_filled_by_score_per_parameter() -> None:
    # Per parameter: 0.1, 0.1, 0.08, 0.05 at rank 1.
    assert scores().select(budget_params=80, rank=2) == [0, 1]
    assert scores().select(budget_params=100, rank=2) == [0, 1]
    assert scores().select(budget_params=120, rank=2) == [0, 1, 3]  # layer 2 does not fit any more, 3 does
    assert scores().select(budget_params=1000, rank=2) == [0, 1, 2, 3]


def test_layers_without_linears_keep_their_numbers() -> None:
    assert scores(layers=[0, 2, 5, 6]).select(2) == [0, 5]
    assert scores(layers=[0, 0, 1, 1], granularity="module").select(2) == [0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 5}, r"in \[1, 4\], the number there is; got 5"),
        ({"budget": 0}, "got 0"),
        ({"budget": 1.2}, r"in \(0, 1\], got 1.2"),
        ({"budget": -0.1}, "got -0.1"),
        ({"budget_params": 100}, "give rank >= 1, got None"),
        ({"budget_params": 19, "rank": 2}, "must be at least 20, one at rank 2, got 19"),
        ({"budget_params": 100, "rank": 2, "stratified": True}, "whole layers; it does not go with budget_params=100"),
        ({"normalize": "layer"}, "normalize must be one of 'raw', 'params', 'weight'"),
    ],
)
def test_bad_budgets_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scores().select(**options)


def test_table_marks_the_selected() -> None:
    lines = scores().table(selected=[0, 2]).splitlines()
    assert len(lines) == 5
    assert [line.split()[:3] for line in lines[1:3]] == [["1", "*", "layers.2"], ["2", "*", "layers.0"]]
    assert "*" not in lines[3]
    assert "4 layers" in repr(scores())


def test_plot_is_an_image(tmp_path: Path) -> None:
    for name, head in (("new/fisher.png", b"\x89PNG"), ("fisher.pdf", b"%PDF"), ("fisher", b"\x89PNG")):
        scores().plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "fisher.pdf", "fisher"}


def test_plot_of_single_linear_maps_takes_zeros_and_maps_that_only_some_layers_have(tmp_path: Path) -> None:
    names = ["layers.0.q", "layers.0.up", "layers.2.q", "layers.3"]
    found = scores(granularity="module", names=names, layers=[0, 0, 2, 3], scores=[3.0, 0.0, 4.0, 1.0])
    found.plot(tmp_path / "fisher.png", [0, 3])
    assert (tmp_path / "fisher.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_scores_that_are_all_zero_are_drawn(granularity: str, tmp_path: Path) -> None:
    names = [f"layers.{i}.q" for i in range(4)]
    zeros = scores(granularity=granularity, names=names, scores=[0.0] * 4, stderr=[0.0] * 4)
    zeros.plot(tmp_path / "fisher.png")
    assert (tmp_path / "fisher.png").read_bytes().startswith(b"\x89PNG")
    assert len(zeros.table().splitlines()) == 5


@pytest.mark.parametrize("picture", ["layers", "linear maps", "loss"])
def test_steps_and_layers_have_whole_numbers_on_the_axis(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    save = Figure.savefig

    def record(figure: Figure, *args: Any, **options: Any) -> None:
        seen.extend(figure.axes[0].get_xticks())
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    names = ["layers.0.q", "layers.1.q"]
    two = scores(scores=[3.0, 1.0], stderr=[0.3, 0.1], names=names, layers=[0, 1])
    if picture == "loss":
        held_out = {"before": {"loss": 3.0}, "after": {"loss": 2.0}}
        plot_loss({"loss_curve": [3.0, 2.0], "held_out": held_out}, tmp_path / "loss.png")
    else:
        replace(two, granularity="layer" if picture == "layers" else "module").plot(tmp_path / "fisher", [0])
    assert seen
    assert all(float(tick).is_integer() for tick in seen)


def test_file_round_trip_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    scores().save(path)
    assert FisherScores.load(path) == scores()
    assert list(path.parent.iterdir()) == [path]
    path.write_text('{"scores": [1]}')
    with pytest.raises(InputError, match="does not hold Fisher scores"):
        FisherScores.load(path)
    with pytest.raises(InputError, match="cannot read"):
        FisherScores.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scores", "abcd"),
        ("scores", [1.0, "2", 3.0, 4.0]),
        ("scores", [1.0, None, 3.0, 4.0]),
        ("stderr", 0.1),
        ("names", [1, 2, 3, 4]),
        ("names", ["a", "b", "c"]),
        ("layers", [0, 1, 2.5, 3]),
        ("parameters", [True, 1, 1, 1]),
        ("parameters", [0, 1, 1, 1]),
        ("granularity", "head"),
        ("granularity", 1),
        ("n_samples", "7"),
        ("stable", 1),
        ("budget", None),
    ],
)
def test_a_file_with_a_wrong_value_is_refused_and_the_field_named(field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_json(path, {**asdict(scores()), field: value})
    with pytest.raises(InputError, match=f"does not hold Fisher scores: {field} is not"):
        FisherScores.load(path)


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({**asdict(scores()), "scores": [1.0, math.nan, 3.0, 4.0]}))
    with pytest.raises(InputError, match="does not hold Fisher scores: scores is not"):
        FisherScores.load(path)


def test_what_is_marked_in_a_picture_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layer 99 to mark as selected"):
        scores().plot(tmp_path / "x.png", [0, 99])
    assert not list(tmp_path.iterdir())


def test_a_file_without_scores_is_refused_and_whole_numbers_are_none_of_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    whole = {"scores": [3, 1, 4, 1], "budget": 2, "seconds": 1}
    write_json(path, {**asdict(scores()), **whole})
    assert FisherScores.load(path) == scores(**whole)
    empty = {name: [] for name, value in asdict(scores()).items() if isinstance(value, list)}
    write_json(path, {**asdict(scores()), **empty})
    with pytest.raises(InputError, match="does not hold Fisher scores: scores, stderr"):
        FisherScores.load(path)


def test_a_share_is_rounded_half_up() -> None:
    assert [count_of(share, 5) for share in (0.01, 0.3, 0.5, 0.7, 1.0)] == [1, 2, 3, 4, 5]
