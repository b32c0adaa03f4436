"""Runs a WASI module as a program: arguments, environment, stdio and the file system are the caller's.

Stands alone inside every VM at /opt/agentos/lib, beside the wasmtime package; imports nothing of agentos.
"""

import os
import sys


def main(arguments: list[str]) -> None:
    """Run the module `arguments[0]` with the arguments after it, and exit with its exit code."""
    if not arguments:
        sys.exit("usage: wasm MODULE.wasm [ARGUMENT...]")
    try:
        import wasmtime
        from wasmtime import WasmtimeError  # the mount point alone can be imported too, as an empty package
    except ImportError:
        sys.exit("wasm: this host has no wasmtime package: install agentos with its dependencies")
    try:
        sys.exit(_run(wasmtime, arguments))  # type: ignore[no-untyped-call]
    except WasmtimeError as error:
        sys.exit(f"wasm: {arguments[0]}: {error}")


def _run(wasmtime, arguments):  # type: ignore[no-untyped-def]  # stands alone: wasmtime is found only in a VM
    engine = wasmtime.Engine()
    module = wasmtime.Module.from_file(engine, arguments[0])
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    wasi = wasmtime.WasiConfig()
    wasi.argv = arguments
    wasi.env = list(os.environ.items())
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.preopen_dir("/", "/")
    wasi.preopen_dir(".", ".")
    store = wasmtime.Store(engine)
    store.set_wasi(wasi)
    instance = linker.instantiate(store, module)
    start = instance.exports(store).get("_start")
    if start is None:
        sys.exit(f"wasm: {arguments[0]}: exports no _start")
    try:
        start(store)
    except wasmtime.ExitTrap as trap:
        return trap.code
    except wasmtime.Trap as trap:
        sys.stderr.write(f"wasm: {arguments[0]}: {trap}\n")
        return 134
    return 0
