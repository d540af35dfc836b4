"""Every study runs, writes a complete result and prints its table from that result alone; no time is judged."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import __main__ as entry
from benchmarks import _harness, _report, finetune, fisher_cost, manifold, optimizer_step
from stiefel_lora.errors import InputError

STUDIES = list(entry.studies())
# The options of a run of the drift study that takes no time.
DRIFT = ["--quick", "--shape", "16", "2"]
ENVELOPE = {"study", "command", "started", "seed", "quick", "python", "packages", "machine", "revision", "status"}


@pytest.mark.parametrize("name", STUDIES)
def test_quick_run_writes_a_result(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "result.json"
    _harness.main(importlib.import_module(f"benchmarks.{name}"), ["--quick", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result.keys() >= ENVELOPE
    assert result["study"] == name
    assert result["status"] == "finished"
    assert result["packages"]["torch"]
    assert str(output) in capsys.readouterr().out
    table = importlib.import_module(f"benchmarks.{name}").report(result["results"])
    assert "| --- |" in table
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("path", sorted(_harness.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_committed_results_are_complete(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result.keys() >= ENVELOPE
    assert not result["quick"]
    assert result["status"] == "finished"
    assert "| --- |" in importlib.import_module(f"benchmarks.{result['study']}").report(result["results"])


def test_list_names_every_study_and_an_unknown_one_is_an_error() -> None:
    run = [sys.executable, "-m", "benchmarks"]
    listed = subprocess.run([*run, "list"], capture_output=True, text=True, check=True)
    assert all(name in listed.stdout for name in STUDIES)
    wrong = subprocess.run([*run, "speed"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "there is no study 'speed'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    "words", [["list", "speed"], ["all", "--output", "one.json"], ["report", "one", "two"], ["report", "--fast"]]
)
def test_words_that_nobody_reads_are_an_error(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STUDIES:
        monkeypatch.setattr(importlib.import_module(f"benchmarks.{name}"), "run", lambda args: pytest.fail("ran"))
    with pytest.raises(SystemExit) as stopped:
        entry.main(words)
    assert stopped.value.code == 2


def test_all_runs_every_study_though_one_fails_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: object) -> None:
        raise InputError("there is no model")

    ran: list[str] = []
    monkeypatch.chdir(tmp_path)
    for name in STUDIES:
        study = importlib.import_module(f"benchmarks.{name}")
        monkeypatch.setattr(study, "run", broken if name == STUDIES[1] else lambda args, name=name: ran.append(name))
        monkeypatch.setattr(study, "report", lambda results: "a table")
    with pytest.raises(SystemExit, match=f"1 of {len(STUDIES)} studies failed: {STUDIES[1]}"):
        entry.main(["all", "--quick"])
    assert ran == [name for name in STUDIES if name != STUDIES[1]]
    assert "there is no model" in capsys.readouterr().err


def test_all_ends_at_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for name in STUDIES:
        run = stopped if name == STUDIES[0] else lambda args: pytest.fail("went on")
        monkeypatch.setattr(importlib.import_module(f"benchmarks.{name}"), "run", run)
    with pytest.raises(SystemExit) as ended:
        entry.main(["all", "--quick"])
    assert ended.value.code == 130


def test_report_writes_the_page_of_a_folder_and_says_what_is_unfinished_or_quick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path)
    entry.main(["report", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "README.md")
    page = (tmp_path / "README.md").read_text()
    assert "| qr | float32 |" in page
    assert "**Not finished.** **A quick run, whose numbers mean nothing.**" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no results"),
        ("{", "x.json is not the result of a study"),
        (json.dumps({"study": "drift", "results": {}, "status": "finished"}), "x.json is not the result of a study"),
        (json.dumps(dict.fromkeys(ENVELOPE | {"results"}, "speed")), "there is no study 'speed'"),
        (
            json.dumps({**dict.fromkeys(ENVELOPE, ""), "study": "drift", "machine": {}, "packages": {}, "results": {}}),
            "x.json is no complete result of the study drift (KeyError: 'processor')",
        ),
    ],
)
def test_report_names_what_it_cannot_read(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        entry.main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "-3"], "argument --steps: must be an integer above 0, got '-3'"),
        (["--shape", "4", "0"], "argument --shape: must be an integer above 0, got '0'"),
        (["--shape", "4", "8"], "r must be in [1, n] for points of St(n, r), got n=4, r=8"),
        (["--lr", "nan"], "argument --lr: must be a number above 0, got 'nan'"),
        (["--threads", "0"], "argument --threads: must be an integer above 0, got '0'"),
        (["--seed", "-1"], "argument --seed: must be an integer from 0 to 2^63 - 1, got '-1'"),
        (["--seed", str(2**64)], f"argument --seed: must be an integer from 0 to 2^63 - 1, got '{2**64}'"),
    ],
)
def test_a_wrong_option_is_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "drift.json"
    with pytest.raises(SystemExit) as stopped:
        drift("--quick", "--output", str(output), *words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")
    assert not output.exists()


@pytest.mark.parametrize(
    ("study", "option"),
    [
        ("early_stopping", "--batch-size"),
        ("early_stopping", "--samples"),
        ("finetune", "--steps"),
        ("finetune", "--lrs"),
        ("finetune", "--seeds"),
        ("fisher_cost", "--long-samples"),
        ("manifold", "--rounds"),
        ("optimizer_step", "--rounds"),
    ],
)
def test_no_count_or_rate_may_be_zero(
    study: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        words = ["--quick", "--output", str(tmp_path / "x.json"), option, "0"]
        _harness.main(importlib.import_module(f"benchmarks.{study}"), words)
    assert stopped.value.code == 2
    assert f"argument {option}: must be " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("study", "option"),
    [("early_stopping", "model"), ("fisher_cost", "model"), ("finetune", "model"), ("finetune", "data")],
)
def test_a_path_may_start_at_home(study: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    parser = argparse.ArgumentParser()
    importlib.import_module(f"benchmarks.{study}").add_arguments(parser)
    # A shell leaves a ~ after "=" as it is.
    assert getattr(parser.parse_args([f"--{option}=~/models"]), option) == "/home/someone/models"


@pytest.mark.parametrize(
    ("study", "words", "message"),
    [
        ("early_stopping", ["--quick", "--batch-size", "99"], "--samples must be at least --batch-size, 99, got 16"),
        ("finetune", ["--tasks", "instructions"], "the task instructions needs --data"),
        (
            "fisher_cost",
            ["--quick", "--samples", "36"],
            "--samples must be a multiple of 4, and above 32 of that: parts of one size are timed; got 36",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(
    study: str,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(finetune, "_in_a_process", lambda function, *args: function(*args))
    monkeypatch.setattr(finetune, "load_pretrained", lambda *args, **options: (None, None))
    with pytest.raises(SystemExit) as stopped:
        module = importlib.import_module(f"benchmarks.{study}")
        _harness.main(module, [*words, "--output", str(tmp_path / "x.json")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_tokens_of_the_cost_study_follow_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        words.append(command)
        return subprocess.CompletedProcess(command, 0, "peak 3.5\n", "")

    model = SimpleNamespace(config=SimpleNamespace(vocab_size=100))
    drawn = {}
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        ids = fisher_cost._batches(model, 2, 8)[0]["input_ids"]
        torch.testing.assert_close(ids, drawn.setdefault(seed, ids), rtol=0, atol=0)
    assert not torch.equal(drawn[0], drawn[1])
    # The process that measures the memory draws the same.
    monkeypatch.setattr(fisher_cost.subprocess, "run", run)
    args = argparse.Namespace(model=None, seed=1, threads=2)
    assert fisher_cost._child_peak("ours", args, trim=False) == 3.5
    assert words[0][3:-1] == ["--peak-of", "ours", "--seed", "1", "--threads", "2", "--output"]


def test_the_manifold_study_runs_on_one_thread_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    seen: list[int] = []
    monkeypatch.setattr(manifold, "run", lambda args: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(manifold, "report", lambda results: "")
    torch.set_num_threads(3)
    try:
        for words in ([], ["--threads", "2"]):
            _harness.main(manifold, ["--quick", "--output", str(tmp_path / "x.json"), *words])
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2]


def test_the_manifold_study_goes_on_with_as_many_rounds_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[str] = []
    monkeypatch.setattr(manifold, "_measure", lambda problem, args: measured.append(problem.name) or {})
    args = argparse.Namespace(
        problems=["pca-50", "joint-50"], quick=False, rounds=7, seed=0, interrupted=None, save=lambda results: None
    )
    first = manifold.run(args)
    assert len(measured) == 2
    args.interrupted = {**first, "problems": dict(list(first["problems"].items())[:1]), "absent": {"digits": "no"}}
    # What was absent then is no longer asked for.
    assert manifold.run(args) == first
    assert len(measured) == 3
    args.rounds = 8
    manifold.run(args)
    assert len(measured) == 5


def test_a_picture_has_a_bar_for_every_optimizer_that_any_model_was_stepped_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scopes(*names: str) -> dict[str, Any]:
        return {"rank": 4, "adapter": {"rows": {name: {"times_fused_adamw": 2.0} for name in names}}}

    labels: list[str] = []
    kept = Axes.set_yticks
    monkeypatch.setattr(Axes, "set_yticks", lambda self, at, names=(), **more: labels.extend(names) or kept(self, at))
    # Too large a model for one of them comes first.
    models = {"large": scopes(optimizer_step.FLOOR, "ours, qr"), "small": scopes(optimizer_step.FLOOR, "canonical")}
    optimizer_step.plot({"models": models}, tmp_path / "x.png")
    assert labels == ["canonical", "ours, qr"]


def test_the_label_of_a_picture_of_one_model_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.append(self))
    rows = {name: {"times_fused_adamw": 2.0} for name in (optimizer_step.FLOOR, "ours, qr")}
    optimizer_step.plot({"models": {"small": {"rank": 4, "adapter": {"rows": rows}}}}, tmp_path / "x.png")
    (figure,) = drawn
    figure.canvas.draw()
    label = figure._supxlabel.get_window_extent()
    assert 0 <= label.x0 < label.x1 <= figure.bbox.width


def test_a_picture_of_no_problems_is_empty(tmp_path: Path) -> None:
    manifold.plot({"problems": {}}, tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()


def test_the_page_needs_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path)
    monkeypatch.setattr(_report, "can_draw", lambda: False)
    with pytest.raises(SystemExit):
        entry.main(["report", str(tmp_path)])
    assert "README.md is written; its pictures need matplotlib: pip install" in capsys.readouterr().err
    assert "| qr | float32 |" in (tmp_path / "README.md").read_text()


FULL = ["--steps", "20", "--shape", "16", "2"]


def drift(*words: str) -> None:
    _harness.main(importlib.import_module("benchmarks.drift"), list(words))


@pytest.mark.parametrize("status", ["finished", "partial"])
@pytest.mark.parametrize("told", ["options", "command"])
def test_a_result_of_other_options_is_spared_unless_it_may_be_overwritten(
    status: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results from before options were kept tell their command."""
    output = tmp_path / "drift.json"
    drift(*FULL, "--output", str(output))
    result = {**json.loads(output.read_text()), "status": status}
    if told == "command":
        del result["options"]
    output.write_text(json.dumps(result))
    with pytest.raises(SystemExit) as stopped:
        drift("--steps", "10", "--shape", "16", "2", "--output", str(output))
    assert stopped.value.code == 2
    kind = {"finished": "finished", "partial": "stopped"}[status]
    assert f"has a {kind} run of other options (python -m benchmarks drift --steps 20" in capsys.readouterr().err
    assert json.loads(output.read_text()) == result
    drift("--steps", "10", "--shape", "16", "2", "--output", str(output), "--overwrite")
    assert json.loads(output.read_text())["results"]["steps"] == 10


def test_the_same_command_makes_a_finished_result_anew_and_goes_on_with_a_stopped_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "drift.json"
    for status, kept in (("finished", False), ("partial", True)):
        drift(*FULL, "--output", str(output))
        result = json.loads(output.read_text())
        result["results"]["rows"] = [{**row, "mark": True} for row in result["results"]["rows"]]
        output.write_text(json.dumps({**result, "status": status}))
        drift(*FULL, "--output", str(output))
        assert all("mark" in row for row in json.loads(output.read_text())["results"]["rows"]) == kept
        assert (f"going on with what {output} has of" in capsys.readouterr().err) == kept


def test_a_finished_result_stays_until_the_run_that_replaces_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = importlib.import_module("benchmarks.drift")
    output, pieces = tmp_path / "drift.json", tmp_path / "drift.json.unfinished"
    drift(*FULL, "--output", str(output))
    before = output.read_bytes()
    measure = study._drift

    def stop_at_float64(dtype: str, *rest: Any) -> Any:
        if dtype == "float64":
            raise KeyboardInterrupt
        return [{**row, "mark": True} for row in measure(dtype, *rest)]

    monkeypatch.setattr(study, "_drift", stop_at_float64)
    with pytest.raises(SystemExit):
        drift(*FULL, "--output", str(output))
    assert output.read_bytes() == before
    assert {row["dtype"] for row in json.loads(pieces.read_text())["results"]["rows"]} == {"float32"}
    monkeypatch.undo()
    drift(*FULL, "--output", str(output))
    assert f"going on with what {pieces} has of" in capsys.readouterr().err
    rows = json.loads(output.read_text())["results"]["rows"]
    assert [row["dtype"] == "float32" for row in rows] == ["mark" in row for row in rows]
    assert not pieces.exists()


def test_a_stopped_run_under_other_conditions_is_spared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "drift.json"
    drift(*FULL, "--output", str(output))
    result = {**json.loads(output.read_text()), "status": "partial", "packages": {"torch": "1.0 (package index)"}}
    output.write_text(json.dumps(result))
    with pytest.raises(SystemExit):
        drift(*FULL, "--output", str(output))
    assert "has a stopped run of other packages" in capsys.readouterr().err
    assert json.loads(output.read_text()) == result


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_two_processes_do_not_write_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, locks = tmp_path / "drift.json", tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(locks))
    with _harness._alone(output):
        with pytest.raises(SystemExit):
            drift(*FULL, "--output", str(output))
        assert f"another process is writing {output}" in capsys.readouterr().err
        drift(*FULL, "--output", str(tmp_path / "other.json"))
    drift(*FULL, "--output", str(output))
    assert not list(locks.iterdir())


def interrupted(tmp_path: Path, **changed: Any) -> tuple[Path, dict[str, Any]]:
    """Leave the first half of a quick run of the drift study, with something in its envelope changed."""
    output = tmp_path / "drift.json"
    drift(*DRIFT, "--output", str(output))
    result = json.loads(output.read_text())
    first = result["results"]["rows"][0]["dtype"]
    result["results"]["rows"] = [{**row, "mark": True} for row in result["results"]["rows"] if row["dtype"] == first]
    output.write_text(json.dumps({**result, "status": "partial", **changed}))
    return output, result


@pytest.mark.parametrize(("seed", "kept"), [(0, True), (1, False)])
def test_a_study_goes_on_with_its_own_seed_alone(seed: int, kept: bool, tmp_path: Path) -> None:
    output, before = interrupted(tmp_path)
    first = before["results"]["rows"][0]["dtype"]
    drift(*DRIFT, "--output", str(output), "--seed", str(seed))
    rows = json.loads(output.read_text())["results"]["rows"]
    assert [row["dtype"] == first and kept for row in rows] == ["mark" in row for row in rows]
    assert len({row["dtype"] for row in rows}) == 2


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, True),
        ({"revision": "abc1234"}, True),
        ({"machine": {"threads": 99}}, False),
        ({"packages": {"torch": "1.0 (package index)"}}, False),
        ({"status": "finished"}, False),
    ],
)
def test_a_study_goes_on_under_the_same_conditions_alone(changed: dict[str, Any], kept: bool, tmp_path: Path) -> None:
    output, before = interrupted(tmp_path, **changed)
    drift(*DRIFT, "--output", str(output))
    result = json.loads(output.read_text())
    assert any("mark" in row for row in result["results"]["rows"]) == kept
    # The revision of each part is told, since it may differ.
    earlier = [(part["revision"], part["started"]) for part in result.get("earlier", [])]
    assert earlier == ([(changed.get("revision", before["revision"]), before["started"])] if kept else [])


def test_a_full_run_does_not_go_on_with_a_quick_one_and_a_quick_one_spares_a_full_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = importlib.import_module("benchmarks.drift")
    output, _ = interrupted(tmp_path)
    # The same steps as the quick run has, so that only the mark of a quick run tells them apart.
    full = ["--steps", "300", "--shape", "16", "2", "--output", str(output)]
    _harness.main(study, full)
    result = json.loads(output.read_text())
    assert not result["quick"]
    assert not any("mark" in row for row in result["results"]["rows"])
    with pytest.raises(SystemExit) as stopped:
        _harness.main(study, [*DRIFT, "--output", str(output)])
    assert stopped.value.code == 2
    assert "is a full result; give a quick run another --output" in capsys.readouterr().err
    assert json.loads(output.read_text()) == result


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"study": "drift", "resu', "is not the result of a study; remove it or choose another place"),
        ("[1, 2]", "is not the result of a study"),
        ('{"name": "stiefel-lora"}', "is not the result of a study"),
        (
            json.dumps({**dict.fromkeys(ENVELOPE, ""), "study": "manifold", "quick": True, "results": {}}),
            "is a result of the study manifold; give another",
        ),
    ],
)
def test_a_file_of_another_kind_is_spared(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    output.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        drift(*DRIFT, "--output", str(output))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert output.read_text() == content


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
@pytest.mark.parametrize("option", ["--minutes", "--warmup", "--questions"])
def test_no_count_or_time_may_be_negative(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _harness.main(finetune, ["--quick", "--output", str(tmp_path / "x.json"), option, value])
    assert f"argument {option}: must be a" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "file/result.json", "pipe"])
def test_an_output_that_cannot_be_written_is_named_before_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "file.partial").touch()
    if place == "pipe":
        os.mkfifo(tmp_path / "pipe")  # as a device is, no file to be replaced
    study = importlib.import_module("benchmarks.drift")
    monkeypatch.setattr(study, "run", lambda args: pytest.fail("the work was begun"))
    with pytest.raises(SystemExit) as stopped:
        _harness.main(study, [*DRIFT, "--output", str(tmp_path / place)])
    assert stopped.value.code == 2
    assert "cannot be written: " in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2 + (place == "pipe")


def test_interleaving_takes_turns_and_leaves_out_warm_up_and_slow_ones() -> None:
    calls: list[str] = []
    times = _harness.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "slow": lambda: calls.append("slow")},
        rounds=3,
        warmup=1,
        slow={"slow": 2},
    )
    assert calls == ["a", "b", "a", "b", "slow", "a", "b", "slow", "a", "b"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "slow": 2}


def test_ratio_is_the_median_over_rounds_not_of_medians() -> None:
    times = {"x": [1.0, 40.0, 3.0], "base": [1.0, 10.0, 1.0]}
    assert _harness.median_ratio(times, "x", "base") == 3.0
    assert _harness.summary(times["x"])["median_s"] == 3.0


def test_origin_tells_the_version_and_where_it_came_from() -> None:
    packages = _harness.environment()["packages"]
    assert packages["geoopt"].startswith("0.")
    assert "(" in packages["geoopt"]
