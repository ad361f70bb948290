"""Files beside the weights that are copied when these are written anew, and the dtype in config.json."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from spp.errors import CheckpointError, ConfigError, call
from spp.files.cards import CARD_NAME
from spp.files.hashes import dtype_name
from spp.files.jsonio import read_json, write_json
from spp.files.places import check_link
from spp.files.reader import INDEX
from spp.files.recognised import MODEL

CERTIFICATE_NAME = "sparsity.json"

logger = logging.getLogger(__name__)

_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_NOT_CARRIED = (CERTIFICATE_NAME, "adapter_config.json", INDEX)  # the index is written apart
_TEXTS = ("merges.txt", "vocab.txt")  # of tokenizers; other texts may be anybody's
_LARGEST_CARRIED = 256 * 2**20  # bytes of a file beside the weights; the largest tokenizers have a tenth


def refuse_overlap(out: Path, source: Path, what: str) -> None:
    """Raise a ConfigError where the output is, contains or lies inside a source, or holds what links in one lead to."""
    out, source = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if out.is_relative_to(source) or source.is_relative_to(out):
        where = "is" if out == source else "lies inside" if out.is_relative_to(source) else "contains"
        raise ConfigError(f"the output {out} {where} {what} {source}; choose a path outside it")
    links: list[str] = []
    with contextlib.suppress(OSError), os.scandir(source) as entries:  # who reads it says what is wrong with it
        links = sorted(entry.path for entry in entries if entry.is_symlink())
    held = next((link for link in links if Path(os.path.realpath(link)).is_relative_to(out)), None)
    if held is not None:
        raise ConfigError(f"the output {out} holds what {held} leads to, a link in {what}; choose another path")


def carry_files(base: Path, directory: Path | None, shards: set[str], *, card: bool = True, told: bool = True) -> None:
    """Copy the files beside the weights: config, tokenizer, generation config, chat templates, remote code, …

    A file that cannot be read, or is a link that is not followed (spp.files.places.check_link), is passed over with a
    warning; one that belongs to a model is an error.

    Args:
        base: the checkpoint. directory: where copies go; None to look whether they could be made.
        shards: names of the files that hold weights.
        card: the model card too.
        told: whether what is passed over is warned of.

    Raises:
        CheckpointError: a file of the model cannot be copied.
    """
    for source in _beside(base, told):
        name = source.name
        if not card and source == base / CARD_NAME:
            continue
        if name.startswith(".") or name in shards or name in _NOT_CARRIED or name.endswith(_WEIGHT_ENDINGS):
            continue
        try:
            file = _open_copied(source, base, told)
        except CheckpointError as error:
            if source.parent == base and (MODEL.has_file(name) or name in _TEXTS):
                raise
            if told:
                logger.warning("%s: it is not carried along", str(error).removesuffix(f"; {error.remedy}"))
            continue
        if file is None:
            continue
        with file:
            if directory is not None:
                target = directory / source.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as copy:
                    shutil.copyfileobj(file, copy)


def _open_copied(source: Path, base: Path, told: bool) -> BinaryIO | None:
    """Open a file that is to be copied; None for what is no file, or too large.

    Raises:
        CheckpointError: it cannot be read, or is a link that is not followed.
    """
    try:
        if not source.is_symlink() and not stat.S_ISREG(source.stat().st_mode):
            return None
        require_copyable(source, base)
        size = source.stat().st_size
        if size > _LARGEST_CARRIED:
            if told:
                logger.warning("%s has %d bytes and is not carried along", source, size)
            return None
        return source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}") from error


def require_copyable(path: Path, directory: Path) -> None:
    """Refuse a link that may not be copied into an output, or to the hub.

    Raises:
        CheckpointError: the message names the link, where it leads, and what to do.
    """
    if not check_link(path, directory, copied=True):
        raise CheckpointError(
            f"{path} is a symbolic link to {os.path.realpath(path)}, outside its folder, whose contents are none of a "
            f"model's {path.name}",
            remedy=f"put the file itself there, or, if you trust the link, follow it ({call('follow_links')})",
        )


def _beside(base: Path, told: bool) -> Iterator[Path]:
    """Yield all files of a folder but those of hidden subfolders and behind links."""
    for folder, subfolders, names in os.walk(base):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for link in (Path(folder, name) for name in subfolders):
            if link.is_symlink() and told:
                logger.warning("%s is a link to a folder and is not carried along", link)
        yield from (Path(folder, name) for name in sorted(names))


def update_config(directory: Path, dtype: torch.dtype) -> None:
    """Set the dtype of the weights in a checkpoint's config.json."""
    path = directory / "config.json"
    if path.exists():
        config = read_json(path, "config.json")
        _set_dtype(config, dtype_name(dtype))
        config.setdefault("dtype", dtype_name(dtype))
        write_json(path, config)


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict):
            _set_dtype(value, name)
