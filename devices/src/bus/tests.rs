use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

/// Remembers what it was asked; answers each byte with its number.
struct Recorder {
    number: u8,
    seen: Mutex<Vec<(u64, usize)>>,
}

impl Recorder {
    fn new(number: u8) -> Arc<Self> {
        Arc::new(Self {
            number,
            seen: Mutex::default(),
        })
    }

    fn take(&self) -> Vec<(u64, usize)> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        assert!(data.iter().all(|b| *b == 0xff), "data comes as all ones");
        self.seen.lock().unwrap().push((offset, data.len()));
        data.fill(self.number);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        self.seen.lock().unwrap().push((offset, data.len()));
        Effect::Exit(ExitReason::DebugExit(self.number))
    }
}

#[test]
fn finds_the_device_and_hands_it_an_offset() {
    let mut bus = Bus::new();
    let device = Recorder::new(7);
    bus.insert(0x3f8, 8, device.clone()).unwrap();
    let mut data = [0; 4];
    assert!(bus.read(0x3fa, &mut data));
    assert_eq!(data, [7; 4]);
    assert_eq!(
        bus.write(0x3ff, &[1]),
        Some(Effect::Exit(ExitReason::DebugExit(7)))
    );
    assert_eq!(device.take(), [(2, 4), (7, 1)]);
    assert_eq!(bus.unclaimed(), 0);
}

#[test]
fn unclaimed_reads_are_all_ones_and_counted() {
    let mut bus = Bus::new();
    bus.insert(0x10, 4, Recorder::new(0)).unwrap();
    for (addr, width) in [(0x0f, 1), (0x14, 1), (0x13, 2), (0x0f, 8), (u64::MAX, 8)] {
        let mut data = vec![0; width];
        assert!(!bus.read(addr, &mut data), "{addr:#x}/{width}");
        assert_eq!(data, vec![0xff; width]);
        assert_eq!(bus.write(addr, &data), None);
    }
    assert_eq!(bus.unclaimed(), 10);
}

#[test]
fn widths_other_than_1_to_8_are_unclaimed() {
    let mut bus = Bus::new();
    bus.insert(0, 64, Recorder::new(0)).unwrap();
    assert!(!bus.read(0, &mut []));
    assert!(!bus.read(0, &mut [0; 9]));
    assert!(bus.read(0, &mut [0; 8]));
}

#[test]
fn refuses_empty_wrapping_and_overlapping_ranges() {
    let mut bus = Bus::new();
    let mut insert = |base, len| bus.insert(base, len, Recorder::new(0));
    assert_eq!(insert(1, 0), Err(BusError::Range { base: 1, len: 0 }));
    assert!(matches!(insert(u64::MAX, 2), Err(BusError::Range { .. })));
    insert(0x10, 0x10).unwrap();
    for (base, len) in [(0x10, 0x10), (0x1f, 1), (0x0f, 2), (0, 0x100), (0x14, 1)] {
        let error = insert(base, len).unwrap_err();
        assert_eq!(
            error,
            BusError::Overlap {
                base,
                len,
                other: 0x10
            }
        );
    }
    insert(0x20, 1).unwrap();
    insert(0x0f, 1).unwrap();
}

proptest! {
    #[test]
    fn agrees_with_a_linear_search(
        ranges in prop::collection::vec((0u64..200, 0u64..24), 0..12),
        accesses in prop::collection::vec((0u64..240, 1usize..=8), 0..64),
    ) {
        let mut bus = Bus::new();
        let mut model: Vec<(u64, u64, u8)> = Vec::new();
        for (number, (base, len)) in (0u8..).zip(ranges) {
            let free = model.iter().all(|(b, l, _)| base + len <= *b || b + l <= base);
            let ok = bus.insert(base, len, Recorder::new(number)).is_ok();
            prop_assert_eq!(ok, free && len > 0);
            if ok {
                model.push((base, len, number));
            }
        }
        let mut missed = 0;
        for (addr, width) in accesses {
            let expected = model
                .iter()
                .find(|(b, l, _)| *b <= addr && addr + width as u64 <= b + l)
                .map_or(0xff, |(_, _, n)| *n);
            let mut data = vec![0; width];
            let claimed = bus.read(addr, &mut data);
            prop_assert_eq!(claimed, expected != 0xff);
            prop_assert_eq!(data, vec![expected; width]);
            missed += u64::from(!claimed);
        }
        prop_assert_eq!(bus.unclaimed(), missed);
    }
}
