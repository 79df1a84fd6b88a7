//! PCI functions that come and go, as the generic event device announces them (`devices::pci::hotplug`):
//! drives disks and gives up what is asked for. COM1 takes commands, a letter each: `s` no longer gives
//! up anything, `e` ejects all slots, `r` resets all devices, `l` lists the slots, `q` ends.
#![no_std]
#![no_main]

use payloads::start::StartInfo;
use payloads::virtio::disk::{self, Disk};
use payloads::virtio::pci::in_slot;
use payloads::virtio::{Device, Transport};
use payloads::{console::COM1, io, memory, println};

payloads::start!(main);

const EVENTS: u16 = 0x603;
const EVENT_PCI: u8 = 4;
const ADDED: u16 = 0x620;
const LEAVING: u16 = 0x624;
const EJECT: u16 = 0x628;
/// RAM for the rings and the data of each slot's disk.
const RAM: u64 = 0x100_0000;
const EACH: u64 = 0x10_0000;

fn slots(bits: u32) -> impl Iterator<Item = u64> {
    (0..32).filter(move |slot| bits >> slot & 1 != 0)
}

fn device(slot: u64) -> Option<Device> {
    let function = in_slot(slot)?;
    let id = function.virtio_id();
    let transport = Transport::Pci(function);
    Some(Device { transport, id })
}

/// A function that has come: a disk is read and written.
fn added(slot: u64) {
    let Some(device) = device(slot) else {
        return println!("slot {slot}: nothing");
    };
    println!("slot {slot}: device {}", device.id);
    if device.id == 27 {
        let start = io::read::<u64>(device.config());
        memory::map(start);
        println!("start {start:#x} holds {:#x}", io::read::<u8>(start));
        return println!("slot {slot}: driven {}", device.negotiate(0));
    }
    if device.id != disk::ID {
        return;
    }
    let Some(mut disk) = Disk::start(device, RAM + slot * EACH) else {
        return println!("slot {slot}: no driver");
    };
    let read = disk.request(disk::IN, 0, 512);
    let first: u8 = io::read(disk.data);
    println!("sectors {} read {read:?} first {first:#x}", disk.sectors());
    io::write(disk.data, 0x77u8);
    println!("written {:?}", disk.request(disk::OUT, 1, 512));
}

fn list() {
    let mut count = 0;
    for slot in 1..32 {
        if let Some(device) = device(slot) {
            println!(
                "slot {slot} has device {} in status {}",
                device.id,
                device.status()
            );
            count += 1;
        }
    }
    println!("listed {count}");
}

fn main(_: &StartInfo) -> u8 {
    let mut stubborn = false;
    println!("ready");
    loop {
        if io::in8(EVENTS) & EVENT_PCI != 0 {
            slots(io::in32(ADDED)).for_each(added);
            for slot in slots(io::in32(LEAVING)) {
                println!("slot {slot} is to go");
                if !stubborn {
                    if let Some(device) = device(slot) {
                        device.reset();
                    }
                    io::out32(EJECT, 1 << slot);
                    println!("slot {slot} is there: {}", in_slot(slot).is_some());
                }
            }
        }
        if io::in8(COM1 + 5) & 1 == 0 {
            continue;
        }
        match io::in8(COM1) {
            b's' => {
                stubborn = true;
                println!("holds on");
            }
            b'e' => io::out32(EJECT, u32::MAX),
            b'l' => list(),
            b'r' => {
                for slot in 1..32 {
                    if let Some(device) = device(slot) {
                        println!("slot {slot} is reset: {}", device.reset());
                    }
                }
            }
            b'q' => return 0,
            _ => {}
        }
    }
}
