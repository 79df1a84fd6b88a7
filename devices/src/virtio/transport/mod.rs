//! The two ways a virtio device appears on a bus. Each is a table of offsets over the core.

pub mod mmio;
pub mod pci;

use vmm_sys_util::eventfd::EventFd;

/// A write that kicks a queue: the root crate registers `fd` as ioeventfd for it. Where it does
/// not, the transport writes to `fd` itself.
#[derive(Debug)]
pub struct Kick<'a> {
    /// Offset of the write in the transport's range.
    pub offset: u64,
    /// The value written, 32 bits wide; `None` for any write of any width.
    pub data: Option<u32>,
    /// To be written.
    pub fd: &'a EventFd,
}
