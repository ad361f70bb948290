"""Facts of a report that are found in weights, now: zeros against their certificate, changes by an adapter, answers.

A weight is in memory at a time, never the model; but for answers, which are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spp.certifying.certificate import make_report
from spp.certifying.verify import examine, sparsity
from spp.errors import DataError, MaskError, SPPError, arg
from spp.files import CheckpointReader, mask_sha256
from spp.files.jsonio import parse_object
from spp.merging.places import find_places, read_parts, sum_of
from spp.merging.report import LayerMerge, MergeReport, sum_layers
from spp.merging.weight import merge_tensor
from spp.pst import load as load_pst
from spp.report.runs import Changes, Checkpoint, Model, Zeros
from spp.training.loading import load_model, load_tokenizer
from spp.wrapping.adapter_files import PST_TYPE, method_of
from spp.wrapping.adapters import load_adapter

_LISTED = 3  # problems of a verification in the verdict


def zeros_of(checkpoint: Checkpoint, *, verify: bool) -> Zeros:
    """Return the zeros of a checkpoint; whatever is wrong with it is the verdict.

    Args:
        verify: read its weights.
    """
    name, certificate = checkpoint.name, checkpoint.certificate
    if not verify:
        report = None if certificate is None else certificate.report()
        told = "no certificate" if report is None else "what its certificate says"
        return Zeros(name, report, f"not verified: {told}, no weights were read", None)
    try:
        if certificate is None:
            return Zeros(name, sparsity(checkpoint.path), "not verified: no certificate; zeros counted now", None)
        found = examine(checkpoint.path)
    except SPPError as error:
        return Zeros(name, None, f"cannot be read: {error}", False)
    if not found.problems:
        base = certificate.base
        told = "" if base is None else f", and its zeros are those of {base.name_or_path or 'its base'}"
        return Zeros(name, found.report, f"verified now: the files are what the certificate says{told}", True)
    listed = "; ".join(map(str, found.problems[:_LISTED])) + ("; …" if len(found.problems) > _LISTED else "")
    there = {key: facts for key, facts in found.tensors.items() if facts is not None}
    told = f"fails its certificate in {len(found.problems)} places: {listed}"
    return Zeros(name, make_report(there), told, False)


def changes_of(name: str, base: Path, adapter: Path) -> Changes:
    """Return how much an adapter changes the weights of its base.

    Args:
        name: of the run. base: a checkpoint. adapter: of SPP.

    Raises:
        MaskError: the base has not the zeros that the adapter was trained on.
        SPPError: as spp.merge_checkpoint.
    """
    if method_of(adapter) == PST_TYPE:
        raise DataError("PST learns which weights to prune, and changes no other")
    parts = read_parts(adapter)
    adapters, masks = sum_of(parts), parts[0].files.base_masks or {}
    sums: dict[str, tuple[float, int, bool]] = {}
    merges: dict[str, LayerMerge] = {}
    with CheckpointReader(base) as reader:
        for place in tqdm(find_places(reader, parts), desc="changes", unit="layer", disable=None, leave=False):
            path, weight = place.path, place.weight(reader)
            if masks.get(path) not in (None, mask_sha256(weight)):
                raise MaskError(f"{path} of {base} has not the zeros that the adapter was trained on")
            of_layer = adapters[path]
            total, kept, done = 0.0, 0, []
            for matrix, one in zip(
                place.matrices(weight), of_layer.experts() if place.fused else [of_layer], strict=True
            ):
                merged, found = merge_tensor(matrix, one, where=path)
                change, count = _change(matrix, merged)
                total, kept = total + change, kept + count
                done.append(found)
            merges[path], sums[path] = sum_layers(done), (total, kept, True)
    merges = dict(sorted(merges.items()))
    return Changes(name, sums, MergeReport(merges, sum_layers(list(merges.values())).survived, make_report({})))


def _change(before: Tensor, after: Tensor) -> tuple[float, int]:
    """Return Σ |after / before − 1| over the weights that are not zero, and how many these are."""
    total, rows = 0.0, max(1, (1 << 21) // max(1, before.shape[1]))
    for old, new in zip(before.split(rows), after.split(rows), strict=True):
        ratio = new.double().div_(old.double()).sub_(1).abs_()
        total += float(ratio.nan_to_num_(nan=0.0).sum())  # 0 / 0 where pruned
    return total, int(torch.count_nonzero(before))


# ---- The same prompts for several models.


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file: its lines, or of .json and .jsonl the field `prompt` of each line.

    Raises:
        DataError: it cannot be read, holds none, or a line has no prompt.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no UTF-8 text: {error}"
        raise DataError(f"{arg('prompts')}: {path} cannot be read: {reason}") from error
    if path.suffix in (".json", ".jsonl"):
        rows = [parse_object(line.encode(), f"{path}, prompt {i}") for i, line in enumerate(lines, start=1)]
        bad = [i for i, row in enumerate(rows, start=1) if not (isinstance(row.get("prompt"), str) and row["prompt"])]
        if bad:
            found = json.dumps(sorted(rows[bad[0] - 1]))
            raise DataError(f"{path}, prompt {bad[0]}: it has the keys {found}; expected a text under prompt")
        lines = [row["prompt"] for row in rows]
    if not lines:
        raise DataError(f"{arg('prompts')}: {path} holds no prompt: write one a line")
    return lines


def answers_of(model: Model, prompts: Sequence[str], *, most: int, device: str) -> list[str]:
    """Return how a model continues prompts, greedily.

    Args:
        model: a directory or hub id, and an adapter on it.
        most: tokens of an answer.
        device: to run it on.

    Raises:
        CheckpointError, AdapterError: it cannot be loaded.
        DataError: the tokenizer is another model's.
    """
    from transformers import GenerationConfig

    loaded, tokenizer = load_model(model.path), load_tokenizer(model.path)
    if model.adapter is not None:
        if method_of(model.adapter) == PST_TYPE:
            load_pst(loaded, model.adapter)
        else:
            load_adapter(loaded, model.adapter)
    loaded = loaded.to(device).eval()
    own = loaded.generation_config
    end = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    first_end = end[0] if isinstance(end, list) and end else end
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end
    greedy = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=end, pad_token_id=padding)
    vocabulary = loaded.get_input_embeddings().weight.shape[0]
    found = []
    for prompt in tqdm(prompts, desc=f"answers of {model.name}", disable=None, leave=False):
        ids: Any = tokenizer(prompt, return_tensors="pt")["input_ids"]  # (1, T)
        if not ids.numel() or int(ids.max()) >= vocabulary:
            what = "no token" if not ids.numel() else f"token id {int(ids.max())}, beyond {vocabulary} embeddings"
            raise DataError(f"the tokenizer of {model.path} makes {what} of the prompt {prompt[:60]!r}")
        ids = ids.to(device)
        with torch.no_grad():
            out = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found
