"""Entry of the interpreters of the zygote and the seed (`python -I -S start.py MODULE FD...`).

Makes a bare `agentos` package around the source directory, so that their few modules can be imported
without the package's public names, which would pull in asyncio and more into every VM's init.
"""

import importlib
import os
import sys
import types

if __name__ == "__main__":
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    package = types.ModuleType("agentos")
    package.__path__ = [root]
    sys.modules["agentos"] = package
    importlib.import_module(f"agentos.machine.{sys.argv[1]}").main(*map(int, sys.argv[2:]))
