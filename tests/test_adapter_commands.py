"""The commands on adapter folders."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertForSequenceClassification, BertLMHeadModel, PreTrainedTokenizerFast

from stiefel_lora.adapter_commands import add_adapter_commands
from stiefel_lora.adapters import add_adapters
from stiefel_lora.checkpoint import load_adapter, save_adapter
from stiefel_lora.convert import export_peft, import_peft
from stiefel_lora.errors import InputError
from tests.models import FAMILIES
from tests.test_adapters import train
from tests.test_convert import SAME, adapted, dense_layer_of_a_mixture, outputs
from tests.tiny import save_tiny_model

LLAMA = FAMILIES["llama"]


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base with a tokenizer."""
    folder = save_tiny_model(tmp_path_factory.mktemp("base"))
    LLAMA.build().save_pretrained(folder)
    return folder


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_adapter_commands(parser.add_subparsers())
    args = parser.parse_args([str(argument) for argument in arguments])
    args.run(args)


def test_there_and_back(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    run("export", tmp_path / "a", "--format", "peft", "--output", tmp_path / "peft")
    run("import", tmp_path / "peft", "--output", tmp_path / "b", "--orthonormal", "both")
    run("export", tmp_path / "a", "--format", "merged", "--output", tmp_path / "merged", "--model", tiny)
    assert "PEFT LoRA of 10 linears written to" in capsys.readouterr().out
    assert (tmp_path / "merged" / "tokenizer.json").is_file()

    expected = outputs(model)
    imported, loaded = LLAMA.build(), LLAMA.build()
    import_peft(imported, tmp_path / "peft")
    load_adapter(loaded, tmp_path / "b")
    for other in (imported, loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(outputs(other), expected, **SAME)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merged_model_has_the_precision_that_is_asked_for(dtype: str, tiny: Path, tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    words = ("export", tmp_path / "a", "--format", "merged", "--output", tmp_path / "merged", "--model", tiny)
    run(*words, "--dtype", dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {str(p.dtype) for p in merged.parameters()} == {f"torch.{dtype}"}
    # Weights of 8, 11 or 24 bits.
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
    torch.testing.assert_close(outputs(merged.float()), outputs(model), rtol=tolerance, atol=tolerance)


def test_a_precision_is_of_merged_models(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(InputError, match="--dtype is an option of --format merged; a peft adapter has that of its"):
        run("export", tmp_path / "a", "--format", "peft", "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert not (tmp_path / "out").exists()


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(adapted(), tmp_path / "a")
    run("info", tmp_path / "a")
    assert capsys.readouterr().out.startswith("stiefel_lora adapter for LlamaForCausalLM: 10 linears")
    run("info", tmp_path / "a", "--json")
    info = json.loads(capsys.readouterr().out)
    assert info["modules"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert info["modules"][0]["rank"] == 4


def test_the_folder_of_a_run_stands_for_its_adapter(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(adapted(), tmp_path / "run" / "adapter")
    run("info", tmp_path / "run")
    assert capsys.readouterr().out.startswith("stiefel_lora adapter for LlamaForCausalLM: 10 linears")
    run("export", tmp_path / "run", "--format", "peft", "--output", tmp_path / "peft")
    run("export", tmp_path / "run", "--format", "merged", "--output", tmp_path / "merged", "--model", tiny)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "peft", "merged"}


@pytest.mark.parametrize("kind", ["stiefel_lora", "PEFT LoRA"])
def test_an_adapter_that_has_another_in_a_folder_of_the_runs_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outer = tmp_path / kind
    if kind == "stiefel_lora":
        save_adapter(adapted(), outer)
    else:
        export_peft(adapted(), outer)
    save_adapter(adapted(rank=2, layers=[1]), outer / "adapter")
    run("info", outer)
    told = capsys.readouterr().out
    assert told.startswith(f"{kind} adapter for ") and ": 10 linears" in told


def test_adapters_that_peft_would_lose_are_not_exported(tmp_path: Path) -> None:
    save_adapter(dense_layer_of_a_mixture(), tmp_path / "a")
    with pytest.raises(InputError, match=r"of a qwen3_moe, and these adapters would be lost: model\.layers\.0\.mlp"):
        run("export", tmp_path / "a", "--format", "peft", "--output", tmp_path / "peft")


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (BertForSequenceClassification, {"num_labels": 5}),
        (
            BertForSequenceClassification,
            {"id2label": {0: "no", 1: "yes"}, "problem_type": "multi_label_classification"},
        ),
        (BertLMHeadModel, {"is_decoder": True}),
    ],
)
def test_a_model_of_a_task_is_merged_as_it_was_loaded(kind: type, task: dict[str, object], tmp_path: Path) -> None:
    """What ``from_pretrained`` was told besides the name is in no file of the base."""
    FAMILIES["bert"].build().save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base", **task)  # type: ignore[attr-defined]
    add_adapters(model, layers=None, rank=2)
    train(model)
    if kind is BertForSequenceClassification:
        model.classifier.requires_grad_(True)
        model.bert.pooler.requires_grad_(True)  # which a masked language model has not
    save_adapter(model, tmp_path / "a")
    run("export", tmp_path / "a", "--format", "merged", "--output", tmp_path / "merged")
    merged = kind.from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
    for key in ("id2label", "label2id", "problem_type", "is_decoder"):
        assert getattr(merged.config, key, None) == getattr(model.config, key, None)
    ids = torch.arange(2, 14).view(2, 6)
    # Another order of sums in float32, under updates of order one; as an encoder the last is 0.2 off.
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_that_cannot_be_written_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise Exception("No space left on device (os error 28)")  # noqa: TRY002 - what the tokenizers library raises

    save_adapter(adapted(), tmp_path / "a")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(InputError, match=r"cannot write to .*merged: No space left"):
        run("export", tmp_path / "a", "--format", "merged", "--output", tmp_path / "merged", "--model", tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(InputError, match="exists already"):
        run("export", tmp_path / "a", "--format", "peft", "--output", tmp_path / "a")
    with pytest.raises(InputError, match="does not name its base model; give it with --model"):
        run("export", tmp_path / "a", "--format", "merged", "--output", tmp_path / "new")
    with pytest.raises(InputError, match="is not a PEFT adapter; it is a Stiefel adapter already"):
        run("import", tmp_path / "a", "--output", tmp_path / "new")
    with pytest.raises(InputError, match="no adapter folder at"):
        run("export", tmp_path / "none", "--format", "peft", "--output", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
