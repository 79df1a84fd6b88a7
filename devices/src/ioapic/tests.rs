use super::*;

#[derive(Default)]
struct Sent {
    messages: Mutex<Vec<(u64, u32)>>,
    routes: Mutex<Vec<(usize, MsiMessage)>>,
}

impl Sent {
    fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.messages.lock().unwrap())
    }
}

impl MsiSink for Sent {
    fn send(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }
    fn route_changed(&self, pin: usize, message: MsiMessage) {
        self.routes.lock().unwrap().push((pin, message));
    }
}

fn ioapic() -> (Arc<IoApic>, Arc<Sent>) {
    let sent = Arc::new(Sent::default());
    let ioapic = IoApic::new(sent.clone(), IoApicState::default());
    (Arc::new(ioapic), sent)
}

fn read(ioapic: &IoApic, index: u8) -> u32 {
    assert_eq!(
        ioapic.write(REGISTER_SELECT, &u32::from(index).to_le_bytes()),
        Effect::None
    );
    let mut data = [0xff; 4];
    ioapic.read(REGISTER_WINDOW, &mut data);
    u32::from_le_bytes(data)
}

fn write(ioapic: &IoApic, index: u8, value: u32) {
    let _ = ioapic.write(REGISTER_SELECT, &[index, 0, 0, 0]);
    let _ = ioapic.write(REGISTER_WINDOW, &value.to_le_bytes());
}

/// Writes an entry as Linux does: the high half first.
fn route(ioapic: &IoApic, pin: u8, entry: u64) {
    write(ioapic, 0x11 + 2 * pin, (entry >> 32) as u32);
    write(ioapic, 0x10 + 2 * pin, entry as u32);
}

const FIXED_31_TO_2: u64 = 2 << 56 | 0x31;

#[test]
fn identity_registers() {
    let (ioapic, _) = ioapic();
    assert_eq!(read(&ioapic, 1), 0x0017_0020);
    write(&ioapic, 1, u32::MAX);
    assert_eq!(read(&ioapic, 1), 0x0017_0020);
    write(&ioapic, 0, 0xff00_0000);
    assert_eq!(read(&ioapic, 0), 0x0f00_0000);
    assert_eq!(read(&ioapic, 2), 0x0f00_0000);
    assert_eq!(read(&ioapic, 3), u32::MAX);
    assert_eq!(read(&ioapic, 0x40), u32::MAX);
    for pin in 0..24 {
        assert_eq!(read(&ioapic, 0x10 + 2 * pin), 0x0001_0000);
        assert_eq!(read(&ioapic, 0x11 + 2 * pin), 0);
    }
}

#[test]
fn read_only_and_reserved_bits_stay() {
    let (ioapic, _) = ioapic();
    route(&ioapic, 5, u64::MAX);
    assert_eq!(read(&ioapic, 0x1a), 0x0001_afff);
    assert_eq!(read(&ioapic, 0x1b), 0xff00_0000);
}

#[test]
fn entries_become_messages() {
    let cases = [
        (FIXED_31_TO_2, 0xfee0_2000, 0x31),
        (FIXED_31_TO_2 | LOGICAL, 0xfee0_2004, 0x31),
        (FIXED_31_TO_2 | LOGICAL | 1 << 8, 0xfee0_200c, 0x131),
        (0xff << 56 | 4 << 8, 0xfeef_f000, 0x400),
        (FIXED_31_TO_2 | LEVEL | 1 << 13, 0xfee0_2000, 0xc031),
    ];
    for (entry, address, data) in cases {
        let (ioapic, sent) = ioapic();
        route(&ioapic, 9, entry);
        ioapic.pulse(9);
        assert_eq!(sent.take(), [(address, data)], "{entry:#x}");
        let message = MsiMessage {
            address,
            data,
            masked: false,
        };
        assert_eq!(ioapic.redirection(9), Some(message));
        assert_eq!(ioapic.routes()[9], message);
        assert!(ioapic.routes()[8].masked);
        assert_eq!(*sent.routes.lock().unwrap().last().unwrap(), (9, message));
    }
}

#[test]
fn each_edge_is_one_message() {
    let (ioapic, sent) = ioapic();
    route(&ioapic, 4, FIXED_31_TO_2);
    let line = ioapic.line(4);
    line.signal();
    line.signal();
    assert_eq!(sent.take().len(), 2);
    ioapic.set_level(4, true);
    ioapic.set_level(4, true);
    assert_eq!(sent.take().len(), 1);
    ioapic.set_level(4, false);
    ioapic.set_level(4, true);
    assert_eq!(sent.take().len(), 1);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(sent.take(), []);
}

#[test]
fn edges_while_masked_are_delivered_once_on_unmask() {
    let (ioapic, sent) = ioapic();
    route(&ioapic, 4, FIXED_31_TO_2 | MASKED);
    ioapic.pulse(4);
    ioapic.pulse(4);
    assert_eq!(sent.take(), []);
    route(&ioapic, 4, FIXED_31_TO_2);
    assert_eq!(sent.take(), [(0xfee0_2000, 0x31)]);
    route(&ioapic, 4, FIXED_31_TO_2);
    assert_eq!(sent.take(), []);
}

#[test]
fn a_level_repeats_until_released() {
    let (ioapic, sent) = ioapic();
    route(&ioapic, 10, FIXED_31_TO_2 | LEVEL);
    ioapic.set_level(10, true);
    ioapic.set_level(10, true);
    assert_eq!(sent.take().len(), 1, "in service: not again");
    assert_eq!(read(&ioapic, 0x24) & REMOTE_IRR as u32, REMOTE_IRR as u32);
    ioapic.end_of_interrupt(0x30);
    assert_eq!(sent.take().len(), 0, "another vector");
    ioapic.end_of_interrupt(0x31);
    assert_eq!(sent.take().len(), 1, "still asserted");
    ioapic.set_level(10, false);
    let _ = ioapic.write(REGISTER_EOI, &[0x31, 0, 0, 0]);
    assert_eq!(sent.take().len(), 0);
    assert_eq!(read(&ioapic, 0x24) & REMOTE_IRR as u32, 0);
}

#[test]
fn a_level_while_masked_is_delivered_on_unmask_if_still_there() {
    let (ioapic, sent) = ioapic();
    route(&ioapic, 10, FIXED_31_TO_2 | LEVEL | MASKED);
    ioapic.set_level(10, true);
    ioapic.set_level(10, false);
    route(&ioapic, 10, FIXED_31_TO_2 | LEVEL);
    assert_eq!(sent.take().len(), 0);
    write(&ioapic, 0x24, 0x1_8031);
    ioapic.set_level(10, true);
    assert_eq!(sent.take().len(), 0);
    write(&ioapic, 0x24, 0x8031);
    assert_eq!(sent.take().len(), 1);
}

#[test]
fn pulses_on_a_level_pin_do_not_wait_for_the_end_of_the_interrupt() {
    let (ioapic, sent) = ioapic();
    route(&ioapic, 10, FIXED_31_TO_2 | LEVEL);
    for _ in 0..3 {
        ioapic.pulse(10);
        assert_eq!(sent.take(), [(0xfee0_2000, 0xc031)]);
        assert_eq!(read(&ioapic, 0x24) & REMOTE_IRR as u32, 0);
    }
    ioapic.end_of_interrupt(0x31);
    assert_eq!(sent.take().len(), 0);
}

#[test]
fn a_pulse_on_a_level_pin_in_service_is_kept() {
    let (ioapic, sent) = ioapic();
    route(&ioapic, 10, FIXED_31_TO_2 | LEVEL);
    ioapic.set_level(10, true);
    ioapic.set_level(10, false);
    ioapic.pulse(10);
    assert_eq!(sent.take().len(), 1);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(sent.take().len(), 1);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(sent.take().len(), 0);
}

#[test]
fn one_vector_ends_all_its_pins() {
    let (ioapic, sent) = ioapic();
    for pin in [10, 11] {
        route(&ioapic, pin, FIXED_31_TO_2 | LEVEL);
        ioapic.set_level(pin.into(), true);
    }
    assert_eq!(sent.take().len(), 2);
    ioapic.end_of_interrupt(0x31);
    assert_eq!(sent.take().len(), 2);
}

#[test]
fn switching_to_edge_and_back_drops_the_remote_irr() {
    let (ioapic, sent) = ioapic();
    route(&ioapic, 10, FIXED_31_TO_2 | LEVEL);
    ioapic.set_level(10, true);
    write(&ioapic, 0x24, 0x1_0031);
    assert_eq!(sent.take().len(), 1);
    write(&ioapic, 0x24, 0x8031);
    assert_eq!(sent.take().len(), 1);
}

#[test]
fn a_restored_one_continues_an_interrupt_in_service() {
    let (ioapic, _) = ioapic();
    route(&ioapic, 10, FIXED_31_TO_2 | LEVEL);
    ioapic.set_level(10, true);
    let sent = Arc::new(Sent::default());
    let restored = IoApic::new(sent.clone(), ioapic.save());
    assert_eq!(sent.take(), []);
    restored.end_of_interrupt(0x31);
    assert_eq!(sent.take().len(), 1);
}

#[test]
fn pins_that_do_not_exist_are_ignored() {
    let (ioapic, sent) = ioapic();
    ioapic.pulse(24);
    ioapic.set_level(usize::MAX, true);
    assert_eq!(ioapic.redirection(24), None);
    assert_eq!(ioapic.save(), IoApicState::default());
    assert_eq!(sent.take(), []);
}

#[test]
fn narrow_and_wide_accesses() {
    let (ioapic, _) = ioapic();
    let _ = ioapic.write(REGISTER_SELECT, &[1]);
    let mut data = [0xff; 8];
    ioapic.read(REGISTER_WINDOW, &mut data);
    assert_eq!(data, [0x20, 0, 0x17, 0, 0, 0, 0, 0]);
    let _ = ioapic.write(REGISTER_SELECT, &[0x10]);
    let _ = ioapic.write(REGISTER_WINDOW, &[0, 0]);
    assert_eq!(read(&ioapic, 0x10), MASKED as u32);
}
