"""Commands that a launcher starts several times: one run of all, written and told of once; what ends one ends all."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from spp.cli.main import main
from tests.cli.conftest import LINES
from tests.helpers.ranks import Outcome, run_ranks

STEPS = 4


def program(rank: int, of_rank: Sequence[Sequence[str]]) -> None:
    """Call `spp ARGUMENTS`, each rank with its own."""
    sys.argv = ["spp", *of_rank[min(rank, len(of_rank) - 1)]]
    main()


def program_stopped(rank: int, arguments: Sequence[str], run: str) -> None:
    """The same; rank 1 gets a SIGTERM once two steps are logged."""

    def stop() -> None:
        log = Path(run, "log.jsonl")
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    if rank == 1:
        threading.Thread(target=stop, daemon=True).start()
    program(rank, [arguments])


def program_sharded(rank: int, arguments: Sequence[str]) -> None:
    """The same, with what accelerate launch sets for FSDP2."""
    from tests.helpers.fsdp import choose_engine

    choose_engine(True)
    os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"})
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    program(rank, [arguments])


def program_failing(rank: int, arguments: Sequence[str], killed: bool) -> None:
    """The same; rank 1 fails, or dies, in its third step."""
    from spp.training import SPPTrainer

    step, calls = SPPTrainer.training_step, [0]

    def failing(self: Any, *rest: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3 and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if calls[0] == 3:
            raise ValueError("no third step")
        return step(self, *rest, **options)

    if rank == 1:
        SPPTrainer.training_step = failing
    program(rank, [arguments])


def launch(world: int, *of_rank: Sequence[object], delays: Sequence[float] = (), limit: float = 60.0) -> list[Outcome]:
    each = [[str(word) for word in words] for words in of_rank]
    return run_ranks(program, world, each, group=False, delays=delays, limit=limit)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\n\n".join(LINES), encoding="utf-8")
    return path


def tuning(pruned: Path, run: Path, text: Path, *more: object) -> list[object]:
    base = ["tune", pruned, run, "--data", text, "--block-length", 32, "--window", 32, "--lr", "1e-2"]
    return [*base, "--log-every", 1, "--save-every", 2, *more]


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_well(outcomes: Sequence[Outcome]) -> None:
    told = "\n".join(f"rank {i}: {one.code}\n{one.error}\n{one.output}" for i, one in enumerate(outcomes))
    assert [one.code for one in outcomes] == [0] * len(outcomes), told


def test_two_ranks_are_one_run(pruned: Path, text: Path, tmp_path: Path) -> None:
    """A late rank waits; one line a step, one table; the steps and losses of one process with the whole batch."""
    two, one = tmp_path / "two", tmp_path / "one"
    words = tuning(pruned, two, text, "--batch-size", 2, "--epochs", 0.2)
    outcomes = launch(2, words, delays=(0.0, 2.0))
    assert_well(outcomes)
    assert outcomes[0].output.count("perplexity before") == 1 and "wrote" in outcomes[0].output
    assert outcomes[1].output == ""
    (alone,) = launch(1, tuning(pruned, one, text, "--batch-size", 4, "--epochs", 0.2))
    assert_well([alone])
    found, expected = log_of(two), log_of(one)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    assert [entry["lr"] for entry in found] == [entry["lr"] for entry in expected]
    for a, b in zip(found[:-1], expected[:-1], strict=True):  # the last batch of an epoch may be filled up
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    measured = [json.loads((run / "eval.json").read_text()) for run in (two, one)]
    assert measured[0]["before"]["perplexity"] == measured[1]["before"]["perplexity"]
    assert json.loads((two / "config.json").read_text())["ranks"] == 2

    again = launch(2, words)
    assert [outcome.code for outcome in again] == [1, 1]
    assert "holds an earlier run" in again[0].output and again[1].output == ""


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step(pruned: Path, text: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = [str(w) for w in tuning(pruned, run, text, "--batch-size", 1, "--steps", 60)]
    outcomes = run_ranks(program_stopped, 2, words, str(run), group=False)
    assert [outcome.code for outcome in outcomes] == [130, 130], outcomes
    steps = {path.name for path in (run / "checkpoints").iterdir()}
    last = max(int(name.rpartition("-")[2]) for name in steps)
    assert f"after step {last}" in outcomes[0].output and outcomes[1].output == ""
    assert_well(launch(1, [*tuning(pruned, run, text, "--batch-size", 2, "--steps", 60), "--resume"]))  # on one rank
    assert_well(launch(2, tuning(pruned, whole, text, "--batch-size", 1, "--steps", 60)))
    found, expected = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, whole))
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name
    three = launch(2, [*tuning(pruned, run, text, "--batch-size", 3, "--steps", 60), "--resume"])
    assert [outcome.code for outcome in three] == [1, 1] and "batch-size" in three[0].output


@pytest.mark.slow
def test_what_fails_on_one_rank_ends_all(pruned: Path, text: Path, tmp_path: Path) -> None:
    good, run = tuning(pruned, tmp_path / "run", text, "--batch-size", 1, "--steps", 2), tmp_path / "run"
    bad = [tmp_path / "missing.txt" if word is text else word for word in good]
    outcomes = launch(2, good, bad)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert "missing.txt" in outcomes[0].output and "Traceback" not in outcomes[0].output
    assert not run.exists()

    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(reversed(LINES)), encoding="utf-8")
    outcomes = launch(2, good, [other if word is text else word for word in good])
    assert [outcome.code for outcome in outcomes] == [1, 1] and "rank 1 has read other" in outcomes[0].output


@pytest.mark.slow
def test_fsdp_is_ddp(pruned: Path, text: Path, tmp_path: Path) -> None:
    """The same adapter and perplexities, and a checkpoint that one process goes on from."""
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    assert_well(launch(2, tuning(pruned, ddp, text, "--batch-size", 1, "--steps", STEPS)))
    words = [str(word) for word in tuning(pruned, fsdp, text, "--batch-size", 1, "--steps", STEPS)]
    outcomes = run_ranks(program_sharded, 2, words, group=False)
    assert_well(outcomes)
    assert outcomes[1].output == ""
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (ddp / name).read_bytes() == (fsdp / name).read_bytes(), name
    found, expected = (json.loads((run / "eval.json").read_text()) for run in (fsdp, ddp))
    assert found["after"]["perplexity"] == pytest.approx(expected["after"]["perplexity"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "told"), [(False, "rank 1: no third step"), (True, "was lost")])
def test_a_failing_step_ends_all(killed: bool, told: str, pruned: Path, text: Path, tmp_path: Path) -> None:
    """Rank 0 is in the midst of a sum then; what was saved stays, and the run goes on from there."""
    words = [str(w) for w in tuning(pruned, tmp_path / "run", text, "--batch-size", 1, "--steps", 4)]
    outcomes = run_ranks(program_failing, 2, words, killed, group=False)
    assert [outcome.code for outcome in outcomes] == [1, -9 if killed else 1], outcomes
    assert f"error: {told}" in outcomes[0].output or told in outcomes[0].output
    assert "Traceback" not in outcomes[0].output and outcomes[1].output == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert_well(launch(2, [*words, "--resume"]))


@pytest.mark.slow
def test_commands_of_one_process(pruned: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    outcomes = launch(2, ["inspect", pruned])
    assert_well(outcomes)
    assert "2:4" in outcomes[0].output and outcomes[1].output == ""
    outcomes = launch(2, ["compare", dense, tmp_path / "study", "--data", text])
    assert [outcome.code for outcome in outcomes] == [1, 0] and "one process" in outcomes[0].output


@pytest.mark.slow
def test_pst(dense: Path, text: Path, tmp_path: Path) -> None:
    words = tuning(dense, tmp_path / "run", text, "--batch-size", 1, "--steps", STEPS, "--method", "pst")
    assert_well(launch(2, [*words, "--pattern", "2:4", "--lr", "1e-3"]))
    assert len(log_of(tmp_path / "run")) == STEPS
