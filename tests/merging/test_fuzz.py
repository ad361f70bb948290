"""Fuzzing: whatever is in the files, the readers return or raise an error of spp; they never hang or fill the memory.

Each reader meets 300 inputs in the daily run and 10,000 in the stress run: good files with a few places changed, their
bytes edited, or nothing of them left.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

import spp
from spp.certifying.certificate import Certificate
from spp.certifying.save import certify, save_model
from spp.certifying.verify import sparsity, verify
from spp.errors import SPPError
from spp.files import CheckpointReader, read_json
from spp.merging.disk import merge_checkpoint
from spp.pruning import LayerReport
from spp.pruning.work import Work
from spp.wrapping.adapter_files import read_adapter
from tests.files.test_reader import HEADERS, safetensors_bytes
from tests.helpers.checkpoints import pruned_model, shard, tensors_of, trained_by_pst
from tests.merging.fuzzing import EDITS, documents, edited, fuzz

DAILY, STRESS = 300, 10_000
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
INDEX = "model.safetensors.index.json"
Case = tuple[st.SearchStrategy[Any], Callable[[Any], object]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned checkpoint, whole and in shards, and an adapter of ours and of the SPP authors for it."""
    folder = tmp_path_factory.mktemp("good")
    save_model(pruned_model(**SMALL), folder / "base")
    certify(folder / "base", deep=True)
    shard(folder / "base", folder / "shards", 2)
    mixed = pruned_model(**SMALL)
    with torch.no_grad():
        mixed.model.layers[0].self_attn.q_proj.weight[::2] = 0  # two kinds of layout
    save_model(mixed, folder / "mixed")
    spp.export_packed(folder / "mixed", folder / "packed")
    from tests.helpers.models import prune_nm_, tiny_llama

    model = spp.wrap(prune_nm_(tiny_llama(**SMALL)), r=2, seed=0)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.fill_(0.1)
    spp.save_adapter(model, folder / "adapter")
    spp.pst.save(trained_by_pst(pruned_model(**SMALL), 0.75, weight_rank=1, mask_rank=1), folder / "state")
    authors = folder / "authors"
    authors.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    torch.save(
        {f"{prefix}.weight": torch.ones(2, 16), f"{prefix}.weight_col": torch.ones(16, 1)},
        authors / "adapter_model.bin",
    )
    (authors / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    return folder


def replaced(folder: Path, name: str, use: Callable[[], object]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        (folder / name).write_bytes(data)
        use()

    return run


def the_certificate(folder: Path) -> Case:
    def use() -> None:
        try:
            certificate = Certificate.read(folder / "base")
            certificate.fingerprint()
            certificate.report()
            assert Certificate.from_dict(certificate.to_dict()) == certificate
        finally:
            verify(folder / "base", deep=True)

    values = read_json(folder / "base" / "sparsity.json", "it")
    few = {key: dict(list(values[key].items())[:2]) for key in ("tensors", "other", "content_sha256")}
    run = replaced(folder / "base", "sparsity.json", use)
    return documents(values) | documents({**values, **few}), run


def the_index(folder: Path) -> Case:
    def use() -> None:
        with CheckpointReader(folder / "shards") as reader:
            assert sum(reader.tensor(key).numel() for key in reader) == total
        verify(folder / "shards")

    total = sum(tensor.numel() for tensor in tensors_of(folder / "shards").values())
    return documents(read_json(folder / "shards" / INDEX, "it")), replaced(folder / "shards", INDEX, use)


def the_config(folder: Path) -> Case:
    def use() -> None:
        for read in (sparsity, verify, certify, spp.load_packed):
            with contextlib.suppress(SPPError):
                read(folder / "base")

    values = {**read_json(folder / "base" / "config.json", "it"), "text_config": {"num_layers": 1}}
    return documents(values), replaced(folder / "base", "config.json", use)


def the_adapter_config(folder: Path) -> Case:
    def use() -> None:
        files = read_adapter(folder / "adapter")
        files.layers()
        for path in files.layers():
            files.config.rank_for(path)
        merge_checkpoint(folder / "base", folder / "adapter", folder / "out", overwrite=True)

    values = read_json(folder / "adapter" / "adapter_config.json", "it")
    values["rank_pattern"] = {"q_proj": 2}
    return documents(values), replaced(folder / "adapter", "adapter_config.json", use)


def the_authors_config(folder: Path) -> Case:
    def use() -> None:
        read_adapter(folder / "authors").layers()

    values = read_json(folder / "authors" / "adapter_config.json", "it")
    return documents({**values, "lora_dropout": 0.1, "base_model_name_or_path": "x"}), replaced(
        folder / "authors", "adapter_config.json", use
    )


def the_adapter_tensors(folder: Path) -> Case:
    def use(data: bytes) -> None:
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(data)
        read_adapter(folder / "adapter").layers()
        merge_checkpoint(folder / "base", folder / "adapter", folder / "out", overwrite=True)

    return hostile_tensors(folder / "adapter" / "adapter_model.safetensors"), use


def hostile_tensors(path: Path) -> st.SearchStrategy[bytes]:
    """Hostile relatives of a safetensors file."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    return st.one_of(
        documents(header).map(lambda text: safetensors_bytes(text, data)),
        EDITS.map(lambda edits: edited(whole, edits)),
    )


def the_old_adapter(folder: Path) -> Case:
    whole = (folder / "authors" / "adapter_model.bin").read_bytes()
    use = replaced(folder / "authors", "adapter_model.bin", lambda: read_adapter(folder / "authors").layers())
    return EDITS.map(lambda edits: edited(whole, edits)), use


def the_weights(folder: Path) -> Case:
    """Of a checkpoint with its certificate: whatever is read as a tensor is counted, compared and certified."""

    def use(data: bytes) -> None:
        (folder / "base" / "model.safetensors").write_bytes(data)
        for read in (verify, sparsity, certify):
            with contextlib.suppress(SPPError):
                read(folder / "base")
        shutil.copyfile(folder / "certificate", folder / "base" / "sparsity.json")

    shutil.copyfile(folder / "base" / "sparsity.json", folder / "certificate")
    whole = (folder / "base" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    dtypes = st.sampled_from(
        ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F16", "I16", "U16", "C64", "F64", "I64", "U64"]
    )
    keys = st.sampled_from(sorted(key for key in header if key != "__metadata__"))

    def retyped(change: tuple[str, str, int]) -> bytes:
        key, dtype, axes = change
        begin, end = header[key]["data_offsets"]
        size = {"8": 1, "16": 2, "32": 4, "64": 8, "E4M3": 1, "E5M2": 1}.get(
            dtype.lstrip("BOFULIC_").removeprefix("8_"), 1
        )
        size = 8 if dtype in ("C64", "F64", "I64", "U64") else size
        count = (end - begin) // size
        shape = {0: [count], 1: [count, 1], 2: [1, count], 3: [1, 1, count], 4: [1] * 5 + [count]}[axes]
        return safetensors_bytes({**header, key: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}, data)

    return (
        st.one_of(
            documents(header).map(lambda text: safetensors_bytes(text, data)),
            st.tuples(HEADERS, st.binary(max_size=32)).map(lambda p: safetensors_bytes(*p)),
            st.tuples(keys, dtypes, st.integers(0, 4)).map(retyped),
            EDITS.map(lambda edits: edited(whole, edits)),
        ),
        use,
    )


def the_packed_weights(folder: Path) -> Case:
    """Of a packed checkpoint: numbers of descriptors, codes and starts, the header, any byte."""
    packed = folder / "packed"

    def use(data: bytes) -> None:
        (packed / "model.safetensors").write_bytes(data)
        for read in (verify, sparsity, spp.load_packed, lambda p: spp.export_dense(p, folder / "out", overwrite=True)):
            with contextlib.suppress(SPPError):
                read(packed)

    whole = (packed / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    places = {key: value["data_offsets"][0] for key, value in header.items() if f"{key}_codes" in header}
    codes = [value["data_offsets"] for key, value in header.items() if key.endswith(("_codes", "_starts"))]
    numbers = st.integers(-3, 70) | st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1, -(2**63)])
    descriptors = st.lists(
        st.tuples(st.sampled_from(sorted(places)), st.integers(0, 6), numbers), min_size=1, max_size=3
    )
    bits = st.lists(
        st.tuples(st.sampled_from(codes), st.integers(0, 2**16), st.integers(1, 255)), min_size=1, max_size=3
    )

    def described(changes: list[tuple[str, int, int]]) -> bytes:
        new = bytearray(data)
        for key, index, value in changes:
            new[places[key] + 8 * index : places[key] + 8 * index + 8] = value.to_bytes(8, "little", signed=True)
        return whole[: 8 + length] + bytes(new)

    def misplaced(changes: list[tuple[list[int], int, int]]) -> bytes:
        new = bytearray(data)
        for (begin, end), at, by in changes:
            new[begin + at % (end - begin)] ^= by
        return whole[: 8 + length] + bytes(new)

    return (
        st.one_of(
            descriptors.map(described),
            bits.map(misplaced),
            documents(header).map(lambda text: safetensors_bytes(text, data)),
            EDITS.map(lambda edits: edited(whole, edits)),
        ),
        use,
    )


def the_packed_config(folder: Path) -> Case:
    """What says that a checkpoint is packed; the rest of a config is the case "config"."""

    def use() -> None:
        for read in (verify, sparsity):
            with contextlib.suppress(SPPError):
                read(folder / "packed")

    values = read_json(folder / "packed" / "config.json", "it")
    few = {key: values[key] for key in ("quantization_config", "model_type")}
    return documents(few), replaced(folder / "packed", "config.json", use)


def the_pst_config(folder: Path) -> Case:
    def use() -> None:
        spp.convert_checkpoint(folder / "base", folder / "state", folder / "out", overwrite=True)

    values = read_json(folder / "state" / "adapter_config.json", "it")
    return documents(values), replaced(folder / "state", "adapter_config.json", use)


def the_pst_tensors(folder: Path) -> Case:
    def use(data: bytes) -> None:
        (folder / "state" / "adapter_model.safetensors").write_bytes(data)
        spp.convert_checkpoint(folder / "base", folder / "state", folder / "out", overwrite=True)

    return hostile_tensors(folder / "state" / "adapter_model.safetensors"), use


def the_pruning_note(folder: Path) -> Case:
    """What a pruning that was interrupted finds of itself."""
    job = {"method": "wanda", "dtypes": ["float32"]}
    report = LayerReport((4, 8), "2:4", 0.5, 0.0, 0.1, 20, 0.5, "note")

    def use(data: bytes) -> None:
        (folder / ".out.pruning").mkdir(exist_ok=True)
        (folder / ".out.pruning" / "progress.json").write_bytes(data)
        with Work(folder / "out", job, 2) as work:
            layers = [layer for layer in work.reports().values() if layer.sparsity < 2 and layer.shape[0] > 1]
            assert work.has(0) or work.has(1) or not layers

    with Work(folder / "out", job, 2) as work:
        work.finish(0, {"weight": torch.ones(4, 8)}, {"model.layers.0.mlp.up_proj": report}, 0)
        work.remember("patterns", {"model.layers.0.mlp.up_proj": "2:4"})
    return documents(read_json(folder / ".out.pruning" / "progress.json", "it")), use


READERS: dict[str, Callable[[Path], Case]] = {
    "certificate": the_certificate,
    "index": the_index,
    "config": the_config,
    "adapter config": the_adapter_config,
    "authors' config": the_authors_config,
    "adapter tensors": the_adapter_tensors,
    "old adapter": the_old_adapter,
    "weights": the_weights,
    "packed weights": the_packed_weights,
    "packed config": the_packed_config,
    "PST config": the_pst_config,
    "PST tensors": the_pst_tensors,
    "pruning note": the_pruning_note,
}


def run(good: Path, folder: Path, name: str, count: int) -> None:
    shutil.copytree(good, folder / "copy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz(*READERS[name](folder / "copy"), count)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_fuzz(good: Path, tmp_path: Path, name: str) -> None:
    run(good, tmp_path, name, DAILY)


@pytest.mark.stress
@pytest.mark.parametrize("name", READERS)
def test_fuzz_at_length(good: Path, tmp_path: Path, name: str) -> None:
    run(good, tmp_path, name, STRESS)
