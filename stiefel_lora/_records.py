"""Records of a .jsonl file as tokens: prompts, conversations and texts, with labels on what is to be learnt."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from stiefel_lora._files import read_text
from stiefel_lora._losses import IGNORED
from stiefel_lora.errors import InputError, listed


def no_assistant(records: Sequence[dict[str, Any]]) -> str:
    """Say which roles there are where none is the one whose messages are learnt; "" otherwise."""
    roles = {m["role"]: None for r in records if form_of(r) == "messages" for m in r["messages"]}
    if not roles or _ASSISTANT in roles:
        return ""
    return f"; no message has the role {_ASSISTANT!r} (found: {listed(roles)})"


# The role of the messages that are learnt.
_ASSISTANT = "assistant"
# The forms of a record with a prompt and an answer.
_PAIRS = (("instruction", "output"), ("prompt", "completion"))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a .jsonl file, each of a form that `form_of` knows, or raise InputError with the line."""
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
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
        if form_of(record) is None:
            raise InputError(
                f"{path}, line {number}: expected an object with the strings text; instruction and output; prompt and "
                f"completion; or a list messages of objects with the strings role and content; got {_described(record)}"
            )
        yield record


# What the values of JSON are called.
_KINDS = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _described(record: Any) -> str:
    """Say what a record is that cannot be read."""
    if not isinstance(record, dict):
        return _KINDS.get(type(record), "null")
    kinds = {key: _KINDS.get(type(value), "null") for key, value in record.items()}
    messages = record.get("messages")
    if isinstance(messages, list):
        wrong = ((n, message) for n, message in enumerate(messages, start=1) if not _is_message(message))
        n, message = next(wrong, (0, None))
        kinds["messages"] = f"a list whose message {n} is ({_described(message)})" if n else "an empty list"
    return ", ".join(f"{key}: {kind}" for key, kind in kinds.items()) or "an empty object"


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def form_of(record: Any) -> str | tuple[str, str] | None:
    """Return what a record is read as: "messages", the keys of its prompt and answer, or "text"; None for nothing.

    Other keys do not count, nor does one of these that holds something else, as in sets with fixed columns. What says
    most is taken: Alpaca has its prompts and answers once more as one text.
    """
    if not isinstance(record, dict):
        return None
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return "messages"
    pair = next((pair for pair in _PAIRS if all(isinstance(record.get(key), str) for key in pair)), None)
    return pair or ("text" if isinstance(record.get("text"), str) else None)


@dataclass(frozen=True)
class Example:
    """One tokenised record, and whether it was cut to the longest length."""

    ids: list[int]
    labels: list[int]
    is_cut: bool


def examples_of(record: dict[str, Any], tokenizer: Any, seq_len: int, begin: list[int]) -> list[Example]:
    """Tokenise one record, with labels on what the model is to answer; empty if nothing of that is left.

    ``begin`` is what the tokenizer puts in front of a text. A long text is several examples.
    """
    if form_of(record) != "text":
        return [example] if (example := _example(record, tokenizer, seq_len, begin)) is not None else []
    if not record["text"].strip():
        return []
    plain = tokenizer(record["text"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*begin, *plain, tokenizer.eos_token_id]
    parts = [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
    # A single token has nothing before it that it would follow from.
    return [Example(part, part, is_cut=False) for part in parts if len(part) > 1]


def _example(record: dict[str, Any], tokenizer: Any, seq_len: int, begin: list[int]) -> Example | None:
    form = form_of(record)
    pieces: list[tuple[str, bool]]
    if form == "messages":
        pieces = _turns(record["messages"], tokenizer)
    else:
        pieces = [(prompt_of(record), False), (record[form[1]] + tokenizer.eos_token, True)]  # type: ignore[index]
    # A chat template writes the special tokens itself.
    ids = [] if form == "messages" and tokenizer.chat_template else list(begin)
    front = len(ids)
    labels = [IGNORED] * front
    context = ""
    for learn, parts in groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(part for part, _ in parts)
        tokens = _continued(tokenizer, context, text)
        context += text
        ids += tokens
        labels += tokens if learn else [IGNORED] * len(tokens)
    prompt = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    dropped = max(0, min(len(ids) - seq_len, prompt - seq_len // 2, prompt - front))
    kept = [*range(front), *range(front + dropped, len(ids))][:seq_len]
    example = Example([ids[i] for i in kept], [labels[i] for i in kept], len(ids) > seq_len)
    return None if all(label == IGNORED for label in example.labels[1:]) else example


def chat_prompt(question: str, tokenizer: Any) -> str:
    """Return a question as the model's chat template writes it, up to where the answer begins.

    Raises:
        InputError: If there is no template, or it refuses a conversation of a question alone.
    """
    if not tokenizer.chat_template:
        raise InputError("the model's tokenizer has no chat template; use --format instruction or text")
    turns = [{"role": "user", "content": question}]
    with _refusals(turns):
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def prompt_ids(tokenizer: Any, prompt: str, *, special: bool = True) -> list[int]:
    """Return the tokens of what a model is to continue: as in training, with nothing that ends a text behind them."""
    begin = special_begin(tokenizer) if special else []
    return begin + tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]


def special_begin(tokenizer: Any) -> list[int]:
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


def prompt_of(record: dict[str, Any]) -> str:
    """Return what a model is given of a record with a prompt and an answer; the answer follows."""
    form = form_of(record)
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
        return [
            piece
            for m in messages
            for piece in (
                (f"{m['role']}:", False),
                (f" {m['content']}{tokenizer.eos_token}", m["role"] == _ASSISTANT),
                ("\n", False),
            )
        ]
    render: Callable[..., str] = tokenizer.apply_chat_template
    with _refusals(messages):
        pieces = _all_turns(messages, render)
        return _last_turn(messages, render) if pieces is None else pieces


@contextmanager
def _refusals(messages: list[dict[str, str]]) -> Iterator[None]:
    try:
        yield
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
        asked = [(_asked_for(messages, i, render), False)]
        for text, learn in [*asked, (render(messages[: i + 1], tokenize=False), True)]:
            if not text.startswith(done):
                return None
            pieces.append((text[len(done) :], learn))
            done = text
    return pieces


def _asked_for(messages: list[dict[str, str]], i: int, render: Callable[..., str]) -> str:
    """Return what a template writes before an answer; for one that begins the conversation, what is there before it."""
    if i:
        return render(messages[:i], tokenize=False, add_generation_prompt=True)
    whole, content = render(messages[:1], tokenize=False), messages[0]["content"].strip()
    return whole.partition(content)[0] if content else whole


def _last_turn(messages: list[dict[str, str]], render: Callable[..., str]) -> list[tuple[str, bool]]:
    """Return the conversation up to the last answer, which alone is learnt."""
    last = max((i for i, message in enumerate(messages) if message["role"] == _ASSISTANT), default=None)
    if last is None:
        return []
    asked = _asked_for(messages, last, render)
    whole = render(messages[: last + 1], tokenize=False)
    if not whole.startswith(asked):
        raise ValueError("what it writes to ask for an answer is not what it writes before one")
    return [(asked, False), (whole[len(asked) :], True)]
