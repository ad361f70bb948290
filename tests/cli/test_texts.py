"""WikiText-2 and C4 as papers measure them: from files in the form of the hub's, and from a stand-in for the hub."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spp.configs.evaluating import EvalConfig, parse_window
from spp.errors import ConfigError, DataError, DependencyError, SPPWarning
from spp.evaluation import dataset_text, dataset_windows, paper_window, perplexity_result
from tests.cli.conftest import Outcome
from tests.data.test_bos import TEXT, adding
from tests.helpers.models import tiny_llama, tiny_tokenizer

LINES = ["", " = A heading = \n", "", f" {TEXT[:300]} \n", "", " The end . \n"]
DOCUMENTS = [{"text": f"Document {i}.", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for i in range(1200)]
C4 = " ".join(row["text"] for row in DOCUMENTS[:1100])
NAME = "c4-validation.00000-of-00008.json.gz"
KEYS = (
    *("perplexity", "loss", "tokens", "windows", "window", "bos", "protocol", "text_sha256", "text_bytes"),
    *("tokenizer_sha256", "model_fingerprint", "dtype", "versions", "seconds"),
)


def write(file: Path, rows: list[Any]) -> None:
    """Write rows in the format that the file's ending says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(file))
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)


@pytest.mark.parametrize("folder", ["wikitext/wikitext-2-raw-v1", "Salesforce/wikitext/wikitext-2-raw-v1"])
@pytest.mark.parametrize("file", ["test.jsonl", "test-00000-of-00001.parquet"])
def test_wikitext2_is_its_test_lines_joined_by_empty_lines(folder: str, file: str, tmp_path: Path) -> None:
    write(tmp_path / folder / file, [{"text": line} for line in LINES])
    write(tmp_path / folder / file.replace("test", "train"), [{"text": "not this"}])
    assert dataset_text("wikitext2", tmp_path) == "\n\n".join(LINES)


@pytest.mark.parametrize("file", [f"en/{NAME}", f"allenai/c4/en/{NAME}", "c4/en/validation.jsonl"])
def test_c4_is_its_first_documents_joined_by_blanks(file: str, tmp_path: Path) -> None:
    write(tmp_path / file, DOCUMENTS)
    assert dataset_text("c4", tmp_path) == C4
    assert (dataset_windows("c4"), dataset_windows("wikitext2")) == (256, None)


def test_fewer_documents_than_papers_measure_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path / NAME, DOCUMENTS[:3])
    with pytest.warns(SPPWarning, match="c4 has 3 documents, and papers measure 1100"):
        assert dataset_text("c4", tmp_path) == "Document 0. Document 1. Document 2."


def test_the_hub_is_asked_for_the_papers_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*places: str, **options: Any) -> list[dict[str, str]]:
        asked.append((places, options))
        return [{"text": line} for line in LINES] if places[0] == "Salesforce/wikitext" else DOCUMENTS  # type: ignore[return-value]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert dataset_text("wikitext2") == "\n\n".join(LINES) and dataset_text("c4") == C4
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}),
        (("allenai/c4",), {"split": "validation", "data_files": {"validation": f"en/{NAME}"}}),
    ]

    def unreachable(*places: str, **options: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(
        DataError,
        match=r"wikitext2 cannot be loaded from the hub: ConnectionError: no route; .*data_dir.*-raw-v1/test.jsonl",
    ):
        dataset_text("wikitext2")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=re.escape("pip install 'spp[eval]'")):
        dataset_text("c4")


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset is 'ptb'; known: wikitext2, c4"):
        dataset_text("ptb")
    with pytest.raises(DataError, match="which is no folder"):
        dataset_text("wikitext2", tmp_path / "none")
    with pytest.raises(DataError, match="has no documents of"):
        dataset_text("wikitext2", tmp_path)
    folder = tmp_path / "wikitext" / "wikitext-2-raw-v1"
    write(folder / "train.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="lacks the split 'test' of wikitext2; it has train"):
        dataset_text("wikitext2", tmp_path)
    write(folder / "test.jsonl", [{"text": "a"}, {"page": "b"}])
    with pytest.raises(DataError, match="row 2 has no field 'text'"):
        dataset_text("wikitext2", tmp_path)
    write(folder / "test.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="the split test is empty"):
        dataset_text("wikitext2", tmp_path)
    (tmp_path / NAME).write_bytes(gzip.compress(b'{"text": "a"}\n')[:-9])
    with pytest.raises(DataError, match=f"{NAME} cannot be read"):
        dataset_text("c4", tmp_path)


def test_the_papers_window_of_a_family() -> None:
    assert paper_window(tiny_llama(max_position_embeddings=4096)) == 4096  # Llama 2
    assert paper_window(tiny_llama(max_position_embeddings=8192)) == paper_window(tiny_llama()) == 2048
    assert (parse_window("model"), parse_window("64")) == ("model", 64)
    with pytest.raises(ConfigError, match="window is 'papers'; it must be a number of tokens, or model"):
        parse_window("papers")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"text": Path("t"), "dataset": "c4"}, "text and dataset are both given"),
        ({"tasks": ("rte",), "bos": "always"}, "bos without text= or dataset="),
        ({"tasks": ("rte",), "protocol": "paper"}, "protocol without text= or dataset="),
        ({"text": Path("t"), "data_dir": Path("d")}, "data_dir without tasks="),
        ({"dataset": "ptb"}, "dataset is 'ptb'"),
        ({}, "pass text= or dataset= to measure the perplexity on, or tasks="),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        EvalConfig(model="m", **options)
    assert told in str(error.value)


def test_a_result_says_what_it_was_measured_on() -> None:
    values = perplexity_result(tiny_llama(), adding(), TEXT[:200], window=16, batch_size=16).to_dict()
    assert set(values) == set(KEYS)
    assert (values["text_bytes"], values["dtype"], values["bos"]) == (200, "float32", True)
    other = perplexity_result(tiny_llama(), tiny_tokenizer(), TEXT[:201], window=16, batch_size=16).to_dict()
    differing = {
        name for name in ("text_sha256", "tokenizer_sha256", "model_fingerprint") if values[name] != other[name]
    }
    assert differing == {"text_sha256", "tokenizer_sha256"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer puts <s> before a text."""
    tiny_llama().save_pretrained(tmp_path / "model")
    adding().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_eval_of_a_data_set_has_both_protocols(model: Path, spp: Callable[..., Outcome], tmp_path: Path) -> None:
    write(tmp_path / "data" / "wikitext" / "wikitext-2-raw-v1" / "test.jsonl", [{"text": line} for line in LINES])
    options = ("eval", model, "--dataset", "wikitext2", "--data-dir", tmp_path / "data", "--window", 32)
    values = json.loads(spp(*options, "--json").out)
    text = dataset_text("wikitext2", tmp_path / "data")
    for found, protocol in ((values, "paper"), (values["per_window"], "per-window")):
        expected = perplexity_result(tiny_llama(), adding(), text, window=32, protocol=protocol).to_dict()
        names = set(KEYS) - {"versions", "seconds"} if found is values else set(KEYS[:7])
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert set(KEYS) < set(values) and values["perplexity"] != values["per_window"]["perplexity"]
    shown = spp(*options)
    assert f"{values['perplexity']:.4f}" in shown.out and f"{values['per_window']['perplexity']:.4f}" in shown.out
    told = f"(protocol paper), text {values['text_sha256'][:12]} ({len(text)} bytes), tokenizer "
    assert f"BOS at the start of the text {told}" in shown.out
    one = json.loads(spp(*options, "--json", "--protocol", "per-window").out)
    assert one["perplexity"] == values["per_window"]["perplexity"] and "per_window" not in one
    never = json.loads(spp(*options, "--json", "--bos", "never").out)
    assert not never["bos"] and "per_window" not in never and never["protocol"] == "paper"
