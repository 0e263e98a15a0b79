"""One connection of a back-end: receive, judge by the table, carry out, answer.

# What a bad request gets

1. The stream itself is broken (version, size beyond reason, descriptors lost, end inside a message): the connection is
   closed, since where the next message begins is not known.
2. A request that cannot be carried out (unknown, wrong size, descriptors, state, value; or the device raised):
   a. its answer can say no (GET_CONFIG, IOTLB_MSG, ...): it does;
   b. the sender set need_reply and no other answer is due: a nack, a non-zero u64, and the session goes on
      (vhost-user, "VHOST_USER_PROTOCOL_F_REPLY_ACK");
   c. else the connection is closed (vhost-user, "Communication"): the sender believes it was carried out, or waits for
      an answer that will not come.

need_reply is honoured even where REPLY_ACK was not negotiated: a sender that sets it waits. What is said about it names
the port, the socket, the peer's pid, the request, the value found, what is allowed and the section.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import Any

from viaduct.vhost_user import protocol
from viaduct.vhost_user.backend_state import Answer, BackendState
from viaduct.vhost_user.device import Device, Peer
from viaduct.vhost_user.errors import RequestError, StreamError
from viaduct.vhost_user.judgement import check_gate, check_legal, stopped_by
from viaduct.vhost_user.protocol import FRONT_END_REQUESTS, Request
from viaduct.vhost_user.wire import Channel, Message

log = logging.getLogger("viaduct.vhost_user")


HANG_UP_CHECK = 0.1
"""Seconds between looks at the connection while a device finishes its requests."""


class SessionEnd(Exception):
    """Ends the session; the text is the reason."""


class Session:
    """Serves one front-end until it leaves or errs."""

    def __init__(self, channel: Channel, device: Device, peer: Peer, name: str) -> None:
        self.channel = channel
        self.device = device
        self.peer = peer
        self.name = name
        self.state = BackendState(device)
        self._cut_reason = ""
        self._ended = False
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._idle = asyncio.Event()
        self._receiving: asyncio.Future[Message | None] | None = None

    @property
    def who(self) -> str:
        """How messages about this session begin."""
        return f"port {self.name} ({self.peer})"

    def cut(self, reason: str) -> None:
        """Ends the session from our side, for `reason`."""
        self._cut_reason = reason
        with contextlib.suppress(OSError):  # It may be gone already.
            self.channel.sock.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Serves no message before `thaw`; for a session that does not run yet."""
        self._thawed.clear()

    def abandon(self) -> None:
        """Closes what a session owns that has never run."""
        self._ended = True
        for ring in self.state.rings:
            ring.started = False
        self.state.close()
        self.channel.close()

    async def freeze(self) -> None:
        """Serves no more messages until `thaw`; returns when the one that is being served has been. What the front-end
        sends meanwhile waits in the socket."""
        self._thawed.clear()
        if self._receiving is not None:
            self._receiving.cancel()
        await self._idle.wait()
        self.state.pause()

    def thaw(self) -> None:
        """Ends what `freeze` began."""
        self._thawed.set()
        self.state.go_on()

    async def _receive(self) -> Message | None:
        while True:
            while not self._thawed.is_set():
                self._idle.set()
                await self._thawed.wait()
                self._idle.clear()
            self._receiving = asyncio.ensure_future(self.channel.receive())
            try:
                return await asyncio.shield(self._receiving)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    self._receiving.cancel()
                    raise
            finally:
                self._receiving = None

    async def run(self, resumed: bool = False) -> str:
        """Serves the front-end; `resumed`: it has been served before, by another process. Returns why the session
        ended; every descriptor is closed and every ring stopped."""
        reason = "the port was closed"
        try:
            if not resumed:
                self.device.connected(self.peer)
            while (message := await self._receive()) is not None:
                with message.fds:
                    await self._serve(message)
                await asyncio.sleep(0)  # A peer that floods us shares the loop with the others.
            reason = self._cut_reason or "the front-end closed the connection"
        except SessionEnd as end:
            reason = str(end)
        except StreamError as error:
            reason = f"{error}; connection closed"
            self._report(f"{self.who}: {reason}")
        except OSError as error:
            reason = self._cut_reason or f"connection lost: {error.strerror or error}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}; connection closed"
            log.exception("%s: unexpected error", self.who)
        finally:
            self.end(reason)
        return reason

    def end(self, reason: str) -> None:
        """Stops every ring, closes every descriptor and tells the device. Does nothing the second time."""
        if self._ended:
            return
        self._ended = True
        self._idle.set()
        self.state.close()
        self.channel.close()
        try:
            self.device.disconnected(reason)
        except Exception:
            log.exception("%s: the device failed while the front-end left", self.who)

    async def _serve(self, message: Message) -> None:
        request = FRONT_END_REQUESTS.get(message.request)
        try:
            answer = await self._carry_out(request, message)
        except RequestError as error:
            await self._refuse(request, message, str(error))
            return
        except Exception as error:
            log.debug("%s: the device raised", self.who, exc_info=True)
            await self._refuse(request, message, f"the device refused it: {error or type(error).__name__}")
            return
        if request is None:
            return
        if request.reply is not None and answer is not None:
            try:
                payload = request.reply.pack(answer.payload)
                if request.name in _PADDED and len(message.payload) < len(payload):
                    payload = payload[: len(message.payload)]
                fds = () if answer.fd is None else (answer.fd,)
                await self.channel.send(message.request, protocol.REPLY, payload, fds)
            finally:
                if answer.fd is not None:
                    os.close(answer.fd)
        elif message.need_reply:
            await self.channel.send(message.request, protocol.REPLY, protocol.ACK)

    async def _carry_out(self, request: Request | None, message: Message) -> Answer | None:
        if request is None:
            raise RequestError(
                f"unknown request number {message.request}",
                f"1 to {max(FRONT_END_REQUESTS)}",
                'vhost-user, "Front-end message types"',
            )
        if message.is_reply:
            raise RequestError("a request with the reply flag", "flags 0x1 or 0x9", 'vhost-user, "Header"')
        check_gate(self.state, request)
        payload: Any = request.payload.parse(message.payload)
        if allowed := request.fds.check(payload, len(message.fds)):
            raise RequestError(f"{len(message.fds)} file descriptors", allowed, request.section)
        check_legal(self.state, request, payload)
        log.debug("%s: %s %s, %d fds", self.who, request.name, payload, len(message.fds))
        for index in stopped_by(self.state, request, payload):
            await self._drain(index)
        answer: Answer | None = getattr(self.state, request.handler)(payload, message.fds)
        return answer

    async def _drain(self, index: int) -> None:
        """Waits until the device has finished what is in flight, unless the front-end gives up first."""
        draining = asyncio.ensure_future(self.device.drain_queue(index))
        try:
            while not draining.done():
                await asyncio.wait([draining], timeout=HANG_UP_CHECK)
                if not draining.done() and self.channel.hung_up:
                    raise SessionEnd(f"the front-end closed the connection while queue {index} finished its requests")
            draining.result()
        finally:
            draining.cancel()

    async def _refuse(self, request: Request | None, message: Message, error: str) -> None:
        name = request.name if request is not None else f"request {message.request}"
        said = f"{self.who}: {name}: {error}"
        if request is not None and request.refusal is not None:
            refusal: bytes | None = request.refusal
        elif message.need_reply and (request is None or request.reply is None):
            refusal = protocol.NACK
        else:
            refusal = None
        if refusal is None:
            self._report(f"{said}; connection closed")
            raise SessionEnd(f"{name}: {error}; connection closed")
        self._report(f"{said}; refused")
        await self.channel.send(message.request, protocol.REPLY, refusal)

    def _report(self, text: str) -> None:
        log.error("%s", text, extra={"reported": True})
        try:
            self.device.request_failed(text)
        except Exception:
            log.exception("%s: the device failed on an error's report", self.who)


_PADDED = frozenset({"GET_INFLIGHT_FD"})
"""Answered in the size of the request, since front-ends differ in the padding."""
