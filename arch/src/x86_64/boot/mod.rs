//! From a loaded kernel to a machine that can enter it: boot parameters in guest memory, and the
//! boot processor's first register state.
//!
//! Called once per boot by the thread that builds the machine, before any vCPU runs. Everything is
//! written to the addresses in [`layout`], below 1 MiB, where no kernel is loaded.

mod entry;
mod initrd;
mod linux;
mod pvh;
#[cfg(test)]
mod tests;

use linux_loader::configurator;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub use self::entry::{EntryState, apply};
pub use self::initrd::initrd_address;
use super::cmdline::{self, Cmdline, CmdlineError};
use super::kernel::{LoadedKernel, Protocol};
use super::layout;
use super::memory::GuestMemory;

/// Length of the seed for the guest's random number generator, in bytes.
pub const RNG_SEED_SIZE: usize = 32;

/// What the boot parameters are made of.
#[derive(Clone, Copy)]
pub struct BootParameters<'a> {
    /// The kernel, already in guest memory.
    pub kernel: &'a LoadedKernel,
    /// The command line, built with the kernel's [`LoadedKernel::cmdline_max`].
    pub cmdline: &'a Cmdline,
    /// Address and size in bytes of the initrd, already in guest memory.
    pub initrd: Option<(GuestAddress, u64)>,
    /// Where the ACPI RSDP is.
    pub rsdp: GuestAddress,
    /// RAM size in bytes.
    pub ram_size: u64,
    /// Seed for the guest's random number generator. PVH has no way to pass it.
    pub rng_seed: [u8; RNG_SEED_SIZE],
}

/// Why a machine cannot be made ready to boot.
#[derive(Debug, Error)]
pub enum BootError {
    /// No address for the initrd.
    #[error(
        "the initrd ({} MiB) does not fit into {} MiB of RAM beside the kernel ({} MiB); give the \
         machine at least {} MiB", mib(*size), mib(*ram), mib(*kernel), mib(*need)
    )]
    InitrdTooLarge {
        /// Initrd size in bytes.
        size: u64,
        /// RAM size in bytes.
        ram: u64,
        /// Size of the kernel in memory, in bytes.
        kernel: u64,
        /// RAM size in bytes that would do.
        need: u64,
    },
    /// An initrd larger than the kernel can address.
    #[error(
        "the initrd ({} MiB) is too large: this kernel takes an initrd only below {} MiB",
        mib(*size), mib(*limit)
    )]
    InitrdOverLimit {
        /// Initrd size in bytes.
        size: u64,
        /// End of the memory that it may use.
        limit: u64,
    },
    /// The command line does not fit.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// linux-loader could not write the boot parameters.
    #[error("the boot parameters cannot be written to guest memory")]
    Configure(#[source] configurator::Error),
    /// Guest memory refused a write.
    #[error("the {what} cannot be written to guest memory at {address:#x}")]
    Write {
        /// What was written.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// What guest memory said.
        #[source]
        source: GuestMemoryError,
    },
}

/// Writes everything that the kernel's boot protocol wants to guest memory, and returns the state
/// in which the boot processor has to start.
pub fn configure(
    memory: &GuestMemory,
    parameters: &BootParameters<'_>,
) -> Result<EntryState, BootError> {
    cmdline::write(memory, parameters.cmdline)?;
    match parameters.kernel.protocol {
        Protocol::Linux64 => linux::configure(memory, parameters)?,
        Protocol::Pvh => pvh::configure(memory, parameters)?,
    }
    let entry = EntryState::new(parameters.kernel.protocol, parameters.kernel.entry.0);
    write(
        memory,
        "GDT",
        layout::GDT_START,
        &entry::gdt(entry.protocol),
    )?;
    write(memory, "IDT", layout::IDT_START, &[0; 8])?;
    Ok(entry)
}

fn write(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| BootError::Write {
            what,
            address,
            source,
        })
}

/// Rounds up to whole MiB.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
