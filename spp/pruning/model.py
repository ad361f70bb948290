"""`spp.prune`: a model in memory, pruned in place; with calibration block by block (spp.pruning.loop)."""

from __future__ import annotations

import time
from typing import Any

from torch import nn
from tqdm import tqdm

from spp.certifying.save import note_origin
from spp.configs.pruning import OWL, Names, Patterns, PruneOptions
from spp.configs.reconstruction import Reconstruction
from spp.distributed.sums import shared_as, together
from spp.errors import NonFiniteError, WrapError
from spp.evaluation import evaluating
from spp.packing.model import packed_layers
from spp.pruning.blocks import find_blocks
from spp.pruning.layer import prune_layer
from spp.pruning.loop import BlockStore, layers_by_block, prune_blocks
from spp.pruning.plan import check_layer, make_plan, tell_patterns
from spp.pruning.report import PruneReport
from spp.pruning.windows import Calibration, check_calibration
from spp.wrapping.state import parts_uncompiled
from spp.wrapping.wrap import is_wrapped


def prune(
    model: nn.Module,
    method: str = "wanda",
    pattern: Patterns = "2:4",
    calibration: Calibration | None = None,
    *,
    target_modules: Names = None,
    exclude_modules: Names = None,
    tokenizer: Any = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    owl: OWL | None = None,
    keep_zeros: bool = True,
    reconstruct: Reconstruction | None = None,
    bos: str = "auto",
) -> PruneReport:
    """Prune a model's projections in place: linears, GPT-2's Conv1D and fused experts, N:M along their inputs.

    Each expert of a fused weight (E, m, n) is a matrix of its own, judged by the tokens that are routed to it; one that
    gets none falls back to magnitude, and the report says so.

    Zeros that are there before stay zeros, whatever the method, and are the first that count as pruned: a group of N:M
    keeps at most N, a fraction is the share pruned with them, and patterns that nest (2:4 in 2:8) lose nothing. Where
    there are more of them than the pattern asks for, nothing else is pruned, and the report counts the layers that are
    sparser than asked for.

    Inside a process group (torch.distributed) every rank calls it with the same model and options: each runs its share
    of the windows, statistics are summed, and all end with the same weights.

    Args:
        model: not wrapped, not quantized; its weights must be in memory.
        method: "magnitude", "wanda", "sparsegpt", "dsnot" (Wanda's mask refined), or "magnitude+dsnot",
            "sparsegpt+dsnot" (their masks refined, on the weights as they were).
        pattern: "N:M" (N kept of every M inputs), the fraction pruned, or {name suffix or regular expression: pattern},
            of which the first that matches a module path counts.
        calibration: token ids (k, L), a list of texts, the path of a text or JSONL ({"text": …}) file, or "self": text
            that the model writes before it is pruned (spp.pruning.own_text). "magnitude" needs none, and with some
            reports its output errors.
        target_modules, exclude_modules: as for `spp.wrap`.
        tokenizer: the model's, where calibration is text.
        nsamples: calibration windows at most.
        seqlen: tokens of a window that is cut from text.
        seed: of the draw of windows.
        owl: with `OWL()` a block's sparsity follows the outliers of the dense model's block around the fraction that
            `pattern` is, at the price of one more forward pass; needs calibration, whatever the method.
        keep_zeros: False takes zeros as weights like any other: SparseGPT, which updates what it keeps, fills them.
        reconstruct: with `Reconstruction()` the kept weights, norms and biases of a pruned block are trained until it
            gives the dense block's outputs again, before the next block is pruned; needs calibration.
        bos: whether windows cut from text begin with a BOS token, as one of their tokens: "auto" does as the tokenizer
            does with a fresh text, "always", "never".

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
    options = PruneOptions(
        method,
        pattern,
        calibration,
        target_modules,
        exclude_modules,
        nsamples,
        seqlen,
        seed,
        owl,
        keep_zeros,
        reconstruct,
        bos,
    )
    if calibration is not None:
        check_calibration(calibration)
    tell_patterns(pattern)
    return prune_by(model, options, tokenizer)


@together()
def prune_by(model: nn.Module, options: PruneOptions, tokenizer: Any = None) -> PruneReport:
    """Prune as `prune`, by options that are checked and told."""
    started = time.perf_counter()
    if is_wrapped(model):
        raise WrapError("the model is wrapped: spp.merge(model) or spp.unwrap(model) first, then prune")
    if packed_layers(model):
        raise WrapError("the model is packed: spp.unpack(model) first, then prune")
    plan = make_plan(model, options, tokenizer)
    for layer in plan.layers.values():
        check_layer(layer)
    note_origin(model, model)
    if not plan.calibrated:
        keep = options.keep_zeros
        bar = tqdm(plan.layers.items(), desc=f"pruning ({options.method})", unit="layer", disable=None)
        done = {path: prune_layer(layer, None, plan.method, plan.patterns[path], keep) for path, layer in bar}
        return plan.report(done, started)
    with evaluating(model), parts_uncompiled(model):
        root, blocks = find_blocks(model, list(plan.layers))
        of_block = layers_by_block(plan.layers, root, len(blocks))
        try:
            done, repaired = prune_blocks(plan, of_block, lambda: plan.runner(model, root, blocks), BlockStore())
        except NonFiniteError as error:
            told = NonFiniteError(f"{error.marked} (blocks before it are pruned already: load the model anew)")
            raise shared_as(told, error) from error
    return plan.report(done, started, repaired)
