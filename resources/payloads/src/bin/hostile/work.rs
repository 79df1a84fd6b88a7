//! What a device is for, done as a driver should.

use payloads::io;
use payloads::virtio::Device;
use payloads::virtio::disk::{self, Disk, IN, OUT};
use payloads::virtio::queue::{Desc, Queue, WRITE};

use super::protocol::fuse::{self, Share};
use super::protocol::{frames, ports, sockets};

/// RAM that no attack uses.
const BASE: u64 = 0x500_0000;
const ENTROPY: u32 = 4;
/// `VIRTIO_BLK_F_RO`.
const READ_ONLY: u64 = 1 << 5;

/// Resets the device and does a piece of its work.
pub fn works(device: &Device) -> bool {
    match device.id {
        disk::ID => disk_works(device),
        ENTROPY => entropy_works(device),
        fuse::ID => Share::start(*device, BASE).is_some_and(|mut share| share.works()),
        ports::ID => ports::works(*device, BASE),
        frames::ID => frames::works(*device, BASE),
        sockets::ID => sockets::works(*device, BASE),
        _ => device.start_all(BASE),
    }
}

fn disk_works(device: &Device) -> bool {
    let read_only = device.features() & READ_ONLY != 0;
    let Some(mut disk) = Disk::start(*device, BASE) else {
        return false;
    };
    let fill = io::read::<u8>(disk.data).wrapping_add(1);
    (0..512).for_each(|at| io::write(disk.data + at, fill));
    if disk.sectors() < 2 || disk.request(OUT, 1, 512) != Some(read_only.into()) {
        return false;
    }
    if read_only {
        return disk.request(IN, 1, 512) == Some(0);
    }
    (0..512).for_each(|at| io::write(disk.data + at, !fill));
    let read = disk.request(IN, 1, 512) == Some(0);
    read && (0..512).all(|at| io::read::<u8>(disk.data + at) == fill)
}

fn entropy_works(device: &Device) -> bool {
    if !device.negotiate(0) {
        return false;
    }
    let mut queue = Queue::new(BASE, 0, 2);
    queue.announce(device);
    device.driver_ok();
    let data = BASE + 0x1000;
    (0..64).for_each(|at| io::write(data + at, 0u8));
    queue.desc(
        0,
        Desc {
            addr: data,
            len: 64,
            flags: WRITE,
            next: 0,
        },
    );
    queue.one(device) == Some(64) && (0..64).any(|at| io::read::<u8>(data + at) != 0)
}
