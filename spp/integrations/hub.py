"""Push an adapter or a model to the Hugging Face hub, with a model card.

    from spp.integrations.hub import push
    push("merged", "owner/name", run="run")          # spp push merged owner/name --run run

Before anything is sent the files are checked: a model against its certificate, an adapter as it would be read. Pulling
needs no function: wherever spp takes a directory it takes an id of the hub.
"""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spp.certifying.verify import verify
from spp.configs.checkpoints import check_repo_id
from spp.errors import CheckpointError, HubError, OutputExistsError, SPPWarning, arg, call
from spp.files import recover
from spp.files.cards import CARD_NAME
from spp.files.carry import CERTIFICATE_NAME, require_copyable
from spp.integrations.card import make_card
from spp.wrapping.adapter_files import CONFIG_NAME, adapter_without_update, read_adapter

_KEPT = (".gitattributes", CARD_NAME)  # files of a repository that stay though the folder lacks them


@dataclass(frozen=True)
class PushReport:
    """The result of a push.

    Args:
        repo_id: of the repository.
        url: of the commit; None for a dry run.
        files: {path in the repository: bytes}.
        card: the text of the model card that was made; None where there was one already.
    """

    repo_id: str
    url: str | None
    files: dict[str, int]
    card: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


def push(
    dir: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    run: str | os.PathLike[str] | None = None,
    base: str | None = None,
    license: str | None = None,
    new_card: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PushReport:
    """Push a directory to the hub as one commit: an adapter, or a model with its certificate, dense or packed.

    A README.md in the directory is the card. Without one a card is made of the certificate or the adapter, the recipe
    and the results of the run; it goes to the hub and not into the directory.

    Args:
        dir: the directory.
        repo_id: "owner/name"; the repository is made if it is not there.
        private: whether a new repository is private; None is the owner's default.
        revision: the branch; None is the main one.
        message: of the commit.
        token: of the hub; None is the one that `hf auth login` or HF_TOKEN gave.
        run: directory of the tuning run, for recipe and results; None looks beside an adapter.
        base: hub id of the model that this one was made from, where the files name a directory instead.
        license: an identifier of the hub; None takes that of the base's card, if the base is a directory with one.
        new_card: make a card in spite of a README.md, in the directory or on the hub.
        overwrite: replace what is in a repository that exists: files that the directory lacks are removed, but a card.
        dry_run: check and make the card, send nothing.

    Returns:
        PushReport; a warning if an adapter changes no weight.

    Raises:
        CheckpointError, MaskError, NonFiniteError, AdapterError: the files are bad; nothing is sent.
        ConfigError: an option makes no sense.
        OutputExistsError: the repository exists, and `overwrite` is False.
        HubError: there is no token or no network, or the hub refuses.

    Example:
        >>> push("run/adapter", "owner/name", dry_run=True).files  # doctest: +SKIP
        {'README.md': 1514, 'adapter_config.json': 2711, 'adapter_model.safetensors': 9871360}
    """
    check_repo_id(repo_id)
    recover(dir)
    directory = Path(dir)
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory} to push")
    _check(directory)
    files = _files(directory)
    card = None
    if new_card or CARD_NAME not in files:
        card = make_card(directory, repo_id, run=None if run is None else Path(run), base=base, license=license)
    url = None
    if not dry_run:
        with _speaking_to(repo_id):
            import huggingface_hub as hub

            api = hub.HfApi(token=token)
            there = _prepare(api, repo_id, private, revision, overwrite)
            if CARD_NAME in there and not new_card:
                card = None  # what somebody wrote there
            wanted = message or f"Upload {'an adapter' if CONFIG_NAME in files else 'a pruned model'} with spp"
            operations = _operations(files, card, there)
            commit = api.create_commit(repo_id, operations, commit_message=wanted, revision=revision)
            url = str(commit.commit_url)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if card is not None:
        sizes[CARD_NAME] = len(card.encode())
    return PushReport(repo_id, url, dict(sorted(sizes.items())), card)


def _check(directory: Path) -> None:
    if (directory / CONFIG_NAME).exists():
        text = adapter_without_update(read_adapter(directory))
        if text is not None:
            warnings.warn(text, SPPWarning, stacklevel=3)
    elif (directory / CERTIFICATE_NAME).exists():
        verify(directory)
    else:
        raise CheckpointError(
            f"{directory} is no adapter and has no {CERTIFICATE_NAME}; {call('certify', 'dir')} writes the certificate "
            f"of a model"
        )


def _files(directory: Path) -> dict[str, Path]:
    """Return {path in the repository: file} of everything in a directory that is not hidden."""
    found: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith("."):
                if not path.is_symlink() and not stat.S_ISREG(path.stat().st_mode):
                    raise CheckpointError(f"{path} is no regular file; remove it first")
                require_copyable(path, directory)
                found[path.relative_to(directory).as_posix()] = path
    return found


def _prepare(api: Any, repo_id: str, private: bool | None, revision: str | None, overwrite: bool) -> set[str]:
    """Make the repository, or return the files that are in it already."""
    if not api.repo_exists(repo_id):
        api.create_repo(repo_id, private=private)
        return set()
    if not overwrite:
        raise OutputExistsError(
            f"the repository {repo_id} exists already",
            remedy=f"choose another name, or replace what is in it with {arg('overwrite', True)}",
        )
    return set(api.list_repo_files(repo_id, revision=revision))


def _operations(files: dict[str, Path], card: str | None, there: set[str]) -> list[Any]:
    """Return what the commit does: the files, the card, and what the directory lacks goes."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    content: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
    if card is not None:
        content[CARD_NAME] = card.encode()
    add = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in sorted(content.items())]
    gone = sorted(there - content.keys() - {*_KEPT})
    return [*add, *(CommitOperationDelete(path_in_repo=name) for name in gone)]


@contextlib.contextmanager
def _speaking_to(repo_id: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into a HubError that says what to do."""
    try:
        yield
    except (OutputExistsError, KeyboardInterrupt):
        raise
    except Exception as error:  # its own errors, those of two HTTP clients, OSError, ValueError
        raise HubError(f"cannot push to {repo_id}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    kind, text = type(error).__name__, (str(error).strip().split("\n") or [""])[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "LocalTokenNotFoundError" or status == 401:
        return "there is no valid token: run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write there ({text}): use one with write access, or another owner"
    if kind == "OfflineModeIsEnabled":
        return "the hub's client is offline (HF_HUB_OFFLINE is set): unset it"
    if isinstance(error, ConnectionError) or kind in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"):
        return f"the hub cannot be reached ({text or kind}): check the network and try again; nothing was committed"
    return f"{kind}: {text}"
