"""The commands on adapter folders."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stiefel_lora.adapter_commands import add_adapter_commands
from stiefel_lora.checkpoint import load_adapter, save_adapter
from stiefel_lora.convert import import_peft
from stiefel_lora.errors import InputError
from tests.models import FAMILIES
from tests.test_convert import SAME, adapted, outputs

LLAMA = FAMILIES["llama"]


class Tokenizer:
    """Writes one file, as a tokenizer does."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    loaded: dict[str, Any] = {"tiny": LLAMA.build}
    add_adapter_commands(parser.add_subparsers(), lambda name, kind, adapted: (loaded[name](), Tokenizer()))
    args = parser.parse_args([str(argument) for argument in arguments])
    args.run(args)


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    run("export", tmp_path / "a", "--format", "peft", "--output", tmp_path / "peft")
    run("import", tmp_path / "peft", "--output", tmp_path / "b", "--orthonormal", "both")
    run("export", tmp_path / "a", "--format", "merged", "--output", tmp_path / "merged", "--model", "tiny")
    assert "PEFT LoRA of 10 linears written to" in capsys.readouterr().out
    assert (tmp_path / "merged" / "tokenizer.json").is_file()

    expected = outputs(model)
    imported, loaded = LLAMA.build(), LLAMA.build()
    import_peft(imported, tmp_path / "peft")
    load_adapter(loaded, tmp_path / "b")
    for other in (imported, loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(outputs(other), expected, **SAME)


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(adapted(), tmp_path / "a")
    run("info", tmp_path / "a")
    assert capsys.readouterr().out.startswith("stiefel_lora adapter for LlamaForCausalLM: 10 linears")
    run("info", tmp_path / "a", "--json")
    info = json.loads(capsys.readouterr().out)
    assert info["modules"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert info["modules"][0]["rank"] == 4


def test_the_folder_of_a_run_stands_for_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(adapted(), tmp_path / "run" / "adapter")
    run("info", tmp_path / "run")
    assert capsys.readouterr().out.startswith("stiefel_lora adapter for LlamaForCausalLM: 10 linears")
    run("export", tmp_path / "run", "--format", "peft", "--output", tmp_path / "peft")
    run("export", tmp_path / "run", "--format", "merged", "--output", tmp_path / "merged", "--model", "tiny")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "peft", "merged"}


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(InputError, match="exists already"):
        run("export", tmp_path / "a", "--format", "peft", "--output", tmp_path / "a")
    with pytest.raises(InputError, match="does not name its base model; give it with --model"):
        run("export", tmp_path / "a", "--format", "merged", "--output", tmp_path / "new")
    with pytest.raises(InputError, match="is not a PEFT adapter"):
        run("import", tmp_path / "a", "--output", tmp_path / "new")
    with pytest.raises(InputError, match="no adapter folder at"):
        run("export", tmp_path / "none", "--format", "peft", "--output", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
