"""Real programs, as people run them: git, make, pip, node, dpkg, pipelines and trees of processes."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import zipfile
from typing import Any

from e2e_support import Transcript, as_root, commands, needs_program

from agentos import VM
from agentos.model import ProcessTreeNode


async def ok(vm: VM, script: str, **options: Any) -> str:
    """What a script printed, that must succeed."""
    result = await vm.exec("set -e\n" + script, timeout=25, **options)
    assert (result.exit_code, result.reason) == (0, "exited"), result
    return str(result.stdout)


@needs_program("git")
def test_git(in_vm: Any) -> None:
    """A repository is cloned, committed to and pushed; the other clone gets the commit."""

    async def body(vm: VM) -> None:
        await ok(
            vm,
            """
            git config --global user.email a@example.com
            git config --global user.name A
            git config --global init.defaultBranch main
            git init -q --bare origin.git
            git clone -q origin.git one 2>/dev/null; cd one
            for i in $(seq 50); do echo $i > file$i; done
            git add . && git commit -qm "fifty files" && git push -q origin HEAD:main
            """,
        )
        out = await ok(
            vm, "git clone -q origin.git two; cd two; git log --format=%s; ls | wc -l; git status --short"
        )
        assert out == "fifty files\n50\n"
        assert "42\n" in await ok(
            vm, "cd two; echo 42 > file1; git commit -qam change; git show | tail -1; git fsck"
        )

    in_vm(body)


@needs_program("gcc", "make")
def test_a_c_program_is_made(in_vm: Any) -> None:
    """make compiles two files with two jobs at once, links them, and the program runs; again there is nothing to do."""

    async def body(vm: VM) -> None:
        files = {
            "Makefile": "CFLAGS = -O1 -Wall\nprogram: main.o other.o\n\t$(CC) -o $@ $^ -lm\n",
            "main.c": "#include <stdio.h>\nint other(int);\n"
            'int main(int n, char **a) { printf("%d args, %d\\n", n, other(20)); return 3; }\n',
            "other.c": "#include <math.h>\nint other(int x) { return (int)(sqrt(4.0) * x) + 2; }\n",
        }
        for name, text in files.items():
            await vm.files.write_file(name, text)
        await ok(vm, "make -j2")
        result = await vm.exec_file("./program", ["a", "b"])
        assert (result.stdout, result.exit_code) == ("3 args, 42\n", 3)
        assert "up to date" in await ok(vm, "make")

    in_vm(body)


def _wheel() -> bytes:
    files = {
        "tinypkg/__init__.py": "def main():\n    print('tiny', 6 * 7)\n",
        "tinypkg-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n",
        "tinypkg-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tinypkg-1.0.dist-info/entry_points.txt": "[console_scripts]\ntiny = tinypkg:main\n",
    }
    record = ""
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text)}\n"
    files["tinypkg-1.0.dist-info/RECORD"] = record + "tinypkg-1.0.dist-info/RECORD,,\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def test_a_virtual_environment(in_vm: Any) -> None:
    """python3 -m venv works, and pip installs a wheel whose command then runs."""

    async def body(vm: VM) -> None:
        await vm.files.write_file("tinypkg-1.0-py3-none-any.whl", _wheel())
        out = await ok(
            vm,
            """
            python3 -m venv env
            env/bin/pip install --quiet --no-index --disable-pip-version-check ./tinypkg-1.0-py3-none-any.whl
            env/bin/tiny
            env/bin/pip list --disable-pip-version-check | grep tinypkg
            """,
        )
        assert out.startswith("tiny 42\ntinypkg")

    in_vm(body)


SERVER = """
const http = require('http');
http.createServer((request, response) => {
  let body = '';
  request.on('data', chunk => body += chunk);
  request.on('end', () => response.end(request.method + ' ' + request.url + ' ' + body));
}).listen(8080, '127.0.0.1', () => console.log('listening'));
"""


@needs_program("node", "curl")
def test_node_serves_http(in_vm: Any) -> None:
    """node listens on the VM's loopback; curl and python in the VM fetch from it; another VM's port is free."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("node", ["-e", SERVER])
        await Transcript(process).until(b"listening\n")
        assert await ok(vm, "curl -s -d data http://localhost:8080/curl") == "POST /curl data"
        fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/python').read().decode())"
        result = await vm.exec_file("python3", ["-c", fetch])
        assert result.stdout == "GET /python \n", result.stderr
        async with VM() as other:
            assert (await other.exec("curl -s http://localhost:8080/")).exit_code == 7
        await process.stop()
        assert await process.wait() == 143

    in_vm(body)


TREE = """
const { spawn } = require('child_process');
const grandchild = "console.log('up'); setTimeout(() => {}, 1e6)";
const script = 'python3 -c "import time; time.sleep(1000)" & node -e "$0"; true';
spawn('sh', ['-c', script, grandchild], { stdio: 'inherit' });
setTimeout(() => {}, 1e6);
"""


@needs_program("node")
def test_a_tree_across_runtimes(in_vm: Any) -> None:
    """node -> sh -> node and python, as npm would start them, are one tree with the driver of each; a kill ends all."""

    async def body(vm: VM) -> None:
        process = await vm.spawn("node", ["-e", TREE])
        await Transcript(process).until(b"up\n")
        while len(await commands(vm)) < 4:
            pass

        def shape(node: ProcessTreeNode) -> Any:
            return (node.process.driver, sorted(shape(child) for child in node.children))

        (root,) = await vm.process_tree()
        assert root.process.pid == process.pid
        assert shape(root) == ("node", [("native", [("node", []), ("python", [])])])
        assert root.process.threads > 1
        await process.kill()
        assert await commands(vm) == []

    in_vm(body)


def test_a_pipeline_of_five(in_vm: Any) -> None:
    """Five programs in a pipeline move 100,000 lines, and an early end of one does not hang the others."""

    async def body(vm: VM) -> None:
        out = await ok(vm, "seq 100000 | tr 0-9 a-j | sort -r | uniq | wc -l")
        assert out.strip() == "100000"
        out = await ok(vm, "yes | cat | tr y n | head -3 | wc -c")
        assert out.strip() == "6"
        result = await vm.exec("set -o pipefail; seq 10 | cat | (exit 3) | cat | cat")
        assert result.exit_code == 3

    in_vm(body)


def test_compression_and_archives(in_vm: Any) -> None:
    """tar with gzip packs and unpacks a thousand files with modes, links and times."""

    async def body(vm: VM) -> None:
        out = await ok(
            vm,
            """
            mkdir tree; for i in $(seq 1000); do echo $i > tree/$i; done
            ln -s 1 tree/link; ln tree/2 tree/hard; chmod 750 tree/3; mkfifo tree/fifo
            tar czf tree.tgz tree; mkdir out; tar xzf tree.tgz -C out
            diff -r --no-dereference tree out/tree 2>&1 | grep -v fifo || true
            stat -c %a out/tree/3; stat -c %h out/tree/2; ls out/tree | wc -l
            """,
        )
        assert out.split() == ["750", "2", "1003"]

    in_vm(body)


def _deb() -> bytes:
    def tar(files: dict[str, tuple[str, int]]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, (text, mode) in files.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(text), mode
                archive.addfile(entry, io.BytesIO(text.encode()))
        return buffer.getvalue()

    control = "Package: tinydeb\nVersion: 1.0\nArchitecture: all\nMaintainer: A <a@example.com>\nDescription: tiny\n"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar({"./control": (control, 0o644)}),
        "data.tar.gz": tar({"./usr/bin/tinydeb": ("#!/bin/sh\necho tiny deb\n", 0o755)}),
    }
    out = b"!<arch>\n"
    for name, data in members.items():
        out += b"%-16s%-12d%-6d%-6d%-8o%-10d`\n" % (name.encode(), 0, 0, 0, 0o100644, len(data))
        out += data + b"\n" * (len(data) % 2)
    return out


@as_root
@needs_program("dpkg")
def test_a_debian_package(in_vm: Any) -> None:
    """dpkg installs, lists and removes a package as the VM's root; another VM has none of it."""

    async def body(vm: VM) -> None:
        await vm.files.write_file("tiny.deb", _deb())
        await ok(vm, "dpkg -i /home/agentos/tiny.deb", user="root")
        assert await ok(vm, "tinydeb") == "tiny deb\n"
        assert "ii  tinydeb" in await ok(vm, "dpkg -l tinydeb")
        async with VM() as other:
            assert (await other.exec("tinydeb")).exit_code == 127
        await ok(vm, "dpkg -r tinydeb", user="root")
        assert (await vm.exec("hash -r; tinydeb")).exit_code == 127

    in_vm(body)


@needs_program("gcc")
def test_a_debugger_like_program(in_vm: Any) -> None:
    """A program of the user's may make threads, map memory, open sockets and time itself."""

    async def body(vm: VM) -> None:
        script = (
            "import threading, mmap, socket, time, multiprocessing, tempfile, sqlite3, ssl\n"
            "threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(50)]\n"
            "[one.start() for one in threads]; [one.join() for one in threads]\n"
            "assert multiprocessing.Pool(2).map(abs, [-1, -2]) == [1, 2]\n"
            "memory = mmap.mmap(-1, 1 << 20); memory[:2] = b'ok'\n"
            "a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'\n"
            "db = sqlite3.connect('data.db'); db.execute('create table t (a)'); db.commit()\n"
            "with tempfile.NamedTemporaryFile() as file: file.write(b'x' * 100000)\n"
            "print('all fine')\n"
        )
        result = await vm.exec_file("python3", ["-W", "ignore", "-c", script])
        assert result.stdout == "all fine\n", result.stderr

    in_vm(body)
