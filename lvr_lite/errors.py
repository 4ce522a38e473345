"""Errors that a user can cause: one clear line, what is wrong, where, what to do."""

from __future__ import annotations


class LvrError(Exception):
    """Something the user can mend; the command ends with exit code 1 and this one line."""

    exit_code = 1

    def __str__(self) -> str:
        """What no terminal can show (half of a surrogate pair out of a file) is spelled out."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """A text that can be encoded, whatever file it came from."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class UsageError(LvrError):
    """The call itself is wrong (an option, a combination of options); exit code 2."""

    exit_code = 2


class DataError(LvrError):
    """A data file or a picture is wrong; the message starts with file and line."""


class BundleError(LvrError):
    """A bundle or a checkpoint is missing, incomplete, changed, or of another version."""


class OutputError(LvrError):
    """A file or folder cannot be written: a full disk, a missing permission, or something else in
    its place.
    """
