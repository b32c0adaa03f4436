"""The error tree: one code for each class, and nothing lost between processes or surfaces."""

from __future__ import annotations

import builtins
import errno
import os
import pickle
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentos import errors
from agentos.errors import (
    BY_CODE,
    AgentOSError,
    FileDenied,
    FileError,
    FileMissing,
    InvalidRequest,
    LimitExceeded,
    NoSpace,
    PortUnreachable,
    ProcessNotFound,
    ShellNotFound,
    SpawnFailed,
    StdinClosed,
    UnknownError,
    WaitTimeout,
    error_from_code,
    file_error,
)

CLASSES = sorted(set(BY_CODE.values()), key=lambda kind: kind.code)
DETAILS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name not in ("message", "code", "self")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


def test_each_code_has_one_class() -> None:
    """What the module defines is what the table has, apart from the two that no code of their own can name."""
    defined = {
        one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, AgentOSError)
    } - {AgentOSError, UnknownError}
    assert defined == set(BY_CODE.values())
    assert len({one.code for one in defined}) == len(defined)


def test_the_tree_drawn_at_the_top_is_the_tree() -> None:
    """Class, standard library base and code of the drawing are those of the code."""
    drawn = re.findall(r"[├└]─ (\w+)(?: \((\w+)\))?[ \t]+([a-z]+\.[a-z_]+)", errors.__doc__ or "")
    assert len(drawn) > 20
    for name, also, code in drawn:
        kind = getattr(errors, name)
        assert kind.code == code
        if also:
            assert issubclass(kind, getattr(builtins, also))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_says_what_it_means(kind: type[AgentOSError]) -> None:
    """Documented, and its code has a group and a name."""
    assert kind.__doc__
    assert re.fullmatch(r"[a-z]+(\.[a-z_]+)?|not_found", kind.code)


@given(st.sampled_from(CLASSES), st.text(), DETAILS)
def test_an_error_survives_a_wire_and_a_pickle(
    kind: type[AgentOSError], message: str, details: dict[str, Any]
) -> None:
    """Rebuilt from code, message and details, or unpickled, it is equal and of the same class."""
    error = kind(message, **details)
    for copy in (
        error_from_code(error.code, error.message, error.details),
        pickle.loads(pickle.dumps(error)),
    ):
        assert type(copy) is kind
        assert copy == error
        assert (copy.message, copy.details, str(copy)) == (message, details, message)
        assert hash(copy) == hash(error)


@given(st.text(), DETAILS)
def test_a_code_of_a_later_version_is_kept(message: str, details: dict[str, Any]) -> None:
    """A code that is not known here arrives as an AgentOSError that has it."""
    error = error_from_code("quantum.decohered", message, details)
    assert type(error) is UnknownError
    assert (error.code, error.message, error.details) == ("quantum.decohered", message, details)
    assert pickle.loads(pickle.dumps(error)) == error


def test_errors_differ_by_what_they_say() -> None:
    """Equality looks at class, message and details."""
    assert ProcessNotFound("x", pid=1) == ProcessNotFound("x", pid=1)
    assert ProcessNotFound("x", pid=1) != ProcessNotFound("x", pid=2)
    assert ProcessNotFound("x") != ShellNotFound("x")
    assert ProcessNotFound("x") != "x"


def test_an_argument_error_names_the_argument() -> None:
    """What it was, what was wanted, and never more of a long value than a line takes."""
    error = InvalidRequest.argument("cols", -1, "a whole number from 1 to 4096")
    assert str(error) == "cols: wanted a whole number from 1 to 4096, got -1"
    assert error.details == {"argument": "cols", "got": "-1", "wanted": "a whole number from 1 to 4096"}
    assert len(InvalidRequest.argument("data", "x" * 10_000, "less").message) < 120
    assert isinstance(error, ValueError)


def test_a_limit_error_says_how_to_raise_it() -> None:
    """Name, value, maximum, remedy."""
    error = LimitExceeded.of("shells", 65, 64, "64 shells are open already")
    assert str(error) == "64 shells are open already (maximum 64; raise it with Limits(shells=...))"
    assert error.details == {"limit": "shells", "value": 65, "maximum": 64}


def test_unknown_ids_are_worded_as_existing_clients_expect() -> None:
    """The texts that programs have been seen to match."""
    assert str(ProcessNotFound.of(123)) == "Process not found: 123"
    assert str(ShellNotFound.of("shell-9")) == "Shell not found: shell-9"


@pytest.mark.parametrize(
    ("number", "kind", "builtin"),
    [
        (errno.ENOENT, FileMissing, FileNotFoundError),
        (errno.EACCES, FileDenied, PermissionError),
        (errno.EROFS, FileDenied, PermissionError),
        (errno.ENOSPC, NoSpace, OSError),
        (errno.EIO, FileError, OSError),
    ],
)
def test_a_file_error_is_what_people_catch(
    number: int, kind: type[FileError], builtin: type[OSError]
) -> None:
    """The class by errno, which is also the standard library's."""
    error = file_error(number, "said", "/x")
    assert type(error) is kind
    assert isinstance(error, builtin)
    assert (str(error), error.details) == ("said: /x", {"path": "/x", "errno": number})
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert (one.errno, one.strerror, one.filename) == (number, os.strerror(number), "/x")


def test_other_errors_of_the_system_have_its_numbers_too() -> None:
    """Where there is one; what a hostile server says is one is not."""
    assert SpawnFailed("no", command="x", errno=errno.ENOENT, step="exec").errno == errno.ENOENT
    assert PortUnreachable("no", port=1, errno=errno.ECONNREFUSED).errno == errno.ECONNREFUSED
    assert StdinClosed("no", pid=1).errno == errno.EPIPE
    assert WaitTimeout("no", pid=1).errno is None
    for odd in (2**80, -1, "2", None, [2]):
        assert error_from_code("file.failed", "no", {"errno": odd, "path": 7}).details["errno"] == odd


@pytest.mark.parametrize(
    ("got", "shown"),
    [
        ([1, "a"], "[1, 'a']"), ({"b": 1, "a": b"x"}, "{'b': 1, 'a': b'x'}"), ("it's", '"it\'s"'), ((), "()"),
        (None, "None"), (-1.5, "-1.5"), ({3}, "{3}"), ({}, "{}"), ([[[{}]]], "[[[{}]]]"),
    ],
)  # fmt: skip
def test_what_was_got_is_shown(got: object, shown: str) -> None:
    """As Python writes it, where that is short."""
    error = InvalidRequest.argument("x", got, "y")
    assert str(error) == f"x: wanted y, got {shown}"


def test_showing_what_was_got_takes_no_time() -> None:
    """However big it is, and whatever in it is."""
    texts = [str(number) for number in range(300_000)]
    values: list[object] = [
        texts, tuple(texts), dict.fromkeys(texts, texts), set(texts), {"a": [texts]}, "é\x00" * 10**7, bytes(10**7),
        [bytes(10**7)], {"x" * 10**7: "y" * 10**7},
    ]  # fmt: skip
    began = time.process_time()
    for value in values:
        assert len(str(InvalidRequest.argument("x", value, "y"))) < 120
    assert time.process_time() - began < 0.05
