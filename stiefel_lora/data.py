"""From files to batches: plain text packed into blocks, instructions with the loss on the answer alone."""

import hashlib
import os
import random
import sysconfig
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stiefel_lora._files import read_text
from stiefel_lora._losses import IGNORED
from stiefel_lora._records import Example, examples_of, form_of, no_assistant, read_records, special_begin
from stiefel_lora.errors import InputError, listed

_Item = TypeVar("_Item")

TEXT_ENDINGS = (".txt", ".md", ".py")
# As much of the standard library as any default run needs; tokenised in two seconds.
_STANDARD_LIBRARY_CHARS = 2_500_000


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples.

    Attributes:
        input_ids: Token ids of each example, shape (length,), int64.
        labels: The same, with -100 where there is no loss.
        description: What it is, for people.
        format: How a model trained on it is to be asked: "text", "instruction" or "chat", as the command takes it.
    """

    input_ids: list[Tensor]
    labels: list[Tensor]
    description: str
    format: str = "text"

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return examples as one batch, padded on the right: input_ids, attention_mask, labels, (batch, length)."""
        ids = [self.input_ids[i] for i in indices]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            # What stands at a masked position is never looked at.
            "input_ids": pad(ids, batch_first=True, padding_value=0),
            "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True, padding_value=0),
            "labels": pad([self.labels[i] for i in indices], batch_first=True, padding_value=IGNORED),
        }

    def shuffled_batch(self, batch_size: int, step: int, seed: int) -> dict[str, Tensor]:
        """Return the step-th batch of an endless stream of shuffled epochs; see `batch_indices`."""
        return self.batch(batch_indices(len(self), batch_size, step, seed))


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the examples of the step-th batch in an endless stream of shuffled epochs.

    It depends on nothing else, so a run that is resumed at a step needs no state of its data.
    """
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        indices.append(_order(count, seed, epoch)[place])
    return indices


@lru_cache(maxsize=2)  # a batch may be of two epochs
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311  not for secrets
    return order


def spread(available: int, count: int) -> list[int]:
    """Return ``count`` indices at equal distances, or all there are: neighbours are from the same file."""
    count = min(count, available)
    return [i * available // count for i in range(count)]


def load_data(
    source: str | Path | None, tokenizer: Any, *, seq_len: int, held_out: float = 0.1
) -> tuple[Dataset, Dataset]:
    """Read and tokenise data, and hold a part of it out.

    Text is packed into blocks of ``seq_len`` tokens. It is held out by whole files or records where there are several,
    so that no held-out block continues or repeats a training block. Instructions are one example each, with the loss on
    the answer. Of one that is too long the prompt loses its beginning, up to half of ``seq_len``, and then the answer
    its end.

    Args:
        source: A .txt, .md or .py file, a folder of them (in which hidden files and folders are left out), or a .jsonl
            file whose lines have "messages", or "instruction" (perhaps "input" as well) and "output", or "prompt" and
            "completion", or "text", the first of these that is there; None for the standard library's source.
        tokenizer: A transformers tokenizer.
        seq_len: Longest example, in tokens; at least 2.
        held_out: Share of the data that is held out, in (0, 1); about, as texts and records stay whole where they can.

    Returns:
        Training and held-out data, neither empty. The split depends on the data alone.

    Raises:
        InputError: If the source is missing, empty, of an unknown form, or too short, the tokenizer has no token for
            the end of a text, or ``seq_len`` or ``held_out`` is out of range.
    """
    if seq_len < 2:
        raise InputError(f"seq_len must be at least 2 tokens, got {seq_len}")
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be a share in (0, 1), got {held_out}")
    if tokenizer.eos_token is None:
        raise InputError("the model's tokenizer has no end-of-text token (eos_token), which training data need")
    if source is None:
        return _from_texts(_standard_library(), tokenizer, seq_len, held_out, "the Python standard library's source")
    path = check_source(source)
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return _from_records(path, tokenizer, seq_len, held_out)
    texts = _read_texts(path)
    return _from_texts(
        texts, tokenizer, seq_len, held_out, f"{path}, {len(texts)} files" if path.is_dir() else str(path)
    )


def check_source(source: str | Path) -> Path:
    """Return the path of a data source, without reading it.

    Raises:
        InputError: If it is missing or of an unknown form.
    """
    path = Path(source)
    if not str(source):
        raise InputError("the name of the data is empty")
    if not path.exists():
        raise InputError(f"there is no data at {path}")
    if path.is_file() and path.suffix.lower() not in (*TEXT_ENDINGS, ".jsonl"):
        allowed = ", ".join((*TEXT_ENDINGS, ".jsonl"))
        raise InputError(f"{path} is of an unknown form {path.suffix!r}; allowed: {allowed}, or a folder of text files")
    records = sorted(str(file.relative_to(path)) for file in _files(path, (".jsonl",))) if path.is_dir() else []
    if records:
        raise InputError(
            f"of the folder {path} only texts would be read, and not {listed(records)}; give the file itself"
        )
    return path


# -- plain text --------------------------------------------------------------------------------------------------------


def _standard_library() -> list[str]:
    """Return the source of top-level modules of the running interpreter, in an order that depends on nothing else."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: _hash(file.name))
    texts, size = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        if text.strip() and size < _STANDARD_LIBRARY_CHARS:
            texts.append(text)
            size += len(text)
    if not texts:
        raise InputError("this Python has no standard library source to train on; give --data")
    return texts


def _read_texts(path: Path) -> list[str]:
    files = _files(path, TEXT_ENDINGS) if path.is_dir() else [path]
    if not files:
        raise InputError(f"the folder {path} has no {', '.join(TEXT_ENDINGS)} files")
    files.sort(key=lambda file: _hash(str(file.relative_to(path))))
    texts = [text for file in files if (text := read_text(file)).strip()]
    if not texts:
        raise InputError(f"{path} is empty")
    return texts


def _files(folder: Path, endings: Collection[str]) -> list[Path]:
    """Return the files in a folder, at any depth, that are not hidden and have one of these endings.

    Links are followed; a folder that is there twice, as by a link to one above, is read once.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for above, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(above)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = (Path(above, name) for name in names if not name.startswith("."))
        found.extend(file for file in files if file.suffix.lower() in endings and file.is_file())
    return found


def _from_texts(
    texts: list[str], tokenizer: Any, seq_len: int, held_out: float, description: str
) -> tuple[Dataset, Dataset]:
    if not texts:
        raise InputError(f"{description} is empty")
    begin, plain = special_begin(tokenizer), tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    streams = [begin + ids + [tokenizer.eos_token_id] for ids in plain]
    if len(streams) > 1:
        # The same text is on one side, however often it is there.
        groups = _alike(streams, texts)
        if len(groups) < 2:
            raise InputError(f"{description} is one text, {len(texts)} times; a training and a held-out one are needed")
        parts = [_blocks(list(chain(*part)), seq_len) for part in _shared_out(groups, held_out, seq_len)]
    else:
        parts = [_blocks([part], seq_len) for part in _without_its_end(streams[0], held_out, seq_len)]
    if not all(parts):
        total = sum(map(len, streams))
        raise InputError(
            f"{description} is too short: its {total} tokens do not make a training and a held-out block of {seq_len}"
        )
    return tuple(Dataset(p, p, f"{description}, {len(p)} blocks of {seq_len} tokens") for p in parts)  # type: ignore[return-value]


def _alike(items: Sequence[_Item], keys: Sequence[Hashable]) -> list[list[_Item]]:
    """Return the items in groups of one key, in the order of the first of each."""
    groups: dict[Hashable, list[_Item]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _shared_out(
    groups: list[list[list[int]]], held_out: float, seq_len: int
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Divide two or more texts, in groups of the same, into those to train on and those to hold out.

    Where the texts do not add up to the share, as one is nearly all, the end of the longest is held out instead.
    """
    sizes = [sum(map(len, group)) for group in groups]
    wanted = max(held_out * sum(sizes), seq_len)
    held = _held_out(sizes, wanted)
    longest = max((i for i in range(len(groups)) if len(groups[i]) == 1), key=sizes.__getitem__, default=None)
    if longest is None or wanted / 2 <= sum(sizes[i] for i in held) <= _OVERSHOOT * wanted:
        return [group for i, group in enumerate(groups) if i not in held], [groups[i] for i in sorted(held)]
    begin, end = _without_its_end(groups[longest][0], wanted / sizes[longest], seq_len)
    return [*(group for i, group in enumerate(groups) if i != longest), [begin]], [[end]]


# How far over the size that is wanted the held-out part may go before the next text or record is tried instead.
_OVERSHOOT = 1.5


def _held_out(sizes: Sequence[int], wanted: float) -> set[int]:
    """Return the places of items that make up about a size: of the first that do not go far beyond it.

    At least one and not all.
    """
    held: set[int] = set()
    taken = 0
    for i, size in enumerate(sizes):
        if taken >= wanted or len(held) == len(sizes) - 1:
            break
        if taken + size <= _OVERSHOOT * wanted:
            held.add(i)
            taken += size
    return held or {min(range(len(sizes)), key=sizes.__getitem__)}


def _without_its_end(text: list[int], share: float, seq_len: int) -> tuple[list[int], list[int]]:
    """Cut off a share of the blocks of a text, but at least one and not all."""
    blocks = len(text) // seq_len
    cut = seq_len * (blocks - min(max(1, round(blocks * share)), max(blocks - 1, 1)))
    return text[:cut], text[cut:]


def _blocks(streams: list[list[int]], seq_len: int) -> list[Tensor]:
    joined = torch.tensor([token for stream in streams for token in stream])
    return list(joined[: len(joined) // seq_len * seq_len].split(seq_len)) if len(joined) >= seq_len else []


# -- instructions ------------------------------------------------------------------------------------------------------


def _from_records(path: Path, tokenizer: Any, seq_len: int, held_out: float) -> tuple[Dataset, Dataset]:
    records = list(read_records(path))
    if not records:
        raise InputError(f"{path} is empty")
    if all(form_of(record) == "text" for record in records):
        # Not the first ones, which may be of one topic or time.
        texts = sorted((r["text"] for r in records if r["text"].strip()), key=_hash)
        return _from_texts(texts, tokenizer, seq_len, held_out, str(path))
    begin = special_begin(tokenizer)
    usable = [(r, examples) for r in records if (examples := examples_of(r, tokenizer, seq_len, begin))]
    found = [examples for _, examples in usable]
    # By a hash of the content: the same record is on the same side, wherever it stands and however often.
    tokens = [[token for example in examples for token in example.ids] for examples in found]
    order = sorted(range(len(found)), key=lambda i: _hash(str(tokens[i])))
    groups = _alike([found[i] for i in order], [tuple(tokens[i]) for i in order])
    if len(groups) < 2:
        cut = any(example.is_cut for examples in found for example in examples)
        raise InputError(
            f"{path} has {len(groups)} usable example(s) without repetitions"
            + (f", cut to {seq_len} tokens" if cut else "")
            + f"; a training and a held-out one are needed{no_assistant(records)}"
        )
    counts = [sum(map(len, group)) for group in groups]
    held = _held_out(counts, max(1, round(held_out * sum(counts))))
    dropped = len(records) - len(found)
    # As most of them are.
    ((asked, _),) = Counter(_asked(record, tokenizer) for record, _ in usable).most_common(1)
    name = (
        f"{path} without {dropped} of its {len(records)} records, in which nothing is to be learnt"
        if dropped
        else str(path)
    )
    return tuple(  # type: ignore[return-value]
        _examples(
            [
                example
                for i, group in enumerate(groups)
                if (i in held) is tested
                for record in group
                for example in record
            ],
            name,
            seq_len,
            asked,
        )
        for tested in (False, True)
    )


def _asked(record: dict[str, Any], tokenizer: Any) -> str:
    """Return the format in which a model that learnt from a record is asked."""
    if form_of(record) == "messages":
        return "chat" if tokenizer.chat_template else "text"
    return "text" if form_of(record) == "text" else "instruction"


def _examples(examples: list[Example], name: str, seq_len: int, form: str) -> Dataset:
    cut = sum(example.is_cut for example in examples)
    description = f"{name}, {len(examples)} examples" + (f", {cut} of them cut to {seq_len} tokens" if cut else "")
    ids, labels = [torch.tensor(e.ids) for e in examples], [torch.tensor(e.labels) for e in examples]
    return Dataset(ids, labels, description, form)


def _hash(text: str) -> str:
    # Names of files may be no UTF-8.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
