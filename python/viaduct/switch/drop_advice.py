"""What each reason for a drop means to whoever looks for a fault, and what to do.

`often`: it happens on healthy ports too, so that only a port on which little else happens has a problem.
"""

from __future__ import annotations

import msgspec


class Advice(msgspec.Struct, frozen=True):
    """`meaning` follows "frames were dropped because"; `remedy` is for the operator."""

    meaning: str
    remedy: str
    often: bool = False


ADVICE: dict[str, Advice] = {
    "runt": Advice("they are shorter than an Ethernet header", "the guest's driver is broken; update it"),
    "oversize": Advice("they are longer than any frame can be", "the guest's driver is broken; update it"),
    "bad_header": Advice(
        "their virtio-net header contradicts them (virtio 1.2, 5.1.6.2)",
        "the guest's driver is broken, or forwards headers that it got elsewhere; viaduct trace shows them",
    ),
    "bad_source": Advice(
        "their source is a group address", "a station cannot have one; look for it with viaduct capture"
    ),
    "vlan_denied": Advice(
        "they are in a VLAN that the port may not use",
        "compare the tags that the guest sends (viaduct capture) with vlan= or trunk= of the port",
    ),
    "reserved_group": Advice(
        "they are for the bridge itself (spanning tree, LLDP)", "nothing, unless the guest should be a bridge", True
    ),
    "no_destination": Advice(
        "their destination is behind the same port, or no other port is in their VLAN",
        "see which ports are up and in which VLANs: viaduct port list",
        True,
    ),
    "spoofed": Advice(
        "the guest sends with an address that is none of its own (spoofcheck)",
        "give the guest the address that stands in mac= of the port, or add the other one there",
    ),
    "pinned": Advice(
        "the guest sends with an address that belongs to another port (mac=)",
        "give the guest an address of its own",
    ),
    "private": Advice(
        "they are for another private port", "take private from one of the two ports if they are to talk"
    ),
    "storm": Advice(
        "the guest sends more broadcasts and multicasts than storm= allows",
        "look for a loop in the guest, or raise storm= of the port",
    ),
    "unknown_flood": Advice(
        "the guest sends too much to stations that nobody has heard (unknown=)",
        "see whether those stations exist (viaduct macs), or raise unknown= of the port",
    ),
    "iommu": Advice(
        "a buffer lies outside of what the guest's IOMMU lets the device reach",
        "the guest's driver unmapped it too early, or is hostile; the guest's kernel log has the DMA fault",
    ),
    "queue_disabled": Advice("the front-end has disabled the queue", "let the guest run: in QEMU's monitor, cont"),
    "link_down": Advice(
        "nobody is connected, or the driver has not started its queue",
        "start the guest and its driver; other findings say what is missing",
        True,
    ),
    "no_buffers": Advice(
        "the guest supplied no receive buffers in time",
        "the guest is too slow or stuck: give it more CPU, a larger receive queue (rx_queue_size=1024), or more queues",
    ),
    "rate_limited": Advice(
        "they came faster than rate_out= or pps_out= of the port allows", "raise the limit, if it is not meant"
    ),
    "too_big": Advice(
        "they are longer than the port's MTU or the guest's buffers",
        "give both ends the same MTU: mtu= of the ports, ip link set mtu in the guests",
    ),
    "offload": Advice(
        "a checksum or segmentation that the guest does not accept could not be completed",
        "the sender's headers contradict its frames; viaduct trace of the sending port shows them",
    ),
    "io": Advice(
        "the host's interface or file refused them",
        "see whether the interface is up (ip link) or the disk is full (df)",
    ),
}

UNKNOWN = Advice("of a reason that is explained in docs/switch.md", "see viaduct stats --json")
