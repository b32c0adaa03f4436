"""Shows of every attempt that it can succeed: makes it on copies of the product without the defence that it tests.

    python -m tests.escape.matrix [--all] [NAME...]

Prints the table of attempts and defences, and exits with 1 where an attempt did not succeed although its defences
were gone, or did succeed on the product. What this host or user can not show is listed, with --all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tests.escape.mutations import SOURCE, mutate
from tests.escape.payloads import Attempt

REPOSITORY = SOURCE.parents[1]
MINUTES = 3 * float(os.environ.get("AGENTOS_TESTS_SLOWNESS", "1"))

Outcome = dict[str, tuple[bool, str]]


def make(names: list[str], without: tuple[str, ...] = ()) -> Outcome:
    """Make attempts, in a process of its own, on the product or on a copy of it."""
    with tempfile.TemporaryDirectory(prefix="agentos-escape-copy-") as directory:
        where = SOURCE.parent
        if without:
            os.chmod(directory, 0o755)
            where = Path(directory)
            mutate(where, without)
        environment = {**os.environ, "PYTHONPATH": f"{where}:{REPOSITORY}", "PYTHONDONTWRITEBYTECODE": "1"}
        ended = subprocess.run(
            ["timeout", str(MINUTES * 60), sys.executable, "-m", "tests.escape.stage", *names],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    outcome: Outcome = {}
    for line in ended.stdout.splitlines():
        name, success, seen = json.loads(line)
        outcome[name] = (success, seen)
    for name in names:
        outcome.setdefault(name, (False, f"the stage broke down: {ended.stderr[-700:]}"))
    return outcome


def mode_here() -> str:
    """How VMs get their ids here: root, subuid or single."""
    code = "from tests.escape.stage import mode; print(mode())"
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE.parent}:{REPOSITORY}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def lacks(attempt: Attempt, seen: str) -> bool:
    """Whether this kernel or machine has not what the attempt wants, which nobody can have then."""
    missing = ["[Errno 38]"]  # ENOSYS
    if attempt.family in ("devices", "proc"):
        missing += ["[Errno 2]", "[Errno 6]", "[Errno 19]"]  # ENOENT, ENXIO, ENODEV
    return any(one in seen for one in missing)


def groups(attempts: dict[str, Attempt], mode: str) -> dict[tuple[str, ...], list[str]]:
    """The attempts that could succeed in `mode`, by the defences that must be gone."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, one in attempts.items():
        if mode in one.modes:
            found[one.without].append(name)
    return dict(found)


def main(arguments: list[str]) -> int:
    """The whole table."""
    from tests.escape.stage import ALL

    everything = "--all" in arguments
    chosen = [one for one in arguments if not one.startswith("-")] or list(ALL)
    attempts = {name: ALL[name] for name in chosen}
    mode = mode_here()
    held = make(chosen)
    failures = 0
    print(f"{'family':<14}{'attempt':<46}{'product':<10}{'without it':<12}defence (mode {mode})")
    outcome: Outcome = {}
    for without, names in groups(attempts, mode).items():
        outcome |= make(names, without)
    for name, one in attempts.items():
        unpromised = mode in one.unpromised
        inside = "not held" if held[name][0] and unpromised else "ESCAPED" if held[name][0] else "held"
        if name in outcome:
            outside = (
                "succeeds" if outcome[name][0] else "absent" if lacks(one, outcome[name][1]) else "FAILS"
            )
        else:
            outside = "-"
        bad = inside == "ESCAPED" or outside == "FAILS"
        failures += bad
        if bad or everything or outside != "-":
            print(f"{one.family:<14}{name:<46}{inside:<10}{outside:<12}{' + '.join(one.without)}")
        if bad:
            print(f"    product: {held[name][1]}\n    without: {outcome.get(name, ('', '-'))[1]}")
    escaped, shown = (sum(success for success, _ in one.values()) for one in (held, outcome))
    print(
        f"{len(held)} attempts, {escaped} succeeded; {shown} of {len(outcome)} shown to succeed without their defence"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
