"""How measurements are taken: interleaved rounds, ratios of medians, peak memory of a fresh process, provenance.

A ratio between two contenders is taken round by round, both having run seconds apart in one process, and given as
median with 20th and 80th percentile: a machine that slows down or is shared slows both. Each row names the machine,
the versions, the dtype and the threads it was measured with.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spp.errors import DependencyError, SPPError
from spp.files.provenance import Provenance, resident_bytes
from spp.kernels import native
from spp.kernels.choice import kernels
from spp.models.streamed import trim_memory


@dataclass(frozen=True)
class Sample:
    """Seconds that one call took: on the wall clock, and of processor time over all threads of the process."""

    wall: float
    process: float


@dataclass(frozen=True)
class Spread:
    """Median with 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.p20:.3f} … {self.p80:.3f})"


@dataclass(frozen=True)
class Memory:
    """Bytes of a fresh process, or of a GPU: at rest before the first call, and at the highest point of the calls."""

    rest: int
    peak: int


def spread(values: Sequence[float]) -> Spread:
    """Return the median, 20th and 80th percentile of `values`, linearly interpolated."""
    quantiles = torch.tensor(values, dtype=torch.float64, device="cpu").quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64, device="cpu")
    )
    median, p20, p80 = quantiles.tolist()
    return Spread(median, p20, p80)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
    before: Callable[[], object] | None = None,
) -> dict[str, list[Sample]]:
    """Time every contender once a round, in an order that rotates from round to round.

    Args:
        contenders: what to call, by name.
        rounds: rounds that count.
        warmup: rounds before them that do not.
        device: "cpu" or "cuda"; on a GPU each call is waited for.
        before: called before every call, untimed.
    """
    names = list(contenders)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    gc.collect()
    for i in range(warmup + rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            if before is not None:
                before()
            sample = time_call(contenders[name], device)
            if i >= warmup:
                samples[name].append(sample)
    return samples


def time_call(call: Callable[[], object], device: str = "cpu") -> Sample:
    """Time one call, synchronised with the device."""
    synchronise(device)
    wall, process = time.perf_counter(), time.process_time()
    call()
    synchronise(device)
    return Sample(time.perf_counter() - wall, time.process_time() - process)


def ratio(numerator: Sequence[Sample], denominator: Sequence[Sample], clock: str = "wall") -> Spread:
    """Return the ratio of two contenders' times, taken round by round."""
    pairs = zip(numerator, denominator, strict=True)
    return spread([getattr(a, clock) / max(getattr(b, clock), 1e-9) for a, b in pairs])


def compare(samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """Return the fields of each contender's row: its times, and its ratios to the first one, on both clocks."""
    first = next(iter(samples))
    rows = {}
    for name, found in samples.items():
        row: dict[str, Any] = {"reference": first}
        for clock in ("wall", "process"):
            row[f"{clock}_s"] = asdict(spread([getattr(sample, clock) for sample in found]))
            row[f"reference_to_this_{clock}"] = asdict(ratio(samples[first], found, clock))
            row[f"this_to_reference_{clock}"] = asdict(ratio(found, samples[first], clock))
        rows[name] = row
    return rows


def synchronise(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure_memory(call: Callable[[], object], *, calls: int, device: str = "cpu") -> Memory:
    """Call `calls` times and return the memory at rest before and at the peak; meant for a process of its own.

    On a CPU this is the resident set of the process: on Linux the peak is reset first, so that loading a model does
    not count; elsewhere it is the peak since the process started.
    """
    gc.collect()
    synchronise(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device)
        for _ in range(calls):
            call()
        synchronise(device)
        return Memory(rest, torch.cuda.max_memory_allocated(device))
    trim_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    rest = resident_bytes("VmRSS:")
    for _ in range(calls):
        call()
    return Memory(rest, resident_bytes("VmHWM:"))


def in_child(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m module arguments` and return the JSON object on its last line of output.

    Raises:
        SPPError: the child failed; its last words are in the message.
    """
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode != 0:
        words = (run.stderr or run.stdout).strip().splitlines()[-1:]
        raise SPPError(f"{' '.join(command)} failed with exit code {run.returncode}: {' '.join(words)}")
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def environment(device: str, dtype: torch.dtype) -> Provenance:
    """Return the provenance of a measurement: machine, threads, dtype, who computes (SPP_KERNELS), versions."""
    chosen = kernels()
    compiled = device == "cpu" and dtype != torch.float64 and chosen in ("auto", "native") and native.why_not() is None
    return Provenance.here(device, dtype, kernels=chosen, compiled_products=compiled)


def require_peft(contender: str) -> Any:
    """Import peft, or say which contender needs it and which extra brings it."""
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            f"the contender {contender} needs peft: pip install 'spp[peft]', or leave it out"
        ) from error
    return peft
