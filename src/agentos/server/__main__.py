"""`python -m agentos.server`: the default registry, for a try and for tests."""

from __future__ import annotations

import argparse
import os

from agentos.registry import agent_os, setup
from agentos.server.serve import DEFAULT_HOST, DEFAULT_PORT, serve


def main() -> None:
    """Serve VMs of the default kind under the name `vm`."""
    parser = argparse.ArgumentParser(prog="python -m agentos.server")
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--token", default=os.environ.get("AGENTOS_TOKEN"))
    parser.add_argument("--sleep-after", type=float, default=900.0)
    parser.add_argument("--pool", type=int, default=None)
    options = parser.parse_args()
    registry = setup(use={"vm": agent_os(sleep_after=options.sleep_after)})
    serve(registry, options.host, options.port, options.data_dir, options.token, options.pool)


if __name__ == "__main__":
    main()
