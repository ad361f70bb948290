"""Hashes are those that the format documents, written out here once more."""

from __future__ import annotations

import hashlib
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spp.files import content_crc32, content_sha256, dtype_name, hashes, mask_sha256


def test_mask_sha256_of_a_known_tensor() -> None:
    t = torch.tensor([[0.0, -0.0, 2.0], [1e-45, 0.0, -3.0]])
    stream = b"spp-mask-1" + bytes.fromhex("0200000000000000030000000000000034")  # 2, 3, 0b001101 00
    assert mask_sha256(t) == hashlib.sha256(stream).hexdigest()
    assert mask_sha256(t) == "ad1d0c64efc8e2706cc34fb25450c4284c0e1b6b238ce861a996a9fd1beae9e1"


@given(st.integers(0, 2**31), st.lists(st.integers(0, 9), max_size=3), st.sampled_from(["float32", "bfloat16"]))
def test_hashes_are_their_definitions(seed: int, shape: list[int], dtype: str) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu_().to(getattr(torch, dtype))
    for view in (t, t.movedim(0, -1)) if shape else (t,):
        raw = view.float().numpy()
        mask = b"spp-mask-1" + struct.pack(f"<{view.dim()}q", *view.shape) + np.packbits(raw != 0).tobytes()
        assert mask_sha256(view) == hashlib.sha256(mask).hexdigest()
        data = (
            raw.tobytes()
            if dtype == "float32"
            else (np.ascontiguousarray(raw).view("<u4") >> 16).astype("<u2").tobytes()
        )
        assert content_crc32(view) == zlib.crc32(data)
        assert content_sha256(view) == hashlib.sha256(data).hexdigest()


def test_masks_depend_on_shape_and_place_and_contents_on_every_bit() -> None:
    t = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert mask_sha256(t) == mask_sha256(t.bfloat16() * 3)
    assert len({mask_sha256(x) for x in (t, t.view(4), t.view(1, 4), t.t(), 1 - t)}) == 5
    assert len({content_crc32(x) for x in (t, -t, t.double(), torch.where(t == 0, -0.0, t))}) == 4


def test_big_strided_tensors_are_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole = content_crc32(t.t().contiguous())
    monkeypatch.setattr(hashes, "_PIECE", 256)
    assert content_crc32(t.t()) == whole
    assert max(len(piece) for piece in hashes.tensor_bytes(t.t())) <= 256


def test_dtype_names() -> None:
    assert (dtype_name(torch.float32), dtype_name(torch.bfloat16)) == ("float32", "bfloat16")
