"""A second real family, Gemma 3 270M: prune, tune, merge, verify, reload. Skipped where it cannot be downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp
from spp.evaluation import perplexity
from spp.files import read_json
from spp.masks.patterns import nonzero_mask
from tests.conftest import model_of
from tests.helpers.tolerances import LOGITS, error
from tests.test_smollm2 import TEXT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma3() -> Path:
    return model_of("gemma3")


def test_the_road(gemma3: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    model = AutoModelForCausalLM.from_pretrained(gemma3)
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :64]

    def text_perplexity() -> float:
        return perplexity(model, tokenizer, TEXT, window=64, max_windows=1)

    dense = text_perplexity()
    report = spp.prune(model, "wanda", "2:4", tokens)
    assert len(report.layers) == 7 * 18 and not [path for path in report.layers if "embed" in path or "head" in path]
    masks = {name: nonzero_mask(tensor) for name, tensor in model.state_dict().items()}
    before = text_perplexity()
    assert dense < before

    spp.wrap(model, seed=0).train()
    optimizer = torch.optim.AdamW(spp.adapter_parameters(model), lr=1e-2)
    for _ in range(4):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tuned = text_perplexity()
    assert tuned < 0.7 * before
    with torch.no_grad():
        unmerged = model(tokens).logits
    spp.merge(model)
    with torch.no_grad():
        merged = model(tokens).logits
    assert error(merged, unmerged) <= LOGITS[torch.float32]
    spp.save_model(model, tmp_path / "merged")
    assert spp.verify(tmp_path / "merged").pattern == "2:4"  # and its certificate names the pruned model's zeros
    assert read_json(tmp_path / "merged" / "sparsity.json", "certificate")["base"] is not None
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
        assert torch.equal(nonzero_mask(tensor), masks[name]), name
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, merged)
