"""Several adapters merged at once: their weighted sum, rounded once, with each one's mask and shapes checked."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spp
from spp.certifying.save import save_model
from spp.certifying.verify import verify
from spp.errors import AdapterError, CheckpointError, ConfigError, MaskError, SPPWarning
from spp.files import CheckpointReader, read_json, save_tensors, write_json
from spp.kernels import use_kernels
from spp.merging.disk import merge_checkpoint
from spp.rules.spp import row_groups
from tests.helpers.checkpoints import (
    Q0,
    contents,
    grown,
    pruned_model,
    rewrite,
    same_tensors,
    tensors_of,
    wrapped_model,
)
from tests.helpers.models import projections, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits, assert_same_zeros

FEW = ["q_proj", "up_proj"]
WEIGHTS = (0.75, -1.5)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def stored(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def pair(tmp_path: Path, stored: torch.dtype) -> tuple[Path, list[Path]]:
    """A base, an adapter of all projections (r = 4, s = 2), and one of few (r = 3, s = 0.5)."""
    base = save_model(pruned_model(stored), tmp_path / "base")
    one = spp.save_adapter(wrapped_model(stored), tmp_path / "one")
    model = wrapped_model(stored, r=3, scaling=0.5, target_modules=FEW, seed=7, scale=0.5)
    return base, [one, spp.save_adapter(model, tmp_path / "two")]


def change(adapter: Path, path: str, weight: float) -> Tensor | None:
    """w·(s·β) · A of one adapter, by the formula; None for a layer that it does not have."""
    with CheckpointReader(adapter, file="adapter_model.safetensors") as reader:
        key = f"base_model.model.{path}.spp"
        if f"{key}_alpha" not in reader:
            return None
        alpha, beta = reader.load(f"{key}_alpha"), reader.load(f"{key}_beta")
    scaling = read_json(adapter / "adapter_config.json", "config")["scaling"]
    return (beta * (weight * scaling)) * alpha[row_groups(len(beta), len(alpha))]


def by_formula(weight: Tensor, changes: list[Tensor | None]) -> Tensor:
    total = torch.zeros(weight.shape)
    for part in changes:
        total = total if part is None else total + part
    return (weight.float() * (1 + total)).to(weight.dtype)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_weighted_sum_is_rounded_once(
    pair: tuple[Path, list[Path]], tmp_path: Path, stored: torch.dtype, kernels: str
) -> None:
    base, adapters = pair
    with use_kernels(kernels):
        report = merge_checkpoint(base, list(zip(adapters, WEIGHTS, strict=True)), tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    paths = list(projections(pruned_model()))
    assert sorted(report.layers) == sorted(paths)
    for path in paths:
        key = f"{path}.weight"
        expected = by_formula(before[key], [change(a, path, w) for a, w in zip(adapters, WEIGHTS, strict=True)])
        assert_same_bits(after[key], expected, key)
        assert_same_zeros(after[key], before[key])
        assert not torch.equal(after[key], by_formula(before[key], [change(adapters[0], path, WEIGHTS[0])])) or not any(
            name in path for name in FEW
        )
    assert verify(base, tmp_path / "out") == verify(tmp_path / "out")
    for key in before.keys() - {f"{path}.weight" for path in paths}:
        assert_same_bits(after[key], before[key], key)


@pytest.mark.sampled(2)
def test_the_same_sum_in_the_peft_plug_in(pair: tuple[Path, list[Path]], tmp_path: Path, stored: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    import spp.integrations.peft  # noqa: F401  registers the method

    base, (one, two) = pair
    merge_checkpoint(base, [(one, WEIGHTS[0]), (two, WEIGHTS[1])], tmp_path / "out")
    model = peft.PeftModel.from_pretrained(pruned_model(stored), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "sum")
    model.set_adapter("sum")
    merged = model.merge_and_unload(safe_merge=True)
    after = tensors_of(tmp_path / "out")
    for name, tensor in merged.state_dict().items():
        assert_same_bits(after[name], tensor, name)


@pytest.mark.parametrize("rule", ["hira", "masked_lora"])
def test_sums_of_other_rules(base: Path, adapter: Path, tmp_path: Path, rule: str) -> None:
    sizes = ({"r": 3, "scale": 0.2}, {"r": 2, "scale": 0.1, "scaling": 0.5, "seed": 7})
    adapters = [spp.save_adapter(wrapped_model(rule=rule, **o), tmp_path / str(i)) for i, o in enumerate(sizes)]
    merge_checkpoint(base, list(zip(adapters, WEIGHTS, strict=True)), tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for path in projections(pruned_model()):
        weight, total = before[f"{path}.weight"].double(), torch.zeros((), dtype=torch.float64)
        for folder, share in zip(adapters, WEIGHTS, strict=True):
            tensors = load_file(folder / "adapter_model.safetensors")
            a, b = (tensors[f"base_model.model.{path}.{rule}_{name}"].double() for name in "AB")
            total = total + share * read_json(folder / "adapter_config.json", "config")["scaling"] * (b @ a)
        expected = weight * (1 + total) if rule == "hira" else weight + total * (weight != 0)
        assert_same_zeros(after[f"{path}.weight"], before[f"{path}.weight"])
        torch.testing.assert_close(after[f"{path}.weight"].double(), expected, atol=1e-6, rtol=1e-5)
    verify(base, tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"adapters of the rules spp and {rule} cannot be summed up"):
        merge_checkpoint(base, [adapter, adapters[0]], tmp_path / "mixed")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"rounding": "stochastic", "seed": 5}])
def test_options_go_with_a_sum(
    pair: tuple[Path, list[Path]], tmp_path: Path, stored: torch.dtype, options: dict[str, Any]
) -> None:
    base, adapters = pair
    report = merge_checkpoint(base, [(a, 0.5) for a in adapters], tmp_path / "out", **options)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {options.get("dtype", stored)}
    verify(base, tmp_path / "out")
    if "dtype" in options:
        total = sum(change(a, Q0.removesuffix(".weight"), 0.5) for a in adapters)  # type: ignore[misc]
        assert_same_bits(after[Q0], before[Q0].float() * (1 + total))
        assert report.survived == pytest.approx(1, abs=1e-6)


def test_one_adapter_in_a_list_is_that_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, adapter, tmp_path / "plain")
    for number, parts in enumerate(([adapter], [(adapter, 1.0)], [str(adapter)], [(str(adapter), 1)])):
        merge_checkpoint(base, parts, tmp_path / str(number))  # type: ignore[arg-type]
        assert contents(tmp_path / str(number)) == contents(tmp_path / "plain")
    with pytest.warns(SPPWarning, match="changes no weight: its scaling is zero"):
        assert merge_checkpoint(base, [(adapter, 0.0)], tmp_path / "none").survived is None
    assert same_tensors(tmp_path / "none", base)


def test_layers_of_one_adapter_alone_have_its_bits(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (one, two) = pair
    merge_checkpoint(base, [(one, 1.0), (two, 1.0)], tmp_path / "both")
    merge_checkpoint(base, one, tmp_path / "alone")
    both, alone = tensors_of(tmp_path / "both"), tensors_of(tmp_path / "alone")
    differing = {key for key in both if not torch.equal(both[key], alone[key])}
    assert differing == {key for key in both if any(f"{name}.weight" in key for name in FEW)}


def test_what_is_no_list_of_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    for parts, message in {
        (): "no adapter to merge",
        ((adapter, 1.0), (adapter.parent / "." / adapter.name, 2.0)): "comes twice; add its weights up",
        ((adapter, math.nan),): "finite number",
        ((adapter, math.inf),): "finite number",
        ((adapter, "1"),): "finite number",
        ((adapter, True),): "finite number",
        ((adapter, 1.0, 2.0),): "is no adapter",
        (3,): "3 is no adapter",
    }.items():
        with pytest.raises(ConfigError, match=message):
            merge_checkpoint(base, parts, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="nowhere"):
        merge_checkpoint(base, [(adapter, 1.0), (tmp_path / "nowhere", 1.0)], tmp_path / "out")
    for out in (tmp_path / "two", tmp_path / "two" / "out"):
        spp.save_adapter(wrapped_model(), tmp_path / "two", overwrite=True)
        with pytest.raises(ConfigError, match="choose a path outside it"):
            merge_checkpoint(base, [(adapter, 1.0), (tmp_path / "two", 1.0)], out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "two"]


@pytest.mark.filterwarnings("ignore:the adapter changes no weight")  # not trained
def test_each_adapters_mask_and_shapes_are_checked(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = prune_nm_(tiny_llama())
    with torch.no_grad():
        model.get_parameter(Q0).copy_(grown(model.get_parameter(Q0)))
    other = spp.save_adapter(spp.wrap(model, r=2, seed=1, target_modules=FEW), tmp_path / "other")
    with pytest.raises(MaskError, match=r"other was trained on in 1 layers: model\.layers\.0\.self_attn\.q_proj"):
        merge_checkpoint(base, [(adapter, 1.0), (other, 1.0)], tmp_path / "out")
    with pytest.raises(MaskError, match="adapter was trained on"):
        rewrite(base, {Q0: grown(tensors_of(base)[Q0])})
        merge_checkpoint(base, [(other, 1.0), (adapter, 1.0)], tmp_path / "out")
    values = read_json(other / "adapter_config.json", "config")
    write_json(other / "adapter_config.json", {**values, "base_masks": None})
    key = "base_model.model.model.layers.0.self_attn.q_proj.spp_alpha"
    with CheckpointReader(other, file="adapter_model.safetensors") as reader:
        tensors = {name: reader.load(name) for name in reader}
    save_tensors(other / "adapter_model.safetensors", {**tensors, key: torch.ones(2, 7)})
    with pytest.raises(AdapterError, match=r"the adapter in .*other does not fit(.|\n)*q_proj"):
        merge_checkpoint(base, [(adapter, 1.0), (other, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_folder_of_a_thousand_adapters_only_one_is_looked_at(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "adapters"
    for index in range(1000):
        (home / f"a{index}").mkdir(parents=True)
        (home / f"a{index}" / "adapter_config.json").write_text("{}")
    adapter.rename(home / "mine")
    seen: list[str] = []

    def noting(function: Any) -> Any:
        def noted(path: Any, *rest: Any, **options: Any) -> Any:
            seen.append(str(path))
            return function(path, *rest, **options)

        return noted

    for module, names in ((os, ("open", "stat", "scandir", "listdir")), (io, ("open",))):
        for name in names:
            monkeypatch.setattr(module, name, noting(getattr(module, name)))
    merge_checkpoint(base, home / "mine", tmp_path / "out")
    assert str(home / "mine" / "adapter_model.safetensors") in seen
    assert [path for path in seen if path.startswith(str(home / "a"))] == []
