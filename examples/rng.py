"""An entropy device (virtio 1.2, 5.4) for QEMU, in Python.

    python examples/rng.py /tmp/rng.sock
    qemu-system-x86_64 -m 256 -object memory-backend-memfd,id=mem,size=256M,share=on -machine q35,memory-backend=mem \
        -chardev socket,id=rng,path=/tmp/rng.sock -device vhost-user-rng-pci,chardev=rng ...

In the guest, /dev/hwrng then reads from this process.
"""

import asyncio
import os
import sys

from viaduct._core import Chain
from viaduct.vhost_user import QueueDevice, serve
from viaduct.virtio import DeviceType


class Rng(QueueDevice):
    """Fills the buffers of its only queue with random bytes, at most 64 KiB each: a guest may ask for gigabytes."""

    device_id = DeviceType.ENTROPY

    def handle(self, queue: int, chain: Chain) -> None:
        chain.write(os.urandom(min(chain.writable_len, 65536)))


if __name__ == "__main__":
    asyncio.run(serve(Rng(), sys.argv[1]))
