"""What trained beside the adapter, merged: in memory, on disk, in weighted sums, and what is made of lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spp
from spp.errors import AdapterError, CheckpointError, ConfigError, NonFiniteError
from spp.wrapping.wrap import also_trained
from tests.helpers.checkpoints import contents, rewrite, shard, tensors_of
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits

ALL = ("norms", "biases", "head")
DTYPES = [torch.float32, torch.bfloat16]


def pruned(dtype: torch.dtype = torch.float32) -> Any:
    return prune_nm_(tiny_llama(attention_bias=True)).to(dtype)


def trained(dtype: torch.dtype = torch.float32, also: Any = ALL, seed: int = 3) -> Any:
    model = spp.wrap(pruned(dtype), r=2, seed=0, also_train=also)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in shards and adapters of it, all in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("also")
    for dtype in DTYPES:
        part = folder / str(dtype).removeprefix("torch.")
        spp.save_model(pruned(dtype), part / "whole")
        shard(part / "whole", part / "base")
        spp.save_adapter(trained(dtype), part / "a")
        spp.save_adapter(trained(dtype, "norms", 4), part / "b")
        spp.save_adapter(trained(dtype, (), 5), part / "c")
    return folder


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"rounding": "stochastic", "seed": 7}),
        (torch.bfloat16, {"dtype": torch.float32}),
        (torch.float32, {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 7}),
    ],
)
def test_disk_and_memory_give_the_same_bits(
    made: Path, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    part = made / str(dtype).removeprefix("torch.")
    on_disk = spp.merge_checkpoint(part / "base", part / "a", tmp_path / "out", **options)
    model = trained(dtype)
    values = {name: one.trained.detach().clone() for name, one in also_trained(model).items()}
    tuned = model(torch.arange(3, 19)[None]).logits.detach()
    in_memory = spp.merge(model, **options)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(found[name], tensor, name)
    for name, value in values.items():
        if "rounding" not in options:
            assert_same_bits(found[name], value.to(options.get("dtype", dtype)), name)
    if not options:
        assert_same_bits(model(torch.arange(3, 19)[None]).logits.detach(), tuned)
    assert on_disk.also == in_memory.also and on_disk.also.keys() == values.keys()
    before = tensors_of(part / "base")
    for name, change in on_disk.also.items():
        assert change == float((found[name].double() - before[name].double()).abs().max()) > 0
    assert on_disk.to_dict()["also_trained"] == on_disk.also and "also trained: 14" in (on_disk.also_line or "")
    assert all(p.requires_grad for p in model.parameters())
    spp.verify(tmp_path / "out")
    spp.verify(part / "base", tmp_path / "out")
    spp.verify(pruned(dtype), model)


def test_sums_add_differences_to_the_base(made: Path, tmp_path: Path) -> None:
    part = made / "float32"
    spp.merge_checkpoint(part / "base", [(part / "a", 0.7), (part / "b", 0.3), (part / "c", 2.0)], tmp_path / "out")
    with pytest.raises(ConfigError, match="pass pairs"):  # iterated, it would be adapters without weights
        spp.merge_checkpoint(part / "base", {part / "a": 0.7, part / "b": 0.3}, tmp_path / "dict")  # type: ignore[arg-type]
    base, found = tensors_of(part / "base"), tensors_of(tmp_path / "out")
    one, two = (load_file(part / name / "adapter_model.safetensors") for name in ("a", "b"))
    names = [key.removeprefix("base_model.model.") for key in one if "spp_" not in key]
    assert len(names) == 14
    for name in names:
        key, start = f"base_model.model.{name}", base[name].double()
        expected = start + 0.7 * (one[key].double() - start)
        if key in two:
            expected += 0.3 * (two[key].double() - start)
        assert_same_bits(found[name], expected.float(), name)
    spp.merge_checkpoint(part / "base", [(part / "a", 1.0), (part / "c", 2.0)], tmp_path / "exact")
    found = tensors_of(tmp_path / "exact")
    for name in names:
        assert_same_bits(found[name], one[f"base_model.model.{name}"], name)


def test_a_norm_that_nobody_trained_is_still_caught(made: Path, tmp_path: Path) -> None:
    part = made / "float32"
    spp.merge_checkpoint(part / "whole", part / "b", tmp_path / "out")
    spp.verify(tmp_path / "out")
    key = "model.norm.weight"
    rewrite(tmp_path / "out", {key: tensors_of(tmp_path / "out")[key] + 0.5})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: its contents have changed"):
        spp.verify(tmp_path / "out")


def test_a_merge_leaves_what_was_not_trained(made: Path, tmp_path: Path) -> None:
    part = made / "bfloat16"
    report = spp.merge_checkpoint(part / "base", part / "b", tmp_path / "out")
    base, found = tensors_of(part / "base"), tensors_of(tmp_path / "out")
    moved = {name for name in base if not torch.equal(base[name], found[name])}
    assert {name for name in moved if "_proj" not in name} == set(report.also)
    assert len(report.also) == 5 and not any(name.endswith("bias") for name in moved)


def test_a_base_that_does_not_fit_is_refused_whole(made: Path, tmp_path: Path) -> None:
    part = made / "float32"
    spp.save_model(prune_nm_(tiny_llama()), tmp_path / "base")
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match=r"q_proj\.bias: the base has no such tensor"):
        spp.merge_checkpoint(tmp_path / "base", part / "a", tmp_path / "out")
    rewrite(tmp_path / "base", {"model.norm.weight": torch.ones(3)})
    with pytest.raises(AdapterError, match=r"model\.norm\.weight: the base's is .*\(3,\)"):
        spp.merge_checkpoint(tmp_path / "base", part / "b", tmp_path / "out")
    assert contents(tmp_path).keys() == before.keys()


def test_one_that_is_adapted_and_trained_is_refused(made: Path, tmp_path: Path) -> None:
    part = made / "float32"
    model = prune_nm_(tiny_llama(attention_bias=True))
    with torch.no_grad():
        model.lm_head.weight[:, ::2] = 0
    spp.wrap(model, r=2, target_modules=["lm_head"])
    with torch.no_grad():
        spp.adapter_parameters(model)[1].fill_(0.5)
    spp.save_adapter(model, tmp_path / "head")
    with pytest.raises(AdapterError, match=r"lm_head\.weight is adapted by one adapter and was trained as a whole"):
        spp.merge_checkpoint(part / "base", [(part / "a", 1.0), (tmp_path / "head", 1.0)], tmp_path / "out")


@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_what_cannot_be_stored_changes_nothing(value: float, tmp_path: Path) -> None:
    model = trained(torch.float16, "norms")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    before = {name: one.original.clone() for name, one in also_trained(model).items()}
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        spp.merge(model)
    for name, one in also_trained(model).items():
        assert_same_bits(one.original, before[name], name)
    spp.unwrap(model)
    expected = pruned(torch.float16).state_dict()
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, expected[name], name)


def test_norms_alone_are_merged_without_a_warning() -> None:
    model = spp.wrap(pruned(), r=2, also_train="norms")
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    report = spp.merge(model)  # warnings are errors
    assert report.also["model.norm.weight"] == 0.5 and report.moved == 0


def test_a_head_with_zeros_of_its_own_is_dense(tmp_path: Path) -> None:
    """Its zeros are nobody's promise, and the certificate of the merge does not speak of them."""
    base = pruned()
    with torch.no_grad():
        base.lm_head.weight[0] = 0
    spp.save_model(base, tmp_path / "base")
    model = spp.wrap(base, r=2, also_train="head")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    spp.save_adapter(model, tmp_path / "a")
    report = spp.merge_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert "lm_head.weight" not in report.sparsity_report.tensors
    assert bool((tensors_of(tmp_path / "out")["lm_head.weight"][0] == 1).all())
    spp.verify(tmp_path / "out")
