"""One orthonormal A for a linear in all layers: it is one parameter from the first step to the last file."""

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainingArguments

from stiefel_lora import (
    InputError,
    RiemannianAdam,
    add_adapters,
    export_peft,
    from_peft,
    load_adapter,
    merge_adapters,
    orthogonality_error,
    refactor_adapters,
    remove_adapters,
    save_adapter,
    to_peft,
    use_adapter,
)
from stiefel_lora._sharing import shared_in
from stiefel_lora.adapted import adapter_factors, adapter_layers
from stiefel_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from stiefel_lora.factors import adapter_size
from stiefel_lora.info import adapter_info
from stiefel_lora.trainer import trainer_optimizer
from tests.models import FAMILIES, causal_batch

# PEFT 0.21 asks transformers 5.23 for names that the next major version drops.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

LLAMA = FAMILIES["llama"]
BATCH = causal_batch(2, 7)


def built(share_A: bool = True, **options: Any) -> Any:
    model = LLAMA.build()
    torch.manual_seed(3)
    add_adapters(model, **{"layers": None, "rank": 4, "share_A": share_A, **options})
    return model


def trained(steps: int = 3, **options: Any) -> Any:
    model = built(**options).train()
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=0.05, second_moment="row")
    for _ in range(steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def by_last_name(model: nn.Module) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for name, layer in adapter_layers(model).items():
        found.setdefault(name.split(".")[-1], set()).add(id(layer.lora_A))
    return found


def assert_shared(model: nn.Module) -> None:
    points = by_last_name(model)
    assert {len(own) for own in points.values()} == {1}
    assert len(set.union(*points.values())) == len(points)
    for layer in adapter_layers(model).values():
        assert isinstance(layer.lora_A, geoopt.ManifoldParameter) and layer.lora_A.requires_grad
        assert float(orthogonality_error(layer.lora_A)) < 2e-6  # float32


def test_each_linear_has_one_parameter_for_all_layers() -> None:
    model = built()
    assert_shared(model)
    layers, depth = adapter_layers(model), len(model.model.layers)
    assert len(by_last_name(model)) * depth == len(layers)
    whole = sum(adapter_size(layer.in_features, layer.out_features, 4) for layer in layers.values())
    saved = sum(layer.in_features * 4 for layer in layers.values()) * (depth - 1) // depth
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == whole - saved
    assert list(adapter_factors(model)) == list(trainable)


def test_its_gradient_is_the_sum_over_the_layers() -> None:
    model, apart = built(), built(share_A=False)
    generator = torch.Generator().manual_seed(1)
    for one, other in zip(adapter_layers(model).values(), adapter_layers(apart).values(), strict=True):
        one.lora_B.data.normal_(generator=generator)
        other.lora_B.data.copy_(one.lora_B)
        other.lora_A.data.copy_(one.lora_A)
    for each in (model, apart):
        each.double()(**BATCH).loss.backward()
    for name, layer in adapter_layers(model).items():
        alike = [x for n, x in adapter_layers(apart).items() if n.split(".")[-1] == name.split(".")[-1]]
        total = torch.stack([x.lora_A.grad for x in alike]).sum(0)
        # The projections to the manifold after the conversion differ by float64 rounding.
        torch.testing.assert_close(layer.lora_A.grad, total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.half().float(),
        lambda model: model.double().to(torch.bfloat16),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
        lambda model: model.load_state_dict(trained(steps=1).state_dict()) and model,
    ],
    ids=["trained", "half", "double", "copied", "pickled", "state"],
)
def test_it_stays_one(change: Callable[[Any], Any]) -> None:
    assert_shared(change(trained()))


def moved_off(model: Any, seed: int = 2) -> Any:
    """Move the factors off the manifold, each once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter_factors(model).values():
            factor.add_(0.1 * torch.randn(factor.shape, generator=generator))
    return model


def averaged(model: Any) -> Any:
    """Return an average of several states, whose factors are off the manifold."""
    average = AveragedModel(model)
    for seed in range(3):
        average.update_parameters(moved_off(copy.deepcopy(model), seed))
    return average.module


def once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with each tensor under its first name alone, as safetensors files have it."""
    found: dict[int, str] = {}
    return {name: value for name, value in state.items() if found.setdefault(value.data_ptr(), name) == name}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", [dict, once])
@pytest.mark.filterwarnings("ignore:a loaded state has factors off the manifold:UserWarning")
def test_a_state_gives_the_same_updates(form: Callable[[Any], Any], assign: bool) -> None:
    model = averaged(trained())
    state, expected = form(copy.deepcopy(model.state_dict())), logits(model)
    loaded = copy.deepcopy(built())
    assert loaded.load_state_dict(state, assign=assign, strict=False).missing_keys == []
    assert_shared(loaded)
    # Its own manifold points, from those of float32 that were averaged.
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_a_state_of_a_checkpointed_model_gives_the_same_updates() -> None:
    model, loaded = trained(), built()
    for block in list(loaded.model.layers):
        apply_activation_checkpointing(loaded, check_fn=lambda module, block=block: module is block)
    loaded.load_state_dict(once(copy.deepcopy(model.state_dict())), strict=False)
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_from_the_meta_device_shares_again() -> None:
    model = trained()
    empty = built().to("meta")
    empty.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert_shared(empty)
    for name, factor in adapter_factors(model).items():
        assert torch.equal(adapter_factors(empty)[name], factor)


def test_a_state_with_several_is_refused() -> None:
    model, other = trained(), trained(share_A=False)
    before = logits(model)
    with pytest.raises(InputError, match=r"the state has an A each for model\.layers\.0.*, which share one here; load"):
        model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), before)
    model.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_B" in name}, strict=False)
    assert torch.equal(logits(model), before)


def test_the_hooks_leave_with_the_adapters() -> None:
    for leave in (remove_adapters, merge_adapters):
        model = trained()
        assert len(model._load_state_dict_pre_hooks) == len(model._load_state_dict_post_hooks) == 1
        leave(copy.deepcopy(model))
        assert len(model._load_state_dict_pre_hooks) == 1  # those of the copy went
        leave(model)
        assert not model._load_state_dict_pre_hooks and not model._load_state_dict_post_hooks


def test_two_sets_may_share() -> None:
    model = trained()
    expected = logits(model)
    add_adapters(model, layers=None, rank=2, share_A=True, name="other")
    assert_shared(model)
    use_adapter(model, "default")
    assert_shared(model)
    assert torch.equal(logits(model), expected)
    with pytest.raises(InputError, match="has an adapter already; remove it first"):
        add_adapters(model, layers=None, rank=2, share_A=True)


def test_the_plain_trainer_saves_and_resumes(tmp_path: Path) -> None:
    data = [{key: value[i] for key, value in causal_batch(3, 7).items()} for i in range(3)] * 4
    finals = []
    for resume in (False, True):
        options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True}
        args = TrainingArguments(str(tmp_path), **options)
        model = built()
        trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=trainer_optimizer(args))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        assert_shared(model)
        finals.append(logits(model.eval()))
    assert torch.equal(*finals)


@pytest.mark.parametrize("part", [None, torch.float64])
def test_different_places_and_precisions_do_not_share(part: torch.dtype | None) -> None:
    """Two linears of BERT's blocks are named "dense", with as many inputs."""
    model = FAMILIES["bert"].build()
    model.bert.encoder.layer[0].to(part)
    names = add_adapters(model, layers=None, rank=3, target_modules="all-linear", share_A=True)
    depth = len(model.bert.encoder.layer)
    places = {name.split(".layer.")[1].partition(".")[2] for name in names}
    points = {id(layer.lora_A) for layer in adapter_layers(model).values()}
    assert len(points) == len(places) * (1 if part is None else 2)
    assert len(names) == depth * len(places)


def test_it_stays_one_beside_another_set_and_comes_out() -> None:
    model = trained()
    expected, bare = logits(model), logits(LLAMA.build())
    add_adapters(model, layers=[0], rank=2, name="other")
    assert shared_in(adapter_layers(model)) == {}
    model.double()
    use_adapter(model, "default")
    model.float()
    assert_shared(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)  # A was rounded twice
    merged = merge_adapters(copy.deepcopy(remove_adapters(model, "other")))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(remove_adapters(model)), bare)


def test_linears_that_differ_do_not_share() -> None:
    model = built(rank_pattern={"layers.0.self_attn.q_proj": 2})
    layers = adapter_layers(model)
    q = [layer for name, layer in layers.items() if name.endswith("q_proj")]
    assert q[0].lora_A is not q[1].lora_A is q[2].lora_A
    # Added later, they are a group of their own.
    add_adapters(model, layers=None, rank=4, target_modules=["o_proj"], share_A=True)
    o = [layer for name, layer in adapter_layers(model).items() if name.endswith("o_proj")]
    assert len({id(x.lora_A) for x in o}) == 1
    assert o[0].lora_A is not q[1].lora_A is q[2].lora_A


def test_a_folder_holds_it_once_and_gives_it_back_shared(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert sum(key.endswith("lora_A") for key in file.keys()) == len(by_last_name(model))  # noqa: SIM118
    loaded = LLAMA.build()
    load_adapter(loaded, tmp_path)
    assert_shared(loaded)
    assert torch.equal(logits(loaded), logits(model))
    again = built()  # as when training is resumed
    places = {name: id(factor) for name, factor in adapter_factors(again).items()}
    load_adapter(again, tmp_path)
    assert {name: id(factor) for name, factor in adapter_factors(again).items()} == places
    assert torch.equal(logits(again), logits(model))
    info = adapter_info(tmp_path)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert info.parameters == sum(m.parameters for m in info.modules) == trainable
    assert f"{trainable:,} parameters, {info.shared} with the A of one before" in info.table()
    assert info.shared == len(info.modules) - len(by_last_name(model))


def test_a_base_of_two_precisions_shares_one_in_each(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    model = LLAMA.build()
    for block in list(model.model.layers)[1:]:
        block.double()
    load_adapter(model, tmp_path)
    q = [layer.lora_A for name, layer in adapter_layers(model).items() if name.endswith("q_proj")]
    assert [point.dtype for point in q] == [torch.float32, torch.float64, torch.float64]
    assert q[1] is q[2]
    assert torch.equal(q[0].double(), q[1])


def test_what_shares_nothing_is_written_as_before(tmp_path: Path) -> None:
    save_adapter(built(share_A=False), tmp_path / "apart")
    save_adapter(built(), tmp_path / "one")
    apart, one = (json.loads((tmp_path / name / CONFIG_FILE).read_text()) for name in ("apart", "one"))
    assert (apart["format_version"], one["format_version"]) == (1, 2)
    assert "shared_A" not in apart


@pytest.mark.parametrize("here", [True, False])
def test_a_folder_does_not_go_into_adapters_that_share_otherwise(here: bool, tmp_path: Path) -> None:
    save_adapter(trained(share_A=not here), tmp_path)
    model = trained(share_A=here)
    before = logits(model)
    with pytest.raises(InputError, match=r"do not share A as the file's do: \d+ have that of another here, \d+ in the"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda config: list(config["shared_A"]),
    "an owner that is no linear": lambda config: {**config["shared_A"], "model.layers.1.self_attn.q_proj": "elsewhere"},
    "an owner that is not a name": lambda config: {**config["shared_A"], "model.layers.1.self_attn.q_proj": ["x"]},
    "an unknown linear": lambda config: {**config["shared_A"], "elsewhere": "model.layers.0.self_attn.q_proj"},
    "a chain": lambda config: {
        **config["shared_A"], "model.layers.1.self_attn.q_proj": "model.layers.2.self_attn.q_proj",
    },
    "another shape": lambda config: {
        **config["shared_A"], "model.layers.1.mlp.down_proj": "model.layers.0.self_attn.q_proj",
    },
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused(what: str, tmp_path: Path) -> None:
    save_adapter(built(), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["shared_A"] = DAMAGE[what](config)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match="is damaged: shared_A should name linears by others whose A they have"):
        load_adapter(LLAMA.build(), tmp_path)


def test_factors_off_the_manifold_are_put_back_for_all_that_share_them(tmp_path: Path) -> None:
    model = moved_off(trained())
    expected = {name: layer.delta_weight().detach() for name, layer in adapter_layers(model).items()}
    save_adapter(model, tmp_path)
    saved, filled = LLAMA.build(), built()
    load_adapter(saved, tmp_path)
    with pytest.warns(UserWarning, match="a loaded state has factors off the manifold"):
        filled.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert refactor_adapters(model) == list(expected)
    for each in (model, saved, filled):
        assert_shared(each)
        for name, layer in adapter_layers(each).items():
            torch.testing.assert_close(layer.delta_weight(), expected[name], rtol=1e-5, atol=1e-5)  # float32 factors


def test_peft_gets_copies(tmp_path: Path) -> None:
    from peft import PeftModel

    model = trained()
    expected = logits(model)
    export_peft(model, tmp_path)
    # Theirs computes A x first as ours does, in another memory order.
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(LLAMA.build(), tmp_path)), expected, rtol=1e-5, atol=1e-5
    )
    there = to_peft(model)
    torch.testing.assert_close(logits(there.eval()), expected, rtol=1e-5, atol=1e-5)
    assert shared_in(adapter_layers(from_peft(there))) == {}


def test_peft_that_refuses_leaves_it_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def refusing(*_: object) -> None:
        raise ValueError("no")

    model = trained()
    expected = logits(model)
    monkeypatch.setattr(peft, "get_peft_model", refusing)
    with pytest.raises(ValueError, match="no"):
        to_peft(model)
    assert_shared(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orthonormal": "B"}, "share_A needs orthonormal='A', whose B differ freely, got 'B'"),
        ({"orthonormal": "both"}, "share_A needs orthonormal='A', whose B differ freely, got 'both'"),
        ({"init": "svd"}, "share_A needs init='random': one A starts at one point for all its linears; got 'svd'"),
        (
            {
                "layers": [0],
                "target_modules": ["q_proj"],
                "init": {"model.layers.0.self_attn.q_proj": torch.eye(32, 4)},
            },
            "share_A needs init='random': .*; got starts for each linear",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(options: dict[str, Any], message: str) -> None:
    model = LLAMA.build()
    with pytest.raises(InputError, match=message):
        add_adapters(model, **{"layers": None, "rank": 4, "share_A": True, **options})
    assert adapter_layers(model) == {}
