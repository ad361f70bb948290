"""Benchmarks that users run on their own machine: one file a question, all on the harness beside them.

`python -m spp.bench.step` or `spp bench step`: one training step of a whole model against PEFT's adapters.
`python -m spp.bench.memory` or `spp bench memory`: its memory, with the options that make it small.
`python -m spp.bench.layer` or `spp bench layer`: one training step of a linear layer, against the floor as well.
"""
