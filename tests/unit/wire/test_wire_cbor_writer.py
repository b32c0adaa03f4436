"""CBOR as it is written, against the examples of RFC 8949 (appendix A) and the borders between its forms."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentos.wire import cbor
from agentos.wire.cbor_forms import Tagged, Wide
from agentos.wire.cbor_writer import dump
from agentos.wire.malformed import FROM_CLIENT, FROM_SERVER, Bounds, MalformedMessage
from agentos.wire.values import UNDEFINED


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "00"), (1, "01"), (10, "0a"), (23, "17"), (24, "1818"), (25, "1819"), (100, "1864"), (1000, "1903e8"),
        (1000000, "1a000f4240"), (1000000000000, "1b000000e8d4a51000"), (18446744073709551615, "1bffffffffffffffff"),
        (18446744073709551616, "c249010000000000000000"), (-18446744073709551616, "3bffffffffffffffff"),
        (-18446744073709551617, "c349010000000000000000"), (-1, "20"), (-10, "29"), (-100, "3863"), (-1000, "3903e7"),
        (255, "18ff"), (256, "190100"), (65535, "19ffff"), (65536, "1a00010000"), (2**32 - 1, "1affffffff"),
        (2**32, "1b0000000100000000"), (-24, "37"), (-25, "3818"), (-256, "38ff"), (-257, "390100"),
        (1.1, "fb3ff199999999999a"), (1.0e300, "fb7e37e43c8800759c"), (-4.1, "fbc010666666666666"),
        (-0.0, "fb8000000000000000"), (math.inf, "f97c00"), (math.nan, "f97e00"), (-math.inf, "f9fc00"),
        (False, "f4"), (True, "f5"), (None, "f6"), (UNDEFINED, "f7"), (Tagged(1, 1363896240), "c11a514b67b0"),
        (b"", "40"), (b"\1\2\3\4", "4401020304"), ("", "60"), ("a", "6161"), ("IETF", "6449455446"),
        ("\u00fc", "62c3bc"), ("\u6c34", "63e6b0b4"), ("\U00010151", "64f0908591"), ("x" * 23, "77" + "78" * 23),
        ("x" * 24, "7818" + "78" * 24), (b"x" * 256, "590100" + "78" * 256), ([], "80"), ([1, 2, 3], "83010203"),
        ([1, [2, 3], [4, 5]], "8301820203820405"), (list(range(1, 26)),
         "98190102030405060708090a0b0c0d0e0f101112131415161718181819"), ({}, "a0"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"), (["a", {"b": "c"}], "826161a161626163"),
        (Wide(5), "1b0000000000000005"),
    ],
)  # fmt: skip
def test_written(value: Any, written: str) -> None:
    """Every kind of value, in its shortest form where it has several; a float always in 8 bytes."""
    assert dump(value).hex() == written


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1])
def test_long_ones(size: int) -> None:
    """Text, bytes and arrays on both sides of the border between 2 and 4 bytes of length come back as they were."""
    value = {"text": "x" * size, "bytes": b"y" * size, "array": [1] * size}
    assert cbor.load(dump(value), FROM_SERVER) == value


def test_part_of_a_message() -> None:
    """What stands before and after the value is not looked at, and a value may not reach beyond its end."""
    whole = b"\xff" + dump({"a": ["text", 5]}) + b"\xff"
    assert cbor.load(whole, FROM_CLIENT, 1, len(whole) - 1) == {"a": ["text", 5]}
    for end in range(1, len(whole) - 1):
        with pytest.raises(MalformedMessage):
            cbor.load(whole, FROM_CLIENT, 1, end)
    with pytest.raises(MalformedMessage, match="1 bytes after the end"):
        cbor.load(whole, FROM_CLIENT, 1, len(whole))


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("83010203", 7), ("9f010203ff", 8), ("a201020304", 20), ("bf01020304ff", 21), ("c11a514b67b0", 2),
        ("8181818101", 17), ("8240f6", 6), ("d8454401000200", 4), ("80", 4), ("a0", 4), ("9fff", 5),
    ],
)  # fmt: skip
def test_items_are_counted(text: str, items: int) -> None:
    """Each value counts; arrays, maps and what is in these for more, whether or not they say how much there is."""
    data = bytes.fromhex(text)
    cbor.load(data, Bounds(bytes=100, items=items, depth=9))
    with pytest.raises(MalformedMessage, match="too many values"):
        cbor.load(data, Bounds(bytes=100, items=items - 1, depth=9))
