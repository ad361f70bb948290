"""The plan that options make for a model: which layers are pruned, to what, and on which windows.

`spp.prune` and the pruning of checkpoints begin and end with these steps.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp.configs.checks import name_matches
from spp.configs.pruning import Method, Patterns, PruneOptions, get_method, is_self
from spp.configs.reconstruction import Reconstruction
from spp.data.tokens import find_bos
from spp.distributed.sums import of_first, together
from spp.errors import ConfigError, NonFiniteError, PatternError, SPPWarning, arg
from spp.files.tables import count_text
from spp.layers.host import refuse_parametrization
from spp.masks.patterns import Pattern, all_finite
from spp.models.projection import Projection, find_projections
from spp.models.streamed import trim_memory
from spp.models.targets import resolve_projections
from spp.models.tokens import check_ids, check_length, position_limit, trained_length, warn_length
from spp.pruning.blocks import BlockRunner
from spp.pruning.own_text import own_windows
from spp.pruning.report import BlockReport, LayerReport, PruneReport, ReconstructionReport
from spp.pruning.windows import Calibration, calibration_windows, describe_calibration, load_ids, needs_tokenizer
from spp.weights import FLOATS

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
        bos: whether they were cut from text and begin with a BOS token.
    """

    options: PruneOptions
    method: Method
    layers: dict[str, Projection]
    patterns: dict[str, Pattern]
    windows: Tensor
    bos: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether there are windows to run the model on."""
        return self.options.calibration is not None

    @property
    def batches(self) -> tuple[list[int], int]:
        """The windows of each batch of a reconstruction, and how many batches, the last ones, are held out."""
        return batches_of(self.options.reconstruct or Reconstruction(), self.windows)

    def runner(self, model: nn.Module, root: str, blocks: Sequence[nn.Module]) -> BlockRunner:
        """Return a runner of the blocks on the plan's windows."""
        sizes = None if self.options.reconstruct is None else self.batches[0]
        return BlockRunner(model, root, blocks, self.windows, sizes)

    def report(
        self, done: Mapping[str, LayerReport], started: float, repaired: Mapping[int, BlockReport] | None = None
    ) -> PruneReport:
        """Return the report of what was done since `started`, by time.perf_counter, and log it.

        Args:
            done: to each layer.
            repaired: to each block that was reconstructed.
        """
        seconds = time.perf_counter() - started
        report = PruneReport(
            method=self.options.method,
            pattern=self.options.described,
            layers={path: done[path] for path in self.layers},
            sparsity=share_of(done, "sparsity"),
            windows=self.windows.shape[0],
            seqlen=self.windows.shape[1],
            seed=self.options.seed,
            calibration=describe_calibration(self.options.calibration, self.windows),
            owl=None if self.options.owl is None else asdict(self.options.owl),
            sparsity_before=share_of(done, "sparsity_before"),
            keeps_zeros=self.options.keep_zeros or not self.method.updates,
            seconds=seconds,
            bos=self.bos,
            already_sparser=sum(layer.was_sparser for layer in done.values()),
            reconstruction=None
            if self.options.reconstruct is None
            else reconstruction_report(self.options.reconstruct, self.windows, repaired or {}, seconds, self.bos),
        )
        _log(report)
        return report


def make_plan(
    model: nn.Module, options: PruneOptions, tokenizer: Any = None, author: Callable[[], nn.Module] | None = None
) -> PrunePlan:
    """Return the plan for a model, whose weights need not be in memory.

    Args:
        author: loads the model with its weights, where it is to write its own text; None takes `model`.

    Raises:
        PatternError, TargetError, DataError: the options do not fit the model, or the data not its tokenizer.
    """
    layers = resolve_projections(model, options.target_modules, options.exclude_modules)
    patterns = resolve_patterns(layers, options.pattern)
    common = math.gcd(*(layer.in_features for layer in layers.values()))  # a group that divides it fits every layer
    for path, layer in layers.items():
        patterns[path].require_fit(layer.in_features, path, common=common)
    warn_of_experts(model)
    windows, bos = torch.empty(0, 0, dtype=torch.int64, device="cpu"), False
    if options.calibration is not None:
        windows = draw_windows(
            *(model, options.calibration, tokenizer, options.nsamples, options.seqlen, options.seed, options.bos),
            author=author,
        )
        bos = begins_with_bos(options.calibration, tokenizer, options.bos)
        if options.reconstruct is not None:
            warn_of_one_window(options.reconstruct, windows)
    return PrunePlan(options, get_method(options.method), layers, patterns, windows, bos)


def draw_windows(
    model: nn.Module,
    calibration: Calibration,
    tokenizer: Any,
    nsamples: int,
    seqlen: int,
    seed: int,
    bos: str = "auto",
    *,
    author: Callable[[], nn.Module] | None = None,
) -> Tensor:
    """Return calibration windows (k, L) that the model can read, those of rank 0; otherwise as `calibration_windows`.

    Args:
        author: returns the dense model, which writes them where they are to be its own; None takes `model`.
    """
    with together():
        data = load_ids(calibration)
        length = fitting_seqlen(model, data, seqlen)
        if is_self(calibration):
            if author is not None:
                logger.info("the dense model is loaded whole to write its own text, and freed before it is used")
            writer = model if author is None else author()
            windows = own_windows(writer, tokenizer, count=nsamples, length=length, seed=seed, bos=bos)
            del writer
            trim_memory()
        else:
            windows = calibration_windows(data, tokenizer, nsamples=nsamples, seqlen=length, seed=seed, bos=bos)
            where = f"calibration: {describe_calibration(calibration)}"
            check_ids(model, data if isinstance(data, Tensor) else windows.flatten(), where, tokenizer)
    return of_first(windows)


def begins_with_bos(calibration: Calibration, tokenizer: Any, bos: str) -> bool:
    """Whether calibration windows are cut from text and begin with a BOS token."""
    return needs_tokenizer(calibration) and find_bos(tokenizer, bos) is not None


def batches_of(options: Reconstruction, windows: Tensor) -> tuple[list[int], int]:
    """Return how many windows each batch of a reconstruction has, and how many batches, the last ones, are held out."""
    train, held = options.split(*windows.shape)
    return [*train, *held], len(held)


def warn_of_one_window(options: Reconstruction, windows: Tensor) -> None:
    """Warn where there is nothing to hold out."""
    if options.held_out and len(windows) == 1:
        warnings.warn(
            "reconstruction has one calibration window, so that none is held out: errors are those on the window that "
            f"is trained on; pass more text, or a smaller {arg('seqlen')}",
            SPPWarning,
            stacklevel=4,
        )


def reconstruction_report(
    options: Reconstruction, windows: Tensor, repaired: Mapping[int, BlockReport], seconds: float, bos: bool
) -> ReconstructionReport:
    """Return the report of what was done to each block, by index, and log it."""
    _, held = options.split(*windows.shape)
    blocks = tuple(repaired[index] for index in sorted(repaired))
    report = ReconstructionReport(blocks, len(windows), sum(held), windows.shape[1], asdict(options), seconds, bos)
    regions = [region for block in blocks for region in block.regions]
    if back := sum("rolled back" in region.note for region in regions):
        told = "%d of %s rolled back, to the values of before: training did not lower the error; the report says which"
        logger.warning(told, back, f"{count_text(len(regions), 'region')} {'was' if back == 1 else 'were'}")
    return report


def tell_patterns(pattern: Patterns) -> None:
    """Log what every N:M pattern means, before any work: N is what stays, and some read it as what goes."""
    values = pattern.values() if isinstance(pattern, Mapping) else [pattern]
    for one in dict.fromkeys(map(Pattern.parse, values)):
        if one.kept is None or one.group is None:
            continue
        told = f"{one}: {one.kept} of every {one.group} weights are kept, {100 * one.sparsity:.3g} % are pruned"
        if 2 * one.kept > one.group:
            other = f"{one.group - one.kept}:{one.group}"
            logger.warning("%s; to prune %d of every %d, the pattern is %s", told, one.kept, one.group, other)
        else:
            logger.info(told)


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
    """Raise what speaks against pruning a layer as it is: a computed weight, quantized, not in memory, not finite."""
    refuse_parametrization(layer.module, layer.path)
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
    """Return the tokens of a window; the usual number is lowered to what a model was made for.

    Another number was asked for, and token ids are taken as they are: a model that computes its positions takes them
    with a warning.

    Raises:
        DataError: the model has no positions for so many.
    """
    given = isinstance(calibration, Tensor)
    length = calibration.shape[-1] if isinstance(calibration, Tensor) else seqlen
    limit, trained = position_limit(model), trained_length(model)
    usual = min(limit or length, trained or length)
    if length <= usual:
        return seqlen
    if not given and seqlen == PruneOptions.seqlen:
        logger.info("the model was made for %d positions: windows of %d tokens, not of %d", usual, usual, seqlen)
        return usual
    check_length(model, length, "calibration windows", None if given else "seqlen")
    warn_length(model, length, "the length of a calibration window" if given else arg("seqlen"), stacklevel=5)
    return seqlen


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
