"""Folders that are never replaced, whatever is in them: others rely on their being there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_CACHES = (  # of the hub, transformers, datasets, torch, and of all programs
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE"),
    *("TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"),
)
_DEFAULT_CACHES = (".", "huggingface", "huggingface/hub", "huggingface/datasets", "torch", "spp")  # below ~/.cache
_REPOSITORIES = (".git", ".hg", ".svn")
_OF_THE_HUB = re.compile(r"(models|datasets|spaces)--.+")


def why_never(path: Path) -> str | None:
    """Return why an existing folder (a path without links) is never replaced, whatever is in it; None for any other."""
    if path == path.parent or os.path.ismount(path):
        return "it is the root of a disk"
    here = os.stat(path)
    for place, what in _relied_on():
        for folder in (place, *place.parents):
            with contextlib.suppress(OSError):
                if os.path.samestat(here, os.stat(folder)):
                    return f"it is, or contains, {what}"
    if any(os.path.lexists(path / name) for name in _REPOSITORIES):
        return "it is the root of a repository"
    for folder in (path, *path.parents):
        inside = [(folder / name).is_dir() for name in ("snapshots", "blobs", "refs")]
        if _OF_THE_HUB.fullmatch(folder.name) and any(inside):
            return "it belongs to a cache of the hub"
    return None


def _relied_on() -> Iterator[tuple[Path, str]]:
    """Yield the folders, without symbolic links, and what they are."""
    with contextlib.suppress(OSError):  # it may have been removed
        yield Path(os.getcwd()), "the current directory"
    for home in _homes():
        yield Path(os.path.realpath(home)), "the home folder"
        for name in _DEFAULT_CACHES:
            yield Path(os.path.realpath(os.path.join(home, ".cache", name))), "a folder of caches"
    for variable in _CACHES:
        if os.environ.get(variable):
            folder = os.path.expanduser(os.environ[variable])
            yield Path(os.path.realpath(folder)), f"the folder of caches of {variable}"


def _homes() -> set[str]:
    homes = {os.path.expanduser("~")}
    with contextlib.suppress(ImportError, KeyError):  # not on every system; a user without an entry
        import pwd

        homes.add(pwd.getpwuid(os.getuid()).pw_dir)
    return {home for home in homes if os.path.isabs(home)}
