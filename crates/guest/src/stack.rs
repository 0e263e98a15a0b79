//! The guest's TCP/IP stack: a smoltcp interface over a [`Link`], and the sockets that outlive both.
//!
//! The link may go away (the back-end is restarted) and another come. Sockets stay, so TCP goes on by retransmitting;
//! the interface is made anew, because smoltcp asks its device for capabilities only once.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::{AnySocket, icmp, tcp, udp};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv6Cidr};

use crate::announce::{self, Mac};
use crate::device::StackDevice;
use crate::link::Link;

/// Who the guest is.
#[derive(Clone, Debug)]
pub struct StackConfig {
    /// MAC address; must be unicast.
    pub mac: Mac,
    /// Addresses with their prefix lengths.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Router for everything else, one for each IP version.
    pub gateways: Vec<IpAddr>,
    /// Largest IP packet.
    pub mtu: usize,
    /// Seed of TCP sequence numbers and ephemeral ports.
    pub seed: u64,
}

/// Why a stack cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StackError {
    /// The MAC address is a group address or zero.
    #[error("{0:02x?} is no address for an interface: it must be unicast and not zero (virtio 1.2, 5.1.4)")]
    Mac(Mac),
    /// The MTU cannot be carried.
    #[error("MTU {0} is not allowed: 68 to 65521 (virtio 1.2, 5.1.4.1), and at least 1280 with IPv6 (RFC 8200, 5)")]
    Mtu(usize),
    /// More addresses than the interface holds.
    #[error("{0} addresses are too many: at most {MAX_ADDRESSES}")]
    Addresses(usize),
    /// A prefix length that its IP version does not have.
    #[error("prefix length {1} of {0} is not allowed: 0 to 32 for IPv4, 0 to 128 for IPv6")]
    Prefix(IpAddr, u8),
    /// More gateways than one for each IP version.
    #[error("several gateways for one IP version: at most one each")]
    Gateways,
}

/// Most addresses of a guest; one slot is kept for the link-local IPv6 address.
pub const MAX_ADDRESSES: usize = 7;
/// Largest MTU: a frame is at most 65535 bytes with its Ethernet header.
pub const MAX_MTU: usize = 65521;

/// Bytes of a TCP socket's buffers, each way: the window. Fewer packets of 1500 bytes than a queue of 256 holds.
const TCP_BUFFER: usize = 1 << 18;
/// The same when segments of 64 KiB come, which fill a queue far less.
const TCP_BUFFER_SEGMENTS: usize = 1 << 19;
/// Datagrams that wait in a socket.
const DATAGRAMS: usize = 256;
/// Bytes of these.
const DATAGRAM_BYTES: usize = 1 << 20;

/// The stack.
pub struct Stack {
    config: StackConfig,
    interface: Box<Interface>,
    sockets: SocketSet<'static>,
    device: StackDevice,
    origin: std::time::Instant,
    next_port: u16,
}

impl Stack {
    /// A stack without a link.
    ///
    /// # Errors
    /// [`StackError`] for what the configuration has wrong.
    pub fn new(config: StackConfig) -> Result<Stack, StackError> {
        check(&config)?;
        let mut device = StackDevice::new(config.mtu);
        let interface = interface(&config, &mut device, Instant::ZERO);
        Ok(Stack {
            // From the dynamic ports (RFC 6335, 6).
            next_port: 49152 + (config.seed % 16384) as u16,
            config,
            interface,
            sockets: SocketSet::new(Vec::new()),
            device,
            origin: std::time::Instant::now(),
        })
    }

    /// Who the guest is.
    pub fn config(&self) -> &StackConfig {
        &self.config
    }

    /// Time since the stack was made.
    pub fn now(&self) -> Instant {
        // Microseconds of half a million years fit.
        Instant::from_micros(self.origin.elapsed().as_micros() as i64)
    }

    /// Plugs a link in and tells the network who is here.
    pub fn attach(&mut self, link: Box<dyn Link>) {
        self.device.attach(link);
        let now = self.now();
        self.interface = interface(&self.config, &mut self.device, now);
        self.announce();
    }

    /// Pulls the link out.
    pub fn detach(&mut self) -> Option<Box<dyn Link>> {
        self.device.detach()
    }

    /// The link, if there is one.
    pub fn link(&mut self) -> Option<&mut (dyn Link + 'static)> {
        self.device.link()
    }

    /// Tells switches where our MAC address is and neighbours which one our IPv4 addresses have.
    pub fn announce(&mut self) {
        self.device.send_raw(&mut announce::rarp(self.config.mac));
        for (address, _) in &self.config.addresses {
            if let IpAddr::V4(address) = address {
                self.device.send_raw(&mut announce::gratuitous_arp(self.config.mac, *address));
            }
        }
    }

    /// Asks for the MAC address of `remote`. smoltcp would do so by itself, but asks at most one question a second,
    /// whoever it is about. When `remote` is behind a gateway nobody answers, which does no harm.
    pub fn solicit(&mut self, remote: IpAddr) {
        let mac = self.config.mac;
        let mut frame = match (self.source_address(remote), remote) {
            (Some(IpAddr::V4(sender)), IpAddr::V4(remote)) => announce::arp_request(mac, sender, remote),
            (Some(IpAddr::V6(sender)), IpAddr::V6(remote)) => announce::neighbor_solicitation(mac, sender, remote),
            _ => return,
        };
        self.device.send_raw(&mut frame);
    }

    /// Moves frames between link and sockets, a bounded number of them. Returns whether there may be more to do.
    pub fn poll(&mut self) -> bool {
        let now = self.now();
        self.interface.poll_maintenance(now);
        let mut received = 0;
        while received < BURST {
            self.send_fragments(now);
            match self.interface.poll_ingress_single(now, &mut self.device, &mut self.sockets) {
                PollIngressSingleResult::None => break,
                _ => received += 1,
            }
        }
        let mut sent = 0;
        while sent < BURST {
            self.send_fragments(now);
            match self.interface.poll_egress(now, &mut self.device, &mut self.sockets) {
                PollResult::None => break,
                PollResult::SocketStateChanged => sent += 1,
            }
        }
        if let Some(link) = self.device.link() {
            link.flush();
        }
        received == BURST || sent == BURST
    }

    /// Sends the fragments of one packet as far as the link has room: the next packet would push them out.
    fn send_fragments(&mut self, now: Instant) {
        while self.device.fragmenting() && self.device.link().is_some_and(|link| link.can_transmit()) {
            let (interface, sockets) = (&mut self.interface, &mut self.sockets);
            self.device.pass_fragment(|device| {
                interface.poll_egress(now, device, sockets);
            });
        }
    }

    /// How long the stack can wait for the next frame before a timer of its own is due. `None`: for ever.
    pub fn poll_delay(&mut self) -> Option<std::time::Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(Into::into)
    }

    /// A TCP socket, not connected.
    pub fn tcp(&mut self) -> SocketHandle {
        let size = if self.device.segmentation() { TCP_BUFFER_SEGMENTS } else { TCP_BUFFER };
        let buffer = || tcp::SocketBuffer::new(vec![0; size]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_congestion_control(tcp::CongestionControl::Cubic);
        // Throughput tests write large blocks; holding the last short segment back would only delay their end.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(Duration::from_millis(1)));
        self.sockets.add(socket)
    }

    /// A UDP socket, not bound.
    pub fn udp(&mut self) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; DATAGRAMS], vec![0; DATAGRAM_BYTES]);
        self.sockets.add(udp::Socket::new(buffer(), buffer()))
    }

    /// A socket for ICMP messages, not bound. It holds as many replies of the largest size as come between two turns of
    /// its owner.
    pub fn icmp(&mut self) -> SocketHandle {
        let buffer =
            |n| icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; n], vec![0; n * usize::from(u16::MAX)]);
        self.sockets.add(icmp::Socket::new(buffer(BURST), buffer(4)))
    }

    /// A socket by its handle.
    pub fn socket<T: AnySocket<'static>>(&mut self, handle: SocketHandle) -> &mut T {
        self.sockets.get_mut(handle)
    }

    /// Forgets a socket.
    pub fn remove(&mut self, handle: SocketHandle) {
        self.sockets.remove(handle);
    }

    /// Begins to connect a TCP socket.
    ///
    /// # Errors
    /// When the address is not one that can be connected to, or there is no source address for it.
    pub fn connect(&mut self, handle: SocketHandle, remote: IpAddr, port: u16) -> Result<(), tcp::ConnectError> {
        let local = self.ephemeral_port();
        let socket: &mut tcp::Socket<'_> = self.sockets.get_mut(handle);
        socket.connect(self.interface.context(), (IpAddress::from(remote), port), local)
    }

    /// A port number for a new connection.
    pub fn ephemeral_port(&mut self) -> u16 {
        let port = self.next_port;
        self.next_port = if port == u16::MAX { 49152 } else { port + 1 };
        port
    }

    /// The address that packets to `remote` come from, if the guest has one of that IP version.
    pub fn source_address(&self, remote: IpAddr) -> Option<IpAddr> {
        self.interface.get_source_address(&remote.into()).map(Into::into)
    }
}

/// Frames received, and rounds of sending, before the sockets' owners get their turn.
const BURST: usize = 64;

fn check(config: &StackConfig) -> Result<(), StackError> {
    if config.mac[0] & 1 != 0 || config.mac == [0; 6] {
        return Err(StackError::Mac(config.mac));
    }
    let v6 = config.addresses.iter().any(|(address, _)| address.is_ipv6());
    if config.mtu < if v6 { 1280 } else { 68 } || config.mtu > MAX_MTU {
        return Err(StackError::Mtu(config.mtu));
    }
    if config.addresses.len() > MAX_ADDRESSES {
        return Err(StackError::Addresses(config.addresses.len()));
    }
    if let Some(&(address, prefix)) = config.addresses.iter().find(|(a, p)| *p > if a.is_ipv4() { 32 } else { 128 }) {
        return Err(StackError::Prefix(address, prefix));
    }
    let v4_gateways = config.gateways.iter().filter(|g| g.is_ipv4()).count();
    if v4_gateways > 1 || config.gateways.len() - v4_gateways > 1 {
        return Err(StackError::Gateways);
    }
    Ok(())
}

fn interface(config: &StackConfig, device: &mut StackDevice, now: Instant) -> Box<Interface> {
    let mut settings = Config::new(HardwareAddress::Ethernet(EthernetAddress(config.mac)));
    settings.random_seed = config.seed;
    let mut interface = Box::new(Interface::new(settings, device, now));
    let v6 = config.addresses.iter().any(|(address, _)| address.is_ipv6());
    interface.update_ip_addrs(|list| {
        let addresses = config.addresses.iter().map(|&(address, prefix)| IpCidr::new(address.into(), prefix));
        // The number was checked: there is room for these and the link-local one.
        list.extend(addresses);
        if v6 {
            let _ = list.push(IpCidr::Ipv6(link_local(config.mac)));
        }
    });
    for gateway in &config.gateways {
        // Two routes fit, and there is at most one gateway for each IP version.
        let _ = match gateway {
            IpAddr::V4(gateway) => interface.routes_mut().add_default_ipv4_route(*gateway).err(),
            IpAddr::V6(gateway) => interface.routes_mut().add_default_ipv6_route(*gateway).err(),
        };
    }
    interface
}

/// The link-local address made from a MAC address (RFC 4291, appendix A).
fn link_local(mac: Mac) -> Ipv6Cidr {
    let [a, b, c, d, e, f] = mac;
    let half = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    let address = std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, half(a ^ 2, b), half(c, 0xff), half(0xfe, d), half(e, f));
    Ipv6Cidr::new(address, 64)
}

/// Whether an address can be sent to as one host.
pub fn is_host(address: IpAddr) -> bool {
    !(address.is_unspecified() || address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST))
}
