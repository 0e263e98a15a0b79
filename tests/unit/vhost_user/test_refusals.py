"""What is not carried out is refused, with the reason, and never left without an answer."""

import os

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, NEED_REPLY, VERSION, Guest, u64
from viaduct.vhost_user.protocol import FRONT_END_REQUESTS, IMPLEMENTED, Request

NOT_OFFERED = [
    request
    for request in FRONT_END_REQUESTS.values()
    if request.gate.protocol & ~IMPLEMENTED or request.gate.virtio or request.gate.device
]


def test_the_list_is_not_empty() -> None:
    names = {request.name for request in NOT_OFFERED}
    assert {"SET_VRING_ENDIAN", "IOTLB_MSG", "POSTCOPY_ADVISE", "VRING_KICK", "SET_DEVICE_STATE_FD"} <= names


@pytest.mark.parametrize("request_", NOT_OFFERED, ids=lambda request: request.name)
@pytest.mark.parametrize("flags", [VERSION, VERSION | NEED_REPLY])
async def test_what_is_not_offered(negotiated: Guest, device: RecordingDevice, request_: Request, flags: int) -> None:
    fds = [negotiated.event() for _ in range(request_.fds.minimum)]
    negotiated.send(request_.number, request_.payload.example, fds, flags)
    if request_.refusal is not None:
        reply = await negotiated.receive()
        assert (reply.request, reply.payload) == (request_.number, request_.refusal)
        assert "refused" in device.failures[0]
    elif flags & NEED_REPLY and request_.reply is None:
        assert (await negotiated.receive()).u64 == NACK
    else:
        assert await negotiated.closed()
    assert request_.name in device.failures[0]
    assert request_.section in device.failures[0]
    if request_.gate.protocol:
        assert (
            f"VHOST_USER_PROTOCOL_F_{request_.gate.protocol.name}, which this back-end does not offer"
            in (device.failures[0])
        )


@pytest.mark.parametrize("number", [0, 45, 1000, 0xFFFF_FFFF])
async def test_an_unknown_request_with_need_reply(negotiated: Guest, device: RecordingDevice, number: int) -> None:
    assert await negotiated.ack(number, b"anything", [negotiated.memory()]) == NACK
    assert f"unknown request number {number}; allowed: 1 to 44" in device.failures[0]
    assert await negotiated.ack(39, u64(1)) == ACK


@pytest.mark.parametrize("number", [0, 45, 0xFFFF_FFFF])
async def test_an_unknown_request_without(negotiated: Guest, device: RecordingDevice, number: int) -> None:
    negotiated.send(number, b"anything", [negotiated.memory()])
    assert await negotiated.closed()
    assert device.end.endswith("connection closed")


async def test_what_an_error_says(negotiated: Guest, device: RecordingDevice) -> None:
    """Port, socket, peer, request, found, allowed, section, outcome."""
    assert await negotiated.ack(20, u64(5)) == NACK
    (said,) = device.failures
    path = negotiated.sock.getpeername()
    who = f"port vm1 ({path}, peer pid {os.getpid()})"
    assert said == f"{who}: NET_SET_MTU: MTU 5; allowed: 68 to 65535 (virtio 1.2, 5.1.4.1); refused"
