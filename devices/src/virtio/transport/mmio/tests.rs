use virtio_bindings::virtio_mmio::*;

use super::*;

#[test]
fn offsets_are_those_of_the_header() {
    let expected = [
        (Reg::DeviceId, VIRTIO_MMIO_DEVICE_ID),
        (Reg::DeviceFeatures, VIRTIO_MMIO_DEVICE_FEATURES),
        (Reg::DeviceFeaturesSel, VIRTIO_MMIO_DEVICE_FEATURES_SEL),
        (Reg::DriverFeatures, VIRTIO_MMIO_DRIVER_FEATURES),
        (Reg::DriverFeaturesSel, VIRTIO_MMIO_DRIVER_FEATURES_SEL),
        (Reg::QueueSel, VIRTIO_MMIO_QUEUE_SEL),
        (Reg::QueueSizeMax, VIRTIO_MMIO_QUEUE_NUM_MAX),
        (Reg::QueueSize, VIRTIO_MMIO_QUEUE_NUM),
        (Reg::QueueReady, VIRTIO_MMIO_QUEUE_READY),
        (Reg::QueueNotify, VIRTIO_MMIO_QUEUE_NOTIFY),
        (Reg::InterruptStatus, VIRTIO_MMIO_INTERRUPT_STATUS),
        (Reg::InterruptAck, VIRTIO_MMIO_INTERRUPT_ACK),
        (Reg::Status, VIRTIO_MMIO_STATUS),
        (
            Reg::QueueAddr(Ring::Desc, Half::Low),
            VIRTIO_MMIO_QUEUE_DESC_LOW,
        ),
        (
            Reg::QueueAddr(Ring::Desc, Half::High),
            VIRTIO_MMIO_QUEUE_DESC_HIGH,
        ),
        (
            Reg::QueueAddr(Ring::Avail, Half::Low),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        ),
        (
            Reg::QueueAddr(Ring::Avail, Half::High),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        ),
        (
            Reg::QueueAddr(Ring::Used, Half::Low),
            VIRTIO_MMIO_QUEUE_USED_LOW,
        ),
        (
            Reg::QueueAddr(Ring::Used, Half::High),
            VIRTIO_MMIO_QUEUE_USED_HIGH,
        ),
        (Reg::ShmSel, VIRTIO_MMIO_SHM_SEL),
        (Reg::ShmLen(Half::Low), VIRTIO_MMIO_SHM_LEN_LOW),
        (Reg::ShmLen(Half::High), VIRTIO_MMIO_SHM_LEN_HIGH),
        (Reg::ShmBase(Half::Low), VIRTIO_MMIO_SHM_BASE_LOW),
        (Reg::ShmBase(Half::High), VIRTIO_MMIO_SHM_BASE_HIGH),
        (Reg::ConfigGeneration, VIRTIO_MMIO_CONFIG_GENERATION),
    ];
    for (reg, at) in expected {
        assert_eq!(offset(reg), Some(at.into()), "{reg:?}");
    }
    // All of them, and the three constants.
    assert_eq!(TABLE.len(), expected.len() + 3);
    for (at, cell) in &TABLE {
        match u32::try_from(*at).unwrap() {
            VIRTIO_MMIO_MAGIC_VALUE => assert!(matches!(cell, Cell::Fixed(0x7472_6976))),
            VIRTIO_MMIO_VERSION => assert!(matches!(cell, Cell::Fixed(2))),
            VIRTIO_MMIO_VENDOR_ID => assert!(matches!(cell, Cell::Fixed(_))),
            _ => assert!(matches!(cell, Cell::Core(_))),
        }
    }
    assert_eq!(CONFIG, u64::from(VIRTIO_MMIO_CONFIG));
}
