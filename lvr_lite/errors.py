"""Errors that a user can cause: one clear line, what is wrong, where, what to do."""

from __future__ import annotations

import signal


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


class NotFiniteError(LvrError):
    """Numbers of the model are NaN or infinite: logits, a loss, a reward."""


class StoppedError(LvrError):
    """A signal ended a training before its last step. Exit code 130 for Ctrl-C, 143 for SIGTERM.

    step: the optimizer steps that were made.
    saved: the checkpoint-N from which it goes on.
    """

    def __init__(self, signal_number: int, step: int, saved: str) -> None:
        super().__init__(f"step {step}: {signal_name(signal_number)}; saved in {saved}")
        self.exit_code = 128 + signal_number
        self.step = step
        self.saved = saved


def signal_name(signal_number: int) -> str:
    """What a signal is called in a message: "Ctrl-C", "SIGTERM"."""
    if signal_number == signal.SIGINT:
        return "Ctrl-C"
    return signal.Signals(signal_number).name
