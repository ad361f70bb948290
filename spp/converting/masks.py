"""Ready-made masks: one for each weight, 1 or True where it is kept, in a safetensors or an .npz file.

    name      the weight's, as the dense checkpoint stores it, or that with .mask or _mask behind it, or without .weight
    values    0 and 1 in the weight's shape, of any dtype; or, as MaskLLM publishes them in .npz, the bits of the mask
              row by row, uint8 (⌈m·n/8⌉,), the first in the highest bit

Pickled masks are not read: to read a pickle is to run it.
"""

from __future__ import annotations

import difflib
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spp.errors import CheckpointError, MaskError
from spp.files import CheckpointReader
from spp.files.places import check_link
from spp.files.reader import INDEX, SINGLE
from spp.masks.patterns import as_array
from spp.models.projection import is_projection_key
from spp.models.targets import is_other_matrix

_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_READ = (".safetensors", ".npz")
_LISTED = 10  # problems in a message
_Header = tuple[tuple[int, ...], np.dtype[np.generic]]


def find_masks(source: Path) -> Path | None:
    """Return the file of masks that a path names, or the folder of which all tensors are masks; None for a checkpoint.

    Raises:
        CheckpointError: there is nothing that can be read.
    """
    if source.is_file():
        if source.suffix in _PICKLED:
            raise CheckpointError(_pickled(source))
        if source.suffix not in _READ:
            raise CheckpointError(f"{source} is no file of masks: {' and '.join(_READ)} are read")
        return source
    if any((source / name).exists() for name in (SINGLE, INDEX)):
        with CheckpointReader(source) as reader:
            dtypes = {reader.dtype(key) for key in reader}
        return source if dtypes and dtypes <= {torch.bool, torch.uint8} else None
    files = sorted(path for path in source.iterdir() if path.suffix in _READ)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{source} holds {names}: pass the one that holds the masks")
    pickled = sorted(path for path in source.iterdir() if path.suffix in _PICKLED)
    if pickled and not files and not (source / "config.json").exists():
        raise CheckpointError(_pickled(pickled[0]))
    return files[0] if files else None


def _pickled(path: Path) -> str:
    return (
        f"{path} is pickled, which is not read, as that could run any code: load it where you trust it, and save the "
        f"masks with safetensors, {{name: mask.bool()}}"
    )


class MaskFile:
    """The masks of a file, or of a folder of safetensors files; one is read at a time.

    Args:
        path: of a .safetensors or .npz file, or of a folder.

    Attributes:
        shapes: {name: shape as it is stored}.

    Raises:
        CheckpointError: the file is damaged, or holds no masks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: CheckpointReader | None = None
        self._zip: zipfile.ZipFile | None = None
        if path.suffix == ".npz" and path.is_file():
            check_link(path, path.parent)
            with self._reading(""):
                self._zip = zipfile.ZipFile(path)
                names = [name for name in self._zip.namelist() if name.endswith(".npy")]
                self.shapes = {name.removesuffix(".npy"): self._header(name)[0] for name in names}
        else:
            self._reader = CheckpointReader(path) if path.is_dir() else CheckpointReader(path.parent, file=path.name)
            self.shapes = {name: self._reader.shape(name) for name in self._reader}
        if not self.shapes:
            raise CheckpointError(f"{path} holds no mask")

    def __enter__(self) -> MaskFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._zip is not None:
            self._zip.close()

    def mask(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a mask as booleans of a weight's shape.

        Raises:
            CheckpointError: it has values other than 0 and 1, or is damaged.
        """
        if self._reader is not None:
            found = self._reader.tensor(name)
        else:
            with self._reading(name):
                found = torch.from_numpy(self._array(name))
        if is_packed(self.shapes[name], shape):
            if found.dtype != torch.uint8:
                raise CheckpointError(f"{self.path}: {name} has the length of packed bits {shape}, but no bytes")
            bits, count = np.unpackbits(as_array(found)), math.prod(shape)
            if bits[count:].any():
                raise CheckpointError(f"{self.path}: {name} is no mask of {shape}: it has bits behind the last weight")
            return torch.from_numpy(bits[:count].view(np.bool_)).view(shape)
        values = found.view(torch.uint8) if found.dtype == torch.bool else found
        mask = values.float() == 1 if values.itemsize == 1 and values.is_floating_point() else values == 1
        wrong = values[~mask].float() != 0
        if bool(wrong.any()):
            value = float(values[~mask].float()[wrong][0])
            raise CheckpointError(f"{self.path}: {name} is no mask: it holds {value:g}, and a mask holds 0 and 1 alone")
        return mask

    def _header(self, name: str) -> _Header:
        assert self._zip is not None
        with self._zip.open(name) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        if dtype.kind not in "buif":
            raise ValueError(f"an array of {'pickled objects' if dtype.hasobject else dtype}")
        return shape, dtype

    def _array(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        assert self._zip is not None
        with self._zip.open(f"{name}.npy") as file:
            array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read()  # to the end, where the checksum is compared
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, NotImplementedError) as error:
            what = f"{name} of {self.path}" if name else str(self.path)
            raise CheckpointError(f"{what} cannot be read as a file of masks, or is cut short: {error}") from error


def is_packed(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a mask that is stored in one shape holds the bits of a mask of another."""
    return len(shape) > 1 and found == (-(-math.prod(shape) // 8),)


@dataclass(frozen=True)
class Fitted:
    """Which weight of a dense checkpoint each mask is of.

    Attributes:
        names: {key of the weight: name of the mask}.
        without: keys of the projections that have none.
    """

    names: Mapping[str, str]
    without: tuple[str, ...]


def fit(masks: MaskFile, dense: CheckpointReader) -> Fitted:
    """Find the weight of each mask.

    Raises:
        MaskError: masks without a weight, of another shape, of what is no matrix of a linear, or of a tied weight; the
            first of these are all named.
    """
    names: dict[str, str] = {}
    problems: list[str] = []
    for name, found in masks.shapes.items():
        key = next((key for key in _candidates(name) if key in dense), None)
        shape = () if key is None else dense.shape(key)
        if key is None:
            problems.append(f"{name}: there is no such weight{_nearest(name, dense)}")
        elif found != shape and not is_packed(found, shape):
            problems.append(f"{name}: the mask is {found}, the weight {key} is {shape}")
        elif key in names:
            problems.append(f"{name} and {names[key]} are both masks of {key}")
        else:
            problem = _unfit(key, dense)
            if problem is None:
                names[key] = name
            elif not bool(masks.mask(name, shape).all()):  # one that keeps everything changes nothing
                problems.append(f"{name}: {problem}")
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        listing = "\n  ".join(problems[:_LISTED])
        raise MaskError(f"the masks of {masks.path} do not fit {dense.directory}:\n  {listing}{more}")
    if not names:
        raise MaskError(f"the masks of {masks.path} keep every weight of {dense.directory}: there is nothing to prune")
    without = (key for key in dense if is_projection_key(key, len(dense.shape(key))) and key not in names)
    return Fitted(names, tuple(without))


def _candidates(name: str) -> list[str]:
    bare = re.sub(r"[._]mask$", "", name)
    return [name, bare, f"{bare}.weight"]


def _nearest(name: str, dense: CheckpointReader) -> str:
    bare = re.sub(r"[._]mask$", "", name)
    nearest = difflib.get_close_matches(bare, dense.keys(), n=3, cutoff=0.5)
    if "head" in bare and _says_tied(dense):
        return " (the output head is tied to the embedding there)"
    return f"; the nearest are {', '.join(nearest)}" if nearest else f"; it has {', '.join(dense.keys()[:3])}, …"


def _unfit(key: str, dense: CheckpointReader) -> str | None:
    """Return why a tensor cannot be pruned by a mask; None where it can."""
    rank, dtype = len(dense.shape(key)), dense.dtype(key)
    if is_projection_key(key, rank) and dtype.is_floating_point:
        return None
    if not is_other_matrix(key, rank, dtype):
        return f"{key} is no weight of a linear (an embedding, a norm or a bias), and only these are pruned"
    for other in dense:
        same = other != key and dense.shape(other) == dense.shape(key) and dense.dtype(other) == dtype
        embeds = same and not is_other_matrix(other, rank, dtype) and not is_projection_key(other, rank)
        if embeds and (_says_tied(dense) or torch.equal(dense.tensor(key), dense.tensor(other))):
            return f"{key} is tied to {other}, which would lose the same weights: leave its mask out"
    return None


def _says_tied(dense: CheckpointReader) -> bool:
    config = dense.config()
    inner = config.get("text_config")
    return any(one.get("tie_word_embeddings") is True for one in (config, inner) if isinstance(one, dict))
