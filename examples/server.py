"""A server of VMs: `python examples/server.py`, then the programs in examples/client and examples/typescript.

`agentos serve --port 6420 server:registry`, from this directory, serves the same.
"""

import os

from agentos import Limits, agent_os, setup

DEV_SERVER = """
const http = require("http");
http.createServer((request, response) => response.end("hello from the VM\\n"))
    .listen(3000, "127.0.0.1", () => console.log("listening on 3000"));
"""

registry = setup(
    use={
        "vm": agent_os(
            files={"server.js": DEV_SERVER},  # what a new VM starts with, in /home/agentos
            env={"LANG": "C.UTF-8"},
            limits=Limits(memory_bytes=512 * 2**20, processes=200),
            sleep_after=15 * 60,  # files are kept; the next call wakes it
        )
    }
)

if __name__ == "__main__":
    registry.start(
        port=int(os.environ.get("PORT", "6420")),
        data_dir=os.environ.get("AGENTOS_DATA_DIR"),  # None: ~/.local/share/agentos
    )
