//! Reads the clocks of a virtio clock device (virtio 1.4, "RTC Device"), over MMIO or PCI, and
//! compares the counter that it gives with the processor's own.
#![no_std]
#![no_main]

use payloads::virtio::queue::{Desc, NEXT, Queue, WRITE};
use payloads::virtio::{self, Device};
use payloads::{io, println, start::StartInfo, tsc};

payloads::start!(main);

/// RAM that nothing else uses.
const RINGS: u64 = 0x100_0000;
const REQUEST: u64 = RINGS + 0x10000;
const RESPONSE: u64 = REQUEST + 0x1000;

/// `VIRTIO_RTC_COUNTER_X86_TSC`.
const TSC: u64 = 1;

struct Clocks {
    device: Device,
    queue: Queue,
}

impl Clocks {
    /// The words behind the header of the response, if its status is good.
    fn ask(&mut self, kind: u64, clock: u64, counter: u64) -> Option<[u64; 2]> {
        io::write(REQUEST, kind);
        io::write(REQUEST + 8, clock | counter << 16);
        io::write(RESPONSE, u64::MAX);
        let buffers = [(REQUEST, 16, NEXT), (RESPONSE, 24, WRITE)];
        for (at, (addr, len, flags)) in (0..).zip(buffers) {
            let next = at + 1;
            let desc = Desc {
                addr,
                len,
                flags,
                next,
            };
            self.queue.desc(at, desc);
        }
        self.queue.one(&self.device)?;
        let good = io::read::<u64>(RESPONSE) == 0;
        good.then(|| [8, 16].map(|at| io::read(RESPONSE + at)))
    }
}

fn main(_: &StartInfo) -> u8 {
    let Some(device) = virtio::devices().find(|device| device.id == 17) else {
        println!("no clock");
        return 2;
    };
    if !device.negotiate(0) {
        return 3;
    }
    let queue = Queue::new(RINGS, 0, 16);
    queue.announce(&device);
    device.driver_ok();
    let mut clocks = Clocks { device, queue };
    let first = |answer: Option<[u64; 2]>| answer.map_or(u64::MAX, |[word, _]| word);
    println!("clocks {}", first(clocks.ask(0x1000, 0, 0)) & 0xffff);
    for clock in [0, 1] {
        println!("type {clock} {:#x}", first(clocks.ask(0x1001, clock, 0)));
    }
    println!("utc {}", first(clocks.ask(1, 0, 0)));
    println!("crosses {}", first(clocks.ask(0x1002, 0, TSC)));
    let before = tsc::now();
    let answer = clocks.ask(2, 1, TSC);
    let after = tsc::now();
    match answer {
        Some([_, cycles]) => println!("between {}", before < cycles && cycles < after),
        None => println!("not crossed"),
    }
    0
}
