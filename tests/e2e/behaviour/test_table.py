"""The table of verbs: whole, the same on every surface, by both names of each verb."""

from __future__ import annotations

import time
from typing import Any

import httpx
from surfaces import REMOTE, VERBS, Surface, camel, fails

from agentos.actions import ACTIONS


def test_the_table_is_whole() -> None:
    """A verb that the product has and this suite does not know would be tested nowhere."""
    known = {**VERBS, **REMOTE}
    assert {one.method for one in ACTIONS} == set(known)
    for action in ACTIONS:
        verb = known[action.method]
        assert (action.name, action.aliases) == (verb.wire, (verb.nested,) if verb.nested else ())
        assert tuple(camel(one.name) for one in action.params) == tuple(camel(one) for one in verb.positional)


async def every_verb(vm: Surface) -> None:
    """Each verb once, with an effect that shows."""
    assert (await vm.exec("echo hello && ls /home/agentos")).stdout == "hello\n"
    assert (await vm.exec_file("printf", ["%s", "$HOME"])).stdout == "$HOME"
    process = await vm.spawn("cat", [])
    await vm.write_process_stdin(process.pid, "hello from stdin\n")
    await vm.close_process_stdin(process.pid)
    assert await vm.wait_process(process.pid) == 0
    page = await vm.read_process_output(process.pid)
    assert [(one.stream, one.data) for one in page.events] == [("stdout", b"hello from stdin\n")]
    assert [one.pid for one in await vm.list_processes()] == [process.pid]
    assert (await vm.get_process(process.pid)).exit_code == 0

    for end, verb, more in (
        (143, vm.stop_process, ()),
        (137, vm.kill_process, ()),
        (130, vm.signal_process, ("SIGINT",)),
    ):
        sleep = await vm.spawn("sleep", ["1000"])
        assert sleep.pid in [one.pid for one in await vm.all_processes()]
        assert sleep.pid in [one.process.pid for one in await vm.process_tree()]
        await verb(sleep.pid, *more)
        assert await vm.wait_process(sleep.pid) == end

    shell = await vm.open_shell(cols=101, rows=33)
    assert [(one.shell_id, one.cols, one.rows) for one in await vm.list_shells()] == [
        (shell.shell_id, 101, 33)
    ]
    await vm.resize_shell(shell.shell_id, 120, 40)
    await vm.write_shell(shell.shell_id, "stty size; exit 5\n")
    assert await vm.wait_shell(shell.shell_id) == 5
    shown = await vm.read_shell(shell.shell_id)
    assert b"40 120" in b"".join(one.data for one in shown.events)
    await vm.close_shell(shell.shell_id)


async def every_file_verb(vm: Surface) -> None:
    """The same for files."""
    await vm.mkdir("notes/deep")
    await vm.write_file("notes/a", b"\x00\xff")
    assert await vm.read_file("notes/a") == b"\x00\xff"
    written = await vm.write_files({"notes/b": "b", "notes/c": b"c"})
    assert [(one.path, one.error) for one in written] == [("notes/b", None), ("notes/c", None)]
    read = await vm.read_files(["notes/b", "notes/c"])
    assert [(one.path, one.content) for one in read] == [("notes/b", b"b"), ("notes/c", b"c")]
    assert (await vm.stat("notes/a")).size == 2
    await vm.set_stat("notes/b", mode=0o640, mtime=1234567890.5)
    about = await vm.stat("notes/b")
    assert (about.mode, about.mtime) == (0o640, 1234567890.5)
    await vm.symlink("../elsewhere", "notes/link")
    assert (await vm.stat("notes/link")).target == "../elsewhere"
    await vm.delete_file("notes/link")
    assert await vm.readdir("notes") == ["a", "b", "c", "deep"]
    entries = await vm.readdir_entries("notes")
    assert [(one.name, one.type) for one in entries] == [
        ("a", "file"), ("b", "file"), ("c", "file"), ("deep", "directory"),
    ]  # fmt: skip
    await vm.move("notes/c", "notes/deep/d")
    found = [one.path for one in await vm.readdir_recursive("notes")]
    assert found == [f"/home/agentos/notes/{one}" for one in ("a", "b", "deep", "deep/d")]
    await vm.delete_file("notes/deep", recursive=True)
    assert (await vm.exists("notes/deep"), await vm.exists("notes/a")) == (False, True)


def test_every_verb(on: Any) -> None:
    """By its own name."""

    async def body(vm: Surface) -> None:
        await every_verb(vm)
        await every_file_verb(vm)
        assert vm.asked == set(VERBS)

    on(body)


def test_every_nested_name(on: Any) -> None:
    """`process.exec` is `exec`, `terminal.open` is `openShell`, and so on for all that have one."""

    async def body(vm: Surface) -> None:
        nested = vm.nested()
        await every_verb(nested)
        assert nested.asked == {name for name, verb in VERBS.items() if verb.nested}

    on(body)


def test_the_verbs_of_a_remote_vm(on_remote: Any) -> None:
    """A request to a server inside, and the VM's destruction, after which the key leads to a new one."""

    async def body(vm: Surface) -> None:
        server = await vm.spawn("python3", ["-u", "-c", SERVER])
        await vm.until(server.pid, b"ready")
        answer = await vm.fetch(3000, "/a?b=c", method="PUT", headers={"x-mine": "1"}, body="ping")
        assert (answer.status, answer.status_text, answer.headers["x-path"]) == (201, "Made", "/a?b=c")
        assert answer.body == b"PUT 1 ping"
        preview = await vm.create_preview(3000, expires_in=60, path="/p?q=r")
        assert preview.url.endswith(f"/preview/{preview.token}/p?q=r")
        again = await vm.nested().create_preview(3000, expires_in=60, path="/p?q=r")
        assert again.token != preview.token or again.expires_at == preview.expires_at
        assert 0 < preview.expires_at - time.time() < 61
        async with httpx.AsyncClient() as anybody:
            answer = await anybody.put(preview.url, content="pong", headers={"x-mine": "2"})
        assert (answer.status_code, answer.text, answer.headers["x-path"]) == (201, "PUT 2 pong", "/p?q=r")
        await vm.write_file("kept", "x")
        await vm.destroy()
        assert vm.asked >= set(REMOTE)

    on_remote(body)


def test_a_port_that_does_not_answer_in_http(on_remote: Any) -> None:
    """Whatever it says and whatever was asked, the request has an end, and the server answers on."""

    async def body(vm: Surface) -> None:
        process = await vm.spawn("python3", ["-u", "-c", NO_HTTP])
        await vm.until(process.pid, rb"ready")
        for method, headers in (("CONNECT", {}), ("GET", {"Connection": "upgrade", "Upgrade": "x"})):
            with fails("vm.fetch_failed", "switched to another protocol"):
                await vm.fetch(3001, "/switch", method=method, headers=headers)
        with fails("vm.fetch_failed", "port 3001"):
            await vm.fetch(3001, "/garbage")
        with fails("request.invalid", "url"):
            await vm.fetch(3001, "http://[")
        assert (await vm.fetch(3001, "path?a=b")).body == b"GET /path?a=b HTTP/1.1"

    on_remote(body)


NO_HTTP = """
import socket
listener = socket.create_server(("127.0.0.1", 3001))
print("ready")
while True:
    peer, _ = listener.accept()
    line = peer.recv(65536).partition(b"\\r\\n")[0]
    if line.startswith(b"CONNECT"):
        peer.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
    elif b"/switch" in line:
        peer.sendall(b"HTTP/1.1 101 Switching\\r\\nUpgrade: x\\r\\nConnection: upgrade\\r\\n\\r\\nx")
    elif b"/garbage" in line:
        peer.sendall(b"hello\\r\\n\\r\\n")
    else:
        peer.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(line), line))
    peer.close()
"""

SERVER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_PUT(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(201, "Made")
        self.send_header("x-path", self.path)
        self.end_headers()
        self.wfile.write(b"PUT " + self.headers["x-mine"].encode() + b" " + body)
    def log_message(self, *args):
        pass
server = http.server.HTTPServer(("127.0.0.1", 3000), Handler)
print("ready")
server.serve_forever()
"""
