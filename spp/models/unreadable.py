"""Projections that a checkpoint or a model stores in another form than a plain floating-point weight.

GPTQ, AWQ                     qweight, qzeros, scales; GPTQ also g_idx
bitsandbytes                  weight, of integers, with weight.absmax, … (4 bits) or SCB (8 bits)
compressed-tensors            weight_packed, weight_scale, …; of sparse ones compressed, bitmask, …
torchao, HQQ, AQLM, quanto    _weight_qdata; W_q; codebooks; weight._data
MXFP4                         experts.gate_up_proj_blocks, experts.gate_up_proj_scales
fp8                           weight, of float8, with weight_scale_inv or weight_scale

The names of the tensors tell. Where an entry of such a weight is zero, its codes alone do not; those of float8 do, and
spp.weights.quantized.disk reads them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Container, Mapping
from pathlib import Path

import torch

from spp.errors import call, some_of
from spp.files.formats import stored_format
from spp.files.hashes import dtype_name
from spp.models.projection import EXPERT_WEIGHTS, OTHER_PROJECTIONS, PROJECTIONS, is_projection_key

_FORMATS: tuple[tuple[frozenset[str], str], ...] = (  # the first whose parts are all there
    (frozenset({"qweight", "g_idx"}), "GPTQ"),
    (frozenset({"qweight"}), "GPTQ or AWQ"),
    (frozenset({"weight_packed"}), "compressed-tensors"),
    (frozenset({"compressed", "bitmask"}), "compressed-tensors, sparse"),
    (frozenset({"weight.absmax"}), "bitsandbytes, 4 bits"),
    (frozenset({"SCB"}), "bitsandbytes, 8 bits"),
    (frozenset({"_weight_qdata"}), "torchao"),
    (frozenset({"W_q"}), "HQQ"),
    (frozenset({"codebooks"}), "AQLM"),
    (frozenset({"weight._data"}), "quanto"),
    (frozenset({"blocks"}), "MXFP4"),
)
_PARTS = sorted({part for parts, _ in _FORMATS for part in parts} - {"blocks"})
_OF_FORMAT = re.compile(rf"(?P<path>.+)\.(?:{'|'.join(map(re.escape, _PARTS))})")
_OF_NAME = re.compile(rf"(?P<path>(?:.*\.)?(?:{'|'.join((*PROJECTIONS, *OTHER_PROJECTIONS))}))\..+")
_OF_EXPERTS = re.compile(rf"(?P<path>(?:.*\.)?experts\.(?:{'|'.join(EXPERT_WEIGHTS)}))_[^.]+")
_SCALES = ("_scale_inv", "_scale")  # behind the key of a weight of float8: its values are not what it holds
_BESIDE = frozenset({"bias"})  # what says nothing of how the weight is stored

# What is done about a model in memory, where modules of another tool hold its weights.
READ_IN_MEMORY = (
    "Read are linears with plain weights, and those of bitsandbytes (NF4, FP4, 8 bits) and torchao (integer codes): "
    "load the model with one of these, or dequantized"
)
Tensors = Mapping[str, tuple[int, torch.dtype]]


def unreadable_projections(tensors: Tensors) -> dict[str, str]:
    """Return {module path: how it is stored} of the projections without a plain floating-point weight, sorted.

    Args:
        tensors: {key: (number of dimensions, dtype)} of a checkpoint, or of a model's parameters and buffers.

    Example:
        >>> parts = {name: (2, torch.int32) for name in ("qweight", "qzeros", "g_idx")}
        >>> unreadable_projections({f"layers.0.q_proj.{name}": of for name, of in parts.items()})
        {'layers.0.q_proj': 'g_idx, qweight, qzeros (GPTQ)'}
    """
    plain: set[str] = set()
    found: set[str] = set()
    codes: dict[str, torch.dtype] = {}  # of a weight's own name
    children: defaultdict[str, list[str]] = defaultdict(list)  # {key up to a full stop: what stands behind it}
    for key, (ndim, dtype) in tensors.items():
        parent, _, name = key.rpartition(".")
        children[parent].append(name)
        path = _projection_of(key)
        if is_scaled(key, dtype, tensors) and is_projection_key(key, ndim):
            codes[key.removesuffix(".weight")] = dtype
        elif dtype.is_floating_point and is_projection_key(key, ndim):
            plain |= {key, key.removesuffix(".weight"), path or key}  # path: of a weight deeper inside, too
        elif dtype.is_floating_point and name == "weight":
            plain.add(parent)  # of a convolution, say
        elif is_projection_key(key, ndim):
            codes[key.removesuffix(".weight")] = dtype
        elif path is not None and is_projection_key(f"{path}.weight", 2):
            found.add(path)
    stored = {path: _parts_of(path, children) for path in sorted((found | codes.keys()) - plain)}
    return {
        path: _described(parts, codes.get(path))
        for path, parts in stored.items()
        if path in codes or not parts <= _BESIDE
    }


def is_scaled(key: str, dtype: torch.dtype, tensors: Container[str]) -> bool:
    """Whether a tensor holds float8 that a scale beside it makes values of."""
    return dtype.is_floating_point and dtype.itemsize == 1 and any(f"{key}{scale}" in tensors for scale in _SCALES)


def describe_unreadable(unreadable: Mapping[str, str]) -> str:
    """Return for a message how many projections are stored in which form, with the first names of each."""
    groups: dict[str, list[str]] = {}
    for path, form in unreadable.items():
        groups.setdefault(form, []).append(path)
    return "; ".join(f"{len(paths)} stored as {form}: {some_of(paths, 3)}" for form, paths in sorted(groups.items()))


def refusal(directory: Path) -> str:
    """Return what a checkpoint says of how its weights are stored, and what can be done: sentences for a message.

    Args:
        directory: of a checkpoint with unreadable projections.
    """
    found = stored_format(directory)
    if found is not None:
        return f"It is {found}: {found.remedy}"
    return (
        f"It is quantized or compressed, and config.json does not say how: pass the checkpoint that it was made from, "
        f"or load it with the tool that made it, dequantize it, and save it with {call('save_model')}"
    )


def _projection_of(key: str) -> str | None:
    """Return the path of the projection that a tensor is a part of, as far as its name tells."""
    match = next((m for p in (_OF_FORMAT, _OF_NAME, _OF_EXPERTS) if (m := p.fullmatch(key))), None)
    return match["path"] if match else None


def _parts_of(path: str, children: Mapping[str, Collection[str]]) -> set[str]:
    """Return the names of what is stored in place of a weight."""
    parent, _, name = path.rpartition(".")
    parts = {*children.get(path, ()), *(f"weight.{child}" for child in children.get(f"{path}.weight", ()))}
    beside = {child.removeprefix(f"{name}_") for child in children.get(parent, ()) if child.startswith(f"{name}_")}
    return parts or beside  # of experts, whose weights are no modules


def _described(parts: set[str], codes: torch.dtype | None) -> str:
    if codes is not None and parts <= {"weight", *_BESIDE}:
        return f"weight ({dtype_name(codes)})"
    name = next((f" ({name})" for of_format, name in _FORMATS if of_format <= parts), "")
    if codes is not None and codes.is_floating_point:
        name = " (fp8)"
    return some_of(parts) + name
