"""Provenance: where a result comes from. Every result that is stored has it beside its values, under the same keys."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spp._version import __version__
from spp.files.hashes import dtype_name

PACKAGES = ("transformers", "peft", "triton")


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from; None where it does not depend on that, and then it is not stored.

    Args:
        device: the name of the processor or GPU.
        dtype: of weights and activations, such as "float32".
        threads: of the processor.
        cores: that this process may use.
        kernels: who computes (SPP_KERNELS).
        compiled_products: whether products skip the zeros of a weight.
        python: its version.
        versions: {package: version}.
        seconds: that it took.
        hashes: {key: hash} of what was read: data, masks, weights. Each is stored under its own key.

    Example:
        >>> Provenance(dtype="float32", hashes={"text_sha256": "ab12"}).to_dict()
        {'dtype': 'float32', 'text_sha256': 'ab12'}
    """

    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    cores: int | None = None
    kernels: str | None = None
    compiled_products: bool | None = None
    python: str | None = None
    versions: Mapping[str, str] | None = None
    seconds: float | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, device: str | None = None, dtype: torch.dtype | None = None, **known: Any) -> Provenance:
        """Return the provenance of what this process computes.

        Args:
            device: "cpu", "cuda" or "cuda:N"; None where the result does not depend on it, as for dtype.
            dtype: of weights and activations.
            known: other fields, by name.
        """
        if device is not None:
            device = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
        versions = {"spp": __version__, "torch": torch.__version__}  # torch tells its build: +cpu, +cu130
        return cls(
            device,
            None if dtype is None else dtype_name(dtype),
            threads=torch.get_num_threads(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            python=platform.python_version(),
            versions=versions | {name: found for name in PACKAGES if (found := installed(name))},
            **known,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Return what a stored result says of its provenance; hashes, whose keys are its own, are left out."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values and f.name != "hashes"})

    def to_dict(self) -> dict[str, Any]:
        """Return what is known, as JSON-ready values."""
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "hashes"}
        return {**values, **self.hashes}

    @property
    def packages(self) -> str:
        """Python and the packages with their versions, in words."""
        named = {**({"Python": self.python} if self.python else {}), **(self.versions or {})}
        return ", ".join(f"{name} {found}" for name, found in named.items())

    @property
    def line(self) -> str:
        """The conditions of a measurement on one line, for below a table."""
        threads = f"{_counted(self.threads, 'thread')} on {_counted(self.cores, 'core')}"
        products = "products that skip zeros" if self.compiled_products else f"kernels {self.kernels}"
        return f"{self.device}, {threads}, {self.dtype}, {products}; {self.packages}"


def _counted(count: int | None, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def processor() -> str:
    """Return the processor's name, as Linux tells it or as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resident_bytes(field: str = "VmHWM:") -> int:
    """Return the memory of this process in bytes: VmRSS: now, VmHWM: at its peak; without /proc always the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_bytes(device: str | torch.device = "cpu") -> int:
    """Return the peak of this process's memory so far: on a GPU what torch has allocated there, else the resident set.

    Args:
        device: that it computes on.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()


@functools.cache
def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
