"""Files: bytes in, bytes out, and an error of its own for everything that can be wrong with a path."""

from __future__ import annotations

import os
import time
from typing import Any

from surfaces import Surface, fails


def test_bytes_come_back_as_they_were(on: Any) -> None:
    """Of a few MB, from an offset, by text, appended, with directories made on the way and a mode."""

    async def body(vm: Surface) -> None:
        data = os.urandom(3_000_000)
        await vm.write_file("deep/down/file", data)
        assert await vm.read_file("deep/down/file") == data
        assert await vm.read_file("deep/down/file", offset=1000, length=10) == data[1000:1010]
        assert await vm.read_file("deep/down/file", offset=2_999_999, length=10) == data[-1:]
        await vm.write_file("script", "#!/bin/sh\necho größe\n", mode=0o755)
        assert (await vm.exec("./script")).stdout == "größe\n"
        await vm.write_file("script", "echo more\n", append=True)
        assert (await vm.exec("./script")).stdout == "größe\nmore\n"
        with fails("file.not_found"):
            await vm.write_file("no/such/file", "x", make_parents=False)
        await vm.write_file("empty", b"")
        assert await vm.read_file("empty") == b""

    on(body)


def test_stat_tells_what_is_there(on: Any) -> None:
    """Type, size, mode, owner, time; a symlink is itself, with its target."""

    async def body(vm: Surface) -> None:
        await vm.write_file("file", "four", mode=0o640)
        found = await vm.stat("file")
        assert (found.path, found.type, found.size, found.mode) == ("/home/agentos/file", "file", 4, 0o640)
        assert (found.uid, found.gid, found.target) == (1000, 1000, None)
        assert abs(found.mtime - time.time()) < 3600
        await vm.exec("ln -s file link; ln -s nothing dangling; mkfifo fifo; mkdir dir")
        link = await vm.stat("link")
        assert (link.type, link.target) == ("symlink", "file")
        assert [(await vm.stat(one)).type for one in ("fifo", "dir", "/dev/null")] == [
            "fifo",
            "directory",
            "char",
        ]
        assert [await vm.exists(one) for one in ("link", "dangling", "nothing")] == [True, False, False]

    on(body)


def test_many_at_once_fail_each_for_itself(on: Any) -> None:
    """One bad path does not spoil the others."""

    async def body(vm: Surface) -> None:
        await vm.mkdir("dir")
        written = await vm.write_files({"a": "1", "dir": "x", "b": b"\xff"})
        assert [(one.path, one.error and one.error.code) for one in written] == [
            ("a", None), ("dir", "file.is_directory"), ("b", None),
        ]  # fmt: skip
        read = await vm.read_files(["a", "none", "b"])
        assert [(one.content, one.error and one.error.code) for one in read] == [
            (b"1", None), (None, "file.not_found"), (b"\xff", None),
        ]  # fmt: skip

    on(body)


def test_many_at_once_of_which_one_makes_no_sense(on: Any) -> None:
    """The whole request is refused by what is wrong in it, and nothing is written; an empty path fails for itself."""

    async def body(vm: Surface) -> None:
        for data in (5, None, ["text"], {"a": 1}):
            with fails("request.invalid", r"^files\[('b'|1)\](\.content)?: wanted text or bytes, got "):
                await vm.write_files({"a": "1", "b": data})
        with fails("request.invalid", r"^files( path|\[1\]\.path): wanted text without NUL, got "):
            await vm.write_files({"a": "1", "b\0": "2"})
        with fails("request.invalid", r"^paths\[1\]: wanted text, got 7$"):
            await vm.read_files(["a", 7])
        assert not await vm.exists("a")
        written = await vm.write_files({"a": "1", "": "2"})
        assert [(one.path, one.error and one.error.code) for one in written] == [
            ("a", None), ("", "request.invalid"),
        ]  # fmt: skip
        read = await vm.read_files(["", "a"])
        assert [(one.content, one.error and one.error.code) for one in read] == [
            (None, "request.invalid"), (b"1", None),
        ]  # fmt: skip

    on(body)


def test_directories(on: Any) -> None:
    """Made, listed, moved, deleted; hidden names and names of every kind included."""

    async def body(vm: Surface) -> None:
        await vm.mkdir("top/one/two")
        await vm.mkdir("top/one")
        with fails("file.exists"):
            await vm.mkdir("top/one", parents=False)
        names = [".hidden", "with space", "größe", "-dash", "$HOME", 'quo"te', "new\nline"]
        for name in names:
            await vm.write_file(f"top/{name}", name)
        assert sorted(await vm.readdir("top")) == sorted([*names, "one"])
        entries = {one.name: (one.path, one.type, one.size) for one in await vm.readdir_entries("top")}
        assert entries["größe"] == ("/home/agentos/top/größe", "file", len("größe".encode()))
        assert entries["one"][1] == "directory"
        below = [one.path for one in await vm.readdir_recursive("top")]
        assert "/home/agentos/top/one/two" in below
        await vm.move("top/$HOME", "top/one/moved")
        assert await vm.read_file("top/one/moved") == b"$HOME"
        await vm.write_file("other", "x")
        with fails("file.exists"):
            await vm.move("other", "top/one/moved", overwrite=False)
        with fails("limit.exceeded"):
            await vm.readdir("top", max_entries=2)
        with fails("file.is_directory"):
            await vm.delete_file("top")
        await vm.delete_file("top", recursive=True)
        assert not await vm.exists("top")
        await vm.delete_file("top", missing_ok=True)

    on(body)


def test_every_error_has_its_code(on: Any) -> None:
    """And names the path."""

    async def body(vm: Surface) -> None:
        await vm.exec("mkdir dir; echo x > file; mkfifo fifo; mkdir full; touch full/x; mkdir -m 0 closed")
        for code, verb, args in (
            ("file.not_found", vm.read_file, ["none"]),
            ("file.not_found", vm.stat, ["none"]),
            ("file.not_found", vm.readdir, ["none"]),
            ("file.not_found", vm.delete_file, ["none"]),
            ("file.not_found", vm.move, ["none", "x"]),
            ("file.is_directory", vm.read_file, ["dir"]),
            ("file.is_directory", vm.write_file, ["dir", "x"]),
            ("file.not_directory", vm.readdir, ["file"]),
            ("file.not_directory", vm.read_file, ["file/x"]),
            ("file.not_regular", vm.read_file, ["fifo"]),
            ("file.permission_denied", vm.readdir, ["closed"]),
            ("file.permission_denied", vm.write_file, ["closed/mine", "x"]),
        ):
            with fails(code) as error:
                await verb(*args)
            assert "path" in error.details
        assert (await vm.exec("cat file")).stdout == "x\n"

    on(body)


def test_no_path_leads_out(on: Any) -> None:
    """Symlinks and dots are followed inside the VM only, by whose user may."""

    async def body(vm: Surface) -> None:
        await vm.exec("ln -s /etc/passwd link; ln -s ../../../../.. up")
        assert b"agentos" in await vm.read_file("link")
        assert b"agentos" in await vm.read_file("../../../../etc/passwd")
        assert "home" in await vm.readdir("up")
        assert await vm.readdir("/home") == ["agentos"]

    on(body)
