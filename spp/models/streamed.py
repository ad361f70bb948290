"""A model of which only some parts are in memory: what a checkpoint holds, given to a skeleton and taken back.

Where disk and memory name weights differently, or keep the experts of a layer apart or together, transformers' own
conversion tables say how. Every tensor has the dtype that transformers would load it in: the one that was asked for,
else the config's, else that of the first floating tensor; and what an architecture keeps in float32 stays there.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spp.errors import ConfigError, NonFiniteError, StreamingError, arg
from spp.files import CheckpointReader, dtype_name
from spp.files.formats import PACKED, stored_format
from spp.masks.patterns import all_finite
from spp.models.disk_keys import DiskKeys, Group
from spp.models.targets import output_head
from spp.models.unreadable import describe_unreadable, refusal, unreadable_projections
from spp.weights import FLOATS
from spp.weights.packed.disk import DenseReader

_PARTS = re.compile(r"layer|block|expert|depth")  # names in a config that tell how many modules there are
_MOST_PARTS = 10_000


class StreamedModel:
    """A transformers model on the meta device, and the checkpoint that its weights come from.

    Args:
        reader: of the checkpoint.
        dtype: of all floating tensors; None is the checkpoint's own.
        device: where weights go that are loaded.

    Raises:
        ConfigError: the checkpoint is quantized, or `dtype` is none that can be pruned in.
        StreamingError: the weights on disk are not those of the model, and cannot be converted to them.
    """

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype | None, device: str | torch.device) -> None:
        if dtype is not None and dtype not in FLOATS.values():
            raise ConfigError(f"{arg('dtype')} is {dtype}; known: {', '.join(FLOATS)}")
        self._reader = reader
        self._wanted = dtype
        self._device = device
        if not isinstance(reader, DenseReader) or not reader.packed:
            refuse_quantized(reader.directory)
        self.model: nn.Module = skeleton(reader, dtype)
        self._modules = dict(self.model.named_modules())
        self._keys = DiskKeys(self.model, {key: reader.shape(key) for key in reader})
        self._split: dict[str, Tensor] = {}  # {disk key: tensor} of the groups that were asked for, of one block
        self._require_keys()

    def memory_key(self, key: str) -> str:
        """Return the name that the model has for a key on disk (of several that become one tensor: that one's)."""
        return self._keys.memory[key]

    def is_converted(self, key: str) -> bool:
        """Whether the model has the tensor of a disk key only joined with others, or otherwise than the disk."""
        return self._keys.group_of(key) is not None

    def is_heads(self, key: str) -> bool:
        """Whether a key is the output head's own: the blocks never need it."""
        head = output_head(self.model)
        return head is not None and self._modules.get(self.memory_key(key).rpartition(".")[0]) is head

    def require_floats(self, names: Iterable[str]) -> None:
        """Raise a ConfigError where parameters that are to be pruned are stored as something else than floats."""
        wanted = set(names)
        found = [key for key in self._reader if self.memory_key(key) in wanted]
        bad = [key for key in found if self._reader.dtype(key) not in FLOATS.values()]
        if bad:
            told = self._unreadable()
            raise ConfigError(
                f"{bad[0]} is stored as {dtype_name(self._reader.dtype(bad[0]))}: a quantized checkpoint cannot be "
                f"pruned; prune the one that it was made from{told and f'; {told}'}"
            )

    def _unreadable(self) -> str:
        """Return how projections are stored that have no plain weights, as far as the names of tensors tell."""
        reader = self._reader
        return describe_unreadable(
            unreadable_projections({key: (len(reader.shape(key)), reader.dtype(key)) for key in reader})
        )

    def load(self, keys: Iterable[str], origin: CheckpointReader) -> None:
        """Give the model's tensors the values on disk; keys that it does not have are left out."""
        joined: set[Group] = set()
        for key in keys:
            group = self._keys.group_of(key)
            if group is None:
                self._set(self.memory_key(key), lambda key=key: self._converted(key, origin))  # type: ignore[misc]
            elif group not in joined:
                joined.add(group)
                made = self._keys.join(group, lambda key: self._converted(key, origin))
                for name, value in made.items():
                    self._set(name, lambda value=value: value)  # type: ignore[misc]

    def experts(self, name: str, keys: Sequence[str], origin: CheckpointReader) -> Callable[[int], Tensor] | None:
        """Return what reads one expert of a fused weight, on the CPU; None where they can only be read together.

        Args:
            name: of the weight in memory.
            keys: what it is stored as.
        """
        groups = {self._keys.group_of(key) for key in keys}
        if len(groups) != 1:
            return None
        (group,) = groups
        if group is None:
            (key,) = keys
            whole = origin.tensor(key)  # mapped, or decoded from a packed checkpoint
            return lambda expert: self._convert(key, whole[expert], copy=False)
        parts = self._keys.experts(group, name)
        if parts is None:
            return None
        read = lambda key: self._converted(key, origin, copy=False)  # noqa: E731
        return lambda expert: self._keys.join(parts[expert], read)[name][0]

    def unload(self, block: nn.Module) -> None:
        """Put a block's parameters back on the meta device."""
        self._split.clear()
        for module in block.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
        trim_memory()

    def value(self, key: str) -> Tensor:
        """Return what the pruned checkpoint holds under a key: the model's tensor, or what the disk holds."""
        group = self._keys.group_of(key)
        names = (self.memory_key(key),) if group is None else group.memory
        found = {name: tensor for name in names if (tensor := self._tensor(name)) is not None and not tensor.is_meta}
        if len(found) < len(names):
            return self._converted(key, self._reader, copy=False)
        if group is None:
            return found[names[0]].detach().cpu()
        if key not in self._split:
            self._split |= self._keys.split({name: tensor.detach().cpu() for name, tensor in found.items()})
        return self._split[key].contiguous()

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype that the pruned checkpoint holds a key in."""
        found, stored = self._tensor(self.memory_key(key)), self._reader.dtype(key)
        if found is not None:
            return found.dtype
        return self._wanted if self._wanted is not None and stored in FLOATS.values() else stored

    def _converted(self, key: str, origin: CheckpointReader, *, copy: bool = True) -> Tensor:
        return self._convert(key, origin.tensor(key), copy=copy)

    def _convert(self, key: str, before: Tensor, *, copy: bool) -> Tensor:
        dtype = self.dtype(key)
        after = before.to(self._device if copy else "cpu", dtype, copy=copy)
        if dtype != before.dtype and all_finite(before) and not all_finite(after):
            raise NonFiniteError(f"{key} overflows in {dtype_name(dtype)}; take a wider dtype, such as bfloat16")
        return after

    def _place(self, key: str) -> tuple[nn.Module | None, str]:
        path, _, name = key.rpartition(".")
        return self._modules.get(path), name

    def _set(self, key: str, value: Callable[[], Tensor]) -> None:
        """Give one of the model's tensors a value; a name that it does not have is left out."""
        module, name = self._place(key)
        if module is None:
            return
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value(), requires_grad=False)
        elif module._buffers.get(name) is not None:
            module._buffers[name] = value()

    def _tensor(self, key: str) -> Tensor | None:
        module, name = self._place(key)
        if module is None:
            return None
        value = module._parameters.get(name)
        return value if value is not None else module._buffers.get(name)

    def _require_keys(self) -> None:
        reader = self._reader
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}  # a tied weight once
        alike = {name: key for key, name in self._keys.memory.items() if self._keys.group_of(key) is None}
        converted = {name for group in self._keys.groups.values() for name in group.memory}
        missing = sorted(shapes.keys() - alike.keys() - converted)
        wrong = sorted(n for n, shape in shapes.items() if n in alike and reader.shape(alike[n]) != shape)
        if (missing or wrong) and (told := self._unreadable()):
            raise ConfigError(
                f"the projections of {reader.directory} cannot be read: {told}. {refusal(reader.directory)}"
            )
        if missing or wrong:
            what = f"lacks {', '.join(missing[:3])}" if missing else f"holds {wrong[0]} in another shape"
            raise StreamingError(
                f"{reader.directory} {what}{', …' if len(missing) > 3 else ''}: its weights are stored otherwise than "
                f"the model has them, so it can be pruned in memory, but not block by block from the disk"
            )


def load_whole(reader: CheckpointReader, dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    """Return a checkpoint's model with all of its weights in memory; arguments and errors as of StreamedModel."""
    streamed = StreamedModel(reader, dtype, device)
    streamed.load(reader.keys(), reader)
    streamed.model.tie_weights()  # type: ignore[operator]
    return streamed.model.to(device)


def refuse_quantized(source: Path) -> None:
    """Raise a ConfigError where a checkpoint's config says that it is quantized."""
    found = stored_format(source)
    if found is not None:
        what = "packed; " if found.method == PACKED else f"{found}: "
        raise ConfigError(f"{source} is {what}{found.remedy}")


def skeleton(reader: CheckpointReader, wanted: torch.dtype | None) -> Any:
    """Return the model without weights, its buffers computed as its own code does."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    _refuse_endless(reader)
    failed = "cannot read the model's config"
    try:
        config = AutoConfig.from_pretrained(reader.directory)
        failed = "cannot make a model of the config"
        dtype = wanted or getattr(config, "dtype", None) or _first_dtype(reader)
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=dtype)
    except Exception as error:  # of the loader, of code of the config's or the model's own
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise StreamingError(f"{failed} in {reader.directory}: {reason}") from error
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}  # what stays in float32
    for part, kept in plan.items():
        pattern = re.compile(part.replace("*", ".*"))
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and pattern.search(f"{path}.{name}"):
                    module._parameters[name] = nn.Parameter(parameter.to(kept), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point() and pattern.search(f"{path}.{name}"):
                    module._buffers[name] = buffer.to(kept)
    model.tie_weights()
    return model


def _refuse_endless(reader: CheckpointReader) -> None:
    """Raise where a config claims more parts of a model than the checkpoint has tensors, and than memory has room."""
    values = [reader.config()]
    most = max(_MOST_PARTS, len(reader.keys()))
    while values:
        for name, value in values.pop().items():
            if isinstance(value, dict):
                values.append(value)
            elif type(value) is int and value > most and _PARTS.search(name):
                raise StreamingError(
                    f"{reader.directory / 'config.json'} claims {name} = {value}, and the checkpoint has "
                    f"{len(reader.keys())} tensors: corrupt"
                )


def _first_dtype(reader: CheckpointReader) -> torch.dtype | None:
    dtypes = (reader.dtype(key) for keys in reader.shards().values() for key in keys)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


# ---- Give freed memory back to the system while a model goes through memory block by block.
#
# glibc keeps freed chunks of some megabytes in its heap, and what is allocated in between splits them: in a stream of
# blocks the process would grow by about a block a block, up to the size of the model that is never held.


def trim_memory() -> None:
    """Return freed heap memory to the system; does nothing where the C library is not glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS, Windows
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


# ---- Which of transformers' auto classes makes a model: that of causal language models, or, with images, of its own.


def auto_class(config: Any) -> Any:
    """Return AutoModelForCausalLM, or AutoModelForImageTextToText where only that knows the config.

    Args:
        config: of the model, as AutoConfig gives it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    def knows(auto: Any) -> bool:
        remote = getattr(config, "auto_map", None) or {}
        return type(config) in auto._model_mapping or auto.__name__ in remote

    if knows(AutoModelForCausalLM) or not knows(AutoModelForImageTextToText):
        return AutoModelForCausalLM  # whose error says what it knows
    return AutoModelForImageTextToText
