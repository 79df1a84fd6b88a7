//! Commands of the driver on the control queue (section 5.1.6.5): how many pairs of queues it uses,
//! which work on received frames it takes, and that it has announced itself.
//!
//! The device passes every frame, so it has no commands for filters: a driver that had them would
//! send some, and wait for each, whenever its interface goes up or joins a group.

use virtio_bindings::virtio_net::*;

use super::{Net, host_error};
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Io, read_at, total, write_at};

/// Class and command.
const HEAD: u64 = 2;
/// The features that a driver may switch (section 5.1.6.5.6.1).
const SWITCHED: [u32; 7] = [
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
];

/// A command that can be followed.
#[derive(Clone, Copy, Debug)]
enum Command {
    /// Use so many pairs of queues.
    Pairs(u16),
    /// Take this work on received frames.
    Offloads(u64),
    /// It has seen that it is to announce itself (section 5.1.6.5.4).
    Announced,
}

impl Net {
    /// Index of the control queue: behind the pairs that the driver may use (section 5.1.2).
    pub(super) fn control_queue(&self, io: &Io<'_>) -> Option<usize> {
        let pairs = match io.has(VIRTIO_NET_F_MQ) {
            true => self.space.pairs.into(),
            false => 1,
        };
        io.has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs)
    }

    /// Has the host use as many pairs as the driver does.
    pub(super) fn use_pairs(&mut self) -> Result<(), DeviceError> {
        let (before, active) = (self.host_active, self.active);
        let used = self.backend.use_pairs(before, active);
        used.map_err(|error| host_error("use the queues of a tap interface", error))?;
        self.host_active = active;
        Ok(())
    }

    /// Has a driver that was loaded tell the network where it is now, and look at its configuration.
    pub(super) fn ask_announcement(&mut self, io: &mut Io<'_>) {
        let moved = std::mem::take(&mut self.moved);
        if moved && io.has(VIRTIO_NET_F_GUEST_ANNOUNCE) && self.space.set_announces(true) {
            io.config_changed();
        }
    }

    /// The driver has nothing to announce.
    pub(super) fn stay(&mut self) {
        self.moved = false;
        self.space.set_announces(false);
    }

    /// Answers what is on the control queue, then does it.
    pub(super) fn control(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(queue)? {
            let mut bytes = [0; HEAD as usize + 8];
            let got = read_at(io.ram(), chain.readable(), 0, &mut bytes)? as u64;
            if got < HEAD || chain.writable().is_empty() {
                return Err(chain.layout_error());
            }
            let command = self.command(bytes, total(chain.readable()) - HEAD, io);
            let status = match command {
                Some(_) => VIRTIO_NET_OK,
                None => VIRTIO_NET_ERR,
            };
            // Before the driver is told, else frames would come as it no longer takes them.
            match command {
                Some(Command::Pairs(pairs)) => {
                    self.active = pairs;
                    self.use_pairs()?;
                }
                Some(Command::Offloads(offloads)) => {
                    self.offloads = Some(offloads);
                    self.mode = None;
                    self.begin(io)?;
                }
                Some(Command::Announced) => {
                    self.space.set_announces(false);
                }
                None => {}
            }
            write_at(io.ram(), chain.writable(), 0, &[status as u8])?;
            io.complete(chain, 1)?;
            if let Some(Command::Pairs(pairs)) = command {
                (0..usize::from(pairs)).try_for_each(|pair| self.receive(pair, io))?;
            }
        }
        Ok(())
    }

    /// The command in `bytes`, which has `len` bytes behind class and command; `None` for one that
    /// is unknown, not negotiated or asks for what there is not.
    fn command(&self, bytes: [u8; 10], len: u64, io: &Io<'_>) -> Option<Command> {
        let [class, command, data @ ..] = bytes;
        let value = u64::from_le_bytes(data);
        match (u32::from(class), u32::from(command), len) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, 2) => {
                let pairs = value as u16;
                let fits = io.has(VIRTIO_NET_F_MQ) && (1..=self.space.pairs).contains(&pairs);
                fits.then_some(Command::Pairs(pairs))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, 8) => {
                let negotiated = SWITCHED.iter().filter(|bit| io.has(**bit));
                let negotiated = negotiated.fold(0, |all, bit| all | 1 << bit);
                let fits = io.has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) && value & !negotiated == 0;
                fits.then_some(Command::Offloads(value))
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, 0) => io
                .has(VIRTIO_NET_F_GUEST_ANNOUNCE)
                .then_some(Command::Announced),
            _ => None,
        }
    }
}
