"""Data of every form becomes the right tokens and labels, split without overlap; bad files are named."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from stiefel_lora._records import prompt_ids
from stiefel_lora.data import IGNORED, Dataset, _from_texts, _hash, batch_indices, load_data, spread
from stiefel_lora.errors import InputError
from tests.tiny import TEXT, save_tiny_model, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def all_tokens(data: Dataset) -> list[int]:
    return torch.cat(data.input_ids).tolist()


def learnt(tokenizer: Any, data: Dataset, i: int) -> str:
    return tokenizer.decode(data.labels[i][data.labels[i] != IGNORED])


def test_standard_library_needs_no_file(tokenizer: Any) -> None:
    train, held_out = load_data(None, tokenizer, seq_len=64)
    assert len(train) > 5 * len(held_out) > 0
    assert {len(x) for x in train.input_ids} == {64}
    assert tokenizer.decode(all_tokens(train)).count("import ") > 100
    again, _ = load_data(None, tokenizer, seq_len=64)
    assert all(torch.equal(a, b) for a, b in zip(train.input_ids, again.input_ids, strict=True))


@pytest.mark.parametrize("ending", [".txt", ".md", ".py"])
def test_one_text_file_is_split_by_blocks(tokenizer: Any, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"text{ending}"
    file.write_text(TEXT)
    train, held_out = load_data(file, tokenizer, seq_len=32)
    whole = tokenizer(TEXT)["input_ids"] + [tokenizer.eos_token_id]
    # In order, nothing twice, only the last incomplete block left out.
    assert all_tokens(train) + all_tokens(held_out) == whole[: len(whole) // 32 * 32]
    assert len(held_out) == round(len(whole) // 32 * 0.1)


def test_a_folder_is_split_by_files(tokenizer: Any, tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{i}.txt").write_text(f"file number {i} " * 60)
    (tmp_path / "notes.log").write_text("ignored")
    train, held_out = load_data(tmp_path, tokenizer, seq_len=16)
    texts = [tokenizer.decode(all_tokens(part)) for part in (train, held_out)]
    sides = [[str(i) for i in range(10) if f"number {i}" in text] for text in texts]
    assert sorted(sides[0] + sides[1]) == [str(i) for i in range(10)]
    assert len(sides[1]) in (1, 2)


def test_folders_behind_links_are_read_and_once(tokenizer: Any, tmp_path: Path) -> None:
    flat, folder, elsewhere = tmp_path / "flat", tmp_path / "data", tmp_path / "elsewhere"
    flat.mkdir()
    for i, path in enumerate((folder, elsewhere, elsewhere / "deep")):
        path.mkdir(parents=True)
        for place in (flat, path):
            (place / f"{i}.txt").write_text(f"file number {i} " * 60)
    for link, target in ((folder / "link", elsewhere), (folder / "twice", elsewhere), (elsewhere / "loop", folder)):
        link.symlink_to(target)
    counts = []
    for place in (flat, folder):
        text = "".join(tokenizer.decode(all_tokens(part)) for part in load_data(place, tokenizer, seq_len=2))
        counts.append([text.count(f"number {i}") for i in range(3)])
    assert counts[0] == counts[1] and min(counts[0]) >= 59


def test_a_model_is_asked_as_most_records_do(tokenizer: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": f"left {i}", "completion": "right"} for i in range(4)]
    for records in ([{"text": "def left"}, *pairs], [*pairs, {"text": "def left"}]):
        train, test = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=32)
        assert (train.format, test.format) == ("instruction", "instruction")


@pytest.mark.parametrize("keys", [("instruction", "output"), ("prompt", "completion")])
def test_only_the_answer_is_learnt(tokenizer: Any, tmp_path: Path, keys: tuple[str, str]) -> None:
    records = [{keys[0]: f"add {i} and {i}", keys[1]: f"total {2 * i}", "extra": 1} for i in range(20)]
    train, held_out = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    assert (len(train), len(held_out)) == (18, 2)
    for data in (train, held_out):
        for i in range(len(data)):
            text = tokenizer.decode(data.input_ids[i])
            answer = learnt(tokenizer, data, i)
            assert answer.startswith("total ") and answer.endswith("<eos>")
            number = int(answer.removeprefix("total ").removesuffix("<eos>"))
            assert text == f"add {number // 2} and {number // 2}\n\n{answer}"


def test_a_long_prompt_is_cut_at_its_beginning(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"instruction": "word " * 200 + str(i), "output": f"total {i}"} for i in range(4)]
    train, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=24)
    assert len(train.input_ids[0]) == 24
    assert learnt(tokenizer, train, 0).startswith("total")


def test_messages_learn_the_assistants_turns(tokenizer: Any, tmp_path: Path) -> None:
    asked = ("left?", "total?")
    file = write_jsonl(tmp_path / "d.jsonl", [conversation(x, "right", x, "right") for x in asked])
    train, _ = load_data(file, tokenizer, seq_len=128)
    assert learnt(tokenizer, train, 0) == " right<eos>" * 2
    tokenizer.chat_template = CHAT
    train, _ = load_data(file, tokenizer, seq_len=128)
    assert learnt(tokenizer, train, 0) == "right<eos>" * 2
    texts = [f"<user>{x}<eos><assistant>right<eos>" * 2 for x in asked]
    assert tokenizer.decode(train.input_ids[0]) in texts


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def conversation(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_a_template_writes_the_special_tokens(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    end = ("<eos>", tokenizer.eos_token_id)  # this tokenizer has no other special token to begin with
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[end])
    assert tokenizer.decode(tokenizer("left")["input_ids"]) == "<eos>left"
    file = write_jsonl(tmp_path / "d.jsonl", [conversation("left?", "right"), conversation("right?", "left")])
    train, _ = load_data(file, tokenizer, seq_len=64)
    assert tokenizer.decode(train.input_ids[0]).count("<eos>") == 3, "before the first turn and after each"
    tokenizer.chat_template = "<eos>" + CHAT
    train, _ = load_data(file, tokenizer, seq_len=64)
    assert tokenizer.decode(train.input_ids[0]).count("<eos>") == 3


def test_where_a_template_rewrites_earlier_answers_the_last_one_is_learnt(tokenizer: Any, tmp_path: Path) -> None:
    # As Qwen3's: an empty thought stands before the last answer only.
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}", "{{ '!' if loop.last and loop.index is even else '' }}{{ m.content }}"
    )
    file = write_jsonl(tmp_path / "d.jsonl", [conversation("a", "left", x, "right") for x in ("b", "c")])
    train, _ = load_data(file, tokenizer, seq_len=128)
    text = tokenizer.decode(train.input_ids[0])
    assert text[: text.index("<assistant>!")] in (f"<user>a<eos><assistant>left<eos><user>{x}<eos>" for x in "bc")
    assert learnt(tokenizer, train, 0) == "!right<eos>"


def test_records_without_anything_to_learn_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    records = [conversation(f"{i}?", "right") for i in range(4)] + [conversation("left?")] * 3
    for part in load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64):
        assert "d.jsonl without 3 of its 7 records, in which nothing is to be learnt, " in part.description


def test_a_template_is_asked_at_the_borders_of_answers_only(tokenizer: Any, tmp_path: Path) -> None:
    # As Qwen3.5's, which takes no conversation without a question, nor a system message alone.
    asked = "messages | selectattr('role', 'equalto', 'user') | list"
    refuse = f"{{% if not {asked} %}}{{{{ raise_exception('No query') }}}}{{% endif %}}"
    records = [conversation("left?", f"a{i}", "right?", "b", "more?") for i in range(3)]
    for record in records:
        record["messages"].insert(0, {"role": "system", "content": "Be kind."})
    file = write_jsonl(tmp_path / "d.jsonl", records)
    tokenizer.chat_template = CHAT
    expected, _ = load_data(file, tokenizer, seq_len=128)
    tokenizer.chat_template = refuse + CHAT
    train, _ = load_data(file, tokenizer, seq_len=128)
    assert all(torch.equal(a, b) for a, b in zip(train.labels, expected.labels, strict=True))
    text = tokenizer.decode(train.input_ids[0])
    assert text.startswith("<system>Be kind.<eos><user>left?<eos><assistant>a")
    assert text.endswith("<user>right?<eos><assistant>b<eos>"), "what follows the last answer teaches nothing"
    assert learnt(tokenizer, train, 0)[2:] == "<eos>b<eos>"


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    file = write_jsonl(tmp_path / "d.jsonl", [conversation("left?", "right")])
    with pytest.raises(InputError, match=r"begins with 'left\?' \(System role not supported\)"):
        load_data(file, tokenizer, seq_len=64)


def test_a_long_answer_loses_its_end_and_its_prompt_at_most_down_to_half(tokenizer: Any, tmp_path: Path) -> None:
    words = " ".join(map(str, range(100, 200)))
    records = [{"instruction": f"{words} {i}", "output": f"total {words}"} for i in range(4)]
    train, held_out = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=24)
    for i in range(len(train)):
        assert len(train.input_ids[i]) == 24
        assert int((train.labels[i] == IGNORED).sum()) == 12
        assert learnt(tokenizer, train, i).startswith("total 100")
        assert tokenizer.decode(train.input_ids[i][:12]).split()[-2] == "199", "its end, before the number"
    assert train.description.endswith(f"{len(train)} examples, {len(train)} of them cut to 24 tokens")
    short, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=2000)
    assert short.description.endswith(f"{len(short)} examples")


def test_an_input_stands_behind_its_instruction(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"instruction": "add", "input": f"{i} and {i}", "output": f"total {i}"} for i in range(3)]
    records += [{"instruction": "add", "input": more, "output": "total"} for more in ("", " ", None)]  # type: ignore[dict-item]
    parts = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    texts = {tokenizer.decode(ids) for part in parts for ids in part.input_ids}
    assert texts == {f"add\n\n{i} and {i}\n\ntotal {i}<eos>" for i in range(3)} | {"add\n\ntotal<eos>"}


def test_a_repeated_record_is_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"prompt": f"add {i}", "completion": f"total {i}"} for i in range(5)] * 10
    train, held_out = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    sides = [{tuple(ids.tolist()) for ids in part.input_ids} for part in (train, held_out)]
    assert not sides[0] & sides[1]
    assert (len(train), len(held_out)) == (40, 10)


def test_unused_keys_and_rare_separators_do_no_harm(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    records = [
        {"text": None, "messages": None, "instruction": "a", "output": "left\u2028right\x85"},
        {"prompt": 3, "completion": None, "instruction": "b", "output": "total"},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    file.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    parts = load_data(file, tokenizer, seq_len=64)
    assert [len(part) for part in parts] == [1, 1]
    (tmp_path / "d.txt").write_text("\ufeff" + TEXT, encoding="utf-8")
    (tmp_path / "e.txt").write_text(TEXT, encoding="utf-8")
    marked, plain = (load_data(tmp_path / name, tokenizer, seq_len=32)[0] for name in ("d.txt", "e.txt"))
    assert all_tokens(marked) == all_tokens(plain)


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no end-of-text token"):
        load_data(None, tokenizer, seq_len=32)


def test_text_records_are_packed(tokenizer: Any, tmp_path: Path) -> None:
    texts = [f"{word} right total " * 20 for word in ("left", "add", "return", "def")]
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in texts for _ in range(5)])
    train, held_out = load_data(file, tokenizer, seq_len=16)
    assert {len(x) for x in train.input_ids + held_out.input_ids} == {16}
    seen = [
        {word for word in ("left", "add", "return", "def") if word in tokenizer.decode(all_tokens(part))}
        for part in (train, held_out)
    ]
    assert len(seen[0]) == 3 and len(seen[1]) == 1 and not seen[0] & seen[1], "no text on both sides"
    with pytest.raises(InputError, match="is one text, 3 times"):
        load_data(write_jsonl(file, [{"text": "left right " * 40}] * 3), tokenizer, seq_len=16)


def test_batches_are_padded_on_the_right() -> None:
    data = Dataset([torch.tensor([5, 6, 7]), torch.tensor([8])], [torch.tensor([IGNORED, 6, 7]), torch.tensor([8])], "")
    batch = data.batch([1, 0])
    assert batch["input_ids"].tolist() == [[8, 0, 0], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[8, -100, -100], [-100, 6, 7]]


@given(count=st.integers(1, 12), size=st.integers(1, 5), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_has_every_example_once(count: int, size: int, seed: int) -> None:
    stream = [i for step in range(3 * count) for i in batch_indices(count, size, step, seed)]
    for epoch in range(3 * size):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = {tuple(batch_indices(20, 20, step, seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


ROLES = '{"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]}\n' * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "there is no data at"),
        ("d.csv", "a,b", r"unknown form '.csv'; allowed: .txt, .md, .py, .jsonl"),
        ("empty.txt", " \n", "is empty"),
        ("empty.jsonl", "\n", "is empty"),
        ("short.txt", "left right", "is too short: its"),
        ("latin.txt", b"caf\xe9 " * 50, "is not UTF-8 text: byte 3 is 0xe9"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("list.jsonl", "[1]", "line 1: expected an object .* got a list"),
        ("keys.jsonl", '{"question": "a"}', "line 1: expected an object .* got question"),
        ("half.jsonl", '{"instruction": "a"}', "line 1: .* got instruction"),
        ("number.jsonl", '{"instruction": "a", "output": 3}', "line 1"),
        ("turns.jsonl", '{"messages": [{"role": "user"}]}', "line 1"),
        ("one.jsonl", '{"instruction": "a", "output": "b"}\n' * 3, "has 1 usable example"),
        ("roles.jsonl", ROLES, r"has 0 usable .*; no message has the role 'assistant' \(found: human, gpt\)"),
        ("no-turns.jsonl", '{"messages": []}', "line 1: expected an object .* got messages: an empty list"),
        (
            "tools.jsonl",
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}',
            "got messages: a list whose message 2 is .role: a string, content: null.",
        ),
        ("blank.jsonl", '{"text": " "}', "is empty"),
        ("half-pair.jsonl", '{"text": "\\ud800"}', "line 1: a string has half of a surrogate pair"),
        ("deep.jsonl", "[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_bad_data_is_named(tokenizer: Any, tmp_path: Path, name: str, content: Any, message: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_data(file, tokenizer, seq_len=32)
    assert str(tmp_path) in str(caught.value)


def test_an_empty_folder_is_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no .txt, .md, .py files"):
        load_data(tmp_path, tokenizer, seq_len=32)
    with pytest.raises(InputError, match="seq_len must be at least 2"):
        load_data(None, tokenizer, seq_len=1)
    for share in (-1, 0, 1, 1.5, float("nan")):
        with pytest.raises(InputError, match=rf"held_out must be a share in \(0, 1\), got {share}"):
            load_data(None, tokenizer, seq_len=32, held_out=share)


def test_one_json_object_a_line_is_what_json_dumps_writes(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": "é\n"}])
    assert json.loads(file.read_text()) == {"text": "é\n"}


def test_spread_covers_the_whole_at_equal_distances() -> None:
    assert spread(12, 4) == [0, 3, 6, 9]
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(0, 8) == []


def test_what_a_tokenizer_puts_behind_a_text_ends_no_prompt(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    end = ("<eos>", tokenizer.eos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[end])
    assert tokenizer.decode(tokenizer("left")["input_ids"]) == "left<eos>"
    records = [{"instruction": f"left {i}?", "output": "right"} for i in range(3)]
    train, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    assert tokenizer.decode(train.input_ids[0]).endswith("?\n\nright<eos>")
    assert tokenizer.decode(prompt_ids(tokenizer, "left")) == "left"
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": "left " * i} for i in range(20, 30)])
    assert tokenizer.decode(all_tokens(load_data(texts, tokenizer, seq_len=8)[0])).count("<eos><eos>") == 0


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("form", ["chat", "instruction"])
def test_an_answer_is_learnt_behind_the_very_tokens_that_ask_for_it(form: str, tmp_path: Path) -> None:
    """With a tokenizer like LLaMA 2's, which puts a space before each text by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()
    bare.train_from_iterator([TEXT, "<|user|>\n<|assistant|>\n\n"], trainers.BpeTrainer(special_tokens=["<eos>"]))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>", chat_template=ZEPHYR)  # noqa: S106
    if form == "chat":
        records: list[object] = [conversation("left", "right"), conversation("right", "left")]
        asked = [
            tokenizer.apply_chat_template(r["messages"][:1], tokenize=False, add_generation_prompt=True)
            for r in records
        ]  # type: ignore[index]
        answers = [r["messages"][1]["content"] for r in records]  # type: ignore[index]
    else:
        records = [{"instruction": "left", "output": "right"}, {"instruction": "right", "output": "left"}]
        asked, answers = [f"{r['instruction']}\n\n" for r in records], [r["output"] for r in records]  # type: ignore[index]
    train, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    ids, labels = train.input_ids[0].tolist(), train.labels[0].tolist()
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    which = next(i for i, answer in enumerate(answers) if answer[0] == tokenizer.decode(ids[first:]).strip()[0])
    assert ids[:first] == prompt_ids(tokenizer, asked[which], special=form != "chat")
    learnt = tokenizer.convert_ids_to_tokens([token for token in labels[first:] if token != IGNORED])
    assert "".join(learnt).startswith(answers[which] + "<eos>"), "no space in front"


def test_a_folder_of_texts_is_not_one_of_records(tokenizer: Any, tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.TXT").write_text(f"file number {i} " * 60)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "hidden.txt").write_text("hidden " * 600)
    train, held_out = load_data(tmp_path, tokenizer, seq_len=16)
    assert "hidden" not in tokenizer.decode(all_tokens(train) + all_tokens(held_out))
    assert f"{tmp_path}, 5 files, " in train.description
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(InputError, match="only texts would be read, and not train.jsonl; give the file itself"):
        load_data(tmp_path, tokenizer, seq_len=16)


def test_a_folder_may_be_named_as_a_file_of_records(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "d.jsonl"
    folder.mkdir()
    (folder / "text.md").write_text(TEXT)
    assert load_data(folder, tokenizer, seq_len=32)[0].description.startswith(f"{folder}, 1 files, ")


def test_an_empty_list_of_messages_gives_way_to_another_form(tokenizer: Any, tmp_path: Path) -> None:
    texts = [f"left right {i} " * 20 for i in range(4)]
    parts = []
    for nothing in ([], None):
        records: list[object] = [{"messages": nothing, "text": text} for text in texts]
        parts.append(load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=16)[0])
    assert all_tokens(parts[0]) == all_tokens(parts[1])


def test_a_file_name_that_is_no_text_does_no_harm(tokenizer: Any, tmp_path: Path) -> None:
    for name in (b"\xff\xfe.txt", b"plain.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text(f"left {len(name)} " * 60)
    train, held_out = load_data(tmp_path, tokenizer, seq_len=16)
    assert len(train) and len(held_out)


def test_a_largest_text_at_the_end_of_the_order_leaves_something_to_train_on(tokenizer: Any, tmp_path: Path) -> None:
    texts = sorted((f"left {i} right " * 30 for i in range(2)), key=_hash)
    texts[1] *= 50
    for order in (texts, texts[::-1]):
        train, held_out = _from_texts(order, tokenizer, 16, 0.1, "two texts")
        assert len(train) and len(held_out)


def text_of(tokens: int, start: int = 0) -> str:
    return "".join(f"line number {i} of a text\n" for i in range(start, start + tokens))


@pytest.mark.parametrize("names", ["README notes", "notes README", "book intro", "a b", "x y"])
def test_the_held_out_part_is_near_its_share_whatever_the_texts_are(tokenizer: Any, tmp_path: Path, names: str) -> None:
    """Here one of two files is nearly all: the end of it is held out, as of a file by itself."""
    short, long = names.split()
    (tmp_path / f"{short}.txt").write_text(text_of(40))
    (tmp_path / f"{long}.txt").write_text(text_of(2000, start=50))
    train, held_out = load_data(tmp_path, tokenizer, seq_len=32)
    assert 0.09 < len(held_out) / (len(train) + len(held_out)) < 0.11
    learned = tokenizer.decode(all_tokens(train))
    assert "number 3 of" in learned and "number 60 of" in learned
    assert "number 2040 of" in tokenizer.decode(all_tokens(held_out))


@pytest.mark.parametrize("sizes", [[60, *[1] * 6], [1] * 20, [5, 5], [30, 1, 1, 1], [2, 60, 1]])
def test_about_the_share_of_the_records_is_held_out(tokenizer: Any, tmp_path: Path, sizes: list[int]) -> None:
    records = [{"prompt": f"add {i}", "completion": f"total {i}"} for i, n in enumerate(sizes) for _ in range(n)]
    train, held_out = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    assert len(train) + len(held_out) == sum(sizes)
    # Not far above the share, unless all records are too often there for that.
    assert 1 <= len(held_out) <= max(1.5 * max(1, round(0.1 * sum(sizes))), min(sizes))


def test_several_small_texts_hold_out_a_block(tokenizer: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": text_of(3, start=3 * i)} for i in range(20)])
    train, held_out = load_data(file, tokenizer, seq_len=128)
    assert len(held_out) == 1
    assert len(train) > 2


def test_alpacas_prompts_and_answers_are_taken_before_its_text(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"instruction": f"add {i}", "input": "", "output": f"total {i}", "text": f"### {i}"} for i in range(20)]
    train, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    assert train.format == "instruction"
    assert learnt(tokenizer, train, 0).startswith("total")


def test_a_long_text_beside_other_records_is_several_examples(tokenizer: Any, tmp_path: Path) -> None:
    texts = [text_of(40, start=100 * i) for i in range(1, 6)]
    records = [{"prompt": "a", "completion": "b"}, *({"text": text} for text in texts)]
    parts = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=32)
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    found = sum(len(ids) for part in parts for ids in part.input_ids)
    # The pair, and of each text all but perhaps a last single token.
    assert tokens - 5 < found <= tokens + 10
    sides = [{i for i in range(1, 6) if f"number {i}3" in tokenizer.decode(all_tokens(part))} for part in parts]
    assert not sides[0] & sides[1]


def test_a_cut_prompt_keeps_what_begins_a_text(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    records = [{"prompt": "word " * 200 + str(i), "completion": f"total {i}"} for i in range(4)]
    train, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=24)
    assert [len(train.input_ids[0]), int(train.input_ids[0][0])] == [24, 0]
    assert learnt(tokenizer, train, 0).startswith("total")


def test_an_answer_that_begins_a_conversation_is_learnt_without_what_is_before_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = "SYSTEM " + CHAT
    greeting = {"role": "assistant", "content": "Hello"}
    records = [{"messages": [greeting, *conversation(f"add {i}", "total")["messages"]]} for i in range(4)]
    train, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    text = learnt(tokenizer, train, 0)
    assert text.startswith("Hello")
    assert "SYSTEM" not in text
    assert "total" in text


def test_records_anywhere_in_a_folder_of_texts_are_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text(TEXT)
    write_jsonl(tmp_path / "deep" / "B.JSONL", [{"text": "x"}])
    with pytest.raises(InputError, match=r"not deep/B\.JSONL; give the file itself"):
        load_data(tmp_path, tokenizer, seq_len=32)


def test_an_empty_name_is_no_folder(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the name of the data is empty"):
        load_data("", tokenizer, seq_len=32)


def test_messages_that_are_none_give_way_to_another_form(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"messages": ["x"], "prompt": f"add {i}", "completion": f"total {i}"} for i in range(4)]
    train, _ = load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=64)
    assert learnt(tokenizer, train, 0).startswith("total")


def test_records_that_are_equal_once_cut_are_named_so(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"prompt": f"{i} " + "word " * 200, "completion": "total"} for i in range(3)]
    with pytest.raises(InputError, match="1 usable example.* without repetitions, cut to 24 tokens"):
        load_data(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, seq_len=24)


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"instruction": "a", "output": None}, "got instruction: a string, output: null"),
        ({"prompt": [1], "completion": 5}, "got prompt: a list, completion: a number"),
        ([], "got a list"),
        (None, "got null"),
        ({}, "got an empty object"),
    ],
)
def test_what_a_record_has_instead_is_named(tokenizer: Any, tmp_path: Path, record: object, found: str) -> None:
    with pytest.raises(InputError, match=f"line 1: expected an object .*; {found}$"):
        load_data(write_jsonl(tmp_path / "d.jsonl", [record]), tokenizer, seq_len=24)
