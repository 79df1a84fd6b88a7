//! Starts every virtio device, says `ready` and how many there are, and does nothing more.
#![no_std]
#![no_main]

use payloads::virtio::devices;
use payloads::{println, start::StartInfo};

payloads::start!(main);

const RINGS: u64 = 0x100_0000;
const STEP: u64 = 0x10_0000;

fn main(_: &StartInfo) -> u8 {
    let mut count = 0;
    for device in devices() {
        if !device.start_all(RINGS + count * STEP) {
            println!("device {} does not start", device.id);
            return 2;
        }
        count += 1;
    }
    println!("ready {count} devices");
    loop {
        core::hint::spin_loop();
    }
}
