"""Text that a model writes itself: exactly by its own probabilities, the same for the same seed, kept, and checked."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import spp
from spp.comparing.data import load
from spp.configs.checkpoints import RunConfig
from spp.configs.comparing import CompareConfig
from spp.errors import ConfigError, DataError, NonFiniteError
from spp.files import CheckpointReader
from spp.pruning import own_text, own_windows, prune
from spp.pruning.disk import prune_checkpoint
from spp.pruning.plan import draw_windows
from spp.pruning.reconstruction import reconstruct_checkpoint
from spp.recipes.stages import make_plan
from spp.training import TuneConfig, tune
from spp.training.data import tokens_sha256
from tests.helpers.models import prune_nm_, tiny_llama, tiny_tokenizer
from tests.training.helpers import pruned

BOS, EOS, USER = 0, 1, 4
VOCABULARY = 7 + 95 + 2
SIZE: dict[str, Any] = {"count": 5, "length": 24, "seed": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(own_text, "cache_directory", lambda: tmp_path / "cache")
    yield tmp_path / "cache" / "text"


def adding() -> Any:
    """A tokenizer that puts <s> before each text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def without_chat(tokenizer: Any) -> Any:
    tokenizer.chat_template = None
    return tokenizer


def oracle(model: nn.Module, read: list[int], kept: int, drawn: Tensor, again: int | None) -> list[int]:
    """One row, token by token, all of it read again each time, in float64."""
    ids = list(read)
    model = model.double()
    for number in drawn[kept:].tolist():
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0, -1, :VOCABULARY].softmax(-1)
        beyond = [total > number for total in itertools.accumulate(probabilities.tolist())]
        token = beyond.index(True)
        ids.append(again if again is not None and ids[-1] == EOS else token)
    return ids[len(read) - kept :]


@pytest.mark.parametrize(
    ("tokenizer", "openings"),
    [
        (adding(), [([BOS], 1, BOS), ([BOS, USER], 2, None)]),
        (without_chat(adding()), [([BOS], 1, BOS)]),
        (tiny_tokenizer(), [([BOS], 0, None), ([USER], 1, None)]),  # a text begins without BOS there
    ],
    ids=["bos and chat", "bos", "chat"],
)
def test_every_token_is_the_first_beyond_its_number(tokenizer: Any, openings: list[Any]) -> None:
    model = tiny_llama()
    found = own_windows(model, tokenizer, **SIZE)
    drawn = torch.rand(5, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for number, row in enumerate(found):
        read, kept, again = openings[number % len(openings)]
        assert row.tolist() == oracle(tiny_llama(), read, kept, drawn[number], again), number
    assert found.shape == (5, 24) and found.dtype == torch.int64 and int(found.max()) < VOCABULARY


def test_behind_an_end_of_text_comes_bos() -> None:
    tokenizer, model = without_chat(adding()), tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 12  # ends are frequent
    found = own_windows(model, tokenizer, count=8, length=64, seed=0)
    follows = found[:, 1:][found[:, :-1] == EOS]
    assert len(follows) > 8 and bool((follows == BOS).all())
    assert bool((found[:, 0] == BOS).all())
    never = own_windows(model, tokenizer, count=8, length=64, seed=0, bos="never")
    assert not bool((never[:, 0] == BOS).all())


def test_seeds_and_batches(caplog: pytest.LogCaptureFixture, cache: Path) -> None:
    model, tokenizer = tiny_llama(), adding()
    first = own_windows(model, tokenizer, **SIZE)
    assert len(list(cache.iterdir())) == 1
    for file in cache.iterdir():
        file.unlink()
    for batch in (1, 2):
        assert torch.equal(own_windows(model, tokenizer, **SIZE, batch_size=batch), first)
        next(cache.iterdir()).unlink()
    assert not torch.equal(own_windows(model, tokenizer, **{**SIZE, "seed": 4}), first)
    state = torch.get_rng_state()
    own_windows(model, tokenizer, **{**SIZE, "seed": 5})
    assert torch.equal(torch.get_rng_state(), state) and not model.training


def test_a_batch_holds_no_more_than_the_weights() -> None:
    model = tiny_llama()
    assert own_text._fitting_batch(model, 512) == 64
    row = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert own_text._fitting_batch(model, (1 << 30) // row // 5) == 5
    assert own_text._fitting_batch(model, 1 << 30) == 1
    assert own_text._fitting_batch(nn.Linear(2, 2), 8) == 64  # which says nothing of its layers


def test_what_was_written_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = tiny_llama(), adding()
    first = own_windows(model, tokenizer, **SIZE)
    (file,) = cache.iterdir()
    written = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "_sample", None)
        assert torch.equal(own_windows(model, tokenizer, **SIZE), first)
        others: list[tuple[nn.Module, Any, dict[str, Any]]] = [
            (model, tokenizer, {**SIZE, "seed": 4}),
            (model, tokenizer, {**SIZE, "count": 6}),
            (model, tokenizer, {**SIZE, "bos": "never"}),
            (model, without_chat(adding()), SIZE),
            (tiny_llama(rms_norm_eps=1e-3, hidden_size=32), tokenizer, SIZE),
        ]
        for of, by, options in others:
            with pytest.raises(TypeError):  # nothing kept is this text
                own_windows(of, by, **options)
    for lie in (written[:-1], written[:-20] + bytes(20), b""):
        file.write_bytes(lie)
        with caplog.at_level(logging.WARNING, "spp"):
            assert torch.equal(own_windows(model, tokenizer, **SIZE), first)
        assert "is damaged, and the text is written anew" in caplog.text and file.read_bytes() == written
        caplog.clear()
    monkeypatch.setattr(own_text, "cache_directory", lambda: Path("/proc/nowhere"))
    with caplog.at_level(logging.INFO, "spp"):
        assert torch.equal(own_windows(model, tokenizer, **SIZE), first)
    assert "the text is not kept for the next time" in caplog.text


class Fixed(nn.Module):
    """A model that says the same of every text, without a cache of keys."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, past_key_values: None, use_cache: bool) -> Any:
        assert past_key_values is None and use_cache
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_the_whole_distribution() -> None:
    logits = torch.linspace(-2, 2, VOCABULARY)
    found = own_windows(Fixed(logits), without_chat(adding()), count=50, length=129, seed=1, batch_size=50)[:, 1:]
    frequencies = torch.bincount(found[found != BOS], minlength=VOCABULARY)[2:] / found.numel()
    expected = logits.softmax(-1)[2:]
    assert torch.allclose(frequencies, expected, atol=4 * float((expected.max() / found.numel()) ** 0.5))
    assert int((frequencies > 0).sum()) > 100  # no token is cut off


def test_models_that_write_no_text() -> None:
    one = torch.full((VOCABULARY,), -1e4)
    one[50] = 1e4
    with pytest.raises(DataError, match=r"the model writes one token alone, 'K', .*: is it the dense, trained model"):
        own_windows(Fixed(one), adding(), **SIZE)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="logits are not finite at token 1 of what it writes"):
            own_windows(Fixed(torch.full((VOCABULARY,), bad)), adding(), **SIZE)
    with pytest.raises(DataError, match=r"needs its tokenizer.*tokenizer="):
        own_windows(tiny_llama(), None, **SIZE)
    silent = without_chat(tiny_tokenizer())
    silent.bos_token = silent.eos_token = None
    with pytest.raises(DataError, match=r"nothing says how a text of .* begins"):
        own_windows(tiny_llama(), silent, **SIZE)
    with pytest.raises(DataError, match="rows of 1 token hold nothing"):
        own_windows(tiny_llama(), adding(), count=1, length=1, seed=0)


# ---- In place of data.


def test_pruned_in_memory_and_from_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"tokenizer": adding(), "nsamples": 4, "seqlen": 16, "seed": 2}
    with caplog.at_level(logging.INFO, "spp"):
        on_disk = prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", "wanda", "2:4", "self", **options)
    assert "is loaded whole to write its own text" in caplog.text and on_disk.bos
    model = tiny_llama()
    windows = own_windows(model, adding(), count=4, length=16, seed=2)  # before it is pruned
    report = prune(model, "wanda", "2:4", "self", **options)
    assert report.calibration == on_disk.calibration and report.calibration.startswith("self, sha256 ")
    by_ids = tiny_llama()
    prune(by_ids, "wanda", "2:4", windows)
    disk = CheckpointReader(tmp_path / "pruned")
    for key, value in model.state_dict().items():
        assert torch.equal(value, by_ids.state_dict()[key]) and torch.equal(value, disk.tensor(key)), key
    with pytest.raises(DataError, match=r"needs its tokenizer"):
        prune(tiny_llama(), "wanda", "2:4", "self", nsamples=4, seqlen=16)
    with pytest.raises(DataError, match="is written by a model"):
        spp.pruning.calibration_windows("self", adding(), nsamples=1, seqlen=8, seed=0)
    small = GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY))
    with pytest.raises(DataError, match="too long: the model has 8 positions"):
        prune(small, "wanda", "2:4", "self", tokenizer=adding(), nsamples=2, seqlen=9)


def test_reconstruction_takes_the_dense_models_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    prune_nm_(tiny_llama()).save_pretrained(tmp_path / "pruned")
    expected = own_windows(tiny_llama(), adding(), count=4, length=16, seed=0)
    found = []

    def look(*arguments: Any, **options: Any) -> Tensor:
        found.append(draw_windows(*arguments, **options))
        return found[-1]

    monkeypatch.setattr("spp.pruning.reconstruction.draw_windows", look)
    options: dict[str, Any] = {"tokenizer": adding(), "nsamples": 4, "seqlen": 16}
    quick = spp.Reconstruction(epochs=1)
    spp.reconstruct(prune_nm_(tiny_llama()), tiny_llama(), "self", options=quick, **options)
    reconstruct_checkpoint(
        *(tmp_path / "pruned", tmp_path / "out", tmp_path / "dense", "self"), options=quick, **options
    )
    assert len(found) == 2 and all(torch.equal(one, expected) for one in found)


def test_tuned_on_it(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_llama().save_pretrained(dense)
    tokenizer = adding()
    tokenizer.save_pretrained(dense)
    model = tiny_llama()
    model.config._name_or_path = str(dense)
    spp.prune(model, "magnitude", "2:4")
    base = spp.save_model(model, tmp_path / "pruned", tokenizer=tokenizer)
    common: dict[str, Any] = {"block_length": 32, "eval_window": 16, "steps": 2, "batch_size": 2, "device": "cpu"}
    result = tune(TuneConfig(model=str(base), data="self:1000", output_dir=str(tmp_path / "run"), **common))
    written = own_windows(
        tiny_llama(), tokenizer, count=32, length=32, seed=0
    )  # of the model that the certificate names
    assert (result.data.rows, result.data.held_out, result.data.bos) == (30, 2 * 31, True)
    assert result.data.sha256 == tokens_sha256(written[:30].flatten())
    assert result.perplexity_before is not None and result.perplexity_after is not None
    with pytest.raises(DataError, match="2 blocks of 32 tokens are too few to hold out 2"):
        few = TuneConfig(
            model=str(base), data="self:64", output_dir=str(tmp_path / "few"), **{**common, "eval_window": 62}
        )
        tune(few)
    with pytest.raises(ConfigError, match=r"data is self, and nothing names the dense model .* pass dense_model="):
        tune(TuneConfig(data="self", output_dir=str(tmp_path / "no"), **common), model=pruned(), tokenizer=tokenizer)
    assert not (tmp_path / "few").exists() and not (tmp_path / "no").exists()


def test_recipes_and_comparisons(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text("prune:\n  pattern: 2:4\ntune:\n  steps: 1\n")
    plan = make_plan(RunConfig(recipe=str(recipe), model="dense", out=tmp_path / "out", data=("self:500",)))
    assert (plan.steps[0].config.calibration, plan.steps[1].config.own_tokens) == ("self", 500)
    with pytest.raises(DataError, match="data is self: a comparison reads its data"):
        load(CompareConfig(model="x", output_dir="y", data="self"), adding())


def test_the_names_of_such_data() -> None:
    assert TuneConfig(data="self", output_dir="x").own_tokens == 100_000
    assert TuneConfig(data="self:123", output_dir="x", dense_model="dense").own_tokens == 123
    assert TuneConfig(data="./self", output_dir="x").own_tokens is None
    for bad in ("self:", "self:-1", "self:0", "self:many", "self:1e5"):
        with pytest.raises(ConfigError, match="stands how many tokens the dense model writes"):
            TuneConfig(data=bad, output_dir="x")
    with pytest.raises(ConfigError, match="what a model writes stands alone"):
        TuneConfig(data=("self:5", "train.txt"), output_dir="x")
    with pytest.raises(ConfigError, match="dense_model is 'dense', but there are no mask updates"):
        TuneConfig(data="train.txt", output_dir="x", dense_model="dense")
    with pytest.raises(DataError, match=r"calibration is 'self:9', .*or self: text that the dense model writes itself"):
        prune(tiny_llama(), "wanda", "2:4", "self:9")
