use std::io;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::irq::mock::Counter;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Fixture {
    serial: Serial,
    interrupt: Arc<Counter>,
    drained: Arc<AtomicUsize>,
    out: Sink,
}

impl Fixture {
    fn new() -> Self {
        let interrupt = Arc::new(Counter::default());
        let drained = Arc::new(AtomicUsize::default());
        let out = Sink::default();
        let count = drained.clone();
        let serial = Serial::new(
            interrupt.clone(),
            Box::new(out.clone()),
            Box::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            }),
            SerialState::default(),
        )
        .unwrap();
        Self {
            serial,
            interrupt,
            drained,
            out,
        }
    }

    fn listening() -> Self {
        let f = Self::new();
        f.write(IER, IER_RECEIVED);
        f
    }

    fn read(&self, register: u8) -> u8 {
        let mut data = [0xff];
        self.serial.read(register.into(), &mut data);
        data[0]
    }

    fn write(&self, register: u8, value: u8) {
        assert_eq!(self.serial.write(register.into(), &[value]), Effect::None);
    }

    fn drained(&self) -> usize {
        self.drained.swap(0, Ordering::SeqCst)
    }
}

#[test]
fn output_reaches_the_host() {
    let f = Fixture::new();
    for byte in b"hello" {
        f.write(0, *byte);
    }
    assert_eq!(*f.out.0.lock().unwrap(), b"hello");
    assert_eq!(f.read(LSR), 0x60);
}

#[test]
fn refused_output_is_counted_and_not_shown() {
    let serial = Serial::new(
        Arc::new(Counter::default()),
        Box::new(Broken),
        Box::new(|| ()),
        SerialState::default(),
    )
    .unwrap();
    assert_eq!(serial.write(0, b"a"), Effect::None);
    assert_eq!(serial.write(0, b"b"), Effect::None);
    assert_eq!(serial.lost_output(), 2);
    let mut status = [0];
    serial.read(LSR.into(), &mut status);
    assert_eq!(status, [0x60]);
}

#[test]
fn all_input_arrives_in_order_however_long() {
    let f = Fixture::listening();
    let input: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
    let mut sent = f.serial.input(&input);
    assert_eq!(sent, FIFO_SIZE);
    assert_eq!(f.serial.input(&input[sent..]), 0);
    assert_eq!(f.interrupt.take(), 1);
    let mut got = Vec::new();
    while f.read(LSR) & 1 != 0 {
        got.push(f.read(0));
        if f.drained() == 1 {
            assert_eq!(f.read(LSR) & 1, 0);
            sent += f.serial.input(&input[sent..]);
        }
    }
    assert_eq!(got, input);
}

#[test]
fn drained_is_only_called_for_a_waiting_host() {
    let f = Fixture::listening();
    assert_eq!(f.serial.input(b"ab"), 2);
    f.read(0);
    f.read(0);
    f.read(0);
    assert_eq!(f.drained(), 0);
}

#[test]
fn input_before_the_guest_listens_is_kept_by_the_host() {
    let f = Fixture::new();
    assert_eq!(f.serial.input(b"abc"), 0);
    // What Linux does when it opens a port: clear the FIFO, read every status, then enable.
    f.write(2, 7);
    for register in [LSR, 0, 2, 6] {
        f.read(register);
    }
    assert_eq!(f.drained(), 0);
    f.write(IER, 5);
    assert_eq!(f.drained(), 1);
    assert_eq!(f.serial.input(b"abc"), 3);
    assert_eq!(f.read(0), b'a');
}

#[test]
fn a_polling_guest_gets_input_without_interrupts() {
    let f = Fixture::new();
    assert_eq!(f.serial.input(b"abc"), 0);
    for _ in 0..POLLING {
        assert_eq!(f.read(LSR) & 1, 0);
    }
    assert_eq!(f.drained(), 1);
    assert_eq!(f.serial.input(b"abc"), 3);
    for byte in b"abc" {
        assert_eq!(f.read(LSR) & 1, 1);
        assert_eq!(f.read(0), *byte);
    }
    assert_eq!(f.serial.input(b"d"), 1);
    assert_eq!(f.interrupt.take(), 0);
    f.write(IER, 0);
    assert_eq!(f.serial.input(b"e"), 0, "a driver sets the port up");
}

#[test]
fn loopback_returns_output_and_holds_input_back() {
    let f = Fixture::listening();
    f.write(MCR, MCR_LOOP);
    assert_eq!(f.serial.input(b"x"), 0);
    f.write(0, b'!');
    assert_eq!(f.read(0), b'!');
    assert_eq!(f.drained(), 0);
    assert!(f.out.0.lock().unwrap().is_empty());
    f.write(MCR, 0);
    assert_eq!(f.drained(), 1);
    assert_eq!(f.serial.input(b"x"), 1);
}

#[test]
fn wide_accesses_touch_each_register() {
    let f = Fixture::new();
    assert_eq!(f.serial.write(LCR.into(), &[3, 0x0b]), Effect::None);
    let mut data = [0xff; 8];
    f.serial.read(3, &mut data);
    assert_eq!(data[..2], [3, 0x0b]);
    assert_eq!(data[5..], [0xff; 3]);
    assert_eq!(f.serial.write(u64::MAX - 1, &[1]), Effect::None);
}

#[test]
fn state_with_too_much_input_is_refused() {
    let state = SerialState {
        input: vec![0; 65],
        ..SerialState::default()
    };
    let error = Serial::new(
        Arc::new(Counter::default()),
        Box::new(io::sink()),
        Box::new(|| ()),
        state,
    )
    .err();
    assert_eq!(error, Some(SerialError::InputTooLong { len: 65 }));
}

#[test]
fn unread_input_survives_a_restore() {
    let f = Fixture::listening();
    f.serial.input(b"late");
    let state = f.serial.save();
    let again = Fixture::new();
    let serial = Serial::new(
        again.interrupt.clone(),
        Box::new(io::sink()),
        Box::new(|| ()),
        state.clone(),
    )
    .unwrap();
    assert_eq!(serial.save(), state);
    // Its interrupt is with the interrupt controller, and saved there.
    assert_eq!(again.interrupt.take(), 0);
    for letter in b"late" {
        let mut byte = [0];
        serial.read(0, &mut byte);
        assert_eq!(byte, [*letter]);
    }
    serial.input(b"r");
    assert_eq!(again.interrupt.take(), 1);
}
