"""A safetensors file whose tensors come in any order: each is put where the header says that it lies."""

from __future__ import annotations

import os
from collections.abc import Iterable

from spp.errors import CheckpointError
from spp.files.atomic import output_error
from spp.files.header import DTYPE_CODES, build_header, size_of
from spp.files.writer import Layout, Pieces, file_order


def write_scattered(path: str | os.PathLike[str], layout: Layout, tensors: Iterable[tuple[str, Pieces]]) -> None:
    """Write a safetensors file of tensors that are made in an order of their own; its bytes are `write_tensors`'.

    Args:
        path: the file.
        layout: name -> (dtype, shape) of every tensor.
        tensors: name and bytes, in pieces, of each, in any order.
    """
    for name, (dtype, _) in layout.items():
        if dtype not in DTYPE_CODES:
            raise CheckpointError(f"{path}: tensor {name!r} is {dtype}, which safetensors files cannot hold")
    ordered = file_order(layout)
    header = build_header(ordered)
    begins, end = {}, len(header)
    for name, entry in ordered.items():
        begins[name] = end
        end += size_of(*entry)
    try:
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(end)
            for name, pieces in tensors:
                file.seek(begins.pop(name))
                written = sum(file.write(piece) for piece in pieces)
                if written != size_of(*layout[name]):
                    raise AssertionError(f"{name}: {written} bytes for {layout[name]}")
    except OSError as error:
        raise output_error(error, path) from error
    if begins:
        raise AssertionError(f"{path}: nobody made {', '.join(begins)}")
