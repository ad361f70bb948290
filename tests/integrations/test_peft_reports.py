"""What users of PEFT report of other adapters, with this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import spp
from spp.errors import NonFiniteError
from spp.integrations.peft import SPPPeftConfig
from tests.helpers.tolerances import assert_same_bits
from tests.integrations.helpers import IDS, logits, pruned, scatter

TARGETS = ["q_proj", "up_proj"]


def tuned(**options: Any) -> Any:
    return scatter(get_peft_model(pruned(), SPPPeftConfig(**{"r": 4, "target_modules": TARGETS, **options})))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("safe", [True, False])
def test_a_merge_that_fails_changes_nothing(safe: bool) -> None:
    """huggingface/peft#3682, #3705, #3706: NaN gets into the base, or half of it is overwritten when it is found."""
    model = tuned()
    with torch.no_grad():
        last = [p for name, p in model.named_parameters() if "spp_beta" in name][-1]
        last[0] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters() if "spp_" not in name}
    with pytest.raises(NonFiniteError, match="nothing was merged"):
        model.merge_and_unload(safe_merge=safe)
    for name, tensor in before.items():
        assert_same_bits(model.get_parameter(name).detach(), tensor, name)


@pytest.mark.slow
def test_merged_twice_and_taken_out_again() -> None:
    """huggingface/peft#2502: another text after merge_and_unload than before."""
    model = tuned()
    before = logits(model)
    model.merge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before)
    model.unmerge_adapter()
    assert_same_bits(logits(model), before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload()), before)


def test_fields_that_a_later_version_writes(tmp_path: Path) -> None:
    """huggingface/peft#2275, #1979, hiyouga/LlamaFactory#2696: a TypeError for a field that is not known."""
    model = tuned()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "later_config": {"a": 1}, "peft_version": "99.0"}))
    loaded = PeftModel.from_pretrained(pruned(), tmp_path, low_cpu_mem_usage=True)
    assert_same_bits(logits(loaded), logits(model))
    assert_same_bits(logits(spp.load_adapter(pruned(), tmp_path)), logits(model))


@pytest.mark.slow
def test_a_combination_with_a_rank_pattern_loads_again(tmp_path: Path) -> None:
    """huggingface/peft#3737 and #3761: combined adapters that do not load, or that are other ones."""
    model = tuned(rank_pattern={"up_proj": 2})
    model.add_adapter("other", SPPPeftConfig(r=3, target_modules=TARGETS, scaling=1.0))
    scatter(model, "other", seed=1)
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, 0.5], "both", combination_type="svd")
    model.base_model.add_weighted_adapter(["default"], [1.0], "same", combination_type="stack")
    before = logits(model)
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), before)
    model.set_adapter("both")
    combined = logits(model)
    assert not torch.equal(combined, before)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(pruned(), tmp_path / "both")
    assert_same_bits(logits(loaded), combined)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    """huggingface/transformers#42489, huggingface/peft#1142, huggingface/trl#3089: no gradient, or none at all."""
    gradients = []
    for checkpointing in (False, True):
        model = tuned().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0
        assert_same_bits(gradients[1][name], gradient, name)
