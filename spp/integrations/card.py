"""The model card of an adapter or a model: what it is, its zeros, how it was made, what was measured.

Made of the files alone: the adapter's config or the certificate, and the directory of the tuning run where there is
one. The same files give the same bytes; no times, and no paths of the machine that they were made on. The metadata
block is read and written by huggingface_hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from spp.certifying.certificate import Certificate
from spp.errors import CheckpointError, ConfigError, arg
from spp.files import read_json
from spp.files.cards import CARD_NAME
from spp.files.provenance import Provenance
from spp.report import Table, sparsity_table
from spp.report.contents import recipe_of, shown
from spp.weights.packed.disk import is_packed_directory
from spp.wrapping.adapter_files import CONFIG_NAME, AdapterFiles, adapter_without_update, read_adapter

_PAPER = "[SPP](https://arxiv.org/abs/2405.16057)"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def make_card(
    directory: Path,
    repo_id: str,
    *,
    run: Path | None = None,
    base: str | None = None,
    license: str | None = None,
) -> str:
    """Return the text of a model card.

    Args:
        directory: an adapter, or a model with its certificate.
        repo_id: where it is going to be, "owner/name".
        run: the directory of the tuning run, for the recipe and the results; None looks beside an adapter.
        base: hub id of the model that it was made from; None takes the one that the files name.
        license: an identifier of the hub, such as "apache-2.0"; None takes that of the base's own card, if the base is
            a directory here with a card that says so.

    Raises:
        CheckpointError: the files are missing or bad.
        ConfigError: `base` is no hub id.
    """
    if base is not None and not _HUB_ID.fullmatch(base):
        raise ConfigError(f"{arg('base')} is {base!r}; the card needs a hub id, such as owner/name")
    found_run = run if run is not None else _run_beside(directory)
    recipe = {} if found_run is None else read_json(found_run / "config.json", "the run's config")
    results = _results(found_run)
    is_adapter = (directory / CONFIG_NAME).exists()
    made: AdapterFiles | Certificate = read_adapter(directory) if is_adapter else Certificate.read(directory)
    if isinstance(made, AdapterFiles):
        named, relation, library = made.base_name, "adapter", "spp"
        generates, tags = _generates(directory) or _is_causal(directory), ["spp", "pruned", "sparse"]
    else:
        named = made.base.name_or_path if made.base else None
        relation = "finetune" if made.base or recipe else ""
        library = "spp" if is_packed_directory(directory) else "transformers"
        pattern = made.report().pattern
        generates, tags = _generates(directory), ["spp", "pruned", "sparse", *([pattern] if ":" in pattern else [])]
    known = base if base is not None else _hub_id(named)
    metadata = {
        "base_model": known or "",
        "base_model_relation": relation,
        "library_name": library,
        "license": license or _license_of(named) or "",
        "pipeline_tag": "text-generation" if generates else "",
    }
    shown = known or _public(named) or "the pruned base"
    if isinstance(made, AdapterFiles):
        body = _adapter_body(made, repo_id, shown)
    else:
        body = _model_body(directory, made, repo_id, shown if made.base or known else None)
    parts = [_front_matter(metadata, tags), f"# {repo_id.rpartition('/')[2]}", body]
    parts += [_recipe_section(recipe)] if recipe else []
    parts += [results] if results is not None else []
    return "\n\n".join(parts) + "\n"


def _front_matter(metadata: Mapping[str, str], tags: Sequence[str]) -> str:
    """Return the metadata block, its fields sorted; an empty one is left out, and so is a relation to no base."""
    fields: dict[str, Any] = {name: value for name, value in metadata.items() if value}
    if "base_model" not in fields:
        fields.pop("base_model_relation", None)
    fields["tags"] = list(tags)
    return f"---\n{ModelCardData(**fields).to_yaml(original_order=sorted(fields))}\n---"


def _adapter_body(adapter: AdapterFiles, repo_id: str, base: str) -> str:
    layers = adapter.layers()
    parameters = sum(tensor.numel() for tensor in (*adapter.tensors.values(), *adapter.also.values()))
    options = [(name, shown(value)) for name, value in adapter.config.to_dict().items() if value is not None]
    options += [("layers", str(len(layers))), ("parameters", str(parameters))]
    if adapter.also:
        options.append(
            ("also trained", f"{len(adapter.also)} parameters of the base, such as {next(iter(adapter.also))}")
        )
    known = f"the zeros of {len(adapter.base_masks or {})} of its {len(layers)} layers and refuses another base."
    idle = adapter_without_update(adapter)
    known += "" if idle is None else f"\n\nAs it is here, {idle}"
    return f"""An adapter for {_code(base)}, a pruned language model: {_PAPER} trains a factor for each weight that \
pruning left, so that
merging it keeps every zero. It knows {known}

```python
import spp
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
spp.load_adapter(model, {json.dumps(repo_id)})
spp.merge(model)  # a plain model again, with the same zeros
```

## Adapter

{_table(("option", "value"), options)}"""


def _model_body(directory: Path, certificate: Certificate, repo_id: str, base: str | None) -> str:
    report = certificate.report()
    lines = [
        f"A pruned language model: sparsity {report.sparsity:.4f} ({report.pattern}) over its {len(report.tensors)} "
        f"projections."
    ]
    if base is not None and certificate.base is not None:
        lines.append(
            f"Tuned from {_code(base)} with {_PAPER} and merged: its zeros are exactly those of the base (fingerprint "
            f"`{certificate.base.fingerprint[:16]}…`)."
        )
    elif base is not None:
        lines.append(f"Pruned from {_code(base)}.")
    if is_packed_directory(directory):
        lines.append("Its pruned weights are stored packed: kept values and masks.")
        code = f"import spp\n\nmodel = spp.load_packed({json.dumps(repo_id)})"
    else:
        lines.append("A plain checkpoint, dense with exact zeros, that loads anywhere.")
        loads = f"AutoModelForCausalLM.from_pretrained({json.dumps(repo_id)})"
        code = f"from transformers import AutoModelForCausalLM\n\nmodel = {loads}"
    checked = (
        "`sparsity.json` holds the hash of every mask and of all contents; `spp verify` checks the files against it."
    )
    table = sparsity_table(report)
    zeros = _table(table.columns, table.rows)
    return "\n".join(lines) + f"\n\n```python\n{code}\n```\n\n## Zeros\n\n{zeros}\n\n{checked}"


def _recipe_section(values: Mapping[str, Any]) -> str:
    options = values.get("tune")
    if not isinstance(options, dict):
        raise CheckpointError("the run's config.json has no options of a tuning run; pass the directory of `spp tune`")
    data = options.get("data")
    if data is not None:
        data = [_public(str(name)) for name in (data if isinstance(data, list) else [data])]
    rows = list(recipe_of({**options, "data": data}).items())
    if versions := Provenance.from_dict(values).packages:
        rows.append(("versions", versions))
    return f"## Recipe\n\n{_table(('option', 'value'), rows)}"


def _results(run: Path | None) -> str | None:
    """Return the perplexities of a run; None where it measured none."""
    path = None if run is None else run / "eval.json"
    if path is None or not path.exists():
        return None
    values = read_json(path, "the run's perplexities")
    found = {name: values.get(name) for name in ("before", "after")}
    rows = [
        (name, f"{float(one['perplexity']):.4f}", shown(one.get("window") or "rows"), shown(one.get("windows")))
        for name, one in found.items()
        if isinstance(one, dict) and isinstance(one.get("perplexity"), (int, float))
    ]
    if not rows:
        return None
    text = _public(str(values.get("text", ""))) or "the run's text"
    heads = ("tuning", "perplexity", "window", "windows")
    return f"## Results\n\nPerplexity on {_code(text)}, measured before and after tuning:\n\n{_table(heads, rows)}"


def _run_beside(directory: Path) -> Path | None:
    """Return the directory of the run that an adapter is in; None where it is in none."""
    run = Path(os.path.realpath(directory)).parent
    try:
        found = read_json(run / "config.json", "the run's config").get("format")
    except CheckpointError:
        return None
    return run if isinstance(found, str) and found.startswith("spp-tune-") else None


def _hub_id(name: str | None) -> str | None:
    """Return a name if it can only be an id of the hub: no directory here, and of the form owner/name."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _public(name: str | None) -> str | None:
    """Return an id of the hub as it is, of a path its last part."""
    return name if not name or _hub_id(name) else Path(name).name


def _license_of(base: str | None) -> str | None:
    """Return the license that the card of a base directory names; None where there is no card that can be read."""
    path = Path(base or "") / CARD_NAME
    if not base or not path.is_file():
        return None
    try:
        found = (metadata_load(path) or {}).get("license")
    except (OSError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None


def _generates(directory: Path) -> bool:
    path = directory / "config.json"
    found = read_json(path, "the model's config").get("architectures") if path.exists() else None
    return isinstance(found, list) and any(isinstance(name, str) and name.endswith("ForCausalLM") for name in found)


def _is_causal(directory: Path) -> bool:
    return read_json(directory / CONFIG_NAME, "adapter config").get("task_type") == "CAUSAL_LM"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return Table("", tuple(columns), tuple(tuple(_cell(text) for text in row) for row in rows)).markdown()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _code(text: str) -> str:
    return f"`{_cell(text).replace('`', '')}`"
