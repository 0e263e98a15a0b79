"""A configuration that cannot be."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be: what was found, what is allowed, and for which key.

    `key` is the path to the offending value from the top of the configuration, such as `("ports", "vm1", "queues")`.
    `source` says where that stands (`net.toml:7`), once known.
    """

    def __init__(self, problem: str, key: tuple[str, ...] = (), source: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.key = key
        self.source = source

    def within(self, *outer: str) -> ConfigError:
        """The same error seen from further outside: `outer` goes before the key."""
        return ConfigError(self.problem, (*outer, *self.key), self.source)

    def at(self, source: str) -> ConfigError:
        """The same error with the place where it was found."""
        return ConfigError(self.problem, self.key, source)

    def because(self, reason: str) -> ConfigError:
        """The same error with something more to say about it."""
        return ConfigError(self.problem + reason, self.key, self.source)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, ".".join(self.key), self.problem) if part)
