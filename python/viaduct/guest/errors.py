"""What a guest reports when it cannot do what was asked."""

from __future__ import annotations


class GuestError(Exception):
    """A guest or traffic source could not do what was asked; the text says who, what and what to do next."""
