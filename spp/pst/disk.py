"""Prune a dense checkpoint by what PST learned, shard by shard: one weight at a time in memory, never the model.

The tensors are bit for bit those of `spp.pst.convert` in memory, where products of the factors round alike.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from spp.certifying.certificate import SparsityReport
from spp.certifying.sources import checkpoint_directory
from spp.configs.pst import PSTConfig
from spp.errors import AdapterError, NonFiniteError
from spp.files import CheckpointReader, content_crc32
from spp.files.carry import refuse_overlap
from spp.masks.patterns import Pattern
from spp.merging.places import locate
from spp.merging.rewrite import Rewriting, Transform, output, stored_dtype, write_shards
from spp.merging.weight import check_rounding
from spp.pst.files import PSTState, read
from spp.pst.function import Scales, masked_weight
from spp.pst.layer import FACTORS, factor_shapes
from spp.rules import rescue_
from spp.rules.adapter import arithmetic_dtype
from spp.wrapping.adapter_files import does_not_fit, misfits, shapes_of

logger = logging.getLogger(__name__)


def convert_checkpoint(
    base_dir: str | os.PathLike[str],
    state_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> SparsityReport:
    """Make permanent what PST learned of a dense checkpoint; the output appears whole and certified, or not at all.

    Args:
        base_dir: the dense checkpoint (safetensors) that PST trained on, or a hub id.
        state_dir: what `spp.pst.save` wrote, such as the adapter/ of a tuning run, or a hub id.
        out_dir: a directory outside both that does not exist yet, unless `overwrite`.
        dtype: convert all floating tensors; None keeps each tensor's own.
        overwrite: replace what is at `out_dir`, if it is an output (spp.files.recognised) and holds nothing else.
        dry_run: do and check everything, and write nothing.

    Returns:
        The zeros of the output, as its certificate says.

    Raises:
        AdapterError: the state does not fit, or was trained on other weights.
        NonFiniteError: NaN or infinity in the state, a projection or a result.
        CheckpointError: files are bad.
        ConfigError: `out_dir` is, contains or lies inside a source, or the state's config is wrong.
        OutputError: `out_dir` exists, or cannot be written.

    Example:
        >>> spp.convert_checkpoint("dense", "run/adapter", "sparse-2of4").pattern  # doctest: +SKIP
        '2:4'
    """
    check_rounding(dtype, "nearest")
    base, state = checkpoint_directory(base_dir), read(Path(state_dir))
    refuse_overlap(Path(out_dir), base, "the base")
    refuse_overlap(Path(out_dir), state.source, "the PST state")
    with CheckpointReader(base) as reader:
        converting = _Converting(reader, state, dtype)
        rewriting = Rewriting(reader, converting.transforms, dtype, certified=converting.layers)
        with output(rewriting, out_dir, overwrite=overwrite, dry_run=dry_run) as directory:
            write_shards(rewriting, directory, "converting")
            certificate = rewriting.certificate()
            if directory is not None:
                certificate.write(directory)
    logger.info("converted %d layers%s", len(converting.layers), "" if dry_run else f" into {out_dir}")
    return certificate.report()


class _Converting:
    """Which tensors become what.

    Attributes:
        layers: {key on disk: (module path, whether it is stored (n, m))}.
        transforms: of these, and of modules that trained as a whole.
    """

    def __init__(self, reader: CheckpointReader, state: PSTState, dtype: torch.dtype | None) -> None:
        self.reader, self.state, self.dtype = reader, state, dtype
        paths = list(state.sparsity)
        places = locate(reader, paths)
        keys = {f"{path}.{name}": (path, name) for path in paths for name in FACTORS}
        self.whole = {name: tensor for name, tensor in state.tensors.items() if name not in keys}
        problems = [f"missing {key}" for key in keys.keys() - state.tensors.keys()]
        problems += [f"the base has no {path}.weight" for path in paths if path not in places]
        for name in ("base_crc32", "base_dtype"):
            problems += [f"{name} lacks {path}" for path in paths if path not in getattr(state, name)]
        for path, place in places.items():
            if place.group is not None or len(place.shape) != 2:
                problems.append(f"{path} is kept on the disk as {', '.join(place.keys)}; convert it in memory")
            elif not any(f"missing {path}." in problem for problem in problems):
                m, n = place.shape[::-1] if place.transposed else place.shape
                k, q = state.config.weight_rank, state.config.mask_rank
                expected = factor_shapes(m, n, k, q)
                needed = {f"{path}.{name}": shape for name, shape in expected.items()}
                problems += misfits(needed, shapes_of({key: state.tensors[key] for key in needed}))[1]
        problems += [
            f"{name}, which trained as a whole, is not in the base: convert in memory, with spp.pst.load(model, …)"
            for name, tensor in self.whole.items()
            if name not in reader or reader.shape(name) != tuple(tensor.shape)
        ]
        if problems:
            what = f"the PST state in {state.source}"
            raise AdapterError(does_not_fit(what, problems, f"does not fit {reader.directory}"))
        self.layers = {place.keys[0]: (path, place.transposed) for path, place in places.items()}
        changed = Transform(self._converted, keeps_zeros=False)
        self.transforms = {
            **dict.fromkeys(self.layers, changed),
            **{
                name: Transform(lambda key, _: self.whole[key].to(self._stored(key)), keeps_zeros=False)
                for name in self.whole
            },
        }

    def _stored(self, key: str) -> torch.dtype:
        return stored_dtype(self.reader, key, self.dtype)

    def _converted(self, key: str, weight: Tensor) -> Tensor:
        path, transposed = self.layers[key]
        state, config = self.state, self.state.config
        weight = weight.to(getattr(torch, state.base_dtype[path]))
        if content_crc32(weight) != state.base_crc32[path]:
            raise AdapterError(
                f"{key} of {self.reader.directory} is not the weight that {state.source} was trained on; the mask "
                f"would be another. It belongs to {state.base_name or 'another base'}: pass that one"
            )
        arithmetic = arithmetic_dtype(weight.dtype)
        factors = tuple(state.tensors[f"{path}.{name}"].to(arithmetic) for name in FACTORS)
        masked, _ = masked_weight(
            weight.T if transposed else weight,
            factors,  # type: ignore[arg-type]  # six
            _scales(config, state.sparsity[path]),
        )
        effective = masked.to(weight.dtype)
        if not bool(torch.isfinite(effective).all()):
            raise NonFiniteError(f"{path}: the masked weight is not finite; take an earlier checkpoint")
        result = effective.to(self._stored(key))
        rescue_(result, effective)
        return result.T if transposed else result


def _scales(config: PSTConfig, sparsity: float) -> Scales:
    pattern = None if config.pattern is None else Pattern.parse(config.pattern)
    return Scales(config.weight_scale, config.low_rank_scale, config.structured_scale, sparsity, pattern)
