"""The whole road on a real model, against the separate-branch formula in plain torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from spp.adapters import load_adapter, save_adapter
from spp.checkpoint import merge_checkpoint, save_model, verify
from spp.evaluation import perplexity
from spp.inject import adapter_parameters, unwrap, wrap
from tests.models import projections, prune_nm_

pytestmark = pytest.mark.slow
TEXT = (
    "The moon is the only natural satellite of the Earth. It orbits our planet at an average distance of about "
    "384,400 kilometres, and always shows us the same side, because it turns once around its axis in the time that it "
    "takes to go once around the Earth. Its gravity causes the tides of the oceans. "
) * 4


class Branches(nn.Module):
    """SPP as the paper writes it: Y = X Wᵀ + s · X (W ⊙ A ⊙ β)ᵀ with A the rows of α, each repeated m / r times."""

    def __init__(self, linear: nn.Linear, alpha: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.weight, self.scaling = linear.weight, scaling
        self.alpha = nn.Parameter(alpha.detach().clone())
        self.beta = nn.Parameter(torch.zeros(linear.out_features, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m, r = self.weight.shape[0], self.alpha.shape[0]
        rows = torch.tensor([max(k for k in range(r) if k * m // r <= i) for i in range(m)])
        branch = self.weight * self.alpha[rows] * self.beta
        return functional.linear(x, self.weight) + self.scaling * functional.linear(x, branch)


@pytest.fixture(scope="module")
def pruned(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = prune_nm_(AutoModelForCausalLM.from_pretrained(smollm2))
    return save_model(
        model, tmp_path_factory.mktemp("smollm2") / "pruned", tokenizer=AutoTokenizer.from_pretrained(smollm2)
    )


def losses(model: nn.Module, parameters: list[nn.Parameter], batches: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.001)
    found = []
    for tokens in batches:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_every_loss_is_that_of_the_separate_branches(pruned: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(pruned)(TEXT, return_tensors="pt")["input_ids"][0]
    batches = tokens[: 2 * 64].view(1, 2, 64).expand(4, 2, 64)
    model = wrap(AutoModelForCausalLM.from_pretrained(pruned), seed=0).train()
    plain = AutoModelForCausalLM.from_pretrained(pruned).requires_grad_(False).train()
    alphas = {name: module.spp_alpha for name, module in model.named_modules() if hasattr(module, "spp_alpha")}
    assert alphas.keys() == projections(plain).keys() and len(alphas) == 210
    for name, linear in projections(plain).items():
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, Branches(linear, alphas[name], 2.0))
    expected = losses(plain, [p for p in plain.parameters() if p.requires_grad], batches)
    found = losses(model, adapter_parameters(model), batches)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, rel=1e-3)


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
