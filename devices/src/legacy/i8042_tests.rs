use super::*;
use crate::irq::mock::Counter;

struct Guest {
    device: I8042,
    interrupt: Arc<Counter>,
}

impl Guest {
    fn new() -> Self {
        let interrupt = Arc::new(Counter::default());
        let device = I8042::new(interrupt.clone(), I8042State::default());
        Self { device, interrupt }
    }

    fn read(&self, offset: u64) -> u8 {
        let mut data = [0];
        self.device.read(offset, &mut data);
        data[0]
    }

    fn command(&self, command: u8) {
        assert_eq!(self.device.write(COMMAND, &[command]), Effect::None);
    }

    fn data(&self, value: u8) {
        assert_eq!(self.device.write(DATA, &[value]), Effect::None);
    }

    /// All bytes that can be read, as Linux's i8042_flush does.
    fn drain(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(COMMAND) & STATUS_OUTPUT_FULL != 0 {
            bytes.push(self.read(DATA));
            assert!(bytes.len() < 16, "Linux takes this for no controller");
        }
        bytes
    }

    fn ask(&self, value: u8) -> Vec<u8> {
        self.data(value);
        self.drain()
    }

    fn mode(&self) -> u8 {
        self.command(0x20);
        assert_eq!(self.read(COMMAND) & 1, 1);
        self.read(DATA)
    }

    /// Linux's i8042_enable_kbd_port.
    fn enable_keyboard(&self) {
        let mode = self.mode();
        self.command(0x60);
        self.data((mode & !MODE_KEYBOARD_OFF) | MODE_KEYBOARD_INTERRUPT);
    }
}

#[test]
fn system_control_port_b_knows_no_reason_for_an_nmi() {
    let controller = I8042::new(Arc::new(Counter::default()), I8042State::default());
    assert_eq!(controller.write(1, &[0xff]), Effect::None);
    let mut value = [0xff; 2];
    controller.read(1, &mut value);
    assert_eq!(value, [0x20, 0xff]);
}

#[test]
fn linux_i8042_probe() {
    let guest = Guest::new();
    assert_eq!(guest.drain(), [] as [u8; 0]);
    guest.command(0xaa);
    assert_eq!(guest.drain(), [0x55]);
    // i8042_controller_init: the mode is read until it is the same twice; translation is on, the
    // key lock is open.
    let mode = guest.mode();
    assert_eq!(mode, guest.mode());
    assert_ne!(mode & MODE_TRANSLATE, 0);
    assert_ne!(guest.read(COMMAND) & STATUS_UNLOCKED, 0);
    guest.command(0x60);
    guest.data((mode | MODE_KEYBOARD_OFF) & !MODE_KEYBOARD_INTERRUPT);
    assert_eq!(guest.mode(), (mode | MODE_KEYBOARD_OFF) & !1);
    assert_eq!(guest.interrupt.take(), 0);
}

#[test]
fn linux_finds_no_mouse() {
    let guest = Guest::new();
    // i8042_check_aux: loopback answers from the mouse port, but wrongly; then the test fails.
    guest.command(0xd3);
    guest.data(0x5a);
    assert_ne!(guest.read(COMMAND) & STATUS_AUX_DATA, 0);
    assert_ne!(guest.read(DATA), 0x5a);
    guest.command(0xa9);
    let test = guest.read(DATA);
    assert!(![0, 0xfa, 0xff].contains(&test));
    guest.command(0xa8);
    assert_ne!(guest.mode() & MODE_AUX_OFF, 0);
    assert_eq!(guest.drain(), [] as [u8; 0]);
}

#[test]
fn linux_atkbd_binds_and_leaves() {
    let guest = Guest::new();
    guest.enable_keyboard();
    assert_eq!(guest.interrupt.take(), 0);
    guest.data(0xf2);
    for expected in [0xfa, 0xab, 0x41] {
        assert_eq!(guest.interrupt.take(), 1, "one edge for each byte");
        assert_eq!(guest.read(DATA), expected);
    }
    assert_eq!(guest.interrupt.take(), 0);
    for (value, expected) in [
        (0xed, vec![0xfa]),
        (0x02, vec![0xfa]),
        (0xf3, vec![0xfa]),
        (0x00, vec![0xfa]),
        (0xf4, vec![0xfa]),
        (0xf0, vec![0xfa]),
        (0x00, vec![0xfa, 0x41]),
        (0xf0, vec![0xfa]),
        (0x03, vec![0xfe]),
        (0xea, vec![0xfe]),
        (0xee, vec![0xee]),
        (0xf5, vec![0xfa]),
        (0xf6, vec![0xfa]),
        (0xff, vec![0xfa, 0xaa]),
    ] {
        assert_eq!(guest.ask(value), expected, "{value:#x}");
    }
    assert_eq!(guest.device.save().keyboard, KeyboardState::default());
}

#[test]
fn a_command_in_place_of_an_argument_is_a_command() {
    let guest = Guest::new();
    assert_eq!(guest.ask(0xed), [0xfa]);
    assert_eq!(guest.ask(0xf4), [0xfa]);
    assert_eq!(guest.ask(0x01), [0xfe]);
}

#[test]
fn ctrl_alt_del_needs_a_listener() {
    let guest = Guest::new();
    assert!(!guest.device.ctrl_alt_del());
    guest.enable_keyboard();
    assert_eq!(guest.ask(0xf5), [0xfa]);
    assert!(!guest.device.ctrl_alt_del());
    assert_eq!(guest.ask(0xf4), [0xfa]);
    guest.interrupt.take();
    assert!(guest.device.ctrl_alt_del());
    assert_eq!(guest.interrupt.take(), 1);
    let keys = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
    assert_eq!(guest.drain(), keys);
    assert_eq!(guest.interrupt.take(), 7);
}

#[test]
fn ctrl_alt_del_untranslated_and_bounded() {
    let guest = Guest::new();
    guest.command(0x60);
    guest.data(MODE_KEYBOARD_INTERRUPT);
    assert!(guest.device.ctrl_alt_del());
    while guest.device.ctrl_alt_del() {}
    let keys = [
        0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
    ];
    assert_eq!(guest.drain(), keys);
    assert_eq!(guest.ask(0xf2), [0xfa, 0xab, 0x83]);
}

#[test]
fn a_reply_goes_before_keys() {
    let guest = Guest::new();
    guest.enable_keyboard();
    assert!(guest.device.ctrl_alt_del());
    guest.data(0xed);
    let bytes = guest.drain();
    assert_eq!(bytes[..3], [0x1d, 0xfa, 0x38]);
}

#[test]
fn keys_wait_while_the_interface_is_off() {
    let guest = Guest::new();
    guest.enable_keyboard();
    guest.device.ctrl_alt_del();
    guest.command(0xad);
    assert_eq!(guest.drain(), [0x1d], "only what was in the output buffer");
    guest.command(0xae);
    assert_eq!(guest.drain().len(), 7);
}

#[test]
fn enabling_the_interrupt_with_a_full_buffer_raises_it() {
    let guest = Guest::new();
    guest.data(0xf4);
    assert_eq!(guest.interrupt.take(), 0);
    guest.command(0x60);
    guest.data(MODE_KEYBOARD_INTERRUPT | MODE_TRANSLATE);
    assert_eq!(guest.interrupt.take(), 1);
}

#[test]
fn all_ways_to_reset() {
    let reset = Effect::Exit(ExitReason::Reset);
    let guest = Guest::new();
    for command in 0xf0..=0xff {
        let effect = guest.device.write(COMMAND, &[command]);
        assert_eq!(effect == reset, command % 2 == 0, "{command:#x}");
    }
    guest.command(0xd0);
    assert_eq!(guest.drain(), [3]);
    guest.command(0xd1);
    assert_eq!(guest.device.write(DATA, &[2]), reset);
    guest.command(0xd1);
    guest.data(1);
    guest.command(0xd0);
    assert_eq!(guest.drain(), [1]);
    let _ = guest.device.write(2, &[1]);
    let counted = guest.device.counters();
    // Eight pulses and the output port.
    for figure in [
        ("reset_count", 9),
        ("missed_write_count", 1),
        ("write_count", 22),
    ] {
        assert!(counted.contains(&figure), "{figure:?} in {counted:?}");
    }
}

#[test]
fn controller_replies_are_bounded() {
    let guest = Guest::new();
    for _ in 0..100 {
        guest.command(0x20);
        guest.data(0xff);
    }
    let state = guest.device.save();
    assert_eq!(state.replies.len(), MAX_REPLIES);
    assert_eq!(state.keyboard.replies.len(), 2);
    assert_eq!(guest.drain().len(), 1 + MAX_REPLIES + 2);
}
