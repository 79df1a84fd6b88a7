//! A guest with a TCP stack of its own on the other side of the frames.

use std::collections::VecDeque;
use std::sync::Arc;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint};

use super::super::*;
use crate::virtio::net::{DETOUR_HEAD, Detour};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

#[derive(Default)]
struct Wire {
    to_guest: VecDeque<Vec<u8>>,
    from_guest: VecDeque<Vec<u8>>,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        Some((Rx(self.to_guest.pop_front()?), Tx(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

pub struct Guest {
    pub mmds: Arc<Mmds>,
    pub stack: Stack,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    now: i64,
    port: u16,
}

/// What of a frame is looked at first.
pub fn head(frame: &[u8]) -> [u8; DETOUR_HEAD] {
    let mut start = [0; DETOUR_HEAD];
    let len = frame.len().min(DETOUR_HEAD);
    start[..len].copy_from_slice(&frame[..len]);
    start
}

/// Status and body of an answer.
pub fn lines(answer: &str) -> (&str, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    (head.split(' ').nth(1).unwrap_or_default(), body.to_owned())
}

impl Guest {
    pub fn new(mmds: Arc<Mmds>) -> Self {
        let mut wire = Wire::default();
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|all| {
            all.push(IpCidr::new(IpAddress::v4(169, 254, 3, 4), 16))
                .unwrap();
        });
        Self {
            stack: Stack::new(mmds.clone(), DEFAULT_ADDRESS),
            mmds,
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            now: 0,
            port: 50_000,
        }
    }

    /// Lets both sides work until nothing is to be done.
    pub fn settle(&mut self) {
        loop {
            self.now += 1;
            let now = Instant::from_millis(self.now);
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            let mut quiet = self.wire.from_guest.is_empty();
            while let Some(frame) = self.wire.from_guest.pop_front() {
                assert!(self.stack.takes(&head(&frame)));
                self.stack.send(&frame);
            }
            while let Some(frame) = self.stack.receive() {
                assert_eq!(frame[..6], MAC);
                self.wire.to_guest.push_back(frame);
                quiet = false;
            }
            if quiet {
                break;
            }
        }
    }

    pub fn connect(&mut self) -> SocketHandle {
        self.port += 1;
        let buffer = || SocketBuffer::new(vec![0; 1 << 16]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let to = IpEndpoint::new(IpAddress::Ipv4(DEFAULT_ADDRESS), 80);
        socket
            .connect(self.interface.context(), to, self.port)
            .unwrap();
        let handle = self.sockets.add(socket);
        self.settle();
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn say(&mut self, handle: SocketHandle, bytes: &[u8]) {
        assert_eq!(self.socket(handle).send_slice(bytes), Ok(bytes.len()));
        self.settle();
    }

    /// All that has come.
    pub fn hear(&mut self, handle: SocketHandle) -> String {
        let mut heard = Vec::new();
        loop {
            let mut bytes = [0; 4096];
            match self.socket(handle).recv_slice(&mut bytes) {
                Ok(count) if count > 0 => heard.extend_from_slice(&bytes[..count]),
                _ => break,
            }
            self.settle();
        }
        String::from_utf8(heard).unwrap()
    }

    /// Whether the service still listens on this connection.
    pub fn is_open(&mut self, handle: SocketHandle) -> bool {
        self.socket(handle).may_recv()
    }

    /// One request on a connection of its own.
    pub fn ask(&mut self, request: &str) -> String {
        let handle = self.connect();
        self.say(handle, request.as_bytes());
        let answer = self.hear(handle);
        self.socket(handle).close();
        self.settle();
        self.sockets.remove(handle);
        answer
    }
}
