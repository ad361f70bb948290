"""Several ranks of one test: processes forked from a server that has imported torch, transformers and spp once."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "torch.distributed.fsdp", "transformers", "accelerate", "spp.training", "spp.cli.main", __name__)


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its result, or its error as text, and all that it printed.

    `code` is the process's exit code: negative for a signal, None if it ran beyond the time limit and was killed.
    """

    value: Any
    error: str
    output: str
    code: int | None


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *arguments: object,
    limit: float = 60.0,
    group: bool = True,
    delays: Sequence[float] = (),
    env: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Call `function(rank, *arguments)` in `world` processes of one gloo group, one thread each.

    `function` and its arguments are pickled: a function at the top of a test file. With `group=False` only the
    launcher's environment variables (RANK, WORLD_SIZE, MASTER_ADDR, …) are set, and the function makes the group,
    as a command does under torchrun. `delays` are the seconds by which each rank starts late. Ranks are killed after
    `limit` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        processes = []
        for rank in range(world):
            launch = _environment(rank, world, port) | dict(env or {})
            delay = delays[rank] if rank < len(delays) else 0.0
            target = (function, arguments, launch, group, delay, str(Path(folder, str(rank))))
            processes.append(context.Process(target=_rank, args=target))
        for process in processes:
            process.start()
        end = time.monotonic() + limit
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        return [_outcome(process, Path(folder, str(rank))) for rank, process in enumerate(processes)]


def values_of_ranks(function: Callable[..., Any], world: int, *arguments: object, **options: Any) -> list[Any]:
    """Return what each rank returned; all have to end well. Arguments as those of `run_ranks`."""
    outcomes = run_ranks(function, world, *arguments, **options)
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0 and not outcome.error, (
            f"rank {rank}: {outcome.code}\n{outcome.error}\n{outcome.output}"
        )
    return [outcome.value for outcome in outcomes]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank, and what keeps it on the CPU and off the network."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _rank(
    function: Callable[..., Any],
    arguments: tuple[object, ...],
    env: dict[str, str],
    group: bool,
    delay: float,
    where: str,
) -> None:
    import torch

    time.sleep(delay)
    os.environ.update(env)
    log = os.open(f"{where}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    error, value, code = "", None, 0
    try:
        if group:
            torch.distributed.init_process_group("gloo")
        value = function(int(env["RANK"]), *arguments)
        if group:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        error, code = traceback.format_exc(), 1
    torch.save((value, error), f"{where}.out")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process group that hangs in its destructor would hold the test


def _outcome(process: Any, where: Path) -> Outcome:
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    import torch

    out, log = Path(f"{where}.out"), Path(f"{where}.log")
    value, error = torch.load(out, weights_only=False) if out.exists() else (None, "")
    return Outcome(value, error, log.read_text(errors="replace") if log.exists() else "", code)
