"""A directory or a hub id: where the files are on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spp.errors import CheckpointError
from spp.files.formats import other_weights
from spp.files.places import check_link

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
# What transformers and spp read in a folder: of each line the first that is there.
_CONFIG = r"(adapter_)?config\.json"
_CONFIGS = (r"(generation_|adapter_|tokenizer_)?config\.json|special_tokens_map\.json|chat_template\.(jinja|json)",)
_TOKENIZER = (r"tokenizer\.json", r"tokenizer\.model|added_tokens\.json|vocab\.(json|txt)|merges\.txt")
_ADAPTER = (r"adapter_model\.safetensors", r"adapter_model\.bin")
_MODEL = (
    r"model\.safetensors",
    r"model\.safetensors\.index\.json|model-\d+-of-\d+\.safetensors",
    r"pytorch_model\.bin(\.index\.json)?|pytorch_model-\d+-of-\d+\.bin",
)


def local_directory(name_or_path: str | os.PathLike[str], what: str, *, weights_only: bool = False) -> Path:
    """Return a directory as it is; fetch a hub id into the hub's cache and return that directory.

    Of its links, those that are needed are looked at (spp.files.places.check_link).

    Args:
        name_or_path: a directory, or an id such as "owner/name".
        what: "model", "adapter", … for the message.
        weights_only: whether no tokenizer and no other config than that of the weights is read there.

    Raises:
        CheckpointError: there is no such directory, and it is no id or cannot be fetched; or a link in it leads nowhere
            or is not followed.
    """
    path = Path(name_or_path)
    text = os.fspath(name_or_path)
    try:
        if path.is_dir():
            _check_links(path, weights_only)
            return path
        if path.is_symlink():
            check_link(path, path.parent)  # which says where it leads, if that is nothing
        exists = path.exists()
    except OSError as error:  # permission denied, a name that is too long
        raise CheckpointError(f"the {what} directory {text} cannot be read: {error.strerror}") from error
    if exists:
        if path.suffix == ".gguf":
            raise CheckpointError(other_weights(path.parent) or f"{text} is GGUF, which is not read")
        raise CheckpointError(f"{what} {text} is a file; pass the directory that holds it")
    if not _HUB_ID.fullmatch(text) or path.is_absolute():
        raise CheckpointError(f"there is no {what} directory {text}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(text, ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no {what} directory {text}, and fetching it as a hub id failed: {reason}. Check the spelling "
            f"and the network, or pass a local directory"
        ) from error
    _check_links(path, weights_only)
    return path


def _check_links(directory: Path, weights_only: bool) -> None:
    """Raise a CheckpointError for a link of a folder that is needed and may not be read, or leads nowhere."""
    try:
        with os.scandir(directory) as entries:
            links = {entry.name: entry.is_symlink() for entry in entries}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
    weights = _ADAPTER if "adapter_config.json" in links else _MODEL
    needed = ((_CONFIG,), weights) if weights_only else (_CONFIGS, weights, _TOKENIZER)
    for patterns in needed if any(links.values()) else ():
        found = ([name for name in links if re.fullmatch(pattern, name)] for pattern in patterns)
        for name in next(filter(None, found), []):
            if links[name]:
                check_link(directory / name, directory)
