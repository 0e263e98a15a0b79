"""Viaduct: a hypervisor and a user-space virtual switch in Python with a Rust core."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viaduct._core import VERSION as __version__
    from viaduct.guest import Guest
    from viaduct.switch.switch import Switch
    from viaduct.vmm.machine import Machine

__all__ = ["Guest", "Machine", "Switch", "__version__"]

# Where that stands. Loaded when first asked for, so that a command that needs one does not wait for the others.
_WHERE = {
    "__version__": ("viaduct._core", "VERSION"),
    "Guest": ("viaduct.guest", "Guest"),
    "Machine": ("viaduct.vmm.machine", "Machine"),
    "Switch": ("viaduct.switch.switch", "Switch"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'viaduct' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
