"""Commands that a launcher starts once a device: they work together, and the first of them prints and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from spp.distributed.ranks import is_first, world
from spp.errors import ConfigError

_TOGETHER = ("prune", "reconstruct", "tune")
_ALONE = ("compare", "run")
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def require_ranks(command: str | None) -> None:
    """Let the first of several ranks run a command that is for one process; the others end.

    Raises:
        ConfigError: the command trains by itself, and is for one process.
    """
    if world() == 1 or command is None or command in _TOGETHER:
        return
    if not is_first():
        raise SystemExit(0)
    if command in _ALONE:
        raise ConfigError(
            f"spp {command} runs in one process, and {world()} were started: start spp {command} alone; spp tune, "
            f"prune and reconstruct are for several"
        )
    for name in _LAUNCHED:
        os.environ.pop(name, None)


@contextmanager
def ranks() -> Iterator[None]:
    """Run a command as one rank of several, silent unless it is the first: a context manager, and a decorator.

    An error of one rank ends all: the first prints it.
    """
    if world() == 1:
        yield
        return
    from spp.distributed.sums import is_shared, joined, together

    try:
        with ExitStack() as stack:
            if not is_first():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            stack.enter_context(joined())
            stack.enter_context(together())
            yield
    except Exception as error:
        if is_shared(error) and not is_first():
            raise SystemExit(1) from error
        raise
