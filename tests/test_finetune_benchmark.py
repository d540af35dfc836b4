"""The fine-tuning comparison: its data, its measures against direct ones, its resumption and its verdicts."""

import argparse
import copy
import multiprocessing
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _finetune_table, _harness, _methods, _report, _tasks, finetune
from benchmarks._methods import FORA, FORA_BY_ROW, METHODS
from stiefel_lora import stiefel
from stiefel_lora.errors import InputError
from tests.tiny import save_tiny_model, write_jsonl


def cell(method: str, lr: float, seed: int, validation: float, test: float) -> dict[str, Any]:
    measured = {"validation_loss": validation, "test_loss": test, "trainable": 1000, "peak_mib_above_base": 1.0}
    return {"task": "code", "method": method, "lr": lr, "seed": seed, **measured}


# -- data and measures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    for name, answers in (("letters", "ab"), ("digits", "123")):
        for part, count in (("train", 30), ("test", 12)):
            records = [
                {"instruction": f"def {name}_{i}(x)?", "output": f"the answer is {answers[i % len(answers)]}"}
                for i in range(count)
            ]
            write_jsonl(folder / f"{name}_{part}.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")))


def test_questions_ask_for_the_first_token_in_which_the_answers_differ(folder: Path, tokenizer: Any) -> None:
    task = _tasks.instructions(folder, tokenizer, 64, 10)
    assert len(task.questions) == 10
    assert {len(q.choices) for q in task.questions} == {2, 3}, "both sets, in turn"
    for question in task.questions:
        prompt, right = tokenizer.decode(question.ids), tokenizer.decode(question.choices[question.right])
        number = int(prompt.split("(")[0].rsplit("_", 1)[1])
        assert prompt.rstrip().endswith("the answer is")
        assert right.strip() == ("123"[number % 3] if "digits" in prompt else "ab"[number % 2])


def test_training_validation_and_test_are_apart(folder: Path, tokenizer: Any) -> None:
    task = _tasks.instructions(folder, tokenizer, 64, 4)
    assert (len(task.train), len(task.validation), len(task.test)) == (54, 6, 24)
    train, validation = ({tuple(ids.tolist()) for ids in part.input_ids} for part in (task.train, task.validation))
    assert not train & validation
    # No result may tell where the data were.
    assert str(folder) not in "".join(part.description for part in (task.train, task.validation, task.test))


def test_loss_and_accuracy_are_those_of_single_samples(folder: Path, tokenizer: Any) -> None:
    model, _ = _tasks.tiny()
    model.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    task = _tasks.instructions(folder, tokenizer, 64, 8)
    total = tokens = right = 0.0
    for i in (0, 4, 8, 12, 16, 20):
        batch = task.test.batch([i])
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss.detach()) * count
        tokens += count
    for question in task.questions:
        last = model(input_ids=question.ids[None]).logits[0, -1]
        right += int(last[torch.cat(question.choices)].argmax()) == question.right
    # One float32 softmax more or less, and another order of summation.
    assert _tasks.mean_loss(model, task.test, 6, 4) == pytest.approx(total / tokens, rel=1e-5)
    assert _tasks.accuracy(model, task.questions, 3) == right / 8


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Question sets that list their options, as the files of LLM-Adapters do, and one that lists none."""
    folder = tmp_path_factory.mktemp("listed")
    for name, option, words in (
        ("places", "Answer", ("in", "not in x", "def")),
        ("ends", "Ending", ("return x", "self")),
    ):
        for part, count in (("train", 30), ("test", 12)):
            records = []
            for i in range(count):
                texts = [f"{word} {i % 5}" for word in words]
                options = " ".join(f"{option}{n}: {text}" for n, text in enumerate(texts, start=1))
                names = "/".join(f"{option.lower()}{n}" for n in range(1, len(words) + 1))
                records.append(
                    {
                        "instruction": f"def {name}_{i}(x): Answer?\n\n{options}\n\nAnswer format: {names}",
                        "output": f"the correct answer is {option.lower()}{1 + i % len(words)}",
                    }
                )
            write_jsonl(folder / f"{name}_{part}.jsonl", records)
    for part in ("train", "test"):
        records = [{"instruction": f"x{i}?\n\nAnswer format: true/false", "output": "it is true"} for i in range(9)]
        write_jsonl(folder / f"none_{part}.jsonl", records)
    return folder


def test_answers_in_words_are_learnt_without_their_options(listed: Path, tokenizer: Any) -> None:
    task = _tasks.answers(listed, tokenizer, 64, 10)
    assert (len(task.train), len(task.validation), len(task.test), len(task.questions)) == (54, 6, 24, 10)
    texts = {tokenizer.decode(ids) for part in (task.train, task.validation) for ids in part.input_ids}
    end = tokenizer.eos_token
    expected = {f"def places_{i}(x): Answer?\n\n{('in', 'not in x', 'def')[i % 3]} {i % 5}{end}" for i in range(30)}
    assert texts == expected | {
        f"def ends_{i}(x): Answer?\n\n{('return x', 'self')[i % 2]} {i % 5}{end}" for i in range(30)
    }
    assert "none" not in task.train.description
    assert str(listed) not in task.train.description
    for question in task.questions:
        prompt, answers = tokenizer.decode(question.ids), [tokenizer.decode(choice) for choice in question.choices]
        number = int(prompt.split("(")[0].rsplit("_", 1)[1])
        words = ("in", "not in x", "def") if "places" in prompt else ("return x", "self")
        assert prompt == prompt.split("?")[0] + "?\n\n"
        assert answers == [f"{word} {number % 5}" for word in words]
        assert question.right == number % len(words)


def test_the_choice_in_words_is_the_likeliest_token_by_token(listed: Path, tokenizer: Any) -> None:
    model, _ = _tasks.tiny()
    model.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]
    task = _tasks.answers(listed, tokenizer, 64, 24)
    right = 0
    for question in task.questions:
        losses = []
        for choice in question.choices:
            ids = torch.cat([question.ids, choice])[None]
            labels = torch.cat([torch.full_like(question.ids, -100), choice])[None]
            losses.append(float(model(input_ids=ids, labels=labels).loss.detach()))
        right += losses.index(min(losses)) == question.right
    assert 0 < right < 24
    assert _tasks.accuracy(model, task.questions, 5) == right / 24


def test_a_folder_whose_sets_list_no_options_has_no_answers_in_words(folder: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="lists its options"):
        _tasks.answers(folder, tokenizer, 64, 4)


def tiny() -> tuple[Any, _tasks.Task, _methods.Setting]:
    """A model, its task and what a method may know of them."""
    model, task = _tasks.tiny()
    frame = finetune.Frame(None, None, 4, 10, 2, 16, 1, None, 4, 4, "cpu", "float32")
    return model, task, finetune._setting(frame, task, finetune._select(model, task, frame), seed=0, lr=1e-2)


@pytest.mark.parametrize("method", ["LoRA", FORA, "FoRA (B)", "FoRA (both)", "LoRA, half the rank", "AdaLoRA"])
def test_effective_rank_share_is_that_of_the_whole_update(method: str) -> None:
    model, task, setting = tiny()
    tuned = METHODS[method](model, setting)
    before = {name: m.weight.detach().clone() for name, m in dense_linears(tuned.model).items()}
    for step in range(3):
        finetune._step(tuned, task.train.batch([step]), step)
    merge(tuned.model)
    deltas = [m.weight.detach() - before[name] for name, m in dense_linears(tuned.model).items()]
    updates = [(a.double() @ b.double()) for a, b in tuned.updates()]
    changed = [d.double() for d in deltas if d.abs().max() > 0]
    assert len(updates) == len(changed) > 0
    # AdaLoRA has pruned directions by now, some linear maps more than others.
    ranks = [int(torch.linalg.matrix_rank(u)) for u in updates]
    assert set(ranks) == {2 if method == "LoRA, half the rank" else 4} or method == "AdaLoRA"
    assert (len(set(ranks)) > 1) == (method == "AdaLoRA")
    # The merged weights are float32: their rounding, 6e-8 of 0.1, is 1e-3 of an update of 1e-5.
    expected = [float(stiefel.effective_rank(u / u.norm())) / rank for u, rank in zip(updates, ranks, strict=True)]
    assert _methods.effective_rank_share(tuned.updates()) == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    for update, delta in zip(updates, changed, strict=True):
        cosine = (update * delta).sum() / update.norm() / delta.norm()
        assert float(cosine) == pytest.approx(1, abs=1e-3)


def test_loras_gradient_start_is_ours_and_leaves_the_output_alone() -> None:
    model, task, setting = tiny()
    batch = task.train.batch([0])
    before = model(**batch).loss.detach()
    ours = METHODS["Stiefel A, half the rank, gradient start"](copy.deepcopy(model), setting)
    peers = METHODS["LoRA, half the rank, gradient start"](model, setting)
    pairs = list(zip(ours.updates(), peers.updates(), strict=True))
    assert len(pairs) == 4 * len(_methods.TARGETS)
    for (_, mine), (_, other) in pairs:
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
        # Singular vectors in float32.
        torch.testing.assert_close(other @ other.T, torch.eye(2), rtol=0, atol=1e-5)
    # The same sums in another order.
    torch.testing.assert_close(peers.model(**batch).loss.detach(), before, rtol=1e-6, atol=0)


def test_loras_ranks_by_the_gradient_are_ours_and_its_start_is_its_own() -> None:
    model, _, setting = tiny()
    ours = METHODS[_methods.RANKS_BY_ROW](copy.deepcopy(model), setting)
    peers = METHODS[_methods.LORA_RANKS](model, setting)
    pairs = list(zip(ours.updates(), peers.updates(), strict=True))
    ranks = [len(other) for _, (_, other) in pairs]
    assert [len(mine) for (_, mine), _ in pairs] == ranks
    assert len(set(ranks)) > 1
    for (_, mine), (_, other) in pairs:
        torch.testing.assert_close(mine @ mine.T, torch.eye(len(mine)), rtol=0, atol=1e-5)
        # Kaiming's: entries within 1 / sqrt(in), a third of the norm of orthonormal rows.
        assert float(other.abs().max()) <= other.shape[1] ** -0.5


@pytest.mark.parametrize(
    ("method", "share", "targets"),
    [(_methods.SHARED, 9 / 8, _methods.TARGETS), (_methods.SHARED_LINEAR, 5 / 8, _methods.ALL_LINEAR)],
)
def test_one_orthonormal_factor_is_shared_by_all_linear_maps_of_a_name(
    method: str, share: float, targets: tuple[str, ...]
) -> None:
    model, task, setting = tiny()
    tuned = METHODS[method](model, setting)
    shapes = [module.weight.shape for module in dense_linears(model, targets).values()]
    rank = round(share * setting.rank)
    by_name = len(shapes) // setting.depth
    trained = sum(p.numel() for group in tuned.optimizer.param_groups for p in group["params"])
    assert trained == rank * (sum(out for out, _ in shapes) + sum(width for _, width in shapes[:by_name]))
    for step in range(3):
        finetune._step(tuned, task.train.batch([step]), step)
    updates = list(tuned.updates())
    for place, (b, a) in enumerate(updates):
        torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-5)
        assert torch.equal(a, updates[place % by_name][1])
        assert place < by_name or not torch.equal(b, updates[place % by_name][0])


def dense_linears(model: torch.nn.Module, targets: tuple[str, ...] = _methods.TARGETS) -> dict[str, torch.nn.Module]:
    return {
        name: getattr(module, "base_layer", module)
        for name, module in model.named_modules()
        if name.split(".")[-1] in targets
    }


def merge(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "merge") and hasattr(module, "unmerge"):
            module.merge()


# -- resumption --------------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, **more: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    args = parser.parse_args(["--methods", "LoRA", FORA, "--lrs", "1e-3", "1e-2", "--seeds", "2"])
    base = {"quick": False, "seed": 0, "threads": 1, "previous": None, "save": lambda results: None, "command": "it"}
    return argparse.Namespace(**{**vars(args), **base, "output": tmp_path / "x.json", **more})


def test_finished_cells_are_not_run_again_and_more_seeds_follow_at_the_best_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    saved: list[int] = []

    def fake(function: Any, *args: Any) -> Any:
        if function is finetune.select:
            return {"layers": [0]}
        task, method, lr, seed = args[1]
        ran.append(args[1])
        if len(ran) == 3:
            raise RuntimeError("a peer fails once")
        return cell(method, lr, seed, validation=lr if method == "LoRA" else -lr, test=1.0)

    monkeypatch.setattr(finetune, "_in_a_process", fake)
    first = finetune.run(arguments(tmp_path, save=lambda results: saved.append(len(results["cells"]))))
    grid = [("code", m, lr, 0) for lr in (1e-3, 1e-2) for m in ("LoRA", FORA)]
    # LoRA at 1e-2 failed, so its best is 1e-3; that of FoRA is 1e-2.
    assert ran == [*grid, ("code", "LoRA", 1e-3, 1), ("code", FORA, 1e-2, 1)]
    assert saved == [0, 1, 2, 3, 4, 5, 6]
    assert first["cells"][2]["error"] == "RuntimeError: a peer fails once"
    again = finetune.run(arguments(tmp_path, previous=copy.deepcopy(first)))
    # What failed is tried once more, and nothing else.
    assert ran[6:] == [grid[2]]
    assert not any("error" in c for c in again["cells"])
    assert again["cells"][:-1] == [c for c in first["cells"] if "error" not in c]
    assert finetune.run(arguments(tmp_path, previous=copy.deepcopy(again))) == again
    assert len(ran) == 7


def test_several_cells_run_at_a_time_and_more_seeds_wait_for_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    all_there, lora_again = threading.Barrier(3, timeout=60), threading.Event()

    def fake(function: Any, *args: Any) -> Any:
        if function is finetune.select:
            return {"layers": [0]}
        assert not args[-1], "the bars of several cells would write over each other"
        _, method, lr, seed = args[1]
        begun.append((method, lr, seed))
        if len(begun) <= 3:
            all_there.wait()  # for ever if they came one after the other
        if (method, lr, seed) == (FORA, 1e-2, 0):
            # The last of the grid to end: what it is best at is known then, LoRA's has been before.
            assert lora_again.wait(60)
        if (method, lr, seed) == ("LoRA", 1e-3, 1):
            lora_again.set()
        return cell(method, lr, seed, validation=lr if method == "LoRA" else -lr, test=1.0)

    monkeypatch.setattr(finetune, "_in_a_process", fake)
    found = finetune.run(arguments(tmp_path, jobs=3))
    assert not any("error" in c for c in found["cells"])
    assert sorted(begun[4:]) == [(FORA, 1e-2, 1), ("LoRA", 1e-3, 1)]


def _late(file: Path) -> None:
    time.sleep(20)
    file.touch()


def test_cells_at_work_end_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work = threading.Event()

    def fake(function: Any, *args: Any) -> Any:
        if function is finetune.select:
            return {"layers": [0]}
        _, method, lr, seed = args[1]
        if method != "LoRA":
            at_work.set()
            finetune._harness.in_a_process(_late, tmp_path / f"ended {lr}")
        assert at_work.wait(60)
        return cell(method, lr, seed, 1.0, 1.0)

    def save(results: dict[str, Any]) -> None:
        if results["cells"]:
            while not multiprocessing.active_children():  # pragma: no cover
                time.sleep(0.01)
            raise OSError("the disk is full")

    monkeypatch.setattr(finetune, "_in_a_process", fake)
    with pytest.raises(OSError, match="the disk is full"):
        finetune.run(arguments(tmp_path, jobs=2, save=save))
    assert not list(tmp_path.glob("ended*"))


def test_a_peer_that_is_not_there_is_named_and_tried_again_when_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        finetune._harness.main(finetune, ["--quick", "--output", str(tmp_path / "quick.json")])
    printed = capsys.readouterr().out
    assert "| FoRA (A) |" in printed
    assert "LoRA at 0.001 failed: NotInstalledError: peft is not installed: pip install" in printed

    def fake(function: Any, *args: Any) -> Any:
        return {"layers": [0]} if function is finetune.select else cell(args[1][1], *args[1][2:], 1.0, 1.0)

    monkeypatch.setattr(finetune, "_in_a_process", fake)
    whole = finetune.run(arguments(tmp_path))
    lost = copy.deepcopy(whole)
    key = {name: lost["cells"][0][name] for name in finetune._KEY}
    lost["cells"][0] = {**key, "error": "NotInstalledError: peft is not installed"}
    again = finetune.run(arguments(tmp_path, previous=lost))
    assert not any("error" in c for c in again["cells"])
    assert len(again["cells"]) == len(whole["cells"])


def test_a_table_is_not_continued_with_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "_in_a_process", lambda function, *args: {"layers": [0]})
    begun = finetune.run(arguments(tmp_path, minutes=0))
    assert begun["cells"] == []
    with pytest.raises(InputError, match=r"steps.*\(100, 7\)"):
        finetune.run(arguments(tmp_path, previous=begun, steps=7))
    # A result from before there was a setting has its default.
    del begun["frame"]["train_samples"]
    assert finetune.run(arguments(tmp_path, minutes=0, previous=begun))["cells"] == []
    with pytest.raises(InputError, match=r"train_samples.*\(None, 5\)"):
        finetune.run(arguments(tmp_path, previous=begun, train_samples=5))


def test_less_to_train_on_is_a_part_of_what_there_was() -> None:
    _, whole = _tasks.tiny()
    part = _tasks.with_less_to_train_on(whole, 3)
    assert [any(torch.equal(x, y) for y in whole.train.input_ids) for x in part.train.input_ids] == [True] * 3
    assert (part.test, part.validation, part.questions) == (whole.test, whole.validation, whole.questions)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_a_rate_that_is_best_with_one_seed_is_held_against_others_over_all_its_seeds() -> None:
    cells = [cell("LoRA", 1e-3, seed, 2.0, 1.0) for seed in range(3)]
    cells += [cell("LoRA", 2e-3, 0, 1.9, 1.0), cell("LoRA", 5e-4, 0, 1.95, 1.0)]
    assert _finetune_table.best_rate(cells, "code", "LoRA") == 2e-3
    cells.append(cell("LoRA", 2e-3, 1, 2.2, 1.0))
    assert _finetune_table.best_rate(cells, "code", "LoRA") == 1e-3


def test_the_rate_is_chosen_on_validation_data_and_gains_are_paired_by_seed() -> None:
    cells = [
        cell("LoRA", 1e-3, 0, 2.0, 1.0),
        cell("LoRA", 1e-2, 0, 1.9, 3.0),
        cell("LoRA", 1e-2, 1, 1.9, 5.0),
        cell(FORA, 1e-3, 0, 1.0, 2.5),
        cell(FORA, 1e-3, 1, 1.0, 4.6),
        cell(FORA, 1e-3, 2, 1.0, 9.0),
    ]
    assert _finetune_table.best_rate(cells, "code", "LoRA") == 1e-2
    assert _finetune_table.best_rate(cells, "code", "DoRA") is None
    assert _finetune_table.gain(cells, "code", FORA, "LoRA") == pytest.approx([0.5, 0.4])
    first, last = _finetune_table.claims(cells, "code")
    assert "leans to yes" in first
    of_all = len(_finetune_table.COMPARISONS) + len(_finetune_table.COMBINATIONS)
    assert last == f"{of_all - 1} more comparisons are not measured yet."


def test_two_parts_combine_super_additively_when_both_gain_more_than_the_sum_of_each() -> None:
    losses = {"LoRA, random half": 4.0, "LoRA, Fisher half": 3.7, _methods.RANDOM_BY_ROW: 3.9}
    cells = [cell(method, 1e-3, seed, 1.0, loss) for method, loss in losses.items() for seed in range(3)]
    # The parts gain 0.3 and 0.1; both 0.5 with the first seed and 0.25 with the second. The third has no cell.
    cells += [cell(FORA_BY_ROW, 1e-3, 0, 1.0, 3.5), cell(FORA_BY_ROW, 1e-3, 1, 1.0, 3.75)]
    gains = _finetune_table.interaction(cells, "code", _methods.RANDOM_BY_ROW, FORA_BY_ROW)
    assert gains == pytest.approx([0.1, -0.15])
    assert _finetune_table.interaction(cells, "code", "Stiefel A, random half", FORA) == []
    cells = [c for c in cells if c["seed"] == 0]
    claim = "The two parts combine super-additively, with a second moment of each row: yes, by one seed alone"
    assert any(line.startswith(claim) for line in _finetune_table.claims(cells, "code"))


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ([0.1, 0.101, 0.102], ": yes (loss lower by +0.1010, spread 0.0010 over 3 seeds, p = 3.3e-05)"),
        ([-0.1, -0.101, -0.102], ": no ("),
        ([0.1, 0.12], ": leans to yes ("),
        ([-0.1, -0.12], ": leans to no ("),
        ([0.1, -0.09], ": not told apart ("),
        ([0.1], ": yes, by one seed alone"),
    ],
)
def test_a_claim_holds_only_with_a_small_p_and_leans_beyond_the_spread(gains: list[float], word: str) -> None:
    # The p of +0.101 +- 0.001 over three: t = 0.101 / (0.001 / sqrt 3) = 175 with 2 degrees of freedom.
    assert word in _finetune_table.verdict("It helps", gains)


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(_harness.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_the_command_of_a_committed_result_names_no_place_of_one_machine(path: Path) -> None:
    content = _harness.read_result(path)
    cells = content["results"].get("cells", [])
    commands = [content["command"], *(cell["command"] for cell in cells if cell.get("command"))]
    assert not [word for command in commands for word in shlex.split(command) if word.startswith("/")]


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    page = _report._harness.RESULTS / _report.PAGE
    assert page.read_text(encoding="utf-8") == _report.render(), "run python -m benchmarks report"
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("!["):
            assert (page.parent / line[line.index("(") + 1 : -1]).is_file()


def test_a_page_has_the_tables_and_pictures_of_each_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune._harness.main(finetune, ["--quick", "--output", str(tmp_path / "finetune.json")])
    capsys.readouterr()
    written = _report.write(tmp_path)
    assert sorted(path.name for path in written) == ["README.md", "finetune.png"]
    assert all(path.is_file() for path in written)
    page = (tmp_path / "README.md").read_text()
    assert "![finetune](finetune.png)" in page
    assert "| FoRA (A) |" in page
