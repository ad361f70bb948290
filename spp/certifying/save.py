"""Save a model with the certificate of its zeros, or certify a checkpoint that exists."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Collection, Mapping, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from spp.certifying.certificate import BaseRecord, Certificate, SparsityReport, TensorLayout, certified_keys
from spp.certifying.scan import scan_reader, scan_source
from spp.certifying.sources import (
    checkpoint_directory,
    input_axes,
    open_source,
    projection_keys,
    require_projections,
    same_names,
)
from spp.certifying.verify import pruned_matrices, require_same_masks
from spp.errors import CheckpointError, ConfigError, NonFiniteError, OutputError, SPPWarning, WrapError
from spp.files import CheckpointReader, atomic_directory, check_target
from spp.files.carry import CERTIFICATE_NAME
from spp.files.recognised import CERTIFICATE
from spp.models.targets import require_model
from spp.weights import quantized_kind
from spp.weights.packed.disk import DenseReader
from spp.wrapping.state import forget_quantizer, parts_uncompiled, quantization_method
from spp.wrapping.wrap import is_wrapped

logger = logging.getLogger(__name__)


def save_model(
    model: nn.Module, dir: str | os.PathLike[str], *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write a plain Hugging Face checkpoint and its certificate; the directory appears whole or not at all.

    The certificate is made from the files as they were written, whose masks must be those in memory. Its tensors are
    the projections, and whatever else `spp.merge` merged into (an output head that was adapted by name).

    Args:
        model: a transformers model that is not wrapped.
        dir: a directory that does not exist yet, unless `overwrite`.
        tokenizer: saved beside the model, if given.
        overwrite: replace what is there, if it is an output (spp.files.recognised) and holds nothing else.

    Returns:
        The directory.

    Raises:
        WrapError: the model is still wrapped.
        NonFiniteError: a projection weight holds NaN or infinity.
        MaskError: the files' zeros are not those in memory.
        CheckpointError: the files hold projections whose zeros cannot be read, being quantized.
        TargetError: the model has no projection.
        OutputError: the directory exists, or cannot be written.

    Example:
        >>> spp.save_model(model, "pruned-2of4", tokenizer=tokenizer)  # doctest: +SKIP
    """
    require_model(model)
    if is_wrapped(model):
        raise WrapError(
            "the model is still wrapped: spp.save_adapter(model, path) saves the adapter alone; to save the merged "
            "model, call spp.merge(model) first, then spp.save_model"
        )
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"a {type(model).__name__} has no save_pretrained; spp.save_model saves transformers models")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(f"tokenizer is {tokenizer!r}; expected a tokenizer of transformers, or None")
    if getattr(model, "is_quantized", False):
        kinds = sorted({kind for module in model.modules() if (kind := quantized_kind(module))})
        if kinds:
            raise CheckpointError(
                f"the model is quantized ({quantization_method(model)}, {', '.join(kinds)}), and a certificate speaks "
                f"of plain weights alone: spp.merge without requantize, or the model's dequantize(), makes them "
                f"plain; its own save_pretrained saves it as it is"
            )
    forget_quantizer(model)
    config = getattr(model, "config", None)
    sources = [getattr(config, "_name_or_path", None), getattr(tokenizer, "name_or_path", None)]
    with atomic_directory(dir, overwrite=overwrite, copies=[name for name in sources if name]) as directory:
        with parts_uncompiled(model):
            model.save_pretrained(directory)  # type: ignore[operator]  # nn.Module says every attribute may be a tensor
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        with open_source(model) as memory, CheckpointReader(directory) as reader:
            base = getattr(model, "_spp_base", None) or {}
            keys = {*memory.axes, *base.get("keys", ())}
            certificate = make_certificate(reader, also=base.get("keys", ()))
            with open_source(directory) as disk:
                held, stored = same_names(memory, replace(disk, name=str(dir)))
                written = [key for key in (*held.axes, *held.matrices) if key in certificate.tensors]
                scanned = scan_source(held, written)
                changed = [key for key in written if scanned[key].mask != certificate.tensors[key].mask_sha256]
                if changed:
                    require_same_masks(held, stored, changed)
        certificate = replace(certificate, origin=getattr(model, "_spp_origin", None))
        _with_base(certificate, base, keys).write(directory)
    if config is not None and hasattr(config, "_name_or_path"):
        config._name_or_path = os.fspath(dir)  # what an adapter trained from here on belongs to
    logger.info("saved the model to %s", dir)
    return Path(dir)


def certify(
    dir: str | os.PathLike[str], base: str | os.PathLike[str] | nn.Module | None = None, *, deep: bool = False
) -> SparsityReport:
    """Write sparsity.json into a checkpoint directory, in place of one that is there.

    Its tensors are the projections, with what else a certificate that is there names, and with the other matrices of
    `base` (not embeddings) of which a tenth or more is zero.

    Args:
        dir: a checkpoint of safetensors files.
        base: the pruned model (or directory, or hub id) that this one was tuned from; its zeros must be the same.
        deep: add the sha256 of every tensor's contents.

    Returns:
        The report of the certificate.

    Raises:
        NonFiniteError: a projection weight holds NaN or infinity; such a checkpoint gets no certificate.
        MaskError: the zeros are not those of `base`; every differing tensor is listed.
        CheckpointError: the files are bad, or projections are stored so that their zeros cannot be read, such as by
            GPTQ.
        OutputError: the certificate cannot be written, or a sparsity.json is there that is none; or another process
            has replaced the directory meanwhile.

    Example:
        >>> certify("merged", base="pruned").sparsity  # doctest: +SKIP
        0.5
    """
    directory = checkpoint_directory(dir, copied=False)
    here = os.stat(directory)
    check_target(directory / CERTIFICATE_NAME, overwrite=True, kind=CERTIFICATE)
    with ExitStack() as opened:
        before = None if base is None else opened.enter_context(open_source(base))
        pruned = [] if before is None else pruned_matrices(before)
        reader = opened.enter_context(DenseReader(directory))
        certificate = make_certificate(reader, deep=deep, also=certified_keys(directory).union(pruned))
        certificate = replace(certificate, origin=origin_of(directory))
        if before is not None:
            one, other = same_names(before, opened.enter_context(open_source(directory)))
            require_same_masks(one, other, {*one.axes, *pruned, *certificate.tensors})
    if base is not None:
        name = getattr(getattr(base, "config", None), "_name_or_path", None) or None
        name = name if isinstance(base, nn.Module) else os.fspath(base)
        record = BaseRecord(name, certificate.fingerprint())  # same keys, same masks: the base's fingerprint too
        certificate = replace(certificate, base=record)
    if not (directory.is_dir() and os.path.samestat(here, os.stat(directory))):
        raise OutputError(f"{directory} was replaced by another process while it was certified: certify what is there")
    certificate.write(directory)
    return certificate.report()


def make_certificate(reader: CheckpointReader, *, deep: bool = False, also: Collection[str] = ()) -> Certificate:
    """Return the certificate of a checkpoint's files, which names no base.

    Args:
        reader: of the files.
        deep: with the sha256 of every tensor's contents.
        also: keys of matrices that are to be among its tensors, besides the projections; others are passed over.

    Raises:
        CheckpointError: there is no projection whose zeros can be read, or those of some cannot.
        NonFiniteError: projection weights hold NaN or infinity; all are named.
    """
    require_projections(reader, whole=True)
    matrices = {k for k in also if k in reader and len(reader.shape(k)) == 2 and reader.dtype(k).is_floating_point}
    projections = sorted({*projection_keys(reader), *matrices})
    axes = input_axes(reader)
    wanted: dict[str, int | None] = dict.fromkeys(reader.keys())
    wanted |= {key: axes[key] for key in projections}
    found = scan_reader(reader, wanted, deep=deep)
    bad = [key for key in projections if not found[key].zeros.valid]
    if bad:
        raise NonFiniteError(f"NaN or infinity in {', '.join(bad)}: a checkpoint like that gets no certificate")
    other = {key: found[key].crc for key, axis in wanted.items() if axis is None}
    return Certificate(
        tensors={key: found[key].record() for key in projections},
        other=other,
        base=None,
        content_sha256={key: found[key].sha256 or "" for key in wanted} if deep else None,
        other_layout={key: TensorLayout.of(reader.shape(key), reader.dtype(key)) for key in other},
    )


def origin_of(name: str | os.PathLike[str]) -> str | None:
    """Return the dense model that a checkpoint was pruned from, where it has a certificate that names it."""
    try:
        return Certificate.read(name).origin
    except CheckpointError:
        return None


def note_origin(model: nn.Module, dense: nn.Module) -> None:
    """Remember which dense model a model was pruned from, for its certificate: the origin of `dense`, or itself."""
    name = getattr(getattr(dense, "config", None), "_name_or_path", None)
    if name:
        model._spp_origin = origin_of(name) or os.fspath(name)  # type: ignore[assignment]


def _with_base(certificate: Certificate, base: Mapping[str, Any], keys: Set[str]) -> Certificate:
    """Add what the model was merged into, if its zeros still are what they were then.

    Args:
        certificate: of the files.
        base: what `spp.merge` recorded of the pruned model; empty if it never ran.
        keys: the parameters that the fingerprint in `base` covers.
    """
    if not base:
        return certificate
    if certificate.tensors.keys() != keys:
        strange = sorted(certificate.tensors.keys() ^ keys)
        logger.warning(
            "the certificate names no base: memory and disk name tensors differently (%s, …), so that the masks on "
            "disk cannot be compared with the fingerprint of the base in memory",
            strange[0],
        )
        return certificate
    if certificate.fingerprint() != base["fingerprint"]:
        warnings.warn(
            f"the zeros are not those of {base['name_or_path'] or 'the base'} that this model was merged into (it was "
            f"changed since); its certificate names no base",
            SPPWarning,
            stacklevel=3,
        )
        return certificate
    return replace(certificate, base=BaseRecord(base["name_or_path"], base["fingerprint"]))
