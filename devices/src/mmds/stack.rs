//! The service on one network interface: frames of the guest in, frames for the guest out.
//!
//! ARP is answered here; TCP over IPv4 goes to smoltcp, without its Ethernet header and whatever
//! address that had, since a guest without a route of its own sends to its gateway. Answers go to the
//! address that the last frame came from.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, ETHERNET_HEADER_LEN, EthernetAddress, EthernetFrame,
    EthernetProtocol, HardwareAddress, IpAddress, IpCidr, IpProtocol, Ipv4Packet, TcpPacket,
};

use super::connection::{Connection, listen, socket};
use super::link::Link;
use super::store::Mmds;
use crate::random::fill;
use crate::virtio::net::{DETOUR_HEAD, Detour};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 30;
/// The service's own Ethernet address, Firecracker's.
const ADDRESS: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
/// Where IPv4 packets have their destination, and ARP requests what they ask for, behind the start of
/// a frame.
const DESTINATION: usize = ETHERNET_HEADER_LEN + 16;
const ASKED_FOR: usize = ETHERNET_HEADER_LEN + 24;
/// All that can be done at once is done before a moment to wait for is asked for.
const LEAST_WAIT: Duration = Duration::from_millis(10);
/// A connection that nothing happened on for so long makes room for another.
const IDLE: StackDuration = StackDuration::from_secs(1);

/// The metadata service on a network interface.
#[derive(Debug)]
pub struct Stack {
    mmds: Arc<Mmds>,
    address: Ipv4Addr,
    begin: Instant,
    /// Who is answered.
    guest: EthernetAddress,
    /// An answer to ARP.
    arp: Option<Vec<u8>>,
    /// From the first packet on.
    tcp: Option<Box<Tcp>>,
}

/// smoltcp, with the connections over its sockets.
struct Tcp {
    interface: Interface,
    link: Link,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
}

impl std::fmt::Debug for Tcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tcp")
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

impl Tcp {
    fn new(address: Ipv4Addr, now: StackInstant) -> Self {
        let mut link = Link::default();
        let mut seed = [0; 8];
        if let Err(error) = fill(&mut seed) {
            // Numbers that can be guessed endanger nobody but the guest that guesses.
            log::warn!("no random numbers for the metadata service: {error}");
        }
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_le_bytes(seed);
        let mut interface = Interface::new(config, &mut link, now);
        interface.update_ip_addrs(|addresses| {
            // The first of two places.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(address), 32));
        });
        // Whoever asks is beyond the link.
        let _ = interface.routes_mut().add_default_ipv4_route(address);
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..MAX_CONNECTIONS).map(|_| Connection::new(sockets.add(socket())));
        Self {
            connections: connections.collect(),
            interface,
            link,
            sockets,
        }
    }

    /// Does all that can be done now.
    fn run(&mut self, mmds: &Mmds, now: StackInstant) {
        loop {
            self.interface.poll(now, &mut self.link, &mut self.sockets);
            let mut changed = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<Socket<'_>>(connection.handle);
                changed |= connection.serve(socket, mmds, now);
            }
            if !changed {
                break;
            }
        }
    }

    /// Makes room for a connection, where there is none: one that never came about goes, or the one
    /// that was used least recently.
    fn make_room(&mut self, now: StackInstant) {
        let state = |handle| self.sockets.get::<Socket<'_>>(handle).state();
        let mut all = self.connections.iter();
        if all.any(|connection| state(connection.handle) == State::Listen) {
            return;
        }
        let half_open = |handle| state(handle) == State::SynReceived;
        let victim = self
            .connections
            .iter()
            .min_by_key(|one| (!half_open(one.handle), one.used))
            .filter(|one| half_open(one.handle) || now >= one.used + IDLE)
            .map(|one| one.handle);
        if let Some(handle) = victim {
            self.sockets.get_mut::<Socket<'_>>(handle).abort();
            // Tells the other side; a socket without room for that is taken all the same.
            self.interface
                .poll_egress(now, &mut self.link, &mut self.sockets);
            listen(self.sockets.get_mut(handle));
        }
    }
}

impl Stack {
    /// The service of `mmds` at `address`.
    pub fn new(mmds: Arc<Mmds>, address: Ipv4Addr) -> Self {
        Self {
            mmds,
            address,
            begin: Instant::now(),
            guest: EthernetAddress::BROADCAST,
            arp: None,
            tcp: None,
        }
    }

    fn now(&self) -> StackInstant {
        let micros = self.begin.elapsed().as_micros();
        StackInstant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    fn run(&mut self) {
        let now = self.now();
        if let Some(tcp) = &mut self.tcp {
            tcp.run(&self.mmds, now);
        }
    }

    fn answer_arp(&mut self, packet: &[u8]) -> Option<()> {
        let packet = ArpPacket::new_checked(packet).ok()?;
        let ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            ..
        } = ArpRepr::parse(&packet).ok()?
        else {
            return None;
        };
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: ADDRESS,
            source_protocol_addr: self.address,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let mut frame = vec![0; ETHERNET_HEADER_LEN + reply.buffer_len()];
        let mut ethernet = EthernetFrame::new_unchecked(frame.as_mut_slice());
        ethernet.set_ethertype(EthernetProtocol::Arp);
        reply.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
        self.arp = Some(frame);
        Some(())
    }

    /// Takes a TCP segment in an IPv4 packet. Nothing else gets as far as the stack.
    fn take(&mut self, bytes: &[u8]) -> Option<()> {
        let packet = Ipv4Packet::new_checked(bytes).ok()?;
        let source = packet.src_addr();
        let strange = source.is_unspecified()
            || source.is_broadcast()
            || source.is_multicast()
            || source.is_loopback()
            || source == self.address;
        let whole = !packet.more_frags() && packet.frag_offset() == 0;
        if strange || !whole || packet.version() != 4 || packet.next_header() != IpProtocol::Tcp {
            return None;
        }
        let segment = TcpPacket::new_checked(packet.payload()).ok()?;
        let begins = segment.syn() && !segment.ack();
        let packet = bytes.get(..usize::from(packet.total_len()))?.to_vec();
        self.mmds.counters().rx_count.add(1);
        let (now, address) = (self.now(), self.address);
        let tcp = self
            .tcp
            .get_or_insert_with(|| Box::new(Tcp::new(address, now)));
        if begins {
            tcp.make_room(now);
        }
        tcp.link.incoming = Some(packet);
        tcp.run(&self.mmds, now);
        Some(())
    }

    /// Frames that wait for the guest.
    fn waiting(&self) -> bool {
        let tcp = self.tcp.as_ref();
        self.arp.is_some() || tcp.is_some_and(|tcp| !tcp.link.outgoing.is_empty())
    }
}

impl Detour for Stack {
    fn takes(&self, start: &[u8; DETOUR_HEAD]) -> bool {
        let frame = EthernetFrame::new_unchecked(start.as_slice());
        let at = match frame.ethertype() {
            EthernetProtocol::Ipv4 => DESTINATION,
            EthernetProtocol::Arp => ASKED_FOR,
            _ => return false,
        };
        start.get(at..at + 4) == Some(self.address.octets().as_slice())
    }

    fn send(&mut self, frame: &[u8]) {
        let counters = self.mmds.counters();
        counters.rx_accepted.add(1);
        let ethernet = EthernetFrame::new_checked(frame);
        let Some(ethernet) = ethernet.ok().filter(|one| one.src_addr().is_unicast()) else {
            counters.rx_bad_eth.add(1);
            return;
        };
        self.guest = ethernet.src_addr();
        let taken = match ethernet.ethertype() {
            EthernetProtocol::Arp => self.answer_arp(ethernet.payload()),
            _ => self.take(ethernet.payload()),
        };
        if taken.is_none() {
            self.mmds.counters().rx_accepted_unusual.add(1);
        }
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut frame = match self.arp.take() {
            Some(frame) => frame,
            None => {
                if !self.waiting() {
                    self.run();
                }
                let mut frame = self.tcp.as_mut()?.link.outgoing.pop_front()?;
                let mut ethernet = EthernetFrame::new_unchecked(frame.as_mut_slice());
                ethernet.set_ethertype(EthernetProtocol::Ipv4);
                frame
            }
        };
        let mut ethernet = EthernetFrame::new_unchecked(frame.as_mut_slice());
        ethernet.set_src_addr(ADDRESS);
        ethernet.set_dst_addr(self.guest);
        let counters = self.mmds.counters();
        counters.tx_frames.add(1);
        counters.tx_bytes.add(frame.len() as u64);
        Some(frame)
    }

    fn is_waiting(&self) -> bool {
        self.waiting()
    }

    fn due(&mut self) -> Option<Instant> {
        let now = self.now();
        let tcp = self.tcp.as_mut()?;
        let wait = tcp.interface.poll_delay(now, &tcp.sockets)?;
        Some(Instant::now() + Duration::from(wait).max(LEAST_WAIT))
    }

    fn reset(&mut self) {
        (self.arp, self.tcp) = (None, None);
    }
}
