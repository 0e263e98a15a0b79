"""A device written by the user: a class in a file, named as ``MODULE.py:Class`` (or ``package.module:Class``).

There are two kinds, told apart by the class alone: a subclass of `viaduct.vhost_user.Device` is a virtio device; any
other class with `read(offset, size)` and `write(offset, data)` is a device of registers, on a bus of our own machines.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

from viaduct.devices.register_device import RegisterDevice
from viaduct.vhost_user.device import Device


class DeviceClassError(Exception):
    """There is no such device; the message says what was found and what is expected."""


def load_device(name: str, options: Mapping[str, str] | None = None) -> Device | RegisterDevice:
    """Makes the device that `name` names, with `options` as its keyword arguments.

    Raises `DeviceClassError`; an exception of the user's own code is its cause.
    """
    module_name, colon, class_name = name.rpartition(":")
    if not (colon and module_name and class_name):
        raise DeviceClassError(f"{name!r} names no class: MODULE.py:Class or package.module:Class is expected")
    module = _load_module(module_name)
    found = getattr(module, class_name, None)
    if found is None:
        raise DeviceClassError(f"{module_name} has no {class_name}; {_devices_in(module)}")
    if not _is_device(found):
        raise DeviceClassError(
            f"it is no device: neither a subclass of viaduct.vhost_user.Device, nor a class with "
            f"read(offset, size) and write(offset, data) (docs/devices.md){_missing(found)}; {_devices_in(module)}"
        )
    try:
        device = found(**(options or {}))
    except (Exception, SystemExit) as error:
        raise DeviceClassError(f"it could not be made: {type(error).__name__}: {error}") from error
    if not isinstance(device, Device):
        _check_registers(device)
    return device


def _is_device(found: object) -> TypeGuard[type[Device] | type[RegisterDevice]]:
    return isinstance(found, type) and (issubclass(found, Device) or not _missing(found))


def _missing(found: object) -> str:
    missing = [method for method in ("read", "write") if not callable(getattr(found, method, None))]
    return f"; it has no {' and no '.join(missing)}" if missing else ""


def _check_registers(device: RegisterDevice) -> None:
    """What would fail at the guest's first access fails now."""
    for method, call, arguments in (
        (device.read, "read(offset, size)", (0, 1)),
        (device.write, "write(offset, data)", (0, b"\0")),
    ):
        if inspect.iscoroutinefunction(method):
            raise DeviceClassError(f"{call} is async, but the guest's processor waits for it: make it a plain def")
        try:
            inspect.signature(method).bind(*arguments)
        except TypeError as error:
            raise DeviceClassError(f"it cannot be called as {call}: {error}") from error
        except ValueError:
            continue  # It is not written in Python, and says nothing of its parameters.


def _load_module(name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).resolve()
        if not path.is_file():
            raise DeviceClassError(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None  # The name ends in .py.
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        if str(path.parent) not in sys.path:  # What stands beside it can be imported, as if it had been run.
            sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
        return module
    except DeviceClassError:
        raise
    except (Exception, SystemExit) as error:
        raise DeviceClassError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _devices_in(module: ModuleType) -> str:
    own = [name for name, value in vars(module).items() if _is_device(value) and value.__module__ == module.__name__]
    return f"its devices are {', '.join(own)}" if own else "it defines no device"
