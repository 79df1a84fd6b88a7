//! The only list of virtio devices: from a configuration and a saved state to a device.
//!
//! A new device is its module, an arm of [`DeviceConfig`] and one of [`DeviceState`].

use std::sync::Arc;

use super::balloon::{Balloon, BalloonError, BalloonHandle, BalloonOptions};
use super::block::{Block, BlockError, BlockHandle, BlockOptions, Disk};
use super::console::{Console, ConsoleError, ConsoleHandle, ConsoleOptions};
use super::device::{DeviceState, VirtioDevice};
use super::entropy::{Entropy, EntropyHandle, EntropyState};
use super::fs::{Fs, FsError, FsOptions, FsState};
use super::limiter::Limiter;
use super::mem::{Mem, MemError, MemHandle, MemOptions, MemState};
use super::net::{Net, NetError, NetHandle, NetOptions};
use super::pmem::{Pmem, PmemError, PmemHandle, PmemOptions};
use super::rtc::{Rtc, RtcHandle, RtcOptions};
use super::vhost_user::{VhostUserBlock, VhostUserHandle};
use super::vsock::{Vsock, VsockEnd, VsockError, VsockHandle};

/// What a device is made of, one arm per device type.
#[derive(Debug)]
pub enum DeviceConfig {
    /// Entropy source, with its limits.
    Entropy(Option<Arc<Limiter>>),
    /// Block device.
    Block(Disk, BlockOptions),
    /// Block device that another process serves.
    VhostUserBlock(Box<VhostUserBlock>, VhostUserHandle),
    /// Console device.
    Console(ConsoleOptions),
    /// Socket device.
    Vsock(VsockEnd),
    /// Shared directory.
    Fs(FsOptions),
    /// Clock device.
    Rtc(RtcOptions),
    /// Memory balloon.
    Balloon(BalloonOptions),
    /// Persistent memory.
    Pmem(PmemOptions),
    /// Memory device.
    Mem(MemOptions),
    /// Network device.
    Net(NetOptions),
}

impl DeviceConfig {
    /// The type of device in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Entropy(_) => "entropy",
            Self::Block(..) | Self::VhostUserBlock(..) => "block",
            Self::Console(_) => "console",
            Self::Vsock(_) => "vsock",
            Self::Fs(_) => "fs",
            Self::Rtc(_) => "clock",
            Self::Balloon(_) => "balloon",
            Self::Pmem(_) => "pmem",
            Self::Mem(_) => "mem",
            Self::Net(_) => "net",
        }
    }
}

/// What the VMM keeps of a device to command it, one arm per device type.
#[derive(Clone, Debug)]
pub enum DeviceHandle {
    /// What it has done.
    Entropy(EntropyHandle),
    /// Resizing and limits.
    Block(BlockHandle),
    /// The way to a new configuration, and figures.
    VhostUserBlock(VhostUserHandle),
    /// Sizes and ports.
    Console(ConsoleHandle),
    /// What it has done.
    Vsock(VsockHandle),
    /// Shared directories take no commands.
    Fs,
    /// The distance of the guest's counter.
    Rtc(RtcHandle),
    /// Target size, statistics and hints.
    Balloon(BalloonHandle),
    /// Limits, and what it has done.
    Pmem(PmemHandle),
    /// How much memory is to be plugged.
    Mem(MemHandle),
    /// Traffic and limits.
    Net(NetHandle),
}

/// A device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The saved state is of another type of device.
    #[error("the saved state of a virtio device is not that of {device}")]
    State {
        /// What is to be made.
        device: &'static str,
    },
    /// An entropy device.
    #[error("cannot create a timer for an entropy device")]
    Entropy(#[source] std::io::Error),
    /// A block device.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A console device.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A shared directory.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// A memory balloon.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// A memory device.
    #[error(transparent)]
    Mem(#[from] MemError),
    /// A network device.
    #[error(transparent)]
    Net(#[from] NetError),
}

/// Makes a device from its configuration and a saved state, or [`DeviceState::Reset`].
///
/// Table: an arm for each type of device.
pub fn build(
    config: DeviceConfig,
    state: &DeviceState,
) -> Result<(Box<dyn VirtioDevice>, DeviceHandle), BuildError> {
    match config {
        DeviceConfig::Entropy(limiter) => {
            let state = match state {
                DeviceState::Reset => EntropyState::default(),
                DeviceState::Entropy(state) => *state,
                _ => return Err(BuildError::State { device: "entropy" }),
            };
            let (entropy, handle) =
                Entropy::limited(limiter, state).map_err(BuildError::Entropy)?;
            Ok((Box::new(entropy), DeviceHandle::Entropy(handle)))
        }
        DeviceConfig::Block(disk, options) => {
            let state = match state {
                DeviceState::Reset => Default::default(),
                DeviceState::Block(state) => *state,
                _ => return Err(BuildError::State { device: "block" }),
            };
            let (block, handle) = Block::new(disk, options, state)?;
            Ok((Box::new(block), DeviceHandle::Block(handle)))
        }
        DeviceConfig::VhostUserBlock(block, handle) => match state {
            DeviceState::Reset => Ok((block, DeviceHandle::VhostUserBlock(handle))),
            _ => Err(BuildError::State {
                device: "a vhost-user block device",
            }),
        },
        DeviceConfig::Console(options) => {
            let state = match state {
                DeviceState::Reset => Default::default(),
                DeviceState::Console(state) => state.clone(),
                _ => return Err(BuildError::State { device: "console" }),
            };
            let (console, handle) = Console::new(options, state)?;
            Ok((Box::new(console), DeviceHandle::Console(handle)))
        }
        DeviceConfig::Vsock(end) => {
            let state = match state {
                DeviceState::Reset => Default::default(),
                DeviceState::Vsock(state) => *state,
                _ => return Err(BuildError::State { device: "vsock" }),
            };
            let vsock = Vsock::new(end, state)?;
            let handle = vsock.handle();
            Ok((Box::new(vsock), DeviceHandle::Vsock(handle)))
        }
        DeviceConfig::Fs(options) => {
            let fs = match state {
                DeviceState::Reset => Fs::new(options, &FsState::default())?,
                DeviceState::Fs(state) => Fs::new(options, state)?,
                _ => return Err(BuildError::State { device: "fs" }),
            };
            Ok((Box::new(fs), DeviceHandle::Fs))
        }
        DeviceConfig::Rtc(options) => {
            let state = match state {
                DeviceState::Reset => Default::default(),
                DeviceState::Rtc(state) => *state,
                _ => return Err(BuildError::State { device: "clock" }),
            };
            let (rtc, handle) = Rtc::new(options, state);
            Ok((Box::new(rtc), DeviceHandle::Rtc(handle)))
        }
        DeviceConfig::Balloon(options) => {
            let state = match state {
                DeviceState::Reset => Default::default(),
                DeviceState::Balloon(state) => *state,
                _ => return Err(BuildError::State { device: "balloon" }),
            };
            let (balloon, handle) = Balloon::new(options, state)?;
            Ok((Box::new(balloon), DeviceHandle::Balloon(handle)))
        }
        DeviceConfig::Pmem(options) => {
            let state = match state {
                DeviceState::Reset => Default::default(),
                DeviceState::Pmem(state) => *state,
                _ => return Err(BuildError::State { device: "pmem" }),
            };
            let (pmem, handle) = Pmem::new(options, state)?;
            Ok((Box::new(pmem), DeviceHandle::Pmem(handle)))
        }
        DeviceConfig::Mem(options) => {
            let (mem, handle) = match state {
                DeviceState::Reset => Mem::new(options, &MemState::default())?,
                DeviceState::Mem(state) => Mem::new(options, state)?,
                _ => return Err(BuildError::State { device: "mem" }),
            };
            Ok((Box::new(mem), DeviceHandle::Mem(handle)))
        }
        DeviceConfig::Net(options) => {
            let state = match state {
                DeviceState::Reset => Default::default(),
                DeviceState::Net(state) => *state,
                _ => return Err(BuildError::State { device: "net" }),
            };
            let (net, handle) = Net::new(options, state)?;
            Ok((Box::new(net), DeviceHandle::Net(handle)))
        }
    }
}
