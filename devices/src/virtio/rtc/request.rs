//! Requests and responses of the clock device as bytes (virtio 1.4, "RTC Device / Device
//! Operation").

/// Bytes of the header of requests and of responses.
const HEADER: u64 = 8;

const READ: u16 = 0x0001;
const READ_CROSS: u16 = 0x0002;
const CFG: u16 = 0x1000;
const CLOCK_CAP: u16 = 0x1001;
const CROSS_CAP: u16 = 0x1002;

/// `VIRTIO_RTC_COUNTER_*` that the specification knows: Arm's and x86's; its invalid one.
const COUNTERS: [u8; 2] = [0, 1];
const INVALID_COUNTER: u8 = 0xff;

/// `status` of a request that was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// Not known, or not possible here.
    NotSupported = 2,
    /// `clock_id` is no clock.
    NoClock = 3,
    /// Against the specification, or too short.
    Invalid = 4,
    /// The host failed.
    Io = 5,
}

impl Failure {
    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER as usize];
        if let Some(status) = bytes.first_mut() {
            *status = self as u8;
        }
        bytes
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Cfg,
    ClockCap { clock: u16 },
    CrossCap { clock: u16, counter: u8 },
    Read { clock: u16 },
    ReadCross { clock: u16, counter: u8 },
}

impl Request {
    /// Bytes of the longest request.
    pub const MAX: usize = 16;

    /// Reads a request of which there are `bytes`, and `room` for the response.
    pub fn parse(bytes: &[u8], room: u64) -> Result<Self, Failure> {
        let (&[a, b, ref reserved @ ..], body) = header(bytes)?;
        let kind = u16::from_le_bytes([a, b]);
        // With the header's, what has to be zero, and what the response needs.
        let (request, response) = match kind {
            CFG => (0, 16),
            CLOCK_CAP | CROSS_CAP | READ => (8, 16),
            READ_CROSS => (8, 24),
            _ => return Err(Failure::NotSupported),
        };
        let body = body.get(..request).ok_or(Failure::Invalid)?;
        if room < response || reserved.iter().any(|byte| *byte != 0) {
            return Err(Failure::Invalid);
        }
        let &[c, d, counter, ref reserved @ ..] = body else {
            return Ok(Self::Cfg);
        };
        let clock = u16::from_le_bytes([c, d]);
        let crosses = matches!(kind, CROSS_CAP | READ_CROSS);
        if !crosses && counter != 0 || reserved.iter().any(|byte| *byte != 0) {
            return Err(Failure::Invalid);
        }
        if crosses && counter == INVALID_COUNTER {
            return Err(Failure::Invalid);
        }
        if crosses && !COUNTERS.contains(&counter) {
            return Err(Failure::NotSupported);
        }
        Ok(match kind {
            CLOCK_CAP => Self::ClockCap { clock },
            CROSS_CAP => Self::CrossCap { clock, counter },
            READ => Self::Read { clock },
            _ => Self::ReadCross { clock, counter },
        })
    }
}

fn header(bytes: &[u8]) -> Result<(&[u8; HEADER as usize], &[u8]), Failure> {
    bytes.split_first_chunk().ok_or(Failure::Invalid)
}

/// The response to a request that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Cfg {
        clocks: u16,
    },
    ClockCap {
        kind: u8,
        smearing: u8,
    },
    CrossCap {
        supported: bool,
    },
    /// Nanoseconds.
    Read {
        reading: u64,
    },
    /// Nanoseconds, and the guest's counter then.
    ReadCross {
        reading: u64,
        cycles: u64,
    },
}

impl Response {
    /// With the header, whose status is `VIRTIO_RTC_S_OK`.
    pub fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER as usize];
        match self {
            Self::Cfg { clocks } => bytes.extend(u64::from(clocks).to_le_bytes()),
            Self::ClockCap { kind, smearing } => bytes.extend([kind, smearing, 0, 0, 0, 0, 0, 0]),
            Self::CrossCap { supported } => bytes.extend(u64::from(supported).to_le_bytes()),
            Self::Read { reading } => bytes.extend(reading.to_le_bytes()),
            Self::ReadCross { reading, cycles } => {
                bytes.extend([reading, cycles].map(u64::to_le_bytes).as_flattened());
            }
        }
        bytes
    }
}
