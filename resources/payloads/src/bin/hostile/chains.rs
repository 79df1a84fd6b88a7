//! What a driver writes to rings: descriptors, indirect tables, indices.

use payloads::virtio::queue::{Desc, INDIRECT, NEXT, Queue, WRITE};
use payloads::{io, tsc};

use super::{Attack, DATA, RAM_END, REQUESTS, RINGS, SECTORS, SIZE, TABLES};

/// Cycles that a device gets for a chain that it may never answer.
const SHORT: u64 = 300_000;

const fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

/// Addresses at which there is nothing to read or write, or only a part.
const NOWHERE: [u64; 12] = [
    RAM_END,
    RAM_END - 8,
    0xbfff_fff8,
    0xd000_0000,
    0xe000_0000,
    0xe800_0000,
    0xfec0_0000,
    0xfee0_0000,
    0x1_0000_0000,
    1 << 52,
    u64::MAX - 8,
    u64::MAX,
];

/// Chains that loop, lead nowhere, overlap, or are of a kind that no device takes. The first
/// descriptor of those that can be a request is one.
fn bad_chains(each: &mut dyn FnMut(&[Desc])) {
    let all: [&[Desc]; 24] = [
        &[desc(REQUESTS, 16, NEXT, 0)],
        &[
            desc(REQUESTS, 16, NEXT, 1),
            desc(DATA, 512, NEXT | WRITE, 0),
        ],
        &[
            desc(REQUESTS, 16, NEXT, 1),
            desc(DATA, 512, NEXT | WRITE, 1),
        ],
        &[desc(REQUESTS, 16, NEXT, 0xffff)],
        &[desc(REQUESTS, 16, NEXT, SIZE)],
        &[desc(DATA, 16, NEXT | WRITE, 1), desc(REQUESTS, 16, 0, 0)],
        &[desc(REQUESTS, 16, 0, 0)],
        &[desc(DATA, 1, WRITE, 0)],
        &[desc(DATA, u32::MAX, WRITE, 0)],
        &[desc(REQUESTS, u32::MAX, 0, 0)],
        &[desc(REQUESTS, 0, 0, 0)],
        &[desc(DATA, 0, WRITE, 0)],
        &[
            desc(0, u32::MAX, NEXT | WRITE, 1),
            desc(0, u32::MAX, NEXT | WRITE, 0),
        ],
        &[desc(REQUESTS, 16, NEXT, 1), desc(DATA, 0, WRITE, 0)],
        &[
            desc(REQUESTS, 16, NEXT, 1),
            desc(DATA, 511, NEXT | WRITE, 2),
            desc(DATA, 1, WRITE, 0),
        ],
        &[desc(REQUESTS, 15, NEXT, 1), desc(DATA, 513, WRITE, 0)],
        &[
            desc(REQUESTS, 8, NEXT, 1),
            desc(REQUESTS + 8, 8, NEXT, 2),
            desc(DATA, 513, WRITE, 0),
        ],
        // A read onto its own request, status and rings.
        &[
            desc(DATA, 16, NEXT, 1),
            desc(DATA, 4096, NEXT | WRITE, 2),
            desc(DATA, 1, WRITE, 0),
        ],
        &[
            desc(REQUESTS, 16, NEXT, 1),
            desc(RINGS, 0x1000, NEXT | WRITE, 2),
            desc(RINGS, 1, WRITE, 0),
        ],
        &[
            desc(RINGS, 16, NEXT, 1),
            desc(RINGS, 512, NEXT, 2),
            desc(RINGS + 0x100, 0x800, WRITE, 0),
        ],
        // Flags that do not exist, or do not go together.
        &[
            desc(REQUESTS, 16, 0xfff8 | NEXT, 1),
            desc(DATA, 513, 0xfff8 | WRITE, 0),
        ],
        &[
            desc(TABLES, 32, INDIRECT | NEXT, 1),
            desc(DATA, 513, WRITE, 0),
        ],
        &[desc(TABLES, 32, INDIRECT | WRITE, 0)],
        &[desc(REQUESTS, 16, NEXT, 1), desc(TABLES, 32, INDIRECT, 0)],
    ];
    all.into_iter().for_each(each);
}

/// Chains that reach where nothing is, that are as long as the queue, and that a block device
/// carries out.
fn chains_elsewhere(each: &mut dyn FnMut(&[Desc])) {
    for addr in NOWHERE {
        for len in [1, 16, 512, u32::MAX] {
            each(&[desc(addr, len, NEXT, 1), desc(DATA, 513, WRITE, 0)]);
            each(&[
                desc(REQUESTS, 16, NEXT, 1),
                desc(addr, len, NEXT | WRITE, 2),
                desc(DATA, 1, WRITE, 0),
            ]);
            each(&[
                desc(REQUESTS, 16, NEXT, 1),
                desc(DATA, 512, NEXT | WRITE, 2),
                desc(addr, len, WRITE, 0),
            ]);
        }
    }
    // What a block device carries out.
    for len in [48, 512, 4096].into_iter().cycle().take(60) {
        each(&[
            desc(REQUESTS, 16, NEXT, 1),
            desc(REQUESTS + 16, len, NEXT, 2),
            desc(DATA, 1, WRITE, 0),
        ]);
    }
    // As long as the queue, the same buffer each time.
    let mut long = [desc(DATA, 512, NEXT | WRITE, 0); SIZE as usize];
    for (at, desc) in (1..).zip(&mut long) {
        desc.next = at;
    }
    long[0] = desc(REQUESTS, 16, NEXT, 1);
    long[SIZE as usize - 1].flags = WRITE;
    each(&long);
}

/// Requests that a block device carries out, and any other device may take for its own.
pub fn requests(attack: &mut Attack<'_>) {
    // Read, write, flush, get the identity, discard, write zeroes; and what does not exist.
    let kind = attack
        .random
        .pick(&[0u32, 0, 0, 1, 4, 8, 11, 13, 2, 99, u32::MAX]);
    let writes = [1, 11, 13].contains(&kind);
    let sector = match attack.random.below(4) {
        0 if writes => u64::MAX,
        0 => attack.random.u64(),
        _ => attack.random.below(SECTORS - 8),
    };
    io::write(REQUESTS, u64::from(kind));
    io::write(REQUESTS + 8, sector);
    // Ranges for those that take them.
    for at in (REQUESTS + 16..REQUESTS + 0x1000).step_by(16) {
        io::write(at, attack.random.below(SECTORS - 8));
        io::write(
            at + 8,
            attack.random.pick(&[0u64, 1, 8, 1 << 32, 0xffff_ffff]),
        );
    }
}

/// Waits until the device has answered, or has given up, or does not.
fn settle(attack: &Attack<'_>, queue: &mut Queue) {
    tsc::wait(SHORT, || queue.used().is_some() || !attack.device.runs());
}

/// Every bad chain on every queue.
pub fn descriptors(attack: &mut Attack<'_>) -> bool {
    for n in attack.queues() {
        let mut queue = attack.start(n);
        let mut send = |chain: &[Desc]| {
            if !attack.device.runs() {
                queue = attack.start(n);
            }
            requests(attack);
            for (at, desc) in (0..).zip(chain) {
                queue.desc(at, *desc);
            }
            queue.offer(0);
            queue.publish();
            attack.device.notify(n);
            settle(attack, &mut queue);
        };
        bad_chains(&mut send);
        chains_elsewhere(&mut send);
        for head in [SIZE, SIZE + 1, 0x7fff, 0x8000, 0xffff] {
            let mut queue = attack.start(n);
            queue.offer(head);
            queue.publish();
            attack.device.notify(n);
            settle(attack, &mut queue);
        }
    }
    true
}

/// Indirect tables of every bad length and place, nested, looped, and longer than anything.
pub fn tables(attack: &mut Attack<'_>) -> bool {
    for n in attack.queues() {
        let mut queue = attack.start(n);
        let mut send = |attack: &mut Attack<'_>, table: Desc| {
            if !attack.device.runs() {
                queue = attack.start(n);
            }
            requests(attack);
            queue.desc(0, table);
            queue.offer(0);
            queue.publish();
            attack.device.notify(n);
            settle(attack, &mut queue);
        };
        let entry = |at: u64, desc: Desc| io::write(TABLES + 16 * at, desc);
        for len in [0, 1, 15, 17, 31, 0xffff, 1 << 20, u32::MAX] {
            entry(0, desc(REQUESTS, 16, NEXT, 1));
            entry(1, desc(DATA, 513, WRITE, 0));
            send(attack, desc(TABLES, len, INDIRECT, 0));
        }
        for addr in NOWHERE {
            send(attack, desc(addr, 16, INDIRECT, 0));
            send(attack, desc(addr, 1 << 20, INDIRECT, 0));
        }
        // A table in itself, in the ring, and a loop within.
        entry(0, desc(TABLES, 32, INDIRECT, 0));
        send(attack, desc(TABLES, 32, INDIRECT, 0));
        entry(0, desc(REQUESTS, 16, NEXT, 0));
        send(attack, desc(TABLES, 32, INDIRECT, 0));
        entry(0, desc(REQUESTS, 16, NEXT, 0xffff));
        send(attack, desc(TABLES, 32, INDIRECT, 0));
        send(
            attack,
            desc(RINGS + u64::from(n) * super::RINGS_STEP, 256, INDIRECT, 0),
        );
        // A device that writes to the table it reads.
        entry(0, desc(REQUESTS, 16, NEXT, 1));
        entry(1, desc(TABLES, 4096, NEXT | WRITE, 2));
        entry(2, desc(TABLES, 1, WRITE, 0));
        send(attack, desc(TABLES, 48, INDIRECT, 0));
        // 65536 descriptors, each of 4 KiB or of all that there is.
        for len in [4096, u32::MAX, 0] {
            for at in 0..=0xffff {
                entry(at, desc(DATA, len, NEXT | WRITE, at as u16 + 1));
            }
            entry(0, desc(REQUESTS, 16, NEXT, 1));
            entry(0xffff, desc(DATA, len, WRITE, 0));
            send(attack, desc(TABLES, 1 << 20, INDIRECT, 0));
            send(attack, desc(TABLES, 16 * 1024, INDIRECT, 0));
        }
    }
    true
}

/// Indices that jump, and rings that the driver overwrites on the device's side.
pub fn indices(attack: &mut Attack<'_>) -> bool {
    for n in attack.queues() {
        for index in [0xffff, 0x8000, SIZE + 1, SIZE, 2 * SIZE, 1] {
            let mut queue = attack.start(n);
            requests(attack);
            queue.desc(0, desc(REQUESTS, 16, NEXT, 1));
            queue.desc(1, desc(DATA, 513, WRITE, 0));
            for (flags, event) in [(0u16, 0u16), (0xffff, 0xffff)] {
                io::write(queue.parts[1], flags);
                queue.set_used_event(event);
                // The used ring is the device's; its index and contents are not the driver's to write.
                for at in (0..8 * u64::from(SIZE)).step_by(4) {
                    io::write(queue.parts[2] + at, u32::MAX);
                }
                queue.avail = index;
                queue.publish();
                attack.device.notify(n);
                settle(attack, &mut queue);
                queue.avail = queue.avail.wrapping_sub(7);
                queue.publish();
                attack.device.notify(n);
            }
        }
    }
    true
}

/// One chain made available as often as the ring has room, before it is used.
pub fn repeated(attack: &mut Attack<'_>) -> bool {
    for n in attack.queues() {
        for times in [2, SIZE, SIZE + 1, 0x7fff] {
            let mut queue = attack.start(n);
            requests(attack);
            queue.desc(0, desc(REQUESTS, 16, NEXT, 1));
            queue.desc(1, desc(DATA, 0x10_0000, NEXT | WRITE, 2));
            queue.desc(2, desc(DATA, 1, WRITE, 0));
            (0..times).for_each(|_| queue.offer(0));
            queue.publish();
            attack.device.notify(n);
            settle(attack, &mut queue);
            // While it is read, it changes.
            for flags in [NEXT, 0, WRITE, INDIRECT, NEXT | WRITE] {
                queue.desc(1, desc(DATA, u32::MAX, flags, 0));
                attack.device.notify(n);
            }
        }
    }
    true
}
