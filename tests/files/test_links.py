"""The rule for symbolic links (spp.files.places.check_link): whose they are, where they lead, what is copied.

Users link models to a larger disk and meet loaders that refuse them (huggingface/sentence-transformers#3231,
vladmandic/sdnext#1045); a copy that follows every link carries secrets into what is published, and one that follows
none loses a model of the hub's cache (NVIDIA/Model-Optimizer#2060 and #2427).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spp
from spp.errors import CheckpointError, ConfigError
from spp.files import CheckpointReader, save_tensors
from spp.files.carry import carry_files, refuse_overlap
from spp.files.hub import local_directory
from spp.files.places import check_link, follow_links
from tests.helpers.checkpoints import pruned_model
from tests.helpers.models import tiny_tokenizer

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


def farm(source: Path, links: Path) -> Path:
    """A folder of links to every file of another, under other names there, as stores of contents have them."""
    store = links.with_name("store")
    store.mkdir()
    links.mkdir()
    for number, path in enumerate(sorted(path for path in source.iterdir() if path.is_file())):
        shutil.copy(path, store / f"{number:04}")
        (links / path.name).symlink_to(store / f"{number:04}")
    return links


def _clone(folder: Path) -> None:
    (folder / ".git").mkdir()


def _download(folder: Path) -> None:
    (folder / ".cache" / "huggingface").mkdir(parents=True)


MARKS: dict[str, Callable[[Path], object]] = {"a clone": _clone, "a download": _download}


@pytest.mark.parametrize("kind", [None, *MARKS])
def test_a_link_out_of_a_folder_that_was_downloaded_is_not_read(tmp_path: Path, kind: str | None) -> None:
    folder, weights = tmp_path / "model", tmp_path / "weights.safetensors"
    folder.mkdir()
    save_tensors(weights, {"a": torch.ones(1)})
    (folder / "model.safetensors").symlink_to(weights)
    if kind is None:
        with CheckpointReader(folder) as reader:
            assert list(reader) == ["a"]
        return
    MARKS[kind](folder)
    for read in (CheckpointReader, lambda path: local_directory(path, "model")):
        with pytest.raises(CheckpointError, match=rf"safetensors is a symbolic link to .*{weights.name}, outside"):
            read(folder)
        with follow_links(), follow_links(False):
            read(folder)
    with pytest.raises(CheckpointError, match=r"spp\.follow_links"):
        CheckpointReader(folder)


def test_a_cache_of_the_hub(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    (model / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, text in (("README.md", "# a model"), ("config.json", "{}")):
        (model / "blobs" / f"of-{name}").write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/of-{name}")
        assert check_link(snapshot / name, snapshot, copied=True)
    (tmp_path / "secret").write_text(SECRET)
    (snapshot / "vocab.json").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="belongs to a cache of the hub"):
        check_link(snapshot / "vocab.json", snapshot)
    assert follow_links()(check_link)(snapshot / "vocab.json", snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_that_leads_to_no_file(tmp_path: Path, name: str) -> None:
    """Needed ones, by every command: all ask local_directory, or the reader."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_tensors(folder / "model.safetensors", {"a": torch.ones(1)})
    link = folder / name
    link.unlink(missing_ok=True)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for to, message in (
        ("nowhere", "which does not exist"),
        (name, "go round in a circle"),
        ("../folder", "which is a folder"),
        ("../pipe", "which is no regular file"),
    ):
        link.symlink_to(to)
        with pytest.raises(CheckpointError, match=rf"{name} is a symbolic link to {to}.*{message}"):
            local_directory(folder, "model")
        if name == "model.safetensors":
            with pytest.raises(CheckpointError, match=message):
                CheckpointReader(folder)
        if name == "tokenizer.json":  # which a command that reads the weights alone does not read
            assert local_directory(folder, "model", weights_only=True) == folder
        else:
            with pytest.raises(CheckpointError, match=message):
                local_directory(folder, "model", weights_only=True)
        link.unlink()


def test_a_link_to_a_model_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"model is a symbolic link to .*gone, which does not exist"):
        local_directory(tmp_path / "model", "model")


def test_files_that_nobody_reads_stop_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_tensors(folder / "model.safetensors", {"a": torch.ones(1)})
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "notes.txt", "adapter_model.bin.bak"):
        (folder / name).symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    _clone(folder)
    (folder / "photo.png").symlink_to("/etc/hostname")
    assert local_directory(folder, "model") == folder
    with CheckpointReader(folder) as reader:
        assert list(reader) == ["a"]


def test_the_files_of_a_model_are_copied_through_links_and_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    spp.save_model(pruned_model(), source, tokenizer=tiny_tokenizer())
    links = farm(source, tmp_path / "links")
    (tmp_path / "secret").write_text(SECRET)
    for name in ("notes.txt", "README.md"):
        (links / name).symlink_to(tmp_path / "secret")
    (links / "gone.txt").symlink_to("nowhere")
    os.mkfifo(links / "pipe")
    shards = {"model.safetensors"}
    out.mkdir()
    carry_files(links, out, shards)
    found = {path.name for path in out.iterdir()}
    assert found == {path.name for path in source.iterdir()} - {"model.safetensors", "sparsity.json"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= found
    for name in found:
        assert (out / name).read_bytes() == (source / name).read_bytes() and not (out / name).is_symlink()
    for name in ("notes.txt", "README.md", "gone.txt"):
        assert f"{links / name} is a symbolic link to" in caplog.text
    assert caplog.text.count("it is not carried along") == 3
    with follow_links():
        carry_files(links, out, shards)
    assert (out / "notes.txt").read_text() == SECRET


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]
)
@pytest.mark.parametrize("secret", [SECRET, '{"auths": {"host": {"auth": "c2VjcmV0"}}}', '["c2VjcmV0"]', "[" * 9999])
def test_a_secret_under_the_name_of_a_file_of_a_model(tmp_path: Path, name: str, secret: str) -> None:
    """NVIDIA/Model-Optimizer#2060: tokenizer.json is a link to a secret, and the export holds it."""
    (tmp_path / "secret").write_text(secret)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "secret")
    assert check_link(folder / name, folder) and not check_link(folder / name, folder, copied=True)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link to {tmp_path / 'secret'}, outside"):
        carry_files(folder, None, set())


def test_weights_that_go_to_the_hub_have_the_header_of_weights(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET)
    save_tensors(tmp_path / "weights", {"a": torch.ones(1)})
    for to, good in (("key", False), ("weights", True)):
        (folder := tmp_path / f"to-{to}").mkdir()
        (folder / "model.safetensors").symlink_to(tmp_path / to)
        assert check_link(folder / "model.safetensors", folder, copied=True) is good


def test_an_output_that_the_links_lead_to_is_not_replaced(tmp_path: Path) -> None:
    """Whether it is asked for or not: the links would lead to the output then."""
    source, store = tmp_path / "model", tmp_path / "store" / "model"
    source.mkdir()
    store.mkdir(parents=True)
    save_tensors(store / "weights", {"a": torch.ones(1)})
    (source / "model.safetensors").symlink_to(store / "weights")
    for out in (store, tmp_path / "store"):
        with pytest.raises(ConfigError, match=r"holds what .*model\.safetensors leads to, a link in the base"):
            refuse_overlap(out, source, "the base")
    refuse_overlap(tmp_path / "store" / "other", source, "the base")
