"""The whole road on a real model: prune, tune, merge on disk, verify, reload."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spp.certifying.save import save_model
from spp.certifying.verify import verify
from spp.evaluation import perplexity
from spp.merging.disk import merge_checkpoint
from spp.wrapping.adapters import load_adapter, save_adapter
from spp.wrapping.wrap import adapter_parameters, unwrap, wrap
from tests.helpers.models import projections, prune_nm_

pytestmark = pytest.mark.slow
TEXT = (
    "The moon is the only natural satellite of the Earth. It orbits our planet at an average distance of about "
    "384,400 kilometres, and always shows us the same side, because it turns once around its axis in the time that it "
    "takes to go once around the Earth. Its gravity causes the tides of the oceans. "
) * 4


@pytest.fixture(scope="module")
def pruned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = prune_nm_(AutoModelForCausalLM.from_pretrained(smollm2))
    return save_model(
        model, tmp_path_factory.mktemp("smollm2") / "pruned", tokenizer=AutoTokenizer.from_pretrained(smollm2)
    )


def test_the_road(smollm2: Path, pruned: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    dense = AutoModelForCausalLM.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    original = copy.deepcopy(model.state_dict())
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :128]
    before = perplexity(model, tokenizer, TEXT, window=128)
    assert perplexity(dense, tokenizer, TEXT, window=128) < before

    wrap(model, seed=0).train()
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=2e-2)
    for _ in range(4):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tuned = perplexity(model, tokenizer, TEXT, window=128)
    assert tuned < 0.7 * before
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        unmerged = model(tokens).logits

    report = merge_checkpoint(pruned, tmp_path / "adapter", tmp_path / "merged")
    assert report.survived == pytest.approx(1.0, abs=1e-3)
    assert verify(pruned, tmp_path / "merged").pattern == "2:4"
    verify(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (merged(tokens).logits - unmerged).abs().max() < 1e-3 * unmerged.abs().max()
    assert math.isclose(perplexity(merged, tokenizer, TEXT, window=128), tuned, rel_tol=1e-4)
    for name, module in projections(merged).items():
        assert torch.equal(module.weight != 0, original[f"{name}.weight"] != 0), name

    unwrap(model)
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, unmerged)
