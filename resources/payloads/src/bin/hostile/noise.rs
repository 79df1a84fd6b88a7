//! A great deal of something: kicks, resets, random accesses.

use payloads::io;
use payloads::virtio::queue::{Desc, NEXT, WRITE};

use super::chains::requests;
use super::registers::offsets;
use super::{Attack, DATA, QUEUES, RAM_END, REQUESTS, SIZE, TABLES};

const KICKS: u32 = 10_000;
const RESETS: u32 = 100;

/// Kicks of queues that have nothing, that have something, and that do not exist.
pub fn storm(attack: &mut Attack<'_>) -> bool {
    let device = attack.device;
    let queues = attack.queues();
    let mut queue = attack.start(0);
    queue.desc(
        0,
        Desc {
            addr: DATA,
            len: 0,
            flags: WRITE,
            next: 0,
        },
    );
    for kick in 0..KICKS {
        let which = match kick % 8 {
            0 => queues.end + 1,
            1 => 0xffff,
            n => n as u16 % queues.end.max(1),
        };
        device.notify(which);
        if kick % 64 == 0 {
            queue.offer(0);
            queue.publish();
        }
    }
    true
}

/// Takes the device back while it works.
pub fn resets(attack: &mut Attack<'_>) -> bool {
    let device = attack.device;
    for n in attack.queues() {
        for round in 0..RESETS {
            let mut queue = attack.start(n);
            requests(attack);
            for at in (0..SIZE - 2).step_by(3) {
                let chain = [
                    (REQUESTS, 16, NEXT, at + 1),
                    (
                        DATA + u64::from(at) * 0x1_0000,
                        0x8000,
                        NEXT | WRITE,
                        at + 2,
                    ),
                    (DATA, 1, WRITE, 0),
                ];
                for (index, (addr, len, flags, next)) in (at..).zip(chain) {
                    queue.desc(
                        index,
                        Desc {
                            addr,
                            len,
                            flags,
                            next,
                        },
                    );
                }
                queue.offer(at);
            }
            queue.publish();
            device.notify(n);
            match round % 3 {
                // At once, by a status that is not allowed, and twice.
                0 => device.set_status(0),
                1 => device.set_status(attack.random.u64() as u8),
                _ => (0..2).for_each(|_| device.set_status(0)),
            }
        }
    }
    true
}

/// An address that may be anything but this program.
fn address(attack: &mut Attack<'_>) -> u64 {
    let offset = attack.random.below(0x10_0000);
    match attack.random.below(8) {
        0 => RAM_END.wrapping_sub(offset % 64),
        1 => attack.random.u64() | 1 << 40,
        2 => u64::MAX - offset % 64,
        3 => 0xd000_0000 + offset,
        4 => TABLES + offset % 4096,
        _ => DATA + offset,
    }
}

/// A descriptor; what the device writes to is never a request.
fn descriptor(attack: &mut Attack<'_>) -> Desc {
    let flags = match attack.random.below(10) {
        0 => attack.random.u64() as u16,
        n => n as u16 % 8,
    };
    let len = attack
        .random
        .pick(&[0, 1, 16, 512, 513, 4096, 0x2_0000, u32::MAX]);
    let addr = match flags & WRITE {
        0 if attack.random.below(2) == 0 => REQUESTS,
        _ => address(attack),
    };
    let next = attack.random.below(u64::from(SIZE) + 1) as u16;
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

/// Everything at once, as the generator wants it.
pub fn random(attack: &mut Attack<'_>) -> bool {
    let device = attack.device;
    let (base, _) = device.registers();
    let count = offsets(attack).count() as u64;
    let queues = attack.queues();
    let mut queue = attack.start(0);
    for _ in 0..attack.steps {
        let value = match attack.random.below(4) {
            0 => u64::MAX,
            1 => attack.random.below(32),
            2 => 0xffff,
            _ => attack.random.u64(),
        };
        match attack.random.below(16) {
            0..3 => {
                let at = attack.random.below(count) as usize;
                let at = base + offsets(attack).nth(at).unwrap_or(0) + value % 4;
                match attack.random.below(8) {
                    0 => io::write(at, value as u8),
                    1 => io::write(at, value as u16),
                    2 => io::write(at, value),
                    3 => _ = io::read::<u64>(at),
                    4 => _ = io::read::<u16>(at),
                    _ => io::write(at & !3, value as u32),
                }
            }
            3..8 => queue.desc(value as u16 % SIZE, descriptor(attack)),
            8 => io::write(TABLES + 16 * (value % 64), descriptor(attack)),
            9 => requests(attack),
            10..13 => {
                queue.offer(value as u16 % (SIZE + 1));
                queue.publish();
                device.notify(queue.index);
            }
            13 => device.notify(value as u16),
            14 => {
                queue.avail = value as u16;
                queue.publish();
            }
            _ => {
                let which = attack.random.below(u64::from(queues.end.clamp(1, QUEUES)));
                queue = attack.start(which as u16);
            }
        }
    }
    true
}
