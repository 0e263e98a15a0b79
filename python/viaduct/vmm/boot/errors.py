"""What is wrong with something that a machine was to start with."""

from __future__ import annotations

from viaduct.vmm.errors import MachineError


class BootError(MachineError):
    """A kernel, initrd, command line or memory size that a machine cannot be started with.

    The message names the file, what was found, what is allowed and what to do about it; `subject` is the file or the
    option at fault.
    """

    def __init__(self, subject: str, found: str, advice: str) -> None:
        super().__init__(f"{subject}: {found}; {advice}")
        self.subject = subject
        self.found = found
        self.advice = advice
