"""What a benchmark does in a fresh process, done here: a new process takes seconds to import what is imported here."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock


def run_here(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m module arguments` in this process; otherwise as `harness.in_child`."""
    printed = io.StringIO()
    with warnings.catch_warnings(), mock.patch.object(sys, "argv", [module, *arguments]):
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        with contextlib.redirect_stdout(printed):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    found: dict[str, Any] = json.loads(printed.getvalue().splitlines()[-1])
    return found
