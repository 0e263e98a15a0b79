"""What the virtio specification defines and both halves of a device share: feature bits, status bits, configuration."""

from viaduct.virtio.features import (
    BalloonFeature,
    BlockFeature,
    ConsoleFeature,
    DeviceFeature,
    DeviceType,
    NetFeature,
    VsockFeature,
    describe_features,
)
from viaduct.virtio.status import Status

__all__ = [
    "BalloonFeature",
    "BlockFeature",
    "ConsoleFeature",
    "DeviceFeature",
    "DeviceType",
    "NetFeature",
    "Status",
    "VsockFeature",
    "describe_features",
]
