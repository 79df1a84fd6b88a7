use std::sync::Arc;

use super::*;
use crate::bus::BusDevice;

struct Nobody;

impl PciFunction for Nobody {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write_config(&self, _: u16, _: &[u8]) {}
}

#[test]
fn a_bus_has_31_free_slots() {
    let bus = PciBus::new();
    assert_eq!(
        bus.insert(0, Arc::new(Nobody)),
        Err(PciError::Slot { slot: 0 })
    );
    assert_eq!(
        bus.insert(32, Arc::new(Nobody)),
        Err(PciError::Slot { slot: 32 })
    );
    bus.insert(5, Arc::new(Nobody)).unwrap();
    let slots: Vec<_> = std::iter::from_fn(|| {
        let slot = bus.free().ok()?;
        bus.insert(slot, Arc::new(Nobody)).ok()?;
        Some(slot)
    })
    .collect();
    assert_eq!(slots.len(), 30);
    assert!(!slots.contains(&5));
    assert_eq!(bus.free(), Err(PciError::Full));
    let taken = bus.remove(7).unwrap();
    assert_eq!(bus.free(), Ok(7));
    assert!(!bus.holds(7, &taken));
    bus.insert(7, taken.clone()).unwrap();
    assert!(bus.holds(7, &taken) && !bus.holds(6, &taken));
    // Odd accesses see nothing.
    let ecam = Ecam(Arc::new(bus));
    for (offset, len, expected) in [(0x8004, 4, 4), (0x8001, 2, 0xff), (0x8000, 8, 0xff)] {
        let mut data = vec![0; len];
        ecam.read(offset, &mut data);
        assert_eq!(data, vec![expected; len]);
    }
}

#[test]
fn only_writable_bits_are_written() {
    let mut config = config::PciConfig::new(config::Ids {
        vendor: 1,
        device: 2,
        revision: 3,
        class: 0x04_0506,
        subsystem_vendor: 7,
        subsystem: 8,
    });
    assert_eq!(
        config.add_capability(9, &[1, 2, 3, 4], &[0, 0x0f]),
        Some(0x40)
    );
    assert_eq!(config.add_capability(9, &[0; 255], &[]), None, "no room");
    assert_eq!(config.add_capability(0x11, &[5], &[0xff]), Some(0x48));
    let mut before = [0; 256];
    config.read(0, &mut before);
    config.write(0, &[0xff; 300]);
    let mut after = [0; 256];
    config.read(0, &mut after);
    let changed: Vec<_> = (0..256).filter(|i| before[*i] != after[*i]).collect();
    assert_eq!(changed, [4, 5, 0x43, 0x4a]);
    assert_eq!(
        [after[4], after[5], after[0x43], after[0x4a]],
        [6, 4, 0x0f, 0xff]
    );
    assert_eq!(config.bar(0), None);
}
