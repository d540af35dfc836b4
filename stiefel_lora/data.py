"""From files to batches: plain text packed into blocks, instructions with the loss on the answer alone."""

import hashlib
import json
import random
import sysconfig
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stiefel_lora._losses import IGNORED
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
            file whose lines have "text", or "instruction" (perhaps "input" as well) and "output", or "prompt" and
            "completion", or "messages"; None for the standard library's source.
        tokenizer: A transformers tokenizer.
        seq_len: Longest example, in tokens; at least 2.
        held_out: Share of the data that is held out, in (0, 1).

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
    if not path.exists():
        raise InputError(f"there is no data at {path}")
    if path.is_file() and path.suffix.lower() not in (*TEXT_ENDINGS, ".jsonl"):
        allowed = ", ".join((*TEXT_ENDINGS, ".jsonl"))
        raise InputError(f"{path} is of an unknown form {path.suffix!r}; allowed: {allowed}, or a folder of text files")
    records = sorted(file.name for file in path.glob("*.jsonl")) if path.is_dir() else []
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
    files = [path] if path.is_file() else [f for f in path.rglob("*") if _is_text(f, path)]
    if not files:
        raise InputError(f"the folder {path} has no {', '.join(TEXT_ENDINGS)} files")
    files.sort(key=lambda file: _hash(str(file.relative_to(path))))
    texts = [text for file in files if (text := _read(file)).strip()]
    if not texts:
        raise InputError(f"{path} is empty")
    return texts


def _is_text(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in TEXT_ENDINGS and not hidden and file.is_file()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error


def _from_texts(
    texts: list[str], tokenizer: Any, seq_len: int, held_out: float, description: str
) -> tuple[Dataset, Dataset]:
    if not texts:
        raise InputError(f"{description} is empty")
    begin, plain = _special_begin(tokenizer), tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    streams = [begin + ids + [tokenizer.eos_token_id] for ids in plain]
    if len(streams) > 1:
        # The same text is on one side, however often it is there.
        groups = _alike(streams, texts)
        if len(groups) < 2:
            raise InputError(f"{description} is one text, {len(texts)} times; a training and a held-out one are needed")
        sizes = [sum(map(len, group)) for group in groups]
        cut = _cut(sizes, held_out * sum(sizes))
        parts = [_blocks(list(chain(*part)), seq_len) for part in (groups[cut:], groups[:cut])]
    else:
        blocks = _blocks(streams, seq_len)
        cut = max(1, round(len(blocks) * held_out))
        parts = [blocks[:-cut], blocks[-cut:]]
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


def _cut(sizes: Sequence[int], wanted: float) -> int:
    """Return how many of the first items make up a size, at least one and not all."""
    taken = 0
    for count, size in enumerate(sizes, start=1):
        taken += size
        if taken >= wanted:
            return min(count, len(sizes) - 1)
    return len(sizes) - 1


def _blocks(streams: list[list[int]], seq_len: int) -> list[Tensor]:
    joined = torch.tensor([token for stream in streams for token in stream])
    return list(joined[: len(joined) // seq_len * seq_len].split(seq_len)) if len(joined) >= seq_len else []


# -- instructions ------------------------------------------------------------------------------------------------------


def _from_records(path: Path, tokenizer: Any, seq_len: int, held_out: float) -> tuple[Dataset, Dataset]:
    records = list(_read_records(path))
    if not records:
        raise InputError(f"{path} is empty")
    if all(_form(record) == "text" for record in records):
        # Not the first ones, which may be of one topic or time.
        texts = sorted((r["text"] for r in records if r["text"].strip()), key=_hash)
        return _from_texts(texts, tokenizer, seq_len, held_out, str(path))
    begin = _special_begin(tokenizer)
    examples = [e for r in records if (e := _example(r, tokenizer, seq_len, begin)) is not None]
    # By a hash of the content: the same record is on the same side, wherever it stands and however often.
    examples.sort(key=lambda example: _hash(str(example.ids)))
    groups = _alike(examples, [tuple(example.ids) for example in examples])
    if len(groups) < 2:
        raise InputError(
            f"{path} has {len(groups)} usable example(s) without repetitions; a training and a held-out one are needed"
            f"{_no_assistant(records)}"
        )
    cut = _cut([len(group) for group in groups], round(held_out * len(examples)))
    dropped = len(records) - len(examples)
    name = (
        f"{path} without {dropped} of its {len(records)} records, in which nothing is to be learnt"
        if dropped
        else str(path)
    )
    return tuple(  # type: ignore[return-value]
        _examples([example for group in part for example in group], name, seq_len, _asked(records[0], tokenizer))
        for part in (groups[cut:], groups[:cut])
    )


def _no_assistant(records: Sequence[dict[str, Any]]) -> str:
    """Say which roles there are where none is the one whose messages are learnt; "" otherwise."""
    roles = {m["role"]: None for r in records if _form(r) == "messages" for m in r["messages"]}
    if not roles or _ASSISTANT in roles:
        return ""
    return f"; no message has the role {_ASSISTANT!r} (found: {listed(roles)})"


# The role of the messages that are learnt.
_ASSISTANT = "assistant"
# The forms of a record with a prompt and an answer.
_PAIRS = (("instruction", "output"), ("prompt", "completion"))


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}, line {number}: a string has half of a surrogate pair, which is no text"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        if _form(record) is None:
            keys = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise InputError(
                f"{path}, line {number}: expected an object with the strings text; instruction and output; prompt and "
                f"completion; or a list messages of objects with role and content; got {keys or 'an empty object'}"
            )
        yield record


def _form(record: Any) -> str | tuple[str, str] | None:
    """Return what a record is read as: "messages", "text", or the keys of its prompt and answer; None for nothing.

    Other keys do not count, nor does one of these that holds something else, as in sets with fixed columns.
    """
    if not isinstance(record, dict):
        return None
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        strings = (
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages
        )
        return "messages" if all(strings) else None
    if isinstance(record.get("text"), str):
        return "text"
    return next((pair for pair in _PAIRS if all(isinstance(record.get(key), str) for key in pair)), None)


@dataclass(frozen=True)
class _Example:
    """One tokenised record, and whether it was cut to the longest length."""

    ids: list[int]
    labels: list[int]
    is_cut: bool


def _example(record: dict[str, Any], tokenizer: Any, seq_len: int, begin: list[int]) -> _Example | None:
    """Tokenise one record, with labels on what the model is to answer; None if nothing of that is left.

    ``begin`` is what the tokenizer puts in front of a text.
    """
    form = _form(record)
    pieces: list[tuple[str, bool]]
    if form == "messages":
        pieces = _turns(record["messages"], tokenizer)
    elif form == "text":
        pieces = [(record["text"] + tokenizer.eos_token, True)]
    else:
        pieces = [(prompt_of(record), False), (record[form[1]] + tokenizer.eos_token, True)]  # type: ignore[index]
    # A chat template writes the special tokens itself.
    ids = [] if form == "messages" and tokenizer.chat_template else list(begin)
    labels = [IGNORED] * len(ids)
    context = ""
    for learn, parts in groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(part for part, _ in parts)
        tokens = _continued(tokenizer, context, text)
        context += text
        ids += tokens
        labels += tokens if learn else [IGNORED] * len(tokens)
    prompt = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    dropped = max(0, min(len(ids) - seq_len, prompt - seq_len // 2))
    example = _Example(ids[dropped:][:seq_len], labels[dropped:][:seq_len], len(ids) > seq_len)
    return None if all(label == IGNORED for label in example.labels[1:]) else example


def prompt_ids(tokenizer: Any, prompt: str, *, special: bool = True) -> list[int]:
    """Return the tokens of what a model is to continue: as in training, with nothing that ends a text behind them."""
    begin = _special_begin(tokenizer) if special else []
    return begin + tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]


def _special_begin(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts in front of a text, without those that it may put behind."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begins = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(begins, 0)]


def _continued(tokenizer: Any, context: str, text: str) -> list[int]:
    """Return the tokens of a text that continues another one, whose own tokens stay as they are without it.

    By itself it might get the space that many tokenizers put in front.
    """
    if context and tokenizer.is_fast:
        whole = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        border = len(context)
        if not any(start < border < end for start, end in whole["offset_mapping"]):
            pairs = zip(whole["input_ids"], whole["offset_mapping"], strict=True)
            return [token for token, (start, _) in pairs if start >= border]
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _asked(record: dict[str, Any], tokenizer: Any) -> str:
    """Return the format in which a model that learnt from a record is asked."""
    if _form(record) == "messages":
        return "chat" if tokenizer.chat_template else "text"
    return "text" if _form(record) == "text" else "instruction"


def _examples(examples: list[_Example], name: str, seq_len: int, form: str) -> Dataset:
    cut = sum(example.is_cut for example in examples)
    description = f"{name}, {len(examples)} examples" + (f", {cut} of them cut to {seq_len} tokens" if cut else "")
    ids, labels = [torch.tensor(e.ids) for e in examples], [torch.tensor(e.labels) for e in examples]
    return Dataset(ids, labels, description, form)


def prompt_of(record: dict[str, Any]) -> str:
    """Return what a model is given of a record with a prompt and an answer; the answer follows."""
    form = _form(record)
    if not isinstance(form, tuple):
        raise InputError(f"a record with a prompt and an answer is needed, got the keys {', '.join(record)}")
    prompt, more = record[form[0]], record.get("input")
    has_input = form[0] == "instruction" and isinstance(more, str) and more.strip()
    return prompt_text(f"{prompt}\n\n{more}" if has_input else prompt)


def prompt_text(prompt: str) -> str:
    """Return what a model is given of an instruction; its answer follows."""
    return f"{prompt}\n\n"


def _turns(messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """Split a conversation into texts, those of the assistant to be learnt."""
    if not tokenizer.chat_template:
        return [(f"{m['role']}: {m['content']}{tokenizer.eos_token}\n", m["role"] == _ASSISTANT) for m in messages]
    render: Callable[..., str] = tokenizer.apply_chat_template
    try:
        pieces = _all_turns(messages, render)
        return _last_turn(messages, render) if pieces is None else pieces
    except Exception as error:  # whatever a template raises
        raise InputError(
            f"the model's chat template refuses the conversation that begins with {messages[0]['content'][:60]!r} "
            f"({error})"
        ) from error


def _all_turns(messages: list[dict[str, str]], render: Callable[..., str]) -> list[tuple[str, bool]] | None:
    """Return the texts up to each answer and the answers, as the template writes them.

    None where it writes earlier turns differently later on. It is asked at the borders of answers only: there are
    templates that take no conversation without a question, as of a system message alone.
    """
    pieces, done = [], ""
    for i in (i for i, message in enumerate(messages) if message["role"] == _ASSISTANT):
        asked = [(render(messages[:i], tokenize=False, add_generation_prompt=True), False)] if i else []
        for text, learn in [*asked, (render(messages[: i + 1], tokenize=False), True)]:
            if not text.startswith(done):
                return None
            pieces.append((text[len(done) :], learn))
            done = text
    return pieces


def _last_turn(messages: list[dict[str, str]], render: Callable[..., str]) -> list[tuple[str, bool]]:
    """Return the conversation up to the last answer, which alone is learnt."""
    last = max((i for i, message in enumerate(messages) if message["role"] == _ASSISTANT), default=None)
    if last is None:
        return []
    asked = render(messages[:last], tokenize=False, add_generation_prompt=True)
    whole = render(messages[: last + 1], tokenize=False)
    if not whole.startswith(asked):
        raise ValueError("what it writes to ask for an answer is not what it writes before one")
    return [(asked, False), (whole[len(asked) :], True)]


def _hash(text: str) -> str:
    # Names of files may be no UTF-8.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
