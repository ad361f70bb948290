"""One training step of one layer on a GPU: SPP in every mode against its peers, and against the products alone.

The contenders of benchmarks.adapted, and

    spp-torch          the same arithmetic by plain torch instead of Triton's kernels
    spp-packed         packed weights, in the pattern of the run
    spp-packed-any     packed weights that are half zeros without a pattern
    lora-16bit, hira-16bit
                       PEFT's adapters in the dtype of the weights; left to itself PEFT keeps them in float32

All of them share one X and one dY, and those of one pattern one W: a GPU has little memory for fifteen copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.adapted import BETA, SCALING, LayerSpec, Products, make_layer
from spp.comparing import measure as harness
from spp.errors import ConfigError
from spp.kernels import use_kernels
from spp.layers.linear import SPPLinear
from spp.masks.patterns import Pattern
from spp.packing.semi_structured import sparse_weight
from spp.pruning import magnitude_mask
from spp.report import Table, byte_text

ANY_PATTERN = "0.5"
REFERENCES = ("lora", "lora-16bit", "hira", "full")  # what ratios are taken to, where they run
CONTENDERS = (
    "spp",
    "spp-torch",
    "spp-packed",
    "spp-packed-any",
    "spp-input-dropout",
    "spp-alpha-dropout",
    "lora",
    "lora-16bit",
    "hira",
    "hira-16bit",
    "branches",
    "full",
    "frozen",
    "products",
)
Step = Callable[[], None]


@dataclass(frozen=True)
class SharedSpec(LayerSpec):
    """A layer whose weight is made once, on the device."""

    def linear(self) -> nn.Linear:
        """Return the pruned layer; its Parameter is a new one, its memory is not."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(_weight(self))
        return linear


@lru_cache(maxsize=2)
def _weight(spec: SharedSpec) -> Tensor:
    m, n = spec.out_features, spec.in_features
    generator = torch.Generator(spec.device).manual_seed(0)
    weight = torch.empty(m, n, device=spec.device).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    return weight.mul_(magnitude_mask(weight, Pattern.parse(spec.pattern))).to(spec.dtype)


@lru_cache(maxsize=1)
def _inputs(tokens: int, m: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(2)
    x, dy = (torch.randn(tokens, k, generator=generator, device=device, dtype=dtype) for k in (n, m))
    return x.requires_grad_(), dy


def make_step(name: str, spec: SharedSpec, tokens: int) -> tuple[Step, int]:
    """Return one contender's step on X (tokens, n), and the number of its trainable parameters."""
    layer = _make_layer(name, spec)
    x, dy = _inputs(tokens, spec.out_features, spec.in_features, spec.dtype, spec.device)
    if isinstance(layer, Products):
        return lambda: layer.step(x, dy), layer.weight.numel()
    trained = [p for p in layer.parameters() if p.requires_grad]

    def step() -> None:
        for tensor in (x, *trained):
            tensor.grad = None
        with use_kernels("torch") if name == "spp-torch" else contextlib.nullcontext():
            layer(x).backward(dy)

    return step, sum(p.numel() for p in trained)


def measure(names: Sequence[str], spec: SharedSpec, tokens: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return one row a contender, timed in turns of `steps` steps: a training step too waits for nothing in between."""
    made = {name: make_step(name, spec, tokens) for name in names}
    samples = harness.interleave(
        {name: repeat(step, steps) for name, (step, _) in made.items()}, rounds=rounds, device=spec.device
    )
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "bench": "gpu layer",
            "contender": name,
            "trainable": made[name][1],
            "out_features": spec.out_features,
            "in_features": spec.in_features,
            "tokens": tokens,
            "pattern": ANY_PATTERN if name == "spp-packed-any" else spec.pattern,
            "rank": spec.rank_of(name),
            "rounds": rounds,
            "wall_s": asdict(harness.spread([sample.wall / steps for sample in samples[name]])),
        }
        for reference in REFERENCES:
            if reference in samples:
                row[f"this_to_{reference}"] = asdict(harness.ratio(samples[name], samples[reference]))
        rows.append(row)
    return rows


def measure_semi_structured(spec: SharedSpec, tokens: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return the rows of X Wᵀ alone: dense, and with torch's semi-structured 2:4 weight where there is one."""
    weight = _weight(spec)
    x = _inputs(tokens, spec.out_features, spec.in_features, spec.dtype, spec.device)[0].detach()
    calls: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, weight)}
    reason = None
    try:
        sparse = sparse_weight(weight, x)
        calls["semi-structured"] = lambda: F.linear(x, sparse)
    except ConfigError as error:
        reason = str(error)
    samples = harness.interleave(
        {name: repeat(call, steps) for name, call in calls.items()}, rounds=rounds, device=spec.device
    )
    rows: list[dict[str, Any]] = [
        {
            "bench": "gpu product",
            "weight": name,
            "out_features": spec.out_features,
            "in_features": spec.in_features,
            "tokens": tokens,
            "wall_s": asdict(harness.spread([sample.wall / steps for sample in samples[name]])),
            "this_to_dense": asdict(harness.ratio(samples[name], samples["dense"])),
        }
        for name in calls
    ]
    if reason:
        rows.append({**rows[0], "weight": f"semi-structured: {reason}", "wall_s": None, "this_to_dense": None})
    return rows


def repeat(call: Callable[[], object], times: int) -> Step:
    """Return a call that calls `times` times."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure` as a table."""
    references = [name for name in REFERENCES if f"this_to_{name}" in rows[0]]
    memory = "peak_bytes" in rows[0]
    lines = []
    for row in rows:
        line = [
            f"{row['out_features']} × {row['in_features']}",
            row["contender"],
            f"{row['wall_s']['median'] * 1e3:.3f} ms",
            *(f"{row[f'this_to_{name}']['median']:.3f}" for name in references),
        ]
        if memory:
            line += ["–"] if row["peak_bytes"] is None else [byte_text(row["peak_bytes"])]
        lines.append(tuple(line))
    columns = ["layer", "contender", "step", *(f"this / {name}" for name in references)]
    title = f"one training step of a layer, {rows[0]['tokens']} tokens, {rows[0]['pattern']}; medians"
    return Table(title, (*columns, "peak memory") if memory else tuple(columns), tuple(lines))


def product_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of `measure_semi_structured` as a table."""
    lines = []
    for row in rows:
        found = ("–", "–")
        if row["wall_s"]:
            found = (f"{row['wall_s']['median'] * 1e3:.3f} ms", f"{row['this_to_dense']['median']:.3f}")
        lines.append((f"{row['out_features']} × {row['in_features']}", row["weight"], *found))
    return Table("X Wᵀ alone", ("layer", "weight", "time", "this / dense"), tuple(lines))


def _make_layer(name: str, spec: SharedSpec) -> nn.Module:
    if name.startswith("spp-packed"):
        if name == "spp-packed-any":
            spec = SharedSpec(**{**asdict(spec), "pattern": ANY_PATTERN})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            layer = SPPLinear(spec.linear(), spec.rank, SCALING, packed=True)
            nn.init.normal_(layer.spp_beta, 0, BETA)
        return layer.train()
    base = name.removesuffix("-16bit").removesuffix("-torch")
    made = make_layer(base, spec)
    return made.to(spec.dtype) if name.endswith("-16bit") else made
