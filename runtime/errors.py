"""Exceptions that end a run without being a bug. `main.py` turns each into one line and an exit code."""


class UserError(Exception):
    """The user gave something that cannot be used. The message says the rule, the value received, and the remedy."""


class NonFiniteSteps(Exception):
    """Training has diverged: too many steps in a row were skipped. The message says where and what the cause was."""


class Stopped(Exception):
    """A signal asked the run to end, and its checkpoint is written. The message says which signal and how to go on."""


class RanksDiffer(Exception):
    """Processes that must hold the same numbers do not. The message says which tensor, at which step, on which rank."""
