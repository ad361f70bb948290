"""Packed checkpoints: there and back bit for bit, small, certified, sharded, and nothing half done."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spp
from spp.certifying import scan
from spp.certifying.certificate import Certificate
from spp.certifying.save import certify
from spp.certifying.verify import sparsity, verify
from spp.errors import CheckpointError, ConfigError, MaskError, NonFiniteError, OutputError, OutputExistsError
from spp.files import CheckpointReader, content_sha256, read_json, write_json
from spp.layers.host import PackedLinear
from spp.models.projection import find_projections
from spp.packing import export as exporting
from spp.pruning import magnitude_mask
from spp.weights import PackedWeight
from spp.weights.packed.disk import DenseReader, Descriptor
from tests.helpers.checkpoints import Q0, UP1, contents, pruned_model, rewrite, same_tensors, shard, tensors_of
from tests.helpers.models import moe_model, prune_nm_, tiny_llama, tiny_tokenizer
from tests.helpers.tolerances import assert_same_bits

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def prune_any_(model: Any, fraction: float) -> Any:
    """Zero the smallest of each projection, fused experts too."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not any(part in name for part in ("embed", "wte", "wpe", "head", "router", "gate.w")):
                p[p.abs() <= p.abs().float().quantile(fraction).to(p.dtype)] = 0
    return model


def test_there_and_back_every_file_is_the_same(base: Path, tmp_path: Path) -> None:
    report = spp.export_packed(base, tmp_path / "packed")
    assert spp.export_dense(tmp_path / "packed", tmp_path / "dense") == report
    assert contents(tmp_path / "dense") == contents(base)
    assert sorted(os.listdir(tmp_path / "packed")) == sorted(os.listdir(base))
    assert (tmp_path / "packed" / "sparsity.json").read_bytes() == (base / "sparsity.json").read_bytes()
    before = read_json(base / "config.json", "config")
    after = read_json(tmp_path / "packed" / "config.json", "config")
    assert after.pop("quantization_config") == {"quant_method": "spp_packed", "format_version": 1}
    assert after == before
    assert len(report.tensors) == 14 and set(report.tensors) == set(Certificate.read(base).tensors)
    one = report.tensors[Q0]
    assert (one.shape, one.dtype, one.pattern, one.dense_bytes) == ((64, 64), "float32", "2:4", 64 * 64 * 4)
    assert one.packed_bytes == 64 * 32 * 4 + 64 * 8 + 7 * 8
    assert report.dense_bytes == sum(t.nbytes for t in tensors_of(base).values())
    with CheckpointReader(tmp_path / "packed") as reader:
        assert report.packed_bytes == sum(len(reader.raw(key)) for key in reader)
    assert report.to_dict()["tensors"][Q0]["shape"] == [64, 64] and report.to_dict()["ratio"] == report.ratio
    again = spp.export_packed(base, tmp_path / "again")
    assert again == report and contents(tmp_path / "again") == contents(tmp_path / "packed")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [(1, 4), (2, 8), None], ids=str)
def test_every_dtype_and_pattern(tmp_path: Path, dtype: torch.dtype, kept: tuple[int, int] | None) -> None:
    model = prune_any_(tiny_llama(), 0.7) if kept is None else prune_nm_(tiny_llama(), *kept)
    spp.save_model(model.to(dtype), tmp_path / "base")
    report = spp.export_packed(tmp_path / "base", tmp_path / "packed")
    assert verify(tmp_path / "packed") == verify(tmp_path / "base") == verify(tmp_path / "base", tmp_path / "packed")
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    assert contents(tmp_path / "dense") == contents(tmp_path / "base")
    patterns = {t.pattern for t in report.tensors.values()}
    assert "unstructured" in patterns if kept is None else patterns == {f"{kept[0]}:{kept[1]}"}


@pytest.mark.parametrize(("kept", "most"), [((2, 4), 0.57), ((2, 8), 0.33), ((1, 4), 0.33), (None, 0.33)], ids=str)
def test_size(tmp_path: Path, kept: tuple[int, int] | None, most: float) -> None:
    """At 75 % in bfloat16 a third of the dense size, at 2:4 0.57 of it."""
    model: Any = tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=1)
    model = prune_any_(model, 0.75) if kept is None else prune_nm_(model, *kept)
    spp.save_model(model.bfloat16(), tmp_path / "base")
    assert spp.export_packed(tmp_path / "base", tmp_path / "packed").ratio <= most


def test_shards_stay_shards(base: Path, tmp_path: Path) -> None:
    pieces = shard(base, tmp_path / "pieces")
    spp.export_packed(pieces, tmp_path / "packed")
    index = read_json(tmp_path / "packed" / INDEX, "index")
    with CheckpointReader(tmp_path / "packed") as reader:
        assert index["weight_map"] == {key: reader.file_of(key) for key in reader}
        assert index["metadata"]["total_size"] == sum(len(reader.raw(key)) for key in reader)
        assert len(reader.shards()) == 3
    verify(tmp_path / "packed")
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    assert contents(tmp_path / "dense") == contents(pieces)
    model, expected = (spp.load_packed(tmp_path / name).state_dict() for name in ("packed", "pieces"))
    assert all(torch.equal(model[key], expected[key]) for key in expected)


def test_parts_may_lie_in_other_shards(base: Path, tmp_path: Path) -> None:
    spp.export_packed(base, tmp_path / "packed")
    spread = shard(tmp_path / "packed", tmp_path / "spread", 5)  # a descriptor here, its codes there
    verify(spread)
    spp.export_dense(spread, tmp_path / "dense")
    assert same_tensors(tmp_path / "dense", base)


@pytest.mark.parametrize("piece", [200, 2**20])
@pytest.mark.parametrize("deep", [False, True])
def test_a_scan_decodes_and_finds_what_it_finds_in_the_dense_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, deep: bool
) -> None:
    monkeypatch.setattr(scan, "PIECE", piece)
    spp.export_packed(base, tmp_path / "packed")
    with DenseReader(tmp_path / "packed") as packed, CheckpointReader(base) as dense:
        assert packed.packed and not all(packed.lies_in_file(key) for key in packed)
        axes: dict[str, int | None] = {key: 1 if len(dense.shape(key)) == 2 else None for key in dense}
        found = scan.scan_reader(packed, axes, deep=deep)
        assert found == scan.scan_reader(dense, axes, deep=deep)
        key = next(iter(packed.packed))
        assert found[key].crc == zlib.crc32(dense.raw(key))
        assert found[key].sha256 == (content_sha256(dense.tensor(key)) if deep else None)


def test_negative_zeros(base: Path, tmp_path: Path) -> None:
    tensors = tensors_of(base)
    signed = {key: torch.where(tensors[key] == 0, -0.0, tensors[key]) for key in (Q0, UP1)}
    rewrite(base, signed)
    certify(base, deep=True)
    with pytest.raises(ConfigError, match=rf"−0\.0, which would come back as 0\.0: {Q0} \(2048\), {UP1} \(5120\)"):
        spp.export_packed(base, tmp_path / "packed", strict_bits=True)
    assert not (tmp_path / "packed").exists()
    spp.export_packed(base, tmp_path / "packed")
    verify(tmp_path / "packed", deep=True)  # the certificate speaks of what comes back
    verify(base, tmp_path / "packed")
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    verify(tmp_path / "dense", deep=True)
    for key, tensor in tensors_of(tmp_path / "dense").items():
        assert_same_bits(tensor, tensors[key], key)
    assert Certificate.read(base).fingerprint() == Certificate.read(tmp_path / "packed").fingerprint()
    rewrite(base, {key: tensors[key] for key in signed})
    certify(base)
    spp.export_packed(base, tmp_path / "strict", strict_bits=True)


def test_a_certificate_is_carried_checked_or_made(base: Path, adapter: Path, tmp_path: Path) -> None:
    spp.merge_checkpoint(base, adapter, tmp_path / "merged")
    spp.export_packed(tmp_path / "merged", tmp_path / "packed")
    one, other = (Certificate.read(tmp_path / name) for name in ("merged", "packed"))
    assert other.base == one.base is not None and other.fingerprint() == one.fingerprint()
    assert other.other == one.other and other.tensors.keys() == one.tensors.keys()  # a merge makes −0.0 where M < 0
    (base / "sparsity.json").rename(tmp_path / "kept.json")
    spp.export_packed(base, tmp_path / "without")
    assert (tmp_path / "without" / "sparsity.json").read_bytes() == (tmp_path / "kept.json").read_bytes()
    (tmp_path / "kept.json").rename(base / "sparsity.json")
    tensors = tensors_of(base)
    changed = tensors[Q0].clone()
    changed[changed != 0] *= 2
    for key, tensor, error in ((Q0, changed, CheckpointError), (Q0, tensors[Q0].roll(1, 0), MaskError)):
        rewrite(base, {key: tensor})
        with pytest.raises(error, match=key):
            spp.export_packed(base, tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()


def test_what_is_not_pruned_stays_as_it_is(tmp_path: Path) -> None:
    model: Any = pruned_model(torch.bfloat16)
    with torch.no_grad():
        for key in (Q0, UP1):
            model.get_parameter(key).uniform_(1, 2)
        model.lm_head.weight[:, ::2] = 0  # 1:2, though no projection by its name
        model.model.embed_tokens.weight[:, ::2] = 0
    spp.save_model(model, tmp_path / "base")
    report = spp.export_packed(tmp_path / "base", tmp_path / "packed")
    assert len(report.tensors) == 14 - 2  # its certificate names the projections
    (tmp_path / "base" / "sparsity.json").unlink()
    report = spp.export_packed(tmp_path / "base", tmp_path / "packed", overwrite=True)
    assert len(report.tensors) == 14 - 2 + 1 and report.tensors["lm_head.weight"].pattern == "1:2"
    with CheckpointReader(tmp_path / "packed") as packed, CheckpointReader(tmp_path / "base") as base:
        for key in (Q0, UP1, NORM, "model.embed_tokens.weight"):
            assert bytes(packed.raw(key)) == bytes(base.raw(key))
    verify(tmp_path / "packed")
    loaded = spp.load_packed(tmp_path / "packed")
    kinds = {path: type(module) for path, module in loaded.named_modules() if path.endswith(("_proj", "lm_head"))}
    assert kinds["lm_head"] is PackedLinear and sum(kind is PackedLinear for kind in kinds.values()) == 13
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    assert same_tensors(tmp_path / "dense", tmp_path / "base")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "llama4_text", "qwen3_moe", "jetmoe"])
def test_experts(tmp_path: Path, architecture: str) -> None:
    """Apart on disk and fused in memory, fused in both, inputs last or first."""
    from transformers import AutoModelForCausalLM

    model: Any = prune_any_(moe_model(architecture), 0.75).bfloat16()
    spp.save_model(model, tmp_path / "base")
    report = spp.export_packed(tmp_path / "base", tmp_path / "packed")
    assert any("expert" in key or "linear" in key for key in report.tensors)
    verify(tmp_path / "packed")
    verify(model, tmp_path / "packed") if architecture in ("gpt_oss", "llama4_text", "jetmoe") else None
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    assert contents(tmp_path / "dense") == contents(tmp_path / "base")
    loaded = spp.load_packed(tmp_path / "packed")
    fused = {p.path: p for p in find_projections(loaded) if p.fused}
    assert fused and all(p.packed is not None for p in fused.values())
    again = spp.load_packed(tmp_path / "base").state_dict()  # packed anew, from the plain checkpoint
    for key, tensor in loaded.state_dict().items():
        if any(key.startswith(path) for path in fused):
            assert_same_bits(tensor, again[key], key)
    spp.unpack(loaded)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    found, wanted = loaded.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert_same_bits(found[key] + 0, tensor + 0, key)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_fused_experts_are_packed_along_their_inputs(tmp_path: Path, axis: int, pattern: str) -> None:

    model: Any = moe_model("gpt_oss" if axis == -2 else "llama4_text").bfloat16()
    with torch.no_grad():
        for projection in find_projections(model):
            if projection.fused:
                for matrix in projection.matrices():
                    matrix.mul_(magnitude_mask(matrix, pattern))
    spp.save_model(model, tmp_path / "base")
    report = spp.export_packed(tmp_path / "base", tmp_path / "packed")
    assert {t.pattern for t in report.tensors.values()} == {pattern}
    verify(tmp_path / "packed")


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): packed along the inputs, on disk and in memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and ".c_" in name:
                p[::2] = 0
    spp.save_model(model, tmp_path / "base")
    report = spp.export_packed(tmp_path / "base", tmp_path / "packed")
    assert {t.pattern for t in report.tensors.values()} == {"1:2"}
    with DenseReader(tmp_path / "packed") as reader:
        assert {d.input_axis for d in reader.packed.values()} == {0}
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    assert same_tensors(tmp_path / "dense", tmp_path / "base")
    loaded = spp.load_packed(tmp_path / "packed")
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 4
    spp.unpack(loaded)
    for key, tensor in model.state_dict().items():
        assert_same_bits(loaded.state_dict()[key] + 0, tensor + 0, key)


def test_sparsity_and_inspect_see_the_dense_tensors(base: Path, tmp_path: Path) -> None:
    spp.export_packed(base, tmp_path / "packed")
    assert sparsity(tmp_path / "packed") == sparsity(base)
    found = certify(tmp_path / "packed")
    assert found == certify(base)
    assert (tmp_path / "packed" / "sparsity.json").read_bytes() == (base / "sparsity.json").read_bytes()


def flip(folder: Path, name: str, bit: int) -> None:
    """Flip one bit of a tensor's first non-zero byte."""
    with CheckpointReader(folder) as reader:
        path, entry = folder / reader.file_of(name), reader._entries[name]
        data = bytearray(path.read_bytes())
        at = next(i for i in range(entry.begin, entry.end) if data[i])
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("part", "bit"), [("_values", 0), ("_codes", 3), ("_codes", 7), ("", 0)], ids=["value", "mask", "group", "version"]
)
def test_a_flipped_bit_is_caught_whoever_reads(base: Path, tmp_path: Path, part: str, bit: int) -> None:
    packed = tmp_path / "packed"
    spp.export_packed(base, packed)
    flip(packed, Q0 + part, bit)
    readers: list[Callable[[], Any]] = [lambda: verify(packed), lambda: spp.export_dense(packed, tmp_path / "dense")]
    if part != "_values":  # a value that changes is none that a mask could tell
        readers.append(lambda: spp.load_packed(packed))
    for read in readers:
        with pytest.raises((CheckpointError, MaskError), match=Q0):
            read()
    assert not (tmp_path / "dense").exists()


def test_what_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    spp.export_packed(base, packed)
    for call, error, message in (
        (lambda: spp.export_packed(base, packed), OutputExistsError, "exists"),
        (lambda: spp.export_packed(packed, tmp_path / "x"), ConfigError, "is packed already; spp.export_dense"),
        (lambda: spp.export_dense(base, tmp_path / "x"), ConfigError, "is not packed; spp.export_packed"),
        (lambda: spp.export_packed(base, base / "x"), ConfigError, "choose a path outside it"),
        (lambda: spp.export_dense(packed, packed, overwrite=True), ConfigError, "choose a path outside it"),
        (lambda: spp.export_packed(tmp_path / "no", tmp_path / "x"), CheckpointError, "no model directory"),
        (lambda: spp.merge_checkpoint(packed, adapter, tmp_path / "x"), ConfigError, "packed; spp.export_dense"),
        (lambda: spp.prune_checkpoint(packed, tmp_path / "x", "magnitude"), ConfigError, "packed; spp.export_dense"),
    ):
        with pytest.raises(error, match=message):
            call()
    config = read_json(base / "config.json", "config")
    write_json(base / "config.json", {**config, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ConfigError, match="quantized"):
        spp.export_packed(base, tmp_path / "x")
    write_json(base / "config.json", config)
    rewrite(base, {f"{Q0}_codes": torch.ones(2)})
    certify(base)
    with pytest.raises(ConfigError, match=f"a tensor {Q0}_codes, a name"):
        spp.export_packed(base, tmp_path / "x")
    rewrite(base, {f"{Q0}_codes": None, Q0: torch.full((64, 64), float("nan"))})
    (base / "sparsity.json").unlink()
    with pytest.raises(NonFiniteError, match=Q0):
        spp.export_packed(base, tmp_path / "x")
    spp.save_model(tiny_llama(), tmp_path / "dense")
    with pytest.raises(ConfigError, match="smaller packed; prune it first"):
        spp.export_packed(tmp_path / "dense", tmp_path / "x")
    smallest = tiny_llama(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    spp.save_model(prune_nm_(smallest.bfloat16()), tmp_path / "smallest")
    with pytest.raises(ConfigError, match="smaller packed; what is pruned is too small"):
        spp.export_packed(tmp_path / "smallest", tmp_path / "x")
    (packed / "sparsity.json").unlink()
    with pytest.raises(CheckpointError, match=r"no sparsity\.json"):
        spp.export_dense(packed, tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "dense", "packed", "smallest"]


def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    packed = tmp_path / "packed"
    spp.export_packed(base, packed)
    for name in ("tensor_bytes", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(exporting, name, full)
            with pytest.raises(OutputError, match="the disk is full"):
                spp.export_packed(base, tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_dense_bytes", full)
        with pytest.raises(OutputError, match="the disk is full"):
            spp.export_dense(packed, tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "packed"] or not (tmp_path / "x").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that is smaller than the model in either form; needs the right to mount."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_small_disk(base: Path, tmp_path: Path, disk: Path) -> None:
    spp.export_packed(base, tmp_path / "packed")
    (disk / "mine").write_text("mine")
    for export, source in ((spp.export_packed, base), (spp.export_dense, tmp_path / "packed")):
        with pytest.raises(OutputError, match=r"cannot write .*out.*: the disk is full"):
            export(source, disk / "out")
        assert os.listdir(disk) == ["mine"]


def test_packing_that_went_wrong_is_not_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporting.pack_tensor

    def wrong(*arguments: Any) -> Any:
        values, *rest = right(*arguments)
        return (values * 2, *rest)

    monkeypatch.setattr(exporting, "pack_tensor", wrong)
    with pytest.raises(MaskError, match="would not come back as it is"):
        spp.export_packed(base, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("only_new_objects")
def test_loading_copies_and_never_makes_a_weight_dense(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spp.export_packed(base, tmp_path / "packed")
    expected = spp.load_packed(base)
    shapes = {(m.out_features, m.in_features) for m in expected.modules() if isinstance(m, PackedLinear)}
    gc.collect()
    before = {id(t) for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)}
    make, layers, seen = PackedLinear.__init__, 0, []

    def never(*_: Any) -> Any:
        raise AssertionError("a weight is decoded or packed")

    def watched(self: PackedLinear, *args: Any, **options: Any) -> None:
        nonlocal layers
        layers += 1
        if layers in (2, 14):
            found = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter) and id(t) not in before]
            seen.append(sum(tuple(t.shape) in shapes and not t.is_meta for t in found))
        make(self, *args, **options)

    monkeypatch.setattr(PackedLinear, "__init__", watched)
    with monkeypatch.context() as patch:
        for owner, name in ((PackedWeight, "dense"), (PackedWeight, "decode"), (PackedWeight, "pack")):
            patch.setattr(owner, name, never)
        patch.setattr(Descriptor, "dense", never)
        model = spp.load_packed(tmp_path / "packed")
    assert layers == 14 and seen == [0, 0]
    state, other = model.state_dict(), expected.state_dict()
    assert list(state) == list(other)
    for key in other:
        assert_same_bits(state[key], other[key], key)
    shutil.rmtree(tmp_path / "packed")  # copies: nothing is mapped from files that are gone
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert_same_bits(model(ids).logits, expected(ids).logits)
    assert not hasattr(model.config, "quantization_config")


def test_some_modules_or_another_dtype(base: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    spp.export_packed(base, packed)
    for options in ({"dtype": torch.bfloat16}, {"target_modules": ["up_proj"]}, {"exclude_modules": ["down_proj"]}):
        model, expected = spp.load_packed(packed, **options), spp.load_packed(base, **options)
        state, other = model.state_dict(), expected.state_dict()
        assert list(state) == list(other)
        for key in other:
            assert_same_bits(state[key] + 0, other[key] + 0, key)


def test_tune_and_merge_from_a_packed_checkpoint(base: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    spp.export_packed(base, packed)
    model = spp.wrap(spp.load_packed(packed), r=4, packed=True)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(model):
            parameter.add_(0.01)
    spp.save_adapter(model, tmp_path / "adapter-of-it")
    spp.merge(model)
    spp.save_model(model, tmp_path / "merged", tokenizer=tiny_tokenizer())
    verify(packed, tmp_path / "merged")
    assert "quantization_config" not in read_json(tmp_path / "merged" / "config.json", "config")
    spp.merge_checkpoint(base, tmp_path / "adapter-of-it", tmp_path / "streamed")
    assert same_tensors(tmp_path / "streamed", tmp_path / "merged")
