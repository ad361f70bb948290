"""`python -m spp`: the same program as `spp`."""

from __future__ import annotations

from spp.cli.main import main

if __name__ == "__main__":
    main()
