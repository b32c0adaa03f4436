"""The blocking twins on a real VM."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from agentos.errors import InvalidRequest, ProcessNotFound, WaitTimeout
from agentos.sync import VM, Host


def test_a_vm_from_boot_to_end() -> None:
    """exec, spawn, stdin, wait, files, shell, tree."""
    with VM(files={"seed.txt": "seed\n"}) as vm:
        assert vm.exec("cat seed.txt").stdout == "seed\n"
        cat = vm.spawn("cat")
        cat.write_stdin("hello\n")
        cat.close_stdin()
        assert b"".join(chunk.data for chunk in cat.output()) == b"hello\n"
        assert (cat.wait(), cat.running, cat.exit_code) == (0, False, 0)
        assert vm.process(cat.pid) == cat
        shell = vm.open_shell("sh", ["-c", "stty size; read line"], cols=90, rows=20)
        assert next(iter(shell.output())).data == b"20 90\r\n"
        assert [node.process.pid for node in vm.process_tree()] == [shell.pid]
        shell.close()
        vm.files.write_file("x", b"1")
        assert vm.files.read_file("x") == b"1"
    assert not vm.running


def test_errors_are_those_of_the_async_library() -> None:
    """Same classes, and the VM goes on."""
    with VM() as vm:
        with pytest.raises(InvalidRequest):
            vm.spawn("cat", "not a list")
        with pytest.raises(ProcessNotFound):
            vm.wait_process(4242)
        sleep = vm.spawn("sleep", ["1000"])
        with pytest.raises(WaitTimeout):
            sleep.wait(timeout=0.05)
        sleep.kill()
        assert sleep.wait() == 137


def test_leaving_the_output_early() -> None:
    """The process goes on, and its output can be followed again."""
    with VM() as vm:
        process = vm.spawn("sh", ["-c", "echo one; read line; echo two"])
        for chunk in process.output():
            assert chunk.data == b"one\n"
            break
        process.write_stdin("\n")
        assert b"".join(chunk.data for chunk in process.output()) == b"one\ntwo\n"


def test_an_interrupt_ends_the_command() -> None:
    """Ctrl-C in the caller kills what it waits for."""
    with VM() as vm:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.exec("sleep 1000")
        timer.join()
        deadline = time.monotonic() + 10
        while vm.all_processes() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert vm.all_processes() == []
        assert vm.exec("echo on").stdout == "on\n"


def test_from_one_vm_to_another() -> None:
    """A stream read from one is written to the other as it comes."""
    with VM() as source, VM() as target:
        source.exec("head -c 3000000 /dev/urandom > data")
        written = target.files.write_file_stream("copy", source.files.read_file_stream("data"))
        assert written == 3_000_000
        assert source.exec("sha256sum < data").stdout == target.exec("sha256sum < copy").stdout


def test_a_stream_that_fails_leaves_no_file() -> None:
    """What the caller's generator raises comes back to the caller."""

    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise KeyError("mine")

    with VM() as vm:
        with pytest.raises(KeyError, match="mine"):
            vm.files.write_file_stream("never", chunks())
        assert not vm.files.exists("never")


def test_many_threads_on_one_vm() -> None:
    """Each gets its own answer."""
    answers: dict[int, str] = {}
    with VM() as vm:

        def ask(number: int) -> None:
            answers[number] = vm.exec(f"echo {number}").stdout

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    assert answers == {number: f"{number}\n" for number in range(8)}


def test_a_host_of_ones_own() -> None:
    """With it end its VMs."""
    with Host() as host:
        vm = VM(host=host).start()
        assert vm.exec("echo hi").stdout == "hi\n"
    assert not vm.running


def test_a_socket_of_the_vm_blocks() -> None:
    """recv() waits, as a caller without an event loop expects."""
    server = """
import socket
listening = socket.create_server(("127.0.0.1", 7000))
print("up", flush=True)
listening.accept()[0].send(b"hi")
"""
    with VM() as vm:
        process = vm.spawn("python3", ["-c", server])
        assert next(iter(process.output())).data == b"up\n"
        with vm.connect(7000) as connected:
            assert connected.recv(10) == b"hi"
