"""Rows as other tools write them: what is read, what is refused, and that one file is the same tokens to all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import spp
from spp.comparing.data import load
from spp.configs.comparing import CompareConfig
from spp.data.encoding import read_tokens
from spp.data.parsing import Completion, Conversation, Text, read_examples, read_source
from spp.errors import DataError
from spp.pruning import calibration_windows
from spp.training import load_data
from tests.helpers.models import tiny_tokenizer

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"messages": [Q, A]}


def written(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def read(path: str) -> list[Any]:
    """What the rows of a file are, without where they are from."""
    found: list[Any] = []
    for row in read_examples(path):
        if isinstance(row, Text):
            found.append(row.text)
        elif isinstance(row, Completion):
            found.append((row.prompt, row.completion))
        else:
            found.append([(m["role"], m["content"]) for m in row.messages])
    return found


PAIR = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, ("q", "a")),  # TRL's and OpenAI's
        ({"prompt": "[1]", "completion": '[{"a": 1}]'}, ("[1]", '[{"a": 1}]')),
        ({"prompt": [Q], "completion": [A]}, PAIR),
        ({"prompt": json.dumps([Q]), "completion": json.dumps([A])}, PAIR),
        ({"messages": [{**Q, "content": [{"type": "text", "text": "q"}]}, {**A, "name": None}]}, PAIR),
        ({"messages": json.dumps([Q, A])}, PAIR),
        ({"conversations": [Q, A]}, PAIR),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
        # null columns of merged data sets: huggingface/trl and axolotl users' reports
        ({"text": "whole", "messages": None, "instruction": None, "prompt": None}, "whole"),
        ({"text": None, "messages": [Q, A], "weight": None}, PAIR),
        ({"text": "whole", "messages": []}, "whole"),
        ({"text": "whole", "messages": math.nan, "prompt": math.nan}, "whole"),  # as pandas has it
        ({"text": math.nan, "messages": [{**Q, "name": math.nan}, A], "weight": math.nan}, PAIR),
        ({"instruction": "q", "input": None, "output": "a"}, PAIR),
        ({"instruction": "q", "context": "c", "response": "a"}, [("user", "q\n\nc"), ("assistant", "a")]),
        ({"question": "q", "answer": "a", "id": 7, "source": "s"}, PAIR),
        ({"system": "s", "instruction": "q", "output": "a"}, [("system", "s"), *PAIR]),
        ({"text": "t", "label": 3}, "t"),
    ],
)
def test_rows_that_are_read(row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    assert read(written(tmp_path / "d.jsonl", row, row)) == [expected, expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{**Q, "content": [{"type": "image", "url": "x"}]}, A]}, "message 1: part 1 .* of type image"),
        ({**CHAT, "images": ["x.png"]}, "the field images would be lost"),
        ({"text": "t", "tools": [{"name": "f"}]}, "the field tools would be lost"),
        ({"instruction": "q", "output": "a", "history": [["a", "b"]]}, "the field history would be lost"),
        ({"instruction": "q", "output": "a", "response": "b"}, "the row has output and response"),
        ({"prompt": "q", "completion": [A]}, "expected two strings, or two lists"),
        ({"question": "q", "answer": 3}, "answer is int 3"),
        ({"messages": [Q, {**A, "weight": 0.5}]}, r"message 2: weight is float 0\.5"),
        ({"messages": [{**Q, "train": True}, A]}, "message 1: train is True on a message of user"),
        ({**CHAT, "labels": [1, 2]}, "the field labels would be lost"),
        ({**CHAT, "loss_mask": [1, 1]}, "loss_mask of message 1: loss_mask is 1 on a message of user"),
        ({**CHAT, "mask": [0, 1]}, "the field mask would be lost"),  # of what is learned, or of what is not
        ({**CHAT, "loss": 2.5}, r"loss is float 2\.5"),
        ({"messages": [Q, {**A, "function_call": {"name": "f"}}]}, "function_call is OpenAI's earlier form"),
        ({"messages": [Q, {**A, "tool_calls": "f"}]}, "tool_calls is str 'f'"),
        ({"messages": [Q, {"role": "assistant", "content": None}]}, "message 2: the field content is missing"),
        ({**CHAT, "tools": "none"}, "tools is str 'none'"),
        ({"chosen": "a", "rejected": "b"}, "the row has the fields chosen, rejected; expected"),
    ],
)
def test_rows_that_are_refused_by_name(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl, line 2.*{message}"):
        read(written(tmp_path / "d.jsonl", CHAT, row))


def test_turns_that_are_marked_are_not_learned(tmp_path: Path) -> None:
    # OpenAI's weight, axolotl's train and train_on_turn
    def marked(**marks: Any) -> list[int]:
        row = {"messages": [{**Q, "weight": None}, {**A, **marks}, Q, {**A, "weight": 1, "train": True}]}
        (found,) = read_source([written(tmp_path / "d.jsonl", row)]).conversations
        assert isinstance(found, Conversation) and set(found.messages[1]) == {"role", "content"}
        return found.learned

    assert marked() == marked(weight=1) == [1, 3]
    for marks in ({"weight": 0}, {"train": False}, {"train_on_turn": "false"}, {"loss": 0}, {"loss_mask": 0}):
        assert marked(**marks) == [3]
    row = {"messages": [Q, A, Q, A], "loss_mask": [0, 0, 0, 1]}
    (found,) = read_source([written(tmp_path / "d.jsonl", row)]).conversations
    assert isinstance(found, Conversation) and found.learned == [3]
    prompt = {"prompt": [Q, A, Q], "completion": [A]}
    (found,) = read_source([written(tmp_path / "d.jsonl", prompt)]).conversations
    assert isinstance(found, Conversation) and found.learned == [3]
    source = read_source([written(tmp_path / "d.jsonl", CHAT, {**CHAT, "weight": 0}, {**CHAT, "train": False})])
    assert (len(source.conversations), source.empty) == (1, 2)


def test_tables_are_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # a CSV that was trained on as plain text
    from datasets import Dataset

    rows = [{"instruction": "q, and\nmore", "output": "3"}, {"instruction": "NA", "output": "null"}]
    expected = [[("user", r["instruction"]), ("assistant", r["output"])] for r in rows]
    (tmp_path / "d.csv").write_text('\ufeffinstruction,output\n"q, and\nmore",3\nNA,null\n', encoding="utf-8")
    (tmp_path / "d.tsv").write_text('instruction\toutput\n"q, and\nmore"\t3\nNA\tnull\n')
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    (tmp_path / "d.arrow").write_bytes(next((tmp_path / "set").glob("*.arrow")).read_bytes())
    for name in ("d.csv", "d.tsv", "d.parquet", "d.arrow"):
        assert read(str(tmp_path / name)) == expected, name
    (tmp_path / "index.csv").write_text(",instruction,output\n0,q,a\n")  # pandas' index
    assert read(str(tmp_path / "index.csv")) == [PAIR]
    for content, message in (
        ("text,b\n1,2\n1\n", "line 3: 1 values under 2 headings"),
        ('a,b\n"1,2\n', "line 2: not CSV"),
        ("a,a\n1,2\n", "line 1: the headings"),
        ("text\n", "no row"),
    ):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(DataError, match=rf"bad\.csv.*{message}"):
            read(str(tmp_path / "bad.csv"))
    for name in ("bad.parquet", "bad.arrow"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(DataError, match=f"{name} cannot be read as"):
            read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["d.xlsx", "d.jsonl.gz", "d.docx", "d.pt", "d.v2"])
def test_an_extension_that_is_not_known_is_not_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("words")
    with pytest.raises(DataError, match=r"ends in \..*, which is not understood; text is \.txt"):
        read(str(tmp_path / name))
    with pytest.raises(DataError, match=r"ends in \."):
        read_tokens(tiny_tokenizer(), str(tmp_path / name))


def test_a_text_that_holds_rows_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (("d.txt", json.dumps(CHAT)), ("d", json.dumps([CHAT]))):
        (tmp_path / name).write_text("\n" + content)
        caplog.clear()
        assert read(str(tmp_path / name)) == ["\n" + content]
        assert caplog.messages == [
            f"{tmp_path / name} holds JSON, and its name says plain text, as which it is read: for rows, .jsonl"
        ]
    for content in ("words", "[1] is a footnote", "{braces}", "[]"):
        (tmp_path / "d.txt").write_text(content)
        caplog.clear()
        assert read(str(tmp_path / "d.txt")) == [content] and not caplog.messages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "ab\ud800c"}', r"character 3 is '\\ud800', half of a character"),
        (r'{"messages": [{"role": "user", "content": "\udc00"}, {"role": "assistant", "content": "a"}]}', "half of a"),
        (r'{"prompt": "q", "completion": "\ud83d"}', "half of a character"),
        ('{"text": ' + "[" * 100_000 + "}", "nested too deep"),
        ('{"text": ' + "1" * 5000 + "}", "not read as JSON"),
        ('{"text": "a", "text": "b"}', "an object has the key 'text' twice"),
        ('{"messages": [{"role": "user", "role": "x", "content": "q"}]}', "an object has the key 'role' twice"),
    ],
)
def test_what_is_no_text_names_its_line(line: str, message: str, tmp_path: Path) -> None:
    for name, content in (("d.jsonl", "\n" + line), ("d.json", f"[{line}]")):
        (tmp_path / name).write_text(content)
        place = "line 2" if name == "d.jsonl" else ""
        for reading in (
            lambda path: load_data([path], tiny_tokenizer(), block_length=2),
            lambda path: calibration_windows(path, tiny_tokenizer(), nsamples=1, seqlen=2, seed=0),
            lambda path: read_tokens(tiny_tokenizer(), path),
        ):
            with pytest.raises(DataError, match=rf"{name}.*{place}.*{message}"):
                reading(str(tmp_path / name))
    with pytest.raises(DataError, match="text 1: character 1 is"):
        calibration_windows(["\ud800", "b"], tiny_tokenizer(), nsamples=1, seqlen=2, seed=0)


@pytest.mark.parametrize("kind", ["text", "documents", "chat", "completion"])
def test_a_file_is_the_same_tokens_to_all_who_read_it(kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows: dict[str, list[Any]] = {
        "documents": [{"text": f"document {i}"} for i in range(9)],
        "chat": [{"messages": [Q, {**A, "content": f"answer {i}"}]} for i in range(9)],
        "completion": [{"prompt": "q", "completion": f" answer {i}"} for i in range(9)],
    }
    if kind == "text":
        path = str(tmp_path / "d.txt")
        Path(path).write_bytes("\ufeff".encode() + b"words of a text\n" * 20)
    else:
        path = written(tmp_path / "d.jsonl", *rows[kind])
        Path(path).write_bytes("\ufeff".encode() + Path(path).read_bytes())
    data = load_data([path], tokenizer, block_length=10 if kind in ("text", "documents") else 99)
    learned = torch.cat([data.train[i]["input_ids"] for i in range(len(data.train))])
    measured = read_tokens(tokenizer, path)
    assert torch.equal(measured[: len(learned)], learned) and len(measured) - len(learned) < 10
    assert tokenizer.unk_token_id not in measured  # the byte order mark
    drawn = calibration_windows(path, tokenizer, nsamples=1, seqlen=len(measured), seed=3)
    if kind == "text":
        assert torch.equal(drawn[0], measured)
    else:
        end = tokenizer.eos_token_id
        split = [sorted("".join(map(chr, ids)).split(chr(end))) for ids in (drawn[0].tolist(), measured.tolist())]
        assert split[0] == split[1]
    config = CompareConfig(
        model="m",
        output_dir="o",
        data=path,
        eval_text=path,
        block_length=20,
        window=5,
        test_windows=2,
        validation_windows=3,
    )
    compared = load(config, tokenizer)
    assert compared.test.tokens is not None and torch.equal(compared.test.tokens, measured[:10])


def test_eval_reads_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from spp.cli.main import main
    from spp.evaluation import token_perplexity
    from tests.helpers.models import tiny_llama

    model = tiny_llama().eval()
    spp.save_model(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    path = written(tmp_path / "d.jsonl", *[{"messages": [Q, {**A, "content": f"answer {i}"}]} for i in range(9)])
    arguments = ["spp", "eval", str(tmp_path / "model"), "--text", path, "--window", "16", "--json", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = token_perplexity(model, read_tokens(tiny_tokenizer(), path), window=16)
    assert (found["windows"], found["tokens"]) == (expected.windows, expected.tokens)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert found["text_sha256"]
