"""Data to fine-tune on, split three ways: training, validation (to choose learning rates) and test."""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stiefel_lora._losses import IGNORED
from stiefel_lora._records import prompt_of
from stiefel_lora.data import Dataset, load_data, spread
from stiefel_lora.errors import InputError

Record = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A prompt with what is common to all answers, what each adds to it (both tokens), and the right one's place."""

    ids: Tensor
    choices: list[Tensor]
    right: int


@dataclass(frozen=True)
class Task:
    """One task; code has no questions."""

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
    parts = []
    for path, other in _sets(folder):
        asked = _by_one_token(path, other, tokenizer, seq_len, questions)
        parts.append((*_split(path, other, tokenizer, seq_len), asked))
    return _task("instructions", parts, questions)


def answers(folder: str | Path, tokenizer: Any, seq_len: int, questions: int) -> Task:
    """Return the question sets of a folder with the answers in words, where `instructions` has the name of an option.

    The options are not shown: to guess among names is what the loss of a small model comes down to, while these have
    words to be learnt. Sets that list no options are left out. The model's choice is the option with the largest mean
    log-likelihood of a token.

    Raises:
        InputError: If no set lists options.
    """
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        for path, other in _sets(folder):
            listed = [[o for r in _read(file) if (o := _options(r)) is not None] for file in (path, other)]
            if not all(listed):
                continue
            written, held_out = (Path(scratch) / file.name for file in (path, other))
            for file, found in zip((written, held_out), listed, strict=True):
                file.write_text("".join(json.dumps(_written_out(o)) + "\n" for o in found), encoding="utf-8")
            chosen = [listed[1][i] for i in spread(len(listed[1]), questions)]
            asked = [_in_words(options, tokenizer, seq_len) for options in chosen]
            parts.append((*_split(written, held_out, tokenizer, seq_len), asked))
    if not parts:
        raise InputError(f"no question set in {folder} lists its options, as Answer1: ... Answer2: ...")
    return _task("answers", parts, questions)


def tiny() -> tuple[nn.Module, Task]:
    """Return a random model of a few thousand weights and random data for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=32, intermediate_size=64, vocab_size=99)).eval()
    ids = list(torch.randint(99, (16, 16)))
    data = Dataset(ids, ids, "random tokens")
    return model, Task(
        "code", data, data, data, [Question(row, [torch.tensor([1]), torch.tensor([2])], 0) for row in ids[:4]]
    )


def with_less_to_train_on(task: Task, samples: int) -> Task:
    """Return the task with training samples from all over its training data, to be gone through many times."""
    chosen = spread(len(task.train), samples)
    ids, labels = ([part[i] for i in chosen] for part in (task.train.input_ids, task.train.labels))
    description = f"{len(chosen)} samples from all over {task.train.description}"
    return replace(task, train=Dataset(ids, labels, description))


def _sets(folder: str | Path) -> list[tuple[Path, Path]]:
    """Return the training and the test file of each question set."""
    sets = sorted(Path(folder).glob("*_train.jsonl"))
    if not sets:
        raise InputError(f"{folder} has no files NAME_train.jsonl with a NAME_test.jsonl beside them")
    return [(path, path.with_name(path.name.replace("_train.", "_test."))) for path in sets]


def _split(train: Path, test: Path, tokenizer: Any, seq_len: int) -> tuple[Dataset, Dataset, Dataset]:
    """Return training, validation and test data of two files."""
    learned, held_out = _named(train.name, load_data(train, tokenizer, seq_len=seq_len))
    return learned, held_out, _joined(_named(test.name, load_data(test, tokenizer, seq_len=seq_len)))


def _task(name: str, parts: Sequence[tuple[Dataset, Dataset, Dataset, list[Question]]], questions: int) -> Task:
    train, validation, test, asked = zip(*parts, strict=True)
    # In turn from each set, so that the first so many are a fair sample.
    mixed = [q for group in zip(*asked, strict=False) for q in group]
    return Task(name, _joined(train), _interleaved(validation), _interleaved(test), mixed[:questions])


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


def _read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _by_one_token(train: Path, test: Path, tokenizer: Any, seq_len: int, count: int) -> list[Question]:
    """Ask for the first token in which the outputs of a set differ."""
    answers = sorted({record["output"] for record in _read(train)})
    tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    shared = 0
    while len({t[shared] for t in tokens if len(t) > shared}) == 1 and all(len(t) > shared for t in tokens):
        shared += 1
    if any(len(t) <= shared for t in tokens) or len({t[shared] for t in tokens}) < len(tokens):
        raise InputError(f"the outputs in {train} cannot be told apart by one token: {answers}")
    choices = [torch.tensor(t[shared : shared + 1]) for t in tokens]
    records = [r for r in _read(test) if r["output"] in answers]
    return [
        Question(
            torch.tensor((tokenizer(prompt_of(r))["input_ids"] + tokens[0][:shared])[-seq_len:]),
            choices,
            answers.index(r["output"]),
        )
        for r in (records[i] for i in spread(len(records), count))
    ]


@dataclass(frozen=True)
class _Options:
    """A question without its options, the options, and the place of the right one."""

    question: str
    texts: list[str]
    right: int


# How the sets of LLM-Adapters (arXiv:2304.01933), whose form this is, name their options.
_OPTION = re.compile(r"\b(?:Answer|Ending|Option|Solution) ?(\d+): ")


def _options(record: Record) -> _Options | None:
    """Take a record's options out of its instruction; None if it lists none, or none that its output names."""
    question, *rest = _OPTION.split(record["instruction"].split("\n\nAnswer format:")[0])
    numbers, texts = rest[::2], [text.strip() for text in rest[1::2]]
    named = re.search(r"(\d+)\W*$", record["output"])
    if named is None or named[1] not in numbers:
        return None
    return _Options(question.strip(), texts, numbers.index(named[1]))


def _written_out(options: _Options) -> Record:
    return {"instruction": options.question, "output": options.texts[options.right]}


def _in_words(options: _Options, tokenizer: Any, seq_len: int) -> Question:
    prompt = tokenizer(prompt_of(_written_out(options)))["input_ids"]
    choices = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in options.texts]
    return Question(torch.tensor(prompt[-seq_len:]), choices, options.right)


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
    """Return the share of questions whose right answer is the likeliest of those to choose from, token by token."""
    right = 0
    for begin in range(0, len(questions), batch_size):
        part = questions[begin : begin + batch_size]
        # Answers that differ in their last token alone are read off one and the same row.
        rows: dict[tuple[int, ...], int] = {}
        places = [[rows.setdefault(_seen(q, choice), len(rows)) for choice in q.choices] for q in part]
        logits = _logits(model, list(map(torch.tensor, rows)))
        for question, places_of in zip(part, places, strict=True):
            values = [
                _mean_log_likelihood(logits[row], question, c)
                for row, c in zip(places_of, question.choices, strict=True)
            ]
            right += int(torch.stack(values).argmax()) == question.right
    return right / len(questions) if questions else None


def _seen(question: Question, choice: Tensor) -> tuple[int, ...]:
    """Return what a model must have read to give each token of a choice its probability."""
    return (*question.ids.tolist(), *choice[:-1].tolist())


def _mean_log_likelihood(logits: Tensor, question: Question, choice: Tensor) -> Tensor:
    begin = len(question.ids) - 1
    predicted = logits[begin : begin + len(choice)].float().log_softmax(-1)
    return predicted.gather(-1, choice.to(logits.device)[:, None]).mean()


def _logits(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(_device(model))
    # Padding is behind what counts, where a causal model does not see it.
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
    return model(input_ids=ids, attention_mask=mask.long()).logits


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
