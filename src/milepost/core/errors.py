"""What users can cause, as one tree of exceptions, each with the exit code of the contract.

    MilepostError            1   anything else that failed
    ├── UsageError           2   command line or configuration
    ├── DataError            3   sources, shards
    ├── CheckpointError      4   damaged, missing or foreign checkpoints
    ├── DivergedError        5   loss or norm not finite, or spikes that did not end
    ├── RunInUseError        6   another process holds the run folder
    ├── StorageError         7   disk full, read-only, input/output error
    └── StopRequested       75   stopped on request, saved, resumable

Bugs are assertions; they never come through here.
"""

from __future__ import annotations


class MilepostError(Exception):
    """Something the user can act on: what was wrong, and a hint on what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MilepostError):
    """The command line or the configuration asks for something that cannot be."""

    exit_code = 2


class DataError(MilepostError):
    """A source or a shard is missing, damaged or not what it says."""

    exit_code = 3


class CheckpointError(MilepostError):
    """A checkpoint is damaged, missing or belongs to something else."""

    exit_code = 4


class DivergedError(MilepostError):
    """Training left the finite numbers, or a guard gave up."""

    exit_code = 5


class RunInUseError(MilepostError):
    """Another process works in the run folder."""

    exit_code = 6


class StorageError(MilepostError):
    """The disk is full, read-only or failing."""

    exit_code = 7


class StopRequested(MilepostError):
    """A stop was asked for and has been carried out; the run can be continued."""

    exit_code = 75


LEFT_AT_ONCE_EXIT_CODE = 130
"""Exit code after a second Ctrl-C."""
