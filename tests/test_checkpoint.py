"""Saved adapters come back bit for bit; anything else is refused and leaves the model as it was."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stiefel_lora._files import atomic_folder
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import (
    adapter_names,
    add_adapters,
    disable_adapters,
    insert_adapters,
    remove_adapters,
    use_adapter,
)
from stiefel_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_adapter, save_adapter
from stiefel_lora.convert import export_peft, from_peft, import_peft, to_peft
from stiefel_lora.errors import InputError, ManifoldError
from tests.models import FAMILIES

LLAMA = FAMILIES["llama"]


def trained(**options: Any) -> nn.Module:
    """A model whose free factors are not zero, as after training."""
    model = LLAMA.build()
    add_adapters(model, **{"layers": [0, 2], "rank": 4, **options})
    torch.manual_seed(5)
    for layer in adapter_layers(model).values():
        for name, factor in layer.factors().items():
            if name not in layer.manifold_parameters():
                nn.init.normal_(factor)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**LLAMA.batch(2, 7)).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"orthonormal": "B", "rslora": True, "alpha": 7},
        {"orthonormal": "both", "rank_pattern": {"q_proj": 2}, "dropout": 0.1},
        {"layers": None, "target_modules": "all-linear", "init": "svd"},
    ],
)
def test_round_trip_gives_the_same_logits(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(**options)
    save_adapter(model, tmp_path / "new" / "adapter")
    fresh = LLAMA.build()
    state = torch.get_rng_state()
    names = load_adapter(fresh, tmp_path / "new" / "adapter")
    assert torch.equal(torch.get_rng_state(), state)
    assert names == list(adapter_layers(model))
    assert torch.equal(logits(fresh), logits(model))
    assert not torch.equal(logits(fresh), logits(LLAMA.build()))
    for name, layer in adapter_layers(fresh).items():
        assert layer.options == adapter_layers(model)[name].options
        assert all(p.requires_grad for p in layer.factors().values())
    assert sum(p.requires_grad for p in fresh.parameters()) == sum(p.requires_grad for p in model.parameters())


def with_head(value: float, model: nn.Module) -> nn.Module:
    """A model whose final norm is trained along, and has this value."""
    model.model.norm.weight.data.fill_(value)
    model.model.norm.weight.requires_grad_(True)
    return model


def test_loading_into_adapters_that_are_there_gives_the_base_its_own_back(tmp_path: Path) -> None:
    save_adapter(with_head(3.0, trained()), tmp_path / "adapter")
    base, model = LLAMA.build(), trained()
    load_adapter(model, tmp_path / "adapter")
    assert model.model.norm.weight.eq(3).all()
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(base))
        model.model.norm.weight.data.mul_(2)  # of the context alone
    assert torch.equal(logits(remove_adapters(model)), logits(base))
    # What is trained along is the set's own by now: the best checkpoint's value is to stay.
    model = with_head(2.0, trained())
    load_adapter(model, tmp_path / "adapter")
    assert remove_adapters(model).model.norm.weight.eq(3).all()


def test_nothing_is_saved_or_loaded_while_adapters_are_disabled(tmp_path: Path) -> None:
    save_adapter(with_head(3.0, trained()), tmp_path / "adapter")
    model = LLAMA.build()
    load_adapter(model, tmp_path / "adapter")
    before = logits(model)
    with disable_adapters(model):
        for act in (
            lambda: save_adapter(model, tmp_path / "again"),
            lambda: export_peft(model, tmp_path / "again"),
            lambda: load_adapter(model, tmp_path / "adapter"),
            lambda: add_adapters(model, layers=[1], rank=2),
        ):
            with pytest.raises(InputError, match="leave disable_adapters before you"):
                act()
    assert not (tmp_path / "again").exists()
    assert torch.equal(logits(model), before)


def test_a_trained_embedding_that_is_tied_comes_back(tmp_path: Path) -> None:
    tied = FAMILIES["llama-tied"]
    model = tied.build()
    add_adapters(model, layers=[0], rank=2)
    model.model.embed_tokens.weight.requires_grad_(True)
    model.model.embed_tokens.weight.data.mul_(2)
    save_adapter(model, tmp_path)
    for written_before_names_were_kept in (False, True):
        if written_before_names_were_kept:
            _edit_config(lambda c: c.pop("tied"))(tmp_path)
        fresh = tied.build()
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
        assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


def test_a_factor_that_was_shared_by_hand_is_saved(tmp_path: Path) -> None:
    model = trained()
    layers, first = adapter_layers(model), {}
    for name, layer in layers.items():
        layer.lora_A = first.setdefault(name.split(".")[-1], layer.lora_A)
    assert len({id(layer.lora_A) for layer in layers.values()}) == len(first) == len(layers) / 2
    save_adapter(model, tmp_path / "a")
    export_peft(model, tmp_path / "peft")
    loaded = LLAMA.build()
    load_adapter(loaded, tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    served = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "peft")
    # PEFT multiplies in another order, in float32.
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_factors_off_the_manifold_are_saved_as_the_same_update(
    orthonormal: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after training with AdamW, or in an average of models."""
    model = trained(orthonormal=orthonormal)
    layer = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.add_(0.1 * torch.randn_like(factor))
    save_adapter(model, tmp_path / "adapter")
    (record,) = caplog.records
    assert "layers.0.self_attn.q_proj: off the manifold by" in record.getMessage()
    fresh = LLAMA.build()
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_an_update_that_was_not_trained_like_the_others_is_named(
    orthonormal: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a linear that the model passes by."""
    model = LLAMA.build()
    add_adapters(model, layers=[0, 2], rank=4, orthonormal=orthonormal)
    save_adapter(model, tmp_path / "start")
    save_adapter(trained(orthonormal=orthonormal), tmp_path / "trained")
    assert not caplog.records
    layer = adapter_layers(model)["model.layers.2.mlp.up_proj"]
    for name, factor in layer.factors().items():
        if name not in layer.manifold_parameters():
            nn.init.normal_(factor)
    save_adapter(model, tmp_path / "one")
    (record,) = caplog.records
    assert "layers.0.self_attn.q_proj, " in record.getMessage() and "and 3 more: the update is zero" in (
        record.getMessage()
    )


def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path / "a")
    for layer in adapter_layers(model).values():
        layer.merge()
    save_adapter(model, tmp_path / "b")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_loads_into_adapters_of_the_same_form_in_place(folder: Path) -> None:
    model = LLAMA.build()
    add_adapters(model, layers=[0, 2], rank=4)
    parameters = dict(model.named_parameters())
    load_adapter(model, folder)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(logits(model), logits(trained()))


def test_other_adapters_in_use_are_refused_or_put_aside(folder: Path) -> None:
    model = LLAMA.build()
    add_adapters(model, layers=[0, 1], rank=4)
    before = logits(model)
    added, missing = (
        f"model.layers.{i}.self_attn.q_proj, .*: only in the {place}" for i, place in ((1, "m"), (2, "f"))
    )
    with pytest.raises(InputError, match=rf"in use than the file \({missing}.*; {added}.*\); remove .*remove_adapters"):
        load_adapter(model, folder)
    assert torch.equal(logits(model), before)
    another_rank = LLAMA.build()
    add_adapters(another_rank, layers=[0, 2], rank=3)
    with pytest.raises(
        InputError, match=r"q_proj, .* and 4 more: rank 4 in the file, 3 here, alpha 8.0 in the file, 6.0"
    ):
        load_adapter(another_rank, folder)
    load_adapter(model, folder, name="second")
    assert adapter_names(model) == ["second", "default"]
    assert torch.equal(logits(model), logits(trained()))


def test_a_head_that_was_trained_too_is_saved(tmp_path: Path) -> None:
    family = FAMILIES["roberta"]
    batch = family.batch(2, 7)
    model = family.build()
    add_adapters(model, layers=[0], rank=4)
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    save_adapter(model, tmp_path)
    fresh = family.build()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, fresh)]
    assert trainable[0] == trainable[1]
    assert {"classifier.dense.weight", "classifier.out_proj.bias"} <= trainable[1]

    other = family.build()
    other.classifier.out_proj = nn.Linear(32, 7)
    with pytest.raises(
        InputError,
        match=r"it has classifier.out_proj.weight of shape \(5, 32\), here \(7, 32\), classifier.out_proj.bias of",
    ):
        load_adapter(other, tmp_path)
    assert not adapter_layers(other)
    next(iter(adapter_layers(model).values())).base.bias.requires_grad_(True)
    with pytest.raises(InputError, match="query.base.bias is trainable beside its adapter"):
        save_adapter(model, tmp_path)


def test_a_parametrized_factor_is_refused_by_name(tmp_path: Path) -> None:
    model = trained()
    layer = next(iter(adapter_layers(model).values()))
    torch.nn.utils.parametrize.register_parametrization(layer, "lora_B", torch.nn.Tanh())
    with pytest.raises(InputError, match="lora_B of an adapter is computed from another parameter"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_replaces_an_adapter_and_keeps_other_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    save_adapter(trained(rank=2), folder)
    assert {file.name for file in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "notes.txt"}
    assert all(options["rank"] == 2 for options in read_adapter(folder).modules.values())
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can swap two folders in one step")
@pytest.mark.parametrize("write", [save_adapter, export_peft])
def test_an_adapter_is_replaced_in_one_step(
    write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the files replaced one after another, a kill between would leave one's scaling with another's factors."""
    write(trained(), tmp_path / "adapter")
    steps = []
    monkeypatch.setattr(Path, "replace", lambda *paths: steps.append(paths))
    other = trained(alpha=3)
    write(other, tmp_path / "adapter")
    assert steps == []
    monkeypatch.undo()
    fresh = LLAMA.build()
    (load_adapter if write is save_adapter else import_peft)(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(other), rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("place", ["inside", "no system call"])
def test_a_folder_that_cannot_be_swapped_is_filled(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inode = folder.stat().st_ino
    if place == "inside":
        monkeypatch.chdir(folder)
    else:
        monkeypatch.setattr("stiefel_lora._files._exchange", lambda a, b: False)
    save_adapter(trained(rank=2), folder)
    assert folder.stat().st_ino == inode
    assert all(options["rank"] == 2 for options in read_adapter(folder).modules.values())


def test_files_can_be_read_as_widely_as_the_umask_says(folder: Path) -> None:
    (folder / "other").touch()
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    save_adapter(trained(), tmp_path / ("x" * longest))
    assert len(read_adapter(tmp_path / ("x" * longest)).modules) == 10


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        adapter_layers(model)["model.layers.0.self_attn.q_proj"].lora_B[0, 0] = torch.nan
    with pytest.raises(InputError, match="q_proj.lora_B has NaN"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="has no adapters; call add_adapters or load_adapter"):
        save_adapter(remove_adapters(model), tmp_path / "adapter")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        save_adapter(trained(), tmp_path / "file")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "other") as temporary:
        (temporary / "part").touch()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        change(config)
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return damage


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        # Copies: the tensors are a map of the file that is written next.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return damage


def _truncate(folder: Path) -> None:
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, folder / WEIGHTS_FILE)


def _peft(folder: Path) -> None:
    (folder / CONFIG_FILE).rename(folder / "adapter_config.json")


Q = "model.layers.0.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no adapter folder at"),
    "no configuration": (lambda f: (f / CONFIG_FILE).unlink(), "holds no adapter.json"),
    "PEFT": (_peft, "use import_peft"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "adapter.safetensors is missing"),
    "truncated weights": (_truncate, "damaged or not a safetensors file"),
    "a pickle": (_pickle, "damaged or not a safetensors file"),
    "empty weights": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), "damaged or not a safetensors file"),
    "bad JSON": (lambda f: (f / CONFIG_FILE).write_text('{"format": '), "not valid JSON"),
    "binary JSON": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "JSON list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "holds a JSON list"),
    "foreign": (_edit_config(lambda c: c.update(format="other")), "its format is 'other'"),
    "newer": (_edit_config(lambda c: c.update(format_version=3)), "version 3, .* reads up to 2; upgrade"),
    "a version of before the first": (_edit_config(lambda c: c.update(format_version=0)), "has format version 0"),
    "no version": (_edit_config(lambda c: c.update(format_version=True)), "has format version True"),
    "a list as a name": (_edit_config(lambda c: c.update(tied={"a": []})), "tied should be an object of names"),
    "a task in words": (_edit_config(lambda c: c["base_model"].update(task="x")), "a base's task has id2label, .* 'x'"),
    "a task that runs code": (
        _edit_config(lambda c: c["base_model"].update(task={"trust_remote_code": True})),
        "is damaged: a base's task has .*trust_remote_code",
    ),
    "labels without numbers": (
        _edit_config(lambda c: c["base_model"].update(task={"id2label": {"no": 0}})),
        "is damaged: a base's task has id2label",
    ),
    "a base of another type": (_edit_config(lambda c: c["base_model"].update({"class": 3})), "names no base model"),
    "no modules": (_edit_config(lambda c: c.update(modules={})), "names no modules"),
    "unknown option": (_edit_config(lambda c: c["modules"][Q].update(gate=1)), "should have the entries"),
    "wrong type": (_edit_config(lambda c: c["modules"][Q].update(rank="4")), "rank of .* is '4'"),
    "bool rank": (_edit_config(lambda c: c["modules"][Q].update(rank=True)), "rank of .* is True"),
    "out of range": (_edit_config(lambda c: c["modules"][Q].update(alpha=-1)), "q_proj: alpha must be positive"),
    "beyond a float": (_edit_config(lambda c: c["modules"][Q].update(alpha=10**400)), "q_proj: alpha must be positive"),
    "rank differs": (_edit_config(lambda c: c["modules"][Q].update(rank=3)), r"is torch.float32 of shape \(32, 4\)"),
    "a module less": (_edit_config(lambda c: c["modules"].pop(Q)), "does not name: .*q_proj.lora_A"),
    "a tensor less": (_edit_tensors(lambda t: t.pop(f"{Q}.lora_B")), "q_proj.lora_B is missing"),
    "tied": (_edit_config(lambda c: c.update(tied={"head": "none"})), "tied should be an object of names"),
    "parameters": (_edit_config(lambda c: c.update(parameters=[])), "parameters should be an object of shapes"),
    "a parameter less": (_edit_config(lambda c: c["parameters"].update(head=[2])), "head is missing"),
    "NaN": (_edit_tensors(lambda t: t[f"{Q}.lora_B"].fill_(torch.nan)), "q_proj.lora_B has NaN"),
    "integers": (_edit_tensors(lambda t: t.update({f"{Q}.lora_B": t[f"{Q}.lora_B"].int()})), "is torch.int32 of"),
    "off the manifold": (_edit_tensors(lambda t: t[f"{Q}.lora_A"].mul_(1.01)), "not orthonormal, .* is 0.04"),
    "other names": (
        _edit_config(lambda c: c["modules"].update({f"{Q}.x": c["modules"].pop(Q)})),
        "lora_A is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_files_are_refused_and_leave_the_model_alone(case: str, folder: Path) -> None:
    damage, match = DAMAGE[case]
    damage(folder)
    model = LLAMA.build()
    modules, trainable = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=match):
        load_adapter(model, folder)
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_the_files_of_two_saves_are_no_adapter(folder: Path, tmp_path: Path) -> None:
    """As a kill leaves them between the two in a folder that has other files as well."""
    save_adapter(trained(alpha=400), tmp_path / "other")
    (tmp_path / "other" / CONFIG_FILE).replace(folder / CONFIG_FILE)
    with pytest.raises(InputError, match="are not of one save"):
        load_adapter(LLAMA.build(), folder)
    (tmp_path / "other" / WEIGHTS_FILE).replace(folder / WEIGHTS_FILE)
    load_adapter(LLAMA.build(), folder)


def test_the_base_may_be_named_anew_and_files_from_before_there_was_a_digest_are_read(folder: Path) -> None:
    _edit_config(lambda c: c["base_model"].update(name_or_path="elsewhere"))(folder)
    expected = read_adapter(folder)
    assert expected.base_model["name_or_path"] == "elsewhere"
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    assert read_adapter(folder).modules == expected.modules


def test_off_manifold_is_its_own_error(folder: Path) -> None:
    DAMAGE["off the manifold"][0](folder)
    with pytest.raises(ManifoldError):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("gpt2", r"does not fit GPT2LMHeadModel, which has no linear model.layers.0.* made for LlamaForCausalLM"),
        ("bert", "which has no linear"),
    ],
)
def test_another_base_is_refused(folder: Path, family: str, match: str) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(InputError, match=match):
        load_adapter(model, folder)
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_base_without_weights_is_refused(folder: Path) -> None:
    with torch.device("meta"):
        model = FAMILIES["llama"].build()
    with pytest.raises(InputError, match="q_proj, .* is on the meta device .*; load the base first"):
        load_adapter(model, folder)
    assert not adapter_layers(model)


def test_another_shape_is_refused(folder: Path) -> None:
    model = LLAMA.build()
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 57)
    with pytest.raises(InputError, match="model.layers.2.mlp.up_proj is 32 -> 57, not 32 -> 56"):
        load_adapter(model, folder)
    assert not adapter_layers(model)


def test_an_infinite_factor_is_named_and_not_factored_again(tmp_path: Path) -> None:
    model = trained()
    name, layer = next(iter(adapter_layers(model).items()))
    with torch.no_grad():
        layer.lora_A[0, 0] = math.inf
    with pytest.raises(InputError, match=f"not saved: {name}.lora_A has NaN or infinite entries"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- buffers -----------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A head with statistics and a buffer of its own; the second norm has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain, self.out = nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.plain(self.norm(x))) * self.scale


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), Head()
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def with_trained_head() -> WithHead:
    model = WithHead()
    add_adapters(model, layers=[1], target_modules=["1"], rank=2)
    model.head.requires_grad_(True)
    nn.init.normal_(model.layers[1].lora_B)
    model.head.train()(3 * torch.randn(16, 8) + 1)
    model.head.scale.fill_(2.0)
    return model.eval()


BUFFERS = {f"head.{norm}.{name}" for norm in ("norm", "plain") for name in nn.BatchNorm1d(1, affine=False).state_dict()}
MOVING = "ignore:while in training mode, running statistics"


@pytest.mark.filterwarnings(MOVING)
def test_buffers_of_a_module_that_is_trained_whole_come_back(tmp_path: Path) -> None:
    model, x = with_trained_head(), torch.randn(5, 8)
    save_adapter(model, tmp_path)
    saved = read_adapter(tmp_path).parameters
    assert saved.keys() == BUFFERS | {"head.scale"} | {f"head.{name}" for name, _ in Head().named_parameters()}
    fresh = WithHead()
    base = fresh(x)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x)) and not torch.allclose(fresh(x), base)
    assert fresh.head.norm.num_batches_tracked == 1
    with disable_adapters(fresh):
        assert torch.equal(fresh(x), base)
    insert_adapters(fresh, {"layers.0": {"rank": 2}}, name="other")
    assert torch.equal(fresh(x), base)
    use_adapter(fresh, "default")
    assert torch.equal(fresh(x), model(x))
    load_adapter(fresh, tmp_path)  # into the adapters that are there
    remove_adapters(fresh)
    assert torch.equal(fresh(x), base)


@pytest.mark.filterwarnings(MOVING)
def test_buffers_of_a_module_that_is_trained_in_part_are_the_bases(tmp_path: Path) -> None:
    model = with_trained_head()
    model.head.out.bias.requires_grad_(False)
    save_adapter(model, tmp_path)
    saved = read_adapter(tmp_path).parameters.keys()
    assert saved == {f"head.norm.{name}" for name in model.head.norm.state_dict()} | {"head.out.weight"}


@pytest.mark.filterwarnings(MOVING)
def test_buffers_of_a_trained_head_go_to_peft_and_come_back(tmp_path: Path) -> None:
    model, x = with_trained_head(), torch.randn(5, 8)
    expected = model(x)
    export_peft(model, tmp_path)

    def check(other: Any) -> None:
        # Float32 factors are split anew, in float64.
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)

    theirs = peft.PeftModel.from_pretrained(WithHead(), tmp_path)
    check(theirs)
    back = WithHead()
    import_peft(back, tmp_path)
    check(back)
    check(from_peft(theirs))
    check(to_peft(model).eval())
