"""Commands that need no shell: what bash would only split at blanks and then replace itself with.

Starting bash costs more than most commands that agents run. For a command of plain words, whose first is
neither a keyword nor a builtin, `bash -c` finds the program on PATH and turns into it, so the program can be
started at once: same arguments, same environment, same process. Anything else, any doubt, and any program
that can not be started (bash words that error better) goes to bash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# No character here means anything to bash outside of quotes, wherever in a word it stands.
_PLAIN = re.compile(
    r"[ \t]*([A-Za-z0-9_./:,+@%-][A-Za-z0-9_./:,+@%=-]*)((?:[ \t]+[A-Za-z0-9_./:,+@%=-]+)*)[ \t]*\n?"
)

_BUILTINS_AND_KEYWORDS = frozenset(
    """. : alias bg bind break builtin caller case cd command compgen complete compopt continue coproc declare dirs
    disown do done echo elif else enable esac eval exec exit export false fc fg fi for function getopts hash help
    history if in jobs kill let local logout mapfile popd printf pushd pwd read readarray readonly return select
    set shift shopt source suspend test then time times trap true type typeset ulimit umask unalias unset until
    wait while""".split()  # noqa: SIM905
)
TWINS = {name: f"/bin/{name}" for name in ("echo", "true", "false")}
"""Builtins whose program does the very same on words without options and backslashes, and where that is.

It is not looked for on PATH: bash would not start an `echo` of the user's there.
"""
_CHANGES_BASH = frozenset(
    ("BASH_ENV", "BASHOPTS", "SHELLOPTS", "POSIXLY_CORRECT", "BASH_XTRACEFD", "BASH_COMPAT", "ENV")
)


def plain_words(command: str) -> list[str] | None:
    """The words of `command`, where starting them as a program is all that bash would do; otherwise None.

    In an environment that `leaves_bash_alone`.
    """
    match = _PLAIN.fullmatch(command)
    if match is None or "=" in match[1] or match[1][0] == "%":
        return None
    words = [match[1], *match[2].split()]
    if words[0] in TWINS:
        return None if len(words) > 1 and words[1].startswith("-") else words
    return None if words[0] in _BUILTINS_AND_KEYWORDS else words


def leaves_bash_alone(env: Mapping[str, str]) -> bool:
    """Whether nothing in `env` makes bash do more, or something else, than its command says."""
    return _CHANGES_BASH.isdisjoint(env) and "\0BASH_FUNC_" not in "\0".join(("", *env))
