"""to_semi_structured: what it refuses, what it chooses, and that torch's form of 2:4 holds our weights exactly.

There is no GPU here: the device, the conversion and the clock are given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spp
from benchmarks import gpu_checks
from spp.errors import ConfigError, TargetError, WrapError
from spp.packing import semi_structured
from tests.helpers.models import moe_model, prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Sparse(Tensor):
    """Stands for torch's tensor: the dense one by another class."""


def pruned(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return prune_nm_(tiny_llama(**options)).to(dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that is none: {(m, n): seconds of the sparse product}, that of a dense one being 1, and the calls timed."""
    times: dict[str, Any] = {"timed": []}

    def require(devices: set[torch.device]) -> torch.device:
        assert devices
        return torch.device("cpu")

    def timer(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
        out = {name: call() for name, call in calls.items()}
        assert torch.equal(out["dense"], out["sparse"].as_subclass(Tensor))
        m = out["dense"].shape[1]
        times["timed"].append((m, len(out["dense"])))
        sparse = times.get(m, 0.5)
        return {"dense": [1.0, 2.0, 1.0], "sparse": [sparse, 2 * sparse, 9.0]}

    monkeypatch.setattr(semi_structured, "_require_gpu", require)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(semi_structured, "_time", timer)
    monkeypatch.setattr(semi_structured, "_convert", lambda weight: weight.detach().clone().as_subclass(Sparse))
    return times


def sparse_layers(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(getattr(module, "weight", None), Sparse)}


def test_the_faster_form_of_each_shape_stays(gpu: dict[str, Any]) -> None:
    gpu[32] = 1.25  # k_proj and v_proj: the dense product is faster
    model, expected = pruned(), pruned()
    report = spp.to_semi_structured(model, tokens=7)
    assert gpu["timed"] == [(64, 7), (32, 7), (160, 7), (64, 7)]  # once a shape
    found = {timing.shape: timing for timing in report.timings}
    assert found.keys() == {(64, 64), (32, 64), (160, 64), (64, 160)}
    assert {shape: t.layers for shape, t in found.items()} == {(64, 64): 4, (32, 64): 4, (160, 64): 4, (64, 160): 2}
    one = found[(64, 64)]
    assert (one.dense_seconds, one.sparse_seconds, one.ratio, one.sparse) == (1.0, 1.0, 0.5, True)
    assert found[(32, 64)].ratio == 1.25 and not found[(32, 64)].sparse
    assert set(report.dense) == {f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1) for k in "kv"}
    assert set(report.dense.values()) == {"the dense product is faster: sparse / dense 1.25"}
    layers = sparse_layers(model)
    assert len(layers) == report.converted == 10 and not layers & report.dense.keys()
    assert all(not p.requires_grad for n, p in model.named_parameters() if n.removesuffix(".weight") in layers)
    for key, tensor in expected.state_dict().items():
        assert_same_bits(model.state_dict()[key].as_subclass(Tensor), tensor, key)
    assert "10 layers sparse, 4 dense" in repr(report) and "64×64: 0.50" in repr(report)
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["device"], values["tokens"], values["converted"]) == ("a GPU", 7, 10)
    assert values["timings"][0]["shape"] == [64, 64]


def test_all_can_be_kept(gpu: dict[str, Any]) -> None:
    gpu[32] = 3.0
    model = pruned()
    report = spp.to_semi_structured(model, keep="all")
    assert report.converted == 14 and report.dense == {} and len(sparse_layers(model)) == 14
    assert {t.ratio for t in report.timings} == {0.5, 3.0} and all(t.sparse for t in report.timings)


def test_what_does_not_fit_stays_dense_and_is_named(gpu: dict[str, Any]) -> None:
    model = pruned()
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        layer.q_proj.weight.fill_(1)
        layer.k_proj.weight[:, 2:4] = 1
        layer.v_proj.weight.zero_()  # 2:4 as well
        layer.o_proj.float()
    report = spp.to_semi_structured(model, keep="all")
    assert report.dense == {
        "model.layers.0.self_attn.q_proj": "its zeros are not 2:4 (dense)",
        "model.layers.0.self_attn.k_proj": "its zeros are not 2:4 (unstructured)",
        "model.layers.0.self_attn.o_proj": "float32 weights have no 2:4 product; float16 and bfloat16 have",
    }
    assert "model.layers.0.self_attn.v_proj" in sparse_layers(model) and len(sparse_layers(model)) == 11


def test_what_is_no_plain_linear_stays_dense_and_is_named(gpu: dict[str, Any]) -> None:
    model = moe_model("mixtral").bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name:
                parameter[:, ::2] = 0
    report = spp.to_semi_structured(model, keep="all")
    experts = [path for path in report.dense if ".experts." in path]
    assert experts and all("no plain torch.nn.Linear, but a MixtralExperts" in report.dense[path] for path in experts)
    assert report.converted == len(sparse_layers(model)) == 8


def test_a_conversion_that_fails_or_lies_stays_dense(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(weight: Tensor) -> Tensor:
        raise NotImplementedError("_cslt_compress: not there\nat all")

    for convert, reason in (
        (fails, "torch does not take it: NotImplementedError: _cslt_compress: not there"),
        (lambda weight: (weight * 1.1).as_subclass(Sparse), "its sparse product is wrong on this device"),
        (lambda weight: (weight * float("nan")).as_subclass(Sparse), "its sparse product is wrong on this device"),
    ):
        monkeypatch.setattr(semi_structured, "_convert", convert)
        model = pruned()
        report = spp.to_semi_structured(model, keep="all")
        assert set(report.dense.values()) == {reason} and report.timings == () and report.converted == 0
        assert not sparse_layers(model) and "save_pretrained" not in vars(model)


def test_it_cannot_be_saved_afterwards(gpu: dict[str, Any], tmp_path: Path) -> None:
    model = pruned()
    spp.to_semi_structured(model)
    for save in (model.save_pretrained, lambda path: spp.save_model(model, path)):
        with pytest.raises(WrapError, match="semi-structured tensors, which no checkpoint holds"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", [(1, 4), (2, 8), (1, 2), (4, 8)], ids=str)
def test_other_patterns(gpu: dict[str, Any], pattern: tuple[int, int]) -> None:
    model = prune_nm_(tiny_llama(), *pattern).bfloat16()
    if pattern == (4, 8):
        with pytest.raises(ConfigError, match=r"none of the 14 target weights.*\n  its zeros are not 2:4 \(4:8\): 14"):
            spp.to_semi_structured(model)
        return
    assert spp.to_semi_structured(model).converted == 14  # the others are 2:4 as well


def test_models_in_the_wrong_state(gpu: dict[str, Any]) -> None:
    with pytest.raises(WrapError, match=r"merge first, spp\.merge"):
        spp.to_semi_structured(spp.wrap(pruned(), r=2))
    with pytest.raises(WrapError, match=r"spp\.unpack"):
        spp.to_semi_structured(spp.pack(pruned()))
    with pytest.raises(ConfigError, match=r"float32 weights have no 2:4 product; float16 and bfloat16 have: 14"):
        spp.to_semi_structured(pruned(torch.float32))
    with pytest.raises(TargetError, match="nope"):
        spp.to_semi_structured(pruned(), target_modules=["nope"])
    for options, message in (
        ({"keep": "some"}, "faster, all"),
        ({"tokens": 0}, "at least 1"),
        ({"tokens": 2.5}, "2.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            spp.to_semi_structured(pruned(), **options)
    assert gpu["timed"] == []


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = pruned(), pruned().state_dict()
    with pytest.raises(ConfigError, match=r"are on cpu: torch's 2:4 products need one NVIDIA.*model\.to\('cuda'\)"):
        spp.to_semi_structured(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    cuda = torch.device("cuda", 0)
    require = semi_structured._require_gpu
    with pytest.raises(ConfigError, match=r"on cpu, cuda:0: .* need one NVIDIA GPU"):
        require({cuda, torch.device("cpu")})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for cuda_version, capability in ((None, (9, 0)), ("13.0", (7, 0))):
        monkeypatch.setattr(torch.version, "cuda", cuda_version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ConfigError, match=r"are on Tesla V100: .* 8\.0 \(Ampere\) or later"):
            require({cuda})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert require({cuda}) == cuda


def test_turns_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("|"))
    found = semi_structured._time({name: lambda name=name: calls.append(name) for name in "ds"}, torch.device("cuda"))
    turn = "|" + "d" * 10 + "||" + "s" * 10 + "|"
    assert "".join(calls) == turn * 8  # one to warm up
    assert {name: len(times) for name, times in found.items()} == {"d": 7, "s": 7}
    assert all(time > 0 for times in found.values() for time in times)


@WITHOUT_GPU
def test_torch_itself_refuses_a_cpu() -> None:
    weight = torch.tensor([1.0, 0, 0, 1]).repeat(64, 16).half()
    with pytest.raises(ConfigError, match=r"torch does not take it: RuntimeError: .*CUDA"):
        semi_structured.sparse_weight(weight, torch.randn(4, 64).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_compressed_form_holds_our_weights(dtype: torch.dtype) -> None:
    """Half the values and two bits for each, made on the CPU: what decompresses has our bits, so every zero is one."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    model = pruned(dtype)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        weight = model.get_submodule(path).weight.detach().clone()
        weight[:, :4] = 0  # groups that keep none
        assert semi_structured._unsuited(path, model.get_submodule(path)) is None
        kept, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert kept.shape == (weight.shape[0], weight.shape[1] // 2)
        dense = sparse_semi_structured_to_dense_cutlass(kept, meta)
        assert_same_bits(dense, weight, path)


def test_the_gpu_scripts_check_passes_and_fails(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = gpu_checks.Layer(("2:4", 32, 64, 2, 5), torch.float16, torch.device("cpu"))
    found = list(gpu_checks.semi_structured_checks(layer))
    assert [check.what for check in found] == ["layers that are not semi-structured", "X Wᵀ, semi-structured"]
    assert all(check.passed for check in found)
    monkeypatch.setattr(semi_structured, "_TOLERANCE", 2.0)
    monkeypatch.setattr(semi_structured, "_convert", lambda weight: (weight * 1.1).as_subclass(Sparse))
    monkeypatch.setattr(semi_structured, "_time", lambda calls, device: {name: [1.0] for name in calls})
    assert [check.passed for check in gpu_checks.semi_structured_checks(layer)] == [True, False]
    monkeypatch.setattr(semi_structured, "_TOLERANCE", 0.02)
    assert not next(gpu_checks.semi_structured_checks(layer)).passed
    single = gpu_checks.Layer(("2:4", 32, 64, 2, 5), torch.float32, torch.device("cpu"))
    assert list(gpu_checks.semi_structured_checks(single)) == []


def test_such_a_weight_is_not_adapted() -> None:
    """Torch's own class, whose constructor needs no GPU."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS as Cutlass
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    model = pruned()
    layer = model.model.layers[0].self_attn.q_proj
    kept, meta = sparse_semi_structured_from_dense_cutlass(layer.weight.detach())
    with semi_structured.warnings.catch_warnings():
        semi_structured.warnings.simplefilter("ignore")
        sparse = Cutlass(layer.weight.shape, kept, meta, None, None, None)
    layer.weight = nn.Parameter(sparse, requires_grad=False)
    with pytest.raises(TargetError, match=r"q_proj\.weight is a semi-structured tensor, for inference only"):
        spp.wrap(model, r=2)
