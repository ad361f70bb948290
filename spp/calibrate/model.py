"""`spp.prune`: a model in memory, pruned in place.

With calibration the model goes through block by block: a block's inputs are known, it runs once to collect the
statistics of what its layers read, its layers are pruned, and it runs again to give the next block the inputs that a
pruned model has (SparseGPT and Wanda, their published procedure). Only one block's statistics and the current hidden
states exist at a time.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spp.calibrate.blocks import BlockRunner, evaluating, find_blocks
from spp.calibrate.collect import gather_inputs
from spp.calibrate.methods import METHODS, Method, get_method, prune_layer
from spp.calibrate.report import LayerReport, PruneReport
from spp.calibrate.windows import Calibration, calibration_windows
from spp.config import name_matches
from spp.errors import ConfigError, DataError, NonFiniteError, PatternError, SPPWarning, WrapError
from spp.inject import is_wrapped
from spp.patterns import Pattern, all_finite
from spp.pruning.owl import OWL, outlier_share, owl_fractions
from spp.pruning.wanda import wanda_score
from spp.targets import is_projection_key, resolve_targets

logger = logging.getLogger(__name__)

Patterns = str | float | Pattern | Mapping[str, str | float | Pattern]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def prune(
    model: nn.Module,
    method: str = "wanda",
    pattern: Patterns = "2:4",
    calibration: Calibration | None = None,
    *,
    target_modules: str | list[str] | tuple[str, ...] | None = None,
    exclude_modules: str | list[str] | tuple[str, ...] | None = None,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    owl: OWL | None = None,
) -> PruneReport:
    """Prune a model's projections in place.

    Zeros that are there before stay zeros, whatever the method but SparseGPT: it updates every weight that it keeps. A
    zero scores lowest and is pruned first, so pruning twice to one pattern by one method adds nothing.

    Args:
        model: not wrapped, not quantized; its weights must be in memory.
        method: "magnitude", "wanda", "sparsegpt", "dsnot" (Wanda's mask refined), or "magnitude+dsnot",
            "sparsegpt+dsnot" (their masks refined, on the weights as they were).
        pattern: "N:M" (N kept of every M inputs), the fraction pruned, or {name suffix or regular expression: pattern},
            of which the first that matches a module path counts.
        calibration: token ids (k, L), a list of texts, or the path of a text or JSONL ({"text": …}) file. "magnitude"
            needs none, and with some reports its output errors.
        target_modules: as for `spp.wrap`.
        exclude_modules: as for `spp.wrap`.
        tokenizer: the model's, where calibration is text.
        nsamples: calibration windows at most.
        seqlen: tokens of a window that is cut from text.
        seed: of the draw of windows.
        owl: with `OWL()` a block's sparsity follows the outliers of the dense model's block around the fraction that
            `pattern` is, at the price of one more forward pass; needs calibration, whatever the method.

    Returns:
        What was done to each layer.

    Raises:
        ConfigError, PatternError, TargetError, DataError, WrapError, NonFiniteError: found before anything is changed,
            except for activations that are not finite: the message says how far pruning went.

    Example:
        >>> report = prune(model, "wanda", "2:4", "corpus.txt", tokenizer=tokenizer)  # doctest: +SKIP
        >>> report.sparsity  # doctest: +SKIP
        0.5
    """
    started = time.perf_counter()
    chosen = get_method(method)
    if is_wrapped(model):
        raise WrapError("the model is wrapped: spp.merge(model) or spp.unwrap(model) first, then prune")
    if owl is not None and (isinstance(pattern, Mapping) or Pattern.parse(pattern).is_nm):
        raise ConfigError(f"owl= gives blocks different fractions, so pattern must be one fraction; it is {pattern!r}")
    if (chosen.calibrated or owl is not None) and calibration is None:
        who = f"method {method!r}" if chosen.calibrated else "owl="
        raise ConfigError(
            f"{who} needs calibration data: pass calibration= token ids (k, L), a list of texts, or the path of a text "
            f'or JSONL file (with tokenizer=; spp prune: --calibration FILE); method="magnitude" alone needs none'
        )
    layers = dict(resolve_targets(model, target_modules, exclude_modules))
    patterns = resolve_patterns(layers, pattern)
    for path, layer in layers.items():
        check_layer(path, layer, patterns[path], common_inputs(layers))
    warn_of_experts(model)
    windows = torch.empty(0, 0, dtype=torch.int64)
    if calibration is not None:
        windows = calibration_windows(
            calibration, tokenizer, nsamples=nsamples, seqlen=fitting_seqlen(model, calibration, seqlen), seed=seed
        )
        check_ids(model, windows)
        root, blocks = find_blocks(model, list(layers))
        of_block = [
            {path: layer for path, layer in layers.items() if path == start or path.startswith(start + ".")}
            for start in (f"{root}.{i}" if root else str(i) for i in range(len(blocks)))
        ]
        with evaluating(model):
            if owl is not None:
                fraction = Pattern.parse(pattern).sparsity  # type: ignore[arg-type]
                patterns = _owl_patterns(BlockRunner(model, root, blocks, windows), of_block, owl, fraction, windows)
            done = _prune_blocks(BlockRunner(model, root, blocks, windows), of_block, chosen, patterns, windows)
    else:
        bar = tqdm(layers.items(), desc=f"pruning ({method})", unit="layer", disable=None)
        done = {path: prune_layer(path, layer, None, chosen, patterns[path]) for path, layer in bar}
    report = PruneReport(
        method=method,
        pattern=describe(pattern),
        layers={path: done[path] for path in layers},
        sparsity=share_of(done, "sparsity"),
        windows=windows.shape[0],
        seqlen=windows.shape[1],
        seed=seed,
        seconds=time.perf_counter() - started,
    )
    _log(report, chosen)
    return report


def resolve_patterns(layers: Mapping[str, nn.Module], pattern: Patterns) -> dict[str, Pattern]:
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
            raise PatternError(f'no name in pattern={dict(pattern)} matches {path}; add ".*" for all others')
        found[path] = name
    unused = sorted(set(parsed_by_name) - set(found.values()))
    if unused:
        raise PatternError(f"names in pattern= that decide about no target module: {', '.join(unused)}")
    return {path: parsed_by_name[name] for path, name in found.items()}


def _prune_blocks(
    runner: BlockRunner,
    of_block: Sequence[Mapping[str, nn.Module]],
    method: Method,
    patterns: Mapping[str, Pattern],
    windows: Tensor,
) -> dict[str, LayerReport]:
    """Prune block by block; `of_block` holds each block's target layers by path."""
    last = max(i for i, inside in enumerate(of_block) if inside)
    done: dict[str, LayerReport] = {}
    bar = tqdm(range(last + 1), desc=f"pruning ({method.name})", unit="block", disable=None)
    for index in bar:
        if of_block[index]:
            inputs = gather_inputs(runner, index, of_block[index], method, windows)
            for path, layer in of_block[index].items():
                done[path] = prune_layer(path, layer, inputs.pop(path), method, patterns[path])
            error = max((done[path].relative_error or 0.0) for path in of_block[index])
            bar.set_postfix(error=f"{error:.3f}", refresh=False)
        if index < last:
            runner.propagate(index)
    return done


def _owl_patterns(
    runner: BlockRunner, of_block: Sequence[Mapping[str, nn.Module]], owl: OWL, fraction: float, windows: Tensor
) -> dict[str, Pattern]:
    """Return each layer's pattern from the outliers of its block in the dense model."""
    held = [index for index, inside in enumerate(of_block) if inside]
    outliers = []
    for index in tqdm(range(held[-1] + 1), desc="counting outliers", unit="block", disable=None):
        if of_block[index]:
            inputs = gather_inputs(runner, index, of_block[index], METHODS["wanda"], windows, keep=True)
            scores = [
                wanda_score(layer.get_parameter("weight"), inputs[path].collector.stats().norm)
                for path, layer in of_block[index].items()
                if inputs[path].collector.count
            ]
            outliers.append(outlier_share(scores, owl.threshold))
        else:
            runner.propagate(index)
    fractions = owl_fractions(outliers, fraction, owl.spread)
    return {
        path: Pattern(fraction=round(block_fraction, 6))
        for index, block_fraction in zip(held, fractions, strict=True)
        for path in of_block[index]
    }


def common_inputs(layers: Mapping[str, nn.Module]) -> int:
    """Return the greatest common divisor of the input dimensions: a group that divides it fits every layer."""
    return math.gcd(*(int(layer.get_parameter("weight").shape[1]) for layer in layers.values()))


def check_layer(path: str, layer: nn.Module, pattern: Pattern, common: int | None = None) -> None:
    """Raise what speaks against pruning a layer: quantized, not in memory, does not fit the pattern, not finite."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in _DTYPES:
        raise ConfigError(
            f"{path}.weight is {weight.dtype}: a quantized model cannot be pruned; load it in float32, float16 or "
            f"bfloat16"
        )
    if weight.device.type == "meta":
        raise ConfigError(f"{path}.weight is not in memory (meta device): load the model without offloading")
    pattern.require_fit(weight.shape[1], path, common=common)
    if not all_finite(weight):
        raise NonFiniteError(f"{path}.weight holds NaN or infinity; nothing was pruned")


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
    """Warn of expert weights that are kept as one 3-D parameter: they are not pruned."""
    left = [name for name, p in model.named_parameters() if p.dim() == 3 and is_projection_key(name, 3)]
    if left:
        warnings.warn(
            f"{len(left)} three-dimensional parameters, such as {left[0]}, are not pruned and stay dense: only linear "
            f"modules are",
            SPPWarning,
            stacklevel=3,
        )


def check_ids(model: nn.Module, windows: Tensor) -> None:
    """Raise a DataError for token ids that the model's embedding does not have."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if isinstance(embedding, nn.Embedding):
        low, high = int(windows.min()), int(windows.max())
        if low < 0 or high >= embedding.num_embeddings:
            bad = low if low < 0 else high
            raise DataError(
                f"calibration holds token id {bad}; the model's vocabulary has {embedding.num_embeddings}: was it made "
                f"with another tokenizer?"
            )


def describe(pattern: Patterns) -> str | dict[str, str]:
    """Return what a report says of the pattern that was asked for."""
    if isinstance(pattern, Mapping):
        return {name: str(Pattern.parse(value)) for name, value in pattern.items()}
    return str(Pattern.parse(pattern))


def share_of(layers: Mapping[str, LayerReport], field: str) -> float:
    """Return `field`, a share of each layer's weights, as a share of all weights together."""
    sizes = [layer.shape[0] * layer.shape[1] for layer in layers.values()]
    zeros = sum(size * getattr(layer, field) for size, layer in zip(sizes, layers.values(), strict=True))
    return float(zeros / max(1, sum(sizes)))


def _log(report: PruneReport, method: Method) -> None:
    before = share_of(report.layers, "sparsity_before")
    if before > 0:
        fate = "were weights like any other and may have been filled" if method.updates else "stay zeros"
        logger.info("%.2f %% of the weights were zero before; these %s", 100 * before, fate)
    for path, layer in report.layers.items():
        if layer.note:
            logger.warning("%s: %s", path, layer.note)
    logger.info(
        "%s: %d layers pruned to %.4f sparsity in %.1f s (%d windows of %d tokens)",
        *(report.method, len(report.layers), report.sparsity, report.seconds, report.windows, report.seqlen),
    )
