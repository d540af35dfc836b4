"""transformers' Trainer and accelerate with Stiefel adapters, on a tiny model."""

import json
import math
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from geoopt import ManifoldParameter
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from stiefel_lora.adapted import adapter_factors, adapter_layers, adapter_metrics
from stiefel_lora.adapters import add_adapters, use_adapter
from stiefel_lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_adapter
from stiefel_lora.errors import InputError
from stiefel_lora.merging import merge_adapters, unmerge_adapters
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD
from stiefel_lora.trainer import AdapterMetricsCallback, StiefelTrainer, trainer_optimizer
from tests.models import FAMILIES
from tests.tiny import save_tiny_model

# Trainer 5.23 calls names of its own that the next major version drops.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    # transformers 5.0, on checkpoints made within a second.
    pytest.mark.filterwarnings("ignore:mtime may not be reliable on this filesystem:UserWarning"),
]

LLAMA = FAMILIES["llama"]
EXAMPLES = [{key: value[i] for key, value in LLAMA.batch(12, 8).items()} for i in range(12)]

# QR after each of six float32 steps; geoopt's own bar is 1e-5 an entry.
ON_MANIFOLD = 1e-5


def adapted(**options: Any) -> nn.Module:
    model = LLAMA.build()
    add_adapters(model, **{"layers": [0, 2], "rank": 4, "dropout": 0.1, **options})
    return model


def arguments(path: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(path), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "warmup_steps": 2, "lr_scheduler_type": "cosine", "logging_steps": 2, "save_steps": 3, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **options})


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: factor.detach().clone() for name, factor in adapter_factors(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Doubled(Trainer):
    """A subclass with a loss of its own, as TRL's trainers are."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


class StiefelDoubled(StiefelTrainer, Doubled):
    pass


def test_combines_with_another_trainer(tmp_path: Path) -> None:
    """Beside a subclass of Trainer, each has its part: that one's loss, our optimizer, checkpoints and metrics."""
    losses = []
    for kind in (StiefelTrainer, StiefelDoubled):
        trainer = kind(
            adapted(dropout=0.0),
            arguments(tmp_path / kind.__name__, max_steps=1, logging_steps=1),
            train_dataset=EXAMPLES,
        )
        losses.append(trainer.train().training_loss)
        assert isinstance(trainer.optimizer.optimizer, RiemannianAdam)
        load_adapter(LLAMA.build(), tmp_path / kind.__name__ / "checkpoint-1")
        assert any("effective_rank" in entry for entry in trainer.state.log_history)
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)  # one more rounding in float32


def test_trains_with_the_training_arguments(tmp_path: Path) -> None:
    model = adapted()
    before = factors(model)
    trainer = StiefelTrainer(
        model, arguments(tmp_path), train_dataset=EXAMPLES, optimizer_options={"retraction": "cayley"}
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # inside accelerate's wrapper
    assert isinstance(optimizer, RiemannianAdam)
    assert optimizer.defaults["retraction"] == "cayley"
    assert optimizer.defaults["second_moment"] == "row"
    assert trainer_optimizer(arguments(tmp_path), second_moment="mean")[1]["second_moment"] == "mean"
    points = [isinstance(group["params"][0], ManifoldParameter) for group in optimizer.param_groups]
    # It has no tangent part for those.
    assert [(group["weight_decay"], p) for group, p in zip(optimizer.param_groups, points, strict=True)] == [
        (0.1, False),
        (0.0, True),
    ]
    after = factors(model)
    assert all(not torch.equal(after[name], before[name]) for name in after)
    assert all(m["orthogonality_error"] < ON_MANIFOLD for m in adapter_metrics(model).values())
    records = [r for r in trainer.state.log_history if "orthogonality_error" in r]
    assert [r["step"] for r in records] == [2, 4, 6]
    assert all(r["orthogonality_error"] < ON_MANIFOLD and 1 < r["effective_rank"] <= 4 for r in records)
    # Two steps of warm-up, then half a cosine over four: what steps 2, 4 and 6 were taken with.
    rates = {r["step"]: r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r}
    cosine = [0.5e-2 * (1 + math.cos(math.pi * part)) for part in (0.25, 0.75)]
    assert rates == pytest.approx({2: 0.5e-2, 4: cosine[0], 6: cosine[1]})
    assert sum("loss" in r for r in trainer.state.log_history) == 3


RESUMED: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "ours": (True, {}, {}),
    "plain": (False, {}, {}),
    "much at once": (
        True,
        {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"orthonormal": "both"},
    ),
    "plateau": (
        True,
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "steps",
            "eval_steps": 3,
            "metric_for_best_model": "loss",
        },
        {},
    ),
    "best": (
        True,
        {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "optim": "sgd"},
        {"orthonormal": "B"},
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_training_equals_uninterrupted_training(case: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout and shuffling, for our Trainer and for the plain one with our optimizer."""
    own, options, form = RESUMED[case]

    def trainer(path: Path) -> Trainer:
        args = arguments(path, save_total_limit=1, **options)
        data = {"train_dataset": EXAMPLES, "eval_dataset": EXAMPLES}
        if own:
            return StiefelTrainer(adapted(**form), args, **data)
        return Trainer(adapted(**form), args, **data, optimizer_cls_and_kwargs=trainer_optimizer(args))

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts")
    first.add_callback(Interrupt())
    first.train()
    assert not same(factors(first.model), factors(whole.model))
    second = trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 6
    assert same(factors(second.model), factors(whole.model))
    checkpoints = list((tmp_path / "parts").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-6"]
    if own:
        names = {path.name for path in checkpoints[0].iterdir()}
        assert {CONFIG_FILE, WEIGHTS_FILE, "optimizer.pt"} <= names
        assert "model.safetensors" not in names
        fresh = LLAMA.build()
        load_adapter(fresh, checkpoints[0])
        assert same(factors(fresh), factors(second.model))


class Collator:
    """As transformers' collators do, knows the tokenizer that the Trainer was not given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("place", ["processing_class", "collator"])
def test_a_checkpoint_has_the_tokenizer(place: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "tiny"))
    options = {"data_collator": Collator(tokenizer)} if place == "collator" else {"processing_class": tokenizer}
    StiefelTrainer(adapted(), arguments(tmp_path, max_steps=1), train_dataset=EXAMPLES, **options).save_model()
    assert AutoTokenizer.from_pretrained(tmp_path)("def").input_ids == tokenizer("def").input_ids


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, learning_rate=3.0
    )
    trainer = StiefelTrainer(adapted(), args, train_dataset=EXAMPLES, eval_dataset=EXAMPLES)
    trainer.train()
    losses = {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    best = min(losses, key=losses.__getitem__)
    assert best != 6, "the learning rate is meant to be too large for the last step to be the best"
    # 1e-6: the evaluation is the same computation on the same numbers, printed by Trainer in float64.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"optim": "sgd"},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=str,
)
def test_options_of_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted()
    before = factors(model)
    trainer = StiefelTrainer(model, arguments(tmp_path, **options), train_dataset=EXAMPLES)
    trainer.train()
    assert all(not torch.equal(after, before[name]) for name, after in factors(model).items())
    assert all(m["orthogonality_error"] < ON_MANIFOLD for m in adapter_metrics(model).values())
    if options.get("optim") == "sgd":
        assert isinstance(trainer.optimizer.optimizer, RiemannianSGD)


def test_plain_trainer_with_our_optimizer_and_callback(tmp_path: Path) -> None:
    model = adapted()
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=EXAMPLES, optimizers=(optimizer, None))
    trainer.add_callback(AdapterMetricsCallback(trainer))
    trainer.train()
    assert sum("effective_rank" in record for record in trainer.state.log_history) == 3
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6


def test_metrics_are_logged_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    args = arguments(tmp_path, logging_strategy="epoch", max_steps=-1, num_train_epochs=2)
    trainer = StiefelTrainer(adapted(), args, train_dataset=EXAMPLES)
    trainer.train()
    records = [[r for r in trainer.state.log_history if key in r] for key in ("effective_rank", "loss")]
    assert [r["epoch"] for r in records[0]] == [r["epoch"] for r in records[1]] == [1.0, 2.0]


def test_it_says_so_where_a_checkpoint_holds_no_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = {"": "", "scheduler.pt": "holds no scheduler,", "optimizer.pt": "holds no optimizer,"}
    for removed, expected in said.items():
        checkpoint = tmp_path / f"without {removed}" / "checkpoint-3"
        args = arguments(checkpoint.parent)
        StiefelTrainer(adapted(), args, train_dataset=EXAMPLES).train()
        if removed:
            (checkpoint / removed).unlink()
        caplog.clear()
        StiefelTrainer(adapted(), args, train_dataset=EXAMPLES).train(resume_from_checkpoint=str(checkpoint))
        assert ("checkpoint-3 holds no" in caplog.text) == bool(removed)
        assert expected in caplog.text


def test_a_new_optimizer_has_the_new_learning_rate(tmp_path: Path) -> None:
    trainer = StiefelTrainer(adapted(), arguments(tmp_path), train_dataset=EXAMPLES)
    for rate in (1e-2, 1e-3):
        trainer.args.learning_rate, trainer.optimizer = rate, None
        assert trainer.create_optimizer().param_groups[0]["lr"] == rate


def test_the_orthonormal_factors_may_have_a_rate_of_their_own(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = StiefelTrainer(adapted(dropout=0.0), args, train_dataset=EXAMPLES, lr_ratio=4.0)
    trainer.train()
    rates: dict[bool, set[float]] = {True: set(), False: set()}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            rates[isinstance(p, ManifoldParameter)].add(group["initial_lr"])
    assert rates == {True: {4e-2}, False: {1e-2}}
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1  # of B
    again = StiefelTrainer(adapted(dropout=0.0), args, train_dataset=EXAMPLES, lr_ratio=4.0)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(factors(again.model), factors(trainer.model))
    plain = StiefelTrainer(adapted(dropout=0.0), args, train_dataset=EXAMPLES)
    plain.train()
    assert not same(factors(plain.model), factors(trainer.model))
    other = StiefelTrainer(adapted(dropout=0.0), args, train_dataset=EXAMPLES, lr_ratio=4.0)
    with pytest.raises(InputError, match="checkpoint-3 was trained with lr_ratio=1, not 4, and would go on with it"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(InputError, match="lr_ratio must be positive and finite, got 0"):
        StiefelTrainer(adapted(), args, train_dataset=EXAMPLES, lr_ratio=0)


def test_quantised_base_passes_the_trainers_check(tmp_path: Path) -> None:
    model = adapted()
    type(model).is_quantized = True
    try:
        with pytest.raises(ValueError, match="purely quantized"):
            Trainer(model, arguments(tmp_path), train_dataset=EXAMPLES)
        StiefelTrainer(model, arguments(tmp_path), train_dataset=EXAMPLES)
        assert not model._hf_peft_config_loaded
    finally:
        del type(model).is_quantized


def test_bad_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapters"):
        StiefelTrainer(LLAMA.build(), arguments(tmp_path), train_dataset=EXAMPLES)
    other = arguments(tmp_path, optim="adafactor")
    with pytest.raises(InputError, match="optim='adafactor' has no Riemannian form"):
        StiefelTrainer(adapted(), other, train_dataset=EXAMPLES)
    model = adapted()
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    StiefelTrainer(model, other, train_dataset=EXAMPLES, optimizers=(optimizer, None))
    with pytest.raises(InputError, match="optim_args='momentum=0.9' is not read"):
        trainer_optimizer(arguments(tmp_path, optim="sgd", optim_args="momentum=0.9"))


def test_merged_adapters_are_not_trained(tmp_path: Path) -> None:
    """Not even a head beside them, which would be trained alone."""
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    trainer = StiefelTrainer(model, arguments(tmp_path), train_dataset=EXAMPLES)
    merge_adapters(model, keep=True)
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(InputError, match="q_proj.* is merged, so it cannot be trained; call unmerge_adapters first"):
        trainer.train()
    assert torch.equal(model.lm_head.weight, before)
    unmerge_adapters(model)
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("late", [False, True])
def test_reentrant_checkpoints_of_a_model_without_tokens(late: bool, tmp_path: Path) -> None:
    """transformers lets gradients into them only in models of tokens, and a head that trains hides it."""

    def build() -> Any:
        model = FAMILIES["vit"].build()
        add_adapters(model, layers=[0, 1], rank=2)
        model.classifier.requires_grad_(True)
        return model

    batch = FAMILIES["vit"].batch(4)
    data = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    args = arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True},
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = StiefelTrainer(None if late else build(), args, train_dataset=data, model_init=build if late else None)
    trainer.train()
    assert all(bool(layer.lora_B.any()) for layer in adapter_layers(trainer.model).values())


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_adapters_that_nothing_reaches_are_named_once(
    strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate, times in ((1e-2, 0), (0.0, 1)):
        args = arguments(tmp_path, learning_rate=rate, logging_strategy=strategy, logging_steps=1)
        StiefelTrainer(adapted(), args, train_dataset=EXAMPLES).train()
        assert sum("all updates are zero after" in text for text in caplog.messages) == times


def test_the_hub_gets_the_adapter_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[Any]] = []

    def upload(repo_id: str, folder_path: str, **options: Any) -> Any:
        sent.append([read_adapter(folder_path), {path.name for path in Path(folder_path).iterdir()}])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def prepare(self: Any, *args: Any, **options: Any) -> None:
        self.hub_model_id, self.push_in_progress = "me/it", None

    monkeypatch.setattr(Trainer, "init_hf_repo", prepare)
    if hasattr(transformers.trainer, "hf_api"):
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload))
    else:
        monkeypatch.setattr(transformers.trainer, "upload_folder", upload)
    args = arguments(tmp_path, push_to_hub=True, hub_strategy="every_save", hub_model_id="me/it", max_steps=3)
    trainer = StiefelTrainer(adapted(), args, train_dataset=EXAMPLES)
    trainer.train()
    assert sent
    state, names = sent[-1]
    assert names >= {CONFIG_FILE, WEIGHTS_FILE, "training_args.bin"} and "model.safetensors" not in names
    saved = {f"{name}.{key}": factor for name, own in state.factors.items() for key, factor in own.items()}
    assert same(saved, factors(trainer.model))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_with_a_plain_loop(mixed_precision: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may have one precision
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    model = adapted()
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(EXAMPLES, batch_size=2))
    before, losses = factors(model), []
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-6:]) < sum(losses[:6])
    assert all(not torch.equal(after, before[name]) for name, after in factors(model).items())
    assert all(m["orthogonality_error"] < ON_MANIFOLD for m in adapter_metrics(model).values())
    accelerator.save_state(tmp_path)
    state = factors(model)
    model(**LLAMA.batch(2, 8)).loss.backward()
    optimizer.step()
    assert not same(factors(model), state)
    accelerator.load_state(tmp_path)
    assert same(factors(model), state)


def test_another_set_of_adapters_is_trained_as_well(tmp_path: Path) -> None:
    """A second call of train() would go on with the optimizer of the first, which holds the other set's factors."""
    model = adapted()
    add_adapters(model, layers=[1], rank=2, name="second")
    trainer = StiefelTrainer(model, arguments(tmp_path), train_dataset=EXAMPLES)
    for name in ("second", "default"):
        use_adapter(model, name)
        before = factors(model)
        trainer.train()
        assert not any(torch.equal(before[key], after) for key, after in factors(model).items())
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer


@pytest.mark.parametrize("ours", [True, False])
def test_an_optimizer_that_leaves_the_manifold_is_named_once(
    ours: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path, learning_rate=5e-2, save_strategy="no")
    options = {"optimizer_cls_and_kwargs": trainer_optimizer(args)} if ours else {}
    trainer = Trainer(adapted(), args, train_dataset=EXAMPLES, **options)
    trainer.add_callback(AdapterMetricsCallback(trainer))
    trainer.train()
    assert sum("off the manifold by" in text for text in caplog.messages) == (not ours)
