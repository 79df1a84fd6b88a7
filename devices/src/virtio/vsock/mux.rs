//! All connections of a device, and who has something for the guest.
//!
//! Owned by the device's I/O thread. Everything a guest or a host's client can make is bounded:
//! connections, handshakes, resets that wait for a buffer, and buffers by what all were granted.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::conn::{Conn, Packet, Produced, State, Verdict};
use super::host::{grow, read_connect};
use super::packet::{HEADER, HOST_CID, Header, Kind, op};
use crate::counters::Counter;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Io, total};
use crate::virtio::iovecs::would_block;
use crate::virtio::poll::{Poller, Ready};
use crate::virtio::uds::{Listener, dial};

/// What a connection is granted, as Linux has it, and what it is granted when memory is short.
const GRANT: u32 = 256 << 10;
const MIN_GRANT: u32 = 16 << 10;
/// Grants are short once connections may need so much memory.
const MEMORY: usize = 256 << 20;
/// Clients that have not yet said what they want.
const MAX_HANDSHAKES: usize = 256;
/// Resets that wait for a buffer; what comes then gets none.
const MAX_RESETS: usize = 1024;
/// First port of connections that the host makes, and their number.
const FIRST_PORT: u32 = 1 << 30;
const PORTS: u32 = 1 << 30;

/// How long what may take.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A client until it has said what it wants.
    pub handshake: Duration,
    /// A listener of the host that has too many waiting, as long as the guest's own connects.
    pub dial: Duration,
    /// Between attempts at that.
    pub dial_again: Duration,
    /// The guest until it answers a request.
    pub request: Duration,
    /// The guest until it agrees to the end of a connection.
    pub close: Duration,
    /// The host until it has read what a guest left behind.
    pub drain: Duration,
    /// Until clients are accepted again that could not be.
    pub accept_again: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            dial: Duration::from_secs(2),
            dial_again: Duration::from_millis(10),
            request: Duration::from_secs(5),
            close: Duration::from_secs(8),
            drain: Duration::from_secs(60),
            accept_again: Duration::from_millis(100),
        }
    }
}

/// A port of the host, in the upper half, and one of the guest: names a connection, its events and
/// its deadline. No connection has the highest port, which names the rest.
type Key = u64;
const OTHERS: u64 = (u32::MAX as u64) << 32;
const ACCEPT: Key = OTHERS | 0xffff_ffff;
pub const TIMER: Key = OTHERS | 0xffff_fffe;

fn key(host: u32, guest: u32) -> Key {
    u64::from(host) << 32 | u64::from(guest)
}

/// A client that has not yet said what it wants.
#[derive(Debug)]
struct Handshake {
    socket: OwnedFd,
    kind: Kind,
    deadline: Instant,
}

#[derive(Debug)]
pub struct Mux {
    cid: u64,
    path: PathBuf,
    max: usize,
    pub times: Times,
    pub poller: Poller,
    listeners: Vec<Listener>,
    conns: HashMap<Key, Conn>,
    handshakes: HashMap<Key, Handshake>,
    /// Those that have something for the guest.
    ready: VecDeque<Key>,
    resets: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, Key)>,
    /// Memory that all connections may come to need.
    memory: usize,
    next_port: u32,
    next_handshake: u32,
    /// Clients wait to be accepted.
    waiting: bool,
    counters: Arc<Counters>,
}

/// What a socket device has done.
#[derive(Debug, Default)]
pub struct Counters {
    pub rx_queue_event_count: Counter,
    pub tx_queue_event_count: Counter,
    pub rx_bytes_count: Counter,
    pub tx_bytes_count: Counter,
    pub rx_packets_count: Counter,
    pub tx_packets_count: Counter,
    pub conns_added: Counter,
    pub conns_killed: Counter,
    pub conns_removed: Counter,
    pub rx_read_fails: Counter,
    pub tx_write_fails: Counter,
}

impl Mux {
    pub fn new(cid: u64, path: PathBuf, max: usize, listeners: Vec<Listener>) -> io::Result<Self> {
        let poller = Poller::new()?;
        for listener in &listeners {
            poller.add(listener, ACCEPT)?;
        }
        Ok(Self {
            cid,
            path,
            max,
            times: Times::default(),
            poller,
            listeners,
            conns: HashMap::new(),
            handshakes: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            memory: 0,
            next_port: 0,
            next_handshake: 0,
            waiting: false,
            counters: Arc::default(),
        })
    }

    /// Number of connections, without those the guest has left.
    pub fn len(&self) -> usize {
        let conns = self.conns.values();
        conns.filter(|c| c.state != State::Draining).count()
    }

    /// What happened.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Whether the guest has connections.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops all connections, and says nothing.
    pub fn clear(&mut self) {
        let gone = self.conns.len() as u64;
        self.counters.conns_removed.add(gone);
        self.conns.clear();
        self.handshakes.clear();
        self.ready.clear();
        self.resets.clear();
        self.deadlines.clear();
        self.memory = 0;
        self.waiting = true;
    }

    /// When something has to happen next.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Takes a packet from the guest.
    pub fn take(&mut self, packet: Packet<'_>, seqpacket: bool) -> Result<(), DeviceError> {
        let header = packet.header;
        if header.src_cid != self.cid {
            return Ok(());
        }
        let key = key(header.dst_port, header.src_port);
        let kind = Kind::from_number(header.kind);
        let kind = kind.filter(|kind| seqpacket || *kind == Kind::Stream);
        let (Some(kind), HOST_CID) = (kind, header.dst_cid) else {
            self.refuse(&header);
            return Ok(());
        };
        if let Some(conn) = self.conns.get_mut(&key) {
            if conn.state == State::Draining {
                self.refuse(&header);
                return Ok(());
            }
            let verdict = conn.take(packet)?;
            self.settle(key, verdict);
        } else if header.op == op::REQUEST && header.dst_port != u32::MAX {
            self.request(&header, kind);
        } else {
            self.refuse(&header);
        }
        Ok(())
    }

    /// Answers with a reset, except to one.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.reset(header.reset());
        }
    }

    fn reset(&mut self, header: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(header);
        }
    }

    fn is_full(&self) -> bool {
        self.conns.len() + self.handshakes.len() >= self.max
    }

    /// The guest wants a connection.
    fn request(&mut self, header: &Header, kind: Kind) {
        if self.is_full() {
            return self.refuse(header);
        }
        let until = Instant::now() + self.times.dial;
        let ports = (header.dst_port, header.src_port);
        let key = self.insert(kind, ports, State::Dialing { until });
        if let Some(conn) = self.conns.get_mut(&key) {
            conn.grant(header);
        }
        self.dial(key);
    }

    fn insert(&mut self, kind: Kind, ports: (u32, u32), state: State) -> Key {
        // Messages have lengths as well.
        let weight = match kind {
            Kind::Stream => 1,
            Kind::Seqpacket => 2,
        };
        let mut grant = GRANT;
        if self.memory + weight * GRANT as usize > MEMORY {
            grant = MIN_GRANT;
        }
        let mut conn = Conn::new(kind, self.cid, ports, grant, state);
        conn.cost = weight * grant as usize;
        self.memory += conn.cost;
        let key = key(ports.0, ports.1);
        self.conns.insert(key, conn);
        self.counters.conns_added.one();
        key
    }

    /// Connects to the host's listener.
    fn dial(&mut self, key: Key) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        let State::Dialing { until } = conn.state else {
            return;
        };
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key >> 32));
        match dial(path.as_ref(), conn.kind.socket_type()) {
            Ok(socket) => {
                conn.state = State::Open;
                conn.tell(op::RESPONSE);
                self.attach(key, socket);
            }
            Err(error) if would_block(&error) && Instant::now() < until => {
                self.set_deadline(key, Some(self.times.dial_again));
            }
            Err(_) => self.settle(key, Verdict::Reset),
        }
    }

    /// Gives a connection its socket.
    fn attach(&mut self, key: Key, socket: OwnedFd) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        if conn.kind == Kind::Seqpacket {
            grow(&socket, GRANT as usize);
        }
        let added = self.poller.add(&socket, key);
        conn.socket = Some(socket);
        let time = (conn.state == State::Requested).then_some(self.times.request);
        self.set_deadline(key, time);
        let verdict = match added {
            Ok(()) => Verdict::Keep,
            Err(_) => Verdict::Reset,
        };
        self.settle(key, verdict);
    }

    fn set_deadline(&mut self, key: Key, after: Option<Duration>) {
        if let Some(conn) = self.conns.get_mut(&key) {
            let at = after.map(|after| Instant::now() + after);
            if let Some(old) = std::mem::replace(&mut conn.deadline, at) {
                self.deadlines.remove(&(old, key));
            }
            self.deadlines.extend(at.map(|at| (at, key)));
        }
    }

    /// Does with a connection what has to be done.
    fn settle(&mut self, key: Key, verdict: Verdict) {
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        match verdict {
            Verdict::Keep => {
                let closing = conn.state == State::Closed && conn.deadline.is_none();
                if conn.has_work() && !std::mem::replace(&mut conn.queued, true) {
                    match conn.is_amid_message() {
                        true => self.ready.push_front(key),
                        false => self.ready.push_back(key),
                    }
                }
                if closing {
                    self.set_deadline(key, Some(self.times.close));
                } else if conn.state == State::Open && conn.deadline.is_some() {
                    self.set_deadline(key, None);
                }
            }
            Verdict::Drain => {
                let reset = conn.reset();
                conn.state = State::Draining;
                conn.forget();
                self.reset(reset);
                self.set_deadline(key, Some(self.times.drain));
            }
            Verdict::Reset | Verdict::Remove => {
                let reset = (verdict == Verdict::Reset).then(|| conn.reset());
                let [reads, writes] = conn.failures;
                self.memory -= conn.cost.min(self.memory);
                if conn.queued {
                    // Or a guest that comes and goes would make the list grow.
                    self.ready.retain(|other| *other != key);
                }
                self.set_deadline(key, None);
                self.conns.remove(&key);
                self.counters.conns_removed.one();
                self.counters.rx_read_fails.add(reads.into());
                self.counters.tx_write_fails.add(writes.into());
                if verdict == Verdict::Reset {
                    self.counters.conns_killed.one();
                }
                if let Some(reset) = reset {
                    self.reset(reset);
                }
                self.accept();
            }
        }
    }

    /// Something happened on the host.
    pub fn event(&mut self, ready: Ready) {
        match ready.token {
            TIMER => self.expire(),
            ACCEPT => {
                self.waiting = true;
                self.accept();
            }
            token if token >= OTHERS => self.shake(token),
            key => {
                if let Some(conn) = self.conns.get_mut(&key) {
                    let verdict = conn.ready(ready.readable, ready.writable, ready.hung_up);
                    self.settle(key, verdict);
                }
            }
        }
    }

    /// Ends what took too long.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some((at, key)) = self.deadlines.first().copied() {
            if at > now {
                return;
            }
            self.deadlines.pop_first();
            if key >= OTHERS {
                self.waiting |= key == ACCEPT;
                self.handshakes.remove(&key);
                self.accept();
                continue;
            }
            let Some(conn) = self.conns.get_mut(&key) else {
                continue;
            };
            conn.deadline = None;
            match conn.state {
                State::Dialing { .. } => self.dial(key),
                State::Draining => self.settle(key, Verdict::Remove),
                State::Open => {}
                State::Requested | State::Closed => self.settle(key, Verdict::Reset),
            }
        }
    }

    /// Accepts clients as far as there is room. The others wait in the kernel.
    pub fn accept(&mut self) {
        while self.waiting && !self.is_full() && self.handshakes.len() < MAX_HANDSHAKES {
            let mut blocked = 0;
            let mut accepted = Vec::new();
            for listener in &self.listeners {
                match listener.accept() {
                    Ok(socket) => accepted.push((socket, Kind::of_socket(listener.kind()))),
                    Err(error) if would_block(&error) => blocked += 1,
                    // No file descriptors, say: a client that left meanwhile is no matter.
                    Err(_) => {
                        let again = Instant::now() + self.times.accept_again;
                        self.deadlines.insert((again, ACCEPT));
                        self.waiting = false;
                    }
                }
            }
            if blocked == self.listeners.len() {
                self.waiting = false;
            }
            for (socket, kind) in accepted {
                self.next_handshake = (self.next_handshake + 1) % 0x8000_0000;
                let token = OTHERS | u64::from(self.next_handshake);
                if self.poller.add(&socket, token).is_err() {
                    continue;
                }
                let deadline = Instant::now() + self.times.handshake;
                self.deadlines.insert((deadline, token));
                let handshake = Handshake {
                    socket,
                    kind,
                    deadline,
                };
                self.handshakes.insert(token, handshake);
            }
        }
    }

    /// A client says what it wants.
    fn shake(&mut self, token: Key) {
        let Some(handshake) = self.handshakes.get(&token) else {
            return;
        };
        let port = match read_connect(&handshake.socket) {
            Err(error) if would_block(&error) => return,
            port => port,
        };
        let Some(Handshake {
            socket,
            kind,
            deadline,
        }) = self.handshakes.remove(&token)
        else {
            return;
        };
        self.deadlines.remove(&(deadline, token));
        self.poller.remove(&socket);
        if let Ok(guest) = port
            && let Some(host) = self.free_port(guest)
        {
            let key = self.insert(kind, (host, guest), State::Requested);
            if let Some(conn) = self.conns.get_mut(&key) {
                conn.tell(op::REQUEST);
            }
            self.attach(key, socket);
        }
        self.accept();
    }

    fn free_port(&mut self, guest: u32) -> Option<u32> {
        for _ in 0..=self.conns.len() {
            let port = FIRST_PORT + self.next_port;
            self.next_port = (self.next_port + 1) % PORTS;
            if !self.conns.contains_key(&key(port, guest)) {
                return Some(port);
            }
        }
        None
    }

    /// Gives the guest packets as long as it has buffers in queue `rx`.
    pub fn pump(&mut self, rx: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let ram = io.ram();
        let mut spare = None;
        while !(self.resets.is_empty() && self.ready.is_empty()) {
            let chain = match spare.take() {
                Some(chain) => chain,
                None => match io.pop(rx)? {
                    Some(chain) => chain,
                    None => return Ok(()),
                },
            };
            if total(chain.writable()) < HEADER {
                io.complete(chain, 0)?;
                continue;
            }
            if let Some(reset) = self.resets.pop_front() {
                reset.write(ram, &chain)?;
                self.counters.rx_packets_count.one();
                io.complete(chain, HEADER as u32)?;
                continue;
            }
            let key = self.ready.pop_front();
            let Some((key, conn)) = key.and_then(|k| Some((k, self.conns.get_mut(&k)?))) else {
                spare = Some(chain);
                continue;
            };
            conn.queued = false;
            let (produced, verdict) = conn.produce(ram, &chain)?;
            match produced {
                Produced::Packet(len) => {
                    let bytes = u64::from(len).saturating_sub(HEADER);
                    self.counters.rx_packets_count.one();
                    self.counters.rx_bytes_count.add(bytes);
                    io.complete(chain, len)?;
                }
                // A buffer for a header only would be taken again and again.
                Produced::Nothing if total(chain.writable()) == HEADER => io.complete(chain, 0)?,
                Produced::Nothing => spare = Some(chain),
            }
            self.settle(key, verdict);
        }
        if let Some(chain) = spare {
            io.unpop(chain);
        }
        Ok(())
    }
}
