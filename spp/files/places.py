"""Which files of a folder may be used where they are links, and which folders are never replaced."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from spp.errors import CheckpointError, call

_CACHES = (  # of the hub, transformers, datasets, torch, and of all programs
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE"),
    *("TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"),
)
_DEFAULT_CACHES = (".", "huggingface", "huggingface/hub", "huggingface/datasets", "torch", "spp")  # below ~/.cache
_REPOSITORIES = (".git", ".hg", ".svn")
_OF_THE_HUB = re.compile(r"(models|datasets|spaces)--.+")

_follows: ContextVar[bool] = ContextVar("_follows", default=False)

# Of files of a model that are no weights: what the JSON objects have some of, and how the others begin.
_CONTENTS: dict[str, tuple[str, ...]] = {
    r"config\.json": ("model_type", "architectures"),
    r"adapter_config\.json": ("peft_type", "lora_alpha"),
    r"generation_config\.json": ("transformers_version", "eos_token_id", "bos_token_id", "max_new_tokens"),
    r"tokenizer\.json": ("added_tokens", "pre_tokenizer", "post_processor"),
    r"tokenizer_config\.json": ("tokenizer_class", "added_tokens_decoder", "model_max_length", "chat_template"),
    r"special_tokens_map\.json": ("eos_token", "bos_token", "unk_token", "pad_token"),
    r"((video_)?pre)?processor_config\.json": ("processor_class", "image_processor_type", "feature_extractor_type"),
    r"chat_template\.json": ("chat_template",),
    r"sparsity\.json": ("tensors",),
    r".*\.safetensors\.index\.json": ("weight_map",),
}
_NUMBERED = re.compile(r"vocab\.json|encoder\.json|added_tokens\.json")  # {token: its number}
_BEGINNINGS = {
    r"(tokenizer|spiece|sentencepiece(\.bpe)?)\.model": rb"\n",
    r"merges\.txt": rb"#version",
    r"chat_template\.jinja": rb".*\{%.*\bmessages?\b",
}
_LARGEST_PART = 1 << 28  # bytes of a file of a model that is no weight
_START = 1 << 16  # bytes that tell what a text is


@contextlib.contextmanager
def follow_links(follow: bool = True) -> Iterator[None]:
    """Use every link in the folders that are read here, wherever it leads: see `check_link`. A context manager.

    Args:
        follow: False changes nothing.

    Returns:
        The context manager; what it gives is None.

    Example:
        >>> with spp.follow_links():                                    # doctest: +SKIP
        ...     spp.merge_checkpoint("clone", "run/adapter", "merged")
    """
    token = _follows.set(follow or _follows.get())
    try:
        yield
    finally:
        _follows.reset(token)


def check_link(path: Path, directory: Path, *, copied: bool = False) -> bool:
    """Whether a file of a model's or an adapter's folder may be used: the rule for symbolic links, of every command.

    A file that is no link may be used, and so may a link that stays in its folder, or leads to the blobs of the hub
    cache that the folder belongs to. Of a link that leads out of its folder,

    - in a folder that was downloaded it may not, as whoever made it may have made the link: in a cache of the hub, in
      a clone (a .git in it), in a folder that the hub's client filled (a .cache/huggingface in it);
    - in any other, which is the user's own, it may be read: its weights are parsed, as others are. What is copied into
      an output, and may be published there, has to be what its name says: config.json names a model, tokenizer.json
      is one, a safetensors file has the header of one. Otherwise an archive with a link to somebody's keys would be
      a way to them.

    Within `follow_links` any link may be used that leads to a file. Files that nobody reads are not asked about.

    Args:
        path: of the file. directory: the folder that it is in, or in a subfolder of which.
        copied: whether it goes into an output, or to the hub.

    Returns:
        False for a link that may be read and not copied.

    Raises:
        CheckpointError: it may not be read, leads nowhere, in a circle, or to what is no file; the message names the
            link and where it leads.
    """
    told = os.fspath(path)
    try:
        if not path.is_symlink():
            return True
        told = f"{path} is a symbolic link to {os.readlink(path)}"
        real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{told}, which does not exist: put the file there, or mend the link") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{told}, and its links go round in a circle: mend the link") from None
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a name with a null byte
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise CheckpointError(f"{told}, which is {what}; it must lead to a file")
    if _follows.get() or real.is_relative_to(folder):
        return True
    for above in folder.parents:  # <model>/snapshots/<revision>/file -> <model>/blobs/<hash>
        if above.name == "snapshots" and real.parent == above.parent / "blobs":
            return True
    downloaded = _why_downloaded(folder)
    if downloaded is not None:
        raise CheckpointError(
            f"{told}, outside its folder, which {downloaded}; it is not read",
            remedy=f"put the file itself there, or, if you trust the link, follow it ({call('follow_links')})",
        )
    return not copied or _is_part_of_model(path.name, real)


def _why_downloaded(folder: Path) -> str | None:
    """Return why the links in a folder (a path without links) may be somebody else's; None for the user's own."""
    if any(os.path.lexists(folder / name) for name in _REPOSITORIES):
        return "is a clone of a repository"
    if (folder / ".cache" / "huggingface").is_dir():
        return "was downloaded from the hub"
    return "belongs to a cache of the hub" if _in_cache(folder) else None


def _in_cache(folder: Path) -> bool:
    """Whether a folder belongs to a cache of the hub."""
    return any(
        _OF_THE_HUB.fullmatch(above.name) and any((above / name).is_dir() for name in ("snapshots", "blobs", "refs"))
        for above in (folder, *folder.parents)
    )


def _is_part_of_model(name: str, real: Path) -> bool:
    """Whether the contents of a file are those of a file of a model of that name."""
    try:
        if name.endswith(".safetensors"):
            with real.open("rb") as file:
                head = file.read(9)
            return head[8:] == b"{" and int.from_bytes(head[:8], "little") < real.stat().st_size
        keys = next((keys for known, keys in _CONTENTS.items() if re.fullmatch(known, name)), None)
        if keys is None and not _NUMBERED.fullmatch(name):
            begins = next((first for known, first in _BEGINNINGS.items() if re.fullmatch(known, name)), None)
            if begins is None:
                return False
            with real.open("rb") as file:
                return re.match(begins, file.read(_START), re.DOTALL) is not None
        if real.stat().st_size > _LARGEST_PART:
            return False
        value = json.loads(real.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    return all(type(one) is int for one in value.values()) if keys is None else not value.keys().isdisjoint(keys)


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
    return "it belongs to a cache of the hub" if _in_cache(path) else None


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


def cache_directory() -> Path:
    """Return the folder in which spp keeps what it can make again: SPP_CACHE, or spp in the user's own cache."""
    named = os.environ.get("SPP_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(named) if named else Path(caches) / "spp"
