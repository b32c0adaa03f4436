"""Text of a VM's programs, to be shown to a person."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` without what a terminal would take for a command: as \\x1b and the like."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def last_lines(text: str, most: int) -> str:
    """The end of `text`, in about `most` characters: whole lines, or of a longer one its end. Empty if blank.

    What is left out shows as "...".
    """
    text = text.strip("\r\n")
    if not text.strip():
        return ""
    if len(text) > most:
        cut = text[-most:]
        _, newline, whole = cut.partition("\n")
        text = f"...\n{whole}" if newline else f"...{cut}"
    lines = [printable(line.expandtabs()) for line in text.splitlines()]
    return "\n".join(lines)
