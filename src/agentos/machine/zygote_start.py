"""Entry of the zygote's interpreter (`python -I -S zygote_start.py FD`).

Makes a bare `agentos` package around the source directory, so that the zygote's few modules can be imported
without the package's public names, which would pull in asyncio and more into every VM's init.
"""

import os
import sys
import types

if __name__ == "__main__":
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    package = types.ModuleType("agentos")
    package.__path__ = [root]
    sys.modules["agentos"] = package
    from agentos.machine.zygote import main

    main(int(sys.argv[1]))
