"""TRL's trainers with Stiefel adapters, by the class that README names; where TRL is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from stiefel_lora.adapted import adapter_factors, adapter_layers, adapter_metrics
from stiefel_lora.adapters import add_adapters
from stiefel_lora.checkpoint import load_adapter
from stiefel_lora.optim import RiemannianAdam
from stiefel_lora.trainer import StiefelTrainer
from tests.tiny import save_tiny_model

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets", reason="TRL's trainers read datasets of this library")

# Libraries at work together, with deprecations of each other's names.
pytestmark = pytest.mark.filterwarnings("default")

# As in tests/test_trainer.py.
ON_MANIFOLD = 1e-5
STEPS = 4


def _class(parent: type[Trainer]) -> type[Trainer]:
    return type(f"Stiefel{parent.__name__}", (StiefelTrainer, parent), {})


def _reward(completions: list[str], **others: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


PROMPT = "def add_1(left, right):"
# Options of the trainer, options of its arguments, and one example of the data.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "SFT": ({}, {"max_length": 32}, {"text": PROMPT}),
    "DPO": ({}, {}, {"prompt": PROMPT, "chosen": " total = left", "rejected": " right = total"}),
    "GRPO": (
        {"reward_funcs": _reward},
        {"num_generations": 4, "max_completion_length": 8, "beta": 0.01},
        {"prompt": PROMPT},
    ),
    "Reward": ({}, {}, {"chosen": PROMPT, "rejected": "total"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_trl(kind: str, tmp_path: Path) -> None:
    """Train for some steps: A stays on the manifold, our optimizer moves it, and a checkpoint fits a base model."""
    options, settings, example = KINDS[kind]
    base = save_tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token

    def build() -> nn.Module:
        torch.manual_seed(0)
        if kind == "Reward":
            return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
        return AutoModelForCausalLM.from_pretrained(base)

    model = build()
    add_adapters(model, layers=[1, 3], rank=4)
    before = {key: factor.detach().clone() for key, factor in adapter_factors(model).items()}
    args = getattr(trl, f"{kind}Config")(
        str(tmp_path / "run"), max_steps=STEPS, learning_rate=1e-2, logging_steps=2, save_steps=2, report_to="none",
        use_cpu=True, bf16=False, per_device_train_batch_size=4, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = _class(getattr(trl, f"{kind}Trainer"))(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_list([example] * 16),
        processing_class=tokenizer,
        lr_ratio=2.0,
        **options,
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, RiemannianAdam)  # inside accelerate's wrapper
    assert max(m["orthogonality_error"] for m in adapter_metrics(model).values()) < ON_MANIFOLD
    after = adapter_factors(model)
    assert not any(torch.equal(before[key], factor) for key, factor in after.items())
    assert any("orthogonality_error" in entry for entry in trainer.state.log_history)

    loaded = build()
    load_adapter(loaded, tmp_path / "run" / f"checkpoint-{STEPS}")
    assert adapter_layers(loaded).keys() == adapter_layers(model).keys()
    for key, factor in adapter_factors(loaded).items():
        torch.testing.assert_close(factor, after[key], rtol=0, atol=0)
