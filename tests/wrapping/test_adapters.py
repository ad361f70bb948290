"""Adapter files: format, round trip, the authors' layouts, and every way in which they can be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spp
from spp.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MaskError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    SPPWarning,
    WrapError,
)
from spp.wrapping.wrap import adapter_config, adapter_layers
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits
from tests.wrapping.test_wrap import IDS, assert_untouched, pruned, snapshot, stir

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = stir(spp.wrap(pruned(), r=4, scaling=1.5, dropout=0.1, seed=0))
    return spp.save_adapter(model, tmp_path / "adapter")


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a saved adapter; "__" stands for a dot."""
    tensors = load_file(path / "adapter_model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def test_files_are_exactly_what_the_format_says(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((saved / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert (
        config["peft_type"] == "SPP" and config["r"] == 4 and config["scaling"] == 1.5 and config["format_version"] == 1
    )
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    weight = pruned().model.layers[0].mlp.up_proj.weight
    import numpy

    content = (
        b"spp-mask-1" + numpy.array([160, 64], dtype="<i8").tobytes() + numpy.packbits((weight != 0).numpy()).tobytes()
    )
    assert config["base_masks"][UP] == hashlib.sha256(content).hexdigest() and len(config["base_masks"]) == 14
    raw = (saved / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header[f"base_model.model.{UP}.spp_alpha"]["dtype"] == "F32"
    assert header[f"base_model.model.{UP}.spp_beta"]["shape"] == [160, 1] and len(header) == 28


def test_the_same_input_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = stir(spp.wrap(pruned(), r=4, scaling=1.5, dropout=0.1, seed=0))
    other = spp.save_adapter(again, tmp_path / "other")
    third = spp.save_adapter(spp.load_adapter(pruned(), saved), tmp_path / "third")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        expected = (saved / name).read_bytes()
        assert (other / name).read_bytes() == expected
        if name != "adapter_config.json":  # `seed` and the like travel; the bytes of the weights must be the same
            assert (third / name).read_bytes() == expected
    assert json.loads((third / "adapter_config.json").read_text()) == json.loads(
        (saved / "adapter_config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = stir(spp.wrap(pruned().to(dtype), r=5, rank_pattern={"up_proj": 7}, dropout=0.2, dropout_mode="alpha"))
    path = spp.save_adapter(model, tmp_path / "adapter")
    state = torch.get_rng_state()
    loaded = spp.load_adapter(pruned().to(dtype), path)
    assert torch.equal(torch.get_rng_state(), state)
    assert adapter_config(loaded) == adapter_config(model)
    for key, tensor in spp.adapter_state_dict(model).items():
        assert_same_bits(spp.adapter_state_dict(loaded)[key], tensor, key)
    assert_same_bits(loaded(IDS).logits, model(IDS).logits)
    assert {p.requires_grad for p in spp.adapter_parameters(loaded)} == {True}


def test_loading_onto_a_wrapped_model_replaces_the_values(saved: Path) -> None:
    model = spp.wrap(pruned(), r=4, scaling=1.5)
    parameters = spp.adapter_parameters(model)
    spp.load_adapter(model, saved)
    assert all(a is b for a, b in zip(parameters, spp.adapter_parameters(model), strict=True))
    assert_same_bits(model(IDS).logits, spp.load_adapter(pruned(), saved)(IDS).logits)
    other = spp.wrap(pruned(), r=8, scaling=1.5)
    before = snapshot(other)
    with pytest.raises(AdapterError, match=r"r: model 8, adapter 4.*unwrap"):
        spp.load_adapter(other, saved)
    assert_untouched(other, before)


def test_meta_model_gets_real_adapter_tensors(saved: Path) -> None:
    with torch.device("meta"):
        model = tiny_llama()
    spp.load_adapter(model, saved)
    assert not any(p.is_meta for p in spp.adapter_parameters(model))


def test_other_zeros_are_refused_and_can_be_overridden(saved: Path) -> None:
    model = pruned()
    row = model.model.layers[0].mlp.up_proj.weight.data[3]
    kept = int((row != 0).nonzero()[0])
    row[kept] = 0
    before = snapshot(model)
    with pytest.raises(MaskError, match=rf"in 1 layers: {UP}.*strict=False"):
        spp.load_adapter(model, saved)
    assert_untouched(model, before)
    with pytest.warns(SPPWarning, match="zeros of the base differ"):
        spp.load_adapter(model, saved, strict=False)


def test_missing_unexpected_and_misshapen_keys_come_in_one_sorted_message(saved: Path) -> None:
    prefix = f"base_model.model.{UP}".replace(".", "__")
    rewrite(
        saved,
        **{
            f"{prefix}__spp_alpha": None,
            f"{prefix}__spp_beta": torch.zeros(159, 1),
            "base_model__model__other__spp_alpha": torch.zeros(4, 4),
        },
    )
    model = pruned()
    before = snapshot(model)
    with pytest.raises(AdapterError) as caught:
        spp.load_adapter(model, saved)
    lines = str(caught.value).splitlines()[1:]
    assert lines == sorted(lines) and len(lines) == 3
    assert f"misshapen {UP}.spp_beta: adapter (159, 1), model needs (160, 1)" in str(caught.value)
    assert f"missing {UP}.spp_alpha (4, 64)" in str(caught.value) and "unexpected other.spp_alpha (4, 4)" in str(
        caught.value
    )
    with pytest.raises(AdapterError):  # shapes must fit always
        spp.load_adapter(model, saved, strict=False)
    assert_untouched(model, before)
    rewrite(saved, **{f"{prefix}__spp_beta": torch.zeros(160, 1)})
    with pytest.warns(SPPWarning, match="in part"):
        spp.load_adapter(model, saved, strict=False)


def test_another_architecture_and_another_rank(saved: Path) -> None:
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(AdapterError, match="not for this model"):
        spp.load_adapter(plain, saved)
    wide = prune_nm_(tiny_llama(hidden_size=128, intermediate_size=160))
    with pytest.raises(AdapterError, match="misshapen"):
        spp.load_adapter(wide, saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(AdapterError, match=r"misshapen .*: adapter \(4, 64\), model needs \(8, 64\)"):
        spp.load_adapter(pruned(), saved)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_values_are_refused_when_saving_and_when_loading(saved: Path, poison: float, tmp_path: Path) -> None:
    model = spp.load_adapter(pruned(), saved)
    with torch.no_grad():
        adapter_layers(model)[UP].spp_beta[7] = poison
    with pytest.raises(NonFiniteError, match=f"{UP}.spp_beta"):
        spp.save_adapter(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    rewrite(saved, **{f"base_model.model.{UP}.spp_alpha".replace(".", "__"): torch.full((4, 64), poison)})
    with pytest.raises(NonFiniteError, match=f"{UP}.spp_alpha"):
        spp.load_adapter(pruned(), saved)


def test_truncated_corrupt_and_missing_files(saved: Path, tmp_path: Path) -> None:
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    model = pruned()
    before = snapshot(model)
    for content in (whole[:-5], whole[:7], b"", b"\xff" * 64, (2**63).to_bytes(8, "little") + whole[8:]):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            spp.load_adapter(model, saved)
    weights.unlink()
    with pytest.raises(CheckpointError, match="adapter_model"):
        spp.load_adapter(model, saved)
    weights.write_bytes(whole)
    for content_text in ("{", "[]", ""):
        config.write_text(content_text)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            spp.load_adapter(model, saved)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        spp.load_adapter(model, saved)
    with pytest.raises(CheckpointError, match="no adapter directory"):
        spp.load_adapter(model, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        spp.load_adapter(model, weights)
    config.write_text(json.dumps({**json.loads(text), "format_version": 9}))
    with pytest.raises(ConfigError, match="newer spp"):
        spp.load_adapter(model, saved)
    assert_untouched(model, before)


def test_another_methods_adapter_is_named(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(AdapterError, match="'LORA', not SPP"):
        spp.load_adapter(pruned(), saved)


def test_existing_outputs_and_unwrapped_models(saved: Path, tmp_path: Path) -> None:
    model = spp.load_adapter(pruned(), saved)
    content = (saved / "adapter_model.safetensors").read_bytes()
    stir(model)
    with pytest.raises(OutputExistsError, match="overwrite"):
        spp.save_adapter(model, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == content
    spp.save_adapter(model, saved, overwrite=True)
    assert (saved / "adapter_model.safetensors").read_bytes() != content
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(OutputError):
        spp.save_adapter(model, blocker / "adapter")
    with pytest.raises(WrapError, match="not wrapped"):
        spp.save_adapter(pruned(), tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "file"]


def authors_adapter(folder: Path, *, binary: bool, flat: bool, rank: int = 4) -> dict[str, torch.Tensor]:
    """Write what the SPP authors' code saves: PEFT's LoRA names, one more matrix, an r that is not the rank."""
    folder.mkdir()
    reference = stir(spp.wrap(pruned(), r=rank, seed=1))
    tensors = {}
    for path, layer in adapter_layers(reference).items():
        beta = layer.spp_beta.detach().clone()
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.spp_alpha.detach().clone()
        tensors[f"base_model.model.{path}.lora_A.weight_col"] = beta.view(1, -1) if flat else beta
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return spp.adapter_state_dict(reference)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_the_authors_adapters_load(tmp_path: Path, binary: bool, flat: bool) -> None:
    expected = authors_adapter(tmp_path / "authors", binary=binary, flat=flat)
    model = spp.load_adapter(pruned(), tmp_path / "authors")
    config = adapter_config(model)
    assert (config.r, config.scaling, config.dropout) == (4, 2.0, 0.05)
    found = spp.adapter_state_dict(model)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same_bits(found[key], tensor, key)


def test_the_authors_adapters_with_a_misshapen_column(tmp_path: Path) -> None:
    folder = tmp_path / "authors"
    authors_adapter(folder, binary=False, flat=False)
    rewrite(folder, **{f"base_model.model.{UP}.lora_A.weight_col".replace(".", "__"): torch.zeros(4, 40)})
    with pytest.raises(AdapterError, match=r"misshapen .*up_proj\.spp_beta: adapter \(4, 40\), model needs \(160, 1\)"):
        spp.load_adapter(pruned(), folder)


def test_the_authors_adapters_with_strange_keys_or_no_scaling(tmp_path: Path) -> None:
    folder = tmp_path / "authors"
    authors_adapter(folder, binary=False, flat=False)
    rewrite(folder, base_model__model__x__lora_B__weight=torch.zeros(2, 2))
    with pytest.raises(AdapterError, match=r"unexpected keys.*lora_B"):
        spp.load_adapter(pruned(), folder)
    rewrite(folder, base_model__model__x__lora_B__weight=None)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16}))
    with pytest.raises(CheckpointError, match="scaling"):
        spp.load_adapter(pruned(), folder)


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "authors"
    authors_adapter(folder, binary=True, flat=False)
    good = (folder / "adapter_model.bin").read_bytes()
    torch.save({"a": _Evil()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin .*not loaded"):
        spp.load_adapter(pruned(), folder)
    assert not (tmp_path / "evil-was-here").exists()
    for content in (good[: len(good) // 2], b"", b"not a pickle"):
        (folder / "adapter_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
            spp.load_adapter(pruned(), folder)
    torch.save([1, 2], folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="no mapping"):
        spp.load_adapter(pruned(), folder)
