"""The table is complete, and what is derived from it agrees with it."""

import subprocess
import sys

import pytest

from vhost_user.stand_ins import RecordingDevice
from viaduct.vhost_user.backend_state import BackendState
from viaduct.vhost_user.protocol import (
    BACK_END_REQUESTS,
    FRONT_END_REQUESTS,
    IMPLEMENTED,
    Legal,
    ProtocolFeature,
    Request,
)
from viaduct.virtio import DeviceFeature

VIRTIO = (DeviceFeature(0), DeviceFeature.ACCESS_PLATFORM)
"""Virtio features that gate requests which can be met."""
ALL = [*FRONT_END_REQUESTS.values(), *BACK_END_REQUESTS.values()]


def can_be_met(request: Request) -> bool:
    gate = request.gate
    return gate.virtio in VIRTIO and not gate.device and not (gate.protocol | gate.offered) & ~IMPLEMENTED


def test_numbers_are_those_of_the_document_without_gaps() -> None:
    assert list(FRONT_END_REQUESTS) == list(range(1, 45))
    assert list(BACK_END_REQUESTS) == list(range(1, 11))


@pytest.mark.parametrize("request_", FRONT_END_REQUESTS.values(), ids=lambda request: request.name)
def test_what_can_be_met_is_carried_out_and_nothing_else(request_: Request) -> None:
    state = BackendState(RecordingDevice())
    assert callable(getattr(state, request_.handler, None)) == can_be_met(request_)


@pytest.mark.parametrize("request_", ALL, ids=lambda request: request.name)
def test_every_layout_inverts_itself(request_: Request) -> None:
    for layout in (request_.payload, request_.reply):
        if layout is not None:
            parsed = layout.parse(layout.example)
            assert layout.parse(layout.pack(parsed)) == parsed


@pytest.mark.parametrize("request_", ALL, ids=lambda request: request.name)
def test_requests_about_a_ring_name_it(request_: Request) -> None:
    if request_.legal in (Legal.RING_STOPPED, Legal.RING_STOPPED_OR_SAME):
        assert request_.payload.parse(request_.payload.example).vring == 0


def test_every_implemented_feature_gates_or_rules_a_message() -> None:
    gates = ProtocolFeature(0)
    for request in ALL:
        gates |= request.gate.protocol | request.gate.offered
    assert IMPLEMENTED & ~gates == ProtocolFeature.REPLY_ACK


def test_the_import_is_light() -> None:
    """A port that serves guests loads neither the front-end nor what only the command line needs."""
    code = "import sys; from viaduct.vhost_user import Backend; print(*sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(output.stdout.split())
    assert "viaduct.vhost_user.backend" in loaded
    assert not loaded & {"viaduct.vhost_user.frontend", "typer", "rich", "hypothesis"}
