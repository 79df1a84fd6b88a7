//! What holds for every device: any access is survived, no access waits, and a saved device
//! restored is the same device.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bus::{Bus, BusDevice};
use crate::ioapic::{self, IoApic, IoApicState, MsiSink};
use crate::irq::Interrupt;
use crate::irq::mock::Counter;
use crate::legacy::debug_exit::DebugExit;
use crate::legacy::i8042::{self, I8042, I8042State};
use crate::legacy::power::{self, Power, PowerState};
use crate::legacy::pvpanic::PvPanic;
use crate::legacy::rtc::{self, Cmos, CmosState};
use crate::legacy::serial::{self, Serial, SerialState};
use crate::legacy::watchdog::tests::Still;
use crate::legacy::watchdog::{self, Watchdog, WatchdogState};

struct NoSink;

impl MsiSink for NoSink {
    fn send(&self, _: u64, _: u32) {}
}

fn line() -> Arc<dyn Interrupt> {
    Arc::new(Counter::default())
}

fn serial(state: SerialState) -> Serial {
    let out = Box::new(std::io::sink());
    Serial::new(line(), out, Box::new(|| ()), state).unwrap()
}

fn i8042(state: I8042State) -> I8042 {
    I8042::new(line(), state)
}

fn cmos(state: CmosState) -> Cmos {
    Cmos::new(Box::new(|| 1_700_000_000), state)
}

fn power(state: PowerState) -> Power {
    Power::new(line(), state)
}

fn watchdog(state: WatchdogState) -> Watchdog<Still> {
    Watchdog::new(Still::default(), 1..=36_000, state)
}

fn check_watchdog(device: &Watchdog<Still>, byte: u8) {
    device
        .alarm()
        .pass(Duration::from_millis(u64::from(byte) << 8));
    device.check();
}

fn ioapic(state: IoApicState) -> IoApic {
    IoApic::new(Arc::new(NoSink), state)
}

/// One step of a hostile guest or a busy host.
#[derive(Clone, Debug)]
enum Step {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Host(u8),
}

/// Offsets that hit registers mostly, those of the I/O APIC too, and any other at times.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0u64..10,
        2 => Just(0x10u64),
        1 => Just(0x40u64),
        1 => any::<u64>(),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (offset(), 1usize..=8).prop_map(|(offset, width)| Step::Read(offset, width)),
        (offset(), prop::collection::vec(any::<u8>(), 1..=8))
            .prop_map(|(offset, data)| Step::Write(offset, data)),
        any::<u8>().prop_map(Step::Host),
    ];
    prop::collection::vec(step, 0..200)
}

/// Runs the steps on a fresh device, then checks that restoring what it saved changes nothing.
fn check<D: BusDevice, S>(
    new: fn(S) -> D,
    save: fn(&D) -> S,
    host: fn(&D, u8),
    steps: &[Step],
) -> Result<(), TestCaseError>
where
    S: Clone + Debug + Default + PartialEq + Serialize + DeserializeOwned,
{
    let device = new(S::default());
    prop_assert_eq!(save(&device), S::default());
    for step in steps {
        match step {
            Step::Read(offset, width) => device.read(*offset, &mut vec![0xff; *width]),
            Step::Write(offset, data) => {
                let _ = device.write(*offset, data);
            }
            Step::Host(byte) => host(&device, *byte),
        }
    }
    let state = save(&device);
    prop_assert_eq!(&save(&new(state.clone())), &state);
    let json = serde_json::to_string(&state).unwrap();
    prop_assert_eq!(serde_json::from_str::<S>(&json).unwrap(), state);
    Ok(())
}

fn check_ioapic(device: &IoApic, byte: u8) {
    let pin = usize::from(byte) % (ioapic::PINS + 1);
    match byte % 3 {
        0 => device.pulse(pin),
        1 => device.set_level(pin, byte & 0x80 != 0),
        _ => device.end_of_interrupt(byte),
    }
}

proptest! {
    #[test]
    fn every_device_survives_any_access_and_is_restored(steps in steps()) {
        check(serial, Serial::save, |d, b| { d.input(&vec![b; b.into()]); }, &steps)?;
        check(i8042, I8042::save, |d, _| { d.ctrl_alt_del(); }, &steps)?;
        check(cmos, Cmos::save, |_, _| (), &steps)?;
        check(power, Power::save, |d, _| d.press_power_button(), &steps)?;
        check(ioapic, IoApic::save, check_ioapic, &steps)?;
        check(watchdog, Watchdog::save, check_watchdog, &steps)?;
        for step in &steps {
            for device in [&PvPanic as &dyn BusDevice, &DebugExit] {
                match step {
                    Step::Read(offset, width) => device.read(*offset, &mut vec![0xff; *width]),
                    Step::Write(offset, data) => {
                        let _ = device.write(*offset, data);
                    }
                    Step::Host(_) => {}
                }
            }
        }
    }

    #[test]
    fn a_garbage_state_is_refused_or_survived(
        bytes in prop::collection::vec(any::<u8>(), 0..100),
        table in any::<[u64; ioapic::PINS]>(),
        steps in steps(),
    ) {
        let byte = |i: usize| bytes.get(i).copied().unwrap_or(0xff);
        let mut keys = I8042State {
            mode: byte(0),
            pending: Some(byte(1)),
            ..I8042State::default()
        };
        keys.keyboard.pending = Some(byte(2));
        keys.keyboard.replies.extend(&bytes);
        keys.keyboard.scancodes.extend(&bytes);
        let mut clock = CmosState { index: byte(3), ..CmosState::default() };
        clock.registers = [[byte(4); 32]; 4];
        let apic = IoApicState { id: byte(5), index: byte(6), redirection: table, ..IoApicState::default() };
        let uart = SerialState {
            line_control: byte(7),
            modem_control: byte(8),
            interrupt_identification: byte(9),
            input: bytes.clone(),
            ..SerialState::default()
        };
        let sink = Box::new(std::io::sink());
        let uart = Serial::new(line(), sink, Box::new(|| ()), uart);
        prop_assert_eq!(uart.is_ok(), bytes.len() <= serial::FIFO_SIZE);
        let (keys, clock, apic) = (i8042(keys), cmos(clock), ioapic(apic));
        let mut devices: Vec<&dyn BusDevice> = vec![&keys, &clock, &apic];
        devices.extend(uart.iter().map(|u| u as &dyn BusDevice));
        for device in devices {
            for step in &steps {
                match step {
                    Step::Read(offset, width) => device.read(*offset, &mut vec![0xff; *width]),
                    Step::Write(offset, data) => {
                        let _ = device.write(*offset, data);
                    }
                    Step::Host(_) => {}
                }
            }
        }
    }
}

/// Calls the device back from its own interrupt, which hangs if a lock is still held.
#[derive(Default)]
struct Reenter {
    calls: AtomicUsize,
    device: std::sync::OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Interrupt for Reenter {
    fn signal(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if let Some(call) = self.device.get() {
            call();
        }
    }
}

#[test]
fn interrupts_are_raised_with_no_lock_held() {
    let line = Arc::new(Reenter::default());
    let power = Arc::new(Power::new(line.clone(), PowerState::default()));
    let called = power.clone();
    let _ = line.device.set(Box::new(move || {
        called.save();
    }));
    power.press_power_button();

    let keys_line = Arc::new(Reenter::default());
    let keys = Arc::new(I8042::new(keys_line.clone(), I8042State::default()));
    let called = keys.clone();
    let _ = keys_line.device.set(Box::new(move || {
        called.save();
    }));
    let _ = keys.write(4, &[0x60]);
    let _ = keys.write(0, &[0x45]);
    assert!(keys.ctrl_alt_del());
    let calls = |line: &Reenter| line.calls.load(Ordering::SeqCst);
    assert_eq!((calls(&line), calls(&keys_line)), (1, 1));
}

#[test]
fn the_documented_ranges_of_a_pc_fit_together() {
    let mut ports = Bus::new();
    for (base, len, device) in [
        (
            i8042::PORT,
            i8042::LEN,
            Arc::new(i8042(Default::default())) as Arc<dyn BusDevice>,
        ),
        (rtc::PORT, rtc::LEN, Arc::new(cmos(Default::default()))),
        (0x3f8, serial::LEN, Arc::new(serial(Default::default()))),
        (0x2f8, serial::LEN, Arc::new(serial(Default::default()))),
        (crate::legacy::pvpanic::PORT, 1, Arc::new(PvPanic)),
        (0x600, power::LEN, Arc::new(power(Default::default()))),
        (0x610, watchdog::LEN, Arc::new(watchdog(Default::default()))),
        (0xf4, 1, Arc::new(DebugExit)),
    ] {
        ports.insert(base, len, device).unwrap();
    }
    let mut mode = [0];
    let _ = ports.write(0x64, &[0x20]);
    assert!(ports.read(0x60, &mut mode));
    assert_eq!(mode[0] & 0x40, 0x40);
}
