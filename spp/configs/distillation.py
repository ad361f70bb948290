"""Distillation: the options of a loss with a teacher, which tune, compare and the trainers share; and of its cache."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from spp.configs.checks import (
    AUTO_DTYPES,
    BOS,
    DATA_FORMATS,
    DEVICES,
    check_choice,
    check_flag,
    check_int,
    check_number,
    check_path,
)
from spp.configs.options import DATA, MODEL, RUN, TEACHER, Option
from spp.configs.pruning import BOS_OPTION
from spp.errors import ConfigError, arg

DENSE = "dense"  # as a teacher: the model that spp prune pruned
BITS = (4, 8)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The options of a loss with a teacher (spp.training.distillation).

    Args:
        teacher: directory or hub id of the teacher, or "dense": the model that the pruned one's certificate names as
            its origin.
        teacher_bits: load the teacher in 8 or 4 bits (NF4) with bitsandbytes; None loads it as it is stored, which may
            be quantized or packed.
        teacher_cache: directory of what `spp teacher-cache` wrote, in place of a teacher.
        ce_weight: weight of the cross-entropy with the labels.
        kl_weight: weight of T² · KL(teacher ‖ student).
        temperature: T; 1 with a cache.
        hidden_weight: weight of the squared distance of the outputs of every block, relative to the teacher's.

    Raises:
        ConfigError: an option makes no sense; the message names it.
    """

    teacher: Annotated[
        str | os.PathLike[str] | None,
        Option(
            "Learn from a model too: a directory, a hub id, or dense for the one that was pruned, as its certificate "
            "says.",
            TEACHER,
        ),
    ] = None
    teacher_bits: Annotated[
        int | None, Option("Load the teacher in 8 or 4 bits.", TEACHER, default="as it is stored")
    ] = None
    teacher_cache: Annotated[
        str | os.PathLike[str] | None, Option("What spp teacher-cache wrote, in place of a teacher.", TEACHER)
    ] = None
    ce_weight: Annotated[float, Option("Weight of the cross-entropy.", TEACHER)] = 1.0
    kl_weight: Annotated[float, Option("Weight of the divergence from the teacher, such as 0.7.", TEACHER)] = 0.0
    temperature: Annotated[float, Option("Temperature of that divergence.", TEACHER)] = 1.0
    hidden_weight: Annotated[
        float, Option("Weight of the relative distance from the teacher's hidden states.", TEACHER)
    ] = 0.0

    def __post_init__(self) -> None:
        for name in ("teacher", "teacher_cache"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_path(name, getattr(self, name)))
        for name in ("ce_weight", "kl_weight", "hidden_weight"):
            check_number(name, getattr(self, name), least=0.0)
        check_number("temperature", self.temperature, above=0.0)
        if self.teacher_bits is not None and (isinstance(self.teacher_bits, bool) or self.teacher_bits not in BITS):
            raise ConfigError(f"{arg('teacher_bits')} is {self.teacher_bits!r}; it must be 8 or 4")
        if self.teacher is not None and self.teacher_cache is not None:
            raise ConfigError(f"{arg('teacher')} and {arg('teacher_cache')} are two teachers: leave one of them out")
        if self.teacher_bits is not None and self.teacher is None:
            raise ConfigError(f"{arg('teacher_bits')} is {self.teacher_bits}, but {arg('teacher', ...)} is missing")
        if self.teacher_cache is not None:
            self._check_cache()
        if self.teacher is not None or self.teacher_cache is not None:
            self.require_weights(True)

    def _check_cache(self) -> None:
        if self.hidden_weight:
            raise ConfigError(
                f"{arg('hidden_weight')} is {self.hidden_weight}, but {arg('teacher_cache')} holds no hidden states: "
                f"leave it out, or name a model as {arg('teacher', ...)}"
            )
        if self.temperature != 1:
            raise ConfigError(
                f"{arg('temperature')} is {self.temperature}, but {arg('teacher_cache')} is exact at 1 only, as the "
                f"rest of its probabilities is one number: leave it out, or name a model as {arg('teacher', ...)}"
            )

    def require_weights(self, taught: bool) -> None:
        """Raise unless there are a teacher and weights of what it says, or neither.

        Args:
            taught: whether there is a teacher, here or in memory.
        """
        if taught and not (self.kl_weight or self.hidden_weight):
            raise ConfigError(
                f"there is a teacher, but {arg('kl_weight')} and {arg('hidden_weight')} are 0, so that nothing is "
                f"learned from it: pass {arg('kl_weight', 0.7)} and {arg('ce_weight', 0.3)}, or leave the teacher out"
            )
        if taught:
            return
        for one in fields(Distillation):
            value = getattr(self, one.name)
            if value != one.default:
                raise ConfigError(
                    f"{arg(one.name)} is {value!r}, but there is no teacher: pass {arg('teacher', 'dense')}, a "
                    f"directory, or {arg('teacher_cache', ...)}"
                )

    @property
    def distillation(self) -> dict[str, Any]:
        """These options by name."""
        return {one.name: getattr(self, one.name) for one in fields(Distillation)}


@dataclass(frozen=True, kw_only=True)
class TeacherCacheConfig:
    """The options of `spp teacher-cache`.

    Raises:
        ConfigError: an option makes no sense; the message names it.
    """

    model: Annotated[str, Option("Directory or hub id of the teacher: mostly the dense model.", argument=True)]
    output: Annotated[Path, Option("Directory to write the cache to.", argument=True)]
    data: Annotated[
        str | os.PathLike[str] | tuple[str | os.PathLike[str], ...],
        Option("Training data, as for spp tune; may be repeated.", DATA, many=True, parse=tuple),
    ]
    data_format: Annotated[str, Option("auto, text, alpaca or chat.", DATA, choices=DATA_FORMATS)] = "auto"
    data_split: Annotated[str, Option("Split of a hub dataset.", DATA)] = "train"
    text_field: Annotated[str, Option("Field of a row with plain text.", DATA)] = "text"
    block_length: Annotated[int, Option("Tokens of a training row.", DATA)] = 512
    completions_only: Annotated[bool, Option("Learn the answers only, not the prompts.", DATA, negatable=True)] = True
    bos: Annotated[str, BOS_OPTION] = "auto"
    top_k: Annotated[int, Option("Probabilities of a token that are kept; the rest is one number.", TEACHER)] = 64
    batch_size: Annotated[int, Option("Rows of one forward pass.", RUN)] = 4
    dtype: Annotated[
        str, Option("auto (the checkpoint's own), float32, bfloat16 or float16.", MODEL, choices=AUTO_DTYPES)
    ] = "auto"
    device: Annotated[str, Option("auto, cpu or cuda.", MODEL, choices=DEVICES)] = "auto"
    overwrite: Annotated[bool, Option("Replace an earlier cache.", RUN)] = False

    def __post_init__(self) -> None:
        check_path("model", self.model)
        files = self.data if isinstance(self.data, (tuple, list)) else (self.data,)
        if not files:
            raise ConfigError(f"{arg('data')} is empty; give at least one file or hub id")
        object.__setattr__(self, "data", tuple(check_path("data", one) for one in files))
        check_choice("data_format", self.data_format, DATA_FORMATS)
        check_choice("bos", self.bos, BOS)
        check_choice("dtype", self.dtype, AUTO_DTYPES)
        check_choice("device", self.device, DEVICES)
        check_int("block_length", self.block_length, least=2)
        for name in ("top_k", "batch_size"):
            check_int(name, getattr(self, name), least=1)
        check_flag("completions_only", self.completions_only)

    @property
    def data_files(self) -> tuple[str, ...]:
        """`data`, which always is a tuple of str once the config is made."""
        assert isinstance(self.data, tuple)
        return tuple(map(str, self.data))
