"""What the virtio specification defines and both halves of a device share: feature bits, status bits, configuration."""

from viaduct.virtio.features import DeviceFeature, DeviceType, NetFeature, describe_features
from viaduct.virtio.status import Status

__all__ = ["DeviceFeature", "DeviceType", "NetFeature", "Status", "describe_features"]
