"""Virtio device models, one module each: `viaduct.vhost_user.Device` classes that a machine of ours or, over
vhost-user, any other can use."""
