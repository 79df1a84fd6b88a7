//! One connection: a socket of the guest and a Unix socket of the host.
//!
//! Credit (section 5.10.6.3) bounds both directions. The guest may have `buf_alloc` bytes
//! underway that the host's socket has not taken; more is a broken guest. The host's bytes stay in
//! its socket until the guest has credit and a buffer for them.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use super::host;
use super::packet::{
    END_OF_MESSAGE, HEADER, HOST_CID, Header, Kind, MAX_PAYLOAD, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND, op,
};
use crate::virtio::GuestRam;
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, read_at, total, write_at};
use crate::virtio::iovecs::{IoVecs, send, would_block};

/// Longest message from the host.
pub const MAX_MESSAGE: usize = 256 << 10;
/// Of bytes granted, one whole message may wait for the host. A reader that reads has far fewer.
const BYTES_PER_MESSAGE: u32 = 16;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The host's listener has too many waiting; tried again until then.
    Dialing { until: Instant },
    /// The guest was asked.
    Requested,
    /// Both sides are there.
    Open,
    /// The host's side is gone; the guest has to agree.
    Closed,
    /// The guest's side is gone; the host gets the rest.
    Draining,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Keep,
    /// It goes, and the guest is told.
    Reset,
    /// It goes; the guest's side is gone or was told.
    Remove,
    /// The guest is told, and the host gets what waits for it.
    Drain,
}

/// What a buffer of the guest was used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Produced {
    Packet(u32),
    Nothing,
}

/// A packet from the guest, its payload still in guest RAM.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    pub header: Header,
    pub ram: &'a GuestRam,
    pub chain: &'a Chain,
}

#[derive(Debug)]
pub struct Conn {
    pub kind: Kind,
    pub state: State,
    pub socket: Option<OwnedFd>,
    pub deadline: Option<Instant>,
    /// It is in the list of those that have something for the guest.
    pub queued: bool,
    /// Memory it may come to need.
    pub cost: usize,
    /// What went wrong at the host's side: reads and writes.
    pub failures: [u8; 2],
    cid: u64,
    host_port: u32,
    guest_port: u32,
    readable: bool,
    writable: bool,
    hung_up: bool,
    /// Bytes for the host, the lengths of whole messages in them, and of the one not yet whole.
    out: VecDeque<u8>,
    messages: VecDeque<u32>,
    partial: u32,
    /// What we grant the guest, and counts of bytes: taken from it, passed on, told as passed on.
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    told: u32,
    /// What the guest grants us, and what we sent.
    peer_alloc: u32,
    peer_fwd: u32,
    sent: u32,
    asked: bool,
    /// Credit that is needed for what comes next.
    wanted: u32,
    /// A message from the host on its way to the guest, and how much of it is left.
    message: VecDeque<u8>,
    /// Operations the guest has to hear of, one bit each.
    pending: u8,
    guest_shut: u32,
    host_shut: u32,
    /// The host was told that the guest sends no more.
    ended: bool,
}

impl Conn {
    pub fn new(kind: Kind, cid: u64, ports: (u32, u32), buf_alloc: u32, state: State) -> Self {
        let (host_port, guest_port) = ports;
        Self {
            kind,
            state,
            socket: None,
            deadline: None,
            queued: false,
            cost: 0,
            failures: [0; 2],
            cid,
            host_port,
            guest_port,
            readable: false,
            writable: true,
            hung_up: false,
            out: VecDeque::new(),
            messages: VecDeque::new(),
            partial: 0,
            buf_alloc,
            received: 0,
            forwarded: 0,
            told: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            sent: 0,
            asked: false,
            wanted: 1,
            message: VecDeque::new(),
            pending: 0,
            guest_shut: 0,
            host_shut: 0,
            ended: false,
        }
    }

    /// Has the guest told of `op`.
    pub fn tell(&mut self, op: u16) {
        self.pending |= 1 << op;
    }

    /// The guest is gone: nothing more for it or from it.
    pub fn forget(&mut self) {
        self.pending = 0;
        self.message = VecDeque::new();
    }

    /// Takes what the guest grants.
    pub fn grant(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_fwd = header.fwd_cnt;
    }

    /// Bytes that the guest has room for. A guest that lies gets less.
    fn credit(&self) -> u32 {
        let underway = self.sent.wrapping_sub(self.peer_fwd);
        self.peer_alloc.saturating_sub(underway)
    }

    /// Whether a buffer of the guest would be put to use.
    pub fn has_work(&self) -> bool {
        self.pending != 0 || self.may_send() && (self.credit() >= self.wanted || !self.asked)
    }

    /// Whether the guest has a part of a message. Then it gets the rest before anything else, so
    /// that only one is in memory.
    pub fn is_amid_message(&self) -> bool {
        !self.message.is_empty()
    }

    /// Whether the guest took back credit that a message was begun with.
    fn is_cheated(&self) -> bool {
        self.is_amid_message() && self.credit() == 0
    }

    fn may_send(&self) -> bool {
        let open = self.state == State::Open && self.guest_shut & SHUTDOWN_RECEIVE == 0;
        open && (!self.message.is_empty() || self.readable && self.host_shut & SHUTDOWN_SEND == 0)
    }

    /// A packet of this connection came from the guest.
    pub fn take(&mut self, packet: Packet<'_>) -> Result<Verdict, DeviceError> {
        let header = packet.header;
        if header.op == op::RST {
            return Ok(Verdict::Remove);
        }
        if header.kind != self.kind.number() {
            return Ok(Verdict::Reset);
        }
        self.grant(&header);
        if self.is_cheated() {
            return Ok(Verdict::Reset);
        }
        match (header.op, self.state) {
            (op::RESPONSE, State::Requested) => {
                self.state = State::Open;
                let socket = self.socket.as_ref();
                let told = socket.is_some_and(|s| host::write_ok(s, self.host_port).is_ok());
                Ok(if told { Verdict::Keep } else { Verdict::Reset })
            }
            (op::RW, State::Open) if self.guest_shut & SHUTDOWN_SEND == 0 => self.data(packet),
            (op::SHUTDOWN, State::Open) => Ok(self.guest_shuts(header.flags)),
            (op::SHUTDOWN, State::Closed) if header.flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH => {
                Ok(Verdict::Reset)
            }
            (op::CREDIT_UPDATE, State::Open | State::Closed) => Ok(Verdict::Keep),
            (op::CREDIT_REQUEST, State::Open) => {
                self.tell(op::CREDIT_UPDATE);
                Ok(Verdict::Keep)
            }
            // On their way before the guest heard that the host is gone.
            (_, State::Closed) => Ok(Verdict::Keep),
            _ => Ok(Verdict::Reset),
        }
    }

    fn data(&mut self, packet: Packet<'_>) -> Result<Verdict, DeviceError> {
        let len = packet.header.len;
        let waiting = self.received.wrapping_sub(self.forwarded);
        if len > self.buf_alloc.saturating_sub(waiting) {
            return Ok(Verdict::Reset);
        }
        self.received = self.received.wrapping_add(len);
        let whole = packet.header.flags & END_OF_MESSAGE != 0;
        let alone = match self.kind {
            Kind::Stream => true,
            Kind::Seqpacket => self.partial == 0 && whole,
        };
        let mut sent = 0;
        if alone && self.out.is_empty() && self.writable && len > 0 {
            let segments = packet.chain.readable();
            let iovecs = IoVecs::new(packet.ram, segments, HEADER, len.into())?;
            let result = self.socket.as_ref().map(|s| iovecs.send(s.as_fd()));
            match self.sent_to_host(result) {
                Ok(count) => sent = count as u32,
                Err(verdict) => return Ok(verdict),
            }
        }
        let mut rest = len.saturating_sub(sent);
        self.forwarded = self.forwarded.wrapping_add(sent);
        if self.host_shut & SHUTDOWN_RECEIVE != 0 {
            // Nobody reads it.
            (rest, self.forwarded) = (0, self.received);
        }
        if rest > 0 {
            let mut bytes = vec![0; rest as usize];
            let from = HEADER + u64::from(sent);
            read_at(packet.ram, packet.chain.readable(), from, &mut bytes)?;
            self.out.extend(bytes);
            if self.kind == Kind::Seqpacket {
                self.partial += rest;
            }
        }
        if self.kind == Kind::Seqpacket && whole && self.partial > 0 {
            if self.messages.len() >= (self.buf_alloc / BYTES_PER_MESSAGE) as usize {
                return Ok(Verdict::Reset);
            }
            self.messages.push_back(std::mem::take(&mut self.partial));
        }
        Ok(self.flush())
    }

    /// What came of sending to the host: bytes, none where it has to wait or reads no more.
    fn sent_to_host(&mut self, result: Option<io::Result<usize>>) -> Result<usize, Verdict> {
        match result {
            Some(Ok(count)) => Ok(count),
            Some(Err(error)) if would_block(&error) => {
                self.writable = false;
                Ok(0)
            }
            Some(Err(error)) if error.kind() == ErrorKind::BrokenPipe => {
                self.host_shuts(SHUTDOWN_RECEIVE);
                Ok(0)
            }
            // A message too long for the host, or a reset.
            Some(Err(_)) => {
                self.failures[1] = 1;
                Err(Verdict::Reset)
            }
            None => Err(Verdict::Reset),
        }
    }

    /// Sends the host what waits for it, and the guest credit for that.
    pub fn flush(&mut self) -> Verdict {
        if !matches!(self.state, State::Open | State::Draining) {
            return Verdict::Keep;
        }
        let mut whole_message = false;
        while self.writable && self.host_shut & SHUTDOWN_RECEIVE == 0 {
            let chunk = match self.kind {
                Kind::Stream => self.out.as_slices().0,
                Kind::Seqpacket => {
                    let len = self.messages.front().map_or(0, |len| *len as usize);
                    let all: &[u8] = self.out.make_contiguous();
                    all.get(..len).unwrap_or_default()
                }
            };
            if chunk.is_empty() {
                break;
            }
            let result = self.socket.as_ref().map(|s| send(s.as_fd(), chunk));
            let count = match self.sent_to_host(result) {
                Ok(0) => break,
                Ok(count) => count.min(self.out.len()),
                Err(verdict) => return verdict,
            };
            self.out.drain(..count);
            self.forwarded = self.forwarded.wrapping_add(count as u32);
            whole_message |= self.messages.pop_front().is_some();
        }
        let idle = self.out.is_empty();
        if idle {
            // Nothing of a burst stays behind.
            self.out.shrink_to(4096);
            self.messages.shrink_to(64);
        }
        self.update_credit(whole_message || self.kind == Kind::Seqpacket && idle);
        self.end_if_done()
    }

    /// Tells the guest of credit when it may have run short; a writer of messages waits for room
    /// for the whole of one.
    fn update_credit(&mut self, always: bool) {
        let untold = self.forwarded.wrapping_sub(self.told);
        let short = untold >= self.buf_alloc / 2;
        if self.state == State::Open && untold > 0 && (short || always) {
            self.tell(op::CREDIT_UPDATE);
        }
    }

    fn end_if_done(&mut self) -> Verdict {
        let done = self.out.is_empty() || self.host_shut & SHUTDOWN_RECEIVE != 0;
        match self.state {
            State::Draining if done => Verdict::Remove,
            State::Open if self.guest_shut == SHUTDOWN_BOTH && done => Verdict::Reset,
            State::Open if self.guest_shut == SHUTDOWN_BOTH => Verdict::Drain,
            State::Open if self.guest_shut & SHUTDOWN_SEND != 0 && done => {
                // Once, since it is an event of the socket's.
                if !std::mem::replace(&mut self.ended, true)
                    && let Some(socket) = &self.socket
                {
                    host::shutdown(socket, libc::SHUT_WR);
                }
                Verdict::Keep
            }
            _ => Verdict::Keep,
        }
    }

    fn guest_shuts(&mut self, flags: u32) -> Verdict {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            self.message = VecDeque::new();
            if let Some(socket) = &self.socket {
                host::shutdown(socket, libc::SHUT_RD);
            }
        }
        if self.guest_shut & SHUTDOWN_SEND != 0 {
            // What never became whole is no message.
            let whole = self.out.len().saturating_sub(self.partial as usize);
            if self.kind == Kind::Seqpacket {
                self.out.truncate(whole);
            }
        }
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 && self.hung_up {
            self.host_shuts(SHUTDOWN_BOTH);
        }
        self.end_if_done()
    }

    /// The host ends a direction.
    fn host_shuts(&mut self, flags: u32) {
        if self.host_shut | flags == self.host_shut {
            return;
        }
        self.host_shut |= flags;
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.forwarded = self.received;
            self.out = VecDeque::new();
            self.messages = VecDeque::new();
            self.partial = 0;
        }
        if self.state == State::Open {
            self.tell(op::SHUTDOWN);
            if self.host_shut == SHUTDOWN_BOTH {
                self.state = State::Closed;
                self.socket = None;
            }
        }
    }

    /// The host's socket is ready for something.
    pub fn ready(&mut self, readable: bool, writable: bool, hung_up: bool) -> Verdict {
        self.readable |= readable;
        self.writable |= writable;
        self.hung_up |= hung_up;
        if self.hung_up && self.state == State::Open {
            let unread = self.guest_shut & SHUTDOWN_RECEIVE == 0;
            if !unread || self.host_shut & SHUTDOWN_SEND != 0 {
                self.host_shuts(SHUTDOWN_BOTH);
            }
        }
        self.flush()
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: self.kind.number(),
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }

    /// The RST of this connection.
    pub fn reset(&self) -> Header {
        Header {
            buf_alloc: 0,
            fwd_cnt: 0,
            ..self.header(op::RST)
        }
    }

    /// Puts the next packet for the guest into `chain`, which has room for a header.
    pub fn produce(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
    ) -> Result<(Produced, Verdict), DeviceError> {
        let nothing = |verdict| Ok((Produced::Nothing, verdict));
        let first = [op::REQUEST, op::RESPONSE, op::CREDIT_UPDATE];
        let op = first.into_iter().find(|op| self.pending >> op & 1 != 0);
        let (mut op, mut len, mut flags) = (op, 0, 0);
        if self.is_cheated() {
            return nothing(Verdict::Reset);
        }
        if op.is_none() && self.may_send() {
            let room = total(chain.writable()).saturating_sub(HEADER);
            let room = room.min(MAX_PAYLOAD).min(self.credit().into());
            if self.credit() < self.wanted {
                self.ask();
            } else if room > 0 {
                match self.read_host(ram, chain, room)? {
                    Ok(None) => {}
                    Ok(Some((count, end))) => {
                        (op, len) = (Some(op::RW), count);
                        flags = if end { END_OF_MESSAGE } else { 0 };
                    }
                    Err(verdict) => return nothing(verdict),
                }
            }
        }
        let last = [op::SHUTDOWN, op::CREDIT_REQUEST];
        let op = op.or_else(|| last.into_iter().find(|op| self.pending >> op & 1 != 0));
        let Some(op) = op else {
            return nothing(Verdict::Keep);
        };
        self.pending &= !(1 << op | 1 << op::CREDIT_UPDATE);
        if op == op::SHUTDOWN {
            flags = self.host_shut;
        }
        self.told = self.forwarded;
        self.sent = self.sent.wrapping_add(len);
        let header = self.header(op);
        let header = Header {
            len,
            flags,
            ..header
        };
        header.write(ram, chain)?;
        Ok((Produced::Packet(HEADER as u32 + len), Verdict::Keep))
    }

    /// Asks for credit, once until there is some.
    fn ask(&mut self) {
        if !std::mem::replace(&mut self.asked, true) {
            self.tell(op::CREDIT_REQUEST);
        }
    }

    /// Reads up to `room` bytes of the host; says how many, and whether a message ends there.
    fn read_host(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        room: u64,
    ) -> Result<Result<Option<(u32, bool)>, Verdict>, DeviceError> {
        let Some(socket) = &self.socket else {
            return Ok(Ok(None));
        };
        let read = match self.kind {
            Kind::Stream => {
                let iovecs = IoVecs::new(ram, chain.writable(), HEADER, room)?;
                iovecs.recv(socket.as_fd())
            }
            Kind::Seqpacket if self.message.is_empty() => {
                let credit = self.credit() as usize;
                match read_message(socket, self.peer_alloc as usize, credit) {
                    Ok(Ok(message)) => {
                        self.message = message.into();
                        Ok(self.message.len())
                    }
                    Ok(Err(len)) => {
                        self.wanted = len;
                        self.ask();
                        return Ok(Ok(None));
                    }
                    Err(error) => Err(error),
                }
            }
            Kind::Seqpacket => Ok(self.message.len()),
        };
        match read {
            Ok(0) => {
                self.readable = false;
                let both = if self.hung_up { SHUTDOWN_RECEIVE } else { 0 };
                self.host_shuts(SHUTDOWN_SEND | both);
                return Ok(Ok(None));
            }
            Ok(count) if self.kind == Kind::Stream => {
                (self.asked, self.wanted) = (false, 1);
                return Ok(Ok(Some((count as u32, false))));
            }
            Ok(_) => {}
            Err(error) if would_block(&error) => {
                self.readable = false;
                return Ok(Ok(None));
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(Ok(None)),
            Err(_) => {
                self.failures[0] = 1;
                return Ok(Err(Verdict::Reset));
            }
        }
        (self.asked, self.wanted) = (false, 1);
        let count = self.message.len().min(room as usize);
        let part: Vec<u8> = self.message.drain(..count).collect();
        write_at(ram, chain.writable(), HEADER, &part)?;
        Ok(Ok(Some((count as u32, self.message.is_empty()))))
    }
}

/// A whole message, or its length where that is more than the guest's `credit`; an error if the
/// guest will never have room for it.
fn read_message(
    socket: &OwnedFd,
    peer_alloc: usize,
    credit: usize,
) -> io::Result<Result<Vec<u8>, u32>> {
    let len = host::recv(socket, &mut [], libc::MSG_PEEK | libc::MSG_TRUNC)?;
    if len > peer_alloc.min(MAX_MESSAGE) {
        return Err(ErrorKind::InvalidData.into());
    }
    if len > credit {
        return Ok(Err(len as u32));
    }
    let mut message = vec![0; len];
    let count = host::recv(socket, &mut message, 0)?;
    message.truncate(count);
    Ok(Ok(message))
}
