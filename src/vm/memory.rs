//! Guest RAM: mapped on the host, registered with KVM.
//!
//! Slots are registered before the interrupt controller exists: afterwards each costs an SRCU
//! grace period of about 7 ms (see `vm::build`).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use arch::memory::{GuestMemory, ram_regions};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::config::{HugePages, MachineConfig, MemoryBacking};

/// Guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host will not map so much.
    #[error(
        "Cannot map {mib} MiB of guest memory: the host's limit on address space or overcommit \
         is lower (ulimit -v, vm.overcommit_memory, the container's memory limit)"
    )]
    Map {
        /// Guest RAM in MiB.
        mib: u64,
        /// What went wrong.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Too few reserved huge pages.
    #[error(
        "Cannot map {mib} MiB of guest memory from reserved pages of {page_mib} MiB: reserve \
         {pages} of them in /sys/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages"
    )]
    HugePages {
        /// Guest RAM in MiB.
        mib: u64,
        /// Page size in MiB.
        page_mib: u64,
        /// Page size in KiB.
        page_kib: u64,
        /// Pages needed.
        pages: u64,
        /// What went wrong.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// memfd_create or ftruncate failed.
    #[error("Cannot create a memory file of {mib} MiB for guest memory")]
    Memfd {
        /// Guest RAM in MiB.
        mib: u64,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// KVM_CAP_READONLY_MEM is missing.
    #[error(
        "This host's KVM has no read-only memory, which read-only persistent memory needs: leave out \
         ro, or use a newer host kernel"
    )]
    ReadOnly,
    /// Regions do not fit together.
    #[error("Guest memory regions are not in order")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    /// KVM refused a slot.
    #[error("KVM refused memory slot {slot} at {address:#x} with {size:#x} bytes")]
    Slot {
        /// Slot number.
        slot: u32,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        size: u64,
        /// What went wrong.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Maps guest RAM as `config` says.
pub fn map(config: &MachineConfig) -> Result<GuestMemory, MemoryError> {
    let mib = config.mem_size_mib;
    let file = match config.memory_backing {
        MemoryBacking::Anonymous => None,
        MemoryBacking::Memfd => {
            Some(memfd(config).map_err(|source| MemoryError::Memfd { mib, source })?)
        }
    };
    let mut offset = 0;
    let mut regions = Vec::new();
    for (base, size) in ram_regions(mib << 20) {
        let file = match &file {
            Some(file) => Some(FileOffset::new(
                file.try_clone()
                    .map_err(|source| MemoryError::Memfd { mib, source })?,
                offset,
            )),
            None => None,
        };
        offset += size as u64;
        regions.push(map_region(config, base, size, file)?);
    }
    GuestMemory::from_regions(regions).map_err(MemoryError::Regions)
}

fn map_region(
    config: &MachineConfig,
    base: GuestAddress,
    size: usize,
    file: Option<FileOffset>,
) -> Result<GuestRegionMmap, MemoryError> {
    let mib = config.mem_size_mib;
    let reserved = config.huge_pages.reserved_mib();
    let sharing = match (&file, reserved) {
        (Some(_), _) => libc::MAP_SHARED,
        (None, None) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        (None, Some(_)) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge_flag(config.huge_pages),
    };
    // Reserved pages are taken now, or the guest would die of SIGBUS later.
    let reserve = if reserved.is_some() {
        0
    } else {
        libc::MAP_NORESERVE
    };
    let mut builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(sharing | reserve)
        .with_hugetlbfs(reserved.is_some());
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let region: MmapRegion = builder.build().map_err(|source| match reserved {
        Some(page_mib) => MemoryError::HugePages {
            mib,
            page_mib,
            page_kib: page_mib << 10,
            pages: mib.div_ceil(page_mib),
            source,
        },
        None => MemoryError::Map { mib, source },
    })?;
    advise(&region, config.huge_pages);
    GuestRegionMmap::new(region, base).ok_or(MemoryError::Regions(
        vm_memory::GuestRegionCollectionError::MemoryRegionOverlap,
    ))
}

fn huge_flag(pages: HugePages) -> i32 {
    match pages {
        HugePages::None | HugePages::Transparent => 0,
        HugePages::Huge2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        HugePages::Huge1G => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
    }
}

/// Asks for transparent huge pages where they are wanted. A host without them just uses small ones.
pub fn advise(region: &MmapRegion, pages: HugePages) {
    if pages != HugePages::Transparent {
        return;
    }
    // SAFETY: the range is a mapping that `region` owns, and MADV_HUGEPAGE changes no content.
    let result =
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
    if result != 0 {
        log::warn!(
            "no transparent huge pages for guest memory: {}",
            io::Error::last_os_error()
        );
    }
}

fn memfd(config: &MachineConfig) -> io::Result<File> {
    const NAME: &CStr = c"bulle-guest-memory";
    let pages = match config.huge_pages {
        HugePages::None | HugePages::Transparent => 0,
        HugePages::Huge2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        HugePages::Huge1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    // Sealed when the microVM is forked.
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | pages;
    // SAFETY: the name is a C string and the call touches no memory of ours.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create has just given us this descriptor.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(config.mem_size_mib << 20)?;
    log::debug!("guest memory is memfd {}", file.as_raw_fd());
    Ok(file)
}

/// Registers all of `memory` with KVM, one slot a region.
pub fn register(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let address = region.start_addr().0;
        let size = region.len();
        let slot_config = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: size,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for as long as `memory` lives, which the VM's owner keeps
        // longer than the VM, and regions do not overlap.
        unsafe { vm.set_user_memory_region(slot_config) }.map_err(|source| MemoryError::Slot {
            slot,
            address,
            size,
            source,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn config(mib: u64) -> MachineConfig {
        MachineConfig {
            mem_size_mib: mib,
            ..MachineConfig::default()
        }
    }

    #[test]
    fn ram_goes_round_the_hole_and_keeps_what_is_written() {
        for memory_backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            let memory = map(&MachineConfig {
                memory_backing,
                ..config(4096)
            })
            .unwrap();
            assert_eq!(memory.num_regions(), 2);
            let high = GuestAddress(1 << 32);
            memory.write_obj(0x1234_5678u32, high).unwrap();
            assert_eq!(memory.read_obj::<u32>(high).unwrap(), 0x1234_5678);
            assert_eq!(memory.read_obj::<u32>(GuestAddress(0)).unwrap(), 0);
        }
    }

    #[test]
    fn missing_huge_pages_say_how_many_to_reserve() {
        let asked = MachineConfig {
            huge_pages: HugePages::Huge1G,
            ..config(1 << 20)
        };
        let error = map(&asked).unwrap_err();
        assert!(std::error::Error::source(&error).is_some());
        let error = error.to_string();
        assert!(
            error.contains("1024 of them") && error.contains("1048576kB"),
            "{error}"
        );
    }
}
