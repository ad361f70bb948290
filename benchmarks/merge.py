"""How fast an adapter is merged into a checkpoint on disk, and a checkpoint verified, beside physical yardsticks.

A merge reads every tensor, checks it, scales it, checks the result, hashes it and writes it, until it is on disk; `cp
-r` reads and writes, and is followed here by an fsync of every file and folder. `spp verify` reads a checkpoint and
checks masks, patterns, finiteness and checksums; one pass of zlib.crc32 over the same files, with as many threads, is
beside it. All take turns, merge and copy each into a new folder. Reads come from the system's cache as far as it holds
the files: how far, the least over all rounds, is in the rows ("cached_share"), and "cache" says warm from 0.99 on.

    python -m benchmarks.merge --shape llama-7b --blocks 16        python -m benchmarks.merge --shape smollm2 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.adapted import BETA
from benchmarks.models import SHAPES
from spp.certifying.save import certify
from spp.certifying.verify import verify
from spp.configs.adapter import SPPConfig
from spp.errors import ConfigError
from spp.files import CheckpointReader, mask_sha256, save_tensors, values_sha256, write_json, write_tensors
from spp.files.hashes import tensor_bytes
from spp.files.header import size_of
from spp.kernels.native import elementwise
from spp.masks.patterns import Pattern
from spp.merging.disk import merge_checkpoint
from spp.pruning import magnitude_mask
from spp.report import Table, byte_text
from spp.rules import get_rule

COPY, MERGE = "cp -r + fsync", "merge"
CRC, VERIFY = "zlib.crc32", "verify"
PAIRS = ((COPY, MERGE), (CRC, VERIFY))  # a yardstick, and what is measured by it
WARM = 0.99  # of the files in the cache
_PIECE = 2**22  # bytes that a thread sums up at a time


def make_checkpoint(options: argparse.Namespace, directory: Path) -> int:
    """Write a pruned Llama checkpoint of random weights and an adapter of it, one tensor at a time; return its bytes.

    Every matrix of one shape holds the same values: the measurements do not depend on them.
    """
    dtype, pattern = getattr(torch, options.dtype), Pattern.parse(options.pattern)
    hidden, intermediate, layers, heads, kv_heads, vocabulary, _ = SHAPES[options.shape]
    narrow = hidden * kv_heads // heads
    of_block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    generator = torch.Generator().manual_seed(0)
    tensors: dict[tuple[int, int], torch.Tensor] = {}
    for shape in set(of_block.values()):
        dense = torch.randn(shape, generator=generator).to(dtype)
        tensors[shape] = dense * magnitude_mask(dense, pattern)
    paths = {
        f"model.layers.{i}.{name}": shape for i in range(options.blocks or layers) for name, shape in of_block.items()
    }
    layout = {f"{path}.weight": (dtype, shape) for path, shape in paths.items()}
    layout["model.embed_tokens.weight"] = (dtype, (vocabulary, hidden))
    base, adapter = directory / "base", directory / "adapter"
    base.mkdir()
    adapter.mkdir()
    shards = _shards(layout, options.shards)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    tensors[vocabulary, hidden] = torch.zeros(vocabulary, hidden, dtype=dtype)  # the embedding
    for name, shard in zip(names, shards, strict=True):
        part = {key: layout[key] for key in shard}
        write_tensors(base / name, part, lambda key: tensor_bytes(tensors[layout[key][1]]))
    file_of = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    size = sum(size_of(*entry) for entry in layout.values())
    write_json(base / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": file_of})
    write_json(base / "config.json", {"model_type": "llama", "dtype": options.dtype})
    masks = {shape: mask_sha256(tensor) for shape, tensor in tensors.items()}
    hashes = {shape: values_sha256(tensor) for shape, tensor in tensors.items()}
    rule, parameters = get_rule("spp"), {}
    for path, shape in paths.items():
        for name, wanted in zip(rule.attribute_names(), rule.shapes(*shape, options.rank), strict=True):
            values = torch.randn(wanted, generator=generator) * BETA
            parameters[f"base_model.model.{path}.{name}"] = values
    save_tensors(adapter / "adapter_model.safetensors", parameters)
    config = SPPConfig(r=options.rank, target_modules=tuple(name.split(".")[1] for name in of_block)).to_dict()
    extra = {
        "peft_type": "SPP",
        "base_masks": {path: masks[shape] for path, shape in paths.items()},
        "base_values": {path: hashes[shape] for path, shape in paths.items()},
        "base_forms": dict.fromkeys(paths, options.dtype),
    }
    write_json(adapter / "adapter_config.json", {**config, **extra, "base_model_name_or_path": None})
    return size


def _shards(layout: dict[str, Any], count: int) -> list[list[str]]:
    """Deal the keys out to `count` shards, in order, of about equal sizes."""
    keys, total = list(layout), sum(size_of(*entry) for entry in layout.values())
    shards: list[list[str]] = [[]]
    filled = 0
    for key in keys:
        if filled >= total * len(shards) / count and len(shards) < count:
            shards.append([])
        shards[-1].append(key)
        filled += size_of(*layout[key])
    return shards


def copy(source: Path, target: Path) -> None:
    """Copy a folder with `cp -r`, and wait until it is on disk."""
    subprocess.run(["cp", "-r", os.fspath(source), os.fspath(target)], check=True)
    for folder, _, names in os.walk(target):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def checksum(folder: Path) -> None:
    """Read the weights of a checkpoint once through zlib.crc32, on as many threads as torch uses."""
    with contextlib.ExitStack() as opened, ThreadPoolExecutor(torch.get_num_threads()) as pool:
        views = []
        for path in sorted(folder.glob("*.safetensors")):
            file = opened.enter_context(path.open("rb"))
            views.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        pieces = (view[at : at + _PIECE] for view in views for at in range(0, len(view), _PIECE))
        for _ in pool.map(zlib.crc32, pieces):
            pass


def measure(options: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Return a row for each contender; ratios are to the yardstick of its pair."""
    size = make_checkpoint(options, directory)
    base, adapter, out = directory / "base", directory / "adapter", directory / "out"
    certify(base)
    if hasattr(os, "sync"):
        os.sync()  # what was written just now does not keep the disk busy later
    child = ["--child", str(directory), "--threads", str(torch.get_num_threads())]
    memory = harness.Memory(**harness.in_child("benchmarks.merge", child))
    shares: list[float] = []

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        share = cached_share(base.glob("*.safetensors"))
        shares.extend([] if share is None else [share])

    calls = {
        COPY: lambda: copy(base, out),
        MERGE: lambda: merge_checkpoint(base, adapter, out),
        CRC: lambda: checksum(base),
        VERIFY: lambda: verify(base),
    }
    samples = harness.interleave(calls, rounds=options.rounds, warmup=options.warmup, before=prepare)
    share = min(shares) if shares else None
    fields = {name: found for pair in PAIRS for name, found in harness.compare({n: samples[n] for n in pair}).items()}
    rows = []
    for name, times in fields.items():
        row: dict[str, Any] = {
            "bench": "merge",
            "contender": name,
            "model": options.shape,
            "blocks": options.blocks or SHAPES[options.shape][2],
            "shards": options.shards,
            "pattern": options.pattern,
            "rank": options.rank,
            "rounds": options.rounds,
            "cache": "unknown" if share is None else "warm" if share >= WARM else "partly warm",
            "cached_share": share,
            "checkpoint_bytes": size,
            "compiled_merge": elementwise.compiled() is not None,
            "bytes_per_s": size / times["wall_s"]["median"],
            **times,
            **harness.environment("cpu", getattr(torch, options.dtype)).to_dict(),
        }
        if name == MERGE:
            row["rest_bytes"], row["peak_bytes"] = memory.rest, memory.peak
            row["memory_bound_bytes"] = 3 * largest_tensor(base) + 300_000_000
        rows.append(row)
    return rows


def largest_tensor(directory: Path) -> int:
    """Return the bytes of the largest tensor of a checkpoint."""
    with CheckpointReader(directory) as reader:
        return max(size_of(reader.dtype(key), reader.shape(key)) for key in reader)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table; its ratios are speeds, of the contender to the yardstick of its pair."""
    lines = [
        (
            row["contender"],
            f"{row['wall_s']['median']:.2f} s",
            f"{byte_text(int(row['bytes_per_s']))}/s",
            row["reference"],
            str(harness.Spread(**row["reference_to_this_wall"])),
            f"{byte_text(row['peak_bytes'] - row['rest_bytes'])} of {byte_text(row['memory_bound_bytes'])}"
            if "peak_bytes" in row
            else "",
        )
        for row in rows
    ]
    first = rows[0]
    cache = f"{first['cache']} cache" + ("" if first["cached_share"] is None else f" ({first['cached_share']:.2f})")
    what = f"{byte_text(first['checkpoint_bytes'])} in {first['shards']} shards, {cache}; median (p20 … p80)"
    columns = ("contender", "time", "throughput", "yardstick", "yardstick's time / this", "peak memory")
    return Table(f"merging and verifying {first['model']} at {first['pattern']}: {what}", columns, tuple(lines))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = harness.parser(
        "merge",
        "Time the merge of an adapter into a checkpoint against a copy of the same files, and its "
        "verification against one pass of zlib.crc32.",
    )
    parser.add_argument("--shape", default="smollm2", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--blocks", type=int, help="decoder blocks (default: as the shape has)")
    parser.add_argument("--shards", type=int, default=3, help="files of the checkpoint (default: 3)")
    parser.add_argument("--rank", type=int, default=16, help="r of the adapter (default: 16)")
    parser.add_argument("--pattern", default="2:4", help="of the zeros (default: 2:4)")
    parser.add_argument("--directory", type=Path, help="where to work (default: the system's temporary folder)")
    harness.add_timing_options(parser, rounds=3, warmup=1)
    harness.add_common_options(parser)
    parser.set_defaults(dtype="bfloat16")
    options = parser.parse_args(arguments)
    harness.check_common_options(options)
    if options.device != "cpu":
        raise ConfigError(f"--device is {options.device}; checkpoints are merged on the processor: cpu")
    harness.require_positive(options, "blocks", "shards", "rank")
    if options.directory and not options.directory.is_dir():
        raise ConfigError(f"--directory is {options.directory}, which is no folder; make it first")
    Pattern.parse(options.pattern)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table; `--out` writes the rows as JSON, `--plot` a chart."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="spp-bench-") as scratch:
        harness.run(options, measure_child, lambda options: measure(options, Path(scratch)), table, plot)


def measure_child(options: argparse.Namespace) -> harness.Memory:
    """Return what one merge takes in this process; --child names the folder that has the checkpoint."""
    there = Path(options.child)
    out = there / "out"
    memory = harness.measure_memory(lambda: merge_checkpoint(there / "base", there / "adapter", out), calls=1)
    shutil.rmtree(out)
    return memory


def plot(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the chart of `--plot`: a panel for each pair."""
    panels = {pair[1]: [row for row in rows if row["contender"] in pair] for pair in PAIRS}
    harness.plot_ratios(panels, table(rows).title, rows[0], options)


# ---- How much of some files is in the system's cache: whether a measurement that reads them found it warm.


def cached_share(paths: Iterable[Path]) -> float | None:
    """Return the fraction of the files' pages that are in memory; None where the system does not tell."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError):
        return None
    here = pages = 0
    for path in paths:
        with path.open("rb") as file:
            if not path.stat().st_size:
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                data = np.frombuffer(mapped, np.uint8)
                found = np.empty(-(-data.size // mmap.PAGESIZE), np.uint8)
                address, length = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.size)
                failed = mincore(address, length, ctypes.c_void_p(found.ctypes.data))
                del data
            if failed:
                return None
            here, pages = here + int((found & 1).sum()), pages + found.size
    return here / pages if pages else None


if __name__ == "__main__":
    harness.exiting(main)
