"""Data to fine-tune on, split three ways: training, validation (to choose learning rates) and test."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stiefel_lora.data import IGNORED, Dataset, load_data, prompt_of, spread
from stiefel_lora.errors import InputError


@dataclass(frozen=True)
class Question:
    """A prompt with what is common to all answers, the tokens in which they first differ, and the right one's place."""

    ids: Tensor
    choices: Tensor
    right: int


@dataclass(frozen=True)
class Task:
    """One task; only instructions have questions."""

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    questions: list[Question]


def code(tokenizer: Any, seq_len: int) -> Task:
    """Language modelling on the standard library's source; validation and test are different files' blocks."""
    train, held_out = load_data(None, tokenizer, seq_len=seq_len, held_out=0.2)
    middle = len(held_out) // 2
    return Task("code", train, _part(held_out, 0, middle), _part(held_out, middle, len(held_out)), [])


def instructions(folder: str | Path, tokenizer: Any, seq_len: int, questions: int) -> Task:
    """Question sets of a folder: pairs NAME_train.jsonl and NAME_test.jsonl of instruction and output.

    A tenth of each training file is for validation. The answers to choose from are the outputs that occur in a set's
    training file; the model's choice is the one with the likeliest first token in which they differ.

    Raises:
        InputError: If there is no such pair, or the answers cannot be told apart by one token.
    """
    sets = sorted(Path(folder).glob("*_train.jsonl"))
    if not sets:
        raise InputError(f"{folder} has no files NAME_train.jsonl with a NAME_test.jsonl beside them")
    train, validation, test, asked = [], [], [], []
    for path in sets:
        other = path.with_name(path.name.replace("_train.", "_test."))
        learned, held_out = _named(path.name, load_data(path, tokenizer, seq_len=seq_len))
        train.append(learned)
        validation.append(held_out)
        test.append(_joined(_named(other.name, load_data(other, tokenizer, seq_len=seq_len))))
        asked.append(_questions(path, other, tokenizer, seq_len, questions))
    # In turn from each set, so that the first so many are a fair sample.
    mixed = [q for group in zip(*asked, strict=False) for q in group]
    return Task("instructions", _joined(train), _interleaved(validation), _interleaved(test), mixed[:questions])


def tiny() -> tuple[nn.Module, Task]:
    """Return a random model of a few thousand weights and random data for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=32, intermediate_size=64, vocab_size=99)).eval()
    ids = list(torch.randint(99, (16, 16)))
    data = Dataset(ids, ids, "random tokens")
    return model, Task("code", data, data, data, [Question(row, torch.tensor([1, 2]), 0) for row in ids[:4]])


def with_less_to_train_on(task: Task, samples: int) -> Task:
    """Return the task with training samples from all over its training data, to be gone through many times."""
    chosen = spread(len(task.train), samples)
    ids, labels = ([part[i] for i in chosen] for part in (task.train.input_ids, task.train.labels))
    description = f"{len(chosen)} samples from all over {task.train.description}"
    return replace(task, train=Dataset(ids, labels, description))


def _part(data: Dataset, begin: int, end: int) -> Dataset:
    return Dataset(data.input_ids[begin:end], data.labels[begin:end], f"{data.description}, from {begin} to {end}")


def _named(name: str, parts: Iterable[Dataset]) -> list[Dataset]:
    """Say what the data are, not where: a result is read on other machines."""
    return [replace(part, description=f"{name}, {len(part)} examples") for part in parts]


def _joined(parts: Iterable[Dataset]) -> Dataset:
    parts = list(parts)
    ids = [x for part in parts for x in part.input_ids]
    labels = [x for part in parts for x in part.labels]
    return Dataset(ids, labels, "; ".join(part.description for part in parts))


def _interleaved(parts: Sequence[Dataset]) -> Dataset:
    turns = zip(*(zip(p.input_ids, p.labels, strict=True) for p in parts), strict=False)
    rows = [pair for turn in turns for pair in turn]
    return Dataset([ids for ids, _ in rows], [y for _, y in rows], "; ".join(part.description for part in parts))


def _questions(train: Path, test: Path, tokenizer: Any, seq_len: int, count: int) -> list[Question]:
    read = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (train, test)]
    answers = sorted({record["output"] for record in read[0]})
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    shared = 0
    while len({t[shared] for t in tokens if len(t) > shared}) == 1 and all(len(t) > shared for t in tokens):
        shared += 1
    if any(len(t) <= shared for t in tokens) or len({t[shared] for t in tokens}) < len(tokens):
        raise InputError(f"the outputs in {train} cannot be told apart by one token: {answers}")
    choices = torch.tensor([t[shared] for t in tokens])
    records = [r for r in read[1] if r["output"] in answers]
    return [
        Question(
            torch.tensor((tokenizer(prompt_of(r))["input_ids"] + tokens[0][:shared])[-seq_len:]),
            choices,
            answers.index(r["output"]),
        )
        for r in (records[i] for i in spread(len(records), count))
    ]


@torch.no_grad()
def mean_loss(model: nn.Module, data: Dataset, count: int, batch_size: int) -> float:
    """Return the mean loss a token of samples all over the data.

    It is made from the logits: some methods add a penalty to their loss.
    """
    total, tokens = 0.0, 0
    chosen = spread(len(data), count)
    for begin in range(0, len(chosen), batch_size):
        batch = data.batch(chosen[begin : begin + batch_size])
        labels = batch.pop("labels")[:, 1:].to(_device(model))
        logits = model(**{key: value.to(_device(model)) for key, value in batch.items()}).logits[:, :-1].float()
        total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
        tokens += int((labels != IGNORED).sum())
    return total / tokens


@torch.no_grad()
def accuracy(model: nn.Module, questions: Sequence[Question], batch_size: int) -> float | None:
    """Return the share of questions whose right answer is the likeliest of those to choose from."""
    right = 0
    for begin in range(0, len(questions), batch_size):
        part = questions[begin : begin + batch_size]
        ids = nn.utils.rnn.pad_sequence([q.ids for q in part], batch_first=True).to(_device(model))
        # Padding is behind what counts, where a causal model does not see it.
        lengths = torch.tensor([len(q.ids) for q in part], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
        last = logits[torch.arange(len(part)), lengths - 1].float().cpu()
        right += sum(int(row[q.choices].argmax()) == q.right for row, q in zip(last, part, strict=True))
    return right / len(questions) if questions else None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
