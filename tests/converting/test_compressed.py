"""Compressed checkpoints come out dense, bit for bit what was compressed; what is damaged or quantized is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import spp
from spp.certifying.certificate import Certificate
from spp.errors import CheckpointError, ConfigError, OutputExistsError, SPPError
from spp.files import CheckpointReader, read_json, save_tensors, write_json
from spp.files.carry import CERTIFICATE_NAME
from tests.helpers.checkpoints import tensors_of
from tests.helpers.formats import FORMATS, store
from tests.helpers.models import prune_nm_, tiny_llama
from tests.helpers.tolerances import assert_same_bits

FILES = Path(__file__).parents[1] / "fixtures" / "compressed-tensors-0.9.4"  # which that version wrote, and what it had
NAMES = ("sparse-bitmask", "sparse-24-bitmask")
Q0 = "model.layers.0.self_attn.q_proj"
DOWN0 = "model.layers.0.mlp.down_proj"
Change = Callable[[dict[str, Tensor]], Any]


def changed(tmp_path: Path, name: str, change: Change) -> Path:
    """A copy of a golden checkpoint, its tensors changed."""
    folder = tmp_path / "changed"
    shutil.copytree(FILES / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(tmp_path: Path, error: type[SPPError], match: str, source: Path, **options: Any) -> None:
    """A conversion is refused, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        spp.convert(source, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", NAMES)
def test_what_the_library_wrote(name: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for file in (FILES / name).iterdir():
        shutil.copy(file, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    report = spp.convert(tmp_path / "source", tmp_path / "out")
    wanted, found = load_file(FILES / f"{name}.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert_same_bits(found[key], tensor, key)
    for key, one in report.tensors.items():
        assert one.zeros == int((wanted[key] == 0).sum()) and one.sparsity > 0.4, key
    assert len(report.tensors) == 7 and (name == NAMES[0] or report.pattern == "2:4")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", CERTIFICATE_NAME, "tokenizer.json")
    ]
    config = read_json(FILES / name / "config.json", "config")
    del config["compression_config" if name == NAMES[0] else "quantization_config"]
    assert read_json(tmp_path / "out" / "config.json", "config") == config
    assert spp.verify(tmp_path / "out").sparsity == report.sparsity
    assert spp.verify(FILES / name, tmp_path / "out").sparsity == report.sparsity  # read as it is compressed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same_bits(model.get_parameter(f"{DOWN0}.weight"), wanted[f"{DOWN0}.weight"], "loaded")
    with pytest.raises(OutputExistsError):
        spp.convert(FILES / name, tmp_path / "out")
    spp.convert(FILES / name, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_and_older_names(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = spp.save_model(prune_nm_(tiny_llama()).to(dtype), tmp_path / "base")
    stored = tensors_of(store(base, tmp_path / "whole", name))
    folder = tmp_path / "shards"  # each part of a weight in another file
    shutil.copytree(tmp_path / "whole", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    parts = {key if ".weight" in key else key.replace("_proj.", "_proj.weight."): t for key, t in stored.items()}
    places = {key: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, key in enumerate(sorted(parts))}
    places |= dict.fromkeys([key for key in parts if key.endswith(".bitmask")], "model-00004-of-00004.safetensors")
    for file in set(places.values()):
        save_tensors(folder / file, {key: t for key, t in parts.items() if places[key] == file})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": places})
    spp.convert(folder, tmp_path / "out")
    wanted, found = tensors_of(base), tensors_of(tmp_path / "out")
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert_same_bits(found[key], tensor, key)
    assert Certificate.read(tmp_path / "out").fingerprint() == Certificate.read(base).fingerprint()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    assert index["weight_map"].keys() == wanted.keys() and len(set(index["weight_map"].values())) == 3
    with CheckpointReader(tmp_path / "out") as reader:
        assert {key: reader.file_of(key) for key in reader} == index["weight_map"]


def drop(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def put(key: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def flip(row: int, bits: int) -> Callable[[Tensor], Tensor]:
    def change(mask: Tensor) -> Tensor:
        mask[row, -1] ^= bits
        return mask

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            NAMES[0],
            put(f"{Q0}.compressed", lambda t: t[:-1]),
            r"compressed holds 99 values, .*bitmask has places for 100",
        ),
        (NAMES[0], put(f"{Q0}.bitmask", flip(3, 16)), "holds 100 values, .* has places for (99|101); .*cut short"),
        (NAMES[0], put(f"{Q0}.row_offsets", lambda t: t + (t > 50)), "row_offsets are not where the rows"),
        (NAMES[0], put(f"{Q0}.row_offsets", lambda t: t[:-1]), "row_offsets are not where the rows"),
        (
            NAMES[0],
            put(f"{Q0}.bitmask", lambda t: t[:-1]),
            r"bitmask is uint8 \(15, 2\); .*\(16, 16\) needs uint8 \(16, 2\)",
        ),
        (NAMES[0], put(f"{Q0}.bitmask", lambda t: t.to(torch.int16)), "bitmask is int16"),
        (NAMES[0], put(f"{Q0}.shape", lambda t: -t), r"q_proj\.shape is no shape of a matrix"),
        (NAMES[0], put(f"{Q0}.shape", lambda t: t.float()), r"q_proj\.shape is no shape of a matrix"),
        (NAMES[0], drop(f"{Q0}.shape"), r"q_proj\.shape is missing"),
        (NAMES[0], drop(f"{Q0}.bitmask"), r"there is .*q_proj\.compressed, but no .*q_proj\.bitmask"),
        (NAMES[0], drop(f"{Q0}.compressed"), r"there is .*q_proj\.bitmask, but no .*q_proj\.compressed"),
        (NAMES[1], put(f"{Q0}.compressed", lambda t: t[:-1]), r"compressed is \(15, 8\); .*half its values"),
        (NAMES[1], put(f"{DOWN0}.bitmask", flip(0, 128)), "has places for 161|has places behind the 20 columns"),
        (NAMES[1], lambda t: t.update({f"{Q0}.weight": torch.ones(16, 16)}), "the weight is there as well"),
    ],
)
def test_a_damaged_file(name: str, change: Change, says: str, tmp_path: Path) -> None:
    refused(tmp_path, CheckpointError, says, changed(tmp_path, name, change))


def test_places_behind_the_last_column(tmp_path: Path) -> None:
    def move(tensors: dict[str, Tensor]) -> None:  # as many ones as values, one of them nowhere in the matrix
        mask = tensors[f"{DOWN0}.bitmask"]
        mask[-1, -1] = (mask[-1, -1] & (mask[-1, -1] - 1)) | 128

    refused(tmp_path, CheckpointError, "has places behind the 20 columns", changed(tmp_path, NAMES[0], move))


def test_a_file_cut_short(tmp_path: Path) -> None:
    folder = changed(tmp_path, NAMES[0], lambda tensors: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(tmp_path, CheckpointError, "model.safetensors", folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pack-quantized", "quantized as compressed-tensors, pack-quantized .* only unquantized sparse formats"),
        ("float-quantized", "quantized as compressed-tensors, float-quantized"),
        ("gptq", "quantized as GPTQ, 4 bits"),
    ],
)
def test_quantized_is_not_converted(name: str, says: str, tmp_path: Path) -> None:
    base = spp.save_model(prune_nm_(tiny_llama(intermediate_size=128)), tmp_path / "base")
    refused(tmp_path, ConfigError, says, store(base, tmp_path / "checkpoint", name))
    shutil.rmtree(tmp_path / "checkpoint")
    folder = store(base, tmp_path / "checkpoint", name, config=False)  # the names of the tensors tell
    refused(tmp_path, SPPError, "float8; only unquantized|cannot be read|holds no projection weight", folder)


def test_quantized_and_compressed(tmp_path: Path) -> None:
    says = {**FORMATS["float-quantized"][1]["quantization_config"], "sparsity_config": {"format": "sparse-24-bitmask"}}

    def to_float8(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q0}.compressed"] = tensors[f"{Q0}.compressed"].to(torch.float8_e4m3fn)

    folder = changed(tmp_path, NAMES[1], to_float8)
    refused(tmp_path, ConfigError, r"q_proj\.compressed is float8_e4m3fn: quantized and compressed", folder)
    for format_, name in (("float-quantized", "float-quantized, sparse-24"), ("marlin-24", "marlin-24, sparse-24")):
        config = {**read_json(folder / "config.json", "config"), "quantization_config": {**says, "format": format_}}
        write_json(folder / "config.json", config)
        refused(tmp_path, ConfigError, f"quantized as compressed-tensors, {name}-bitmask", folder)


def test_what_needs_no_conversion(tmp_path: Path) -> None:
    base = spp.save_model(prune_nm_(tiny_llama()), tmp_path / "base")
    spp.export_packed(base, tmp_path / "packed")
    refused(tmp_path, ConfigError, r"is plain already: .*spp\.certify", base)
    refused(tmp_path, ConfigError, r"is packed; spp\.export_dense", tmp_path / "packed")
    refused(tmp_path, ConfigError, "dense is for masks, .*leave it out", FILES / NAMES[0], dense=base)
    refused(tmp_path, CheckpointError, "there is no .* directory", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="lies inside the checkpoint"):
        spp.convert(base, base / "inside")
    # What says that it is compressed, and is not, loses what it says.
    said = FORMATS["sparse-24-bitmask"][1]
    write_json(base / "config.json", {**read_json(base / "config.json", "config"), **said})
    spp.convert(base, tmp_path / "out")
    assert "compression_config" not in read_json(tmp_path / "out" / "config.json", "config")
