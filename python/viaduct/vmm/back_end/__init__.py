"""Where the queues of a machine's virtio devices are served: in this process, in another one, in the host's kernel.

A transport of a machine is a front-end in the sense of vhost: it has the driver's decisions, two eventfds for each
queue, and memory. A `BackEnd` takes these, and from then on serves the queues without the transport, and without an
exit.
"""

from viaduct.vmm.back_end.back_end import BackEnd

__all__ = ["BackEnd"]
