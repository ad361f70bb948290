"""Files of format 1, as the first version wrote them, are read for ever: adapters, certificates, packed weights.

The model is a Llama of one layer in bfloat16, pruned to 2:4 but for up_proj, which has no pattern; each adapter has
r = 2 and 3 in q_proj, with values drawn from a normal distribution.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import spp
import spp.pst
from tests.helpers.tolerances import assert_same_bits

FILES = Path(__file__).parent / "fixtures" / "format-1"
RULES = ("spp", "hira", "masked_lora")


def pruned() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FILES / "pruned", dtype=torch.bfloat16)


@pytest.mark.parametrize("rule", RULES)
def test_an_adapter_is_read_and_written_again(rule: str, tmp_path: Path) -> None:
    source = FILES / f"adapter-{rule}"
    model = spp.load_adapter(pruned(), source)
    stored = load_file(source / "adapter_model.safetensors")
    found = {f"base_model.model.{key}": t for key, t in spp.adapter_state_dict(model).items()}
    assert found.keys() == stored.keys()
    for key, tensor in stored.items():
        assert_same_bits(found[key], tensor, key)
    spp.save_adapter(model, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        before, after = (folder / name for folder in (source, tmp_path / "again"))
        if name.endswith(".json"):
            old, new = (json.loads(path.read_text()) for path in (before, after))
            assert {key: new[key] for key in old if key != "base_model_name_or_path"} == {
                key: value for key, value in old.items() if key != "base_model_name_or_path"
            }
            assert new.keys() - old.keys() <= {"base_values", "base_forms"}  # what came later is optional
        else:
            assert before.read_bytes() == after.read_bytes()


def test_a_merge_gives_the_same_bytes(tmp_path: Path) -> None:
    spp.merge_checkpoint(FILES / "pruned", FILES / "adapter-spp", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (
        FILES / "merged" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["pruned", "merged", "packed"])
def test_a_certificate_is_verified(name: str, tmp_path: Path) -> None:
    spp.verify(FILES / name)
    spp.verify(FILES / "pruned", FILES / name)
    shutil.copytree(FILES / name, tmp_path / name)
    before = json.loads((FILES / name / "sparsity.json").read_text())
    spp.certify(tmp_path / name)
    after = json.loads((tmp_path / name / "sparsity.json").read_text())
    assert {key: after[key] for key in ("tensors", "other", "totals")} == {
        key: before[key] for key in ("tensors", "other", "totals")
    }


def test_packed_weights_are_read_and_written_again(tmp_path: Path) -> None:
    dense, unpacked = load_file(FILES / "pruned" / "model.safetensors"), spp.unpack(spp.load_packed(FILES / "packed"))
    for key, tensor in unpacked.state_dict().items():
        if key in dense:
            assert_same_bits(tensor, dense[key] + 0.0, key)  # −0.0 comes back as 0.0
    spp.export_packed(FILES / "pruned", tmp_path / "packed")
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == (
        FILES / "packed" / "model.safetensors"
    ).read_bytes()
    spp.export_dense(FILES / "packed", tmp_path / "dense")
    spp.verify(FILES / "pruned", tmp_path / "dense")


def test_the_state_of_pst_is_read() -> None:
    model = AutoModelForCausalLM.from_pretrained(FILES / "dense", dtype=torch.bfloat16)
    spp.pst.load(model, FILES / "pst")
    stored = load_file(FILES / "pst" / "adapter_model.safetensors")
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(held) == len(stored) == 6 * 7
    for key, tensor in stored.items():
        assert_same_bits(held[key.removeprefix("base_model.model.")].detach(), tensor, key)
    assert spp.sparsity(spp.pst.convert(model)).sparsity == pytest.approx(0.5, abs=0.01)
