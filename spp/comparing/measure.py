"""What every benchmark shares: interleaved rounds, ratios of medians, peak memory of a fresh process, the environment.

A ratio between two contenders is taken round by round, both having run seconds apart in one process, and given as
median with 20th and 80th percentile: a machine that slows down or is shared slows both. Each row names the machine,
the versions, the dtype and the threads it was measured with.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spp._version import __version__
from spp.errors import ConfigError, DependencyError, OutputExistsError, SPPError
from spp.files import atomic_file, write_json
from spp.files.recognised import MEASUREMENTS, PICTURE, FileKind
from spp.kernels import native
from spp.kernels.choice import kernels
from spp.report import Table, count_text
from spp.report.plot import check_plot

PACKAGES = ("transformers", "peft", "triton")


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
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
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
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device)
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
        return Memory(rest, torch.cuda.max_memory_allocated(device))
    _reset_peak()
    rest = _resident("VmRSS:")
    for _ in range(calls):
        call()
    return Memory(rest, _resident("VmHWM:"))


def in_child(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m module arguments` and return the JSON object on its last line of output.

    Raises:
        SPPError: the child failed; its last words are in the message.
    """
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        words = (run.stderr or run.stdout).strip().splitlines()[-1:]
        raise SPPError(f"{' '.join(command)} failed with exit code {run.returncode}: {' '.join(words)}")
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def environment(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a number is worth nothing without: machine, threads, dtype, who computes (SPP_KERNELS), versions."""
    versions = {"spp": __version__, "torch": torch.__version__}  # torch tells its build: +cpu, +cu130
    versions |= {name: found for name in PACKAGES if (found := installed(name))}
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernels": kernels(),
        "compiled_products": device == "cpu"
        and dtype != torch.float64
        and kernels() in ("auto", "native")
        and native.why_not() is None,
        "python": platform.python_version(),
        "versions": versions,
    }


def environment_line(found: Mapping[str, Any]) -> str:
    """Return `environment` on one line, to stand under a table."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    threads = f"{count_text(found['threads'], 'thread')} on {count_text(found['cores'], 'core')}"
    products = "products that skip zeros" if found["compiled_products"] else f"kernels {found['kernels']}"
    return f"{found['device']}, {threads}, {found['dtype']}, {products}; Python {found['python']}, {versions}"


def processor() -> str:
    """Return the processor's name, as Linux tells it or as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require_peft(contender: str) -> Any:
    """Import peft, or say which contender needs it and which extra brings it."""
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            f"the contender {contender} needs peft: pip install 'spp[peft]', or leave it out"
        ) from error
    return peft


def require_bitsandbytes() -> Any:
    """Import bitsandbytes, or say which extra brings it."""
    try:
        import bitsandbytes
    except ImportError as error:
        extra = "pip install 'spp[quantized]'"
        raise DependencyError(f"the contenders on quantized weights need bitsandbytes: {extra}") from error
    return bitsandbytes


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    told = "of weights and activations (default: %(default)s)"
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"), help=told)
    parser.add_argument("--threads", type=int, help="threads of the processor (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--plot", type=Path, help="draw the table as a chart: a .png, .svg or .pdf file")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of --out and --plot")


def add_timing_options(parser: argparse.ArgumentParser, *, rounds: int = 10, warmup: int = 2) -> None:
    """Add the options of a benchmark that takes turns."""
    told = "(default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds that count {told}")
    parser.add_argument("--warmup", type=int, default=warmup, help=f"rounds before them that do not {told}")


def check_common_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, and set the number of threads.

    Raises:
        ConfigError: an option makes no sense; the message names it.
    """
    for name in ("rounds", "warmup", "threads"):
        value = getattr(options, name, None)
        if value is not None and value < (name != "warmup"):
            raise ConfigError(f"--{name} is {value}; it must be at least {int(name != 'warmup')}")
    _check_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for path, kind in ((options.out, MEASUREMENTS), (options.plot, PICTURE)):
        if path is not None and path.exists() and not options.overwrite:
            raise OutputExistsError(f"{path} exists; choose another name, or pass --overwrite")
        if path is not None:
            _rehearse_writing(path, kind)
    if options.plot is not None:
        check_plot(options.plot)


def _check_device(device: str) -> None:
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not found:
        raise ConfigError(f"--device is {device!r}; known: cpu, cuda, cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {device}, but this torch ({torch.__version__}) finds no CUDA device")
    if device != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device is {device}, but the CUDA devices here are {torch.cuda.device_count()}, from cuda:0"
        )


def _rehearse_writing(path: Path, kind: FileKind) -> None:
    """Raise now what writing the file after the measurements would raise; nothing stays behind."""
    with contextlib.suppress(_RehearsalError), atomic_file(path, overwrite=True, kind=kind):
        raise _RehearsalError


class _RehearsalError(Exception):
    """Ends a rehearsal before the file is put in its place."""


def finish(
    rows: Sequence[Mapping[str, Any]], table: Table, options: argparse.Namespace, plot: Callable[[], object]
) -> None:
    """Print the table and what it was measured with; write the files of `--out` and `--plot`."""
    print(table.text())
    print(environment_line(rows[0]))
    if options.out:
        write_rows(rows, options.out, overwrite=options.overwrite)
        print(f"wrote {options.out}")
    if options.plot:
        plot()
        print(f"wrote {options.plot}")


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path, *, overwrite: bool) -> None:
    """Write rows of measurements as JSON, atomically; an existing file of measurements is kept unless `overwrite`."""
    with atomic_file(path, overwrite=overwrite, kind=MEASUREMENTS) as temporary:
        write_json(temporary, {"rows": [dict(row) for row in rows]})


def _reset_peak() -> None:
    """Give freed memory back and restart the high-water mark, where the system can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def _resident(field: str) -> int:
    """Bytes of VmRSS: or VmHWM:; the process's peak where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
