"""Adapter directories on disk, read and written without a model: our own format, and that of the SPP authors' code.

A directory holds a config, which names its method, and the tensors; PST's state (spp.pst.files) is one too.

Ours      adapter_config.json: peft_type "SPP", every field of SPPConfig, base_model_name_or_path, base_masks,
          base_values and base_forms (spp.weights.base_values; older adapters lack them), task_type, and with PEFT as
          the writer the fields of its own;
          adapter_model.safetensors: base_model.model.<module path>.spp_alpha (r, n) and .spp_beta (m, 1), float32;
          where the config says also_train, base_model.model.<module path>.weight and .bias too, as trained.
Authors'  adapter_config.json with lora_alpha, lora_dropout and an r that need not be the tensors';
          adapter_model.safetensors or .bin: …<module path>.lora_A.weight (r, n), …lora_A.weight_col (m, 1) or (1, m).
          r is the rows of the tensor; scaling = lora_alpha / the config's r.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from spp.configs.adapter import SPPConfig
from spp.errors import AdapterError, CheckpointError, NonFiniteError, arg, some_of
from spp.files import CheckpointReader, read_json, save_tensors, write_json
from spp.files.hub import local_directory
from spp.files.places import check_link
from spp.masks.patterns import all_finite
from spp.models.projection import plain_name
from spp.rules import Adapter, get_rule
from spp.rules.adapter import idle_reason, no_update_text
from spp.weights import FLOATS

logger = logging.getLogger(__name__)

PEFT_TYPE = "SPP"
PST_TYPE = "PST"  # what spp.pst.save writes
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
OLD_WEIGHTS_NAME = "adapter_model.bin"
MASKS_NAME, MASKS_STATE_NAME = "masks.safetensors", "masks.json"  # beside a checkpoint's, where masks are updated
_LOADERS = {PEFT_TYPE: "spp.load_adapter", PST_TYPE: "spp.pst.load, on the dense model"}
PREFIX = "base_model.model."
_AUTHORS_KEY = re.compile(r"^(?P<path>.+)\.lora_A(?:\.default)?\.(?P<what>weight|weight_col)(?:\.default)?$")


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter directory.

    Attributes:
        source: the directory.
        config: how the adapter was made.
        tensors: {"<module path>.spp_alpha": (r, n), "<module path>.spp_beta": (m, 1)}, float32 or float64.
        base_masks: {module path: mask hash} of the base that it was trained on; None for the authors' files.
        base_name: where that base came from, or None.
        base_values, base_forms: {module path: hash of the base's values} and {module path: what was hashed}, as
            spp.weights.base_values has them; None where the files do not say.
        also: {parameter name: its trained values} of what was trained beside the adapter.
    """

    source: Path
    config: SPPConfig
    tensors: dict[str, Tensor]
    base_masks: dict[str, str] | None
    base_name: str | None
    base_values: dict[str, str] | None = None
    base_forms: dict[str, str] | None = None
    also: dict[str, Tensor] = field(default_factory=dict)

    def layers(self) -> dict[str, tuple[Tensor, ...]]:
        """Return {module path: the rule's parameters in their order}; an AdapterError if a layer lacks one."""
        names = get_rule(self.config.rule).attribute_names()
        paths = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in self.tensors))
        missing = sorted(f"{path}.{name}" for path in paths for name in names if f"{path}.{name}" not in self.tensors)
        if missing:
            raise AdapterError(f"{self.source}: the adapter lacks {', '.join(missing)}; save or fetch it again")
        return {path: tuple(self.tensors[f"{path}.{name}"] for name in names) for path in sorted(paths)}

    @property
    def has_moved_masks(self) -> bool:
        """Whether this is a checkpoint of a run that moves its masks: its base is nowhere on the disk."""
        return (self.source / MASKS_STATE_NAME).is_file()

    def warn_unchecked(self) -> None:
        """Log of which layers the files do not say which zeros they were trained on."""
        paths = {key.rsplit(".", 1)[0] for key in self.tensors}
        unknown = sorted(paths - (self.base_masks or {}).keys())
        if unknown:
            which = "" if self.base_masks is None else f" in {', '.join(unknown)}"
            logger.warning("%s does not say which zeros it was trained on%s; they are not checked", self.source, which)


def method_of(path: str | Path) -> str | None:
    """Return the method that an adapter directory, or a hub id, says it is of: "SPP", "PST", …, or None.

    Raises:
        CheckpointError: its config is missing or cannot be read.
    """
    kind = _read_config(local_directory(path, "adapter")).get("peft_type")
    return kind if isinstance(kind, str) else None


def read_adapter(path: str | Path) -> AdapterFiles:
    """Read and check an adapter directory, or a hub id, without a model.

    Raises:
        CheckpointError: a file is missing, corrupt, truncated or holds code.
        AdapterError: it is another method's adapter, keys do not belong, or it is empty.
        ConfigError: its config makes no sense or is of a newer version.
        NonFiniteError: NaN or infinity, with the keys.
    """
    directory, values, tensors = read_files(path)
    tensors = {key: t if t.dtype == torch.float64 else t.float() for key, t in tensors.items()}
    if values.get("peft_type") == PEFT_TYPE:
        files = _ours(directory, values, tensors)
    elif any(_AUTHORS_KEY.match(k) and "weight_col" in k for k in tensors):
        files = _authors(directory, values, tensors)
    else:
        refuse_type(directory, values, PEFT_TYPE)
    if not files.tensors:
        raise AdapterError(f"{directory}: the adapter holds no tensor; save or fetch it again")
    return files


def read_files(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Return an adapter directory, of a hub id its copy here, with its config and its tensors as they are stored.

    Raises:
        CheckpointError: a file is missing, corrupt, truncated or holds code.
        AdapterError: a tensor is not floating-point.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    directory = local_directory(path, "adapter")
    values = _read_config(directory)
    weights, old = directory / WEIGHTS_NAME, directory / OLD_WEIGHTS_NAME
    if weights.exists() or not old.exists():
        with CheckpointReader(directory, file=WEIGHTS_NAME) as reader:
            tensors = {key: reader.load(key) for key in reader.keys()}  # noqa: SIM118  a reader is no mapping
    else:
        tensors = _read_old(old)
    tensors = {plain_name(key): tensor for key, tensor in tensors.items()}  # of a model with compiled parts
    wrong = sorted(f"{key} ({t.dtype})" for key, t in tensors.items() if t.dtype not in FLOATS.values())
    if wrong:
        raise AdapterError(f"{directory}: not floating-point: {', '.join(wrong)}")
    if bad := _not_finite(tensors):
        raise NonFiniteError(f"{directory}: NaN or infinity in {bad}; take an earlier checkpoint of the training")
    return directory, values, tensors


def write_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a config and tensors into a directory that exists.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; the keys are named, and nothing is written.
    """
    if bad := _not_finite(tensors):
        raise NonFiniteError(f"NaN or infinity in {bad}: the training diverged; lower the learning rate")
    save_tensors(directory / WEIGHTS_NAME, tensors)
    write_json(directory / CONFIG_NAME, config)


def base_name_of(values: Mapping[str, Any]) -> str | None:
    """Return where the base of an adapter came from, by its config; None where it does not say."""
    name = values.get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def refuse_type(directory: Path, values: Mapping[str, Any], expected: str) -> NoReturn:
    """Raise an AdapterError for a directory of another method than expected."""
    kind = values.get("peft_type", "unknown")
    remedy = _LOADERS.get(kind, "the library that made it") if isinstance(kind, str) else "the library that made it"
    raise AdapterError(f"{directory} holds an adapter of type {kind!r}, not {expected}; load it with {remedy}")


Shapes = Mapping[str, Collection[int]]


def misfits(expected: Shapes, found: Shapes) -> tuple[list[str], list[str]]:
    """Return which keys are missing or unexpected, and which have another shape than the model needs."""
    keys = [f"missing {key} {tuple(expected[key])}" for key in expected.keys() - found.keys()]
    keys += [f"unexpected {key} {tuple(found[key])}" for key in found.keys() - expected.keys()]
    misshapen = [
        f"misshapen {key}: adapter {tuple(found[key])}, model needs {tuple(expected[key])}"
        for key in expected.keys() & found.keys()
        if tuple(found[key]) != tuple(expected[key])
    ]
    return keys, misshapen


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def does_not_fit(what: str, problems: Collection[str], verdict: str = "does not fit this model") -> str:
    """Return the message that lists all that is wrong with an adapter."""
    return f"{what} {verdict}:\n  " + "\n  ".join(sorted(problems))


def why_malformed(hashes: Any, forms: Any) -> str | None:
    """Return what is wrong with the two fields of an adapter's config; None where nothing is, or both are missing."""
    if hashes is None and forms is None:
        return None
    for name, value in (("base_values", hashes), ("base_forms", forms)):
        if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            return f"{name} must map module paths to {'hashes' if value is hashes else 'what was hashed'}"
    bad = [path for path, digest in hashes.items() if not re.fullmatch("[0-9a-f]{64}", digest)]
    if bad:
        return f"base_values must be the 64 hexadecimal digits of a sha256; they are not for {some_of(bad)}"
    if hashes.keys() != forms.keys():
        return f"base_values and base_forms name other layers, such as {min(hashes.keys() ^ forms.keys())}"
    return None


def adapter_without_update(files: AdapterFiles) -> str | None:
    """Return a sentence that says why an adapter on disk changes no weight; None where its parameters are not idle."""
    rule, scaling = get_rule(files.config.rule), files.config.scaling
    reason = idle_reason(Adapter(rule, params, scaling) for params in files.layers().values())
    if files.also:  # without the base nobody knows whether they changed
        return None
    return None if reason is None else no_update_text(reason)


def _read_config(directory: Path) -> dict[str, Any]:
    path, inner = directory / CONFIG_NAME, directory / "adapter"
    if not path.exists() and (inner / CONFIG_NAME).is_file():
        raise CheckpointError(f"{directory} holds no adapter itself, but a run's: pass {inner}")
    return read_json(path, "adapter config")


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the keys of the tensors that hold NaN or infinity, as the model names them; "" where there are none."""
    return ", ".join(sorted(k.removeprefix(PREFIX) for k, t in tensors.items() if not t.is_meta and not all_finite(t)))


def _read_old(path: Path) -> dict[str, Tensor]:
    """Read the authors' pickle with tensors only: code in it is refused, not run."""
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is corrupt, and was not loaded (such a file can run code): {error}"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way: AttributeError, TypeError, MemoryError, …
        reason = f"{type(error).__name__} {error}".strip().split("\n")[0]
        raise CheckpointError(f"{path} cannot be read, it may be truncated or corrupt: {reason}") from None
    if not isinstance(loaded, Mapping) or not all(_is_plain(tensor) for tensor in loaded.values()):
        raise CheckpointError(f"{path} is no mapping of names to plain tensors")
    size = path.stat().st_size
    if sum(tensor.numel() * tensor.element_size() for tensor in loaded.values()) > size:
        raise CheckpointError(f"{path} has {size} bytes, fewer than its tensors claim to be: it is corrupt")
    return {str(key): tensor for key, tensor in loaded.items()}


def _check_archive(path: Path) -> None:
    """Refuse what torch.load would give memory to before it looked at it: links out, old formats, compression."""
    check_link(path, path.parent)
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} cannot be read as an archive of torch.save, it may be truncated or older than torch 1.6: {error}"
        ) from None
    if any(file.compress_type != zipfile.ZIP_STORED or file.file_size != file.compress_size for file in files):
        raise CheckpointError(f"{path} is compressed, which torch.save never does; it is not read")


def _is_plain(value: object) -> bool:
    """Whether a value is a dense tensor on the CPU, not quantized, and of no subclass."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, Parameter):
        return False
    return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized


def _ours(directory: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterFiles:
    known = {f.name for f in fields(SPPConfig)}
    config = SPPConfig.from_dict({k: v for k, v in values.items() if k in known})
    names = get_rule(config.rule).attribute_names()
    if values.get("modules_to_save"):
        modules = values["modules_to_save"]
        whole = ", ".join(map(str, modules if isinstance(modules, list) else [modules]))
        raise AdapterError(
            f"{directory} also holds modules that were trained as a whole, {whole}: load it with PEFT (import "
            f"spp.integrations.peft first), whose merge_and_unload gives a plain model"
        )
    last = {key: key.rsplit(".", 1)[-1] for key in tensors if key.startswith(PREFIX)}
    also = {key for key, name in last.items() if config.also_train and name in ("weight", "bias")}
    strange = sorted(k for k in tensors if k not in also and last.get(k) not in names)
    if strange:
        raise AdapterError(f"{directory}: unexpected keys {', '.join(strange)}; SPP's end in {' or '.join(names)}")
    masks = values.get("base_masks")
    if masks is not None and not (isinstance(masks, dict) and all(isinstance(m, str) for m in masks.values())):
        raise CheckpointError(f"{directory / CONFIG_NAME}: base_masks must map module paths to hashes")
    hashes, forms = values.get("base_values"), values.get("base_forms")
    if (problem := why_malformed(hashes, forms)) is not None:
        raise CheckpointError(f"{directory / CONFIG_NAME}: {problem}")
    if config.also_train and not also:
        raise AdapterError(
            f"{directory}: {arg('also_train')} is {'+'.join(config.also_train)}, but no such tensor is there"
        )
    named = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k not in also}
    trained = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k in also}
    return AdapterFiles(directory, config, named, masks, base_name_of(values), hashes, forms, trained)


def _authors(directory: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterFiles:
    found: dict[str, Tensor] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _AUTHORS_KEY.match(key)
        if match is None or tensor.ndim != 2:
            strange.append(f"{key} {tuple(tensor.shape)}")
            continue
        path = match["path"].removeprefix(PREFIX)
        if match["what"] == "weight":
            found[f"{path}.spp_alpha"] = tensor
        else:
            found[f"{path}.spp_beta"] = tensor.reshape(-1, 1) if 1 in tensor.shape else tensor  # else misshapen
    if strange:
        raise AdapterError(
            f"{directory}: unexpected keys in an adapter of the SPP authors' code: {', '.join(sorted(strange))}"
        )
    ranks = {k.removesuffix(".spp_alpha"): t.shape[0] for k, t in found.items() if k.endswith(".spp_alpha")}
    if not ranks:
        raise AdapterError(f"{directory}: no lora_A.weight in it")
    r = Counter(ranks.values()).most_common(1)[0][0]
    try:
        scaling = float(values["lora_alpha"]) / float(values["r"])
        dropout = float(values.get("lora_dropout", 0.0))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: lora_alpha and r are needed for the scaling: {type(error).__name__} {error}"
        ) from None
    others = {re.escape(path): rank for path, rank in ranks.items() if rank != r}
    config = SPPConfig(
        r=r, scaling=scaling, dropout=dropout, target_modules=tuple(sorted(ranks)), rank_pattern=others or None
    )
    return AdapterFiles(directory, config, found, None, base_name_of(values))
