"""The plan that options make for a model: which layers are pruned, to what, and on which windows.

`spp.prune` and the pruning of checkpoints begin and end with these steps.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.checks import name_matches
from spp.configs.pruning import Method, Patterns, PruneOptions, get_method
from spp.errors import ConfigError, DataError, NonFiniteError, PatternError, SPPWarning, arg
from spp.masks.patterns import Pattern, all_finite
from spp.models.projection import Projection, find_projections
from spp.models.targets import resolve_projections
from spp.pruning.report import LayerReport, PruneReport
from spp.pruning.windows import Calibration, calibration_windows, describe_calibration, load_ids
from spp.weights import FLOATS
from spp.wrapping.state import input_embedding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunePlan:
    """The layers of a model, and how each is pruned.

    Args:
        options: what was asked for.
        method: how layers are pruned.
        layers: {path: projection} in module order.
        patterns: the pattern of each.
        windows: token ids (k, L); (0, 0) without calibration.
    """

    options: PruneOptions
    method: Method
    layers: dict[str, Projection]
    patterns: dict[str, Pattern]
    windows: Tensor

    @property
    def calibrated(self) -> bool:
        """Whether there are windows to run the model on."""
        return self.options.calibration is not None

    def report(self, done: Mapping[str, LayerReport], started: float) -> PruneReport:
        """Return the report of what was done to the layers since `started`, by time.perf_counter, and log it."""
        report = PruneReport(
            method=self.options.method,
            pattern=self.options.described,
            layers={path: done[path] for path in self.layers},
            sparsity=share_of(done, "sparsity"),
            windows=self.windows.shape[0],
            seqlen=self.windows.shape[1],
            seed=self.options.seed,
            calibration=describe_calibration(self.options.calibration),
            owl=None if self.options.owl is None else asdict(self.options.owl),
            sparsity_before=share_of(done, "sparsity_before"),
            keeps_zeros=self.options.keep_zeros or not self.method.updates,
            seconds=time.perf_counter() - started,
            already_sparser=sum(layer.was_sparser for layer in done.values()),
        )
        _log(report)
        return report


def make_plan(model: nn.Module, options: PruneOptions, tokenizer: Any = None) -> PrunePlan:
    """Return the plan for a model, whose weights need not be in memory.

    Raises:
        PatternError, TargetError, DataError: the options do not fit the model, or the data not its tokenizer.
    """
    layers = resolve_projections(model, options.target_modules, options.exclude_modules)
    patterns = resolve_patterns(layers, options.pattern)
    common = math.gcd(*(layer.in_features for layer in layers.values()))  # a group that divides it fits every layer
    for path, layer in layers.items():
        patterns[path].require_fit(layer.in_features, path, common=common)
    warn_of_experts(model)
    windows = torch.empty(0, 0, dtype=torch.int64)
    if options.calibration is not None:
        data = load_ids(options.calibration)
        length = fitting_seqlen(model, data, options.seqlen)
        windows = calibration_windows(data, tokenizer, nsamples=options.nsamples, seqlen=length, seed=options.seed)
        check_ids(model, windows)
    return PrunePlan(options, get_method(options.method), layers, patterns, windows)


def resolve_patterns(layers: Mapping[str, Projection], pattern: Patterns) -> dict[str, Pattern]:
    """Return the pattern of each layer.

    Raises:
        PatternError: a pattern makes no sense, a layer matches no name, or a name no layer.
    """
    if not isinstance(pattern, Mapping):
        parsed = Pattern.parse(pattern)
        return dict.fromkeys(layers, parsed)
    parsed_by_name = {name: Pattern.parse(value) for name, value in pattern.items()}
    found: dict[str, str] = {}
    for path in layers:
        name = next((name for name in parsed_by_name if name_matches(path, name)), None)
        if name is None:
            told = arg("pattern", dict(pattern))
            raise PatternError(f'no name in {told} matches {path}; add ".*" for all others')
        found[path] = name
    unused = sorted(set(parsed_by_name) - set(found.values()))
    if unused:
        raise PatternError(f"names in {arg('pattern', ...)} that decide about no target module: {', '.join(unused)}")
    return {path: parsed_by_name[name] for path, name in found.items()}


def check_layer(layer: Projection) -> None:
    """Raise what speaks against pruning a layer as it is: quantized, not in memory, not finite."""
    weight, name = layer.weight, layer.parameter_path
    if weight.dtype not in FLOATS.values():
        raise ConfigError(
            f"{name} is {weight.dtype}: a quantized model cannot be pruned; load it in float32, float16 or bfloat16"
        )
    if weight.device.type == "meta":
        raise ConfigError(f"{name} is not in memory (meta device): load the model without offloading")
    if not all_finite(weight):
        raise NonFiniteError(f"{name} holds NaN or infinity")


def fitting_seqlen(model: nn.Module, calibration: Calibration, seqlen: int) -> int:
    """Return seqlen, or what the model's positions allow; windows that are given must fit as they are."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return seqlen
    if isinstance(calibration, Tensor):
        if calibration.dim() == 2 and calibration.shape[1] > positions:
            raise DataError(f"calibration windows have {calibration.shape[1]} tokens; the model takes {positions}")
        return seqlen
    if seqlen > positions:
        logger.info("seqlen %d is more than the model's %d positions: windows of %d", seqlen, positions, positions)
    return min(seqlen, positions)


def warn_of_experts(model: nn.Module) -> None:
    """Warn of expert weights that are kept in a form that is not known: they are not pruned."""
    known = {id(projection.weight) for projection in find_projections(model)}
    left = [n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n and id(p) not in known]
    if left:
        warnings.warn(
            f"{len(left)} three-dimensional parameters, such as {left[0]}, are not pruned and stay dense: they are "
            f"fused expert weights of no form that is known",
            SPPWarning,
            stacklevel=4,
        )


def check_ids(model: nn.Module, windows: Tensor) -> None:
    """Raise a DataError for token ids that the model's embedding does not have."""
    embedding = input_embedding(model)
    if isinstance(embedding, nn.Embedding):
        low, high = int(windows.min()), int(windows.max())
        if low < 0 or high >= embedding.num_embeddings:
            bad = low if low < 0 else high
            raise DataError(
                f"calibration holds token id {bad}; the model's vocabulary has {embedding.num_embeddings}: was it made "
                f"with another tokenizer?"
            )


def share_of(layers: Mapping[str, LayerReport], field: str) -> float:
    """Return `field`, a share of each layer's weights, as a share of all weights together."""
    sizes = [math.prod(layer.shape) for layer in layers.values()]
    zeros = sum(size * getattr(layer, field) for size, layer in zip(sizes, layers.values(), strict=True))
    return float(zeros / max(1, sum(sizes)))


def _log(report: PruneReport) -> None:
    if report.sparsity_before > 0:
        fate = "stay zeros" if report.keeps_zeros else "were weights like any other and may have been filled"
        logger.info("%.2f %% of the weights were zero before; these %s", 100 * report.sparsity_before, fate)
    if report.already_sparser:
        layers, told = len(report.layers), "%d of %d layers were sparser already than asked for"
        logger.warning(told, report.already_sparser, layers)
    noted: dict[str, list[str]] = {}
    for path, layer in report.layers.items():
        if layer.note:
            noted.setdefault(layer.note, []).append(path)
    for note, paths in noted.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        logger.warning("%s%s: %s", ", ".join(paths[:3]), more, note)
    seen = f" ({report.windows} windows of {report.seqlen} tokens)" if report.windows else ""
    logger.info(
        "%s: %d layers pruned to %.4f sparsity in %.1f s%s",
        *(report.method, len(report.layers), report.sparsity, report.seconds, seen),
    )
