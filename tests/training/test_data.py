"""Reading, rendering, labelling and packing training data."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from spp.data.encoding import encode
from spp.data.parsing import Conversation, read_source
from spp.errors import DataError, DependencyError
from spp.evaluation import IGNORED
from spp.training import Collator, TrainingData, load_data
from spp.training.data import TokenRows, batches
from tests.helpers.models import tiny_tokenizer

ALPACA = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Greet.", "input": "", "output": "Hello!"},
    {"instruction": "Name a colour.", "output": "Red"},
]
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Ciao"},
    ]
}
CONVERSATIONS = {
    "conversations": [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Yo"},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Ciao"},
    ]
}


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def no_template() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def learned(tokenizer: Any, labels: torch.Tensor) -> str:
    return str(tokenizer.decode(labels[labels != IGNORED].tolist()))


def load(path: str | list[str], tokenizer: Any = None, **options: Any) -> TrainingData:
    paths = [path] if isinstance(path, str) else path
    return load_data(paths, tokenizer or tiny_tokenizer(), **{"block_length": 64, **options})


class TestText:
    def test_is_packed_into_blocks_in_order(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("abcdefghij" * 5 + "xyz")
        tokenizer = tiny_tokenizer()
        data = load(str(file), tokenizer, block_length=10)
        ids = torch.tensor(tokenizer("abcdefghij")["input_ids"])
        assert len(data.train) == 5
        for item in (data.train[i] for i in range(5)):
            assert torch.equal(item["input_ids"], ids)
            assert torch.equal(item["labels"], ids)
        assert data.summary.tokens == 50
        assert data.summary.labelled == 45
        assert data.held_out_tokens is None

    def test_documents_are_joined_by_the_end_of_text_token(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "  "}, {"text": "de"}])
        tokenizer = tiny_tokenizer()
        data = load(path, tokenizer, block_length=7)
        assert tokenizer.decode(data.train[0]["input_ids"].tolist()) == "abc</s>de</s>"
        assert data.summary.empty == 1

    def test_a_field_of_another_name(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", [{"content": "abcdef"}])
        assert len(load(path, block_length=3, text_field="content").train) == 2

    def test_the_last_tokens_are_held_out(self, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("abcdefghij" * 10)
        tokenizer = tiny_tokenizer()
        data = load(str(file), tokenizer, block_length=10, held_out=0.2, least_held_out=5)
        assert len(data.train) == 8
        assert tokenizer.decode(data.held_out_tokens) == "abcdefghij" * 2
        assert load(str(file), block_length=10, held_out=0.01, least_held_out=15).summary.held_out == 15
        assert load(str(file), block_length=10, held_out=0.0, least_held_out=15).summary.held_out == 0

    def test_any_other_extension_is_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("abcdef")
        (tmp_path / "b").write_text("ghi")
        assert load([str(tmp_path / "a.md"), str(tmp_path / "b")], block_length=11).summary.tokens == 11

    def test_the_same_data_has_the_same_hash(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("abcdefgh")
        (tmp_path / "b.txt").write_text("abcdefgx")
        first, again = (load(str(tmp_path / "a.txt"), block_length=4).summary for _ in range(2))
        assert first == again
        assert first.sha256 != load(str(tmp_path / "b.txt"), block_length=4).summary.sha256
        assert first.to_dict()["sha256"] == first.sha256


class TestInstructions:
    @pytest.mark.parametrize("as_lines", [True, False])
    def test_alpaca_with_a_chat_template(self, tmp_path: Path, as_lines: bool) -> None:
        path = str(tmp_path / "a.json")
        if as_lines:
            jsonl(Path(path), ALPACA)
        else:
            Path(path).write_text(json.dumps(ALPACA, indent=1))
        tokenizer = tiny_tokenizer()
        data = load(path, tokenizer)
        whole = [tokenizer.decode(data.train[i]["input_ids"].tolist()) for i in range(3)]
        assert whole == [
            "<|user|>Add.\n\n1 + 1</s><|assistant|>2</s>",
            "<|user|>Greet.</s><|assistant|>Hello!</s>",
            "<|user|>Name a colour.</s><|assistant|>Red</s>",
        ]
        assert [learned(tokenizer, data.train[i]["labels"]) for i in range(3)] == ["2</s>", "Hello!</s>", "Red</s>"]
        assert data.summary.kind == "instruction"
        assert data.summary.labelled == 2 + 7 + 4

    def test_alpaca_without_a_template(self, tmp_path: Path) -> None:
        tokenizer = no_template()
        data = load(jsonl(tmp_path / "a.jsonl", ALPACA), tokenizer)
        row = data.train[0]
        expected = "### Request\nAdd.\n\n1 + 1\n\n### Answer\n2</s>"
        assert tokenizer.decode(row["input_ids"].tolist()) == expected
        assert learned(tokenizer, row["labels"]) == "2</s>"

    @pytest.mark.parametrize("row", [MESSAGES, CONVERSATIONS])
    def test_every_turn_of_a_chat_is_learned(self, row: dict[str, Any], tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        data = load(jsonl(tmp_path / "a.jsonl", [row]), tokenizer)
        text = tokenizer.decode(data.train[0]["input_ids"].tolist())
        assert text == "<|system|>Be short.</s><|user|>Hi</s><|assistant|>Yo</s><|user|>Bye</s><|assistant|>Ciao</s>"
        assert learned(tokenizer, data.train[0]["labels"]) == "Yo</s>Ciao</s>"

    def test_a_chat_without_a_template(self, tmp_path: Path) -> None:
        tokenizer = no_template()
        data = load(jsonl(tmp_path / "a.jsonl", [MESSAGES]), tokenizer, block_length=200)
        assert tokenizer.decode(data.train[0]["input_ids"].tolist()) == (
            "### Task\nBe short.\n\n### Request\nHi\n\n### Answer\nYo</s>\n\n### Request\nBye\n\n### Answer\nCiao</s>"
        )
        assert learned(tokenizer, data.train[0]["labels"]) == "Yo</s>Ciao</s>"

    def test_a_template_that_rewrites_earlier_answers_gives_a_row_an_answer(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m['role'] }}|>"
            "{{ '...' if m['role'] == 'assistant' and not loop.last else m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        data = load(jsonl(tmp_path / "a.jsonl", [MESSAGES]), tokenizer)
        rows = [tokenizer.decode(data.train[i]["input_ids"].tolist()) for i in range(len(data.train))]
        assert rows == [
            "<|system|>Be short.</s><|user|>Hi</s><|assistant|>Yo</s>",
            "<|system|>Be short.</s><|user|>Hi</s><|assistant|>...</s><|user|>Bye</s><|assistant|>Ciao</s>",
        ]
        assert [learned(tokenizer, data.train[i]["labels"]) for i in range(2)] == ["Yo</s>", "Ciao</s>"]

    @pytest.mark.parametrize("make", [tiny_tokenizer, no_template])
    def test_prompts_are_learned_when_asked_for(
        self, tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "spp")
        data = load(jsonl(tmp_path / "a.jsonl", ALPACA), make(), completions_only=False)
        for i in range(3):
            assert torch.equal(data.train[i]["labels"], data.train[i]["input_ids"])
        told = "no chat template: turns begin with ### Task, ### Request, ### Answer"
        assert (told in caplog.text) is (make is no_template)

    def test_long_rows_are_cut_and_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = [
            {"instruction": "a" * 5, "output": "b" * 50},  # cut in its answer
            {"instruction": "a" * 50, "output": "b"},  # nothing of the answer is left
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "output": ""},
        ]
        data = load(jsonl(tmp_path / "a.jsonl", rows), block_length=20)
        assert [len(data.train[i]["input_ids"]) for i in range(len(data.train))] == [20, 6]
        s = data.summary
        assert (s.rows, s.truncated, s.unlearnable, s.empty) == (2, 1, 1, 1)
        assert "1 rows were cut at 20 tokens" in caplog.text

    def test_rows_are_held_out_by_seed(self, tmp_path: Path) -> None:
        rows = [{"instruction": f"{i}", "output": f"out {i}"} for i in range(20)]
        path = jsonl(tmp_path / "a.jsonl", rows)
        tokenizer = tiny_tokenizer()

        def held(seed: int) -> list[str]:
            data = load(path, tokenizer, held_out=0.2, seed=seed)
            assert (len(data.train), data.summary.held_out) == (16, 4)
            kept = [learned(tokenizer, data.train[i]["labels"]) for i in range(16)]
            aside = [learned(tokenizer, data.held_out_rows[i]["labels"]) for i in range(4)]
            assert sorted(kept + aside) == sorted(f"out {i}</s>" for i in range(20))
            return aside

        assert held(0) == held(0)
        assert held(0) != held(1)

    def test_a_token_across_the_border_belongs_to_the_answer(self) -> None:
        class Merging:
            """One token for two characters, from the first on: "### Answer\\nX" ends with one for "\\nX"."""

            chat_template = None
            eos_token = ""
            is_fast = True

            def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
                pieces = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
                return {"input_ids": list(range(len(pieces))), "offset_mapping": pieces}

        for question in ("ab", "abc"):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "X"}]
            (row,) = encode(Merging(), Conversation("here", messages), block_length=99)
            assert int((row.labels != IGNORED).sum()) == 1
            assert int(row.labels[-1]) == len(row.labels) - 1


class TestBatches:
    def test_padding(self) -> None:
        rows = TokenRows(
            [
                (torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 6, 7])),
                (torch.tensor([8]), torch.tensor([8])),
                (torch.tensor([9, 9]), torch.tensor([9, 9])),
            ]
        )
        first, second = batches(rows, Collator(2), 2)
        assert first["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
        assert first["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
        assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert second["input_ids"].tolist() == [[9, 9]]

    def test_the_pad_token(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", ALPACA)
        tokenizer = tiny_tokenizer()
        assert load(path, tokenizer).collate.pad_token_id == 2
        tokenizer.pad_token = None
        assert load(path, tokenizer).collate.pad_token_id == 1
        tokenizer.eos_token = tokenizer.unk_token = None
        assert load(path, tokenizer).collate.pad_token_id == 0


class TestHub:
    def test_rows_come_from_datasets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(name: str, config: None, split: str) -> list[dict[str, str]]:
            assert (name, config, split) == ("someone/alpaca", None, "validation")
            return ALPACA

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        assert len(read_source(["someone/alpaca"], split="validation").conversations) == 3

    def test_without_datasets_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DependencyError, match=r"spp\[train\]"):
            read_source(["someone/alpaca"])

    def test_a_data_set_that_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(name: str, config: None, split: str) -> None:
            raise ConnectionError("offline")

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(DataError, match=r"someone/alpaca is no file here.*ConnectionError: offline"):
            read_source(["someone/alpaca"])


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "", "a.txt is empty"),
            ("a.txt", " \n\t", "a.txt is empty"),
            ("a.txt", b"abc\xff", "not UTF-8 text: byte 3 is 0xff"),
            ("a.jsonl", "", "a.jsonl is empty"),
            ("a.json", "[]", "empty JSON array"),
            ("a.json", '[{"text": "a"},\n {"text": }]', "line 2, column 11: not JSON"),
            ("a.jsonl", '{"text": "a"}\n\n{"text": "b"', "line 3, column .*: not JSON"),
            ("a.jsonl", '{"text": "a"}\n["b"]', r"line 2: a row is a JSON object, this is list \['b'\]"),
            ("a.json", '["b"]', "row 1: a row is a JSON object"),
            ("a.jsonl", '{"text": "a"}\n{"txt": "b"}', "line 2: the row has the fields txt; expected messages"),
            ("a.jsonl", '{"text": 5}', "line 1: text is int 5; expected a string"),
            ("a.jsonl", '{"text": null}', "line 1: text is NoneType None"),
            ("a.jsonl", '{"instruction": "a"}', "line 1: the field output is missing; there are instruction"),
            ("a.jsonl", '{"instruction": "a", "output": ["b"]}', "line 1: output is list"),
            ("a.jsonl", '{"instruction": "a", "input": 3, "output": "b"}', "line 1: input is int 3"),
            (
                "a.json",
                '[{"instruction": "a", "output": "b"}, {"output": "b"}]',
                "row 2: the row has the fields output",
            ),
            ("a.jsonl", '{"messages": []}', r"line 1: messages is list \[\]; expected a list of messages"),
            ("a.jsonl", '{"messages": "hi"}', "line 1: messages is str 'hi'"),
            ("a.jsonl", '{"messages": ["hi"]}', "line 1, message 1: a message is an object with role and content"),
            ("a.jsonl", '{"messages": [{"role": "user"}]}', "line 1, message 1: the field content is missing"),
            ("a.jsonl", '{"messages": [{"role": "user", "content": []}]}', "message 1: content is list"),
            ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "line 1: no message is the assistant's"),
            (
                "a.jsonl",
                '{"conversations": [{"from": "bird", "value": "a"}]}',
                "message 1: from is 'bird'; known: human",
            ),
            ("a.jsonl", '{"conversations": [{"value": "a"}]}', "message 1: the field from is missing"),
            ("a.jsonl", '{"text": " "}\n{"text": ""}', "all 2 rows are empty"),
            ("a.jsonl", '{"instruction": "a", "output": ""}', "all 1 rows are empty"),
            ("a.jsonl", '{"text": "a"}\n{"instruction": "a", "output": "b"}', "mix plain text and instruction rows"),
            ("a.jsonl", '{"text": "' + "a" * 90 + '", "text2": 1}', None),
        ],
    )
    def test_names_the_place(self, tmp_path: Path, name: str, content: str | bytes, message: str | None) -> None:
        path = write(tmp_path / name, content)
        if message is None:
            read_source([path])
            return
        with pytest.raises(DataError, match=message) as caught:
            read_source([path])
        assert name in str(caught.value)

    def test_text_shorter_than_a_block(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "abc")
        with pytest.raises(DataError, match=r"has 3 tokens; one block of 64 \(block_length\) and 0 held out"):
            load(path)

    def test_text_shorter_than_a_block_and_a_window(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "a" * 100)
        with pytest.raises(DataError, match=r"has 100 tokens; one block of 64 .* and 50 held out"):
            load(path, held_out=0.1, least_held_out=50)

    def test_answers_beyond_the_block(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", [{"instruction": "a" * 99, "output": "b"}])
        with pytest.raises(DataError, match="in all 1 rows the answer begins beyond block_length 64"):
            load(path)

    def test_too_few_rows_to_hold_back(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="1 rows are too few to hold out 1"):
            load(jsonl(tmp_path / "a.jsonl", ALPACA[:1]), held_out=0.5)

    def test_a_file_that_is_not_there(self) -> None:
        for path in ("nowhere.txt", "nowhere.jsonl", "./nowhere", "/nowhere"):
            with pytest.raises(DataError, match=f"there is no file {path}"):
                read_source([path])

    def test_text_where_rows_were_promised(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is no file of rows"):
            read_source([write(tmp_path / "a.txt", "abc")], data_format="alpaca")

    def test_a_role_that_the_plain_prompt_does_not_know(self, tmp_path: Path) -> None:
        messages = [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]
        path = jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
        with pytest.raises(DataError, match="line 1: the role 'tool' needs a tokenizer with a chat template"):
            load(path, no_template())

    def test_a_template_that_refuses(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(DataError, match=r"line 1: the tokenizer's chat template refuses .* roles must alternate"):
            load(jsonl(tmp_path / "a.jsonl", [MESSAGES]), tokenizer)

    def test_a_template_whose_answers_do_not_continue_the_prompt(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        path = jsonl(tmp_path / "a.jsonl", [MESSAGES])
        with pytest.raises(DataError, match=r"line 1: .* does not continue its prompt.* completions_only=False"):
            load(path, tokenizer)
        assert len(load(path, tokenizer, completions_only=False).train) == 1

    def test_a_tokenizer_without_offsets(self, tmp_path: Path) -> None:
        class Slow:
            chat_template = None
            eos_token = "</s>"
            is_fast = False

        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with pytest.raises(DataError, match="Slow cannot say which characters"):
            encode(Slow(), Conversation("here", messages), block_length=9)
