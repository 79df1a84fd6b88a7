//! Sockets (section 5.10): packets with wrong CIDs, lengths and credit. On the host somebody
//! listens for port 1024, accepts, sends a little, and never reads.

use payloads::io;
use payloads::tsc;
use payloads::virtio::Device;

use super::super::{Attack, PROTOCOL};
use super::{Line, SHORT, fence, is_whole};

/// Device ID.
pub const ID: u32 = 19;
const RX: u16 = 0;
const TX: u16 = 1;
const HEADER: u32 = 44;
/// CIDs of the guest and the host.
const GUEST: u64 = 3;
const HOST: u64 = 2;
/// Somebody listens here, and nobody there.
const LISTENS: u32 = 1024;
const NOBODY: u32 = 1025;
const STORM: u32 = 4000;
/// More than may be connected.
const MANY: u32 = 5000;
/// Resets that the device keeps for the driver.
const MAX_RESETS: u32 = 1024;

mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header.
#[derive(Clone, Copy)]
struct Packet {
    cids: [u64; 2],
    ports: [u32; 2],
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

/// What a driver might send, from the guest's `port`.
fn packet(op: u16, port: u32, to: u32) -> Packet {
    Packet {
        cids: [GUEST, HOST],
        ports: [port, to],
        len: 0,
        kind: 1,
        op,
        flags: 0,
        buf_alloc: 0x4_0000,
        fwd_cnt: 0,
    }
}

/// Sends a packet of `there` bytes; whether the device took it.
fn send(line: &mut Line, packet: &Packet, there: u32) -> bool {
    let at = line.out;
    io::write(at, packet.cids);
    io::write(at + 16, packet.ports);
    io::write(at + 24, packet.len);
    io::write(at + 28, packet.kind);
    io::write(at + 30, packet.op);
    io::write(at + 32, [packet.flags, packet.buf_alloc, packet.fwd_cnt]);
    line.send(TX, &[(at, there)], &[]) == Some(0)
}

/// The next packet, in a buffer of `room` bytes: port of the guest, operation, and bytes written.
fn receive(line: &mut Line, room: u32, cycles: u64) -> Option<(u32, u16, u32)> {
    let at = line.answers;
    fence(at + u64::from(room));
    line.post(RX, 0, &[], &[(at, room)]);
    let (_, len) = line.wait(RX, cycles)?;
    Some((io::read(at + 20), io::read(at + 30), len))
}

fn start(attack: &Attack<'_>) -> Option<Line> {
    (attack.device.id == ID)
        .then(|| Line::start(attack.device, 3, PROTOCOL))
        .flatten()
}

/// A port on which nobody listens refuses.
pub fn works(device: Device, base: u64) -> bool {
    let Some(mut line) = Line::start(device, 0, base) else {
        return false;
    };
    send(&mut line, &packet(op::REQUEST, 7, NOBODY), HEADER)
        && receive(&mut line, 4096, tsc::LONG) == Some((7, op::RST, HEADER))
}

/// Packets with anything in every field, and no buffers for the answers at first; then they are
/// taken, and must have an end.
pub fn packets(attack: &mut Attack<'_>) -> bool {
    let Some(mut line) = start(attack) else {
        return attack.device.id != ID;
    };
    for _ in 0..STORM {
        let random = &mut *attack.random;
        let from = random.below(32) as u32;
        let to = random.pick(&[NOBODY, LISTENS, LISTENS, 0, u32::MAX]);
        let mut packet = packet(random.below(9) as u16, from, to);
        let there = random.pick(&[0, 1, 43, HEADER, HEADER, HEADER + 100, HEADER + 0x1_0000]);
        match random.below(8) {
            0 => packet.cids[0] = random.pick(&[0, 1, 2, 4, 1 << 32 | 3, u64::MAX]),
            1 => packet.cids[1] = random.pick(&[0, 1, 3, 4, 1 << 32 | 2, u64::MAX]),
            2 => packet.kind = random.pick(&[0, 2, 3, 0xffff]),
            3 => packet.op = random.u64() as u16,
            4 => packet.flags = random.u64() as u32,
            5 => packet.buf_alloc = random.pick(&[0, 1, u32::MAX]),
            6 => packet.fwd_cnt = random.u64() as u32,
            _ => packet.ports[0] = random.u64() as u32,
        }
        packet.len = random.pick(&[0, 0, 1, 99, 100, 101, 0x1_0000, 0x1_0001, u32::MAX]);
        if !send(&mut line, &packet, there) {
            return false;
        }
    }
    drain(&mut line)
}

/// Takes what the device has to say, with buffers that are too small first.
fn drain(line: &mut Line) -> bool {
    let mut count = 0;
    for room in [0, 1, 43, 44, 45]
        .into_iter()
        .chain(core::iter::repeat(0x1000))
    {
        let Some((_, _, len)) = receive(line, room, 30 * SHORT) else {
            break;
        };
        count += 1;
        let to = io::read::<u64>(line.answers + 8);
        let sound = len <= room && (len < HEADER || to == GUEST);
        // Resets, and a little from each connection.
        let end = MAX_RESETS + 32 * 64;
        if !sound || !is_whole(line.answers + u64::from(room)) || count > end {
            return false;
        }
    }
    line.device.runs()
}

/// More connections than there may be, and more data than the host takes.
pub fn connections(attack: &mut Attack<'_>) -> bool {
    let Some(mut line) = start(attack) else {
        return attack.device.id != ID;
    };
    for port in 0..MANY {
        let mut request = packet(op::REQUEST, port, LISTENS);
        request.kind = 1 + port as u16 % 2;
        if !send(&mut line, &request, HEADER) {
            return false;
        }
    }
    if !drain(&mut line) {
        return false;
    }
    let Some(mut line) = start(attack) else {
        return false;
    };
    // 4 MiB for each, where a quarter of a MiB is granted; the credit that the driver gives lies.
    for port in 0..16 {
        let mut said = packet(op::REQUEST, port, LISTENS);
        if !send(&mut line, &said, HEADER) {
            return false;
        }
        tsc::wait(10 * SHORT, || false);
        for round in 0..64 {
            (said.op, said.len) = (op::RW, 0x1_0000);
            (said.buf_alloc, said.fwd_cnt) = (u32::MAX, attack.random.u64() as u32);
            if !send(&mut line, &said, HEADER + 0x1_0000) {
                return false;
            }
            (said.op, said.len) = (attack.random.pick(&[2, 6, 7, 7]), 0);
            if round % 8 == 0 && !send(&mut line, &said, HEADER) {
                return false;
            }
        }
        said.op = attack
            .random
            .pick(&[op::SHUTDOWN, op::RST, op::RESPONSE, op::CREDIT_UPDATE]);
        (said.len, said.flags) = (0, attack.random.below(8) as u32);
        let request = packet(op::CREDIT_REQUEST, port, LISTENS);
        if !send(&mut line, &said, HEADER) || !send(&mut line, &request, HEADER) {
            return false;
        }
    }
    drain(&mut line)
}
