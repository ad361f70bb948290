"""Perplexity of a language model on a text.

The whole text is tokenised once and cut into non-overlapping windows of `window` tokens; each window predicts its
`window − 1` last tokens from those before them, and

    perplexity = exp( Σ −log p(token) / number of predicted tokens )

over all windows. A last window that is shorter is dropped, as the field does. Where the tokenizer begins a text with a
BOS token there are two protocols:

    per-window   each window begins with BOS, which counts as one of its tokens: it holds window − 1 tokens of the text,
                 and the model reads every window as it was trained to
    paper        the pruning papers' own: BOS stands at the start of the text, so that the first window alone has it

Without such a token they are the same. Perplexities are comparable only at the same window, tokenizer, text, BOS and
protocol: a result says all of them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from spp.configs.checks import PROTOCOLS, check_choice
from spp.configs.evaluating import check_windows
from spp.data.tokens import IGNORED, added_bos, cut_windows, find_bos, tokenizer_sha256, tokens_of, without_bos
from spp.errors import DataError, NonFiniteError, arg
from spp.files.hashes import dtype_name, weights_fingerprint
from spp.files.provenance import Provenance
from spp.files.tables import fields_table
from spp.models.targets import require_model
from spp.models.tokens import check_ids, check_length, warn_length
from spp.supported import require_supported

require_supported()

logger = logging.getLogger(__name__)

_LOSS_ELEMENTS = 1 << 24  # logits turned to float32 at a time: 64 MiB


@dataclass(frozen=True)
class PerplexityResult:
    """The result of a perplexity measurement.

    Args:
        perplexity: exp(loss).
        loss: mean negative log-likelihood of the predicted tokens, in nats.
        tokens: number of predicted tokens.
        windows: number of windows, or of rows.
        window: tokens of one window; None where rows of their own length were measured.
        bos: whether windows, or by the papers' protocol the text, began with a BOS token.
        protocol: "per-window" or "paper"; None for rows.
        text_bytes: size of the text in UTF-8; None where it is not known.
        provenance: dtype, versions, seconds, and the hashes text_sha256, tokenizer_sha256 and model_fingerprint, as far
            as they are known.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    window: int | None
    bos: bool = False
    protocol: str | None = None
    text_bytes: int | None = None
    provenance: Provenance = field(default_factory=Provenance, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, the provenance under its own keys; what is not known is left out."""
        values = {name: value for name, value in asdict(self).items() if name != "provenance"}
        known = {k: v for k, v in values.items() if v is not None or k not in ("protocol", "text_bytes")}
        return known | self.provenance.to_dict()

    def _repr_html_(self) -> str:
        """Return a table of the fields, for notebooks."""
        return fields_table("perplexity", self.to_dict()).html()


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int = 1024,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = False,
    bos: str = "auto",
    protocol: str = "per-window",
) -> float:
    """Return the perplexity of `model` on `text`.

    Args:
        model, tokenizer, text, window, batch_size, max_windows, progress, bos, protocol: as for `perplexity_result`,
            also the errors.

    Example:
        >>> perplexity(model, tokenizer, open("valid.txt").read(), window=1024)  # doctest: +SKIP
        20.6
    """
    options: dict[str, Any] = {"window": window, "batch_size": batch_size, "max_windows": max_windows}
    found = _measured(model, tokenizer, text, bos, protocol=protocol, progress=progress, **options)
    return found.perplexity


def perplexity_result(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int = 1024,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = False,
    bos: str = "auto",
    protocol: str = "per-window",
) -> PerplexityResult:
    """Measure the perplexity of `model` on `text`.

    Args:
        model: a causal language model; its train / eval mode is as before afterwards.
        tokenizer: the model's own.
        text: the text, not a path.
        window: tokens of one window, at least 2.
        batch_size: windows of one forward pass.
        max_windows: measure the first windows only; None for all.
        progress: show a progress bar if standard error is a terminal.
        bos: whether a BOS token begins each window: "auto" does as the tokenizer does with a fresh text, "always",
            "never".
        protocol: "per-window", or "paper": BOS at the start of the text alone.

    Returns:
        The perplexity, and what it was measured on.

    Raises:
        ConfigError: an option makes no sense; there is no BOS token for "always".
        DataError: the text has fewer tokens than one window, or the tokenizer is another model's.
        NonFiniteError: a loss is NaN or infinite.

    Example:
        >>> perplexity_result(model, tokenizer, text, window=1024).windows  # doctest: +SKIP
        312
    """
    options: dict[str, Any] = {"window": window, "batch_size": batch_size, "max_windows": max_windows}
    found = _measured(model, tokenizer, text, bos, protocol=protocol, progress=progress, **options)
    data = text.encode()
    return with_provenance(found, model, tokenizer, hashlib.sha256(data).hexdigest(), len(data))


def _measured(model: nn.Module, tokenizer: Any, text: str, bos: str, **options: Any) -> PerplexityResult:
    first, tokens = find_bos(tokenizer, bos), tokenize(tokenizer, text)
    tokens = torch.tensor(without_bos(tokens.tolist(), added_bos(tokenizer)), dtype=torch.long, device="cpu")
    check_ids(model, tokens, "the text", tokenizer)
    return token_perplexity(model, tokens, bos_id=first, **options)


def with_provenance(
    found: PerplexityResult, model: nn.Module, tokenizer: Any, text_sha256: str, text_bytes: int | None = None
) -> PerplexityResult:
    """Return a result that says what it was measured on.

    Args:
        found: the result.
        model, tokenizer: what was measured.
        text_sha256: hash of the text; where there is none, of the tokens.
        text_bytes: size of the text in UTF-8.

    Returns:
        The result with the hashes of the text, the tokenizer and the model's values.

    Example:
        >>> with_provenance(found, model, tokenizer, "ab12").to_dict()["text_sha256"]  # doctest: +SKIP
        'ab12'
    """
    hashes = {
        "text_sha256": text_sha256,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "model_fingerprint": weights_fingerprint(model),
    }
    here = Provenance.here()
    known = {name: value for name, value in hashes.items() if value is not None}
    provenance = replace(found.provenance, versions=here.versions, hashes=known)
    return replace(found, text_bytes=text_bytes, provenance=provenance)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Return the token ids of a text of any length, without the tokenizer's warning about its model's length.

    Args:
        tokenizer: adds the special tokens that it always adds.
        text: the text, not a path.

    Returns:
        Int64 (T,).

    Raises:
        DataError: the text is no str.

    Example:
        >>> tokens = tokenize(tokenizer, "A text.")  # doctest: +SKIP
    """
    if not isinstance(text, str):
        raise DataError(f"the text is a {type(text).__name__}; it must be a str (read the file first)")
    return torch.tensor(tokens_of(tokenizer, text).ids, dtype=torch.long, device="cpu")


def token_perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int = 1024,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = False,
    bos_id: int | None = None,
    protocol: str = "per-window",
) -> PerplexityResult:
    """Measure the perplexity on a text that is tokenised already.

    Args:
        model, window, batch_size, max_windows, progress, protocol: as for `perplexity_result`.
        tokens: token ids (T,).
        bos_id: token that windows begin with, as one of their tokens; where one has it there already, it is not
            doubled. None adds none.

    Returns:
        The perplexity, and what it was measured on.

    Raises:
        ConfigError, DataError, NonFiniteError: as `perplexity_result`.

    Example:
        >>> token_perplexity(model, tokenize(tokenizer, text), window=1024).perplexity  # doctest: +SKIP
        20.6
    """
    require_model(model)
    check_windows(window, batch_size, max_windows)
    windows = protocol_windows(tokens, window, bos_id, protocol)[:max_windows]  # (k, window)
    if not len(windows):
        beside = "" if bos_id is None else " and BOS"
        raise DataError(
            f"the text has {len(tokens)} tokens{beside}, fewer than one window of {window}: "
            "use a longer text or a shorter window"
        )
    check_ids(model, tokens, "the text")
    check_length(model, window, "windows", "window")
    warn_length(model, window, arg("window"), stacklevel=4)
    started = time.perf_counter()
    batches = ({"input_ids": rows, "labels": rows} for rows in windows.split(batch_size))
    loss, count = mean_loss(model, batches, total=math.ceil(len(windows) / batch_size), progress=progress)
    provenance = Provenance(dtype=_dtype_of(model), seconds=time.perf_counter() - started)
    bos = bos_id is not None
    return PerplexityResult(
        _exp(loss), loss, count, len(windows), window, bos=bos, protocol=protocol, provenance=provenance
    )


def protocol_windows(tokens: Tensor, window: int, bos_id: int | None, protocol: str) -> Tensor:
    """Cut tokens into the windows of a protocol.

    Args:
        tokens: int64 (T,).
        window: W, tokens of a window.
        bos_id: the BOS token; None for none.
        protocol: "per-window" or "paper".

    Returns:
        Int64 (k, W).

    Raises:
        ConfigError: there is no such protocol.

    Example:
        >>> protocol_windows(torch.tensor([5, 6, 7, 8, 9]), 3, 1, "paper").tolist()
        [[1, 5, 6], [7, 8, 9]]
        >>> protocol_windows(torch.tensor([5, 6, 7, 8, 9]), 3, 1, "per-window").tolist()
        [[1, 5, 6], [1, 7, 8]]
    """
    check_choice("protocol", protocol, PROTOCOLS)
    if protocol == "paper" and bos_id is not None:
        if tokens[:1].tolist() != [bos_id]:
            tokens = torch.cat([tokens.new_tensor([bos_id]), tokens])
        return cut_windows(tokens, window, None)
    return cut_windows(tokens, window, bos_id)


def _dtype_of(model: nn.Module) -> str | None:
    own = getattr(model, "dtype", None) or next((p.dtype for p in model.parameters()), None)
    return None if own is None else dtype_name(own)


def rows_perplexity(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, total: int | None = None, progress: bool = False
) -> PerplexityResult:
    """Measure the perplexity of the labelled tokens of instruction rows: exp of the mean loss over all of them.

    Args:
        model: a causal language model.
        batches: "input_ids", "labels" (−100: not predicted) and, for padded rows, "attention_mask", each (B, T).
        total: number of batches, for the progress bar.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The perplexity; its `window` is None.

    Raises:
        DataError, NonFiniteError: as `mean_loss`.

    Example:
        >>> rows_perplexity(model, loader).tokens  # doctest: +SKIP
        5120
    """
    rows = 0

    def counted() -> Iterator[Mapping[str, Tensor]]:
        nonlocal rows
        for batch in batches:
            rows += len(batch["input_ids"])
            yield batch

    loss, count = mean_loss(model, counted(), total=total, progress=progress)
    return PerplexityResult(_exp(loss), loss, count, rows, None)


def mean_loss(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, total: int | None = None, progress: bool = False
) -> tuple[float, int]:
    """Measure the loss; only one batch's logits exist at a time.

    Args:
        model, batches, total, progress: as for `rows_perplexity`.

    Returns:
        (mean loss in nats, number of predicted tokens) over all batches.

    Raises:
        DataError: nothing is predicted, or a token id is beyond the model's vocabulary.
        NonFiniteError: a loss is NaN or infinite; the message names the batch.

    Example:
        >>> mean_loss(model, [{"input_ids": ids, "labels": ids}])  # doctest: +SKIP
        (3.0, 511)
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else next(model.parameters()).device
    loss_sum, count = 0.0, 0
    bar = tqdm(batches, total=total, desc="perplexity", disable=not (progress and sys.stderr.isatty()), leave=False)
    with evaluating(model), bar:
        for number, batch in enumerate(bar):
            check_ids(model, batch["input_ids"], f"batch {number}")
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            logits = model(**inputs, use_cache=False).logits  # (B, T, V)
            part, predicted = _sum_loss(logits, batch["labels"].to(logits.device))
            if not math.isfinite(part):
                raise NonFiniteError(
                    f"the loss of batch {number} is {part}: the model's weights or activations are not finite "
                    "(half precision may overflow: try bfloat16 or float32)"
                )
            loss_sum, count = loss_sum + part, count + predicted
    if count == 0:
        raise DataError("there is no token to predict: every label is masked, or every row has one token")
    return loss_sum / count, count


def _sum_loss(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the summed loss and the number of predicted tokens, with logits (B, T, V) turned to float32 in chunks."""
    logits = logits[:, :-1].flatten(0, 1)  # (B (T - 1), V)
    labels = labels[:, 1:].flatten()  # (B (T - 1),)
    kept = labels != IGNORED
    rows = max(1, _LOSS_ELEMENTS // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for some, wanted in zip(logits.split(rows), labels.split(rows), strict=True):
        # Sums of float32 losses in float64: a long text has 10⁵ of them.
        losses = functional.cross_entropy(some.float(), wanted, ignore_index=IGNORED, reduction="none")
        total += losses.sum(dtype=torch.float64).cpu()
    return float(total), int(kept.sum())


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf  # beyond, math.exp raises


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode, without gradients, and each back to its own mode afterwards: a context manager.

    Args:
        model: any module.

    Yields:
        Nothing.

    Example:
        >>> with evaluating(model):  # doctest: +SKIP
        ...     logits = model(ids).logits
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
