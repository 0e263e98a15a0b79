"""A device written by the user: a class in a file, named as ``MODULE.py:Class`` (or ``package.module:Class``)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from viaduct.vhost_user.device import Device


class DeviceClassError(Exception):
    """There is no such device; the message says what was found and what is expected."""


def load_device(name: str, options: dict[str, str] | None = None) -> Device:
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
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise DeviceClassError(
            f"{name} is no subclass of viaduct.vhost_user.Device (docs/devices.md); {_devices_in(module)}"
        )
    try:
        return found(**(options or {}))
    except Exception as error:
        raise DeviceClassError(f"{name} could not be made: {type(error).__name__}: {error}") from error


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
    except Exception as error:
        raise DeviceClassError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _devices_in(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Device) and value.__module__ == module.__name__
    ]
    return f"its devices are {', '.join(own)}" if own else "it defines no device"
