"""Prune a checkpoint that is larger than memory: one decoder block at a time from disk to disk.

    for each block: load → collect statistics → prune → write its shard → propagate → unload

In memory at once: one block, its statistics, the hidden states and what lies before the blocks (embeddings). The
weights are bit for bit those of `spp.prune`. Finished blocks wait in a folder beside the output; a run that was killed
finds them there, goes through them again only to propagate, and goes on with the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spp.calibrate import LayerReport, PruneReport
from spp.calibrate.blocks import BlockRunner, evaluating, find_blocks
from spp.calibrate.collect import gather_inputs
from spp.calibrate.methods import LayerInputs, Method, get_method, prune_layer
from spp.calibrate.model import (
    Patterns,
    check_ids,
    check_layer,
    common_inputs,
    describe,
    fitting_seqlen,
    resolve_patterns,
    share_of,
    warn_of_experts,
)
from spp.calibrate.windows import Calibration, calibration_windows
from spp.checkpoint.merging import carry_files, refuse_overlap
from spp.checkpoint.saving import make_certificate
from spp.checkpoint.sources import checkpoint_directory
from spp.errors import CheckpointError, ConfigError, OutputError, OutputExistsError
from spp.files import (
    CheckpointReader,
    atomic_directory,
    atomic_file,
    read_json,
    require_replaceable,
    save_tensors,
    write_json,
)
from spp.files.atomic import output_error
from spp.files.reader import INDEX
from spp.patterns import Pattern
from spp.targets import output_head, resolve_targets

logger = logging.getLogger(__name__)

_PROGRESS = "progress.json"


def prune_checkpoint(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str = "wanda",
    pattern: Patterns = "2:4",
    calibration: Calibration | None = None,
    *,
    target_modules: str | list[str] | tuple[str, ...] | None = None,
    exclude_modules: str | list[str] | tuple[str, ...] | None = None,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> PruneReport:
    """Prune a checkpoint into another one, block by block, and certify it.

    Args:
        directory: a checkpoint of safetensors files, or a hub id.
        out: the directory to make: one shard a block, the source's other files, sparsity.json.
        method: as for `spp.prune`.
        pattern: as for `spp.prune`.
        calibration: as for `spp.prune`.
        target_modules: as for `spp.prune`.
        exclude_modules: as for `spp.prune`.
        tokenizer: as for `spp.prune`.
        nsamples: as for `spp.prune`.
        seqlen: as for `spp.prune`.
        seed: as for `spp.prune`.
        device: where a block is run.
        overwrite: replace what is at `out`.

    Returns:
        What was done to each layer.

    Raises:
        CheckpointError: the files are bad, or store their weights under other names than the model has them.
        OutputError: `out` exists or cannot be written; what is finished stays for the next run.
        ConfigError, PatternError, TargetError, DataError, NonFiniteError: as `spp.prune`.

    Example:
        >>> report = prune_checkpoint("model", "pruned", "magnitude", "2:4")  # doctest: +SKIP
    """
    started = time.perf_counter()
    chosen = get_method(method)
    if chosen.calibrated and calibration is None:
        raise ConfigError(f'method {method!r} needs calibration data: pass calibration=, or method="magnitude"')
    source, target = checkpoint_directory(directory), Path(os.path.realpath(out))
    refuse_overlap(target, source, "the model")
    require_replaceable(target)
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} exists already; choose another path, or pass overwrite=True (--overwrite)")
    model = _skeleton(source)
    layers = dict(resolve_targets(model, target_modules, exclude_modules))
    patterns = resolve_patterns(layers, pattern)
    for path, layer in layers.items():
        patterns[path].require_fit(layer.get_parameter("weight").shape[1], path, common=common_inputs(layers))
    warn_of_experts(model)
    root, blocks = find_blocks(model, list(layers))
    windows = torch.empty(0, 0, dtype=torch.int64)
    if calibration is not None:
        length = fitting_seqlen(model, calibration, seqlen)
        windows = calibration_windows(calibration, tokenizer, nsamples=nsamples, seqlen=length, seed=seed)
        check_ids(model, windows)
    with CheckpointReader(source) as reader:
        of_block = [[key for key in reader if key.startswith(f"{root}.{i}.")] for i in range(len(blocks))]
        rest = sorted(set(reader.keys()) - {key for keys in of_block for key in keys})
        _require_keys(model, reader)
        job = {
            "method": method,
            "patterns": {path: str(patterns[path]) for path in layers},
            "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "shape": list(windows.shape),
            "source": {
                name: [(source / name).stat().st_size, (source / name).stat().st_mtime_ns]
                for name in sorted(reader.shards())
            },
        }
        work = _Work(target, job, len(blocks))
        _load(model, (key for key in rest if not _is_heads(model, key)), reader, device)
        model.tie_weights()  # type: ignore[operator]
        with evaluating(model):
            runner = None if calibration is None else BlockRunner(model, root, blocks, windows.to(device))
            unfinished = [index for index in range(len(blocks)) if not work.has(index)]
            bar = tqdm(range(max(unfinished, default=-1) + 1), desc=f"pruning ({method})", unit="block", disable=None)
            for index in bar:
                with work.reader(index) if work.has(index) else contextlib.nullcontext(reader) as origin:
                    _load(model, of_block[index], origin, device)
                if not work.has(index):
                    inside = {path: layer for path, layer in layers.items() if path.startswith(f"{root}.{index}.")}
                    done = _prune_block(runner, index, inside, chosen, patterns, windows)
                    work.finish(index, {key: _get(model, key, reader) for key in of_block[index]}, done)
                    error = max((layer.relative_error or 0.0 for layer in done.values()), default=0.0)
                    bar.set_postfix(error=f"{error:.3f}", refresh=False)
                if runner is not None and index < unfinished[-1]:
                    runner.propagate(index)
                _unload(blocks[index])
        work.commit(reader, source, rest, overwrite)
    reports = work.reports()
    return PruneReport(
        method=method,
        pattern=describe(pattern),
        layers={path: reports[path] for path in layers},
        sparsity=share_of(reports, "sparsity"),
        windows=windows.shape[0],
        seqlen=windows.shape[1],
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _prune_block(
    runner: BlockRunner | None,
    index: int,
    layers: Mapping[str, nn.Module],
    method: Method,
    patterns: Mapping[str, Pattern],
    windows: Tensor,
) -> dict[str, LayerReport]:
    """Prune the layers of a block that is in memory."""
    for path, layer in layers.items():
        check_layer(path, layer, patterns[path])
    inputs: dict[str, LayerInputs] = {}
    if runner is not None and layers:
        inputs = gather_inputs(runner, index, layers, method, windows)
    return {
        path: prune_layer(path, layer, inputs.pop(path, None), method, patterns[path]) for path, layer in layers.items()
    }


class _Work:
    """The folder beside the output where finished blocks wait.

    Args:
        target: the output.
        job: all that decides what a finished block holds; finished blocks of another job are thrown away.
        blocks: how many there are.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], blocks: int) -> None:
        self._target = target
        self._blocks = blocks
        self._folder = target.parent / f".{target.name}.pruning"
        self._progress: dict[str, Any] = {"job": dict(job), "blocks": {}}
        with self._writing():
            if (self._folder / _PROGRESS).exists():
                found = read_json(self._folder / _PROGRESS, "the progress of an earlier run")
                if found.get("job") == self._progress["job"]:
                    self._progress = found
                    logger.info("going on behind %d finished blocks in %s", len(found["blocks"]), self._folder)
                else:
                    logger.warning("%s holds blocks of another job; starting anew", self._folder)
                    shutil.rmtree(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)

    def has(self, index: int) -> bool:
        """Whether a block is finished."""
        return str(index) in self._progress["blocks"]

    def reader(self, index: int) -> CheckpointReader:
        """Return a reader of a finished block."""
        return CheckpointReader(self._folder, file=self._shard(index + 1))

    def finish(self, index: int, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerReport]) -> None:
        """Write a finished block, then the note that it is finished."""
        with self._writing():
            with atomic_file(self._folder / self._shard(index + 1), overwrite=True) as path:
                save_tensors(path, {key: t.cpu() for key, t in tensors.items()})
            self._progress["blocks"][str(index)] = {path: asdict(layer) for path, layer in layers.items()}
            with atomic_file(self._folder / _PROGRESS, overwrite=True) as path:
                write_json(path, self._progress)

    def reports(self) -> dict[str, LayerReport]:
        """Return what was done to each layer."""
        return {
            path: LayerReport(**{**values, "shape": tuple(values["shape"])})
            for layers in self._progress["blocks"].values()
            for path, values in layers.items()
        }

    def commit(self, reader: CheckpointReader, source: Path, rest: list[str], overwrite: bool) -> None:
        """Make the output of the finished blocks and the rest of the source; remove the folder."""
        with atomic_directory(self._target, overwrite=overwrite) as directory:
            carry_files(source, directory, set(reader.shards()))
            save_tensors(directory / self._shard(0), {key: reader.tensor(key) for key in rest})
            file_of = dict.fromkeys(rest, self._shard(0))
            for index in range(self._blocks):
                name = self._shard(index + 1)
                try:
                    os.link(self._folder / name, directory / name)
                except OSError:
                    shutil.copyfile(self._folder / name, directory / name)
                with self.reader(index) as block:
                    file_of.update(dict.fromkeys(block.keys(), name))
            size = sum(reader.tensor(key).nbytes for key in reader)
            write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": file_of})
            with CheckpointReader(directory) as pruned:
                make_certificate(pruned).write(directory)
        shutil.rmtree(self._folder)

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._blocks + 1:05d}.safetensors"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise output_error(error, self._target) from error


def _skeleton(source: Path) -> nn.Module:
    """Return the model without weights, its buffers computed as its own code does."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{source} is quantized; prune the checkpoint that it was made from")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def _require_keys(model: nn.Module, reader: CheckpointReader) -> None:
    names = [name for name, _ in model.named_parameters()]  # a tied weight once
    missing = sorted(name for name in names if name not in reader)
    wrong = sorted(n for n, p in model.named_parameters() if n in reader and reader.shape(n) != tuple(p.shape))
    if missing or wrong:
        what = f"lacks {', '.join(missing[:3])}" if missing else f"holds {wrong[0]} in another shape"
        raise CheckpointError(
            f"{reader.directory} {what}{', …' if len(missing) > 3 else ''}: its weights are stored otherwise than the "
            f"model has them, so it cannot be streamed; load it with transformers and use spp.prune"
        )


def _is_heads(model: nn.Module, key: str) -> bool:
    """Whether a key is the output head's own: the blocks never need it."""
    head = output_head(model)
    return head is not None and dict(model.named_modules()).get(key.rpartition(".")[0]) is head


def _load(model: nn.Module, keys: Iterable[str], reader: CheckpointReader, device: str | torch.device) -> None:
    """Give the model's tensors the values on disk; keys that it does not have are left out."""
    modules = dict(model.named_modules())
    for key in keys:
        path, _, name = key.rpartition(".")
        module = modules.get(path)
        if module is None:
            continue
        if name in module._parameters:
            value = reader.tensor(key).to(device, copy=True)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        elif module._buffers.get(name) is not None:
            module._buffers[name] = reader.tensor(key).to(device, copy=True)


def _unload(block: nn.Module) -> None:
    """Put a block's parameters back on the meta device."""
    for module in block.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)


def _get(model: nn.Module, key: str, reader: CheckpointReader) -> Tensor:
    """Return a tensor of the model, or, of one that it does not have, what the disk holds."""
    path, _, name = key.rpartition(".")
    module = dict(model.named_modules()).get(path)
    value = module._parameters.get(name) if module is not None else None
    return reader.tensor(key) if value is None else value
