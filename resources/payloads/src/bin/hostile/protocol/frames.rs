//! Network interfaces (section 5.1): headers that ask for anything, frames and buffers of any size,
//! and commands. What goes over a stream comes back, and more that nobody asked for.

use payloads::virtio::Device;
use payloads::{io, tsc};

use super::super::{Attack, PROTOCOL};
use super::{FENCE, Line, SHORT, fence, is_whole, put};

/// Device ID.
pub const ID: u32 = 1;
/// `VIRTIO_NET_F_CSUM`, which taps have and streams do not.
const CSUM: u64 = 1;
const RX: u16 = 0;
const TX: u16 = 1;
const HEADER: u32 = 12;
/// Receive buffers, one descriptor each.
const BUFFERS: u16 = 16;
const BUFFER: u64 = 0x1_0000;
const STORM: u32 = 3000;
/// Longest frame, and a byte more.
const LONG: u32 = 65553;

/// The interface, with buffers for what comes.
struct Interface {
    line: Line,
    rooms: [u32; BUFFERS as usize],
    /// Nothing was written where it should not.
    sound: bool,
}

impl Interface {
    fn start(device: Device, features: u64, base: u64, rooms: &[u32]) -> Option<Self> {
        let mut interface = Self {
            line: Line::start(device, features, base)?,
            rooms: [0; BUFFERS as usize],
            sound: true,
        };
        let rooms = rooms.iter().cycle();
        for (head, room) in (0..BUFFERS).zip(rooms) {
            interface.rooms[usize::from(head)] = *room;
            interface.offer(head);
        }
        Some(interface)
    }

    fn buffer(&self, head: u16) -> (u64, u32) {
        let at = self.line.answers + u64::from(head) * BUFFER;
        (at, self.rooms[usize::from(head)])
    }

    fn offer(&mut self, head: u16) {
        let (at, room) = self.buffer(head);
        fence(at + u64::from(room));
        self.line.post(RX, head, &[], &[(at, room)]);
    }

    /// Takes what has come and offers the buffers again; whether `serial` is behind the header of
    /// one.
    fn take(&mut self, serial: u64) -> bool {
        let mut found = false;
        while let Some((head, len)) = self.line.used(RX) {
            let head = head as u16;
            if head >= BUFFERS {
                self.sound = false;
                break;
            }
            let (at, room) = self.buffer(head);
            self.sound &= len <= room && is_whole(at + u64::from(room));
            found |= io::read::<u64>(at + u64::from(HEADER) + 14) == serial;
            self.offer(head);
        }
        found
    }

    /// Sends what is made at `out`, `len` bytes; whether the device took it.
    fn send(&mut self, len: u32) -> bool {
        let out = self.line.out;
        self.line.post(TX, 0, &[(out, len)], &[]);
        tsc::wait(tsc::LONG, || {
            self.take(0);
            self.line.used(TX).is_some() || !self.line.device.runs()
        })
    }
}

/// What is sent comes back; a tap takes it.
pub fn works(device: Device, base: u64) -> bool {
    let comes_back = device.features() & CSUM == 0;
    let Some(mut interface) = Interface::start(device, 0, base, &[0x1000]) else {
        return false;
    };
    let out = interface.line.out;
    (out..out + 72).for_each(|at| io::write(at, 0u8));
    put(
        out + u64::from(HEADER),
        &[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8],
    );
    put(out + u64::from(HEADER) + 12, &[0x88, 0xb5]);
    let serial = tsc::now() | 1;
    io::write(out + u64::from(HEADER) + 14, serial);
    interface.line.post(TX, 0, &[(out, HEADER + 60)], &[]);
    let (mut sent, mut back) = (false, !comes_back);
    // What comes back may have to make room for what is sent.
    let done = tsc::wait(tsc::LONG, || {
        back |= interface.take(serial);
        sent |= interface.line.used(TX).is_some();
        sent && back
    });
    done && interface.sound && device.runs()
}

/// A header whose fields are what a device believes at its peril.
fn make_header(attack: &mut Attack<'_>, at: u64) {
    let random = &mut *attack.random;
    io::write(at, random.pick(&[0, 0, 1, 1, 2, 4, 7, 0xffu8]));
    io::write(
        at + 1,
        random.pick(&[0, 0, 1, 3, 4, 5, 0x80, 0x81, 0x84, 2, 0xffu8]),
    );
    for (field, wanted) in [
        [0, 54, 66, 0xffff],
        [0, 1, 1448, 0xffff],
        [0, 14, 34, 0xffff],
        [0, 6, 16, 0xffff],
        [0, 1, 2, 0xffff],
    ]
    .into_iter()
    .enumerate()
    {
        let value = match random.below(4) {
            0 => random.u64() as u16,
            _ => random.pick(&wanted),
        };
        io::write(at + 2 + 2 * field as u64, value);
    }
    // Ethernet to the host, and an IP header or not.
    put(at + u64::from(HEADER), &[0xff; 6]);
    let kind = random.pick(&[[8, 0], [0x86, 0xdd], [0x81, 0], [8, 6], [0, 0]]);
    put(at + u64::from(HEADER) + 12, &kind);
    put(at + u64::from(HEADER) + 14, &random.u64().to_le_bytes());
    io::write(
        at + u64::from(HEADER) + 14,
        random.pick(&[0x45u8, 0x60, 0x4f, 0]),
    );
}

/// Frames of every length with every header, while others come into buffers of every size.
pub fn storm(attack: &mut Attack<'_>) -> bool {
    if attack.device.id != ID {
        return true;
    }
    for (features, rooms) in [
        (0, &[0x1000][..]),
        (!0, &[HEADER, HEADER + 1, 64, 1526, 0xff00]),
        (0, &[HEADER, 1526, 0xff00]),
        (!0, &[0x800]),
    ] {
        let Some(mut interface) = Interface::start(attack.device, features, PROTOCOL, rooms) else {
            return false;
        };
        for _ in 0..STORM / 4 {
            make_header(attack, interface.line.out);
            let len = attack.random.pick(&[
                0,
                1,
                HEADER - 1,
                HEADER,
                HEADER + 13,
                HEADER + 14,
                HEADER + 60,
                HEADER + 1514,
                HEADER + 9000,
                HEADER + LONG,
                HEADER + LONG + 1,
                0xf_0000,
            ]);
            if !interface.send(len) || !interface.sound || !attack.device.runs() {
                return false;
            }
        }
        if !attack.device.reset() {
            return false;
        }
    }
    true
}

/// Buffers too small for a header: the device may give up, and writes nothing behind them.
pub fn tight(attack: &mut Attack<'_>) -> bool {
    if attack.device.id != ID {
        return true;
    }
    for room in 1..HEADER {
        let Some(mut line) = Line::start(attack.device, 0, PROTOCOL) else {
            return false;
        };
        let (out, at) = (line.out, line.answers);
        (out..out + FENCE * 2).for_each(|at| io::write(at, 0u8));
        fence(at + u64::from(room));
        line.post(RX, 0, &[], &[(at, room)]);
        line.post(TX, 0, &[(out, HEADER + 60)], &[]);
        line.wait(RX, SHORT);
        if !is_whole(at + u64::from(room)) || !attack.device.reset() {
            return false;
        }
    }
    true
}

/// Commands of every class with any data: each is answered by one byte.
pub fn commands(attack: &mut Attack<'_>) -> bool {
    if attack.device.id != ID || attack.device.features() & CSUM == 0 {
        return true;
    }
    let queues = attack.queues().end;
    let Some(mut interface) = Interface::start(attack.device, !0, PROTOCOL, &[0x1000]) else {
        return false;
    };
    let status = interface.line.answers + u64::from(BUFFERS) * BUFFER - 2 * FENCE;
    for _ in 0..STORM {
        let random = &mut *attack.random;
        let out = interface.line.out;
        put(out, &random.u64().to_le_bytes());
        put(out + 8, &random.u64().to_le_bytes());
        io::write(out, random.pick(&[0, 1, 2, 3, 4, 4, 5, 5, 6, 0xffu8]));
        io::write(out + 1, random.pick(&[0, 0, 0, 1, 2, 0xffu8]));
        if random.below(2) == 0 {
            let few = random.pick(&[0, 1, 2, 3, 1 << 1, 1 << 1 | 1 << 7, 1 << 10, u64::MAX]);
            put(out + 2, &few.to_le_bytes());
        }
        let len = random.pick(&[2, 3, 4, 4, 10, 10, 11, 0x1000, 0xf_0000]);
        fence(status);
        let answered = interface
            .line
            .send(queues - 1, &[(out, len)], &[(status, 1)]);
        interface.take(0);
        let value: u8 = io::read(status);
        io::write(status, 0xa5u8);
        if answered != Some(1) || value > 1 || !is_whole(status) || !interface.sound {
            return false;
        }
    }
    attack.device.runs()
}
