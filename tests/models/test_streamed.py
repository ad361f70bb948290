"""Freed memory goes back to the system."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from spp.models.streamed import _malloc_trim, trim_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_freed_in_the_middle_of_the_heap_is_given_back() -> None:
    if _malloc_trim() is None:
        pytest.skip("the C library is not glibc")

    def resident() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found.group(1)) << 10

    pieces = [bytearray(b"x" * 100_000) for _ in range(2000)]  # 200 MB of chunks that come from the heap
    held = pieces[::100]  # what keeps the heap from shrinking by itself
    full = resident()
    del pieces
    trim_memory()
    assert resident() < full - 150_000_000
    assert len(held) == 20
