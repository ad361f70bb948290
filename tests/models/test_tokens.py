"""The check of token ids and lengths, by itself and in every verb, before any of them changes or writes anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from spp.comparing.data import load
from spp.configs.comparing import CompareConfig
from spp.errors import DataError, SPPWarning
from spp.evaluation import mean_loss, perplexity, token_perplexity
from spp.models.tokens import check_ids, check_length, embedding_rows, position_limit
from spp.pruning import prune
from spp.training import SPPTrainer, TuneConfig, tune
from tests.helpers.models import prune_nm_, tiny_llama, tiny_tokenizer
from tests.test_architectures import DENSE
from tests.training.helpers import ROWS, TEXT, arguments, blocks, wrapped

# As people meet it: a pad token is added to the tokenizer, and the embedding is not resized (transformers 16136,
# trl 1257: "index out of range in self", on a GPU a device-side assert).


def added() -> Any:
    """The tokenizer of `tiny_llama`, with a pad token beyond its 256 embeddings."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new {i}>" for i in range(256 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    assert tokenizer.pad_token_id == 256
    return tokenizer


@pytest.mark.parametrize(("kind", "limit"), [("gpt2", 64), ("opt", 64), ("gptj", 64), ("mpt", 64), ("gpt_neo", 64)])
def test_the_limit_is_where_the_model_fails(kind: str, limit: int) -> None:
    small = {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
    options = DENSE.get(kind, {**small, "vocab_size": 96, "max_position_embeddings": 64})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    assert position_limit(model) == limit
    model(torch.ones(1, limit, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)) as failed:
        model(torch.ones(1, limit + 1, dtype=torch.int64))
    assert not isinstance(failed.value, DataError)
    check_length(model, limit, "windows", "seqlen")
    with pytest.raises(DataError, match=rf"65 tokens are too long: the model has 64 .*; pass seqlen={limit} or less"):
        check_length(model, limit + 1, "windows", "seqlen")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "bloom", "falcon"])
def test_positions_that_are_computed_have_no_limit(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **DENSE[kind], max_position_embeddings=16))
    assert position_limit(model) is None
    model(torch.ones(1, 40, dtype=torch.int64))


def test_rows_of_embeddings_in_every_form() -> None:
    model = tiny_llama()
    assert embedding_rows(model) == 256
    assert embedding_rows(tiny_llama().to("meta")) == 256
    model.resize_token_embeddings(260)
    assert embedding_rows(model) == 260
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(torch.empty(0))  # as a sharded one is between uses
    assert embedding_rows(model) == 260
    model.set_input_embeddings(nn.Identity())
    assert embedding_rows(model) == 260  # the config's
    assert embedding_rows(nn.Linear(2, 2)) is None


def test_the_message_names_id_token_place_and_remedy() -> None:
    rows = torch.tensor([[3, 4], [5, 256]])
    told = (
        r"the data, row 2: token id 256 \('<PAD>'\) is beyond the model's 256 embeddings, 0 to 255; .*own tokenizer.*"
    )
    with pytest.raises(DataError, match=told + r"resize_token_embeddings\(len\(tokenizer\)\)"):
        check_ids(tiny_llama(), rows, "the data", added())
    with pytest.raises(DataError, match=r"row 2: token id -100 is negative.* label"):
        check_ids(tiny_llama(), [torch.tensor([3]), torch.tensor([-100])], "the data", added())
    check_ids(tiny_llama(), torch.empty(0, 4, dtype=torch.int64), "nothing")
    check_ids(tiny_llama(), torch.tensor([0, 255]), "the ends")


def _files(folder: Path) -> dict[str, str]:
    import json

    (folder / "text.txt").write_text(TEXT)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "added.txt").write_text(TEXT + "<PAD>")
    return {name: str(folder / name) for name in ("text.txt", "rows.json", "added.txt")}


def test_every_verb_refuses_ids_without_an_embedding(tmp_path: Path) -> None:
    files, tokenizer, told = _files(tmp_path), added(), r"token id 256 \('<PAD>'\)"
    model, dense = prune_nm_(tiny_llama()), tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=told):
        prune(model, "wanda", "2:4", [f"<PAD>{TEXT}"], tokenizer=tokenizer, nsamples=70, seqlen=32)
    with pytest.raises(DataError, match=f"the text: {told}"):
        perplexity(model, tokenizer, TEXT + "<PAD>", window=16)
    options: dict[str, Any] = {"output_dir": tmp_path / "run", "block_length": 32, "eval_window": 16, "steps": 1}
    with pytest.raises(DataError, match=f"the padding of the training data: {told}"):  # masked, and read all the same
        tune(TuneConfig(data=files["rows.json"], **options), model=model, tokenizer=tokenizer)
    with pytest.raises(DataError, match=f"the training data.*{told}|the text of the perplexity: {told}"):
        tune(TuneConfig(data=files["added.txt"], **options), model=model, tokenizer=tokenizer)
    with pytest.raises(DataError, match=f"the text of the perplexity: {told}"):
        config = TuneConfig(data=files["text.txt"], eval_text=files["added.txt"], **options)
        tune(config, model=model, tokenizer=tokenizer)
    config = CompareConfig(
        model="pruned", output_dir="out", data=files["rows.json"], block_length=32, test_windows=2, validation_windows=2
    )
    with pytest.raises(DataError, match=f"padding of the training data: {told}"):
        load(config, tokenizer).check(dense, config, tokenizer)
    with pytest.raises(DataError, match=r"batch 0, row 1: token id 256"):
        mean_loss(model, [{"input_ids": torch.full((1, 4), 256), "labels": torch.full((1, 4), 3)}])
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows that nobody can look at before."""

    def __iter__(self) -> Any:
        for last in (3, 4, 5, 6, 256):
            ids = torch.tensor([5, last])
            yield {"input_ids": ids, "labels": ids}


def test_the_trainer_looks_at_rows_before_the_first_step_and_at_streams_batch_by_batch(tmp_path: Path) -> None:
    bad = [{"input_ids": [3, 4], "labels": [3, 4]}, {"input_ids": [3, 300], "labels": [-100, -100]}]
    steps: list[int] = []
    for data in ({"train_dataset": bad}, {"train_dataset": blocks(), "eval_dataset": bad}):
        made = SPPTrainer(wrapped(), arguments(tmp_path), **data)
        made.compute_loss = lambda *a, **k: steps.append(1)  # type: ignore[method-assign]
        with pytest.raises(DataError, match="the data, row 2: token id 300"):
            made.train()
    assert steps == []
    streamed = SPPTrainer(wrapped(), arguments(tmp_path, max_steps=5), train_dataset=_Stream())
    with pytest.raises(DataError, match="a batch of the data, row 1: token id 256"):
        streamed.train()


def test_every_verb_refuses_more_positions_than_a_model_has_learned(tmp_path: Path) -> None:
    files, tokenizer = _files(tmp_path), tiny_tokenizer()
    small = {**DENSE["gpt2"], "vocab_size": 256}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small))
    with pytest.raises(DataError, match=r"65 tokens are too long: the model has 64.*seqlen=64"):
        prune(model, "wanda", "2:4", [TEXT], tokenizer=tokenizer, seqlen=65)
    assert prune(model, "wanda", "2:4", [TEXT], tokenizer=tokenizer, nsamples=2).seqlen == 64  # the usual number
    with pytest.raises(DataError, match=r"65 tokens are too long.*window=64"):
        token_perplexity(model, torch.ones(200, dtype=torch.int64), window=65)
    options: dict[str, Any] = {"data": files["text.txt"], "output_dir": tmp_path / "run", "steps": 1}
    with pytest.raises(DataError, match=r"65 tokens are too long.*block_length=64"):
        tune(TuneConfig(block_length=65, eval_window=16, **options), model=model, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"65 tokens are too long.*eval_window=64"):
        tune(TuneConfig(block_length=64, eval_window=65, **options), model=model, tokenizer=tokenizer)
    with pytest.raises(DataError, match="rows of 80 tokens; the model has 64 positions"):
        import spp

        SPPTrainer(spp.wrap(model, r=4), arguments(tmp_path), train_dataset=blocks(4, 80)).train()
    assert not (tmp_path / "run").exists()


def test_a_longer_window_than_asked_for_is_only_warned_of_where_positions_are_computed() -> None:
    model = tiny_llama(max_position_embeddings=24)
    with pytest.warns(SPPWarning, match="seqlen is 32, but the model was made for 24 positions"):
        report = prune(model, "wanda", "2:4", [TEXT], tokenizer=tiny_tokenizer(), nsamples=2, seqlen=32)
    assert report.seqlen == 32


def test_a_tokenizer_that_cannot_say_does_not_hide_the_id() -> None:
    with pytest.raises(DataError, match=r"the data: token id 999 is beyond"):
        check_ids(tiny_llama(), torch.tensor([999]), "the data", SimpleNamespace(convert_ids_to_tokens=None))
