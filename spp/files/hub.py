"""A directory or a hub id: where the files are on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spp.errors import CheckpointError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def local_directory(name_or_path: str | os.PathLike[str], what: str) -> Path:
    """Return a directory as it is; fetch a hub id into the hub's cache and return that directory.

    Args:
        name_or_path: a directory, or an id such as "owner/name".
        what: "model", "adapter", … for the message.

    Raises:
        CheckpointError: there is no such directory, and it is no id or cannot be fetched.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    text = os.fspath(name_or_path)
    if path.exists():
        raise CheckpointError(f"{what} {text} is a file; pass the directory that holds it")
    if not _HUB_ID.fullmatch(text) or path.is_absolute():
        raise CheckpointError(f"there is no {what} directory {text}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"there is no {what} directory {text}, and fetching it as a hub id failed: {reason}. Check the spelling "
            f"and the network, or pass a local directory"
        ) from error
