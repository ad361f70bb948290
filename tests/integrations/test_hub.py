"""Pushing: what the card says, what is sent, and what is refused before anything is. There is no network here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

import spp
from spp.errors import (
    CheckpointError,
    ConfigError,
    HubError,
    MaskError,
    NonFiniteError,
    OutputExistsError,
    SPPError,
    SPPWarning,
)
from spp.files import CheckpointReader, save_tensors, write_json
from spp.files.hub import local_directory
from spp.integrations.card import make_card
from spp.integrations.hub import PushReport, push
from tests.helpers.checkpoints import Q0, grown, pruned_model, rewrite, tensors_of, wrapped_model
from tests.helpers.models import tiny_llama, tiny_tokenizer
from tests.integrations.fake_hub import FakeHub

REPO = "owner/name"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned base, a run of tuning with its adapter, the merged model, and that packed."""
    folder = tmp_path_factory.mktemp("hub")
    spp.save_model(pruned_model(), folder / "base", tokenizer=tiny_tokenizer())
    model = wrapped_model()
    model.config._name_or_path = str(folder / "base")
    spp.save_adapter(model, folder / "run" / "adapter")
    options = {"data": ["/home/me/train.jsonl", "me/chats"], "lr": 0.02, "steps": 80, "target_modules": None, "r": 4}
    versions = {"python": "3.11", "versions": {"spp": "0.1", "torch": "2.13"}}
    config = {"format": "spp-tune-1", **versions, "tune": {**options, "overwrite": True, "model": "/home/me/base"}}
    write_json(folder / "run" / "config.json", config)
    measured = {"window": 512, "windows": 4, "tokens": 2044}
    before, after = ({"perplexity": value, **measured} for value in (71.0449, 17.7912))
    write_json(folder / "run" / "eval.json", {"text": "/home/me/held-out.txt", "before": before, "after": after})
    spp.merge_checkpoint(folder / "base", folder / "run" / "adapter", folder / "merged")
    spp.export_packed(folder / "merged", folder / "packed")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def parsed(report: PushReport) -> tuple[dict[str, Any], str]:
    assert report.card is not None
    card = ModelCard(report.card)
    return card.data.to_dict(), card.text


def test_an_adapter_that_changes_nothing_is_pushed_with_a_warning(tmp_path: Path) -> None:
    said = "the adapter changes no weight: β is zero everywhere"
    with pytest.warns(SPPWarning, match=said):
        spp.save_adapter(spp.wrap(pruned_model(), r=4), tmp_path / "adapter")
    with pytest.warns(SPPWarning, match=said):
        report = push(tmp_path / "adapter", REPO, dry_run=True)
    assert said in parsed(report)[1]


def test_the_card_of_a_merged_model(made: Path) -> None:
    report = push(made / "merged", REPO, run=made / "run", base="org/pruned", license="apache-2.0", dry_run=True)
    metadata, text = parsed(report)
    assert metadata == {
        "base_model": "org/pruned",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["spp", "pruned", "sparse", "2:4"],
    }
    fingerprint = json.loads((made / "merged" / "sparsity.json").read_text())["base"]["fingerprint"]
    for line in (
        "# name",
        "A pruned language model: sparsity 0.5000 (2:4) over its 14 projections.",
        f"exactly those of the base (fingerprint `{fingerprint[:16]}…`)",
        'AutoModelForCausalLM.from_pretrained("owner/name")',
        "| self_attn.q_proj | 2 | 64×64 | float32 | 0.5000 | 2:4 |",
        "| all | 14 |  |  | 0.5000 | 2:4 |",
        "| data | train.jsonl, me/chats |",
        "| lr | 0.02 |",
        "| versions | Python 3.11, spp 0.1, torch 2.13 |",
        "Perplexity on `held-out.txt`, measured before and after tuning:",
        "| before | 71.0449 | 512 | 4 |",
        "| after | 17.7912 | 512 | 4 |",
    ):
        assert line in text, line
    assert "/home" not in str(report.card) and str(made) not in str(report.card)
    assert "overwrite" not in text and "target_modules" not in text
    again = push(made / "merged", REPO, run=made / "run", base="org/pruned", license="apache-2.0", dry_run=True)
    assert again == report


def test_the_metadata_block_byte_for_byte(made: Path) -> None:
    card = push(made / "merged", REPO, base="org/pruned", license="no", dry_run=True).card
    assert card is not None and card.startswith(
        "---\n"
        "base_model: org/pruned\n"
        "base_model_relation: finetune\n"
        "library_name: transformers\n"
        "license: 'no'\n"  # a word that YAML would read as false
        "pipeline_tag: text-generation\n"
        "tags:\n"
        "- spp\n"
        "- pruned\n"
        "- sparse\n"
        "- '2:4'\n"  # and a number of base 60
        "---\n\n"
        "# name\n\n"
    )


def test_instruction_rows_have_no_window(made: Path, copy: Callable[[str], Path]) -> None:
    run = copy("run")
    write_json(
        run / "eval.json", {"text": "held out: 3 rows", "before": {"perplexity": 9, "window": None, "windows": 3}}
    )
    assert "| before | 9.0000 | rows | 3 |" in make_card(run / "adapter", REPO)


def test_the_card_of_an_adapter(made: Path) -> None:
    metadata, text = parsed(push(made / "run" / "adapter", REPO, dry_run=True))  # the run is found beside it
    assert metadata == {
        "library_name": "spp",
        "pipeline_tag": "text-generation",
        "tags": ["spp", "pruned", "sparse"],
    }
    for line in (
        "An adapter for `base`, a pruned language model",
        "It knows the zeros of 14 of its 14 layers",
        'spp.load_adapter(model, "owner/name")',
        "| r | 4 |",
        "| layers | 14 |",
        "| steps | 80 |",
        "| after | 17.7912 | 512 | 4 |",
    ):
        assert line in text, line
    assert "also trained" not in text
    metadata, text = parsed(push(made / "run" / "adapter", REPO, base="org/pruned", dry_run=True))
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/pruned", "adapter")
    assert 'AutoModelForCausalLM.from_pretrained("org/pruned")' in text


def test_the_card_says_what_was_also_trained(tmp_path: Path) -> None:
    model = wrapped_model(also_train="norms")
    spp.save_adapter(model, tmp_path / "adapter")
    _, text = parsed(push(tmp_path / "adapter", REPO, dry_run=True))
    assert "| also_train | norms |" in text
    assert "| also trained | 5 parameters of the base, such as model.layers.0.input_layernorm.weight |" in text
    count = sum(parameter.numel() for parameter in spp.adapter_parameters(model))
    assert f"| parameters | {count} |" in text


def test_the_cards_of_pruned_and_packed_models(made: Path) -> None:
    metadata, text = parsed(push(made / "base", REPO, dry_run=True))
    assert "base_model" not in metadata and "base_model_relation" not in metadata and "license" not in metadata
    assert "Tuned" not in text and "## Recipe" not in text and "## Results" not in text
    metadata, text = parsed(push(made / "base", REPO, base="org/dense", dry_run=True))
    assert metadata["base_model"] == "org/dense" and "Pruned from `org/dense`." in text
    metadata, text = parsed(push(made / "packed", REPO, dry_run=True))
    assert metadata["library_name"] == "spp" and 'spp.load_packed("owner/name")' in text


def test_the_examples_of_the_cards_run(made: Path) -> None:
    for name in ("merged", "packed", "run/adapter"):
        report = push(made / name, REPO, base="owner/base", dry_run=True)
        code = str(report.card).split("```python\n")[1].split("```")[0]
        code = code.replace('"owner/name"', repr(str(made / name))).replace('"owner/base"', repr(str(made / "base")))
        found: dict[str, Any] = {}
        exec(compile(code, name, "exec"), found)
        assert spp.verify(made / "base", spp.unpack(found["model"]) if name == "packed" else found["model"])


def test_the_licence_is_the_bases_if_it_says_one(made: Path, copy: Callable[[str], Path], tmp_path: Path) -> None:
    base, merged = copy("base"), copy("merged")
    values = json.loads((merged / "sparsity.json").read_text())
    values["base"]["name_or_path"] = str(base)
    write_json(merged / "sparsity.json", values)
    for text, expected in (
        ("---\nlicense: apache-2.0\n---\n# base\n", "apache-2.0"),
        ('---\nlanguage: en\nlicense: "mit"\n---\n', "mit"),
        ("# base\nlicense: mit\n", None),
        ("---\nlicence: mit\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),  # no YAML
        ("---\n- license\n---\n", None),  # no mapping
    ):
        (base / "README.md").write_text(text)
        metadata, _ = parsed(push(merged, REPO, dry_run=True))
        assert metadata.get("license") == expected


def test_hostile_names_stay_text(made: Path, copy: Callable[[str], Path]) -> None:
    merged = copy("merged")
    values = json.loads((merged / "sparsity.json").read_text())
    values["base"]["name_or_path"] = 'x`|\n---\nlicense: mit\n# "y'
    write_json(merged / "sparsity.json", values)
    metadata, text = parsed(push(merged, REPO, dry_run=True))
    assert "license" not in metadata and "\n# " not in text.split("## Zeros")[0].removeprefix("\n# name")


def test_one_commit_with_everything(made: Path, hub: FakeHub, copy: Callable[[str], Path]) -> None:
    merged = copy("merged")
    (merged / ".hidden").write_text("mine")
    (merged / "extra").mkdir()
    (merged / "extra" / "notes.txt").write_text("notes")
    report = push(merged, REPO, private=True, token="secret", message="first")
    assert report.url == "https://hub/owner/name/commit/1"
    assert hub.calls == [("token", "secret"), ("create", REPO, True), ("commit", "first", None)]
    sent = hub.repos[REPO]
    assert set(sent) == {*os.listdir(made / "merged"), "extra/notes.txt", "README.md", ".gitattributes"}
    for name in os.listdir(made / "merged"):
        assert sent[name] == (made / "merged" / name).read_bytes()
    assert sent["README.md"].decode() == report.card
    assert report.files == {name: len(data) for name, data in sorted(sent.items()) if name != ".gitattributes"}
    assert not (merged / "README.md").exists()  # nothing is written here
    assert json.loads(json.dumps(report.to_dict()))["repo_id"] == REPO
    push(made / "run" / "adapter", "owner/adapter")
    assert hub.calls[-1] == ("commit", "Upload an adapter with spp", None)


def test_a_repository_that_exists(made: Path, hub: FakeHub, copy: Callable[[str], Path]) -> None:
    push(made / "merged", REPO)
    before = dict(hub.repos[REPO])
    with pytest.raises(OutputExistsError, match=r"owner/name exists already.*overwrite=True"):
        push(made / "packed", REPO)
    assert hub.repos[REPO] == before
    hub.repos[REPO] |= {"model-00001-of-00002.safetensors": b"old", "README.md": b"written by hand"}
    report = push(made / "packed", REPO, overwrite=True, revision="packed")
    after = hub.repos[REPO]
    assert set(after) == {*os.listdir(made / "packed"), "README.md", ".gitattributes"}  # what was old is gone
    assert after["README.md"] == b"written by hand" and report.card is None and "README.md" not in report.files
    assert hub.calls[-1] == ("commit", "Upload a pruned model with spp", "packed")
    report = push(made / "packed", REPO, overwrite=True, new_card=True)
    assert hub.repos[REPO]["README.md"].decode() == report.card


def test_a_card_that_is_there_is_the_card(made: Path, hub: FakeHub, copy: Callable[[str], Path]) -> None:
    merged = copy("merged")
    (merged / "README.md").write_text("mine")
    report = push(merged, REPO)
    assert report.card is None and hub.repos[REPO]["README.md"] == b"mine"
    report = push(merged, "owner/other", new_card=True)
    assert hub.repos["owner/other"]["README.md"].decode() == report.card != "mine"
    assert (merged / "README.md").read_text() == "mine"


def answer(status: int) -> Exception:
    error = OSError(f"Client error '{status}' for url https://hub/api\nmore")
    error.response = type("Response", (), {"status_code": status})  # type: ignore[attr-defined]
    return error


class ConnectError(Exception):
    """As the HTTP client's."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("Token is required"), "no valid token: run `hf auth login`, or set HF_TOKEN"),
        (answer(401), "no valid token"),
        (answer(403), r"the token may not write there \(Client error '403'.*\): use one with write access"),
        (answer(500), "OSError: Client error '500' for url https://hub/api$"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("no route to host"), r"cannot be reached \(no route to host\): check the network"),
        (ConnectError(""), r"cannot be reached \(ConnectError\): check the network"),
    ],
)
def test_what_the_hub_refuses(made: Path, hub: FakeHub, error: Exception, message: str) -> None:
    hub.error = error
    with pytest.raises(HubError, match=f"cannot push to owner/name: .*{message}"):
        push(made / "base", REPO, token="secret")
    assert hub.repos == {}


def test_without_a_network_the_client_says_so(made: Path) -> None:
    """The real client, which the tests keep offline."""
    with pytest.raises(HubError, match="cannot push to owner/name: the hub's client is offline"):
        push(made / "base", REPO)


def test_bad_files_are_not_sent(made: Path, hub: FakeHub, copy: Callable[[str], Path], tmp_path: Path) -> None:
    base, adapter = copy("base"), Path(shutil.copytree(made / "run" / "adapter", tmp_path / "adapter"))
    tensors = tensors_of(base)
    rewrite(base, {Q0: grown(tensors[Q0])})
    with pytest.raises(MaskError, match=Q0):
        push(base, REPO)
    (base / "sparsity.json").unlink()
    with pytest.raises(CheckpointError, match=r"is no adapter and has no sparsity\.json; spp\.certify"):
        push(base, REPO)
    with CheckpointReader(adapter, file="adapter_model.safetensors") as reader:
        values = {key: reader.tensor(key).clone() for key in reader}
    next(iter(values.values())).fill_(torch.nan)
    save_tensors(adapter / "adapter_model.safetensors", values)
    with pytest.raises(NonFiniteError):
        push(adapter, REPO)
    good = copy("merged")
    (good / "secrets").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="symbolic link"):
        push(good, REPO)
    (good / "secrets").unlink()
    os.mkfifo(good / "pipe")
    with pytest.raises(CheckpointError, match="pipe is no regular file"):
        push(good, REPO)
    (good / "pipe").unlink()
    for arguments, error, message in (
        ((good, "name"), ConfigError, "must be owner/name"),
        ((good, "a/b/c"), ConfigError, "must be owner/name"),
        ((tmp_path / "nothing", REPO), CheckpointError, "no directory"),
    ):
        with pytest.raises(error, match=message):
            push(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a hub id"):
        push(good, REPO, base="/home/me/base")
    with pytest.raises(CheckpointError, match="run's config is missing"):
        push(good, REPO, run=tmp_path)
    write_json(tmp_path / "config.json", {"tune": 3})
    with pytest.raises(CheckpointError, match="no options of a tuning run"):
        push(good, REPO, run=tmp_path)
    assert hub.repos == {} and hub.calls == []


@pytest.mark.parametrize("values", [{}, {"before": 3, "after": {"perplexity": "low"}}, {"text": 5, "after": None}])
def test_results_that_are_none_are_left_out(made: Path, copy: Callable[[str], Path], values: dict[str, Any]) -> None:
    run = copy("run")
    write_json(run / "eval.json", values)
    assert "## Results" not in make_card(run / "adapter", REPO)
    (run / "eval.json").write_text("{")
    with pytest.raises(SPPError, match="perplexities"):
        make_card(run / "adapter", REPO)


def test_an_id_is_pulled_wherever_a_directory_is_taken(
    made: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was pushed comes back: the client's download is the fake's."""

    def snapshot_download(repo_id: str, **_: Any) -> str:
        folder = tmp_path / repo_id.replace("/", "--")
        for name, data in hub.repos[repo_id].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    for name, repo in (("base", "me/base"), ("packed", "me/packed"), ("run/adapter", "me/adapter")):
        push(made / name, repo)
    assert local_directory("me/base", "model").is_dir()
    assert spp.verify("me/packed") == spp.verify(made / "packed")
    assert spp.verify("me/base", "me/packed").pattern == "2:4"
    model = spp.load_adapter(spp.load_packed("me/base"), "me/adapter")
    assert len(spp.adapter_parameters(model)) == 28
    spp.merge_checkpoint("me/base", "me/adapter", tmp_path / "merged")
    merged = push(tmp_path / "merged", "me/merged", dry_run=True).card  # its own: the base's is not carried along
    assert merged is not None and "Tuned from `me/base`" in merged and 'from_pretrained("me/merged")' in merged


def test_a_dense_model_is_described_as_what_it_is(tmp_path: Path) -> None:
    spp.save_model(tiny_llama(), tmp_path / "dense")
    metadata, text = parsed(push(tmp_path / "dense", REPO, dry_run=True))
    assert metadata["tags"] == ["spp", "pruned", "sparse"] and "sparsity 0.0000 (dense)" in text
