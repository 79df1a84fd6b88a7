//! Names of the registers that both transports have.

/// Half of a 64-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

impl Half {
    /// This half of `value`.
    pub fn of(self, value: u64) -> u32 {
        match self {
            Self::Low => value as u32,
            Self::High => (value >> 32) as u32,
        }
    }

    /// Replaces this half of `value`.
    pub fn set(self, value: &mut u64, half: u32) {
        *value = match self {
            Self::Low => *value & !0xffff_ffff | u64::from(half),
            Self::High => *value & 0xffff_ffff | u64::from(half) << 32,
        };
    }
}

/// One of the three parts of a split queue (section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ring {
    /// Descriptor table.
    Desc,
    /// Available ring, the driver area.
    Avail,
    /// Used ring, the device area.
    Used,
}

/// A register of the core. Reads and writes are 32 bits wide; narrower registers of a transport
/// take the low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reg {
    /// Device ID, read-only.
    DeviceId,
    /// The selected 32 feature bits that the device offers, read-only.
    DeviceFeatures,
    /// Selects for `DeviceFeatures`.
    DeviceFeaturesSel,
    /// The selected 32 feature bits that the driver accepts.
    DriverFeatures,
    /// Selects for `DriverFeatures`.
    DriverFeaturesSel,
    /// Number of queues, read-only.
    NumQueues,
    /// Selects for the queue registers below.
    QueueSel,
    /// Largest size of the selected queue, 0 where there is none. Read-only.
    QueueSizeMax,
    /// Size of the selected queue.
    QueueSize,
    /// 1 when the selected queue is set up; only ever set by the driver.
    QueueReady,
    /// Half of an address of the selected queue.
    QueueAddr(Ring, Half),
    /// The driver kicks the queue written here. Write-only.
    QueueNotify,
    /// ISR status, read-only.
    InterruptStatus,
    /// Clears bits of the ISR status. Write-only.
    InterruptAck,
    /// Device status (section 2.1); 0 resets.
    Status,
    /// Generation of the configuration space, read-only.
    ConfigGeneration,
    /// Selects for the shared memory registers.
    ShmSel,
    /// Half of the selected region's length, all ones where there is none. Read-only.
    ShmLen(Half),
    /// Half of the selected region's address, all ones where there is none. Read-only.
    ShmBase(Half),
}
