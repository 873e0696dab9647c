"""Errors that a user can act on, each with the exit code of the command line.

Everything else that escapes is a defect of ours and leaves with exit code 1 and a traceback.
"""


class DfptkdError(Exception):
    """A failure whose message is one line naming what was wrong and what was expected."""

    exit_code = 1
    is_echo = False
    """Raised here because another process of the run raised it, and says it."""


class UsageError(DfptkdError):
    """Unknown recipe, option or value."""

    exit_code = 2


class DataError(DfptkdError):
    """Data or input files: missing, corrupt, wrong classes, wrong checkpoint."""

    exit_code = 3


class NumericError(DfptkdError):
    """A loss that is not finite."""

    exit_code = 4


class OutOfMemory(DfptkdError):
    """The device has too little memory; it has the exit code that `dfptkd plan` has then."""

    exit_code = 5


class StorageError(DfptkdError):
    """The disk refused a write."""

    exit_code = 5


class Stopped(DfptkdError):
    """The run was asked to stop and has saved its state."""

    exit_code = 75
