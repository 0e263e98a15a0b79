"""What can go wrong, said so that the reader knows who, what and what next.

A `RequestError` is raised where a request is judged and knows only the request's side of the story: what was found,
what is allowed and where that is written. The session adds who it was (port, socket, peer's pid, request) and what
happened to the connection; see `viaduct.vhost_user.session`.
"""

from __future__ import annotations


class VhostUserError(Exception):
    """Base of all errors of this package."""


class RequestError(VhostUserError):
    """A request that is answered with a nack, or by closing the connection if no nack was asked for.

    `found` and `allowed` are phrases; `section` names the specification's section, for example
    ``vhost-user, "Ring states"``.
    """

    def __init__(self, found: str, allowed: str, section: str) -> None:
        super().__init__(f"{found}; allowed: {allowed} ({section})")
        self.found = found
        self.allowed = allowed
        self.section = section


class StreamError(VhostUserError):
    """The byte stream cannot be trusted any more (bad header, message cut off, descriptors lost): only closing
    helps."""


class SocketPathError(VhostUserError):
    """A socket path that cannot be used. The message names the path and what to do about it."""


class FrontEndError(VhostUserError):
    """A back-end refused a request of our front-end, answered wrongly or went away."""
