"""Where a program is that was named as people name it."""

from __future__ import annotations

import os

from agentos.linux import proc

_EACCES = 13


def find_program(name: str, path: str, *, directories: bool = False) -> str:
    """The file of program `name`, looked for along `path` as execvp(3) does.

    With `directories` it may be one: that saves a look, where a failure to execute it leads to another search.
    Raises PermissionError where there are only files that may not be executed, FileNotFoundError where there is none.
    """
    if "/" in name:
        return name
    places = path.split(":")
    for directory in places:
        candidate = f"{directory or '.'}/{name}"
        # First what raises no exception where there is nothing: that takes longer than the call.
        if os.access(candidate, os.X_OK) and (directories or os.path.isfile(candidate)):
            return candidate
    if name.endswith(".wasm") and os.path.isfile(name):
        return f"./{name}"
    raise (
        PermissionError(_EACCES, "Permission denied", name)
        if any(os.path.isfile(f"{directory or '.'}/{name}") for directory in places)
        else FileNotFoundError(2, "No such file", name)
    )


def is_wasm(path: str) -> bool:
    """Whether the file begins as a WebAssembly module does."""
    try:
        return proc.read_small(path, 4) == b"\0asm"
    except OSError:
        return False
