//! `virtio_*`: a driver that writes what it likes to the queues and registers of one device, over
//! either transport, in RAM between guard pages.
//!
//! Whatever it does, the device can be saved, made again from that, and brought back by a reset.

pub mod kinds;

use devices::virtio::core::{DRIVER_OK, Half, NEEDS_RESET, Reg, Ring, VirtioState};
use devices::virtio::device::{DeviceState, VirtioDevice};
use devices::virtio::driver::{RAM, RAM_LEN, Rig, TRANSPORTS, Vq, reused_ram, write_desc};
use vm_memory::{Bytes, GuestAddress};

use super::input::Input;

/// Most steps of a run: more find nothing new.
const MAX_STEPS: usize = 200;
/// Behind the rings of sixteen queues.
const BUFFERS: u64 = 0x2_0000;
/// Buffers that devices write to.
const ANSWERS: u64 = 0x8_0000;
const TABLE: u64 = 0x4_0000;

/// Registers that a driver writes.
const REGISTERS: [Reg; 16] = [
    Reg::Status,
    Reg::QueueSel,
    Reg::QueueSize,
    Reg::QueueReady,
    Reg::QueueNotify,
    Reg::DriverFeatures,
    Reg::DriverFeaturesSel,
    Reg::DeviceFeaturesSel,
    Reg::QueueAddr(Ring::Desc, Half::Low),
    Reg::QueueAddr(Ring::Desc, Half::High),
    Reg::QueueAddr(Ring::Avail, Half::Low),
    Reg::QueueAddr(Ring::Avail, Half::High),
    Reg::QueueAddr(Ring::Used, Half::Low),
    Reg::QueueAddr(Ring::Used, Half::High),
    Reg::QueueNotify,
    Reg::Status,
];

/// A device, again and again on the same host resources.
type Make<'a> = dyn Fn(&DeviceState) -> Box<dyn VirtioDevice> + 'a;

struct Guest {
    rig: Rig,
    vqs: Vec<Vq>,
}

impl Guest {
    fn queue(&mut self, byte: u8) -> &mut Vq {
        let count = self.vqs.len();
        &mut self.vqs[usize::from(byte) % count]
    }

    fn kick(&mut self, byte: u8) {
        let index = usize::from(byte) % self.vqs.len();
        self.rig.kick(&self.vqs[index]);
        self.rig.run(0);
    }

    fn fill(&self, at: u64, bytes: &[u8]) {
        let written = self.rig.ram.write_slice(bytes, GuestAddress(at));
        written.expect("buffers are in RAM");
    }

    /// A chain as a driver would make it: what the device reads comes from the input, in one
    /// buffer or two, and there is room for answers.
    fn request(&mut self, input: &mut Input<'_>) {
        let [queue, len, room, how] = input.array();
        let bytes = input.bytes(len.into());
        let slot = u64::from(how % 16) << 12;
        self.fill(BUFFERS + slot, bytes);
        let cut = (bytes.len() as u32).min(if how & 0x10 != 0 { 16 } else { u32::MAX });
        let more = bytes.len() as u32 - cut;
        let room = u32::from(room) << if how & 0x20 != 0 { 6 } else { 0 };
        let all = [
            (BUFFERS + slot, cut, false),
            (BUFFERS + slot + u64::from(cut), more, false),
            (ANSWERS + slot, room, true),
            (ANSWERS + 0x2_0000 + slot, 1, true),
        ];
        let last = how & 0x40 == 0;
        let mut bufs = all.to_vec();
        bufs.truncate(if last { 4 } else { 3 });
        bufs.retain(|buf| buf.1 > 0);
        if bufs.is_empty() {
            return;
        }
        let vq = self.queue(queue);
        if bufs.len() > usize::from(vq.size) {
            return;
        }
        match how & 0x80 {
            0 => vq.add(&bufs),
            _ => vq.add_indirect(TABLE + slot, &bufs),
        };
        self.kick(queue);
    }

    /// A descriptor of any kind.
    fn descriptor(&mut self, input: &mut Input<'_>) {
        let [queue, at, place, flags] = input.array();
        let (offset, len, next) = (input.u16(), input.u16(), input.u8());
        let offset = u64::from(offset);
        let addr = match place % 10 {
            0 => offset,
            1 => RAM_LEN - (offset & 0xff),
            2 => RAM[1] - 1 + offset,
            3 => RAM[1] + RAM_LEN - (offset & 0xff),
            4 => u64::MAX - offset,
            5 => offset << 48 | offset,
            6 => TABLE + (offset & 0xfff),
            7 => BUFFERS + offset,
            _ => ANSWERS + offset,
        };
        let len = match place >> 6 {
            0 => u32::from(len),
            1 => u32::from(len) << 16 | 0xffff,
            2 => u32::from(len) << 4,
            _ => u32::from(len & 0xff),
        };
        let flags = match flags & 0x80 {
            0 => u16::from(flags & 7),
            _ => u16::from(flags) << 8 | u16::from(flags),
        };
        if place & 0x20 != 0 {
            let to = GuestAddress(TABLE + 16 * u64::from(at));
            write_desc(&self.rig.ram, to, addr, len, flags, next.into());
        } else {
            let vq = self.queue(queue);
            vq.raw_desc(u16::from(at) % vq.size, addr, len, flags, next.into());
        }
    }

    fn step(&mut self, input: &mut Input<'_>, host: &mut dyn FnMut(u8)) {
        match input.u8() % 16 {
            0..5 => self.request(input),
            5 | 6 => self.descriptor(input),
            7 => {
                let [queue, head] = input.array();
                self.queue(queue).publish(head.into());
                self.kick(queue);
            }
            8 => {
                let queue = input.u8();
                let index = input.u16();
                self.queue(queue).set_avail(index);
                self.kick(queue);
            }
            9 => {
                let [queue, which] = input.array();
                let value = input.u16();
                match which % 2 {
                    0 => self.queue(queue).set_used_event(value),
                    _ => self.queue(queue).set_avail_flags(value),
                }
            }
            10 => {
                let reg = REGISTERS[usize::from(input.u8()) % REGISTERS.len()];
                self.rig.port.set(reg, u32::from_le_bytes(input.array()));
            }
            11 => self.write(input),
            12 => {
                let (bus, len) = self.rig.port.bus();
                let (at, width) = (input.u16(), input.u8());
                bus.read(
                    u64::from(at) % len,
                    &mut [0; 8][..usize::from(width % 8) + 1],
                );
            }
            13 => match input.u8() % 4 {
                0 => self.vqs = self.rig.start(None),
                1 => {
                    self.rig.core.pause();
                    self.rig.core.resume();
                }
                2 => self.rig.run(1),
                _ => {
                    let at = input.u8().into();
                    self.rig.port.write_config(at, &input.array::<4>());
                    self.rig.port.read_config(at, &mut [0; 8]);
                }
            },
            14 => {
                let (at, len) = (input.u16(), input.u8());
                let bytes = input.bytes(len.into());
                self.fill(0x1000 + u64::from(at), bytes);
            }
            _ => {
                host(input.u8());
                self.rig.run(0);
            }
        }
    }

    /// A write of any width to any register.
    fn write(&mut self, input: &mut Input<'_>) {
        let (bus, len) = self.rig.port.bus();
        let (at, width) = (input.u16(), input.u8());
        let data: [u8; 8] = input.array();
        let _ = bus.write(u64::from(at) % len, &data[..usize::from(width % 8) + 1]);
    }
}

/// Drives what `make` makes; `host` is what the host's side does meanwhile.
fn drive(make: &Make<'_>, host: &mut dyn FnMut(u8), mut input: Input<'_>) {
    let choice = input.u8();
    let transport = TRANSPORTS[usize::from(choice) % TRANSPORTS.len()];
    let ram = reused_ram();
    let rig = Rig::with(
        transport,
        make(&DeviceState::Reset),
        ram,
        VirtioState::default(),
    );
    // All features, or the least.
    let features = (choice & 2 != 0).then_some(1 << 32);
    let vqs = rig.start(features);
    let mut guest = Guest { rig, vqs };
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        guest.step(&mut input, host);
    }
    let Guest { rig, .. } = guest;
    rig.core.pause();
    let state = rig.core.save();
    let again = Rig::with(
        transport,
        make(&state.device),
        rig.ram.clone(),
        state.clone(),
    );
    assert_eq!(again.core.save(), state);
    drop(again);
    rig.start(None);
    let status = rig.port.get(Reg::Status) as u8;
    assert_eq!(status & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
}
