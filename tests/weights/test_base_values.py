"""An adapter knows the values of its base: what is recorded, what is compared with what, and what is said."""
# public report: an adapter merged into another model with the same zeros: other values

from __future__ import annotations

import copy
import hashlib
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spp
from spp.errors import AdapterError, CheckpointError, SPPWarning
from spp.files import values_sha256
from spp.models.targets import resolve_projections
from spp.weights import base, quantized_kind, read_quantized
from spp.weights.base_values import NOT_COMPARABLE, OTHER, SAME, UNKNOWN, BaseComparison
from spp.wrapping.wrap import adapter_layers, base_verdict
from tests.helpers.models import moe_model, tiny_llama
from tests.helpers.offloading import WAYS
from tests.helpers.quantized import merge_again, quantized_llama, torchao_llama
from tests.wrapping.test_adapters import authors_adapter
from tests.wrapping.test_wrap import assert_untouched, pruned, snapshot, stir

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
Model = Any


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(pruned(), tmp_path / "adapter")


def save(model: nn.Module, path: Path, **options: Any) -> Path:
    return spp.save_adapter(stir(spp.wrap(model, **{"r": 4, "seed": 0, **options})), path)


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return found


def edit(path: Path, **values: Any) -> None:
    (path / "adapter_config.json").write_text(json.dumps({**config_of(path), **values}))


def plain_hash(weight: torch.Tensor, name: str) -> str:
    """What the format says, of a matrix that is one piece."""
    content = hashlib.sha256((weight + 0.0).contiguous().view(torch.uint8).numpy().tobytes()).digest()
    return hashlib.sha256(
        b"spp-values-1" + name.encode() + struct.pack(f"<{weight.dim()}q", *weight.shape) + content
    ).hexdigest()


def scaled(model: Model) -> Model:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(1.5)
    return model


def last_bit(model: Model) -> Model:
    weight = model.get_submodule(UP).weight.data
    kept = weight.view(-1).nonzero()[-1]
    weight.view(torch.int32).view(-1)[kept] ^= 1
    return model


def twins() -> Model:
    """A model two of whose layers have the same zeros and other values."""
    model = pruned()
    one, other = (model.get_submodule(f"model.layers.{i}.mlp.up_proj").weight.data for i in (0, 1))
    other.copy_(one.flip(0).where(one.flip(0) != 0, 1.0).where(one != 0, 0.0))
    return model


def swapped(model: Model) -> Model:
    one, other = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1))
    one.weight, other.weight = other.weight, one.weight
    return model


# What is recorded.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_hash_is_what_the_format_says(dtype: torch.dtype, tmp_path: Path) -> None:
    config = config_of(save(pruned().to(dtype), tmp_path / "adapter"))
    name = str(dtype).removeprefix("torch.")
    weight = pruned().to(dtype).get_submodule(UP).weight.data
    assert config["base_values"][UP] == plain_hash(weight, name)
    assert config["base_values"].keys() == config["base_masks"].keys() == config["base_forms"].keys()
    assert set(config["base_forms"].values()) == {name}


def test_pieces_strides_devices_and_signs_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spp.files.hashes.VALUES_PIECE", 64)
    for shape in [(7, 13), (64, 3), (1, 200), (2, 5, 31), (0, 4), (3, 0, 4)]:
        weight = torch.randn(shape)
        pieces = b"".join(
            hashlib.sha256(part.contiguous().view(torch.uint8).numpy().tobytes()).digest()
            for matrix in (weight if weight.dim() == 3 else [weight])
            for part in (matrix.reshape(-1).split(64) if matrix.numel() else [matrix.reshape(-1)])
        )
        expected = hashlib.sha256(b"spp-values-1float32" + struct.pack(f"<{len(shape)}q", *shape) + pieces).hexdigest()
        assert values_sha256(weight) == expected
        assert values_sha256(weight.mT.contiguous().mT) == expected
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            assert values_sha256(weight) == expected
        if weight.numel():
            assert values_sha256(weight * (1 + 2**-23)) != expected
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert values_sha256(weight) == values_sha256(torch.tensor([[-0.0, 1.0], [2.0, -0.0]]))
    assert values_sha256(weight) != values_sha256(weight.view(1, 4)) != values_sha256(weight.bfloat16())
    assert values_sha256(torch.empty(2, 2, device="meta")) is None


def test_the_storage_of_a_hashed_weight_can_be_resized() -> None:
    weight = torch.randn(64, 64)
    values_sha256(weight)
    weight.untyped_storage().resize_(0)


def test_dense_and_packed_bases_have_the_same_hashes(saved: Path, tmp_path: Path) -> None:
    negative = pruned()
    for layer in negative.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data[layer.weight == 0] = -0.0
    for number, model in enumerate([spp.pack(pruned()), negative]):
        options = {"packed": True} if number == 0 else {}
        assert (
            config_of(save(model, tmp_path / str(number), **options))["base_values"] == config_of(saved)["base_values"]
        )


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_fused_experts(architecture: str, tmp_path: Path) -> None:
    model = moe_model(architecture)
    spp.prune(model, "magnitude", "2:4")
    path = save(copy.deepcopy(model), tmp_path / "adapter", r=2)
    fused = [name for name in config_of(path)["base_values"] if "experts" in name]
    assert fused and config_of(path)["base_values"][fused[0]] == values_sha256(model.get_parameter(fused[0]))
    packed = save(spp.pack(copy.deepcopy(model)), tmp_path / "packed", r=2, packed=True)
    assert config_of(packed)["base_values"] == config_of(path)["base_values"]
    spp.load_adapter(spp.pack(copy.deepcopy(model)), path)
    model.get_parameter(fused[0]).data[1, 3].mul_(2)
    with pytest.warns(SPPWarning, match=rf"1 of \d+ layers, first in {fused[0]}"):
        spp.load_adapter(model, path)


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_base(way: str, saved: Path, tmp_path: Path) -> None:
    offloaded = spp.wrap(WAYS[way](pruned(), tmp_path), r=4, seed=0)
    again = spp.save_adapter(stir(offloaded), tmp_path / "again")
    assert config_of(again)["base_values"] == config_of(saved)["base_values"]
    assert base_verdict(spp.load_adapter(WAYS[way](pruned(), tmp_path / "two"), saved)).state == SAME
    with pytest.warns(SPPWarning, match="14 of 14 layers"):
        spp.load_adapter(WAYS[way](scaled(pruned()), tmp_path / "three"), saved)


# What is said.


@pytest.mark.parametrize(("lie", "layers"), [(scaled, "14 of 14"), (last_bit, "1 of 14"), (swapped, "2 of 14")])
def test_other_values_are_warned_of_and_refused_if_asked(
    lie: Callable[[Model], Model], layers: str, tmp_path: Path
) -> None:
    base = twins()
    path = save(copy.deepcopy(base), tmp_path / "adapter")
    model = lie(copy.deepcopy(base))
    before = snapshot(model)
    with pytest.raises(AdapterError, match=rf"values are not those that {path} was trained on.* {layers} layers"):
        spp.load_adapter(model, path, strict_values=True)
    assert_untouched(model, before)
    edit(path, base_model_name_or_path="the/base")
    first = "model.layers.0.mlp.down_proj" if lie is scaled else UP
    with pytest.warns(SPPWarning, match=rf"{layers} layers, first in {first}; .*belongs to the/base") as caught:
        spp.load_adapter(model, path)
    assert len(caught) == 1
    assert base_verdict(model).state == OTHER
    report = spp.merge(model)
    assert report.base.state == report.to_dict()["base_values"] == OTHER
    assert layers in report.to_dict()["base_values_note"]


def test_the_same_base_is_silent(saved: Path) -> None:
    for model in (pruned(), spp.pack(pruned()), spp.wrap(pruned(), r=4)):
        spp.load_adapter(model, saved, strict_values=True)
        assert spp.merge(model).base.state == SAME
    assert spp.merge(stir(spp.wrap(pruned(), r=4))).base.state == SAME


def test_other_zeros_are_said_once(saved: Path) -> None:
    model = pruned()
    row = model.get_submodule(UP).weight.data[3]
    row[int(row.nonzero()[0])] = 0
    with pytest.warns(SPPWarning, match="zeros of the base differ") as caught:
        spp.load_adapter(model, saved, strict=False)
    assert len(caught) == 1 and base_verdict(model).state == OTHER


def test_edited_hashes_are_noticed(saved: Path) -> None:
    values = config_of(saved)["base_values"]
    edit(saved, base_values={**values, UP: "0" * 64})
    with pytest.warns(SPPWarning, match=rf"1 of 14 layers, first in {UP}"):
        spp.load_adapter(pruned(), saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_values": ["a"]}, "base_values must map"),
        ({"base_values": "0" * 64}, "base_values must map"),
        ({"base_values": {UP: 7}}, "base_values must map"),
        ({"base_values": {UP: "0" * 63}}, f".*64 hexadecimal digits .*{UP}"),
        ({"base_values": {UP: "g" * 64}}, f".*64 hexadecimal digits .*{UP}"),
        ({"base_values": {UP: "0" * 64}}, "base_values and base_forms name other layers"),
        ({"base_values": None}, "base_values must map"),
        ({"base_forms": None}, "base_forms must map"),
        ({"base_forms": {UP: 1}}, "base_forms must map"),
    ],
)
def test_malformed_fields(changes: dict[str, Any], message: str, saved: Path) -> None:
    edit(saved, **changes)
    model = pruned()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        spp.load_adapter(model, saved)
    assert_untouched(model, before)


def test_older_adapters_and_the_authors_load_without_a_word(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(saved)
    del config["base_values"], config["base_forms"]
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, "spp"):
        model = spp.load_adapter(scaled(pruned()), saved, strict_values=True)
    assert base_verdict(model).state == UNKNOWN and "base's values" not in caplog.text
    assert spp.merge(model).to_dict()["base_values"] == UNKNOWN
    authors_adapter(tmp_path / "authors", binary=False, flat=False)
    assert base_verdict(spp.load_adapter(pruned(), tmp_path / "authors")).state == UNKNOWN


def test_a_model_without_values_is_unknown(saved: Path) -> None:
    with torch.device("meta"):
        model = tiny_llama()
    assert base_verdict(spp.load_adapter(model, saved)).state == UNKNOWN


# Like with like.

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("trained", "here", "state"),
    [
        ([F32], [F32], SAME),
        ([BF16], [F32], SAME),  # loaded in bfloat16 from a float32 checkpoint, and that one is at hand
        ([F16], [F32], SAME),
        ([BF16, F32], [BF16], SAME),  # trained in float32, loaded from the bfloat16 checkpoint at hand
        ([BF16], [BF16, F32], SAME),
        ([BF16], [torch.float64], SAME),
        ([F32], [BF16], NOT_COMPARABLE),
        ([F32], [F16], NOT_COMPARABLE),
        ([F16], [BF16], NOT_COMPARABLE),
        ([torch.float64], [F32], SAME),  # of what was float32 before
    ],
)
def test_dtypes(
    trained: list[torch.dtype],
    here: list[torch.dtype],
    state: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, model, other = pruned(), pruned(), scaled(pruned())
    for dtype in trained:
        base = base.to(dtype)
    for dtype in here:
        model, other = model.to(dtype), other.to(dtype)
    path = save(base, tmp_path / "adapter")
    with caplog.at_level(logging.INFO, "spp"):
        assert base_verdict(spp.load_adapter(model, path, strict_values=True)).state == state
    forms = f"trained on {config_of(path)['base_forms'][UP]}, this one is "
    assert (forms in caplog.text) == (state == NOT_COMPARABLE)
    if torch.promote_types(trained[-1], here[-1]) == here[-1]:
        with pytest.raises(AdapterError, match="14 of 14 layers"):
            spp.load_adapter(other, path, strict_values=True)
    else:  # what is at hand could not hold what was trained on
        spp.load_adapter(other, path, strict_values=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_quantized_bases(form: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = save(quantized_llama(form), tmp_path / "adapter")
    said = "int8 by rows" if form == "int8" else f"{form} in blocks of 64"
    assert set(config_of(path)["base_forms"].values()) == {said}
    model = spp.load_adapter(quantized_llama(form), path, strict_values=True)
    assert base_verdict(model).state == SAME
    report, said_of_it = merge_again(spp.load_adapter(model, path))
    assert report.base.state == SAME
    assert [("too coarse" in text) for text in said_of_it] == ([] if form == "int8" else [True])
    other = quantized_llama(form)
    linear = other.get_submodule(UP)
    if form == "int8":
        (linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB).mul_(1.5)
    else:
        linear.weight.quant_state.absmax.mul_(1.5)
    with pytest.warns(SPPWarning, match=rf"1 of 14 layers, first in {UP}"):
        spp.load_adapter(other, path)
    comparison = BaseComparison(config_of(path)["base_values"], config_of(path)["base_forms"])
    for name in config_of(path)["base_values"]:
        comparison.add_held(name, resolve_projections(pruned())[name].held())
    assert comparison.verdict().state == NOT_COMPARABLE
    assert comparison.verdict().note == f"trained on {said}, this one is float32"


@pytest.mark.parametrize("form", ["int8", "int4 group", "int4 asymmetric"])
def test_bases_that_torchao_quantized(form: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    path = save(torchao_llama(form), tmp_path / "adapter")
    assert config_of(path)["base_forms"][UP].startswith("codes from -")
    assert base_verdict(spp.load_adapter(torchao_llama(form), path, strict_values=True)).state == SAME
    other = spp.wrap(torchao_llama(form), r=4)
    adapter_layers(other)[UP].held().scale_bits.add_(1 << 20)  # of the mantissa
    with pytest.raises(AdapterError, match=f"1 of 14 layers, first in {UP}"):
        spp.load_adapter(other, path, strict_values=True)


def test_nested_scales_that_bitsandbytes_has_taken_apart(tmp_path: Path) -> None:
    """In the first evaluation it may put a weight in another order, with the scales alone, rounded to bfloat16."""
    pytest.importorskip("bitsandbytes")
    path = save(quantized_llama("nf4", nested=True), tmp_path / "adapter")
    model = quantized_llama("nf4", nested=True)
    for module in model.modules():
        if quantized_kind(module):
            state = module.weight.quant_state
            whole = read_quantized(module, "layer").scales()
            state.absmax, state.nested, state.state2 = whole.bfloat16().float(), False, None
    assert base_verdict(spp.load_adapter(model, path, strict_values=True)).state == SAME


def test_a_dense_adapter_on_a_quantized_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    path = save(pruned(), tmp_path / "adapter")
    edit(path, base_masks=config_of(save(quantized_llama("nf4"), tmp_path / "quantized"))["base_masks"])
    with caplog.at_level(logging.INFO, "spp"):
        model = spp.load_adapter(quantized_llama("nf4"), path, strict_values=True)
    assert base_verdict(model).state == NOT_COMPARABLE
    assert "trained on float32, this one is nf4 in blocks of 64" in caplog.text


def test_a_form_that_is_not_known_here(saved: Path) -> None:
    edit(saved, base_forms=dict.fromkeys(config_of(saved)["base_values"], "mxfp4"))
    assert base_verdict(spp.load_adapter(scaled(pruned()), saved)).note == "trained on mxfp4, this one is float32"


# What a save costs.


class Counted:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(base, "values_sha256", self)

    def __call__(self, *arguments: Any) -> str | None:
        self.calls += 1
        return values_sha256(*arguments)


def test_a_second_save_hashes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Counted(monkeypatch)
    model = stir(spp.wrap(pruned(), r=4, seed=0))
    for number in range(3):
        spp.save_adapter(model, tmp_path / str(number))
    assert count.calls == 14
    spp.load_adapter(spp.unwrap(model), tmp_path / "0")
    assert count.calls == 14


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(2),
        lambda t: t.data.mul_(2),
        lambda t: setattr(t, "data", t.data * 2),
        lambda t: t.view(-1)[-1:].add_(1),
    ],
)
def test_a_write_is_noticed(write: Callable[[torch.Tensor], Any], packed: bool, tmp_path: Path) -> None:
    model = stir(spp.wrap(spp.pack(pruned()) if packed else pruned(), r=4, seed=0, packed=packed))
    before = config_of(spp.save_adapter(model, tmp_path / "before"))["base_values"]
    layer = adapter_layers(model)[DOWN]
    with torch.no_grad():
        write(layer.stored_weight)
    after = config_of(spp.save_adapter(model, tmp_path / "after"))["base_values"]
    assert [path for path in before if before[path] != after[path]] == [DOWN]
    assert after[DOWN] == values_sha256(layer.weight)


def test_weights_of_inference_mode_are_hashed_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Counted(monkeypatch)
    with torch.inference_mode():
        model = pruned()
    model = stir(spp.wrap(model, r=4, seed=0))
    for number in range(2):
        spp.save_adapter(model, tmp_path / str(number))
    assert count.calls == 28
