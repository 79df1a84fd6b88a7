//! Fills the first disk with a new pattern over and over, and checks each time that it is there:
//! prints `round N` for every good one and ends with code 3 at the first that is not.
#![no_std]
#![no_main]

use payloads::random::Random;
use payloads::virtio::devices;
use payloads::virtio::disk::{Disk, ID, IN, OUT};
use payloads::{io, println, start::StartInfo};

payloads::start!(main);

const BASE: u64 = 0x100_0000;
/// Bytes of one request.
const LEN: u32 = 0x4000;
const SECTORS: u64 = LEN as u64 / 512;

fn main(_: &StartInfo) -> u8 {
    let device = devices().find(|device| device.id == ID);
    let Some(mut disk) = device.and_then(|device| Disk::start(device, BASE)) else {
        println!("no disk");
        return 2;
    };
    let data = disk.data;
    let words = || (data..data + u64::from(LEN)).step_by(8);
    for round in 0u64.. {
        let places = (0..disk.sectors() / SECTORS).map(|n| n * SECTORS);
        for place in places.clone() {
            let mut random = Random::new(round << 32 | place);
            words().for_each(|at| io::write(at, random.u64()));
            if disk.request(OUT, place, LEN) != Some(0) {
                println!("WRONG: round {round}, sector {place} is not written");
                return 3;
            }
        }
        for place in places {
            words().for_each(|at| io::write(at, 0u64));
            let read = disk.request(IN, place, LEN);
            let mut random = Random::new(round << 32 | place);
            if read != Some(0) || !words().all(|at| io::read::<u64>(at) == random.u64()) {
                println!("WRONG: round {round}, sector {place} reads as something else");
                return 3;
            }
        }
        println!("round {round}");
    }
    0
}
