"""Whether a request may be carried out now: the table of `viaduct.vhost_user.protocol` held against a connection.

The table has a column for the features that a request needs, and one for the states of the device in which it is legal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.protocol import Legal, Request
from viaduct.virtio.features import DeviceFeature

if TYPE_CHECKING:
    from viaduct.vhost_user.backend_state import BackendState
    from viaduct.vhost_user.ring import Ring


def check_gate(state: BackendState, request: Request) -> None:
    """Raises `RequestError` unless the features that the request needs are there."""
    gate = request.gate
    if gate.device is not None and gate.device != state.device.device_id:
        raise RequestError(f"a request for a {gate.device.name} device", "other requests", request.section)
    if needed := gate.protocol | gate.offered:
        name = f"VHOST_USER_PROTOCOL_F_{needed.name}"
        if not needed & state.offered_protocol_features:
            raise RequestError(
                f"a request that needs {name}, which this back-end does not offer",
                "other requests",
                request.section,
            )
        if gate.protocol and not gate.protocol & state.protocol_features:
            raise RequestError(
                f"a request that needs {name}, which was offered but not acknowledged",
                "this request after a SET_PROTOCOL_FEATURES with that bit",
                request.section,
            )
    if gate.virtio and not gate.virtio & (state.features or 0):
        raise RequestError(
            f"a request that needs feature {gate.virtio.name}, which was not negotiated",
            "this request after a SET_FEATURES with that bit",
            request.section,
        )


def check_legal(state: BackendState, request: Request, payload: Any) -> None:
    """Raises `RequestError` unless the state allows the request."""
    match request.legal:
        case Legal.ALWAYS:
            return
        case Legal.ONCE:
            bad = "a second one" if state.owned else None
        case Legal.RING_STOPPED:
            bad = _running([state.ring(payload.vring)])
        case Legal.RING_STOPPED_OR_SAME:
            ring = state.ring(payload.vring)
            bad = None if ring.lies_at(payload) else _running([ring])
        case Legal.RINGS_STOPPED:
            bad = _running(state.rings)
        case Legal.RINGS_STOPPED_OR_SAME:
            bad = None if _in_force(state, request, payload.value) else _running(state.rings)
    if bad:
        raise RequestError(bad, request.legal.value, request.section)


def _in_force(state: BackendState, request: Request, value: int) -> bool:
    if request.name != "SET_FEATURES":
        return value == state.protocol_features
    # A migration switches LOG_ALL under running rings (vhost-user, "Migration").
    return state.features is not None and not (value ^ state.features) & ~DeviceFeature.LOG_ALL


def _running(rings: list[Ring]) -> str | None:
    running = [str(ring.index) for ring in rings if ring.started]
    return f"ring {', '.join(running)} is started (GET_VRING_BASE stops it)" if running else None


def stopped_by(state: BackendState, request: Request, payload: Any) -> list[int]:
    """The started rings that the request is about to stop."""
    if request.name == "RESET_DEVICE":
        return [ring.index for ring in state.rings if ring.started]
    if request.name in ("GET_VRING_BASE", "SET_VRING_KICK") and state.ring(payload.vring).started:
        return [payload.vring]
    return []
