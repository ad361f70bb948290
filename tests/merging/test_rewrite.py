"""The streaming merge, whoever computes and however many: the same bytes; an error in any thread leaves nothing."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spp
from spp.certifying import scan
from spp.certifying.save import save_model
from spp.certifying.verify import verify
from spp.comparing.measure import measure_memory
from spp.errors import CheckpointError, MaskError, NonFiniteError, OutputError, OutputExistsError
from spp.files import CheckpointReader, save_tensors, values_sha256, write_json, write_tensors, writer
from spp.files.writer import TensorFile
from spp.kernels import use_kernels
from spp.kernels.native import elementwise
from spp.merging.disk import merge_checkpoint
from spp.merging.rewrite import TensorJob
from spp.pruning import magnitude_mask
from tests.helpers.checkpoints import (
    Q0,
    UP1,
    assert_no_threads_at_work,
    contents,
    grown,
    pruned_model,
    rewrite,
    shard,
    tensors_of,
    wrapped_model,
)

compiled = pytest.mark.skipif(elementwise.why_not() is not None, reason=f"nothing compiled: {elementwise.why_not()}")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that the tensors of a tiny model have several, all written around the cache."""
    monkeypatch.setattr(scan, "PIECE", 4096)
    monkeypatch.setattr("spp.files.hashes.VALUES_PIECE", 4096)
    monkeypatch.setattr("spp.merging.rewrite.PIECE_BYTES", 5000)
    monkeypatch.setattr(writer, "LARGE", 0)
    monkeypatch.setattr(writer, "_AT_ONCE", writer.PAGE)


OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.float16, {"dtype": torch.bfloat16}),
    (torch.bfloat16, {"dtype": torch.float32}),
    (torch.float32, {"dtype": torch.float16}),
    (torch.bfloat16, {"rounding": "stochastic", "seed": 3}),
    (torch.float64, {}),
    (torch.float32, {"dtype": torch.float64}),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("stored", "options"), OPTIONS)
def test_pieces_threads_and_who_computes_do_not_change_a_byte(
    tmp_path: Path, pieces: None, threads: int, stored: torch.dtype, options: dict[str, Any]
) -> None:
    adapter = spp.save_adapter(wrapped_model(stored, target_modules=["q_proj", "down_proj"]), tmp_path / "adapter")
    base = shard(save_model(pruned_model(stored), tmp_path / "whole"), tmp_path / "base", 2)
    report = merge_checkpoint(base, adapter, tmp_path / "out", **options)
    with use_kernels("torch"):
        plain = merge_checkpoint(base, adapter, tmp_path / "plain", **options)
        verify(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    verify(tmp_path / "plain")
    assert report.layers.keys() == plain.layers.keys() and report.sparsity_report == plain.sparsity_report
    for path, layer in report.layers.items():
        for name in ("kept", "rescued", "updated", "moved"):
            assert getattr(layer, name) == getattr(plain.layers[path], name), name
        assert layer.survived == pytest.approx(plain.layers[path].survived, rel=1e-5)


def experts(folder: Path, transposed: bool, sizes: tuple[int, int, int]) -> tuple[Path, Path]:
    """A checkpoint with one fused weight of three dimensions, and an adapter for it."""
    count, m, n = sizes
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(count, m, n, generator=generator)
    weight = weight * torch.stack([magnitude_mask(w, "1:2") for w in weight])
    if transposed:
        weight = weight.transpose(1, 2).contiguous()
    key, other = (f"model.layers.0.mlp.experts.{name}_proj" for name in ("down", "gate_up"))
    up = torch.ones(count, m, 2 * n) if transposed else torch.ones(count, 2 * n, m)  # its shape tells the layout
    (folder / "base").mkdir()
    save_tensors(folder / "base" / "model.safetensors", {key: weight, other: up})
    write_json(folder / "base" / "config.json", {"model_type": "some_moe"})
    (folder / "adapter").mkdir()
    parameters = {
        f"base_model.model.{key}.spp_alpha": torch.randn(count, 2, n, generator=generator),
        f"base_model.model.{key}.spp_beta": torch.randn(count, m, 1, generator=generator),
    }
    save_tensors(folder / "adapter" / "adapter_model.safetensors", parameters)
    config = {**spp.SPPConfig(r=2, target_modules=("down_proj",)).to_dict(), "peft_type": "SPP"}
    write_json(folder / "adapter" / "adapter_config.json", config)
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("sizes", [(3, 8, 24), (2, 70, 96), (3, 5, 6)])
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_in_both_layouts(
    tmp_path: Path, pieces: None, threads: int, transposed: bool, sizes: tuple[int, int, int]
) -> None:
    base, adapter = experts(tmp_path, transposed, sizes)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    with use_kernels("torch"):
        plain = merge_checkpoint(base, adapter, tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    (path,) = report.layers
    assert report.layers[path].kept == plain.layers[path].kept == sizes[0] * sizes[1] * sizes[2] // 2
    assert report.layers[path].survived == pytest.approx(plain.layers[path].survived, rel=1e-5)
    assert report.sparsity_report.tensors[path].pattern == "1:2"
    weight, merged = (tensors_of(folder)[path] for folder in (base, tmp_path / "out"))
    if transposed:
        weight, merged = weight.transpose(1, 2), merged.transpose(1, 2)
    tensors = tensors_of_adapter(adapter)
    alpha, beta = tensors[f"base_model.model.{path}.spp_alpha"], tensors[f"base_model.model.{path}.spp_beta"]
    rows = ((torch.arange(sizes[1]) + 1) * 2 - 1) // sizes[1]
    assert torch.equal(merged, weight * (1 + 2.0 * beta * alpha[:, rows]))


def tensors_of_adapter(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder, file="adapter_model.safetensors") as reader:
        return {key: reader.load(key) for key in reader}


@compiled
def test_the_compiled_pass_does_what_it_can(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for original in (TensorJob._convert, TensorJob._merge, TensorJob._made):
        name = original.__name__

        def logged(self: TensorJob, *arguments: Any, original: Any = original, name: str = name) -> Any:
            done.append(name if self.is_weight else f"{name} another")
            return original(self, *arguments)

        monkeypatch.setattr(TensorJob, name, logged)
    merge_checkpoint(base, adapter, tmp_path / "one")
    assert set(done) == {"_merge", "_convert another"}
    done.clear()
    merge_checkpoint(base, adapter, tmp_path / "two", dtype=torch.float64)
    assert set(done) == {"_made", "_convert another"}  # no compiled pass makes float64


@pytest.mark.slow
def test_a_merge_takes_pieces_of_memory_and_not_tensors(tmp_path: Path) -> None:
    size = (8192, 8192)
    paths = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    layout = {f"{path}.weight": (torch.bfloat16, size) for path in paths}
    (tmp_path / "base").mkdir()
    row = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).repeat(4096 * 512)
    block = memoryview(row.view(torch.uint8).numpy())
    write_tensors(tmp_path / "base" / "model.safetensors", layout, lambda _: [block] * 16)
    (tmp_path / "adapter").mkdir()
    parameters = {f"base_model.model.{path}.spp_alpha": torch.ones(1, size[1]) for path in paths}
    parameters |= {f"base_model.model.{path}.spp_beta": torch.full((size[0], 1), 0.125) for path in paths}
    save_tensors(tmp_path / "adapter" / "adapter_model.safetensors", parameters)
    config = {**spp.SPPConfig(r=1, target_modules=("down_proj",)).to_dict(), "peft_type": "SPP"}
    known = {"base_forms": dict.fromkeys(paths, "bfloat16")}
    known["base_values"] = dict.fromkeys(paths, str(values_sha256(tensors_of(tmp_path / "base")[f"{paths[0]}.weight"])))
    write_json(tmp_path / "adapter" / "adapter_config.json", {**config, **known})
    gc.collect()
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    memory = measure_memory(lambda: merge_checkpoint(base, adapter, out), calls=1)
    largest = 2 * size[0] * size[1]
    bound = largest // 2 if elementwise.why_not() is None else 3 * largest + 300_000_000
    assert memory.peak - memory.rest < bound
    assert bool((tensors_of(tmp_path / "out")[f"{paths[1]}.weight"][-1, ::2] == 1.25).all())


# What goes wrong in a thread.


def nothing_left(folder: Path, expected: list[str]) -> None:
    assert sorted(os.listdir(folder)) == sorted(expected)
    assert_no_threads_at_work()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_an_error_in_a_thread_is_raised_and_nothing_stays(
    base: Path, adapter: Path, tmp_path: Path, threads: int, overwrite: bool, kernels: str
) -> None:
    pieces = shard(base, tmp_path / "shards", 3)
    tensors = tensors_of(pieces)
    tensors[UP1][tensors[UP1] != 0] = float("inf")
    name = next(path for path in pieces.glob("*.safetensors") if UP1.encode() in path.read_bytes()[:4000])
    with CheckpointReader(pieces, file=name.name) as reader:
        keys = list(reader)
    save_tensors(name, {key: tensors[key] for key in keys})
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text('{"model_type": "old"}')
    with use_kernels(kernels), pytest.raises(NonFiniteError, match=UP1):
        merge_checkpoint(pieces, adapter, out, overwrite=overwrite)
    nothing_left(tmp_path, ["base", "adapter", "shards", *(["out"] if overwrite else [])])
    assert not overwrite or contents(out) == {"config.json": b'{"model_type": "old"}'}


def test_a_file_that_is_cut_while_it_is_merged_is_an_error(
    base: Path, adapter: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CheckpointReader.read

    def cut(self: CheckpointReader, key: str, start: int, out: memoryview) -> None:
        if self.directory == base:
            os.truncate(base / "model.safetensors", 50_000)
        read(self, key, start, out)

    monkeypatch.setattr(CheckpointReader, "read", cut)
    with pytest.raises(CheckpointError, match="has become shorter"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    nothing_left(tmp_path, ["base", "adapter"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("piece", [0, 7])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_the_old_state(
    base: Path, adapter: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    merge_checkpoint(base, adapter, tmp_path / "out")
    before, write, calls = contents(tmp_path / "out"), TensorFile.write, []

    def interrupt(self: TensorFile, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == piece + 1:
            signal.raise_signal(signal.SIGINT)
            threading.Event().wait(0.3)  # until the main thread has noticed
        write(self, *arguments)

    monkeypatch.setattr(TensorFile, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(base, adapter, tmp_path / "out", overwrite=True)
    nothing_left(tmp_path, ["base", "adapter", "out"])
    assert contents(tmp_path / "out") == before


def test_no_thread_to_be_had_is_an_error_that_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(RuntimeError, match="new thread"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    nothing_left(tmp_path, ["base", "adapter"])


@compiled
def test_a_compiled_merge_that_errs_is_caught(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = elementwise.Matrix.merge

    def wrong(self: elementwise.Matrix, *arguments: Any) -> elementwise.Found:
        return merge(self, *arguments).then(elementwise.Found(changed=1))

    monkeypatch.setattr(elementwise.Matrix, "merge", wrong)
    with pytest.raises(AssertionError, match="failed its checks where torch's passed"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    nothing_left(tmp_path, ["base", "adapter"])


# --dry-run


def test_a_dry_run_checks_everything_and_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge_checkpoint(base, adapter, tmp_path / "new" / "out", dry_run=True, dtype=torch.bfloat16)
    nothing_left(tmp_path, ["base", "adapter"])
    assert report.to_dict() == merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.bfloat16).to_dict()
    with pytest.raises(OutputExistsError):
        merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True)
    before = contents(tmp_path / "out")
    merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True, overwrite=True)
    assert contents(tmp_path / "out") == before
    (base / "added_tokens.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="symbolic link"):
        merge_checkpoint(base, adapter, tmp_path / "two", dry_run=True)
    (base / "added_tokens.json").unlink()
    rewrite(base, {Q0: grown(tensors_of(base)[Q0])})
    with pytest.raises(MaskError, match="q_proj"):
        merge_checkpoint(base, adapter, tmp_path / "two", dry_run=True)


def test_a_dry_run_tells_of_an_output_that_could_not_be_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        merge_checkpoint(base, adapter, tmp_path / "file" / "out", dry_run=True)
    with pytest.raises(OutputError, match="it is a file"):
        merge_checkpoint(base, adapter, tmp_path / "file", dry_run=True, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(OutputError, match="permission is denied"):
            merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True)
    free = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(OutputError, match="disk is full"):
        merge_checkpoint(base, adapter, tmp_path / "out", dry_run=True)
