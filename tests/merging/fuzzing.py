"""What fuzz tests share: hostile changes to good files, and a watch over time and memory."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spp.errors import SPPError

HANG = 60  # seconds that one input may take: a thousand times what it does take, on the slowest machine
ROOM = 2 * 2**30  # bytes of address space that a whole run may take beyond what it starts with

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, -(10**400), 0.5, -0.0, 1e308]),
    st.sampled_from(
        [float("nan"), float("inf"), "", ".", "..", "/", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 300]
    ),
    st.sampled_from(["(", "(a+)+$", "*", "SPP", "LORA", "model.safetensors", "0" * 64, "q_proj", "2:4", "float32"]),
    st.text(max_size=6),
    st.sampled_from([[], {}, [[]], [None], {"": 1}, [2**63, 2**63], [0, 0], ["a", "a"], {"a": {"a": {}}}]),
    st.integers(90, 2000).map(lambda depth: json.loads("[" * depth + "]" * depth) if depth < 400 else Deep(depth)),
)


class Deep:
    """Stands for a JSON list so deeply nested that no encoder of ours would write it."""

    def __init__(self, depth: int) -> None:
        self.text = "[" * depth + "]" * depth


def as_json(value: Any) -> bytes:
    """JSON text, also of what is no proper JSON: NaN, lone surrogates, endless nesting."""
    deep: list[str] = []

    def default(found: Any) -> str:
        deep.append(found.text)
        return f"@deep{len(deep) - 1}@"

    text = json.dumps(value, default=default)
    for i, nested in enumerate(deep):
        text = text.replace(f'"@deep{i}@"', nested)
    return text.encode()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, child in inner for place in places(child, (*at, key)))]


def changed(value: Any, at: tuple[Any, ...], kind: str, by: Any) -> Any:
    """A copy of a JSON value with one place replaced, removed, renamed or added to."""
    if not at:
        return by if kind == "replace" else value
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key, rest = at[0], at[1:]
    if rest or kind == "replace":
        copy[key] = changed(copy[key], rest, kind, by)
    elif kind == "remove":
        del copy[key]
    elif isinstance(copy, dict):
        name = by if isinstance(by, str) else str(by)[:40]
        copy[name] = copy.pop(key) if kind == "rename" else copy[key]
    else:
        copy.append(by)
    return copy


def documents(good: Any) -> st.SearchStrategy[bytes]:
    """Hostile relatives of a JSON document: a few places of it changed, its bytes edited, or nothing of it left."""
    everywhere = st.sampled_from(places(good))
    changes = st.lists(
        st.tuples(everywhere, st.sampled_from(["replace", "replace", "remove", "rename", "add"]), HOSTILE),
        min_size=1,
        max_size=3,
    )

    def apply(wanted: list[tuple[tuple[Any, ...], str, Any]]) -> bytes:
        value = good
        for at, kind, by in wanted:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took the place away
                value = changed(value, at, kind, by)
        return as_json(value)

    text = json.dumps(good).encode()
    return st.one_of(
        changes.map(apply), changes.map(apply), EDITS.map(lambda edits: edited(text, edits)), HOSTILE.map(as_json)
    )


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "length", "double"]),
        st.integers(0, 2**20),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """Bytes with bits flipped, pieces cut out, put in or doubled, and the first eight (a length) replaced."""
    for kind, at, value in edits:
        at = at % (len(data) + 1)
        if kind == "flip":
            data = data[:at] + bytes([b ^ (1 << value % 8) for b in data[at : at + 1]]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + value % 32 :]
        elif kind == "insert":
            data = data[:at] + value.to_bytes(8, "little")[: value % 9] + data[at:]
        elif kind == "double":
            data = data[:at] + data[at : at + value % 64] * 2 + data[at + value % 64 :]
        else:
            data = struct.pack("<Q", value >> value % 64) + data[8:]
    return data


def fuzz(inputs: st.SearchStrategy[Any], use: Callable[[Any], object], count: int) -> None:
    """Give `count` inputs to `use`: it returns or raises an error of spp, in time and within memory."""

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def check(value: Any) -> None:
        with watched(), contextlib.suppress(SPPError):
            use(value)

    with bounded():
        check()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Turn what does not end into a failure."""

    def ring(*_: object) -> None:
        raise AssertionError(f"an input takes longer than {HANG} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Leave the process room for 2 GiB more than it has: what wants more is met with a MemoryError, which fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
