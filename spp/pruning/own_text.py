"""Text that a model writes itself, for users who have none that is like what it was trained on.

Rows of token ids are sampled from the model at temperature 1, every token by its whole distribution: token t of row i
is the first whose cumulated probability exceeds u[i, t], and u is drawn from a generator of its own before the first
forward pass, so that a row does not depend on which rows are computed with it, but for rounding. A row begins

    plain   behind BOS, or, where a text begins without it, behind the end-of-text token, which stands before a text
    chat    with what the chat template writes before a user's words: every other row, where there is a template

and runs on over ends of text, as rows of training text do. The reason for it: calibrated or fitted on text of one kind,
a model gets better at that kind alone (arXiv 2406.15524).

What was written is kept in the user's cache (SPP_CACHE, else $XDG_CACHE_HOME/spp, else ~/.cache/spp), in text/, named
by a hash of the model's values, of the tokenizer and of all options.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spp.data.tokens import find_bos, tokenizer_sha256, tokens_of
from spp.errors import CheckpointError, DataError, NonFiniteError, OutputError, arg
from spp.evaluation import evaluating
from spp.files import CheckpointReader, atomic_file, content_sha256, save_tensors
from spp.files.hashes import weights_fingerprint
from spp.files.places import cache_directory
from spp.files.recognised import OWN
from spp.models.tokens import check_ids

logger = logging.getLogger(__name__)

_FORMAT = 1  # of what is written for the same options
_BATCH = 64  # rows that are sampled together, at most
_CACHE = 1 << 30  # bytes of keys and values, unless the weights take more
_FEW = 16  # tokens, which may be alike by chance where there are fewer
_IDS, _HASH = "input_ids", "sha256"  # tensors of a file in the cache
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>")  # tokens that stand between texts, by name
_WORDS = "zqwordsqz"  # what a user says in the conversation that shows the template's opening


@dataclass(frozen=True)
class Opening:
    """The beginning of a row.

    Args:
        read: token ids that the model reads first.
        kept: how many of them, the last ones, are the row's own.
        again: the token that follows an end-of-text token; None where the model says.
    """

    read: tuple[int, ...]
    kept: int
    again: int | None = None


def own_windows(
    model: nn.Module,
    tokenizer: Any,
    *,
    count: int,
    length: int,
    seed: int,
    bos: str = "auto",
    batch_size: int | None = None,
) -> Tensor:
    """Return rows of token ids that a model writes, from the cache where it wrote them before.

    Args:
        model: dense, its weights in memory.
        tokenizer: its own.
        count: rows, k.
        length: tokens of a row, L.
        seed: of what is drawn.
        bos: whether rows begin with the BOS token, as of `calibration_windows`.
        batch_size: rows that are computed together; None is up to 64, as many as have keys and values of 1 GiB, or of
            the model's size.

    Returns:
        Int64 (k, L).

    Raises:
        DataError: there is no tokenizer, nothing that a text begins with, no room behind it, or the model writes one
            token alone.
        NonFiniteError: its logits are not finite.

    Example:
        >>> own_windows(model, tokenizer, count=128, length=512, seed=0).shape  # doctest: +SKIP
        torch.Size([128, 512])
    """
    if not callable(tokenizer) or not callable(getattr(tokenizer, "get_vocab", None)):
        raise DataError(
            f"text that the model writes itself needs its tokenizer, which says how a text begins: pass "
            f"{arg('tokenizer', ...)}"
        )
    openings = _openings(tokenizer, bos, length)
    check_ids(model, torch.tensor([i for o in openings for i in o.read], device="cpu"), "how a text begins", tokenizer)
    file = _file(model, tokenizer, openings, {"count": count, "length": length, "seed": seed})
    found = None if file is None else _recall(file, count, length)
    known = found is not None
    if found is None:
        found = _write(model, tokenizer, openings, count, length, seed, batch_size or _fitting_batch(model, length))
    told = "was written by the model before" if known else "was written by the model"
    logger.info("text of %d x %d tokens %s (seed %d, sha256 %s)", count, length, told, seed, content_sha256(found)[:16])
    if file is not None and not known:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file, overwrite=True, kind=OWN) as path:
                save_tensors(path, {_IDS: found, _HASH: _digest(found)})
        except (OutputError, OSError) as error:
            logger.info("the text is not kept for the next time: %s", error)
    return found


def _openings(tokenizer: Any, bos: str, length: int) -> list[Opening]:
    """Return how rows begin, in turn."""
    first, end = find_bos(tokenizer, bos), getattr(tokenizer, "eos_token_id", None)
    start = first if first is not None else _start(tokenizer)
    chat = _chat(tokenizer)
    if first is not None and chat and chat[0] != first:
        chat = [first, *chat]
    openings = []
    if start is not None:
        openings.append(Opening((start,), int(first is not None), first if first != end else None))
    if chat and len(chat) <= length // 2:
        openings.append(Opening(tuple(chat), len(chat)))
    elif chat:
        logger.info(
            "the chat template begins with %d tokens, too many for rows of %d: it is left out", len(chat), length
        )
    if not openings:
        raise DataError(
            f"nothing says how a text of {type(tokenizer).__name__} begins: it has no BOS token, no end-of-text token "
            f"and no chat template that fits; set its bos_token"
        )
    if any(length - opening.kept < 1 for opening in openings):
        raise DataError(f"rows of {length} token hold nothing that the model writes; make {arg('seqlen')} longer")
    return openings


def _start(tokenizer: Any) -> int | None:
    """Return the token behind which a text begins that has no BOS token before it."""
    vocabulary = tokenizer.get_vocab()
    named = next((vocabulary[name] for name in _ENDS if name in vocabulary), None)
    found = [named, *(getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))]
    return next((token for token in found if token is not None), None)


def _chat(tokenizer: Any) -> list[int]:
    """Return the tokens that the chat template writes before a user's words; none where there is no such template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": _WORDS}], tokenize=False)
    except Exception as error:  # of the template's own
        logger.info("the chat template takes no plain conversation (%s): it is left out", type(error).__name__)
        return []
    before, found, _ = text.partition(_WORDS)
    return tokens_of(tokenizer, before, special=False).ids if found and before else []


def _fitting_batch(model: nn.Module, length: int) -> int:
    """Return how many rows are computed together so that their keys and values take no more than the weights do."""
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()
    parameters = list(model.parameters())
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    heads = getattr(config, "num_key_value_heads", None) or heads or 0
    row = 2 * length * getattr(config, "num_hidden_layers", 0) * heads * width * parameters[0].element_size()
    room = max(_CACHE, sum(p.numel() * p.element_size() for p in parameters))
    return max(1, min(_BATCH, room // row)) if row else _BATCH


def _write(
    model: nn.Module, tokenizer: Any, openings: list[Opening], count: int, length: int, seed: int, batch_size: int
) -> Tensor:
    """Sample all rows, those that begin alike together."""
    drawn = torch.rand(
        (count, length), generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    rows = torch.empty(count, length, dtype=torch.int64, device="cpu")
    end, words = getattr(tokenizer, "eos_token_id", None), max(tokenizer.get_vocab().values()) + 1
    with evaluating(model), tqdm(total=count * length, desc="the model writes", unit="token", disable=None) as bar:
        for turn, opening in enumerate(openings):
            of_kind = torch.arange(turn, count, len(openings), device="cpu")
            for some in of_kind.split(batch_size):
                rows[some] = _sample(model, opening, drawn[some], end, words, bar)
    tail = rows[:, length // 2 :]
    if tail.numel() >= _FEW and bool((tail == tail[0, 0]).all()):
        token = tokenizer.convert_ids_to_tokens(int(rows[0, -1]))
        raise DataError(
            f"the model writes one token alone, {token!r}, which is no text to calibrate or tune on: is it the dense, "
            f"trained model?"
        )
    return rows


@torch.no_grad()
def _sample(model: nn.Module, opening: Opening, drawn: Tensor, end: int | None, words: int, bar: Any) -> Tensor:
    """Return rows (B, L) that begin with an opening, sampled by numbers drawn from [0, 1), (B, L).

    Args:
        end: the end-of-text token.
        words: tokens that the tokenizer has; an embedding may have more rows, which are no text.
    """
    device = next(model.parameters()).device
    count, length = drawn.shape
    rows = torch.empty(count, length, dtype=torch.int64, device="cpu")
    read = torch.tensor(opening.read, device=device).expand(count, -1)
    rows[:, : opening.kept] = read[:, len(opening.read) - opening.kept :].cpu()
    bar.update(count * opening.kept)
    whole, cache = read, None
    for at in range(opening.kept, length):
        out = model(input_ids=whole if cache is None else read, past_key_values=cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)  # None: the model keeps no such cache, and reads all again
        mass = out.logits[:, -1, :words].float().softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, tokens)
        total = mass[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError(
                f"the model's logits are not finite at token {at} of what it writes: check its weights, or load it in "
                f"a wider dtype"
            )
        sought = drawn[:, at : at + 1].to(device) * total
        read = torch.searchsorted(mass, sought, right=True).clamp_(max=mass.shape[1] - 1)  # (B, 1)
        if opening.again is not None and end is not None:
            read = torch.where(whole[:, -1:] == end, opening.again, read)
        whole = torch.cat([whole, read], 1)
        bar.update(count)
    rows[:, opening.kept :] = whole[:, len(opening.read) :].cpu()
    return rows


# ---- What was written before.


def _file(model: nn.Module, tokenizer: Any, openings: list[Opening], options: dict[str, Any]) -> Any:
    """Return the file in the cache for a model's text; None where the model or the tokenizer cannot be told."""
    values, words = weights_fingerprint(model), tokenizer_sha256(tokenizer)
    if values is None or words is None:
        return None
    begin = [[list(opening.read), opening.kept, opening.again] for opening in openings]
    facts = {"format": _FORMAT, "model": values, "tokenizer": words, "openings": begin, **options}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "text" / f"{name[:32]}.safetensors"


def _recall(file: Any, count: int, length: int) -> Tensor | None:
    """Return the ids that a file of the cache holds; None where it is not there, or is damaged."""
    if not file.exists():
        return None
    try:
        with CheckpointReader(file.parent, file=file.name) as reader:
            ids = reader.load(_IDS)
            whole = ids.shape == (count, length) and torch.equal(reader.load(_HASH), _digest(ids))
    except CheckpointError:
        whole = False
    if not whole:
        logger.warning("%s is damaged, and the text is written anew", file)
    return ids if whole else None


def _digest(ids: Tensor) -> Tensor:
    return torch.tensor(list(bytes.fromhex(content_sha256(ids))), dtype=torch.uint8, device="cpu")
