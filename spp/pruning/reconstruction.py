"""`spp.reconstruct`: a model that was pruned anywhere, repaired block by block against the dense one it was made from.

    for each block: run it and the dense one on their own hidden states → train its regions → run both again

In memory, or from disk to disk with one block of each model in memory at a time; finished blocks wait in a folder
beside the output, where a run that was killed finds them. What a region is and how it is trained: spp.pruning.fitting.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spp._version import __version__
from spp.certifying.save import note_origin
from spp.certifying.sources import checkpoint_directory
from spp.configs.adapter import SPPConfig
from spp.configs.checks import BOS, check_choice, check_int
from spp.configs.reconstruction import Reconstruction
from spp.distributed.sums import shared_as, together
from spp.errors import ConfigError, NonFiniteError, WrapError, arg
from spp.evaluation import evaluating
from spp.files import CheckpointReader, check_target, dtype_name
from spp.files.carry import carry_files, refuse_overlap
from spp.models.projection import Projection, find_projections
from spp.models.streamed import StreamedModel, load_whole
from spp.models.targets import input_embedding, name_targets, resolve_projections
from spp.packing.model import packed_layers
from spp.pruning.blocks import BlockRunner, find_blocks
from spp.pruning.disk import checksum, keys_of_blocks, require_safetensors, windows_hash
from spp.pruning.fitting import fit_block
from spp.pruning.loop import layers_by_block, repair_text
from spp.pruning.plan import (
    batches_of,
    begins_with_bos,
    check_layer,
    draw_windows,
    reconstruction_report,
    warn_of_one_window,
)
from spp.pruning.regions import Streams
from spp.pruning.report import BlockReport, ReconstructionReport
from spp.pruning.windows import Calibration, check_calibration
from spp.pruning.work import Work
from spp.rules import get_rule
from spp.wrapping.adapters import base_values, fill, fill_layers, mask_of, parameters_of, write_tensors_of
from spp.wrapping.wrap import adapted, is_wrapped, wrap


@together()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    calibration: Calibration,
    *,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    options: Reconstruction = Reconstruction(),  # noqa: B008  frozen
    bos: str = "auto",
) -> ReconstructionReport:
    """Train a pruned model's blocks, one after another and in place, until they give the dense model's outputs again.

    Zeros of its projections stay, bit for bit; trained are the other weights of the decoder blocks' projections, norms
    and biases. A region whose error on held-out windows does not fall keeps the values that it had.

    With `train="adapter"` no weight changes, and the model is left wrapped (`spp.wrap`) with the trained adapter.

    Inside a process group (torch.distributed) every rank calls it with the same models and options: each computes its
    part of every batch, gradients are summed, and all end with the same weights.

    Args:
        model: pruned, by whatever; not wrapped, not quantized, its weights in memory.
        dense: the model that it was pruned from; it is not changed.
        calibration: token ids (k, L), a list of texts, the path of a text or JSONL file, or "self": text that `dense`
            writes.
        tokenizer: the model's, where calibration is text.
        nsamples: calibration windows at most.
        seqlen: tokens of a window that is cut from text.
        options: how. Its seed draws the windows too.
        bos: as for `spp.prune`.

    Returns:
        What was done to each block: `.blocks[i].before` and `.after` are errors relative to the dense output.

    Raises:
        ConfigError: `dense` is another architecture, or has another vocabulary.
        DataError, TargetError, WrapError, NonFiniteError: as for `spp.prune`.

    Example:
        >>> report = reconstruct(model, dense, "corpus.txt", tokenizer=tokenizer)  # doctest: +SKIP
        >>> report.blocks[0].after < report.blocks[0].before  # doctest: +SKIP
        True
    """
    started = time.perf_counter()
    _check(options, calibration, nsamples, seqlen, bos)
    for name, one in (("model", model), (arg("dense"), dense)):
        if is_wrapped(one) or packed_layers(one):
            raise WrapError(f"{name} is wrapped or packed: spp.merge, spp.unwrap or spp.unpack it first")
    layers = resolve_projections(model)
    check_dense(model, dense, layers)
    for layer in (*layers.values(), *find_projections(dense)):
        check_layer(layer)
    _check_rank(options, layers)
    windows = draw_windows(*(model, calibration, tokenizer, nsamples, seqlen, options.seed, bos), author=lambda: dense)
    warn_of_one_window(options, windows)
    note_origin(model, dense)
    store = RepairStore()
    with evaluating(model), evaluating(dense):
        try:
            repaired = repair_blocks(model, dense, layers, windows, options, store)
        except NonFiniteError as error:
            done = "" if options.adapter is not None else " (blocks before it are repaired already)"
            told = NonFiniteError(f"{error.marked}{done}")
            raise shared_as(told, error) from error
    if options.adapter is not None:
        fill(wrap(model, options.adapter), store.adapters)
    starts = begins_with_bos(calibration, tokenizer, bos)
    return reconstruction_report(options, windows, repaired, time.perf_counter() - started, starts)


class RepairStore:
    """Where blocks of the two models come from and go to; this one is for models in memory.

    Attributes:
        adapters: {"<module path>.<name>": parameter} of those that were trained.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Tensor] = {}

    def resident(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Hold the weights of a block of both models in memory: a context manager."""
        return contextlib.nullcontext()

    def has(self, index: int) -> bool:
        """Whether a block is repaired already."""
        return False

    def finish(self, index: int, repaired: BlockReport, adapters: Mapping[str, Tensor] | None) -> None:
        """Take a resident block that was repaired just now, or the adapters that were trained instead."""
        self.adapters |= adapters or {}

    def adapters_of(self, index: int) -> Mapping[str, Tensor]:
        """Return the adapters of a block that was finished in an earlier run."""
        raise NotImplementedError


def repair_blocks(
    model: nn.Module,
    dense: nn.Module,
    layers: Mapping[str, Projection],
    windows: Tensor,
    options: Reconstruction,
    store: RepairStore,
) -> dict[int, BlockReport]:
    """Reconstruct block by block; return what was done to each, finished blocks excepted.

    Args:
        model, dense: in eval mode.
        layers: targets of `model` by path.
        windows: token ids (k, L).
        options: how.
        store: of the blocks.
    """
    sizes, held = batches_of(options, windows)
    root, blocks = find_blocks(model, list(layers))
    _, dense_blocks = find_blocks(dense, list(layers))
    runner = BlockRunner(model, root, blocks, windows, sizes)
    teacher = BlockRunner(dense, root, dense_blocks, windows, sizes)
    streams = Streams(runner, teacher, contextlib.nullcontext, sizes, held)
    last = max((index for index in range(len(blocks)) if not store.has(index)), default=-1)
    repaired: dict[int, BlockReport] = {}
    bar = tqdm(range(last + 1), desc="reconstructing", unit="block", disable=None)
    of_block = layers_by_block(layers, root, len(blocks))
    for index in bar:
        with store.resident(index), contextlib.ExitStack() as stack:
            adapters: dict[str, Tensor] | None = None
            if options.adapter is not None:
                made = stack.enter_context(adapted(blocks[index], of_block[index], options.adapter))
                adapters = parameters_of(made)
                if store.has(index):
                    fill_layers(made, store.adapters_of(index))
            if not store.has(index):
                repaired[index] = fit_block(streams, index, of_block[index], options)
                store.finish(index, repaired[index], adapters)
                bar.set_postfix_str(repair_text(repaired[index]).removeprefix(", "), refresh=False)
            if index < last:
                streams.advance(index)
                runner.propagate(index)
    return repaired


@together()
def reconstruct_checkpoint(
    pruned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dense: str | os.PathLike[str],
    calibration: Calibration,
    *,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    options: Reconstruction = Reconstruction(),  # noqa: B008  frozen
    bos: str = "auto",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> ReconstructionReport:
    """Reconstruct a pruned checkpoint into another one, block by block, and certify that it has the same zeros.

    Args:
        pruned: a checkpoint of safetensors files, or a hub id.
        out: the directory to make: the weights, the pruned checkpoint's other files, sparsity.json; or the adapter.
        dense: the checkpoint that it was pruned from, or its hub id.
        calibration, tokenizer, nsamples, seqlen, options, bos: as for `spp.reconstruct`.
        dtype: of the weights, while they are trained and as they are written; None is the checkpoint's own.
        device: where blocks are run.
        overwrite: replace what is at `out`, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        What was done to each block.

    Raises:
        CheckpointError: files are bad.
        StreamingError: weights are stored otherwise than the model has them; `spp.reconstruct` can do it.
        ConfigError: `dense` is another architecture, or has another vocabulary.
        OutputError: `out` exists or cannot be written; what is finished stays for the next run.
        MaskError: the zeros would not be those of `pruned`; nothing is written.
        DataError, TargetError, NonFiniteError: as for `spp.prune`.

    Example:
        >>> reconstruct_checkpoint("pruned", "repaired", "dense", "corpus.txt", tokenizer=tokenizer)  # doctest: +SKIP
    """
    started = time.perf_counter()
    _check(options, calibration, nsamples, seqlen, bos)
    target = Path(os.path.realpath(out))
    source, origin = checkpoint_directory(pruned), checkpoint_directory(dense)
    for directory, what in ((source, "the pruned model"), (origin, "the dense model")):
        refuse_overlap(target, directory, what)
        require_safetensors(directory)
    check_target(target, overwrite=overwrite, copies=[source])
    _require_one_tokenizer(source, origin)
    with CheckpointReader(source) as reader, CheckpointReader(origin) as dense_reader:
        carry_files(source, None, set(reader.shards()), told=False)  # what cannot be copied is told before any work
        sides = [_Side(reader, dtype, device), _Side(dense_reader, dtype, device)]
        layers = resolve_projections(sides[0].model)
        sides[0].streamed.require_floats(layer.parameter_path for layer in layers.values())
        check_dense(sides[0].model, sides[1].model, layers)
        _check_rank(options, layers)
        windows = draw_windows(
            *(sides[0].model, calibration, tokenizer, nsamples, seqlen, options.seed, bos),
            author=lambda: load_whole(dense_reader, dtype, device),
        )
        warn_of_one_window(options, windows)
        for side in sides:
            side.split(layers)
        job = {
            "spp_version": __version__,
            "reconstruct": asdict(options),
            "dtype": str(dtype),
            "dtypes": {path: dtype_name(layer.weight.dtype) for path, layer in layers.items()},
            "windows": windows_hash(windows),
            "shape": list(windows.shape),
            "rest": [checksum(side.reader, side.rest) for side in sides],
        }
        with Work(target, job, len(sides[0].blocks)) as work:
            store = _Streamed(sides, work, layers, adapts=options.adapter is not None)
            work.keep_blocks_of(store.checksum)
            for side in sides:
                side.load_rest()
            _share(*(side.model for side in sides))
            with evaluating(sides[0].model), evaluating(sides[1].model):
                repair_blocks(sides[0].model, sides[1].model, layers, windows, options, store)
            repaired = work.repaired()
            if options.adapter is not None:
                store.commit(options.adapter, os.fspath(pruned), overwrite=overwrite)
            else:
                _commit(work, sides[0], dtype=dtype, overwrite=overwrite, dense=dense, pruned=pruned)
    starts = begins_with_bos(calibration, tokenizer, bos)
    return reconstruction_report(options, windows, repaired, time.perf_counter() - started, starts)


def _commit(
    work: Work,
    side: _Side,
    *,
    dtype: torch.dtype | None,
    overwrite: bool,
    dense: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
) -> None:
    """Make the checkpoint of the finished blocks and the rest of the pruned model."""
    layout = {key: (side.streamed.dtype(key), side.reader.shape(key)) for key in side.rest}
    work.commit(
        *(side.reader, layout, side.streamed.value),
        dtype=dtype,
        overwrite=overwrite,
        origin=os.fspath(dense),
        base=pruned,
    )


class _Side:
    """One of the two models: a skeleton, and the checkpoint that its weights come from."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype | None, device: str | torch.device) -> None:
        self.reader = reader
        self.streamed = StreamedModel(reader, dtype, device)
        self.model = self.streamed.model
        self.blocks: Sequence[nn.Module] = ()
        self.keys: list[list[str]] = []
        self.rest: list[str] = []

    def split(self, layers: Mapping[str, Projection]) -> None:
        """Find the blocks and the keys of each."""
        root, self.blocks = find_blocks(self.model, list(layers))
        self.keys, self.rest = keys_of_blocks(self.reader, self.streamed, root, len(self.blocks))

    def load_rest(self) -> None:
        """Load what is outside of the blocks, without a head of its own."""
        self.streamed.load((key for key in self.rest if not self.streamed.is_heads(key)), self.reader)
        self.model.tie_weights()  # type: ignore[operator]


class _Streamed(RepairStore):
    """Blocks that come from the two checkpoints, or finished ones from the work folder."""

    def __init__(self, sides: Sequence[_Side], work: Work, layers: Mapping[str, Projection], *, adapts: bool) -> None:
        super().__init__()
        self._adapts = adapts
        self._pruned, self._dense = sides
        self._work = work
        root, blocks = find_blocks(self._pruned.model, list(layers))
        self._of_block = layers_by_block(layers, root, len(blocks))

    @contextlib.contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Load a block of both, and unload it afterwards: a context manager."""
        finished = self.has(index) and not self._adapts
        directory = self._pruned.reader.directory
        with self._work.reader(index) if finished else CheckpointReader(directory) as origin:
            self._pruned.streamed.load(self._pruned.keys[index], origin)
        with CheckpointReader(self._dense.reader.directory) as origin:
            self._dense.streamed.load(self._dense.keys[index], origin)
        for layer in () if finished else self._of_block[index].values():
            check_layer(layer)
        yield
        for side in (self._pruned, self._dense):
            side.streamed.unload(side.blocks[index])

    def has(self, index: int) -> bool:
        """Whether a block is finished."""
        return self._work.has(index)

    def finish(self, index: int, repaired: BlockReport, adapters: Mapping[str, Tensor] | None) -> None:
        """Write a block, or its adapters."""
        keys, streamed = self._pruned.keys[index], self._pruned.streamed
        tensors = adapters
        if tensors is None:
            tensors = {key: streamed.value(key) for key in keys}
        self._work.finish(index, tensors, {}, self.checksum(index), repaired)

    def adapters_of(self, index: int) -> Mapping[str, Tensor]:
        """Read the adapters of a block from the work folder."""
        with self._work.reader(index) as reader:
            return {key: reader.load(key) for key in reader.keys()}  # noqa: SIM118  a reader is no mapping

    def commit(self, config: SPPConfig, base: str, *, overwrite: bool) -> None:
        """Make an adapter directory of the finished blocks' adapters."""
        hashes: dict[str, dict[str, str]] = {"base_masks": {}}
        side = self._pruned
        for index, layers in enumerate(self._of_block):
            with CheckpointReader(side.reader.directory) as origin:
                side.streamed.load(side.keys[index], origin)
            hashes["base_masks"] |= {path: mask for path, layer in layers.items() if (mask := mask_of(layer))}
            for name, values in base_values((path, layer.held()) for path, layer in layers.items()).items():
                hashes.setdefault(name, {}).update(values)
            side.streamed.unload(side.blocks[index])
        tensors = {key: value for index in range(len(self._of_block)) for key, value in self.adapters_of(index).items()}
        paths = [path for layers in self._of_block for path in layers]
        config = replace(config, target_modules=name_targets(side.model, paths))
        self._work.commit_adapter(
            lambda directory: write_tensors_of(directory, side.model, config, tensors, base, hashes),
            overwrite=overwrite,
        )

    def checksum(self, index: int) -> int:
        """Return a checksum of what a finished block was made of."""
        sums = []
        for side in (self._pruned, self._dense):
            with CheckpointReader(side.reader.directory) as origin:
                sums.append(checksum(origin, side.keys[index]))
        return sums[0] << 32 | sums[1]


def _check_rank(options: Reconstruction, layers: Mapping[str, Projection]) -> None:
    """Raise a ConfigError where an adapter does not fit a layer."""
    if options.adapter is not None:
        for path, layer in layers.items():
            get_rule(options.rule).check_rank(layer.out_features, layer.in_features, options.r, path)


def _check(options: Reconstruction, calibration: Calibration, nsamples: int, seqlen: int, bos: str) -> None:
    if not isinstance(options, Reconstruction):
        raise ConfigError(f"{arg('options')} is {options!r}; pass spp.Reconstruction() with its options")
    check_calibration(calibration)
    check_int("nsamples", nsamples, least=1)
    check_int("seqlen", seqlen, least=1)
    check_choice("bos", bos, BOS)


def check_dense(model: nn.Module, dense: nn.Module, layers: Mapping[str, Projection]) -> None:
    """Raise a ConfigError unless `dense` has the layers and the vocabulary of a pruned model."""
    if model is dense:
        raise ConfigError(
            f"{arg('dense')} is the pruned model itself; load the model that it was pruned from beside it"
        )
    shapes = {projection.path: projection.shape for projection in find_projections(dense)}
    bad = [path for path, layer in layers.items() if shapes.get(path) != layer.shape]
    root, blocks = find_blocks(model, list(layers))
    count = 0 if bad else len(find_blocks(dense, list(layers))[1])
    what = f"is {layers[bad[0]].shape} in the pruned model and {shapes.get(bad[0], 'not there')}" if bad else ""
    if bad or count != len(blocks):
        told = f"{bad[0]} {what} in" if bad else f"the pruned model has {len(blocks)} blocks in {root}, {count} has"
        raise ConfigError(f"{told} {arg('dense')}; pass the model that it was pruned from")
    sizes = [len(e.weight) if isinstance(e := input_embedding(m), nn.Embedding) else 0 for m in (model, dense)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{arg('dense')} has a vocabulary of {sizes[1]} tokens and the pruned model one of {sizes[0]}; pass the "
            f"model that it was pruned from"
        )


def _require_one_tokenizer(pruned: Path, dense: Path) -> None:
    """Raise a ConfigError where both checkpoints have a tokenizer and their vocabularies differ."""
    vocabularies = []
    for directory in (pruned, dense):
        try:
            found = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
            vocabularies.append(found["model"]["vocab"])
        except (OSError, ValueError, KeyError, TypeError):  # another kind of tokenizer, or none
            return
    if vocabularies[0] != vocabularies[1]:
        raise ConfigError(
            f"{dense} has another tokenizer than {pruned}; pass the model that it was pruned from as {arg('dense')}"
        )


def _share(model: nn.Module, dense: nn.Module) -> None:
    """Let the dense model use the pruned one's parameters outside of the blocks where they are the same."""
    mine = dict(model.named_parameters())
    for path, module in dense.named_modules():
        for name, value in module._parameters.items():
            other = mine.get(f"{path}.{name}".removeprefix("."))
            if value is None or other is None or value.is_meta or other.is_meta or other.dtype != value.dtype:
                continue
            if torch.equal(value, other):
                module._parameters[name] = other
