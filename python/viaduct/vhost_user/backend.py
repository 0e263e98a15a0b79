"""A back-end: serves one device on one socket.

As server it listens, as client it connects and tries again with growing pauses; either way one front-end is served at
a time and the next one after it has left. A second front-end that connects meanwhile is refused at once: its process
gets an end of file and says so, where a connection that waits would leave QEMU hanging in its start-up with no word.
One that connects while the first one's end of connection is still on its way to us (a guest restarted quickly) waits
for that.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from types import TracebackType

from viaduct.vhost_user.device import Device, Peer
from viaduct.vhost_user.errors import SocketPathError, VhostUserError
from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.session import Session
from viaduct.vhost_user.socket_access import ANYBODY, SocketAccess
from viaduct.vhost_user.socket_path import (
    FIRST_RETRY,
    LAST_RETRY,
    SLOWEST_LOOK,
    Listener,
    check_path,
    peer_of,
    try_connect,
)
from viaduct.vhost_user.wire import Channel

log = logging.getLogger("viaduct.vhost_user")

REPORTED = {"reported": True}
"""Marks log records about which the device is told as well, for those who would show both."""


FREEZE = 2.0
"""Seconds in which a message that is being served has to be dealt with when the connection is to be handed over."""


class Backend:
    """Serves `device` on the socket `path`.

    `client`: connect instead of listening (QEMU with ``server=on``, DPDK's virtio-user with ``server=1``). `name` is
    how messages call it; the path if empty. `access`: whom to serve.
    """

    def __init__(
        self, device: Device, path: str, client: bool = False, name: str = "", access: SocketAccess = ANYBODY
    ) -> None:
        self.device = device
        self.access = access
        self.path = str(path)
        self.client = client
        self.name = name or self.path
        self._listener: Listener | None = None
        self._session: Session | None = None
        self._serving: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self.unreachable = ""
        """Why a client's last attempt to connect failed."""
        self.next_try: float | None = None
        """When it tries again, on the monotonic clock."""

    async def __aenter__(self) -> Backend:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def listener(self) -> Listener | None:
        """What it listens on, if it does."""
        return self._listener

    @property
    def session(self) -> Session | None:
        """The connection that is being served."""
        return self._session

    @property
    def peer(self) -> Peer | None:
        """The front-end that is being served."""
        return self._session.peer if self._session is not None else None

    async def start(self) -> None:
        """Begins to listen or to connect, and returns at once. Raises `SocketPathError`."""
        if self._task is not None:
            raise VhostUserError(f"port {self.name} is started already; close() it first")
        check_path(self.path)
        self.device.transport = self
        if not self.client:
            self._listener = Listener(self.path, self.access)
        self._go()

    async def freeze(self) -> None:
        """Takes no more connections and serves no more messages until `thaw`: nothing that `handover.save` sees
        changes. A front-end that does not take its answers within `FREEZE` seconds is cut off."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._session is not None:
            try:
                async with asyncio.timeout(FREEZE):
                    await self._session.freeze()
            except TimeoutError:
                self.disconnect(f"the front-end did not take its answers for {FREEZE:g} s")
                if self._serving is not None:
                    self._serving.cancel()
                    await asyncio.gather(self._serving, return_exceptions=True)

    def thaw(self) -> None:
        """Ends what `freeze` or `adopt` began."""
        if self._listener is not None:
            self._listener.owned = True
        if self._session is not None:
            self._session.thaw()
        self._go()

    def adopt(self, listener: Listener | None, session: Session | None) -> None:
        """Takes over from another process what it listened on and whom it served. Nothing is served before `thaw`."""
        self.device.transport = self
        self._listener, self._session = listener, session
        if session is not None:
            self._serving = asyncio.create_task(self._serve(session, resumed=True), name=f"vhost-user {self.name}")

    def _go(self) -> None:
        self._task = asyncio.create_task(
            self._connect() if self.client else self._accept(), name=f"vhost-user {self.name}"
        )

    async def close(self) -> None:
        """Ends the session, if there is one, and removes the socket. May be called twice."""
        tasks = [task for task in (self._task, self._serving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = self._serving = None
        if self._session is not None:  # Its task was cancelled before it began.
            self._session.end("the port was closed")
            self._session = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock = await self._listener.accept()
            except OSError as error:
                log.error("port %s (%s): cannot accept a connection: %s", self.name, self.path, error)
                await asyncio.sleep(LAST_RETRY)
                continue
            if self._is_stranger(sock):
                continue
            if self._serving is not None and self._session is not None:
                if not self._session.channel.hung_up:
                    self._refuse(sock, self._session.peer)
                    continue
                try:
                    await asyncio.wait([self._serving])
                except BaseException:
                    sock.close()
                    raise
            self._serving = self._begin(sock)

    def _is_stranger(self, sock: socket.socket) -> bool:
        """Hangs up on a process that is not allowed to be our front-end."""
        refusal = self.access.refusal(sock)
        if refusal is None:
            return False
        stranger = peer_of(sock, self.path)
        sock.close()
        self._refused(stranger, f"refused: {refusal} (option allow of the port)")
        return True

    def _refuse(self, sock: socket.socket, served: Peer) -> None:
        newcomer = peer_of(sock, self.path)
        sock.close()
        reason = f"pid {served.pid} is connected: one front-end for each socket, give each guest its own port"
        self._refused(newcomer, f"refused a second front-end, pid {newcomer.pid}; {reason}")

    def _refused(self, newcomer: Peer, what: str) -> None:
        log.error("port %s (%s): %s", self.name, self.path, what, extra=REPORTED)
        self.device.peer_refused(newcomer, what)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        pause = FIRST_RETRY
        if self._serving is not None and self._session is not None:
            await asyncio.wait([self._serving])
        while True:
            sock = await self._reach()
            if self._is_stranger(sock):
                await self._pause(LAST_RETRY, "a process that is not allowed listens there")
                continue
            self._serving = self._begin(sock)
            began = loop.time()
            await asyncio.wait([self._serving])
            # Whoever accepts us and hangs up at once is not asked over and over.
            pause = FIRST_RETRY if loop.time() - began > LAST_RETRY else min(2 * pause, LAST_RETRY)
            await self._pause(pause, "")

    async def _reach(self) -> socket.socket:
        """Connects as soon as somebody listens."""
        pause = FIRST_RETRY
        while True:
            try:
                return try_connect(self.path)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                await self._pause(pause, "nobody listens there")
                pause = min(2 * pause, SLOWEST_LOOK)
            except (SocketPathError, OSError) as error:
                log.error("port %s: %s; trying again", self.name, error)
                await self._pause(LAST_RETRY, str(error))

    async def _pause(self, seconds: float, reason: str) -> None:
        self.unreachable, self.next_try = reason, time.monotonic() + seconds
        await asyncio.sleep(seconds)
        self.unreachable, self.next_try = "", None

    def _begin(self, sock: socket.socket) -> asyncio.Task[None]:
        session = self._session = Session(Channel(sock), self.device, peer_of(sock, self.path), self.name)
        return asyncio.create_task(self._serve(session), name=f"vhost-user session {self.name}")

    async def _serve(self, session: Session, resumed: bool = False) -> None:
        log.info("%s: %s", session.who, "taken over" if resumed else "connected", extra=REPORTED)
        try:
            reason = await session.run(resumed)
        finally:
            self._session = None
        log.info("%s: disconnected: %s", session.who, reason, extra=REPORTED)

    def fail_queue(self, index: int, error: str) -> None:
        """The device found that the driver broke ring `index`: signals the error descriptor and logs who did what.

        `error` says what was found, what is allowed and the section, as `viaduct._core.RingError` does.
        """
        if self._session is None:
            return
        log.error(
            "%s: queue %d: %s; the queue stays stopped until the driver resets it",
            self._session.who,
            index,
            error,
            extra=REPORTED,
        )
        self._session.state.fail(index, error)

    def disconnect(self, reason: str) -> None:
        """Cuts the front-end off, for example because its memory faulted. It may connect again."""
        if self._session is not None:
            log.error("%s: %s; connection closed", self._session.who, reason, extra=REPORTED)
            self._session.cut(reason)

    def config_changed(self) -> bool:
        """Tells the driver that the configuration space has changed (BACKEND_CONFIG_CHANGE_MSG).

        Returns whether it could be told: the front-end must have acknowledged CONFIG and BACKEND_REQ and given us a
        channel.
        """
        state = self._session.state if self._session is not None else None
        needed = ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ
        if state is None or state.back_channel is None or state.protocol_features & needed != needed:
            return False
        return state.back_channel.post("BACKEND_CONFIG_CHANGE_MSG")

    @property
    def iommu_counts(self) -> tuple[int, int, int, int, int] | None:
        """What passed between the front-end's IOMMU and the device (see `Iommu.counts`); None without one."""
        iommu = self._session.state.iommu if self._session is not None else None
        return iommu.counts if iommu is not None else None


async def serve(device: Device, path: str, client: bool = False, name: str = "") -> None:
    """Serves `device` on `path` until cancelled, or until SIGTERM or SIGINT comes: then it removes the socket and
    returns (vhost-user, "Backend program conventions"). For a program that does other things too there is `Backend`.

    Raises `SocketPathError`.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    # Before there is a socket: whoever sees that may send a signal.
    for number in signals:
        loop.add_signal_handler(number, ended.set)
    try:
        async with Backend(device, path, client, name):
            await ended.wait()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
