"""The ways in which a run ends early without being a bug. `main.py` turns each into one line and an exit code."""


class UserError(Exception):
    """Something the user gave cannot be used. The message says the rule, what was received, and the remedy."""


class NonFiniteLoss(Exception):
    """Training has diverged. The message says where."""


class RanksDiffer(Exception):
    """Processes that must hold the same numbers do not. The message says which, when and where."""
