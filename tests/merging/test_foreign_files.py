"""Checkpoints as other tools and people write them: what is in them is merged, pruned and exported along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spp
from spp.errors import CheckpointError
from spp.training.loading import load_model
from tests.helpers.checkpoints import make_sources, same_tensors
from tests.helpers.models import CHAT_TEMPLATE, tiny_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint, whole and in shards, with an adapter and what a merge gives."""
    folder = make_sources(tmp_path_factory.mktemp("foreign") / "sources")
    spp.merge_checkpoint(folder / "whole", folder / "adapter", folder / "merged")
    return folder


@pytest.fixture
def base(sources: Path, tmp_path: Path) -> Path:
    shutil.copytree(sources / "whole", tmp_path / "base")
    return tmp_path / "base"


def loads(folder: Path) -> None:
    """transformers loads every weight."""
    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


@pytest.mark.slow
@pytest.mark.parametrize("metadata", [None, {}, {"producer": "another tool"}])
def test_files_without_the_format_in_their_metadata(metadata: Any, base: Path, sources: Path, tmp_path: Path) -> None:
    """safetensors/safetensors#549, ml-explore/mlx#743: other loaders stop at files that do not say "pt"."""
    save_file(load_file(base / WEIGHTS), base / WEIGHTS, metadata=metadata)
    spp.merge_checkpoint(base, sources / "adapter", tmp_path / "merged")
    with safe_open(tmp_path / "merged" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same_tensors(tmp_path / "merged", sources / "merged")


INDICES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "without metadata": lambda index: index.pop("metadata"),
    "metadata that is none": lambda index: index.update(metadata=None),
    "more keys": lambda index: index.update(note="x", metadata={"total_size": 1, "total_parameters": None, "a": {}}),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("how", INDICES)
def test_an_index_of_another_tool(how: str, sources: Path, tmp_path: Path) -> None:
    """What is written loads, though transformers itself stops at an index without metadata."""
    shutil.copytree(sources / "base", tmp_path / "base")
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    INDICES[how](index)
    (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    spp.merge_checkpoint(tmp_path / "base", sources / "adapter", tmp_path / "merged")
    assert same_tensors(tmp_path / "merged", sources / "merged")
    loads(tmp_path / "merged")


CARRIED = {
    "generation_config.json": json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6}),
    "chat_template.jinja": CHAT_TEMPLATE,
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "modeling_own.py": "A = 1\n",
    "parts/configuration_own.py": "B = 2\n",
}


def test_templates_code_and_a_generation_config_that_transformers_refuses_are_carried_along(
    base: Path, sources: Path, tmp_path: Path
) -> None:
    """huggingface/transformers#24737 and #29988, NVIDIA/Model-Optimizer#1245, hiyouga/LlamaFactory#8399."""
    for name, text in CARRIED.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    spp.merge_checkpoint(base, sources / "adapter", tmp_path / "merged")
    spp.prune_checkpoint(base, tmp_path / "pruned", "magnitude", "2:8")
    spp.export_packed(base, tmp_path / "packed")
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    for folder in ("merged", "pruned", "packed", "dense"):
        for name, text in CARRIED.items():
            assert (tmp_path / folder / name).read_text() == text, f"{folder}: {name}"


MODEL = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class OwnModel(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(2))
        self.out = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids=None, labels=None, **options):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.out(x))
"""
CONFIG = """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own_model"

    def __init__(self, width=32, vocab_size=256, **options):
        self.width, self.vocab_size = width, vocab_size
        super().__init__(**options)
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose model's class is in its own folder."""
    from transformers import AutoConfig

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(MODEL)
    (folder / "configuration_own.py").write_text(CONFIG)
    auto = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_model", "auto_map": auto, "dtype": "float32"}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    save_file(model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_with_code_of_its_own_goes_the_whole_way(own_code: Path, tmp_path: Path) -> None:
    """huggingface/transformers#46165 and #24737: saved models that lack their own files."""
    ids = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(own_code, trust_remote_code=True)
    assert len(spp.prune(model, "sparsegpt", "2:4", ids).layers) == 4
    spp.save_model(model, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    spp.wrap(loaded, r=4, seed=0)
    with torch.no_grad():
        for parameter in spp.adapter_parameters(loaded):
            parameter.add_(0.1)
    spp.save_adapter(loaded, tmp_path / "adapter")
    spp.merge_checkpoint(tmp_path / "pruned", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(merged(ids).logits, loaded(ids).logits)
    assert (tmp_path / "merged/modeling_own.py").read_text() == MODEL


def test_code_of_a_model_is_not_run_unless_allowed(own_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *question: "n")
    with pytest.raises(CheckpointError, match=r"Python code of its own.*trust_remote_code=True"):
        load_model(own_code)
