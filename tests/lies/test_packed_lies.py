"""What is changed in a packed checkpoint, or in packed weights in memory, is caught, or is not promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spp
from spp.errors import CheckpointError, MaskError, NonFiniteError, SPPError
from tests.lies.made import (
    MINUS_ZERO,
    NAN,
    NORM,
    O0,
    Q0,
    SINGLE,
    UP1,
    Lie,
    Made,
    Raw,
    Tell,
    bits,
    copied,
    edit,
    exchange,
    put,
    relabel,
    rename,
    tiny_model,
)

CALLS: dict[str, Callable[[Path, Made], Any]] = {
    "verify(dir)": lambda folder, made: spp.verify(folder),
    "verify(base, dir)": lambda folder, made: spp.verify(made.base, folder),
    "export_dense(dir)": lambda folder, made: spp.export_dense(folder, folder.parent / "out"),
    "load_packed(dir)": lambda folder, made: spp.load_packed(folder),
}
Expected = tuple[type[SPPError] | None, str]
LOADED = (None, "the certificate is not read: spp.verify(dir) compares with it")
MAY_DIFFER = (None, "two models may differ in values")


def bit_moved(codes: np.ndarray[Any, Any]) -> None:
    """In a group of four with two kept, another one is: 2:4 still."""
    upper = int(codes[3, 0]) >> 4
    codes[3, 0] = next(v for v in (0b1100, 0b1010, 0b0101, 0b0011) if v != upper) << 4 | int(codes[3, 0]) & 15


def bit_set(codes: np.ndarray[Any, Any]) -> None:
    codes[3, 0] = 0b11101100


def stretch_moved(starts: np.ndarray[Any, Any]) -> None:
    starts[5, 0] += 1


def cut(name: str, of: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], dtype: str = "BF16") -> Tell:
    """Store a part of a tensor alone."""

    def tell(folder: Path) -> None:
        put(name, dtype, of(Raw(folder / SINGLE).bits(name)).copy(order="C"))(folder)

    return tell


def descriptor(name: str, *, at: int, value: int) -> Tell:
    return bits(name, lambda numbers: numbers.__setitem__(at, value))


def everywhere(error: type[SPPError], says: str) -> tuple[Expected, Expected, Expected, Expected]:
    """The same from each of CALLS."""
    return ((error, says),) * 4  # type: ignore[return-value]  # four of them


TABLE: dict[str, tuple[Tell, Expected, Expected, Expected, Expected]] = {
    "one bit of a value": (
        bits(f"{Q0}_values", lambda values: values.reshape(-1).__setitem__(9, values.reshape(-1)[9] ^ 1)),
        (CheckpointError, f"{Q0}: its contents have changed"),
        MAY_DIFFER,
        (CheckpointError, f"{Q0}: its contents have changed"),
        LOADED,
    ),
    "a value that is zero": (
        bits(f"{Q0}_values", lambda values: values.__setitem__((3, 3), 0)),
        (MaskError, f"{Q0}: its zeros have changed"),
        (MaskError, f"{Q0}: 0 became non-zero, 1 became zero"),
        (MaskError, f"{Q0}: its zeros have changed"),
        LOADED,
    ),
    "a value that is −0.0": (
        bits(f"{UP1}_values", lambda values: values.__setitem__(3, MINUS_ZERO)),
        (MaskError, f"{UP1}: its zeros have changed"),
        (MaskError, f"{UP1}: 0 became non-zero, 1 became zero"),
        (MaskError, f"{UP1}: its zeros have changed"),
        LOADED,
    ),
    "a value that is NaN": (
        bits(f"{Q0}_values", lambda values: values.__setitem__((3, 3), NAN)),
        (NonFiniteError, f"{Q0}: NaN or infinity"),
        (NonFiniteError, f"{Q0}: NaN or infinity"),
        (NonFiniteError, f"{Q0}: NaN or infinity"),
        LOADED,
    ),
    "a bit of a mask moved within its group": (
        bits(f"{Q0}_codes", bit_moved),
        (MaskError, f"{Q0}: its zeros have changed: 512 of 1024, the certificate says 512"),
        (MaskError, f"{Q0}: "),
        (MaskError, f"{Q0}: its zeros have changed"),
        LOADED,
    ),
    "a bit too many in a group": (
        bits(f"{Q0}_codes", bit_set),
        *everywhere(CheckpointError, f"{Q0}: the packed weight: 1 groups of 4 do not have 2 values"),
    ),
    "a bit too many in a mask": (
        bits(f"{UP1}_codes", lambda codes: codes.__setitem__((5, 0), 0xFF)),
        *everywhere(CheckpointError, f"{UP1}: the packed weight: the mask keeps"),
    ),
    "codes of another layer": (
        exchange(f"{Q0}_codes", f"{O0}_codes"),
        (MaskError, f"{O0}: its zeros have changed: 512 of 1024, the certificate says 512"),
        (MaskError, f"{Q0}: "),
        (MaskError, f"{Q0}: its zeros have changed"),
        LOADED,
    ),
    "values of another layer": (
        exchange(f"{Q0}_values", f"{O0}_values"),
        (CheckpointError, f"{O0}: its contents have changed"),
        MAY_DIFFER,
        (CheckpointError, f"{Q0}: its contents have changed"),
        LOADED,
    ),
    "starts that are elsewhere": (
        bits(f"{UP1}_starts", stretch_moved),
        *everywhere(CheckpointError, f"{UP1}: the packed weight: starts are not where the mask says"),
    ),
    "values cut, of N:M": (
        cut(f"{Q0}_values", lambda values: values[:-1]),
        *everywhere(CheckpointError, f"{Q0}_values is bfloat16 (31, 16), expected bfloat16 (32, 16)"),
    ),
    "values cut": (
        cut(f"{UP1}_values", lambda values: values[:-1]),
        *everywhere(CheckpointError, f"{UP1}: the packed weight: the mask keeps 512 weights, but there are 511 values"),
    ),
    "codes cut": (
        cut(f"{Q0}_codes", lambda codes: codes[:, :-1], "U8"),
        *everywhere(CheckpointError, f"{Q0}_codes is uint8 (32, 3), expected uint8 (32, 4)"),
    ),
    "no codes": (put(f"{Q0}_codes", "", None), *everywhere(CheckpointError, f"{Q0}_codes is missing")),
    "no values": (put(f"{Q0}_values", "", None), *everywhere(CheckpointError, f"{Q0}_values is missing")),
    "no starts": (put(f"{UP1}_starts", "", None), *everywhere(CheckpointError, f"{UP1}_starts is missing")),
    "codes renamed": (rename(f"{Q0}_codes", "x_codes"), *everywhere(CheckpointError, f"{Q0}_codes is missing")),
    "another pattern in the descriptor": (
        descriptor(Q0, at=2, value=1),
        *everywhere(CheckpointError, f"{Q0}_values is bfloat16 (32, 16), expected bfloat16 (32, 8)"),
    ),
    "another shape in the descriptor": (
        descriptor(Q0, at=5, value=16),
        *everywhere(CheckpointError, f"{Q0}_values is bfloat16 (32, 16), expected bfloat16 (16, 16)"),
    ),
    "another axis in the descriptor": (
        descriptor(Q0, at=1, value=0),
        (MaskError, f"{Q0}: its zeros have changed"),
        (MaskError, f"{Q0}: "),
        (MaskError, f"{Q0}: its zeros have changed"),
        LOADED,
    ),
    "a later version in the descriptor": (
        descriptor(Q0, at=0, value=2),
        *everywhere(CheckpointError, "install a newer spp"),
    ),
    "a header with another dtype for values": (
        relabel(f"{Q0}_values", dtype="F16"),
        (CheckpointError, f"{Q0}: float16; the certificate says bfloat16"),
        (None, "two models may differ in dtypes"),
        (CheckpointError, f"{Q0}: float16; the certificate says bfloat16"),
        LOADED,
    ),
    "a header with another dtype for a norm": (
        relabel(NORM, dtype="F16"),
        (CheckpointError, f"{NORM}: float16; the certificate says bfloat16"),
        (None, "of two models the projections are compared"),
        (CheckpointError, f"{NORM}: float16; the certificate says bfloat16"),
        LOADED,
    ),
    "a later version in the config": (
        edit(lambda values: values["quantization_config"].update(format_version=2), "config.json"),
        *everywhere(CheckpointError, "install a newer spp"),
    ),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_the_truth(call: str, truth: Made, tmp_path: Path) -> None:
    raw = Raw(truth.packed / SINGLE)
    assert {f"{Q0}_codes", f"{O0}_codes", f"{UP1}_starts"} <= raw.header.keys() and f"{Q0}_starts" not in raw.header
    CALLS[call](copied(truth.packed, tmp_path / "copy"), truth)


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("name", list(TABLE))
def test_a_changed_packed_checkpoint(name: str, call: str, truth: Made, tmp_path: Path) -> None:
    tell, *outcomes = TABLE[name]
    lie = Lie(name, tell, *outcomes[list(CALLS).index(call)])
    lie.must_be_caught(copied(truth.packed, tmp_path / "copy"), lambda folder: CALLS[call](folder, truth))
    assert (tmp_path / "out").exists() == (call.startswith("export") and lie.error is None)


def test_what_load_packed_does_not_promise_is_said() -> None:
    assert "Not promised" in str(spp.load_packed.__doc__)


def test_minus_zero_is_not_kept(truth: Made, tmp_path: Path) -> None:
    folder = copied(truth.base, tmp_path / "copy")
    bits(Q0, lambda entries: entries.__setitem__(entries == 0, MINUS_ZERO))(folder)
    spp.certify(folder)
    spp.export_packed(folder, tmp_path / "packed")
    spp.export_dense(tmp_path / "packed", tmp_path / "dense")
    assert spp.verify(tmp_path / "packed") == spp.verify(tmp_path / "dense") == spp.verify(truth.base)
    assert (Raw(tmp_path / "dense" / SINGLE).bits(Q0) == Raw(truth.base / SINGLE).bits(Q0)).all()


def test_packed_weights_in_memory(truth: Made) -> None:
    model = spp.pack(tiny_model())
    q = "model.layers.0.self_attn.q_proj"
    assert spp.verify(truth.base, model) == spp.sparsity(truth.base)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wrong = {**state, f"{q}.weight_codes": state[f"{q}.weight_codes"] | 0xF0}
    with pytest.raises(RuntimeError, match=rf"{q}\.weight: 256 groups of 4 do not have 2 values|groups of 4 do not"):
        model.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, f"{q}.weight_values": state[f"{q}.weight_values"][:-1]})
    other = state[f"{q.replace('q_proj', 'o_proj')}.weight_codes"]
    model.load_state_dict({**state, f"{q}.weight_codes": other})  # possible codes: what they should be, nobody says
    with pytest.raises(MaskError, match=Q0):
        spp.verify(truth.base, model)
    model.load_state_dict(state)
    with torch.no_grad():
        model.get_submodule(q).weight_values[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=Q0):
        spp.verify(truth.base, model)
