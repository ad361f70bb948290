"""Perplexity: against the plain formula in float64, and its protocol."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from spp.errors import ConfigError, DataError, NonFiniteError, SPPWarning
from spp.evaluation import (
    IGNORED,
    PerplexityResult,
    mean_loss,
    perplexity,
    perplexity_result,
    rows_perplexity,
    token_perplexity,
    tokenize,
)
from tests.helpers.models import tiny_llama, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; then it sleeps. " * 8


@torch.no_grad()
def plain_perplexity(model: torch.nn.Module, ids: list[int], window: int) -> float:
    """The formula, one token at a time, in float64."""
    model = model.double()
    total, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        piece = ids[start : start + window]
        logits = model(torch.tensor([piece])).logits[0].double()
        for position in range(window - 1):
            exps = torch.exp(logits[position] - logits[position].max())
            total -= math.log(float(exps[piece[position + 1]] / exps.sum()))
            count += 1
    model.float()
    return math.exp(total / count)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("window", "batch_size"), [(2, 1), (16, 1), (16, 3), (37, 4), (128, 100)])
def test_equals_the_formula(window: int, batch_size: int) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    expected = plain_perplexity(tiny_llama(), ids, window)
    found = perplexity_result(model, tokenizer, TEXT, window=window, batch_size=batch_size)
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert found.windows == len(ids) // window
    assert found.tokens == found.windows * (window - 1)
    assert found.window == window
    assert found.loss == pytest.approx(math.log(found.perplexity))


def test_the_comparison_notices_another_window() -> None:
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    assert plain_perplexity(tiny_llama(), ids, 16) != pytest.approx(plain_perplexity(tiny_llama(), ids, 37), rel=1e-6)


def test_a_shorter_last_window_is_dropped() -> None:
    model, tokens = tiny_llama(), torch.arange(3, 3 + 50)
    assert token_perplexity(model, tokens, window=20) == token_perplexity(model, tokens[:40], window=20)


def test_max_windows_takes_the_first() -> None:
    model, tokens = tiny_llama(), torch.arange(3, 3 + 90)
    assert token_perplexity(model, tokens, window=20, max_windows=2) == token_perplexity(model, tokens[:40], window=20)


def test_the_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_llama(), torch.arange(3, 3 + 90)
    whole = token_perplexity(model, tokens, window=30)
    monkeypatch.setattr("spp.evaluation.windows._LOSS_ELEMENTS", 7 * 256)
    assert token_perplexity(model, tokens, window=30).loss == pytest.approx(whole.loss, rel=1e-12)


def test_bfloat16_within_twice_the_plain_error() -> None:
    model, tokenizer = tiny_llama().bfloat16(), tiny_tokenizer()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        logits = model(windows).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten(), reduction="mean"
    )
    assert perplexity(model, tokenizer, TEXT, window=32, batch_size=len(windows)) == pytest.approx(
        math.exp(losses), rel=1e-6
    )


def test_modes_are_as_before_even_after_an_error() -> None:
    model, tokens = tiny_llama(), torch.arange(3, 3 + 40)
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    token_perplexity(model, tokens, window=20)
    assert [m.training for m in model.modules()] == before
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(NonFiniteError, match="batch 0"):
        token_perplexity(model, tokens, window=20)
    assert [m.training for m in model.modules()] == before


def test_nothing_trains_and_no_gradient_is_left() -> None:
    model = tiny_llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    token_perplexity(model, torch.arange(3, 3 + 40), window=20)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_no_warning_about_the_tokenizers_length(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenize(tokenizer, TEXT)) == len(TEXT)
    assert not caplog.records


def test_rows_count_only_labelled_tokens() -> None:
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 2, 2, 2]])
    labels = torch.tensor([[IGNORED, IGNORED, 7, 8, 9, 10], [IGNORED, 12, 13, IGNORED, IGNORED, IGNORED]])
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    found = rows_perplexity(model, [{"input_ids": ids, "labels": labels, "attention_mask": mask}])
    losses = []
    with torch.no_grad():
        for row, (length, first) in zip(ids, ((6, 2), (3, 1)), strict=True):
            logprobs = model.double()(row[:length][None]).logits[0].log_softmax(-1)
            losses += [-float(logprobs[i - 1, row[i]]) for i in range(first, length)]
    assert found.tokens == len(losses) == 6
    assert found.windows == 2
    assert found.window is None
    assert found.loss == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_result_is_plain_data() -> None:
    result = PerplexityResult(2.0, math.log(2), 10, 2, 6)
    assert result.to_dict() == {
        "perplexity": 2.0,
        "loss": math.log(2),
        "tokens": 10,
        "windows": 2,
        "window": 6,
        "bos": False,
    }


class TestBadInput:
    def test_text_shorter_than_a_window(self) -> None:
        with pytest.raises(DataError, match="5 tokens, fewer than one window of 16"):
            perplexity(tiny_llama(), tiny_tokenizer(), "hello", window=16)

    def test_empty_text(self) -> None:
        with pytest.raises(DataError, match="0 tokens"):
            perplexity(tiny_llama(), tiny_tokenizer(), "", window=16)

    def test_text_that_is_no_text(self) -> None:
        with pytest.raises(DataError, match="must be a str"):
            perplexity(tiny_llama(), tiny_tokenizer(), ["hello"], window=16)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "options", [{"window": 1}, {"window": 2.5}, {"batch_size": 0}, {"max_windows": 0}, {"window": True}]
    )
    def test_options(self, options: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            perplexity(tiny_llama(), tiny_tokenizer(), TEXT, **options)

    def test_another_models_tokenizer(self) -> None:
        with pytest.raises(DataError, match="300 is beyond the model's 256"):
            token_perplexity(tiny_llama(), torch.tensor([5, 300, 7]), window=3)

    def test_a_window_beyond_the_positions_warns(self) -> None:
        model = tiny_llama(max_position_embeddings=8)
        with pytest.warns(SPPWarning, match="made for 8 positions"):
            token_perplexity(model, torch.arange(3, 40), window=16)

    def test_nothing_to_predict(self) -> None:
        batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[IGNORED, IGNORED]])}
        with pytest.raises(DataError, match="no token to predict"):
            mean_loss(tiny_llama(), [batch])
