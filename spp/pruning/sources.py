"""Read calibration data that is named by a path or an id (spp.configs.pruning says how)."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spp.configs.pruning import JSON_SUFFIXES, DataSet
from spp.errors import CheckpointError, DataError
from spp.files import CheckpointReader
from spp.files.rows import read_dataset_rows, read_json_rows, read_text, shown

_KEY = "input_ids"  # the tensor of a file that holds several


def read_ids(source: str) -> Tensor:
    """Return the tensor in a file of token ids, whatever its shape: the only one, or of several that called input_ids.

    Raises:
        DataError: the file is malformed, or holds something else.
    """
    path = Path(source)
    if path.suffix.lower() == ".safetensors":
        try:
            with CheckpointReader(path.parent, file=path.name) as reader:
                return _only(source, {key: reader.tensor(key) for key in reader})
        except CheckpointError as error:
            raise DataError(f"calibration file {source} cannot be read: {error.marked}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"calibration file {source} is none that torch reads without running code: {reason}; write one by "
            f"torch.save(ids, path)"
        ) from None
    return _only(source, {"": found} if isinstance(found, Tensor) else found)


def documents(source: str, seed: int) -> Iterator[str]:
    """Yield the documents of a text, JSON or data set; those of a data set in drawn order, as they are asked for.

    Raises:
        DataError: what is named cannot be read, or a row has no text.
        DependencyError: it is a data set, and `datasets` is not installed.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() not in JSON_SUFFIXES:
            yield read_text(path)
            return
        rows, field = read_json_rows(path), "text"
    else:
        data = DataSet.parse(source)
        assert data is not None
        rows, field = read_dataset_rows(data.name, data.config, data.split, seed=seed), data.field
    for where, row in rows:
        text = row.get(field)
        if not isinstance(text, str):
            found = f"{field} is {shown(text)}" if field in row else f"the row has {', '.join(map(str, row)) or 'none'}"
            raise DataError(f"{where}: expected text in the field {field}; {found}")
        yield text


def _only(source: str, found: object) -> Tensor:
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    ids = tensors.get(_KEY, next(iter(tensors.values())) if len(tensors) == 1 else None)
    if ids is None:
        held = f"the tensors {', '.join(map(str, tensors))}" if tensors else f"a {type(found).__name__}"
        raise DataError(f"calibration file {source} holds {held}; expected one tensor of token ids, or one of {_KEY}")
    return ids
