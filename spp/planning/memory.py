"""The bytes that a step takes on one device.

T = batch · tokens of a device, h, i, V, L as in ModelShape, k the width of a token's keys, f the bytes of the model's
dtype, w the devices that share (1 where each holds all), P the parameters of the adapter:

    weights     Σ bytes of the frozen weights / w                      w with FSDP2, ZeRO-3
    adapter     4·P / w
    gradients   4·P / w, twice with DDP, which sums them in buckets    w with FSDP2, ZeRO-2, ZeRO-3
    optimizer   8·P / w: two moments of AdamW                          w with FSDP2, ZeRO-2, ZeRO-3
    block       4·T·2h + f·T·(h + h + 2k + h + h + 4i): inputs of the norms, which compute in float32; input of q, k, v;
                q, k, v, what attention gives; input of gate and up, these, silu, their product
    saved       L·block + 4·T·h + 4·T·V; with checkpointing L·f·T·h + 4·T·h + 4·T·V and one block; with a loss in
                chunks of c tokens 4·c·V for 4·T·V
    head        8·T·V: logits and their gradient beside what is saved; 8·c·V in chunks
    workspace   W_eff of one layer, as the model's dtype, and a block of G
    units       where weights are sharded, what is outside the blocks, and two blocks: that which computes, and the next

LoRA saves X A too, and under a 16-bit model a float32 copy of the input of every projection, since PEFT keeps its
matrices in float32. Full fine-tuning saves what the norms' scales and the head multiply, and where weights are sharded
it holds the gradients of a whole unit.

With checkpointing the head's tensors are gone when the first block is computed again: the larger of the two counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from spp.configs.adapter import SPPConfig
from spp.configs.pattern import Pattern
from spp.configs.planning import DTYPES, PlanConfig, parse_size
from spp.files.tables import Table, byte_text
from spp.planning.shape import ModelShape, read_config, shape_of
from spp.rules import get_rule
from spp.weights.packed.layout import Layout

_WHOLE = ("none", "ddp", "zero2")  # strategies in which each device holds all weights
_NF4_BLOCK, _INT8_SCALE = 64, 4  # weights that share a scale of four bytes; bytes of a row's scale
_LORA_R = 8
_LARGEST_BATCH = 1 << 20
_BLOCK_ELEMENTS = 1 << 22  # of G that are made at a time, at most
_MEASURED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")  # tests/planning


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by kind; see the head of the file."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    saved: int
    head: int
    workspace: int
    units: int

    @property
    def total(self) -> int:
        """The bytes of a step at its peak."""
        return sum(vars(self).values())

    def to_dict(self) -> dict[str, int]:
        """Return the kinds and the total."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class Plan:
    """The memory that a training takes.

    Attributes:
        config: what was asked.
        shape: of the model.
        memory: of the adapter's training.
        lora: of LoRA's on the dense weights (r = 8, every projection), in the same strategy.
        full: of full fine-tuning in the model's dtype.
        largest_batch: rows that fit the memory asked for, of each of the three; None where none was asked for, 0 where
            not even one fits.
    """

    config: PlanConfig
    shape: ModelShape
    memory: Memory
    lora: Memory
    full: Memory
    largest_batch: tuple[int, int, int] | None

    @property
    def command(self) -> str:
        """The command line that starts it."""
        tune = f"spp tune {self.config.model} run --data DATA --batch-size {self.config.batch_size}"
        tune += f" --block-length {self.config.block_length}"
        tune += f" --dtype {self.config.dtype}"
        given = (("rule", SPPConfig.rule), ("r", SPPConfig.r), ("loss_chunk", None))
        for name, default in given:
            if (value := getattr(self.config, name)) != default:
                tune += f" --{name.replace('_', '-')} {value}"
        if self.config.gradient_checkpointing:
            tune += " --gradient-checkpointing"
        if self.config.strategy == "none":
            return tune
        file = f"examples/distributed/{self.config.strategy}.yaml"
        return f"accelerate launch --config_file {file} --num_processes {self.config.world} -m {tune}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what the figures leave out, and on what was not measured."""
        notes = ["These are allocations of torch: leave some room for its libraries and for fragments."]
        if self.shape.name not in _MEASURED:
            notes.append(
                f"Activations are counted as those of a Llama block. {self.shape.name} was not measured: other norms, "
                "eager attention, dropout or shared experts keep more (twice as much was seen), plain feed-forward "
                "parts less."
            )
        if self.config.strategy in ("zero2", "zero3"):
            notes.append("The buckets of DeepSpeed (reduce_bucket_size and what it prefetches) are not counted.")
        if self.config.weights in ("int8", "nf4") and self.config.strategy in ("fsdp", "zero3"):
            notes.append(f"Weights in {self.config.weights} have not been sharded yet: a share of them is assumed.")
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        batches = dict(zip(("adapter", "lora", "full"), self.largest_batch or (), strict=False))
        asked = {name: getattr(self.config, name) for name in ("model", "pattern", "world", "strategy", "memory")}
        asked |= {name: getattr(self.config, name) for name in ("weights", "dtype", "batch_size", "block_length")}
        return {
            **asked,
            "notes": list(self.notes),
            "parameters": self.shape.parameters,
            "adapter": self.memory.to_dict(),
            "lora": self.lora.to_dict(),
            "full": self.full.to_dict(),
            "largest_batch": batches or None,
            "command": self.command,
        }

    def table(self) -> Table:
        """Return the bytes of each kind, of the adapter, of LoRA and of full fine-tuning."""
        what = self.config
        title = (
            f"{self.shape.name}, {self.shape.parameters / 1e9:.2f}B parameters, {what.weights} {what.dtype}, each of "
            f"{what.world} × {what.strategy}: {what.batch_size} × {what.block_length} tokens"
        )
        kinds = {
            "weights": "weights",
            "adapter": "trained beside them",
            "gradients": "gradients",
            "optimizer": "optimizer",
            "saved": "saved for backward",
            "head": "logits",
            "workspace": "workspace",
            "units": "units made whole",
            "total": "total",
        }
        columns = (self.memory.to_dict(), self.lora.to_dict(), self.full.to_dict())
        rows = [(text, *(byte_text(one[kind]) for one in columns)) for kind, text in kinds.items()]
        if self.largest_batch is not None:
            rows.append((f"largest batch in {what.memory}", *map(str, self.largest_batch)))
        return Table(title, ("bytes of a device", what.rule, "LoRA, dense", "full, dense"), tuple(rows))

    def _repr_html_(self) -> str:
        """Return the table, for notebooks."""
        return self.table().html()


def plan(config: PlanConfig, shape: ModelShape | None = None) -> Plan:
    """Return what a training takes on each device; nothing is loaded.

    Args:
        config: the options.
        shape: of the model; None reads `config.model`.

    Returns:
        The plan. It states allocations: a device needs some room beyond them for its libraries and for fragments.

    Raises:
        ConfigError: the model's config does not say what memory depends on.
        CheckpointError: there is no config.

    Example:
        >>> plan(PlanConfig(model="llama-7b.json", world=8, strategy="fsdp")).memory.total  # doctest: +SKIP
        9713233920
    """
    shape = shape_of(read_config(config.model)) if shape is None else shape
    kinds: tuple[Callable[[PlanConfig, ModelShape], Memory], ...] = (adapter_memory, lora_memory, full_memory)
    memory, lora, full = (kind(config, shape) for kind in kinds)
    largest = None
    if config.memory is not None:
        limit = parse_size(config.memory)
        first, second, third = (_largest_batch(kind, config, shape, limit) for kind in kinds)
        largest = (first, second, third)
    return Plan(config, shape, memory, lora, full, largest)


def adapter_memory(config: PlanConfig, shape: ModelShape) -> Memory:
    """Return what training the adapter takes."""
    rule = get_rule(config.rule)
    r = 1 if config.rule == "full" else config.r
    trained = sum(a * b for m, n in shape.projections for a, b in rule.shapes(m, n, min(r, rule.largest_rank(m, n))))
    weights, block = _frozen(config, shape, config.weights)
    return _memory(config, shape, weights, block, 4 * trained, 4 * trained, 8 * trained, extra=0)


def lora_memory(config: PlanConfig, shape: ModelShape) -> Memory:
    """Return what LoRA takes: r = 8 on every projection of the dense model, in float32 as PEFT makes it."""
    trained = sum(_LORA_R * (m + n) for m, n in shape.projections)
    wide = DTYPES[config.dtype] < 4  # then PEFT makes a float32 copy of each input
    extra = 4 * sum(_LORA_R + (n if wide else 0) for _, n in _per_token(shape))
    weights, block = _frozen(config, shape, "dense")
    return _memory(config, shape, weights, block, 4 * trained, 4 * trained, 8 * trained, extra=extra)


def full_memory(config: PlanConfig, shape: ModelShape) -> Memory:
    """Return what full fine-tuning takes: gradients and both moments in the model's dtype."""
    size = DTYPES[config.dtype] * shape.parameters
    weights, block = _frozen(config, shape, "dense")
    extra = 2 * shape.hidden * DTYPES[config.dtype]
    return _memory(config, shape, weights, block, 0, size, 2 * size, extra=extra)


def _memory(
    config: PlanConfig,
    shape: ModelShape,
    weights: int,
    block_weights: int,
    adapter: int,
    gradients: int,
    optimizer: int,
    *,
    extra: int,
) -> Memory:
    """Add up.

    Args:
        weights, block_weights: of the model, and of its largest block.
        adapter, gradients, optimizer: of one device that holds all; no adapter means that the model itself trains.
        extra: bytes that are saved for a token in a block beyond the formula.
    """
    f, tokens = DTYPES[config.dtype], config.batch_size * config.block_length
    h, length = shape.hidden, shape.blocks
    whole = config.strategy in _WHOLE
    shared = 1 if whole else config.world
    states = config.world if config.strategy in ("fsdp", "zero2", "zero3") else 1
    wide = min(config.loss_chunk or tokens, tokens) * shape.vocabulary
    block = f * (4 * h + 2 * shape.keys + 4 * shape.inner + (shape.routed - 1) * h) + 4 * 2 * h + extra
    block *= tokens
    last, soft, head = (4 if adapter else 4 + 2 * f) * tokens * h, 4 * wide, 2 * 4 * wide
    if config.gradient_checkpointing:
        saved = length * f * tokens * h + last + soft
        head = max(head, block - soft)
    else:
        saved = length * block + last + soft
    largest = max((m * n for m, n in shape.projections), default=0)
    bucket = 2 if config.strategy == "ddp" else 1
    units = 2 * block_weights + shape.outside * f
    if not adapter:
        units += shape.largest_block * f + shape.outside * f
    return Memory(
        weights=weights // shared,
        adapter=adapter // shared,
        gradients=bucket * gradients // states,
        optimizer=optimizer // states,
        saved=saved,
        head=head,
        workspace=f * largest + 4 * min(largest, _BLOCK_ELEMENTS) if adapter else 0,
        units=0 if whole or config.world == 1 else units,
    )


def _frozen(config: PlanConfig, shape: ModelShape, form: str) -> tuple[int, int]:
    """Return the bytes of the model, whose projections have a form, and of its largest block."""
    counts = Counter(shape.projections).items()  # experts and blocks have few shapes
    matrices = sum(count * _matrix(config, m, n, form) for (m, n), count in counts)
    values = sum(count * m * n for (m, n), count in counts)
    block = int(shape.largest_block * matrices / values) if values else 0
    return matrices + shape.others * DTYPES[config.dtype], block


def _matrix(config: PlanConfig, m: int, n: int, form: str) -> int:
    """Return the bytes of a matrix in one of the forms."""
    size = DTYPES[config.dtype]
    if form == "packed":
        kept = m * n - round(Pattern.parse(config.pattern).sparsity * m * n)
        return Layout.of(m, n, config.pattern).nbytes(kept, size)
    if form == "int8":
        return m * n + m * _INT8_SCALE
    if form == "nf4":
        return -(-m * n // 2) + 4 * -(-m * n // _NF4_BLOCK)
    return m * n * size


def _per_token(shape: ModelShape) -> list[tuple[int, int]]:
    """Return the matrices of a block that a token passes."""
    return list(shape.projections[: max(1, len(shape.projections) // shape.blocks)])[: 7 + 3 * (shape.routed - 1)]


def _largest_batch(
    kind: Callable[[PlanConfig, ModelShape], Memory], config: PlanConfig, shape: ModelShape, limit: int
) -> int:
    """Return the most rows whose step fits into `limit` bytes."""

    def fits(rows: int) -> bool:
        return kind(replace(config, batch_size=rows), shape).total <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
