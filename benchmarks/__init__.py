"""Benchmarks to run on your own machine, from a checkout: one file a question; --help has the options of each.

    python -m benchmarks.step      one training step of a whole model against PEFT's adapters
    python -m benchmarks.memory    its memory, with the options that make it small
    python -m benchmarks.layer     one training step of a linear layer, against the floor as well
    python -m benchmarks.prune     pruning, against the forward passes that it cannot avoid
    python -m benchmarks.merge     a merge on disk, against a plain copy of the files
    python -m benchmarks.gpu       every GPU kernel against float64, and a layer's training step on a GPU
    python -m benchmarks.imports   the time of `import spp`

They measure as `spp compare` does (spp.comparing.measure).
"""
