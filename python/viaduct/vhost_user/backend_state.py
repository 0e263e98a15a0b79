"""What a back-end knows of one connection, and what each request changes in it.

One method carries out one request of the table in `viaduct.vhost_user.protocol`; it is called after the request has
been judged by the table (`judgement`: descriptors, features, state) and checks what only it can check. It returns an
`Answer` where the table says that one is due. A method that raises has changed nothing that the front-end could rely
on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from viaduct._core import TranslationMissing
from viaduct.vhost_user import payloads as p
from viaduct.vhost_user.back_channel import BackChannel
from viaduct.vhost_user.device import Device, Inflight, Vring
from viaduct.vhost_user.dirty_log import DirtyLog, in_force
from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.event_fd import check_event_fd, signal
from viaduct.vhost_user.iommu import Iommu
from viaduct.vhost_user.memory_table import MemoryTable
from viaduct.vhost_user.protocol import IMPLEMENTED, MAX_MEM_SLOTS, ProtocolFeature
from viaduct.vhost_user.ring import Ring, check_size
from viaduct.vhost_user.wire import Descriptors
from viaduct.virtio.features import DeviceFeature, describe_features

if TYPE_CHECKING:
    from viaduct._core import GuestMemory

log = logging.getLogger("viaduct.vhost_user")

MTU_MIN, MTU_MAX = 68, 65535
"""virtio 1.2, 5.1.4.1."""


class Answer(NamedTuple):
    """A reply: the payload as a tuple of the request's reply layout, and a descriptor that is closed once sent."""

    payload: Any
    fd: int | None = None


class BackendState:
    """State of one connection. Owns the rings' file descriptors and the back-end channel's socket."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.features: int | None = None
        """As acknowledged; None before SET_FEATURES."""
        self.protocol_features = ProtocolFeature(0)
        self.owned = False
        self.table = MemoryTable()
        self.log: DirtyLog | None = None
        """Of written pages; in force while LOG_ALL is acknowledged (vhost-user, "Migration")."""
        self.log_event: int | None = None
        """Told when pages have been logged."""
        self.rings = [Ring(index) for index in range(device.queue_count)]
        self.back_channel: BackChannel | None = None
        """The channel for requests of ours (vhost-user, "Back-end communication")."""
        self.iommu: Iommu | None = None
        """What translates addresses for the device, if ACCESS_PLATFORM was acknowledged."""

    @property
    def offered_features(self) -> int:
        """The answer to GET_FEATURES: the device's, without those whose messages are not carried out."""
        missing = DeviceFeature(0)
        # Misses have to be asked for, and QEMU does not do without REPLY_ACK either.
        needed = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
        if needed & self.offered_protocol_features != needed:
            missing |= DeviceFeature.ACCESS_PLATFORM
        if not self.offered_protocol_features & ProtocolFeature.LOG_SHMFD:
            missing |= DeviceFeature.LOG_ALL
        return int(self.device.features) & ~int(missing) | int(DeviceFeature.PROTOCOL_FEATURES)

    @property
    def offered_protocol_features(self) -> ProtocolFeature:
        """The answer to GET_PROTOCOL_FEATURES: what the device supports and the back-end implements."""
        return self.device.protocol_features & IMPLEMENTED

    def ring(self, index: int) -> Ring:
        """The ring with this index; raises `RequestError` if the device has none."""
        if index >= len(self.rings):
            raise RequestError(f"ring {index}", f"0 to {len(self.rings) - 1}", 'vhost-user, "Multiple queue support"')
        return self.rings[index]

    # Negotiation.

    def get_features(self, payload: p.Empty, fds: Descriptors) -> Answer:
        return Answer((self.offered_features,))

    def set_features(self, payload: p.U64, fds: Descriptors) -> None:
        if extra := payload.value & ~self.offered_features:
            raise RequestError(
                f"features that were not offered: {describe_features(extra, self.device.device_id)}",
                describe_features(self.offered_features, self.device.device_id),
                'vhost-user, "VHOST_USER_SET_FEATURES"',
            )
        if payload.value != self.features:
            relog = self._relog(self.log, payload.value)
            self.device.set_features(payload.value & ~DeviceFeature.PROTOCOL_FEATURES)
            if relog is not None:
                self.device.set_memory(relog)
            self.features = payload.value
            self._use_iommu(bool(payload.value & DeviceFeature.ACCESS_PLATFORM))
        if not payload.value & DeviceFeature.PROTOCOL_FEATURES:
            for ring in self.rings:
                self._enable(ring, True)
        self._start_ready()

    def get_protocol_features(self, payload: p.Empty, fds: Descriptors) -> Answer:
        return Answer((int(self.offered_protocol_features),))

    def set_protocol_features(self, payload: p.U64, fds: Descriptors) -> None:
        if extra := payload.value & ~int(self.offered_protocol_features):
            raise RequestError(
                f"protocol features that were not offered: {ProtocolFeature(extra)!r}",
                f"{self.offered_protocol_features!r}",
                'vhost-user, "VHOST_USER_SET_PROTOCOL_FEATURES"',
            )
        self.protocol_features = ProtocolFeature(payload.value)

    def set_owner(self, payload: p.Empty, fds: Descriptors) -> None:
        self.owned = True

    def reset_owner(self, payload: p.Empty, fds: Descriptors) -> None:
        """Ends the ownership; rings and memory stay, as the document recommends: more was never agreed on."""
        self.owned = False

    def get_queue_num(self, payload: p.Empty, fds: Descriptors) -> Answer:
        return Answer((self.device.reported_queue_count,))

    # Memory.

    def set_mem_table(self, payload: p.Regions, fds: Descriptors) -> None:
        table = MemoryTable()
        for region, fd in zip(payload.regions, fds.peek(), strict=True):
            table = table.with_region(region, fd)
        self._replace_table(table)

    def get_max_mem_slots(self, payload: p.Empty, fds: Descriptors) -> Answer:
        return Answer((MAX_MEM_SLOTS,))

    def add_mem_reg(self, payload: p.Region, fds: Descriptors) -> None:
        fd = fds.peek()[0]
        again = self.table.with_region_again(payload, fd)
        if again is None:
            self._replace_table(self.table.with_region(payload, fd))
        else:
            self.table = again

    def rem_mem_reg(self, payload: p.Region, fds: Descriptors) -> None:
        self._replace_table(self.table.without_region(payload))

    def _replace_table(self, table: MemoryTable) -> None:
        """Puts a table in force. A running ring must lie in it too."""
        for ring in self.rings:
            if ring.started:
                if not table.regions:
                    raise RequestError(
                        f"an empty memory table while ring {ring.index} runs", "regions that hold it", _MEMORY
                    )
                ring.check_place(table, self.features or 0)
        self.device.set_memory(self._logged(table, in_force(self.log, self.features)))
        self.table = table
        self._start_ready()

    def _as_reached(self, table: MemoryTable) -> GuestMemory:
        """A table's memory as the device reaches it."""
        return table.memory if self.iommu is None else table.memory.behind(self.iommu.table)

    # Behind an IOMMU.

    def _use_iommu(self, wanted: bool) -> None:
        """Puts the device behind an IOMMU, or no longer. All rings are stopped, or nothing changes."""
        if wanted == (self.iommu is not None):
            self._forget_translations()
            return
        if self.iommu is not None:
            self.iommu.close()
        self.iommu = None
        if wanted:
            self.make_iommu()
        if self.table.regions:
            self.device.set_memory(self._logged(self.table, in_force(self.log, self.features)))

    def make_iommu(self, translations: Iterable[tuple[int, int, int, int]] = ()) -> None:
        """Puts the device behind an IOMMU that has said this so far; its memory is not told."""
        self.iommu = Iommu(
            self.device,
            lambda: self.back_channel,
            lambda: ProtocolFeature.REPLY_ACK in self.protocol_features,
            self._translations_changed,
        )
        for translation in translations:
            self.iommu.table.update(*translation)

    def pause(self) -> None:
        """Leaves the back-end channel alone until `go_on`."""
        for each in (self.back_channel, self.iommu):
            if each is not None:
                each.pause()

    def go_on(self) -> None:
        """Ends what `pause` began."""
        for each in (self.back_channel, self.iommu):
            if each is not None:
                each.go_on()

    def iotlb_msg(self, payload: p.Iotlb, fds: Descriptors) -> Answer:
        assert self.iommu is not None  # ACCESS_PLATFORM was negotiated
        self.iommu.message(payload, self.table)
        return Answer((0,))

    def _translations_changed(self) -> None:
        self.device.translations_changed()
        for ring in self.rings:
            if ring.awaits_translation:
                try:
                    self._start_if_ready(ring)
                except (RequestError, ValueError) as error:
                    log.error("ring %d cannot start: %s", ring.index, error)
                    self.fail(ring.index, str(error))

    def _forget_translations(self) -> None:
        """No ring is left: from here on the front-end does not say any more what it takes away."""
        if self.iommu is not None and not any(ring.kicked for ring in self.rings):
            self.iommu.forget()

    # Rings.

    def set_vring_num(self, payload: p.VringState, fds: Descriptors) -> None:
        ring = self.ring(payload.vring)
        packed = DeviceFeature.RING_PACKED if self.features is None else self.features
        check_size(payload.num, packed)
        old, ring.size = ring.size, payload.num
        try:
            self._start_if_ready(ring)
        except BaseException:
            ring.size = old
            raise

    def set_vring_addr(self, payload: p.VringAddr, fds: Descriptors) -> None:
        ring = self.ring(payload.vring)
        before, old, ring.addr = ring.log_addr, ring.addr, payload
        try:
            if self.features is not None:
                self._check_place(ring, self.features)
            if ring.started and ring.log_addr != before:
                self.device.set_log_addr(ring.index, ring.log_addr)
            self._start_if_ready(ring)
        except BaseException:
            ring.addr = old
            raise

    def set_vring_base(self, payload: p.VringState, fds: Descriptors) -> None:
        packed = self.features is None or self.features & DeviceFeature.RING_PACKED
        if payload.num > 0xFFFF and not packed:
            raise RequestError(
                f"index {payload.num:#x}",
                "0 to 0xffff",
                'vhost-user, "A vring descriptor index for split virtqueues"',
            )
        self.ring(payload.vring).base = payload.num

    def get_vring_base(self, payload: p.VringState, fds: Descriptors) -> Answer:
        ring = self.ring(payload.vring)
        self._stop(ring)
        ring.drop_kick()
        self._forget_translations()
        return Answer((ring.index, ring.base or 0))

    def set_vring_kick(self, payload: p.VringFd, fds: Descriptors) -> None:
        ring = self.ring(payload.vring)
        for fd in fds.peek():
            check_event_fd(fd)
        self._stop(ring)
        ring.set_kick(fds.take())
        try:
            self._start_if_ready(ring)
        except BaseException:
            ring.drop_kick()
            raise

    def set_vring_call(self, payload: p.VringFd, fds: Descriptors) -> None:
        ring = self.ring(payload.vring)
        for fd in fds.peek():
            check_event_fd(fd)
        new = fds.take()
        old = ring.replace_call(new)
        try:
            if ring.started:
                self.device.set_call(ring.index, new)
                # What the last descriptor was told may have been heard by nobody: QEMU starts a ring with one that it
                # does not listen to, and gives the guest's a moment later (`vhost_virtqueue_mask`). Once too often does
                # no harm.
                signal(new)
        finally:
            if old is not None:
                os.close(old)

    def set_vring_err(self, payload: p.VringFd, fds: Descriptors) -> None:
        ring = self.ring(payload.vring)
        for fd in fds.peek():
            check_event_fd(fd)
        new = fds.take()
        old = ring.replace_err(new)
        try:
            if ring.started:
                self.device.set_err(ring.index, new)
        finally:
            if old is not None:
                os.close(old)

    def set_vring_enable(self, payload: p.VringState, fds: Descriptors) -> None:
        # Legal before SET_FEATURES: QEMU restores the state of a reconnected port before it acknowledges features.
        ring = self.ring(payload.vring)
        if payload.num > 1:
            raise RequestError(f"state {payload.num}", "0 or 1", 'vhost-user, "Ring states"')
        self._enable(ring, bool(payload.num))

    def _enable(self, ring: Ring, enabled: bool) -> None:
        if ring.started and ring.enabled != enabled:
            self.device.enable_queue(ring.index, enabled)
        ring.enabled = enabled

    def memory_in_force(self) -> GuestMemory:
        """The memory as the device has it, logged if it is to be logged."""
        return self._logged(self.table, in_force(self.log, self.features))

    def resume(self, positions: Mapping[int, int]) -> None:
        """Starts the rings that another process has served until now. `positions`: where each stands. The driver is
        notified once of each: what the other process did last may not have been announced. Raises what the device
        raises."""
        for ring in self.rings:
            if ring.started:
                ring.started = False
                ring.base = positions.get(ring.index, ring.base)
            elif not ring.kicked or self.iommu is None:
                continue
            vring = ring.vring(self.features or 0)
            if vring is not None:
                self._start(ring, vring)
                signal(ring.call_fd)

    def _start_if_ready(self, ring: Ring) -> None:
        """Starts a stopped ring of which everything is known. Raises `RequestError` if it is known and wrong."""
        if ring.started or self.features is None or not self.table.regions:
            return
        vring = ring.vring(self.features)
        if vring is None:
            return
        self._check_place(ring, self.features)
        self._start(ring, vring)

    def _start(self, ring: Ring, vring: Vring) -> None:
        """Starts a ring, or lets it wait for the IOMMU."""
        ring.awaits_translation = False
        try:
            self.device.start_queue(vring)
        except TranslationMissing:
            ring.awaits_translation = True
            return
        ring.started, ring.failure = True, None
        if ring.enabled:
            self.device.enable_queue(ring.index, True)

    def _check_place(self, ring: Ring, features: int) -> None:
        ring.check_place(self.table, features)
        if log := in_force(self.log, features):
            log.check_ring(ring, features)

    def _start_ready(self) -> None:
        """Features or memory have changed: starts what waited for it. What lies outside the memory goes on waiting."""
        for ring in self.rings:
            try:
                self._start_if_ready(ring)
            except RequestError as error:
                log.debug("ring %d does not start yet: %s", ring.index, error)

    def _stop(self, ring: Ring) -> None:
        if ring.started:
            ring.started = False
            ring.base = self.device.stop_queue(ring.index)

    # The device.

    def send_rarp(self, payload: p.U64, fds: Descriptors) -> None:
        self.device.send_rarp(p.U64_PAYLOAD.pack(payload)[:6])

    def net_set_mtu(self, payload: p.U64, fds: Descriptors) -> None:
        if not MTU_MIN <= payload.value <= MTU_MAX:
            raise RequestError(f"MTU {payload.value}", f"{MTU_MIN} to {MTU_MAX}", "virtio 1.2, 5.1.4.1")
        self.device.set_mtu(payload.value)

    def get_config(self, payload: p.Config, fds: Descriptors) -> Answer:
        data = self.device.read_config(payload.offset, payload.size)
        if len(data) != payload.size:
            raise ValueError(f"read_config returned {len(data)} bytes instead of {payload.size}")
        return Answer(payload._replace(data=data))

    def set_config(self, payload: p.Config, fds: Descriptors) -> None:
        if payload.flags > 1:
            raise RequestError(f"flags {payload.flags:#x}", "0 or 1", 'vhost-user, "Virtio device config space"')
        self.device.write_config(payload.offset, payload.data, payload.flags)

    def set_status(self, payload: p.U64, fds: Descriptors) -> None:
        if payload.value > 0xFF:
            raise RequestError(f"status {payload.value:#x}", "0 to 0xff", "virtio 1.2, 2.1")
        self.device.set_status(payload.value)

    def get_status(self, payload: p.Empty, fds: Descriptors) -> Answer:
        return Answer((self.device.get_status(),))

    def reset_device(self, payload: p.Empty, fds: Descriptors) -> None:
        for ring in self.rings:
            self._stop(ring)
            ring.forget()
        self._forget_translations()
        if (relog := self._relog(None, None)) is not None:
            self.device.set_memory(relog)
        self._drop_log()
        self.features = None
        self.device.reset()

    # Shared buffers and the channel back.

    def get_inflight_fd(self, payload: p.InflightDescription, fds: Descriptors) -> Answer:
        self._check_inflight(payload)
        fd, size, offset = self.device.get_inflight(payload.queue_count, payload.queue_size)
        return Answer((size, offset, payload.queue_count, payload.queue_size), fd)

    def set_inflight_fd(self, payload: p.InflightDescription, fds: Descriptors) -> None:
        self._check_inflight(payload)
        end, size = payload.mmap_offset + payload.mmap_size, os.fstat(fds.peek()[0]).st_size
        if not payload.mmap_size or end > size:
            raise RequestError(
                f"{payload.mmap_size:#x} bytes at offset {payload.mmap_offset:#x} of the buffer's file",
                f"a part of its {size:#x} bytes",
                'vhost-user, "Inflight description"',
            )
        self.device.set_inflight(
            Inflight(fds.peek()[0], payload.mmap_size, payload.mmap_offset, payload.queue_count, payload.queue_size)
        )

    def _check_inflight(self, payload: p.InflightDescription) -> None:
        if not 0 < payload.queue_count <= len(self.rings):
            raise RequestError(
                f"{payload.queue_count} queues", f"1 to {len(self.rings)}", 'vhost-user, "Inflight description"'
            )
        check_size(payload.queue_size, DeviceFeature.RING_PACKED)

    def set_log_base(self, payload: p.Log, fds: Descriptors) -> Answer:
        if not fds:
            raise RequestError("a log in no file", "one of at least 1 byte with its file descriptor", _LOG)
        self._replace_log(DirtyLog(fds.peek()[0], payload.size, payload.offset, self.log_event))
        return Answer(())

    def set_log_fd(self, payload: p.Empty, fds: Descriptors) -> None:
        check_event_fd(fds.peek()[0])
        if self.log is not None:
            self._replace_log(DirtyLog(self.log.fd, self.log.size, self.log.offset, fds.peek()[0]))
        old, self.log_event = self.log_event, fds.take()
        if old is not None:
            os.close(old)

    def _replace_log(self, log: DirtyLog) -> None:
        """Puts a log in the place of another. When this returns nothing is logged in the old one any more: that is when
        the front-end takes its last bits."""
        try:
            log.check(self.table, self.rings, self.features or 0)
            relog = self._relog(log, self.features)
            if relog is not None:
                self.device.set_memory(relog)
        except BaseException:
            log.close()
            raise
        self._drop_log()
        self.log = log

    def _relog(self, log: DirtyLog | None, features: int | None) -> GuestMemory | None:
        """The memory as it is to be logged from now on; None if nothing changes."""
        new = in_force(log, features)
        if new is in_force(self.log, self.features) or not self.table.regions:
            return None
        if new is not None:
            new.check(self.table, self.rings, features or 0)
        return self._logged(self.table, new)

    def _logged(self, table: MemoryTable, log: DirtyLog | None) -> GuestMemory:
        if log is None:
            return self._as_reached(table)
        log.check(table, (), self.features or 0)
        return self._as_reached(table).with_log(log.mapped)

    def _drop_log(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None

    def set_backend_req_fd(self, payload: p.Empty, fds: Descriptors) -> None:
        channel = BackChannel(fds.peek()[0])
        if self.back_channel is not None:
            self.back_channel.close()
        self.back_channel = channel

    # Ends.

    def fail(self, index: int, error: str) -> None:
        """The device gave up a running ring: the front-end is told through the error descriptor."""
        ring = self.rings[index]
        ring.failure = error
        signal(ring.err_fd)

    def close(self) -> None:
        """Stops every ring and closes every descriptor; errors of the device are logged and do not stop this."""
        for ring in self.rings:
            try:
                self._stop(ring)
            except Exception:
                log.exception("the device failed to stop queue %d", ring.index)
            ring.close()
        if self.iommu is not None:
            self.iommu.close()
            self.iommu = None
        if self.back_channel is not None:
            self.back_channel.close()
            self.back_channel = None
        self._drop_log()
        if self.log_event is not None:
            os.close(self.log_event)
            self.log_event = None
        self.table = MemoryTable()


_MEMORY = 'vhost-user, "Memory access"'
_LOG = 'vhost-user, "Log description" and "Migration"'
