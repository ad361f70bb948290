"""The cache of a teacher: of every token to learn, its highest log-probabilities and the logarithm of the rest as one.

teacher_cache.json          format, versions, counts, and hashes: of each tensor, the tokenizer and the teacher
teacher_cache.safetensors   rows (R, 32) uint8, the sha256 of each row's tokens and labels, in the order of the data
                            starts (R + 1,) int64: tokens starts[i] to starts[i + 1] are those of row i
                            ids (N, k) int32, log_probs (N, k) float32, rest (N,) float32

The teacher runs once, a few rows at a time, and what it says is written at once: no more than a chunk of logits is ever
held. A reader maps the file. Rows are found by their hash, so that their order does not matter; a cache may have more
rows than a run learns from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from spp._version import __version__
from spp.data.tokens import tokenizer_sha256
from spp.errors import CheckpointError, ConfigError, DataError, NonFiniteError, arg
from spp.evaluation import IGNORED, evaluating
from spp.files import CheckpointReader, atomic_directory, read_json, write_json
from spp.files.hashes import tensor_bytes, weights_fingerprint
from spp.files.provenance import Provenance
from spp.files.recognised import CACHE_HEAD
from spp.files.writer import TensorFile
from spp.masks.patterns import as_array
from spp.training.causal_loss import captured_states, check_form, form_of, output_head
from spp.training.data import TokenBlocks, TokenRows, TrainingData, batches, check_data, tokens_sha256
from spp.training.distillation import top_of

FORMAT = "spp-teacher-cache-1"
FILE = "teacher_cache.safetensors"
CHUNK = 128  # tokens whose logits exist at once
_SAID = ("ids", "log_probs", "rest")  # tensors of what the teacher says of each token


@dataclass(frozen=True)
class CacheReport:
    """The counts of a cache that `write_cache` wrote.

    Args:
        rows, tokens: counted.
        top_k: probabilities of a token that are kept.
        rest: the mean share of the probability that is outside of them.
        bytes: of the tensors on the disk.
        data: what became of the training data.
    """

    rows: int
    tokens: int
    top_k: int
    rest: float
    bytes: int
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


def write_cache(
    model: nn.Module,
    tokenizer: Any,
    data: TrainingData,
    path: str | os.PathLike[str],
    *,
    top_k: int = 64,
    batch_size: int = 4,
    overwrite: bool = False,
    progress: bool = False,
) -> CacheReport:
    """Run a teacher on training data and write what it says; the directory appears whole or not at all.

    Args:
        model: the teacher, a causal language model.
        tokenizer: its tokenizer, which made the data.
        data: the rows, all of them to train on.
        path: the directory to make.
        top_k: probabilities of a token that are kept; less than the vocabulary.
        batch_size: rows of a forward pass.
        overwrite: replace an earlier cache.
        progress: show a progress bar if standard error is a terminal.

    Raises:
        ConfigError: `top_k` is not less than the vocabulary.
        DataError: the model cannot read the data.
        NonFiniteError: its logits are not finite.
        OutputError: the directory exists, or cannot be written.
    """
    check_data(model, data.train, data.collate, "the training data", "block_length", tokenizer)
    pairs = [(row["input_ids"], row["labels"]) for row in (data.train[i] for i in range(len(data.train)))]
    counts = torch.tensor([int((labels[1:] != IGNORED).sum()) for _, labels in pairs], device="cpu")
    starts = F.pad(counts.cumsum(0), (1, 0))
    keys = torch.frombuffer(bytearray(b"".join(row_key(*pair) for pair in pairs)), dtype=torch.uint8).view(-1, 32)
    total = int(starts[-1])
    layout = {
        "rows": (torch.uint8, tuple(keys.shape)),
        "starts": (torch.int64, tuple(starts.shape)),
        "ids": (torch.int32, (total, top_k)),
        "log_probs": (torch.float32, (total, top_k)),
        "rest": (torch.float32, (total,)),
    }
    fingerprint = weights_fingerprint(model)
    with atomic_directory(path, overwrite=overwrite) as folder:
        with TensorFile(folder / FILE, layout) as file, evaluating(model):
            file.write_all("rows", tensor_bytes(keys))
            file.write_all("starts", tensor_bytes(starts))
            said = _said(model, data, batch_size, top_k)
            vocabulary, outside, hashes = _write_all(file, said, total, progress)
        head = {
            "format": FORMAT,
            "spp_version": __version__,
            "rows": len(pairs),
            "tokens": total,
            "top_k": top_k,
            "vocabulary": vocabulary,
            **{f"{name}_sha256": value for name, value in hashes.items()},
            "rows_sha256": _sha256(keys),
            "starts_sha256": _sha256(starts),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "teacher": getattr(getattr(model, "config", None), "_name_or_path", None),
            "teacher_fingerprint": fingerprint,
            **Provenance.here(str(next(model.parameters()).device), next(model.parameters()).dtype).to_dict(),
        }
        write_json(folder / CACHE_HEAD, head)
        stored = (folder / FILE).stat().st_size
    share = outside / total if total else 0.0
    return CacheReport(len(pairs), total, top_k, share, stored, data.summary.to_dict())


def _write_all(
    file: TensorFile, said: Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]], total: int, progress: bool
) -> tuple[int, float, dict[str, str]]:
    """Write what is said of each token as it comes; return the vocabulary's size, the mass of the rests, and hashes."""
    done, outside, vocabulary = 0, 0.0, 0
    digests = {name: hashlib.sha256() for name in _SAID}
    with tqdm(total=total, desc="teacher", unit=" tokens", disable=None if progress else True, leave=False) as bar:
        for size, parts in said:
            for name, part in zip(_SAID, parts, strict=True):
                flat = part.contiguous().view(torch.uint8).reshape(-1)
                data = as_array(flat).data
                file.write(name, done * (len(flat) // max(len(part), 1)), data)
                digests[name].update(data)
            done, vocabulary = done + len(parts[2]), size
            outside += float(parts[2].double().exp().sum())
            bar.update(len(parts[2]))
    return vocabulary, outside, {name: digest.hexdigest() for name, digest in digests.items()}


def _said(model: Any, data: TrainingData, size: int, k: int) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
    """Yield, a chunk of tokens at a time, the size of the vocabulary and what `top_of` returns."""
    device = next(model.parameters()).device
    head = output_head(model)
    cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    for batch in batches(data.train, data.collate, size):
        inputs = {name: value.to(device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        check_form(model, inputs)
        with captured_states(model) as states:
            model(**inputs, **cache)
        counted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1) != IGNORED
        for part in states[0].flatten(0, -2)[counted].split(CHUNK):
            outputs = head(part)
            if k >= outputs.shape[1]:
                raise ConfigError(
                    f"{arg('top_k')} is {k}; it must be less than the vocabulary, which has {outputs.shape[1]} tokens"
                )
            wide = outputs.to(torch.float64 if outputs.dtype == torch.float64 else torch.float32, copy=True)
            ids, logs, rest = (one.cpu() for one in top_of(wide, form_of(model), k))
            if logs.isnan().any() or rest.isnan().any():
                raise NonFiniteError(
                    "the teacher's logits are not finite for some of the training data: check its weights, or load it "
                    "in a wider dtype"
                )
            yield outputs.shape[1], (ids, logs, rest)


class TeacherCache:
    """A cache that is read; make it with `open`.

    Attributes:
        path: of the directory.
        head: the object in its JSON file. sha256: of that file.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path, self.head = path, head
        self.sha256 = hashlib.sha256((path / CACHE_HEAD).read_bytes()).hexdigest()
        self._tensors = tensors
        keys, starts = as_array(tensors["rows"].contiguous()), tensors["starts"].tolist()
        self._places = {keys[i].tobytes(): (starts[i], starts[i + 1]) for i in range(len(keys))}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TeacherCache:
        """Open a cache; its tensors stay on the disk.

        Raises:
            CheckpointError: it is missing, of another version or cut short, or its parts do not belong together.
        """
        folder = Path(path)
        head_file = folder / CACHE_HEAD
        if not head_file.is_file():
            raise CheckpointError(
                f"{arg('teacher_cache')}: {folder} holds no {CACHE_HEAD}: pass a directory that spp teacher-cache wrote"
            )
        head = read_json(head_file, "the head of the teacher cache")
        if head.get("format") != FORMAT:
            raise CheckpointError(
                f"{head_file} has the format {head.get('format')!r}, not {FORMAT!r}: another version of spp wrote it, "
                f"or another program; write the cache again"
            )
        with CheckpointReader(folder, file=FILE) as reader:
            missing = {"rows", "starts", "ids", "log_probs", "rest"} - set(reader)
            if missing:
                raise CheckpointError(f"{folder / FILE} lacks {', '.join(sorted(missing))}: write the cache again")
            tensors = {name: reader.tensor(name) for name in reader}
        rows, tokens, k = head.get("rows"), head.get("tokens"), head.get("top_k")
        shapes = {"rows": (rows, 32), "starts": (rows + 1 if isinstance(rows, int) else None,), "ids": (tokens, k)}
        shapes |= {"log_probs": (tokens, k), "rest": (tokens,)}
        wrong = sorted(name for name, shape in shapes.items() if tuple(tensors[name].shape) != shape)
        wrong = wrong or sorted(name for name in shapes if _sha256(tensors[name]) != head.get(f"{name}_sha256"))
        if wrong:
            raise CheckpointError(
                f"{folder / FILE} does not belong to {CACHE_HEAD} beside it (other {', '.join(wrong)}): "
                f"write the cache again"
            )
        return cls(folder, head, tensors)

    def check(self, vocabulary: int | None, tokenizer: Any = None) -> None:
        """Raise a ConfigError for a model of another vocabulary, or another tokenizer."""
        if vocabulary != self.head.get("vocabulary"):
            raise ConfigError(
                f"{arg('teacher_cache')}: {self.path} has the vocabulary {self.head.get('vocabulary')}, the model that "
                f"learns {vocabulary}: write a cache of the dense model that it was pruned from"
            )
        own = None if tokenizer is None else tokenizer_sha256(tokenizer)
        if own is not None and self.head.get("tokenizer_sha256") not in (None, own):
            raise ConfigError(
                f"{arg('teacher_cache')}: {self.path} was written with another tokenizer than that of the model that "
                f"learns: write a cache of the dense model that it was pruned from"
            )

    def check_rows(self, rows: Any) -> None:
        """Raise a DataError unless every row of a data set is here, as far as its rows are in memory."""
        if not isinstance(rows, (TokenBlocks, TokenRows, list, tuple)):
            return
        every = (rows[i] for i in range(len(rows)))
        pairs = [(row.get("input_ids"), row.get("labels")) for row in every if isinstance(row, Mapping)]
        known = [(ids, labels) for ids, labels in pairs if ids is not None and labels is not None]
        missing = [i for i, pair in enumerate(known) if row_key(*map(_ids, pair)) not in self._places]
        if missing:
            raise DataError(
                f"{arg('teacher_cache')}: {self.path} lacks {len(missing)} of {len(known)} training rows, such as row "
                f"{missing[0] + 1}: it was written of other text, or cut into rows otherwise",
                remedy=f"write it with the same {arg('data')}, {arg('block_length')}, {arg('bos')} and "
                f"{arg('completions_only')}",
            )

    def find(self, key: bytes) -> Tensor | None:
        """Return which entries are those of a row (its tokens to learn,), or None."""
        place = self._places.get(key)
        return None if place is None else torch.arange(*place, device="cpu")

    def entries(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids (k, K) int64, their log-probabilities (k, K), and the logarithm of the rest (k,)."""
        ids, logs, rest = (self._tensors[name][places] for name in ("ids", "log_probs", "rest"))
        return ids.long(), logs, rest


def row_key(ids: Tensor, labels: Tensor) -> bytes:
    """Return the sha256 of a row's tokens and labels, each (T,)."""
    return bytes.fromhex(tokens_sha256(ids.cpu().long(), labels.cpu().long()))


def _ids(row: Any) -> Tensor:
    return torch.as_tensor(row, device="cpu")


def _sha256(values: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in tensor_bytes(values):
        digest.update(piece)
    return digest.hexdigest()
