"""Writing safetensors files as a stream: the header from the shapes, then one tensor after the other.

Tensors lie in the order in which the reference implementation puts them (wider dtypes first, then by name), the only
metadata is {"format": "pt"}, so the same tensors give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from spp.errors import CheckpointError
from spp.files.atomic import output_error
from spp.files.hashes import tensor_bytes
from spp.files.header import DTYPE_CODES, build_header, size_of

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Pieces = Iterable[memoryview]

_RANKS = {dtype: i for i, dtype in enumerate(  # the reference implementation's order of dtypes of one width
    (torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int16, torch.uint16,
     torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64,
     torch.int64, torch.uint64)
)}  # fmt: skip


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OutputError: the file cannot be written.
        CheckpointError: a tensor's dtype is none that the format knows.
    """
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(path, layout, lambda name: tensor_bytes(tensors[name]))


def write_tensors(path: str | os.PathLike[str], layout: Layout, produce: Callable[[str], Pieces]) -> None:
    """Write a safetensors file whose tensors are made one at a time.

    Args:
        path: the file.
        layout: name -> (dtype, shape) of every tensor.
        produce: gives the bytes of the tensor of that name, in pieces; called once for each, in the order of the file.
    """
    for name, (dtype, _) in layout.items():
        if dtype not in DTYPE_CODES:
            raise CheckpointError(f"{path}: tensor {name!r} is {dtype}, which safetensors files cannot hold")
    ordered = file_order(layout)
    try:
        with open(path, "wb") as file:
            file.write(build_header(ordered))
            for name, (dtype, shape) in ordered.items():
                written = 0
                for piece in produce(name):
                    written += file.write(piece)
                if written != size_of(dtype, shape):
                    raise AssertionError(f"{name}: {written} bytes for {dtype} of shape {shape}")
    except OSError as error:
        raise output_error(error, path) from error


def file_order(layout: Layout) -> Layout:
    """Return the tensors of a file in the order in which they lie."""
    return dict(sorted(layout.items(), key=lambda item: (-_RANKS[item[1][0]], item[0])))
