"""The assembled WASI module does what it is asked for, run by wasmtime itself."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import wasmtime
from hypothesis import given
from hypothesis import strategies as st

from agentos.commands.hello_wasm import _signed, _unsigned, module


def run(binary: bytes, stdout: Path) -> str:
    """Run a module's _start; what it printed."""
    engine = wasmtime.Engine()
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    wasi = wasmtime.WasiConfig()
    wasi.stdout_file = str(stdout)
    store = wasmtime.Store(engine)
    store.set_wasi(wasi)
    instance = linker.instantiate(store, wasmtime.Module(engine, binary))
    start = instance.exports(store)["_start"]
    assert isinstance(start, wasmtime.Func)
    start(store)
    return stdout.read_text()


@pytest.fixture(scope="module", autouse=True)
def _runtime(tmp_path_factory: pytest.TempPathFactory) -> None:
    """wasmtime makes what it keeps for the process before any test looks at descriptors."""
    run(module(""), tmp_path_factory.mktemp("wasm") / "out")


@pytest.mark.parametrize("text", ["", "hello\n", "ü" * 100, "x" * 200_000], ids=len)
@pytest.mark.parametrize("times", [1, 3])
def test_it_prints_its_text(text: str, times: int, tmp_path: Path) -> None:
    """As often as asked, also one that needs more than a page of memory."""
    assert run(module(text, times=times), tmp_path / "out") == text * times


def test_it_sleeps(tmp_path: Path) -> None:
    """After each time, by the monotonic clock."""
    started = time.monotonic()
    assert run(module("x", times=3, pause=0.05), tmp_path / "out") == "xxx"
    assert time.monotonic() - started >= 0.15


@given(st.integers(0, 2**31 - 1))
def test_numbers_are_encoded_as_leb128(value: int) -> None:
    """Seven bits a byte, lowest first; a signed one ends with its sign bit clear."""
    for encoded in (_unsigned(value), _signed(value)):
        assert sum((byte & 0x7F) << 7 * index for index, byte in enumerate(encoded)) == value
        assert [byte >> 7 for byte in encoded] == [1] * (len(encoded) - 1) + [0]
    assert not _signed(value)[-1] & 0x40
