"""Errors that a user can act on, each with the exit code of its kind.

The message is one sentence: what was given and where, what is allowed, what to do. The command line prints it on stderr
without a traceback (`debug=true` shows one).
"""

DONE = 0
DIFFERENCE = 1
WRONG_INPUT = 2
ENVIRONMENT = 3
STOPPED = 75


class MoexpandError(Exception):
    """Base of all errors with a message for the user."""

    exit_code = DIFFERENCE


class CheckFailed(MoexpandError):
    """A check ran and found a difference."""

    exit_code = DIFFERENCE


class InputError(MoexpandError):
    """Wrong input or configuration, found before anything was written."""

    exit_code = WRONG_INPUT


class EnvironmentFailure(MoexpandError):
    """The machine failed: disk full, file vanished, peer died."""

    exit_code = ENVIRONMENT


class Stopped(MoexpandError):
    """A signal stopped the run after a checkpoint was saved; the same command goes on from it."""

    exit_code = STOPPED
