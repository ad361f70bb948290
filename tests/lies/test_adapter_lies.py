"""What is changed in an adapter's files is caught by load_adapter and by merge_checkpoint, or is not promised."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spp
from spp.errors import AdapterError, CheckpointError, ConfigError, MaskError, NonFiniteError, SPPWarning
from tests.lies.made import (
    Lie,
    Made,
    Raw,
    Said,
    Tell,
    bits,
    copied,
    edit,
    exchange,
    put,
    relabel,
    rename,
    shortened,
    then,
    tiny_adapter,
    tiny_model,
)

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, O, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"
ALPHA, BETA = f"base_model.model.{Q}.spp_alpha", f"base_model.model.{Q}.spp_beta"

CALLS: dict[str, Callable[[Path, Made], Any]] = {
    "load_adapter(model)": lambda folder, made: spp.load_adapter(tiny_model(), folder),
    "load_adapter(wrapped model)": lambda folder, made: spp.load_adapter(spp.wrap(tiny_model(), r=4), folder),
    "merge_checkpoint(base, dir)": lambda folder, made: spp.merge_checkpoint(made.base, folder, folder.parent / "out"),
}


def config(**fields: Any) -> Tell:
    return edit(lambda values: values.update(fields), CONFIG)


def values(change: Callable[[dict[str, str]], Any]) -> Tell:
    return edit(lambda of: change(of["base_values"]), CONFIG)


def masks(change: Callable[[dict[str, str]], Any]) -> Tell:
    return edit(lambda values: change(values["base_masks"]), CONFIG)


def square(folder: Path) -> None:
    """α of rank 32 on 32 inputs, transposed: nothing shows."""
    spp.save_adapter(tiny_adapter(tiny_model(), r=32, target_modules=["q_proj"]), folder, overwrite=True)
    bits(ALPHA, lambda alpha: np.copyto(alpha, alpha.T.copy()), FILE)(folder)


def of_float(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def filled(name: str, value: float) -> Tell:
    return bits(name, lambda entries: entries.reshape(-1).__setitem__(1, of_float(value)), FILE)


NO_SUM = "no checksum of the adapter itself is kept"
# (what is done, what load_adapter must say, what merge_checkpoint must say where that is something else)
TABLE: dict[str, tuple[Tell, Said, str] | tuple[Tell, Said, str, str]] = {
    "NaN in β": (filled(BETA, math.nan), NonFiniteError, f"{Q}.spp_beta"),
    "infinity in α": (filled(ALPHA, math.inf), NonFiniteError, f"{Q}.spp_alpha"),
    "a key renamed": (
        rename(BETA, BETA.replace("q_proj", "p_proj"), FILE),
        AdapterError,
        f"{Q}.spp_beta",
    ),
    "a parameter of another rule": (rename(BETA, BETA.replace("spp_beta", "hira_A"), FILE), AdapterError, "hira_A"),
    "a key without its prefix": (rename(BETA, f"{Q}.spp_beta", FILE), AdapterError, f"unexpected keys {Q}.spp_beta"),
    "a tensor taken out": (put(BETA, "", None, FILE), AdapterError, f"{Q}.spp_beta"),
    "a layer taken out": (
        then(put(ALPHA, "", None, FILE), put(BETA, "", None, FILE)),
        AdapterError,
        f"missing {Q}.spp_alpha",
        f"{Q}: the adapter lacks it",
    ),
    "no tensor at all": (
        lambda folder: (
            [put(k, "", None, FILE)(folder) for k in Raw(folder / FILE).header if k != "__metadata__"] and None
        ),
        AdapterError,
        "the adapter holds no tensor",
    ),
    "a tensor put in": (put("scale", "F32", np.ones(3, np.uint32), FILE), AdapterError, "unexpected keys scale"),
    "β lying": (relabel(BETA, FILE, shape=[1, 32]), AdapterError, "(1, 32)"),
    "α transposed": (relabel(ALPHA, FILE, shape=[32, 4]), AdapterError, "(32, 4)", Q),
    "codes for α": (relabel(ALPHA, FILE, dtype="I32"), AdapterError, f"not floating-point: {ALPHA}"),
    "a file cut short": (shortened(FILE), CheckpointError, "is truncated"),
    "another rank": (config(r=8), AdapterError, "adapter", f"{Q}: the adapter is of rank 4; its config says 8"),
    "another rank for a layer": (config(rank_pattern={"q_proj": 8}), AdapterError, "", Q),
    "another rule": (config(rule="hira"), AdapterError, "unexpected keys"),
    "a rule that is none": (config(rule="spq"), ConfigError, "spq"),
    "another method": (config(peft_type="LORA"), AdapterError, "'LORA', not SPP"),
    "a later version": (config(format_version=2), ConfigError, "format_version"),
    "another mask": (masks(lambda of: of.update({Q: "0" * 64})), MaskError, f"1 layers: {Q}"),
    "two masks swapped": (
        masks(lambda of: of.update({Q: of[O], O: of[Q]})),
        MaskError,
        f"2 layers: {O}, {Q}",
    ),
    "a mask of a layer that is not there": (
        masks(lambda of: of.update({Q.replace("0", "7"): "0" * 64})),
        AdapterError,
        f"{Q.replace('0', '7')}",
    ),
    "masks that are no texts": (config(base_masks={Q: 3}), CheckpointError, "base_masks must map"),
    "another hash of values": (
        values(lambda of: of.update({Q: "0" * 64})),
        SPPWarning,
        f"differ in 1 of 14 layers, first in {Q}",
    ),
    "two hashes of values swapped": (
        values(lambda of: of.update({Q: of[O], O: of[Q]})),
        SPPWarning,
        f"differ in 2 of 14 layers, first in {O}",
    ),
    "hashes of values without their forms": (
        config(base_forms={}),
        CheckpointError,
        "base_values and base_forms name other layers",
    ),
    "α of two layers swapped": (exchange(ALPHA, ALPHA.replace("q_proj", "o_proj"), file=FILE), None, NO_SUM),
    "β of two layers swapped": (exchange(BETA, BETA.replace("q_proj", "o_proj"), file=FILE), None, NO_SUM),
    "one bit of α": (bits(ALPHA, lambda of: of.__ixor__(1), FILE), None, NO_SUM),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_the_truth(call: str, truth: Made, tmp_path: Path) -> None:
    CALLS[call](copied(truth.adapter, tmp_path / "copy"), truth)


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("name", list(TABLE))
def test_a_changed_adapter(name: str, call: str, truth: Made, tmp_path: Path) -> None:
    tell, error, says, *on_disk = TABLE[name]
    if call.startswith("merge"):
        says = on_disk[0] if on_disk else says
    lie = Lie(name, tell, error, says)
    lie.must_be_caught(copied(truth.adapter, tmp_path / "copy"), lambda folder: CALLS[call](folder, truth))
    assert (tmp_path / "out").exists() == (call.startswith("merge") and lie.passes)


def test_fewer_layers_than_the_model_has(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.adapter, tmp_path / "copy")
    then(put(ALPHA, "", None, FILE), put(BETA, "", None, FILE), masks(lambda of: of.pop(Q)))(folder)
    with pytest.raises(AdapterError, match=f"missing {Q}.spp_alpha"):
        spp.load_adapter(tiny_model(), folder)  # its config says q_proj
    report = spp.merge_checkpoint(truth.base, folder, tmp_path / "out")  # not promised: an adapter may change a part
    assert len(report.layers) == 13 and Q not in report.layers


@pytest.mark.parametrize("name", ["scaling", "square"])
def test_what_only_a_checksum_would_tell_is_not_promised(name: str, truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.adapter, tmp_path / "copy")
    (config(scaling=0.5) if name == "scaling" else square)(folder)
    spp.load_adapter(tiny_model(), folder)
    spp.merge_checkpoint(truth.base, folder, tmp_path / "out")
    assert "Not promised" in str(spp.load_adapter.__doc__) and "another scaling" in str(spp.load_adapter.__doc__)


def test_another_scaling_does_not_go_onto_a_model_that_is_wrapped(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.adapter, tmp_path / "copy")
    config(scaling=0.5)(folder)
    with pytest.raises(AdapterError, match=r"scaling: model 2\.0, adapter 0\.5"):
        spp.load_adapter(spp.wrap(tiny_model(), r=4), folder)


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda of: of.pop(Q), f" in {Q}; they are not checked"), (lambda of: of.clear(), f"in {'model'}")],
)
def test_a_mask_that_is_missing_is_said(
    call: str,
    change: Callable[[dict[str, str]], Any],
    said: str,
    truth: Made,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = copied(truth.adapter, tmp_path / "copy")
    masks(change)(folder)
    with caplog.at_level(logging.WARNING, logger="spp"):
        CALLS[call](folder, truth)
    assert said in caplog.text and "does not say which zeros it was trained on" in caplog.text


def test_an_error_leaves_the_model_as_it_was(truth: Made, tmp_path: Path) -> None:
    for name, tell in (("a", filled(BETA, math.nan)), ("b", masks(lambda of: of.update({Q: "0" * 64})))):
        folder = copied(truth.adapter, tmp_path / name)
        tell(folder)
        model = tiny_model()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises((MaskError, NonFiniteError)):
            spp.load_adapter(model, folder)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_nothing_that_is_not_finite_is_saved_or_merged(tmp_path: Path) -> None:
    model = tiny_adapter(tiny_model())
    layer = model.get_submodule(Q)
    with torch.no_grad():
        layer.spp_beta[3] = math.nan
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for call in (spp.merge, lambda model: spp.save_adapter(model, tmp_path / "out")):
        with pytest.raises(NonFiniteError, match=rf"{Q}\.spp_beta"):
            call(model)
    assert all(torch.equal(tensor.nan_to_num(), before[k].nan_to_num()) for k, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()
