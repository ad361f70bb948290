"""merge_checkpoint: the bytes of the in-memory merge, everything else carried along, and nothing half done."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp
from spp.certifying.certificate import Certificate
from spp.certifying.save import certify, save_model
from spp.certifying.verify import verify
from spp.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    MaskError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    SPPWarning,
)
from spp.files import CheckpointReader, read_json, save_tensors, write_json
from spp.merging.disk import merge_checkpoint
from tests.helpers.checkpoints import (
    Q0,
    UP1,
    grown,
    pruned_model,
    rewrite,
    same_tensors,
    shard,
    tensors_of,
    wrapped_model,
)
from tests.helpers.models import tiny_tokenizer

ADAPTER = "adapter_model.safetensors"
ALPHA = "base_model.model.model.layers.0.self_attn.q_proj.spp_alpha"
BETA = "base_model.model.model.layers.0.self_attn.q_proj.spp_beta"


def in_memory(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    """The same merge by way of a loaded model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    spp.load_adapter(model, adapter)
    report = spp.merge(model, **options)
    save_model(model, out, tokenizer=AutoTokenizer.from_pretrained(base))
    return report


def edit_adapter(adapter: Path, changes: dict[str, torch.Tensor | None]) -> None:
    with CheckpointReader(adapter, file=ADAPTER) as reader:
        tensors = {key: reader.tensor(key).clone() for key in reader}
    save_tensors(adapter / ADAPTER, {k: t for k, t in {**tensors, **changes}.items() if t is not None})


def test_the_comparison_can_fail(base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    assert same_tensors(base, other)
    tensor = tensors_of(base)[Q0]
    tensor[tensor == 0] = -0.0
    rewrite(other, {Q0: tensor})
    assert not same_tensors(base, other)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("stored", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.float32, {"dtype": torch.bfloat16}),
        (torch.float32, {"dtype": torch.float16, "rounding": "stochastic", "seed": 3}),
        (torch.bfloat16, {"rounding": "stochastic", "seed": 4}),
        (torch.bfloat16, {"dtype": torch.float32}),
    ],
)
def test_the_bytes_are_those_of_the_merge_in_memory(
    tmp_path: Path, shards: int, stored: torch.dtype, options: dict[str, Any]
) -> None:
    base = save_model(pruned_model(stored), tmp_path / "base", tokenizer=tiny_tokenizer())
    adapter = spp.save_adapter(wrapped_model(stored), tmp_path / "adapter")
    expected = in_memory(base, adapter, tmp_path / "expected", **options)
    if shards > 1:
        base = shard(base, tmp_path / "shards", shards)
    report = merge_checkpoint(base, adapter, tmp_path / "out", **options)
    assert same_tensors(tmp_path / "out", tmp_path / "expected")
    assert report.layers == expected.layers and report.survived == pytest.approx(expected.survived)
    assert report.sparsity_report == expected.sparsity_report == verify(tmp_path / "out")
    assert verify(base, tmp_path / "out").pattern == "2:4"
    certificate, other = Certificate.read(tmp_path / "out"), Certificate.read(tmp_path / "expected")
    assert (certificate.tensors, certificate.other) == (other.tensors, other.other)
    assert certificate.base is not None and other.base is not None
    assert certificate.base.name_or_path == str(base)
    assert certificate.base.fingerprint == other.base.fingerprint == certificate.fingerprint()
    with CheckpointReader(base) as before, CheckpointReader(tmp_path / "out") as after:
        assert before.shards().keys() == after.shards().keys()  # the base's file names
        if "dtype" not in options:
            for key in certificate.other:
                assert bytes(before.raw(key)) == bytes(after.raw(key))
    wanted = options.get("dtype", stored)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert read_json(tmp_path / "out" / "config.json", "config")["dtype"] == str(wanted).removeprefix("torch.")
    if shards > 1:
        index = read_json(tmp_path / "out" / "model.safetensors.index.json", "index")
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())


def test_the_merged_model_computes_what_the_wrapped_one_did(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, adapter, tmp_path / "out")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = wrapped_model()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        pruned = pruned_model()(ids).logits
    assert not torch.allclose(expected, pruned, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_everything_beside_the_weights_is_carried_along_and_nothing_else(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    carried = {
        "modeling_custom.py": "code",
        "sub/README.md": "notes",
        "sub/extra.json": "{}",
        "chat_templates/rag.jinja": "t",
    }
    left = {
        "pytorch_model.bin": "pickle",
        "README.md": "the base's card",
        "model.gguf": "other weights",
        "optimizer.pt": "state",
        "unused.safetensors": "weights",
        "adapter_config.json": "{}",
        "pytorch_model.bin.index.json": "{}",
        ".git/config": "hidden",
        ".gitattributes": "hidden",
        "sub/model.onnx": "weights",
    }
    for name, text in {**carried, **left}.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    (base / "empty").mkdir()
    (base / "linked").symlink_to(base / "sub")
    os.mkfifo(base / "pipe")
    with (base / "huge.txt").open("wb") as file:
        file.truncate(2**28 + 1)
    before = {p.name: p.read_bytes() for p in base.iterdir() if p.is_file() and p.suffix in (".json", ".jinja")}
    merge_checkpoint(base, adapter, tmp_path / "out")
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    same = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert found == carried.keys() | same | {"model.safetensors", "sparsity.json"}
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    assert "huge.txt" in caplog.text and "linked is a link to a folder" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_tokenizer().chat_template


def test_the_dtype_of_nested_configs_follows(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = read_json(base / "config.json", "config")
    config.pop("dtype", None)
    write_json(base / "config.json", {**config, "torch_dtype": "float32", "text_config": {"dtype": "float32", "x": 1}})
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    found = read_json(tmp_path / "out" / "config.json", "config")
    assert (found["dtype"], found["torch_dtype"], found["text_config"]) == (
        "bfloat16",
        "bfloat16",
        {"dtype": "bfloat16", "x": 1},
    )


def test_the_same_merge_gives_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        merge_checkpoint(base, adapter, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
        assert path.stat().st_mode == (tmp_path / "one" / "config.json").stat().st_mode


def test_a_projection_that_the_adapter_leaves_alone_keeps_its_mask_in_a_narrower_dtype(tmp_path: Path) -> None:
    model = pruned_model()
    with torch.no_grad():
        weight = model.get_parameter(UP1)
        weight[weight != 0] = 1e-10  # zero in float16
    base = save_model(model, tmp_path / "base")
    adapter = spp.save_adapter(wrapped_model(target_modules=["q_proj"]), tmp_path / "adapter")
    merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float16)
    assert verify(base, tmp_path / "out").pattern == "2:4"


def test_an_adapter_of_the_authors_is_merged(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "authors"
    adapter.mkdir()
    alpha = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    save_tensors(adapter / ADAPTER, {f"{prefix}.weight": alpha, f"{prefix}.weight_col": torch.full((64, 1), 0.1)})
    write_json(adapter / "adapter_config.json", {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0})
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert list(report.layers) == ["model.layers.0.self_attn.q_proj"]
    weight, merged = tensors_of(base)[Q0], tensors_of(tmp_path / "out")[Q0]
    expected = weight * (1 + 2 * 0.1 * alpha.repeat_interleave(16, 0))
    torch.testing.assert_close(merged, expected)


def test_a_small_update_is_reported(tmp_path: Path) -> None:
    base = save_model(pruned_model(torch.bfloat16), tmp_path / "base")
    adapter = spp.save_adapter(wrapped_model(torch.bfloat16, scale=0.02), tmp_path / "adapter")
    with pytest.warns(SPPWarning, match="of the update"):
        report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert report.survived < 0.9
    verify(base, tmp_path / "out")


def test_a_layer_of_unknown_zeros_is_merged_with_a_warning(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = adapter / "adapter_config.json"
    config = read_json(path, "config")
    del config["base_masks"]["model.layers.0.self_attn.q_proj"]
    write_json(path, config)
    with caplog.at_level("WARNING", logger="spp"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert "which zeros it was trained on in model.layers.0.self_attn.q_proj;" in caplog.text
    in_memory(base, adapter, tmp_path / "expected")
    assert same_tensors(tmp_path / "out", tmp_path / "expected")
    rewrite(base, {UP1: grown(tensors_of(base)[UP1])})
    with pytest.raises(MaskError, match=r"in 1 layers: model\.layers\.1\.mlp\.up_proj"):
        merge_checkpoint(base, adapter, tmp_path / "other")


# What must fail, and leave everything as it was.


def _misshapen(base: Path, adapter: Path) -> None:
    edit_adapter(adapter, {ALPHA: torch.ones(4, 32)})


def _extra(base: Path, adapter: Path) -> None:
    config = read_json(adapter / "adapter_config.json", "config")
    config["base_masks"]["model.layers.7.mlp.up_proj"] = "0" * 64
    write_json(adapter / "adapter_config.json", config)
    edit_adapter(adapter, {ALPHA.replace("0", "9"): torch.ones(4, 64), BETA.replace("0", "9"): torch.ones(64, 1)})


def _config(**values: Any) -> Callable[[Path, Path], None]:
    def change(base: Path, adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        write_json(path, {**read_json(path, "config"), **values})

    return change


def _base(changes: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> Callable[[Path, Path], None]:
    def change(base: Path, adapter: Path) -> None:
        tensors = tensors_of(base)
        rewrite(base, {key: make(tensors[key]) for key, make in changes.items()})

    return change


def _put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.where(t != 0, value, t)


def _truncate(which: str) -> Callable[[Path, Path], None]:
    def change(base: Path, adapter: Path) -> None:
        path = base / "model.safetensors" if which == "base" else adapter / ADAPTER
        path.write_bytes(path.read_bytes()[:-5])

    return change


FAULTS: dict[str, tuple[Callable[[Path, Path], None], type[Exception], str]] = {
    "misshapen": (_misshapen, AdapterError, r"model\.layers\.0\.self_attn\.q_proj"),
    "layers that are not there": (_extra, AdapterError, r"7\.mlp\.up_proj: the adapter lacks it(.|\n)*9\.self_attn"),
    "half a layer": (lambda b, a: edit_adapter(a, {BETA: None}), AdapterError, "spp_beta"),
    "an embedding": (_base({Q0: lambda t: t.view(1, 64, 64)}), AdapterError, r"\(1, 64, 64\); expected"),
    "another mask": (_base({Q0: grown, UP1: grown}), MaskError, "in 2 layers: .*q_proj, .*up_proj"),
    "NaN in the adapter": (
        lambda b, a: edit_adapter(a, {ALPHA: torch.full((4, 64), math.nan)}),
        NonFiniteError,
        "q_proj.spp_alpha",
    ),
    "huge values": (
        lambda b, a: edit_adapter(a, {ALPHA: torch.full((4, 64), 3e38), BETA: torch.full((64, 1), 3e38)}),
        NonFiniteError,
        "q_proj",
    ),
    "NaN in the base": (_base({Q0: _put(math.nan)}), NonFiniteError, Q0),
    "truncated base": (_truncate("base"), CheckpointError, "truncated"),
    "truncated adapter": (_truncate("adapter"), CheckpointError, "truncated"),
    "another method": (_config(peft_type="LORA"), AdapterError, "LORA"),
    "a newer adapter": (_config(format_version=2), ConfigError, "newer"),
    "a link out of the base": (
        lambda b, a: (b / "added_tokens.json").symlink_to("/etc/hostname"),
        CheckpointError,
        "symbolic link",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fault_leaves_everything_as_it_was(
    base: Path, adapter: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    change, error, message = FAULTS[name]
    change(base, adapter)
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text('{"model_type": "old"}')
    with pytest.raises(error, match=message):
        merge_checkpoint(base, adapter, out, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == sorted(["base", "adapter", *(["out"] if overwrite else [])])
    assert not overwrite or os.listdir(out) == ["config.json"]


def test_overflow_in_a_narrower_dtype_is_refused(tmp_path: Path) -> None:
    adapter = spp.save_adapter(wrapped_model(target_modules=["q_proj"]), tmp_path / "adapter")
    for key in (UP1, "model.norm.weight"):
        model = pruned_model()
        with torch.no_grad():
            parameter = model.get_parameter(key)
            parameter[parameter != 0] = 1e6
        base = save_model(model, tmp_path / "base", overwrite=True)
        with pytest.raises(NonFiniteError, match=f"{key} overflows in torch.float16"):
            merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.float16)
        assert not (tmp_path / "out").exists()


def test_options_and_places_that_make_no_sense(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out in (base, base / "out", adapter, adapter / "sub" / "out", tmp_path):
        with pytest.raises(ConfigError, match="choose a path outside it"):
            merge_checkpoint(base, adapter, out, overwrite=True)
    with pytest.raises(ConfigError, match="rounding"):
        merge_checkpoint(base, adapter, tmp_path / "out", rounding="up")
    with pytest.raises(ConfigError, match="int8"):
        merge_checkpoint(base, adapter, tmp_path / "out", dtype=torch.int8)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError):
        merge_checkpoint(base, adapter, tmp_path / "there")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        merge_checkpoint(base, adapter, tmp_path / "file" / "out")
    (tmp_path / "file").unlink()
    (tmp_path / "there").rmdir()
    assert {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_name_that_cannot_be_fetched_says_so(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-owner/no-such-model"):
        merge_checkpoint("no-such-owner/no-such-model", adapter, tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere"):
        merge_checkpoint(base, tmp_path / "nowhere", tmp_path / "out")


def test_a_flipped_bit_after_the_merge_is_caught(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoint(base, adapter, out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises((CheckpointError, MaskError)):
        verify(out)
    certify(out)
    verify(out)


def test_the_certificate_is_as_documented(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, adapter, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert list(values) == ["base", "format_version", "other", "other_layout", "spp_version", "tensors", "totals"]
    assert values["totals"]["sparsity"] == 0.5
    assert values["base"]["name_or_path"] == str(base)
