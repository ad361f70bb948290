"""Adapter directories: what PEFT writes spp reads, what spp writes PEFT reads, bit for bit and without a warning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from torch import nn

import spp
from spp.errors import AdapterError, MaskError, SPPWarning
from spp.integrations.peft import SPPPeftConfig
from spp.integrations.peft.model import tuner_layers
from tests.helpers.tolerances import assert_same_bits
from tests.integrations.helpers import Q0, logits, pruned, scatter, train

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(autouse=True)
def no_user_warnings() -> Iterator[None]:
    """PEFT tells what it ignores, or did not find, by UserWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    pruned().save_pretrained(directory)
    return directory


def load_base(base: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter that PEFT wrote, and the logits that it had."""
    directory = tmp_path_factory.mktemp("tuned")
    model = train(get_peft_model(load_base(base), SPPPeftConfig(r=4, seed=0, task_type="CAUSAL_LM")))
    model.save_pretrained(directory)
    return directory, logits(model)


@pytest.fixture(scope="module")
def ours(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter that spp wrote, and the logits that it had."""
    model = train(spp.wrap(load_base(base), 4, seed=0, rank_pattern={"up_proj": 2}))
    return spp.save_adapter(model, tmp_path_factory.mktemp("ours") / "adapter"), logits(model)


def test_the_files_of_a_hub_push(base: Path, tuned: tuple[Path, torch.Tensor]) -> None:
    directory, _ = tuned
    assert sorted(path.name for path in directory.iterdir()) == FILES
    assert f"base_model: {base}" in (directory / "README.md").read_text()
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPP" and config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["base_masks"]) == 14
    tensors = load_file(directory / "adapter_model.safetensors")
    assert len(tensors) == 28 and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert tuple(tensors[f"base_model.model.{Q0}.spp_alpha"].shape) == (4, 64)
    assert tuple(tensors[f"base_model.model.{Q0}.spp_beta"].shape) == (64, 1)


def test_saving_twice_gives_the_same_bytes(base: Path, tuned: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, _ = tuned
    model = PeftModel.from_pretrained(load_base(base), directory, is_trainable=True)
    model.save_pretrained(tmp_path)
    for name in FILES[1:]:
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes(), name


def test_spp_reads_what_peft_wrote(base: Path, tuned: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, expected = tuned
    model = spp.load_adapter(load_base(base), directory)
    assert_same_bits(logits(model), expected)
    spp.merge_checkpoint(base, directory, tmp_path / "merged")
    merged = load_base(tmp_path / "merged").state_dict()
    spp.merge(model)
    for name, tensor in model.state_dict().items():
        assert_same_bits(merged[name], tensor, name)


def test_peft_reads_what_spp_wrote(base: Path, ours: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, expected = ours
    for model in (
        PeftModel.from_pretrained(load_base(base), directory),
        AutoPeftModelForCausalLM.from_pretrained(directory),
        PeftModel.from_pretrained(load_base(base), directory, low_cpu_mem_usage=True),
        PeftModel.from_pretrained(load_base(base), directory, adapter_name="another", is_trainable=True),
    ):
        assert isinstance(model, PeftModelForCausalLM)
        assert_same_bits(logits(model), expected)
        trains = [p.requires_grad for name, p in model.named_parameters() if "spp_" in name]
        assert len(trains) == 28 and set(trains) == {"another" in model.peft_config}
    model.save_pretrained(tmp_path)  # an adapter that is not called "default" gets a folder
    assert_same_bits(logits(spp.load_adapter(load_base(base), tmp_path / "another")), expected)
    tensors = load_file(tmp_path / "another" / "adapter_model.safetensors")
    assert {key: t.shape for key, t in tensors.items()} == {
        key: t.shape for key, t in load_file(directory / "adapter_model.safetensors").items()
    }


def test_the_auto_class_and_sixteen_bits(base: Path, ours: tuple[Path, torch.Tensor]) -> None:
    directory, _ = ours
    model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    layer = tuner_layers(model)[f"base_model.model.{Q0}"]
    saved = load_file(directory / "adapter_model.safetensors")[f"base_model.model.{Q0}.spp_alpha"]
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert_same_bits(layer.spp_alpha["default"], saved)
    assert_same_bits(logits(model), logits(spp.load_adapter(load_base(base, torch.bfloat16), directory)))


def test_load_adapter_beside_another(
    base: Path, tuned: tuple[Path, torch.Tensor], ours: tuple[Path, torch.Tensor]
) -> None:
    model = PeftModel.from_pretrained(load_base(base), tuned[0])
    result = model.load_adapter(ours[0], "second")
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_bits(logits(model), tuned[1])
    model.set_adapter("second")
    assert_same_bits(logits(model), ours[1])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_own_adapters(
    base: Path, ours: tuple[Path, torch.Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load_base(base, dtype)
    model.load_adapter(str(ours[0]))
    reference = spp.load_adapter(load_base(base, dtype), ours[0])
    assert_same_bits(logits(model), logits(reference))
    model.disable_adapters()
    assert_same_bits(logits(model), logits(load_base(base, dtype)))
    model.enable_adapters()
    with pytest.warns(UserWarning, match="multiple adapters"):
        model.add_adapter(SPPPeftConfig(r=2, seed=1), "fresh")
    model.set_adapter("fresh")
    assert_same_bits(logits(model), logits(load_base(base, dtype)))
    model.set_adapter("default")
    model.delete_adapter("fresh")
    model.save_pretrained(tmp_path / "again")
    assert_same_bits(logits(spp.load_adapter(load_base(base, dtype), tmp_path / "again")), logits(reference))


def test_modules_to_save_are_saved_and_spp_names_the_way(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_base(base), SPPPeftConfig(r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(base), tmp_path)
    assert_same_bits(logits(again), logits(model))
    with pytest.raises(AdapterError, match=r"trained as a whole, lm_head: load it with PEFT"):
        spp.load_adapter(load_base(base), tmp_path)


def test_layers_to_transform_reach_spp(base: Path, tmp_path: Path) -> None:
    config = SPPPeftConfig(r=4, layers_to_transform=[1], rank_pattern={"up_proj": 2}, seed=0, task_type="CAUSAL_LM")
    model = train(get_peft_model(load_base(base), config))
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(spp.load_adapter(load_base(base), tmp_path)), logits(model))
    assert_same_bits(logits(PeftModel.from_pretrained(load_base(base), tmp_path)), logits(model))


def test_another_base_is_refused(base: Path, ours: tuple[Path, torch.Tensor]) -> None:
    model = load_base(base)
    with torch.no_grad():
        weight = model.get_submodule(Q0).weight
        weight[0][weight[0] == 0] = 1.0
    with pytest.raises(MaskError, match=rf"in 1 layers: {Q0}.*base_masks to None"):
        PeftModel.from_pretrained(model, ours[0])
    assert not tuner_layers(model)
    config = PeftConfig.from_pretrained(ours[0])
    config.base_masks = None
    assert isinstance(PeftModel.from_pretrained(model, ours[0], config=config), PeftModel)
    other = PeftModel.from_pretrained(load_base(base), ours[0])
    other.load_adapter(ours[0], "same zeros")


def test_a_trained_masks_hash_is_that_of_the_base_also_after_a_merge(
    base: Path, tuned: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    model = PeftModel.from_pretrained(load_base(base), tuned[0], is_trainable=True)
    scatter(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    first, second = (json.loads((d / "adapter_config.json").read_text()) for d in (tuned[0], tmp_path))
    assert first["base_masks"] == second["base_masks"]


def test_without_a_task_type(base: Path, tmp_path: Path) -> None:
    model = scatter(get_peft_model(load_base(base), SPPPeftConfig(r=4)))
    model.save_pretrained(tmp_path)
    assert_same_bits(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    with pytest.warns(SPPWarning, match="changes no weight"):
        spp.save_adapter(spp.wrap(load_base(base), 4), tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_any_module(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        with torch.no_grad():
            model[0].weight[:, ::2] = 0.0
        return model

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    model = scatter(get_peft_model(make(), SPPPeftConfig(r=2, target_modules=["0"])))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert_same_bits(again(x), model(x))
    assert_same_bits(spp.load_adapter(make(), tmp_path)(x), model(x))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
