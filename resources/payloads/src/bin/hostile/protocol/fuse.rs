//! Shared directories (section 5.11): FUSE requests. The share has `file`, `victim` and `link`,
//! which leads out of it to where `secret` is.

use payloads::tsc;
use payloads::virtio::Device;
use payloads::{io, random::Random};

use super::super::{Attack, PROTOCOL};
use super::{Buffer, Line, fence, is_whole, put};

/// Device ID.
pub const ID: u32 = 26;
/// The queue of requests.
const REQUESTS: u16 = 1;
const HEADER: u32 = 40;
const REPLY: u32 = 16;
const ROOT: u64 = 1;
/// More than a share may have open.
const MANY: u64 = 4000;

mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
}

/// A mounted share.
pub struct Share {
    line: Line,
    unique: u64,
}

impl Share {
    /// Starts the device and a session.
    pub fn start(device: Device, base: u64) -> Option<Self> {
        let line = Line::start(device, 0, base)?;
        let mut share = Self { line, unique: 0 };
        (share.init() == Some(0)).then_some(share)
    }

    fn init(&mut self) -> Option<i32> {
        let numbers = [7u32, 38, 4096, 0].map(u32::to_le_bytes);
        self.call(op::INIT, 0, &[numbers.as_flattened(), &[0; 48]], 4096)
    }

    /// Writes a request; its length.
    fn request(&mut self, said: Option<u32>, opcode: u32, node: u64, body: &[&[u8]]) -> u32 {
        self.unique += 1;
        let out = self.line.out;
        let mut end = out + u64::from(HEADER);
        for part in body {
            end = put(end, part);
        }
        let len = (end - out) as u32;
        io::write(out, said.unwrap_or(len));
        io::write(out + 4, opcode);
        io::write(out + 8, self.unique);
        io::write(out + 16, node);
        (out + 24..out + 40)
            .step_by(8)
            .for_each(|at| io::write(at, 0u64));
        len
    }

    /// Carries a request out that has been written; the error, and 1 for no answer. `None` if the
    /// device keeps it, or wrote what it should not have.
    fn carry_out(&mut self, readable: &[Buffer], room: u32) -> Option<i32> {
        let answer = self.line.answers;
        fence(answer + u64::from(room));
        let writable = [(answer, room)];
        let writable: &[Buffer] = if room == 0 { &[] } else { &writable };
        let len = self.line.send(REQUESTS, readable, writable)?;
        if len > room || !is_whole(answer + u64::from(room)) {
            return None;
        }
        match len {
            0..REPLY => Some(1),
            _ if io::read::<u32>(answer) != len => None,
            _ if io::read::<u64>(answer + 8) != self.unique => None,
            _ => Some(io::read(answer + 4)),
        }
    }

    /// A request with `room` for the answer.
    fn call(&mut self, opcode: u32, node: u64, body: &[&[u8]], room: u32) -> Option<i32> {
        let len = self.request(None, opcode, node, body);
        self.carry_out(&[(self.line.out, len)], room)
    }

    /// Whether a request is refused.
    fn refuses(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> bool {
        self.call(opcode, node, body, 4096)
            .is_some_and(|error| error < 0)
    }

    /// Word `n` of the last answer.
    fn answer(&self, n: u64) -> u64 {
        io::read(self.line.answers + u64::from(REPLY) + 8 * n)
    }

    fn look_up(&mut self, name: &[u8]) -> Option<u64> {
        let found = self.call(op::LOOKUP, ROOT, &[name], 4096) == Some(0);
        found.then(|| self.answer(0))
    }

    fn open(&mut self, node: u64, flags: u32) -> Option<u64> {
        let body = [flags, 0].map(u32::to_le_bytes);
        let opened = self.call(op::OPEN, node, &[body.as_flattened()], 4096) == Some(0);
        opened.then(|| self.answer(0))
    }

    /// Finds a file and reads it.
    pub fn works(&mut self) -> bool {
        let Some(node) = self.look_up(b"file\0") else {
            return false;
        };
        let Some(handle) = self.open(node, 0) else {
            return false;
        };
        let read = self.call(op::READ, node, &[&transfer(handle, 0, 8)], 4096) == Some(0);
        read && self.answer(0) == u64::from_le_bytes(*b"contents")
    }
}

/// Arguments of READ, WRITE and READDIR.
fn transfer(handle: u64, offset: u64, size: u32) -> [u8; 40] {
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(&handle.to_le_bytes());
    bytes[8..16].copy_from_slice(&offset.to_le_bytes());
    bytes[16..20].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// Little-endian words.
fn words<const N: usize>(words: [u64; N]) -> [[u8; 8]; N] {
    words.map(u64::to_le_bytes)
}

fn garbage(random: &mut Random) -> [u8; 256] {
    let mut bytes = [0; 256];
    // Small numbers are taken for flags and lengths, others for anything.
    let small = random.below(2) == 0;
    for word in bytes.chunks_exact_mut(8) {
        let value = if small { random.below(8) } else { random.u64() };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Starts the share that is attacked; anything else is no share and has nothing to fear.
fn share(attack: &Attack<'_>) -> Option<Share> {
    (attack.device.id == ID)
        .then(|| Share::start(attack.device, PROTOCOL))
        .flatten()
}

/// Every operation with garbage, lengths that are wrong, and too little room for the answer.
pub fn requests(attack: &mut Attack<'_>) -> bool {
    let Some(mut share) = share(attack) else {
        return attack.device.id != ID;
    };
    for opcode in (0..64).chain([4096, u32::MAX]) {
        if share.init() != Some(0) {
            return false;
        }
        for _ in 0..24 {
            let random = &mut *attack.random;
            let body = garbage(random);
            let len = random.pick(&[0, 1, 39, 40, 41, 48, 56, 80, 104, 128, 296]);
            let said = random.pick(&[0, 39, 40, len, len + 1, 296, 0x1_0000, 0x2_0029, u32::MAX]);
            let room = random.pick(&[0, 1, 15, 16, 17, 32, 104, 144, 4096]);
            let node = match random.pick(&[0, ROOT, ROOT, 2, 99, u64::MAX]) {
                // The directory keeps its mode.
                ROOT if opcode == op::SETATTR => 2,
                node => node,
            };
            share.request(Some(said), opcode, node, &[&body]);
            let readable = [(share.line.out, len)];
            if share.carry_out(&readable, room).is_none() && share.line.device.runs() {
                return false;
            }
            if !share.line.device.runs() {
                match self::share(attack) {
                    Some(again) => share = again,
                    None => return false,
                }
            }
        }
    }
    pieces(&mut share) && rooms(&mut share)
}

/// A request and its answer in many small buffers.
fn pieces(share: &mut Share) -> bool {
    let len = share.request(None, op::GETATTR, ROOT, &[&[0; 16]]);
    let out = share.line.out;
    let mut buffers = [(0, 0); 14];
    for (at, buffer) in (0..).zip(&mut buffers) {
        let begin = (at * 3).min(len);
        let end = if at == 13 { len } else { begin + 3 };
        *buffer = (out + u64::from(begin), end - begin);
    }
    share.carry_out(&buffers, 4096) == Some(0)
}

/// An answer of 104 bytes in every room.
fn rooms(share: &mut Share) -> bool {
    (0..200).all(|room| {
        let error = share.call(op::GETATTR, ROOT, &[&[0; 16]], room);
        match room {
            0..REPLY => error == Some(1),
            // 16 and 88 bytes of attributes behind the header.
            _ if room < REPLY + 104 => error.is_some_and(|error| error < 0),
            _ => error == Some(0),
        }
    })
}

/// Names that are none, in every operation that takes one.
pub fn names(attack: &mut Attack<'_>) -> bool {
    let Some(mut share) = share(attack) else {
        return attack.device.id != ID;
    };
    let long = [b'x'; 4096];
    let names: [&[u8]; 15] = [
        b"..\0",
        b".\0",
        b"\0",
        b"/\0",
        b"../secret\0",
        b"/etc/passwd\0",
        b"link/secret\0",
        b"./file\0",
        b"file/\0",
        b"victim/..\0",
        b"",
        b"no end",
        b"..",
        &long[..256],
        &long,
    ];
    names.into_iter().all(|name| refused(&mut share, name)) && links(&mut share)
}

fn refused(share: &mut Share, name: &[u8]) -> bool {
    let two = |a: u32, b: u32| (u64::from(a) | u64::from(b) << 32).to_le_bytes();
    let good = b"new\0".as_slice();
    let Some(victim) = share.look_up(b"victim\0") else {
        return false;
    };
    let root = ROOT.to_le_bytes();
    share.refuses(op::LOOKUP, ROOT, &[name])
        && share.refuses(op::UNLINK, ROOT, &[name])
        && share.refuses(op::RMDIR, ROOT, &[name])
        && share.refuses(op::MKDIR, ROOT, &[&two(0o777, 0), name])
        && share.refuses(op::MKNOD, ROOT, &[&two(0o10_0666, 0), &[0; 8], name])
        && share.refuses(op::MKNOD, ROOT, &[&two(0o2_0666, 0x103), &[0; 8], good])
        && share.refuses(op::CREATE, ROOT, &[&two(0o102, 0o666), &[0; 8], name])
        && share.refuses(op::SYMLINK, ROOT, &[name, good])
        && share.refuses(op::LINK, ROOT, &[&victim.to_le_bytes(), name])
        && share.refuses(op::RENAME, ROOT, &[&root, name, good])
        && share.refuses(op::RENAME, ROOT, &[&root, b"victim\0", name])
        && share.refuses(op::RENAME2, ROOT, &[&root, &two(2, 0), b"victim\0", name])
        && share.refuses(op::SETXATTR, victim, &[&two(1, 0), name])
}

/// Nothing is reached through a link.
fn links(share: &mut Share) -> bool {
    let Some(link) = share.look_up(b"link\0") else {
        return false;
    };
    let truncate = words([1 << 3, 0, 0]);
    share.refuses(op::LOOKUP, link, &[b"secret\0"])
        && share.open(link, 0).is_none()
        && share.open(link, 2).is_none()
        && share.refuses(op::OPENDIR, link, &[&[0; 8]])
        && share.refuses(op::CREATE, link, &[words([2, 0]).as_flattened(), b"new\0"])
        && share.refuses(op::SETATTR, link, &[truncate.as_flattened(), &[0; 64]])
        && share.works()
}

/// Files forgotten more often than they were found, and that were never found.
pub fn counts(attack: &mut Attack<'_>) -> bool {
    let Some(mut share) = share(attack) else {
        return attack.device.id != ID;
    };
    for count in [0, 1, 2, u64::MAX - 1, u64::MAX] {
        let Some(node) = share.look_up(b"victim\0") else {
            return false;
        };
        for node in [node, node, ROOT, 0, 99, u64::MAX] {
            if share.call(op::FORGET, node, &[&count.to_le_bytes()], 0) != Some(1) {
                return false;
            }
        }
        for said in [0u32, 1, 2, 3, 0x1_0000, u32::MAX] {
            let entries = words([said.into(), ROOT, count, node, count]);
            if share.call(op::BATCH_FORGET, 0, &[entries.as_flattened()], 0) != Some(1) {
                return false;
            }
        }
        if share.call(op::GETATTR, ROOT, &[&[0; 16]], 4096) != Some(0) || !share.works() {
            return false;
        }
    }
    // The queue that goes ahead of others.
    share.request(None, op::FORGET, ROOT, &[&u64::MAX.to_le_bytes()]);
    let forgotten = share.line.send(0, &[(share.line.out, HEADER + 8)], &[]);
    forgotten == Some(0) && share.works()
}

/// More open files and directories than there may be, and handles that are none.
pub fn handles(attack: &mut Attack<'_>) -> bool {
    let Some(mut share) = share(attack) else {
        return attack.device.id != ID;
    };
    let Some(node) = share.look_up(b"victim\0") else {
        return false;
    };
    let mut opened = 0;
    let mut last = 0;
    while let Some(handle) = share.open(node, 0) {
        (opened, last) = (opened + 1, handle);
        if opened == MANY {
            return false;
        }
    }
    // What is not open in this way, or at all.
    for handle in [0, last + 1, u64::MAX] {
        for opcode in [op::READ, op::WRITE, op::RELEASE, op::READDIR, op::LSEEK] {
            if !share.refuses(opcode, node, &[&transfer(handle, 0, 0)]) {
                return false;
            }
        }
    }
    if opened < 16 || !share.refuses(op::RELEASEDIR, node, &[&transfer(last, 0, 0)]) {
        return false;
    }
    odd_transfers(&mut share, node, last);
    for handle in last + 1 - opened..=last {
        let body = transfer(handle, 0, 0);
        if share.call(op::RELEASE, node, &[&body], 4096) != Some(0)
            || !share.refuses(op::RELEASE, node, &[&body])
        {
            return false;
        }
    }
    let mut directories = 0;
    while share.call(op::OPENDIR, ROOT, &[&[0; 8]], 4096) == Some(0) {
        directories += 1;
        let body = transfer(share.answer(0), attack.random.u64(), u32::MAX);
        let opcode = attack.random.pick(&[op::READDIR, op::READDIRPLUS]);
        if directories == MANY || share.call(opcode, ROOT, &[&body], 4096).is_none() {
            return false;
        }
    }
    share.init() == Some(0) && share.works()
}

/// Offsets and lengths at which there is nothing; whatever is answered, it is.
fn odd_transfers(share: &mut Share, node: u64, handle: u64) {
    let writable = share.open(node, 2).unwrap_or(handle);
    for offset in [1, 1 << 62, i64::MAX as u64, 1 << 63, u64::MAX] {
        for size in [0, 1, 4096, 1 << 20, (1 << 20) + 1, u32::MAX] {
            for room in [16, 17, 4096] {
                share.call(op::READ, node, &[&transfer(handle, offset, size)], room);
            }
            // The host's disk is not to be filled: what is written has no more than a byte.
            share.call(
                op::WRITE,
                node,
                &[&transfer(writable, offset, size), b"x"],
                24,
            );
        }
        for length in [0, u64::MAX] {
            let body = words([writable, offset, length, offset % 0x80]);
            share.call(op::FALLOCATE, node, &[body.as_flattened()], 16);
            let body = words([handle, offset, node, writable, 0, length, 0]);
            share.call(op::COPY_FILE_RANGE, node, &[body.as_flattened()], 24);
        }
        let body = words([handle, offset, offset]);
        share.call(op::LSEEK, node, &[body.as_flattened()], 24);
    }
}

/// Transfers that a reset interrupts: once it is done, RAM is the driver's again.
pub fn taken_back(attack: &mut Attack<'_>) -> bool {
    for _ in 0..40 {
        let Some(mut share) = share(attack) else {
            return attack.device.id != ID;
        };
        let Some(node) = share.look_up(b"large\0") else {
            return false;
        };
        let Some(handle) = share.open(node, 0) else {
            return false;
        };
        let body = transfer(handle, 0, 0x8_0000);
        let len = share.request(None, op::READ, node, &[&body]);
        let (out, answers) = (share.line.out, share.line.answers);
        for head in (0..16).step_by(2) {
            share
                .line
                .post(REQUESTS, head, &[(out, len)], &[(answers, 0x8_0010)]);
        }
        tsc::wait(attack.random.below(200_000), || false);
        if !attack.device.reset() {
            return false;
        }
        for at in [0, 16, 0x1000, 0x4_0000] {
            fence(answers + at);
        }
        tsc::wait(super::SHORT, || false);
        if ![0, 16, 0x1000, 0x4_0000]
            .iter()
            .all(|at| is_whole(answers + at))
        {
            return false;
        }
    }
    true
}
