"""The ways in which a run ends early without being a bug. `main.py` turns each into one line and an exit code."""


class UserError(Exception):
    """Something the user gave cannot be used. The message says the rule, what was received, and the remedy."""


class NonFiniteSteps(Exception):
    """Training has diverged: too many steps in a row were skipped. The message says where, and what began it."""


class Stopped(Exception):
    """A signal asked the run to end and its checkpoint is written. The message says which, and how to go on."""


class RanksDiffer(Exception):
    """Processes that must hold the same numbers do not. The message says which, when and where."""
