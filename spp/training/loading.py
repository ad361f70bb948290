"""Loading a model and its tokenizer from a directory or the hub, with one clear error when that fails."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from spp.certifying.sources import unreadable_in
from spp.errors import CheckpointError, ConfigError, DependencyError, arg, some_of
from spp.files import CheckpointReader, read_json
from spp.files.formats import other_weights, stored_format
from spp.files.hub import local_directory
from spp.models.streamed import auto_class
from spp.models.unreadable import describe_unreadable, refusal
from spp.packing.model import load_packed
from spp.weights import FLOATS
from spp.weights.packed.disk import is_packed_directory
from spp.wrapping.adapter_files import CONFIG_NAME

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_model(name: str | os.PathLike[str], dtype: str = "auto", *, bits: int | None = None) -> Any:
    """Load a causal language model, or one that reads images as well, with transformers; a packed one as it is stored.

    Args:
        name: directory or hub id.
        dtype: "auto" (the checkpoint's own), "float64", "float32", "bfloat16" or "float16".
        bits: 8 or 4 to let bitsandbytes quantize what is not quantized yet; None loads it as it is stored.

    Raises:
        ConfigError: `bits` of a model that is packed or quantized already.
        DependencyError: `bits` without bitsandbytes.
        CheckpointError: it cannot be found, reached or read, or lacks weights, which transformers would draw at random.
    """
    from transformers import AutoConfig

    directory = local_directory(name, "model")
    if bits is not None:
        _require_plain(directory)
    if is_packed_directory(directory):
        return load_packed(name, dtype=FLOATS.get(dtype))
    _refuse_codes(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
        options = {} if bits is None else {"quantization_config": _quantization(bits, config)}
        model, loaded = auto_class(config).from_pretrained(
            directory, dtype=FLOATS.get(dtype, dtype), output_loading_info=True, **options
        )
    except Exception as error:  # OSError, ValueError, KeyError, those of safetensors
        raise _error("model", name, error) from error
    missing = loaded["missing_keys"]
    if missing:
        kinds = model.config.architectures or []
        mend = "save or fetch it again"
        if kinds and type(model).__name__ not in kinds:
            mend = f"it was saved as {', '.join(kinds)}, and a {type(model).__name__} is needed"
        found = stored_format(directory)
        mend = mend if found is None else f"it is {found}: {found.remedy}"
        raise CheckpointError(
            f"{os.fspath(name)} lacks {len(missing)} weights of its model: {some_of(missing)}; {mend}"
        )
    model.config._name_or_path = os.fspath(name)  # a hub id, not its folder in the cache: adapters name their base
    return model


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """Load a tokenizer with transformers.

    Args:
        name: directory or hub id.

    Raises:
        CheckpointError: it cannot be found, reached or read.
    """
    from transformers import AutoTokenizer

    directory = local_directory(name, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # as above
        if not any((Path(directory) / file).is_file() for file in _TOKENIZERS):
            if (foreign := other_weights(directory)) is not None:
                raise CheckpointError(foreign) from error
            raise CheckpointError(
                f"{os.fspath(name)} has no tokenizer ({', '.join(_TOKENIZERS)}): save the model's own there, with "
                "tokenizer.save_pretrained"
            ) from error
        raise _error("tokenizer", name, error) from error


def _require_plain(directory: Path) -> None:
    """Raise unless a model can be quantized as it is loaded."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError("loading in 8 or 4 bits needs bitsandbytes: pip install 'spp[quantized]'")
    found = stored_format(directory)
    if found is not None:
        raise ConfigError(
            f"{directory} is {found}, which is small already: load it as it is stored, without {arg('teacher_bits')}"
        )


def _quantization(bits: int, config: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(config, "dtype", None) or torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _refuse_codes(directory: Path) -> None:
    """Raise a CheckpointError where weights are codes, and config.json does not tell transformers to decode them.

    transformers would take codes of the right shape for the weights.
    """
    path = directory / "config.json"
    if path.exists() and read_json(path, "the model's config").get("quantization_config") is not None:
        return
    try:
        with CheckpointReader(directory) as reader:
            unreadable = unreadable_in(reader)
    except CheckpointError:  # of files that transformers may read nevertheless, or says itself what is wrong with
        return
    if unreadable:
        stored = describe_unreadable(unreadable)
        raise CheckpointError(f"the projections of {directory} cannot be read: {stored}. {refusal(directory)}")


def _error(what: str, name: str | os.PathLike[str], error: Exception) -> CheckpointError:
    adapter = Path(name) / CONFIG_NAME
    if adapter.is_file() and not (Path(name) / "config.json").exists():
        base = read_json(adapter, "adapter config").get("base_model_name_or_path")
        return CheckpointError(
            f"{os.fspath(name)} holds an adapter, no model: pass its base, {base or 'a pruned model'}"
        )
    reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    if "custom code" in reason:
        return CheckpointError(
            f"{os.fspath(name)} holds Python code of its own, which runs only where you allow it: answer y to the "
            f"question in a terminal, or load the {what} in Python with trust_remote_code=True and pass it to spp"
        )
    if "ignore_mismatched_sizes" in reason:  # no option of ours
        reason = "the shapes of some weights are not those of its config.json, as the report above has them"
    directory = local_directory(name, what)
    if (foreign := other_weights(directory)) is not None:
        return CheckpointError(foreign)
    if what == "model" and (found := stored_format(directory)) is not None:
        return CheckpointError(f"cannot load {os.fspath(name)}, which is {found}: {reason}\n{found.remedy}")
    return CheckpointError(
        f"cannot load the {what} from {os.fspath(name)}: {reason}\n"
        f"is it a Hugging Face checkpoint (config.json, *.safetensors, tokenizer files)?"
    )
