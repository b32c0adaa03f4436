"""The same without async and await."""

import os

from agentos.sync import create_client

ENDPOINT = os.environ.get("AGENTOS_ENDPOINT", "http://localhost:6420")

with create_client(ENDPOINT) as client:
    agent = client.vm.get_or_create("python-blocking")
    print(agent.exec("echo hello from $HOSTNAME").stdout, end="")

    process = agent.spawn("bash", ["-c", "for i in 1 2 3; do echo line $i; done; exit 3"])
    for chunk in process.output():
        print(chunk.stream, chunk.data)
    print("exit code:", process.wait())

    agent.files.write_file("notes/today.txt", "buy milk\n")
    print(agent.files.readdir("notes"), agent.files.read_file("notes/today.txt"))
