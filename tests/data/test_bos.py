"""BOS: once at the start of every window of text, of a tokenizer that begins a text with it; never twice, never lost.

A report on Gemma-2b elsewhere: a perplexity of 650 without BOS in the windows, and of 21 with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from spp.comparing.data import load
from spp.configs.comparing import CompareConfig
from spp.configs.tuning import TuneConfig
from spp.data.tokens import cut_windows, find_bos, tokenizer_sha256
from spp.errors import ConfigError
from spp.evaluation import mean_loss, perplexity, perplexity_result, token_perplexity, tokenize
from spp.pruning import calibration_windows, prune
from spp.training.data import load_data
from tests.helpers.models import tiny_llama, tiny_tokenizer

BOS, EOS = 0, 1
LINES = [f"line {i}: the number {i * i} is a square, and {i * 7} is not always one." for i in range(40)]
TEXT = "\n".join(LINES)
SHORT = TEXT[:400]
OPTIONS: dict[str, Any] = {"window": 16, "batch_size": 64}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
CHAT = [
    {"role": "user", "content": "How many are three and four?"},
    {"role": "assistant", "content": "Seven, I think."},
]


def adding() -> Any:
    """A tokenizer that puts <s> before each text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def plain_ids(text: str = TEXT) -> torch.Tensor:
    return torch.tensor(tiny_tokenizer()(text)["input_ids"])


def assert_begin(windows: torch.Tensor) -> None:
    """Every window begins with BOS and has it nowhere else."""
    assert len(windows) and bool((windows[:, 0] == BOS).all()) and not bool((windows[:, 1:] == BOS).any())


def test_the_check_of_windows_notices_none_and_two() -> None:
    for wrong in ([[5, 6]], [[BOS, BOS]], [[BOS, 5], [5, 6]]):
        with pytest.raises(AssertionError):
            assert_begin(torch.tensor(wrong))


def test_windows_hold_one_token_less_of_the_text() -> None:
    ids = torch.arange(5, 16)
    assert cut_windows(ids, 4, None).tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert cut_windows(ids, 4, BOS).tolist() == [[0, 5, 6, 7], [0, 8, 9, 10], [0, 11, 12, 13]]
    assert cut_windows(torch.tensor([0, 5, 6, 7, 8, 9, 10, 0, 11, 12, 13]), 4, BOS).tolist() == [
        *([0, 5, 6, 7], [0, 8, 9, 10], [0, 11, 12, 13])
    ]
    again = cut_windows(ids, 4, BOS)
    assert torch.equal(cut_windows(again.flatten(), 4, BOS), again)  # what was cut is cut the same again
    assert cut_windows(ids[:2], 4, BOS).shape == (0, 4)
    with pytest.raises(ConfigError, match="holds nothing but BOS"):
        cut_windows(ids, 1, BOS)


@pytest.mark.parametrize(
    ("bos", "with_adding", "with_plain"), [("auto", BOS, None), ("always", BOS, BOS), ("never", None, None)]
)
def test_auto_is_what_the_tokenizer_does(bos: str, with_adding: int | None, with_plain: int | None) -> None:
    assert (find_bos(adding(), bos), find_bos(tiny_tokenizer(), bos)) == (with_adding, with_plain)


def test_a_tokenizer_without_bos_has_none_to_put_there() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert find_bos(tokenizer) is None
    for call in (
        lambda: perplexity(tiny_llama(), tokenizer, TEXT, window=16, bos="always"),
        lambda: calibration_windows([TEXT], tokenizer, nsamples=2, seqlen=16, seed=0, bos="always"),
    ):
        with pytest.raises(ConfigError, match=r"bos='always': [A-Za-z]+ has no BOS token"):
            call()
    with pytest.raises(ConfigError, match="bos is 'sometimes'"):
        TuneConfig(data="t.txt", output_dir="run", bos="sometimes")


@pytest.mark.parametrize("text", [SHORT, "<s>" + SHORT])
def test_every_window_that_is_measured_begins_with_bos(text: str) -> None:
    model, tokenizer, ids = tiny_llama(), adding(), plain_ids(SHORT)
    rows = torch.stack([torch.cat([torch.tensor([BOS]), ids[at : at + 15]]) for at in range(0, len(ids) - 14, 15)])
    expected = mean_loss(model, [{"input_ids": rows, "labels": rows}])
    found = perplexity_result(model, tokenizer, text, **OPTIONS)
    assert (found.loss, found.tokens) == (pytest.approx(expected[0], rel=1e-6), expected[1])
    assert (found.bos, found.protocol, found.windows) == (True, "per-window", len(rows))
    assert perplexity(model, tiny_tokenizer(), text, **OPTIONS, bos="always") == pytest.approx(found.perplexity)
    never = perplexity_result(model, tokenizer, SHORT, **OPTIONS, bos="never")
    assert never == perplexity_result(model, tiny_tokenizer(), SHORT, **OPTIONS) and not never.bos
    assert never.loss != pytest.approx(found.loss, rel=1e-3)


def test_the_papers_protocol_has_bos_once_and_is_what_tokenising_once_gives() -> None:
    model, tokenizer = tiny_llama(), adding()
    ids = tokenize(tokenizer, SHORT)
    assert ids[0] == BOS
    found = perplexity_result(model, tokenizer, SHORT, **OPTIONS, protocol="paper")
    assert found.loss == token_perplexity(model, ids, **OPTIONS).loss and (found.bos, found.protocol) == (True, "paper")
    plain = [perplexity_result(model, tiny_tokenizer(), SHORT, **OPTIONS, protocol=p) for p in ("paper", "per-window")]
    assert plain[0].loss == plain[1].loss and not plain[0].bos
    with pytest.raises(ConfigError, match="protocol is 'papers'; known: per-window, paper"):
        perplexity(model, tokenizer, SHORT, **OPTIONS, protocol="papers")


def sources(folder: Path) -> list[Any]:
    """Calibration data of every kind that becomes windows."""
    (folder / "t.txt").write_text(TEXT)
    (folder / "begins.txt").write_text("<s>" + TEXT)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    (folder / "chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 20)
    paths = [str(folder / name) for name in ("t.txt", "begins.txt", "rows.jsonl", "chats.jsonl")]
    return [*paths, [TEXT], LINES, ["<s>" + line for line in LINES]]


def test_every_calibration_window_begins_with_bos(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nsamples": 8, "seqlen": 24, "seed": 0}
    for source in sources(tmp_path):
        windows = calibration_windows(source, adding(), **options)
        assert windows.shape == (8, 24)
        assert_begin(windows)
        if "<s>" not in (Path(source).read_text() if isinstance(source, str) else source[0]):
            assert not (calibration_windows(source, adding(), **options, bos="never") == BOS).any()
    report = prune(tiny_llama(), "wanda", "2:4", [TEXT], tokenizer=adding(), nsamples=4, seqlen=16)
    assert report.bos and report.to_dict()["bos"]
    given = torch.randint(5, 50, (4, 16))  # token ids are taken as they are
    assert not prune(tiny_llama(), "wanda", "2:4", given, tokenizer=adding()).bos
    with pytest.raises(ConfigError, match="bos is 'yes'"):
        prune(tiny_llama(), "wanda", "2:4", [TEXT], tokenizer=adding(), bos="yes")


def test_packed_rows_and_what_is_held_out_begin_with_bos(tmp_path: Path) -> None:
    for source in sources(tmp_path)[:3]:
        data = load_data([source], adding(), block_length=32, held_out=0.2, least_held_out=32)
        assert_begin(data.train.blocks)  # type: ignore[union-attr]
        assert data.bos_id == BOS and data.summary.bos and data.held_out_tokens is not None
        assert not (data.held_out_tokens == BOS).any()
        never = load_data([source], adding(), block_length=32, bos="never")
        assert not (never.train.blocks == BOS).any() and not never.summary.bos  # type: ignore[union-attr]
    rows = load_data([str(tmp_path / "chats.jsonl")], adding(), block_length=99)  # the template writes the only one
    assert all(row["input_ids"][0] == BOS and (row["input_ids"] == BOS).sum() == 1 for row in rows.train)  # type: ignore[attr-defined]


@pytest.mark.parametrize("eval_text", [True, False])
def test_compare_measures_and_trains_with_bos(eval_text: bool, tmp_path: Path) -> None:
    (path := tmp_path / "t.txt").write_text(TEXT)
    options: dict[str, Any] = {"window": 32, "block_length": 24, "test_windows": 3, "validation_windows": 2}
    options |= {"eval_text": path} if eval_text else {}
    config = CompareConfig(model="m", output_dir="o", data=path, **options)
    data = load(config, adding())
    assert data.bos and isinstance(data.hashes()["tokenizer_sha256"], str)
    for part, count in ((data.test, 3), (data.validation, 2)):
        assert part.tokens is not None
        assert_begin(part.tokens.view(count, 32))
        found = part.measure(tiny_llama())
        assert (found.bos, found.windows, found.tokens) == (True, count, count * 31)
    assert_begin(data.train.blocks)  # type: ignore[union-attr]
    plain = load(config, tiny_tokenizer())
    ids = plain_ids()
    held = ids[: 5 * 32] if eval_text else ids[: len(ids) // 24 * 24][-7 * 24 :][: 5 * 32]
    assert plain.test.tokens is not None and plain.validation.tokens is not None
    assert torch.equal(torch.cat([plain.test.tokens, plain.validation.tokens]), held) and not plain.bos


def test_without_automatic_bos_nothing_changes(tmp_path: Path) -> None:
    """A tokenizer like GPT-2's or SmolLM2's: rows, windows and held-out text are the plain cut of the tokens."""
    (tmp_path / "t.txt").write_text(TEXT)
    ids = plain_ids()
    data = load_data([str(tmp_path / "t.txt")], tiny_tokenizer(), block_length=32)
    assert torch.equal(data.train.blocks, ids[: len(ids) // 32 * 32].view(-1, 32))  # type: ignore[union-attr]
    windows = calibration_windows([TEXT], tiny_tokenizer(), nsamples=2, seqlen=len(ids) // 2, seed=0)
    assert torch.equal(windows, ids[: len(ids) // 2 * 2].view(2, -1)) and data.bos_id is None


def test_the_hash_of_a_tokenizer_is_of_what_makes_tokens(tmp_path: Path) -> None:
    tokenizer, before = tiny_tokenizer(), tokenizer_sha256(tiny_tokenizer())
    tokenizer.chat_template = None
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert tokenizer_sha256(tokenizer) == before == tokenizer_sha256(loaded)
    assert len({before, tokenizer_sha256(adding()), None}) == 3
    tokenizer.add_tokens(["new"])
    assert tokenizer_sha256(tokenizer) != before and tokenizer_sha256(len) is None
