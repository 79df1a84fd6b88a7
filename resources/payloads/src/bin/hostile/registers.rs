//! Registers: any value in each, changes after DRIVER_OK, rings where none can be.

use payloads::io;
use payloads::virtio::queue::{Desc, Queue};
use payloads::virtio::{Part, Transport};

use super::{Attack, DATA, RAM_END, REQUESTS, RINGS, SIZE};

/// Offsets of registers: the start of each page of the device's memory. The MSI-X table, from which
/// the device may be made to send this processor an NMI, is in [`super::functions`].
pub fn offsets(attack: &Attack<'_>) -> impl Iterator<Item = u64> + use<> {
    let (_, len) = attack.device.registers();
    let table = match attack.device.transport {
        Transport::Mmio(_) => u64::MAX,
        Transport::Pci(f) => f.msix_table().0 - f.bar,
    };
    let pages = (0..len).step_by(0x1000).filter(move |page| *page != table);
    pages.flat_map(|page| (page..page + 0x140).step_by(4))
}

/// Writes each register with odd values in every state of the device, and reads them in every
/// width.
pub fn every_value(attack: &mut Attack<'_>) -> bool {
    let device = attack.device;
    let (base, _) = device.registers();
    for state in 0..4u8 {
        device.reset();
        match state {
            0 => {}
            1 => device.set_status(3),
            2 => drop(device.negotiate(0)),
            _ => drop(attack.start(0)),
        }
        // The first page has most of the registers.
        for value in [u32::MAX, 0xffff, 0x8000, 0] {
            for at in offsets(attack).take_while(|at| *at < 0x1000) {
                io::write(base + at, value);
                let _ = io::read::<u32>(base + at);
            }
        }
        for at in offsets(attack) {
            io::write(
                base + at,
                attack.random.pick(&[u32::MAX, 0xffff, 0x8000, 1]),
            );
            let _ = io::read::<u32>(base + at);
        }
        for at in 0..0x140 {
            let _ = io::read::<u8>(base + at);
            let _ = io::read::<u16>(base + at);
            let _ = io::read::<u64>(base + at);
            io::write(base + at, attack.random.u64());
            io::write(base + at, attack.random.u64() as u16);
            io::write(base + at, attack.random.u64() as u8);
        }
    }
    true
}

/// A running device keeps its queues whatever is written.
pub fn after_driver_ok(attack: &mut Attack<'_>) -> bool {
    let device = attack.device;
    for n in attack.queues() {
        let queue = attack.start(n);
        let elsewhere = [0, DATA, RAM_END, u64::MAX - 15, u64::MAX];
        for (size, address) in [0, 1, 3, 0x8000, 0xffff].into_iter().zip(elsewhere) {
            device.select(n);
            device.set_queue_size(size);
            for part in [Part::Desc, Part::Avail, Part::Used] {
                device.set_address(part, address);
            }
            device.set_ready(0);
            device.set_ready(0xffff);
            device.accept(address);
            device.notify(n);
        }
        // The features and the sizes stay, which shows over PCI; the status stays for sure.
        device.select(n);
        let kept = match device.transport {
            Transport::Mmio(base) => io::read::<u32>(base + 0x44) == 1,
            Transport::Pci(_) => device.queue_max() == queue.size,
        };
        if !kept || !device.runs() {
            return false;
        }
    }
    true
}

/// Rings that overlap, are not in RAM, or wrap around; sizes that are none.
pub fn odd_places(attack: &mut Attack<'_>) -> bool {
    let device = attack.device;
    let (window, _) = device.registers();
    let places = [
        [RINGS, RINGS, RINGS],
        [RINGS, RINGS + 2, RINGS + 4],
        [RINGS + 1, RINGS + 0x1001, RINGS + 0x2003],
        [RAM_END - 16, RAM_END - 4, RAM_END - 8],
        [RAM_END, RAM_END, RAM_END],
        [RINGS, RINGS + 0x1000, RAM_END - 6],
        [u64::MAX, u64::MAX, u64::MAX],
        [u64::MAX - 15, u64::MAX - 1, u64::MAX - 3],
        [1 << 63, 1 << 62, 1 << 61],
        [window, window, window],
        [0xfee0_0000, 0xfec0_0000, 0xe000_0000],
        [0xbfff_fff0, 0xc000_0000, 0x1_0000_0000],
        [0, 0, 0],
        [REQUESTS, DATA, DATA + 0x1000],
    ];
    for n in attack.queues() {
        for size in [1, 2, 3, SIZE, 0x8000, 0xffff, 0] {
            for parts in places {
                device.negotiate(u64::MAX);
                // A table and rings that would be taken if only the place were good.
                let mut queue = Queue::new(RINGS, n, SIZE);
                queue.desc(
                    0,
                    Desc {
                        addr: DATA,
                        len: 64,
                        flags: 2,
                        next: 0,
                    },
                );
                (queue.size, queue.parts) = (size, parts);
                queue.announce(&device);
                device.driver_ok();
                device.notify(n);
            }
        }
    }
    true
}
