"""A format of another tool is named wherever it is met, with what can be done; what can be decoded is verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spp
from spp.certifying.verify import examine
from spp.errors import CheckpointError, ConfigError, MaskError, SPPError, SPPWarning, TargetError
from spp.files import write_json
from spp.files.formats import format_of, other_weights, pickled
from spp.training.loading import load_model
from tests.helpers.formats import FORMATS, store
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.quantized import FORMS as OF_BITSANDBYTES
from tests.helpers.quantized import own_dense, quantized_llama
from tests.wrapping.test_wrap import stir

Q0 = "model.layers.0.self_attn.q_proj"

# What messages call each format, as config.json names it; and where that does not, as far as tensors tell.
NAMES = {
    "gptq": ("GPTQ, 4 bits", "GPTQ"),
    "awq": ("AWQ, 4 bits", "GPTQ or AWQ"),
    "fp8": ("fp8", "fp8"),
    "float-quantized": ("compressed-tensors, float-quantized", "fp8"),
    "int-quantized": ("compressed-tensors, int-quantized", "weight, weight_scale"),
    "pack-quantized": ("compressed-tensors, pack-quantized", "compressed-tensors"),
    "nvfp4-pack-quantized": ("compressed-tensors, nvfp4-pack-quantized", "compressed-tensors"),
    "sparse-bitmask": ("compressed-tensors, sparse-bitmask", "compressed-tensors, sparse"),
    "sparse-24-bitmask": ("compressed-tensors, sparse-24-bitmask", "compressed-tensors, sparse"),
    "mlx": ("MLX, 4 bits", "biases, scales, weight"),
    "torchao": ("torchao", "torchao"),
    "hqq": ("HQQ", "HQQ"),
    "bitnet": ("bitnet", "weight, weight_scale"),
    "eetq": ("eetq", "weight, weight_scales"),
    "modelopt": ("ModelOpt, NVFP4", "weight_packed"),
    "bnb4": ("bitsandbytes, nf4", "bitsandbytes, 4 bits"),
    "bnb8": ("bitsandbytes, 8 bits", "bitsandbytes, 8 bits"),
}
COMPRESSED = ("sparse-bitmask", "sparse-24-bitmask")  # verify reads these too, and they are what was stored
DECODED = ("gptq", "awq", "fp8", "float-quantized", "bnb8")  # verify reads these, and finds what is crafted wrong

CALLS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "verify": lambda base, folder, out: spp.verify(base, folder),
    "verify alone": lambda base, folder, out: spp.verify(folder),
    "certify": lambda base, folder, out: spp.certify(folder),
    "sparsity": lambda base, folder, out: spp.sparsity(folder),
    "prune": lambda base, folder, out: spp.prune_checkpoint(folder, out, "magnitude"),
    "export": lambda base, folder, out: spp.export_packed(folder, out),
    "export dense": lambda base, folder, out: spp.export_dense(folder, out),
    "load packed": lambda base, folder, out: spp.load_packed(folder),
    "merge": lambda base, folder, out: spp.merge_checkpoint(folder, base / "adapter", out),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint, and in it the folder of an adapter of it."""
    folder = spp.save_model(prune_nm_(tiny_llama(intermediate_size=128)), tmp_path_factory.mktemp("models") / "base")
    spp.save_adapter(stir(spp.wrap(prune_nm_(tiny_llama(intermediate_size=128)), r=2, seed=0)), folder / "adapter")
    return folder


@pytest.mark.sampled(4)
@pytest.mark.parametrize("config", [True, False], ids=["said", "not said"])
@pytest.mark.parametrize("name", list(NAMES))
def test_every_function_names_it(base: Path, tmp_path: Path, name: str, config: bool) -> None:
    folder, out = store(base, tmp_path / "checkpoint", name, config=config), tmp_path / "out"
    for call, function in CALLS.items():
        if call == "verify" and name in COMPRESSED:
            assert function(base, folder, out).sparsity == spp.sparsity(base).sparsity
            continue
        if call == "verify" and name in DECODED and (config or name not in ("gptq", "awq")):
            with pytest.raises((MaskError, CheckpointError), match=r"quantized as (GPTQ|AWQ|float8|int8)"):
                function(base, folder, out)
            continue
        with pytest.raises(SPPError) as raised:
            function(base, folder, out)
        said = str(raised.value)
        assert NAMES[name][not config] in said, (call, said)
        assert "quantiz" in said or "compress" in said, (call, said)
        assert "it was made from" in said or "this one was" in said, (call, said)
        if config:
            key = next(iter(FORMATS[name][1]))
            assert f"{key} of config.json" in said, (call, said)
            remedy = {"mlx": "--dequantize", **dict.fromkeys(COMPRESSED, "spp.convert(dir, out) does")}
            assert remedy.get(name, "spp.save_model") in said, (call, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    assert not (folder / "sparsity.json").exists()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["fp8", "int-quantized", "bnb8"])
def test_codes_of_the_right_shape_are_not_loaded_as_weights(base: Path, tmp_path: Path, name: str) -> None:
    folder = store(base, tmp_path / "checkpoint", name, config=False)
    with pytest.raises(CheckpointError, match=r"the projections of .* cannot be read: 14 stored as"):
        load_model(folder)


def test_a_part_that_is_quantized_is_not_taken_for_all(base: Path, tmp_path: Path) -> None:
    folder = store(base, tmp_path / "checkpoint", "sparse-bitmask", only="q_proj.weight")
    with pytest.warns(SPPWarning, match="the zeros of 2 projections cannot be read"):
        assert len(spp.sparsity(folder).tensors) == 12
    for call in ("certify", "merge"):
        with pytest.raises(CheckpointError, match=r"2 of its 14 projections cannot be read.*sparse-bitmask"):
            CALLS[call](base, folder, tmp_path / "out")
    assert spp.verify(base, folder).sparsity == 0.5
    folder = store(base, tmp_path / "packed", "pack-quantized", only="q_proj.weight")
    with pytest.raises(MaskError, match=r"q_proj\.weight: only in .*stored as weight_packed"):
        spp.verify(base, folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes_4bit", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.5}}, "exl2"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "AWQ, 4 bits"),
        ({"quantization_config": {}}, "a method without a name"),
        ({"quantization_config": "?"}, "a method without a name"),
        ({"compression_config": {"format": "marlin-24", "config_groups": {}}}, "compressed-tensors, marlin-24"),
    ],
)
def test_configs(config: dict[str, Any], name: str) -> None:
    found = format_of(config)
    assert found is not None and found.name == name and not found.compressed
    assert format_of({"quantization_config": None, "quantization": "none", "hidden_size": 4}) is None


def test_what_only_modelopts_file_says(base: Path, tmp_path: Path) -> None:
    folder = store(base, tmp_path / "checkpoint", "modelopt", config=False)
    write_json(folder / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    with pytest.raises(CheckpointError, match=r"quantized as ModelOpt, NVFP4 \(hf_quant_config\.json\)"):
        spp.certify(folder)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pytorch_model.bin", r"pickled checkpoints are not read; convert it once: .*save_pretrained\(out\)"),
        ("pytorch_model-00001-of-00002.bin", "pickled checkpoints are not read; convert it once"),
        ("model-Q4_K_M.gguf", "only model-Q4_K_M.gguf: GGUF, quantized or not, is not read; .* as its gguf_file"),
        ("tf_model.h5", "TensorFlow's weights, which are not read; convert it"),
        ("consolidated.safetensors", "weights under the names of their authors' own code"),
    ],
)
def test_directories_without_safetensors(base: Path, tmp_path: Path, file: str, says: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "adapter"))
    (folder / file).write_bytes(b"?")
    (folder / "training_args.bin").write_bytes(b"?")
    for call, function in CALLS.items():
        with pytest.raises(SPPError, match=says):
            function(base, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists(), call
    (folder / file).unlink()
    assert pickled(folder) is None and other_weights(folder) is None


# ---- What can be decoded: a mask that survived quantization is proved, and one that did not is not.


def quantized_directory(folder: Path, model: nn.Module, form: str) -> Path:
    """A checkpoint of a model that bitsandbytes quantized."""
    folder.mkdir()
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, folder / "model.safetensors")
    said = {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": form}
    write_json(folder / "config.json", {"quantization_config": {"quant_method": "bitsandbytes", **said}})
    return folder


@pytest.mark.sampled(1)
@pytest.mark.parametrize("options", OF_BITSANDBYTES, ids=str)
def test_a_mask_that_survived_quantization(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, quantized = prune_nm_(tiny_llama()), quantized_llama(**options)
    before = spp.save_model(plain, tmp_path / "before")
    after = quantized_directory(tmp_path / "after", quantized, options["form"])
    zeros = {name: module for name, module in quantized.named_modules() if name.endswith("_proj")}
    more = sum(int(((own_dense(m) == 0) & (plain.get_submodule(n).weight != 0)).sum()) for n, m in zeros.items())
    for one in (before, plain):
        for other in (after, quantized):
            report = spp.verify(one, other, more_zeros_allowed=True)
            assert (report.zeros_added, len(report.tensors)) == (more, 14)
    assert spp.verify(after, quantized).sparsity == spp.verify(quantized, after).sparsity
    wrapped = spp.wrap(quantized, r=2)
    assert spp.verify(before, wrapped, more_zeros_allowed=True).zeros_added == more
    assert set(examine(before, wrapped).survival.values()) == set(examine(before, after).survival.values())
    assert more > 0 or options["form"] != "nf4"
    if more:
        with pytest.raises(MaskError, match=r"0 became non-zero, \d+ became zero \(quantized as \w+\)") as raised:
            spp.verify(before, after)
        assert "No zero was lost: all survived the quantization" in str(
            raised.value
        ) and "more_zeros_allowed=True" in str(raised.value)
    found = examine(before, after).survival
    assert len(found) == 14 and sum(one.more for one in found.values()) == more
    for key, one in found.items():
        assert one.zeros == one.survived == plain.get_parameter(key).numel() // 2


@pytest.mark.sampled(1)
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_zeros_that_came_back(tmp_path: Path, form: str) -> None:
    before = spp.save_model(prune_nm_(tiny_llama()), tmp_path / "before")
    model = quantized_llama(form)
    codes = model.get_submodule(Q0).weight.data
    if form == "nf4":  # two codes a byte, code 7 is zero
        place = int((codes.view(-1) >> 4 == 7).nonzero()[0])
        codes.view(-1)[place] |= 0xF0
    else:
        codes.view(-1)[int((codes.view(-1) == 0).nonzero()[0])] = 1
    after = quantized_directory(tmp_path / "after", model, form)
    for other in (after, model):
        with pytest.raises(MaskError, match=rf"{Q0}\.weight: 1 became non-zero") as raised:
            spp.verify(before, other, more_zeros_allowed=True)
        assert "in 1 tensor" in str(raised.value)
    one = examine(before, after).survival[f"{Q0}.weight"]
    assert (one.zeros, one.survived) == (2048, 2047)


def test_zeros_of_float8(base: Path, tmp_path: Path) -> None:
    folder = store(base, tmp_path / "fp8", "fp8")
    tensors = load_file(folder / "model.safetensors")
    key = f"{Q0}.weight"
    report = spp.verify(base, folder, more_zeros_allowed=True)
    lost = sum(int((t.float() == 0).sum()) for k, t in tensors.items() if t.dtype == torch.float8_e4m3fn)
    assert report.zeros_added == lost - sum(one.zeros for one in spp.sparsity(base).tensors.values())
    tensors[key].view(torch.uint8)[0, int((tensors[key][0].float() == 0).nonzero()[0])] = 1  # the least magnitude
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MaskError, match=rf"{key}: 1 became non-zero, .*\(quantized as float8\)"):
        spp.verify(base, folder, more_zeros_allowed=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}], ids=str
)
def test_what_transformers_saves(tmp_path: Path, options: dict[str, Any]) -> None:
    # A checkpoint that transformers quantized is verified; loaded again, merged or dequantized, it can be saved, though
    # what transformers 5 notes of loading it has no way back.
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    before = spp.save_model(prune_nm_(tiny_llama()), tmp_path / "before")
    settings = BitsAndBytesConfig(**options)
    AutoModelForCausalLM.from_pretrained(before, quantization_config=settings).save_pretrained(tmp_path / "after")
    report = spp.verify(before, tmp_path / "after", more_zeros_allowed=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert spp.verify(tmp_path / "after", model).sparsity == report.sparsity
    with pytest.raises(CheckpointError, match=r"the model is quantized .*dequantize"):
        spp.save_model(model, tmp_path / "no")
    spp.merge(stir(spp.wrap(model, r=2, seed=0)))
    assert spp.verify(tmp_path / "after", spp.save_model(model, tmp_path / "merged")).sparsity == report.sparsity
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "after").dequantize()
    spp.save_model(plain, tmp_path / "plain")
    assert spp.verify(tmp_path / "plain", tmp_path / "after").sparsity == report.sparsity
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


# ---- Models in memory.


class TorchQuantLinear(nn.Module):
    """A linear as GPTQ's libraries have them: codes, and no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name in ("qweight", "qzeros", "g_idx"):
            self.register_buffer(name, torch.ones(8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(2, linear.out_features))


class CompressedLinear(nn.Linear):
    """A linear as compressed-tensors has them: packed codes in the place of the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        del self.weight
        self.weight_packed = nn.Parameter(torch.ones(8, 8, dtype=torch.int32), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(8, 1))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("some", [True, False], ids=["some", "all"])
@pytest.mark.parametrize("kind", [TorchQuantLinear, CompressedLinear])
def test_modules_of_other_tools(kind: type[nn.Module], some: bool) -> None:
    model = prune_nm_(tiny_llama())
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp)[: 1 if some else 2]:
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, kind(linear))
    count = 8 if some else 14
    called = "GPTQ" if kind is TorchQuantLinear else "compressed-tensors"
    functions: tuple[Callable[[Any], Any], ...] = (
        spp.wrap,
        spp.pack,
        lambda m: spp.prune(m, "magnitude", "2:4"),
        lambda m: spp.wrap(m, target_modules=["q_proj", "up_proj"]),
    )
    for function in functions:
        with pytest.raises((TargetError, ConfigError), match=rf"\({called}\), in a {kind.__name__}.*bitsandbytes"):
            function(model)
    if some:
        spp.unwrap(spp.wrap(model, target_modules=["up_proj", "down_proj"], r=2))  # the plain ones alone
        with pytest.warns(SPPWarning, match=rf"zeros of {count} projections .*\({called}\), in a {kind.__name__}"):
            assert len(spp.sparsity(model).tensors) == 14 - count
    else:
        with pytest.raises(TargetError, match=rf"14 stored as .*\({called}\), in a {kind.__name__}.*bitsandbytes"):
            spp.sparsity(model)
    with pytest.raises((TargetError, MaskError), match=called):
        spp.verify(prune_nm_(tiny_llama()), model)
