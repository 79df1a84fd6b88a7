//! `devices`: any accesses of a guest to any device, with the host's side used in between.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use devices::bus::BusDevice;
use devices::ioapic::{IoApic, MsiSink, PINS};
use devices::irq::Interrupt;
use devices::legacy::debug_exit::DebugExit;
use devices::legacy::i8042::I8042;
use devices::legacy::power::Power;
use devices::legacy::pvpanic::PvPanic;
use devices::legacy::rtc::Cmos;
use devices::legacy::serial::Serial;

use super::input::Input;

/// 2023-11-14, so that runs are alike.
const NOW: i64 = 1_700_000_000;

struct Line;

impl Interrupt for Line {
    fn signal(&self) {}
}

struct Messages;

impl MsiSink for Messages {
    fn send(&self, _: u64, _: u32) {}
}

/// The first byte chooses the device, the rest says what happens to it.
pub fn run(data: &[u8]) {
    let Some((device, rest)) = data.split_first() else {
        return;
    };
    let input = Input(rest);
    match device % 7 {
        0 => check(
            serial,
            Serial::save,
            |d, b| _ = d.input(&vec![b; b.into()]),
            input,
        ),
        1 => check(
            |s| I8042::new(Arc::new(Line), s),
            I8042::save,
            |d, _| _ = d.ctrl_alt_del(),
            input,
        ),
        2 => check(
            |s| Cmos::new(Box::new(|| NOW), s),
            Cmos::save,
            |_, _| (),
            input,
        ),
        3 => check(
            |s| Power::new(Arc::new(Line), s),
            Power::save,
            |d, _| d.press_power_button(),
            input,
        ),
        4 => check(
            |s| IoApic::new(Arc::new(Messages), s),
            IoApic::save,
            ioapic,
            input,
        ),
        5 => access(&PvPanic, |_, _| (), input),
        _ => access(&DebugExit, |_, _| (), input),
    }
}

fn serial(state: devices::legacy::serial::SerialState) -> Serial {
    let out = Box::new(io::sink());
    Serial::new(Arc::new(Line), out, Box::new(|| ()), state).expect("a saved state is valid")
}

fn ioapic(device: &IoApic, byte: u8) {
    let pin = usize::from(byte >> 2) % (PINS + 1);
    match byte % 4 {
        0 => device.pulse(pin),
        1 => device.set_level(pin, true),
        2 => device.set_level(pin, false),
        _ => device.end_of_interrupt(byte),
    }
}

/// Uses a fresh device, then checks that a device restored from what it saves is the same.
fn check<D: BusDevice, S: Clone + Default + PartialEq + Debug>(
    new: impl Fn(S) -> D,
    save: impl Fn(&D) -> S,
    host: impl Fn(&D, u8),
    input: Input<'_>,
) {
    let device = new(S::default());
    access(&device, host, input);
    let state = save(&device);
    assert_eq!(save(&new(state.clone())), state);
}

fn access<D: BusDevice>(device: &D, host: impl Fn(&D, u8), mut input: Input<'_>) {
    while !input.is_empty() {
        let what = input.u8();
        let width = 1 + usize::from(what >> 2) % 8;
        let offset = match what & 0x80 {
            0 => u64::from(input.u8() % 32),
            _ => u64::from_le_bytes(input.array()),
        };
        match what % 4 {
            0 => device.read(offset, &mut vec![0xff; width]),
            1 | 2 => drop(device.write(offset, &input.array::<8>()[..width])),
            _ => host(device, input.u8()),
        }
    }
}
