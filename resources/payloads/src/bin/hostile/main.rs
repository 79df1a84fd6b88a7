//! A driver that does to every device of the machine what no driver should, over and over, and
//! checks after each attack that the device works once it is reset.
//!
//! Prints `ready` before it begins and `survived` at the end. On the command line: `seed=N` for
//! other random numbers, `steps=N` for their number. It may write the first 64 sectors of disks.
//! What shares and sockets have on the host's side is in [`protocol`].
#![no_std]
#![no_main]

mod chains;
mod functions;
mod noise;
mod protocol;
mod registers;
mod work;

use payloads::console::COM1;
use payloads::random::Random;
use payloads::virtio::queue::Queue;
use payloads::virtio::{Device, EVENT_IDX, INDIRECT_DESC, devices};
use payloads::{io, println, start::StartInfo, tsc};

use protocol::{frames, fuse, ports, sockets};

payloads::start!(main);

/// Rings of the attacks, this much for each queue.
const RINGS: u64 = 0x100_0000;
const RINGS_STEP: u64 = 0x1_0000;
/// Requests that no device gets to write to: those that may write a disk are here.
const REQUESTS: u64 = 0x200_0000;
/// Tables of indirect descriptors, 1 MiB and more.
const TABLES: u64 = 0x240_0000;
/// What devices may overwrite.
const DATA: u64 = 0x300_0000;
/// RAM of the attacks on protocols.
const PROTOCOL: u64 = 0x600_0000;
/// RAM of this much is there, and nothing behind it.
const RAM_END: u64 = 0x800_0000;
/// Requests below this sector may write.
const SECTORS: u64 = 64;
/// Entries of the attacked queues.
const SIZE: u16 = 16;
/// Most queues of a device that are attacked.
const QUEUES: u16 = 16;
const MAX_DEVICES: usize = 32;
/// Cycles in which the host looks at what is left, at most: a minute or so.
const REST: u64 = 180_000_000_000;

/// What an attack works on.
struct Attack<'a> {
    device: Device,
    random: &'a mut Random,
    steps: u64,
}

impl Attack<'_> {
    /// Starts the device with all queues, and gives back queue `index`.
    fn start(&self, index: u16) -> Queue {
        self.device.negotiate(INDIRECT_DESC | EVENT_IDX);
        let mut wanted = None;
        for n in 0..self.device.queues().min(QUEUES) {
            let queue = Queue::new(RINGS + u64::from(n) * RINGS_STEP, n, self.size(n));
            queue.announce(&self.device);
            if n == index {
                wanted = Some(queue);
            }
        }
        self.device.driver_ok();
        wanted.unwrap_or(Queue::new(RINGS, index, SIZE))
    }

    fn size(&self, queue: u16) -> u16 {
        self.device.select(queue);
        self.device.queue_max().clamp(1, SIZE)
    }

    fn queues(&self) -> core::ops::Range<u16> {
        self.device.reset();
        0..self.device.queues().min(QUEUES)
    }
}

type Assault = fn(&mut Attack<'_>) -> bool;

/// Each says whether what can be seen of the device at once is as it should be.
const ASSAULTS: [(&str, Assault); 25] = [
    ("registers", registers::every_value),
    ("frozen registers", registers::after_driver_ok),
    ("queues in odd places", registers::odd_places),
    ("descriptor chains", chains::descriptors),
    ("indirect tables", chains::tables),
    ("ring indices", chains::indices),
    ("the same chain again", chains::repeated),
    ("kick storm", noise::storm),
    ("reset under way", noise::resets),
    ("random", noise::random),
    ("FUSE requests", fuse::requests),
    ("names", fuse::names),
    ("counts of forgotten files", fuse::counts),
    ("open files", fuse::handles),
    ("transfers taken back", fuse::taken_back),
    ("control messages", ports::messages),
    ("ports", ports::streams),
    ("console alone", ports::plain),
    ("packets", sockets::packets),
    ("connections", sockets::connections),
    ("frames", frames::storm),
    ("tight buffers", frames::tight),
    ("commands", frames::commands),
    ("configuration space", functions::configuration_space),
    ("MSI-X and BARs", functions::vectors_and_bars),
];

fn main(info: &StartInfo) -> u8 {
    let number = |key| info.option(key).and_then(|n| n.parse().ok());
    let mut random = Random::new(number("seed").unwrap_or(1));
    let steps = number("steps").unwrap_or(2000);
    let mut all = [None; MAX_DEVICES];
    for (slot, device) in all.iter_mut().zip(devices()) {
        *slot = Some(device);
    }
    let all = || all.iter().flatten();
    for device in all() {
        let works = work::works(device);
        println!("device {} works {works}", device.id);
    }
    println!("ready");
    for (name, assault) in ASSAULTS {
        for device in all() {
            let fair = assault(&mut Attack {
                device: *device,
                random: &mut random,
                steps,
            });
            let works = work::works(device);
            if !fair || !works {
                println!(
                    "device {} after {name}: fair {fair}, works {works}",
                    device.id
                );
                return 3;
            }
        }
        println!("{name}: done");
    }
    if !all().all(work::works) {
        println!("a device was broken by another");
        return 4;
    }
    // Nothing is left of it all, until a byte comes on COM1.
    if !all().all(Device::reset) {
        return 5;
    }
    println!("at rest");
    tsc::wait(REST, || io::in8(COM1 + 5) & 1 != 0);
    println!("survived");
    0
}
