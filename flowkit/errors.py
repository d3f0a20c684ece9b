"""The one exception for what a user can mend: a command shows it as one line, without a stack."""

from __future__ import annotations

__all__ = ["FlowkitError"]


class FlowkitError(ValueError):
    """A mistake at the boundary: the message says what was given, what was expected, what to do."""
