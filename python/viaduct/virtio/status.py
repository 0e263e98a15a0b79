"""The device status field (virtio 1.2, 2.1)."""

from __future__ import annotations

from enum import IntFlag


class Status(IntFlag):
    """How far the driver has come. Zero is a reset (virtio 1.2, 2.1.2)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128
