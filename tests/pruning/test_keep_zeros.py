"""Pruning what is sparse already, whatever the method, the architecture and the way: no zero comes back.

SparseGPT does not keep the zeros of a sparse model, 70 % sparse to 2:4 for one: neuralmagic/sparseml pull request 2222.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import spp
from spp.configs.pruning import METHODS, OWL
from spp.masks.patterns import is_nm, nonzero_mask
from spp.models.projection import find_projections
from spp.pruning import prune
from spp.pruning.disk import prune_checkpoint
from tests.helpers.models import moe_model, tiny_llama
from tests.pruning.test_model import ARCHITECTURES

IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))


def _half_sparse(architecture: str = "", share: float = 0.5) -> nn.Module:
    """A model of which some of each projection is zero, here and there −0.0."""
    if architecture == "gpt2":
        from transformers import AutoConfig

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **ARCHITECTURES["gpt2"])).eval()
    else:
        model = moe_model(architecture) if architecture else tiny_llama()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for projection in find_projections(model):
            chance = torch.rand(projection.shape, generator=generator)
            projection.weight[chance < share] = 0.0
            projection.weight[chance < share / 2] = -0.0
    return model


def _came_back(before: nn.Module, after: nn.Module) -> int:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return sum(int((nonzero_mask(b) & ~nonzero_mask(a)).sum()) for a, b in pairs)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("pattern", ["2:4", "2:8", 0.7])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_fills_a_zero(method: str, pattern: str | float) -> None:
    model = _half_sparse()
    before = copy.deepcopy(model)
    report = prune(model, method, pattern, IDS)
    assert _came_back(before, model) == 0
    assert report.keeps_zeros and report.already_sparser == 0 and not any(x.note for x in report.layers.values())
    assert spp.verify(before, model, more_zeros_allowed=True).zeros_added > 0
    for path, layer in report.layers.items():
        if isinstance(pattern, str):
            weight = model.get_submodule(path).weight
            assert is_nm(weight, *map(int, pattern.split(":")))
            assert layer.sparsity > 1 - int(pattern[0]) / int(pattern[2])  # where a group had fewer, it keeps those
        else:
            assert layer.sparsity == pytest.approx(0.7, abs=0.02)  # ⌊p·k⌋ of a row, a block, a layer, zeros included


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ["gpt2", "", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    ("method", "pattern", "options"),
    [
        ("sparsegpt", "2:4", {}),
        ("sparsegpt", {r".*\.0\..*": "1:4", ".*": 0.6}, {}),
        ("sparsegpt+dsnot", 0.6, {"owl": OWL(spread=0.05)}),
        ("wanda", "2:4", {}),
        ("sparsegpt", "2:4", {"keep_zeros": False}),
    ],
)
def test_on_disk_as_in_memory(
    tmp_path: Path, architecture: str, method: str, pattern: Any, options: dict[str, Any]
) -> None:
    model = _half_sparse(architecture)
    before = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "model")
    report = prune_checkpoint(tmp_path / "model", tmp_path / "out", method, pattern, IDS, **options)
    assert prune(model, method, pattern, IDS, **options).already_sparser == report.already_sparser
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    if options.get("keep_zeros", True):
        assert _came_back(before, model) == 0 and report.keeps_zeros
        assert spp.verify(tmp_path / "model", tmp_path / "out", more_zeros_allowed=True).zeros_added > 0
        if pattern == "2:4":
            assert {tensor.pattern for tensor in spp.verify(tmp_path / "out").tensors.values()} == {"2:4"}
    else:
        assert _came_back(before, model) > 0 and not report.keeps_zeros
        with pytest.raises(spp.errors.MaskError, match="became non-zero"):
            spp.verify(tmp_path / "model", tmp_path / "out", more_zeros_allowed=True)


def test_a_finished_block_of_the_other_choice_is_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spp.pruning.loop as loop

    _half_sparse().save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path / "out", "sparsegpt", "2:4", IDS)
    calls: list[object] = []

    def dying(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*given)

    real = loop.prune_layer
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "prune_layer", dying)
        prune_checkpoint(*arguments, keep_zeros=False)
    prune_checkpoint(*arguments)
    assert spp.verify(tmp_path / "model", tmp_path / "out", more_zeros_allowed=True).zeros_added > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "wanda", "dsnot"])
def test_what_is_sparser_already_stays_as_it_is(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    prune(model, "magnitude", {"up_proj": "1:4", ".*": "3:4"})
    before = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        report = prune(model, method, {"up_proj": "2:4", ".*": "3:4"}, IDS)
    assert (report.already_sparser, report.to_dict()["already_sparser"]) == (2, 2)
    assert "2 of 14 layers were sparser already than asked for" in caplog.text
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name
    assert [path for path, layer in report.layers.items() if layer.was_sparser] == [
        f"model.layers.{i}.mlp.up_proj" for i in (0, 1)
    ]
    assert all(layer.zeros_before == layer.sparsity * 10240 for p, layer in report.layers.items() if "mlp" in p)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "wanda"])
def test_patterns_that_nest_lose_nothing_and_are_named(method: str, tmp_path: Path) -> None:
    model = _half_sparse(share=0.0003)  # exact zeros of a dense model, as many as SmolLM2 has
    for pattern in ("2:4", "2:8"):
        before = copy.deepcopy(model)
        prune(model, method, pattern, IDS)
        assert spp.verify(before, model, more_zeros_allowed=True).pattern == pattern
        assert spp.verify(spp.save_model(model, tmp_path / pattern.replace(":", "of"))).pattern == pattern
    model = tiny_llama()
    for fraction in (0.3, 0.5, 0.7):
        before = copy.deepcopy(model)
        assert prune(model, method, fraction, IDS).sparsity == pytest.approx(fraction, abs=0.01)
        assert spp.verify(before, model, more_zeros_allowed=True).zeros_added > 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude", "wanda", "sparsegpt+dsnot"])
def test_a_model_without_zeros_is_pruned_the_same_either_way(method: str) -> None:
    one, other = tiny_llama(), tiny_llama()
    prune(one, method, "2:4", IDS)
    prune(other, method, "2:4", IDS, keep_zeros=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
