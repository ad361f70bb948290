"""The cost of a contender's step against the reference's: its time in interleaved rounds, its peak memory.

One contender is measured in one fresh process: first its memory alone, then the reference beside it for the rounds.
Tokens are random; a step is forward, backward, AdamW. Mask updates, which come in one step of many, are not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from spp.comparing import measure
from spp.comparing.methods import adapt
from spp.comparing.trial import device_of
from spp.configs.comparing import REFERENCE, CompareConfig, Contender, parse_contender
from spp.errors import SPPError
from spp.training.loading import load_model

MEMORY_STEPS = 3  # the first makes the optimizer's state
WARMUP = 1


class _Step:
    """A contender and its training step."""

    def __init__(self, options: argparse.Namespace, contender: Contender) -> None:
        model = load_model(options.model, options.dtype).to(options.device)
        model.config.use_cache = False
        self.adapted = adapt(contender, model, 0, dense=options.dense)
        self.adapted.settle()
        self.model: Any = self.adapted.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch_size, options.block_length)
        self.tokens = torch.randint(model.config.vocab_size, shape, generator=generator).to(options.device)

    def __call__(self) -> None:
        """Take one."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()


def measure_cost(config: CompareConfig, contender: Contender) -> dict[str, Any]:
    """Return the entry of a contender, measured in a process of its own."""
    given: dict[str, Any] = {
        "model": config.model,
        "contender": contender.name,
        "batch-size": config.batch_size,
        "block-length": config.block_length,
        "dtype": config.dtype,
        "rounds": config.cost_rounds,
        "threads": torch.get_num_threads(),
        "device": device_of(config),
    }
    if config.dense is not None:
        given["dense"] = config.dense
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return measure.in_child("spp.comparing.cost", arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one contender and print the entry as JSON."""
    parser = argparse.ArgumentParser(prog="python -m spp.comparing.cost")
    for name in ("model", "contender", "dtype", "device"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--dense")
    for name in ("batch-size", "block-length", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    contender, reference = parse_contender(options.contender), parse_contender(REFERENCE)
    step = _Step(options, contender)
    memory = measure.measure_memory(step, calls=MEMORY_STEPS, device=options.device)
    steps = {reference.name: step if contender == reference else _Step(options, reference), contender.name: step}
    samples = measure.interleave(steps, rounds=options.rounds, warmup=WARMUP, device=options.device)
    row = measure.compare(samples)[contender.name]
    row |= {"peak_bytes": memory.peak, "rest_bytes": memory.rest, "trainable": step.adapted.trainable()}
    row["environment"] = measure.environment(options.device, next(step.model.parameters()).dtype).to_dict()
    print(json.dumps(row))


if __name__ == "__main__":
    try:
        main()
    except SPPError as error:
        sys.exit(f"error: {error}")
