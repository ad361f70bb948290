"""How long `import spp` takes, beside the import of the packages that it stands on.

    python -m benchmarks.imports --rounds 9

Each import runs in a fresh interpreter; the two take turns, and the time is the children's, processor and wall.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import harness
from spp.report import Table

IMPORTS = {"spp": "import spp", "what it stands on": "import torch, transformers, safetensors, accelerate"}


def time_import(statement: str) -> harness.Sample:
    """Run one import statement in a fresh interpreter."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return harness.Sample(time.perf_counter() - start, process)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = harness.parser("imports", "Time `import spp`.")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds, after one that is not (default: 9)")
    rounds = parser.parse_args(arguments).rounds
    samples: dict[str, list[harness.Sample]] = {name: [] for name in IMPORTS}
    for index in range(rounds + 1):
        for name, statement in IMPORTS.items():
            sample = time_import(statement)
            if index:
                samples[name].append(sample)
    reference = samples["what it stands on"]
    rows = []
    for name, found in samples.items():
        wall = harness.spread([s.wall for s in found])
        ratios = [str(harness.ratio(found, reference, clock)) for clock in ("wall", "process")]
        rows.append((name, f"{wall.median:.2f} s", *ratios))
    columns = ("import", "wall", "this / what it stands on", "processor time")
    print(Table("import time; median (p20 … p80)", columns, tuple(rows)).text())
    print(harness.environment("cpu", torch.float32).line)


if __name__ == "__main__":
    harness.exiting(main)
