"""Prune a checkpoint that is larger than memory: one decoder block at a time from disk to disk.

    for each block: load → collect statistics → prune → write its shard → propagate → unload

In memory at once: one block, its statistics, the hidden states and what comes before the blocks (embeddings). The
weights are bit for bit those of `spp.prune`. Finished blocks wait in a folder beside the output; a run that was killed
finds them there, goes through them again only to propagate, and goes on with the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spp._version import __version__
from spp.certifying.save import origin_of
from spp.certifying.sources import checkpoint_directory
from spp.configs.pruning import OWL, Names, Patterns, PruneOptions
from spp.configs.reconstruction import Reconstruction
from spp.distributed.sums import together
from spp.errors import StreamingError, TargetError
from spp.evaluation import evaluating
from spp.files import CheckpointReader, check_target, dtype_name
from spp.files.carry import carry_files, refuse_overlap
from spp.files.formats import pickled
from spp.files.reader import INDEX, SINGLE
from spp.masks.patterns import Pattern, as_array
from spp.models.projection import Projection
from spp.models.streamed import StreamedModel, load_whole
from spp.pruning.blocks import find_blocks
from spp.pruning.loop import BlockStore, layers_by_block, prune_blocks
from spp.pruning.plan import PrunePlan, check_layer, make_plan, tell_patterns
from spp.pruning.regions import DenseBlock
from spp.pruning.report import BlockReport, LayerReport, PruneReport
from spp.pruning.windows import Calibration, check_calibration
from spp.pruning.work import Work


def prune_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str = "wanda",
    pattern: Patterns = "2:4",
    calibration: Calibration | None = None,
    *,
    target_modules: Names = None,
    exclude_modules: Names = None,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    owl: OWL | None = None,
    keep_zeros: bool = True,
    reconstruct: Reconstruction | None = None,
    bos: str = "auto",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> PruneReport:
    """Prune a checkpoint into another one, block by block, and certify it.

    Inside a process group as `spp.prune`; rank 0 writes, and finished blocks lie where all ranks can read them.

    Args:
        directory: a checkpoint of safetensors files, or a hub id.
        out: the directory to make: the weights (in one file up to 5 GB, else in one for each block), the source's
            other files, sparsity.json.
        method, pattern, calibration, target_modules, exclude_modules, tokenizer, nsamples, seqlen, seed: as for
            `spp.prune`.
        owl: as for `spp.prune`; the dense blocks pass through memory once more.
        keep_zeros, reconstruct, bos: as for `spp.prune`.
        dtype: of the weights, while they are pruned and as they are written; None is the checkpoint's own.
        device: where a block is run.
        overwrite: replace what is at `out`, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        What was done to each layer.

    Raises:
        CheckpointError: the files are bad.
        StreamingError: the weights are stored otherwise than the model has them, or `method` needs no calibration and
            targets lie outside the decoder blocks; `spp.prune` can do it.
        OutputError: `out` exists or cannot be written; what is finished stays for the next run.
        ConfigError, PatternError, TargetError, DataError, NonFiniteError: as `spp.prune`.

    Example:
        >>> report = prune_checkpoint("model", "pruned", "magnitude", "2:4")  # doctest: +SKIP
    """
    options = PruneOptions(
        method,
        pattern,
        calibration,
        target_modules,
        exclude_modules,
        nsamples,
        seqlen,
        seed,
        owl,
        keep_zeros,
        reconstruct,
        bos,
    )
    if calibration is not None:
        check_calibration(calibration)
    tell_patterns(pattern)
    return prune_checkpoint_by(
        directory, out, options, tokenizer=tokenizer, dtype=dtype, device=device, overwrite=overwrite
    )


@together()
def prune_checkpoint_by(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PruneOptions,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> PruneReport:
    """Prune as `prune_checkpoint`, by options that are checked and told."""
    started = time.perf_counter()
    target = Path(os.path.realpath(out))
    source = checkpoint_directory(directory)
    refuse_overlap(target, source, "the model")
    check_target(target, overwrite=overwrite, copies=[source])
    require_safetensors(source)
    with CheckpointReader(source) as reader:
        carry_files(source, None, set(reader.shards()), told=False)  # what cannot be copied is told before any work
        streamed = StreamedModel(reader, dtype, device)
        model = streamed.model
        plan = make_plan(model, options, tokenizer, lambda: load_whole(reader, dtype, device))
        streamed.require_floats(layer.parameter_path for layer in plan.layers.values())
        root, blocks = _blocks(model, plan)
        of_block = layers_by_block(plan.layers, root, len(blocks))
        keys, rest = keys_of_blocks(reader, streamed, root, len(blocks))
        job = {**_job(plan, reader, streamed, dtype), "rest": checksum(reader, rest)}
        with Work(target, job, len(blocks)) as work:
            work.keep_blocks_of(lambda index: checksum(reader, keys[index]))
            streamed.load((key for key in rest if not streamed.is_heads(key)), reader)
            model.tie_weights()  # type: ignore[operator]
            store = _Streamed(streamed, source, work, blocks, keys, of_block)
            with evaluating(model):
                prune_blocks(plan, of_block, lambda: plan.runner(model, root, blocks), store)
            layout = {key: (streamed.dtype(key), reader.shape(key)) for key in rest}
            repaired = work.repaired()
            origin = origin_of(source) or os.fspath(directory)
            work.commit(reader, layout, streamed.value, dtype=dtype, overwrite=overwrite, origin=origin)
    return plan.report(work.reports(), started, repaired)


class _Streamed(BlockStore):
    """Blocks that come from the source, or finished ones from the work folder, and go to the work folder."""

    def __init__(
        self,
        streamed: StreamedModel,
        source: Path,
        work: Work,
        blocks: list[nn.Module],
        keys: list[list[str]],
        of_block: list[dict[str, Projection]],
    ) -> None:
        self._streamed = streamed
        self._source = source
        self._work = work
        self._blocks = blocks
        self._keys = keys
        self._of_block = of_block

    @contextlib.contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Load a block, and unload it afterwards: a context manager."""
        finished = self.has(index)
        # A reader of its own: what one block has mapped of the files is freed, and does not add up to all of them.
        with self._work.reader(index) if finished else CheckpointReader(self._source) as origin:
            self._streamed.load(self._keys[index], origin)
        if not finished:
            for layer in self._of_block[index].values():
                check_layer(layer)
        yield
        self._streamed.unload(self._blocks[index])

    def has(self, index: int) -> bool:
        """Whether a block is finished."""
        return self._work.has(index)

    def dense(self, index: int, block: nn.Module) -> DenseBlock:
        """Return the values that a resident block has in the source."""
        if not self.has(index):
            return DenseBlock(block)
        with CheckpointReader(self._source) as origin:
            self._streamed.load(self._keys[index], origin)
        dense = DenseBlock(block, copy=False)
        with self._work.reader(index) as origin:
            self._streamed.load(self._keys[index], origin)
        return dense

    def finish(self, index: int, done: Mapping[str, LayerReport], repaired: BlockReport | None) -> None:
        """Write a block."""
        with CheckpointReader(self._source) as origin:
            source = checksum(origin, self._keys[index])
        self._work.finish(index, {key: self._streamed.value(key) for key in self._keys[index]}, done, source, repaired)

    def patterns(self, find: Callable[[], dict[str, Pattern]]) -> dict[str, Pattern]:
        """Find the patterns once, before the first block is pruned, and remember them."""
        known = self._work.recall("patterns")
        if known is None:
            known = {path: str(pattern) for path, pattern in find().items()}
            self._work.remember("patterns", known)
        if known.keys() != {path for layers in self._of_block for path in layers}:
            raise self._work.malformed()
        return {path: Pattern.parse(pattern) for path, pattern in known.items()}


def keys_of_blocks(
    reader: CheckpointReader, streamed: StreamedModel, root: str, count: int
) -> tuple[list[list[str]], list[str]]:
    """Return the keys of each of the blocks `root`.0, `root`.1, …, and those outside of them."""
    keys = [[k for k in reader if streamed.memory_key(k).startswith(f"{root}.{i}.")] for i in range(count)]
    return keys, sorted(set(reader.keys()).difference(*keys))


def windows_hash(windows: Tensor) -> str:
    """Return the sha256 of token ids (k, L)."""
    return hashlib.sha256(as_array(windows.contiguous()).data).hexdigest()


def require_safetensors(source: Path) -> None:
    """Raise a StreamingError for a checkpoint of pickled files."""
    sentence = None if (source / SINGLE).exists() or (source / INDEX).exists() else pickled(source)
    if sentence is not None:
        raise StreamingError(f"{sentence}; so it can be pruned in memory, but not block by block from the disk")


def _blocks(model: nn.Module, plan: PrunePlan) -> tuple[str, list[nn.Module]]:
    try:
        return find_blocks(model, list(plan.layers))
    except TargetError as error:
        if plan.calibrated:
            raise
        raise StreamingError(
            f"{error.marked}; it can be pruned in memory, but not block by block from the disk"
        ) from error


def _job(
    plan: PrunePlan, reader: CheckpointReader, streamed: StreamedModel, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return all that decides what a finished block holds."""
    owl = plan.options.owl
    return {
        "spp_version": __version__,
        "method": plan.method.name,
        "patterns": {path: str(pattern) for path, pattern in plan.patterns.items()},
        "owl": None if owl is None else [owl.threshold, owl.spread],
        "zeros_kept": plan.options.keep_zeros,
        "reconstruct": None if plan.options.reconstruct is None else asdict(plan.options.reconstruct),
        "dtype": str(dtype),
        "dtypes": {path: dtype_name(layer.weight.dtype) for path, layer in plan.layers.items()},
        "windows": windows_hash(plan.windows),
        "shape": list(plan.windows.shape),
    }


def checksum(reader: CheckpointReader, keys: Iterable[str]) -> int:
    """Return the crc32 of tensors as they are stored: clocks, which may jump, do not tell whether they changed."""
    crc = 0
    for key in keys:
        for piece in reader.pieces(key):
            crc = zlib.crc32(piece, crc)
    return crc
