"""From what another tool wrote to a dense checkpoint with exact zeros, certified: tensor by tensor, never the model.

compressed-tensors' sparse-bitmask and sparse-24-bitmask    read → put the values into their places → check → write
masks over a dense checkpoint                               read → W ⊙ mask → check → write
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from spp.certifying.certificate import Certificate, SparsityReport
from spp.certifying.save import origin_of
from spp.certifying.sources import checkpoint_directory, require_projections
from spp.converting.masks import MaskFile, find_masks, fit
from spp.errors import CheckpointError, ConfigError, MaskError, arg, call, some_of
from spp.files import CheckpointReader, atomic_directory, dtype_name, read_json, write_json
from spp.files.carry import refuse_overlap
from spp.files.formats import PACKED, stored_format
from spp.merging.rewrite import Rewriting, Transform, write_shards
from spp.models.streamed import refuse_quantized
from spp.models.targets import is_other_matrix
from spp.weights.quantized.disk import DequantizedReader

logger = logging.getLogger(__name__)

_ENTRIES = ("quantization_config", "compression_config")  # of config.json: how weights are stored
_PRUNED = 0.9  # of a matrix that is no projection: the share of kept weights below which it counts as pruned


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dense: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> SparsityReport:
    """Write a dense checkpoint with exact zeros from a compressed one, or from masks and the dense model they prune.

    Read are compressed-tensors' sparse-bitmask and sparse-24-bitmask without quantization, and masks by the names of
    the weights in a safetensors or an .npz file (spp.converting.masks), such as MaskLLM's. The output appears whole and
    certified, or not at all; the tokenizer and the other files beside the weights go along.

    Args:
        src: a compressed checkpoint, or a file or folder of masks; a directory or a hub id.
        dst: a directory outside the sources that does not exist yet, unless `overwrite`.
        dense: with masks, the checkpoint (safetensors) that they prune, or a hub id.
        overwrite: replace what is at `dst`, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        The zeros of the output, as its certificate says.

    Raises:
        CheckpointError: a file is cut short or damaged, its parts contradict each other, or it is pickled; a mask has
            values other than 0 and 1.
        MaskError: masks do not fit `dense` in names or shapes, keep nothing of a weight, or are of a tied weight.
        ConfigError: masks without `dense`, `dense` without masks; `src` is quantized, packed or plain already; `dst`
            is, contains or lies inside a source.
        NonFiniteError: a weight holds NaN or infinity.
        OutputError: `dst` exists, or cannot be written.

    Example:
        >>> spp.convert("llama-2of4-compressed", "llama-2of4").pattern  # doctest: +SKIP
        '2:4'
        >>> spp.convert("mask_compressed.npz", "llama-2of4", dense="llama").sparsity  # doctest: +SKIP
        0.5
    """
    is_file = isinstance(src, (str, os.PathLike)) and Path(src).is_file()
    source = Path(src) if is_file else checkpoint_directory(src, "checkpoint or folder of masks")
    masks, target = find_masks(source), Path(dst)
    if masks is None:
        if dense is not None:
            raise ConfigError(
                f"{arg('dense')} is for masks, and {source} is a checkpoint, which needs none: leave it out"
            )
        certificate = _decompress(source, target, overwrite)
    elif dense is None:
        raise ConfigError(f"{masks} holds masks: name the dense checkpoint that they prune, {arg('dense', ...)}")
    else:
        certificate = _prune(masks, source, dense, target, overwrite)
    logger.info("converted %d weights into %s", len(certificate.tensors), dst)
    return certificate.report()


def _decompress(source: Path, target: Path, overwrite: bool) -> Certificate:
    """Write a compressed checkpoint plain."""
    refuse_overlap(target, source, "the checkpoint")
    said = stored_format(source)
    if said is not None and not said.compressed:
        what = "packed; " if said.method == PACKED else f"{said}, and only unquantized sparse formats are converted: "
        raise ConfigError(f"{source} is {what}{said.remedy}")
    with DequantizedReader(source) as reader:
        if reader.packed:
            raise ConfigError(f"{source} is packed; {call('export_dense', 'dir, out')} gives the dense checkpoint")
        _refuse_what_is_left(reader)
        require_projections(reader, whole=True)
        if said is None and not reader.quantized:
            raise ConfigError(
                f"{source} is plain already: there is nothing to convert; {call('certify', 'dir')} certifies its zeros"
            )
        same = Transform(lambda key, weight: weight)
        rewriting = Rewriting(reader, dict.fromkeys(reader.quantized, same), None, _pruned_matrices(reader))
        with atomic_directory(target, overwrite=overwrite, copies=[source]) as directory:
            write_shards(rewriting, directory, "converting")
            path = directory / "config.json"
            if path.exists():
                config = read_json(path, "the model's config")
                write_json(path, {name: value for name, value in config.items() if name not in _ENTRIES})
            certificate = rewriting.certificate()
            certificate.write(directory)
    return certificate


def _refuse_what_is_left(reader: DequantizedReader) -> None:
    """Raise for weights that are stored in a way which is not read."""
    scaled = [key for key, one in reader.quantized.items() if not one.lossless]
    if scaled:
        form = reader.quantized[scaled[0]].form
        raise ConfigError(
            f"{reader.directory} is quantized: {some_of(scaled, 3)} as {form}; only unquantized sparse formats are "
            f"converted"
        )
    for key in reader:
        path, _, name = key.rpartition(".")
        other = {"compressed": f"{path}.bitmask", "bitmask": f"{path}.compressed"}.get(name)
        if other is not None and other not in reader:
            raise CheckpointError(f"{reader.directory}: there is {key}, but no {other}; fetch or save it again")
        if name == "compressed":
            kind = dtype_name(reader.dtype(key))
            raise ConfigError(f"{reader.directory}: {key} is {kind}: quantized and compressed, which is not converted")


def _pruned_matrices(reader: DequantizedReader) -> list[str]:
    """Return the keys of other matrices than projections that are stored with a tenth of zeros or more."""

    def is_pruned(key: str) -> bool:
        one = reader.quantized[key]
        kept = math.prod(CheckpointReader.shape(reader, one.parts[0]))
        return is_other_matrix(key, len(one.shape), one.dtype) and kept <= _PRUNED * math.prod(one.shape)

    return list(filter(is_pruned, reader.quantized))


def _prune(file: Path, source: Path, given: str | os.PathLike[str], target: Path, overwrite: bool) -> Certificate:
    """Write a dense checkpoint with the zeros of masks."""
    dense = checkpoint_directory(given)
    refuse_overlap(target, dense, "the dense model")
    if source.is_dir():
        refuse_overlap(target, source, "the folder of masks")
    elif Path(os.path.realpath(source)).is_relative_to(os.path.realpath(target)):
        raise ConfigError(f"the output {target} contains the masks, {source}; choose a path outside it")
    refuse_quantized(dense)
    with MaskFile(file) as masks, CheckpointReader(dense) as reader:
        require_projections(reader, whole=True)
        fitted = fit(masks, reader)

        def masked(key: str, weight: Tensor) -> Tensor:
            mask = masks.mask(fitted.names[key], tuple(weight.shape))
            if not bool(mask.any()):
                raise MaskError(f"{file}: {fitted.names[key]} keeps nothing of {key}; 1 or True is what is kept")
            return weight.masked_fill(~mask, 0)

        transforms = dict.fromkeys(fitted.names, Transform(masked, keeps_zeros=False))
        rewriting = Rewriting(reader, transforms, None, certified=list(fitted.names))
        with atomic_directory(target, overwrite=overwrite, copies=[dense]) as directory:
            write_shards(
                rewriting, directory, "converting", card=False
            )  # another model: its card is not the dense one's
            certificate = replace(rewriting.certificate(), origin=origin_of(dense) or os.fspath(given))
            certificate.write(directory)
    if fitted.without:
        logger.info(
            "%d projections have no mask and stay as they are: %s", len(fitted.without), some_of(fitted.without)
        )
    return certificate
