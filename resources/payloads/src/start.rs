//! The PVH start information (`hvm_start_info`, xen/include/public/arch-x86/hvm/start_info.h).

use crate::io;

/// What `hvm_start_info.magic` must be.
pub const MAGIC: u32 = 0x336e_c578;

/// `hvm_start_info`, version 1.
#[repr(C)]
pub struct StartInfo {
    /// [`MAGIC`].
    pub magic: u32,
    /// 1 where the memory map is present.
    pub version: u32,
    /// Flags, 0.
    pub flags: u32,
    /// Number of modules.
    pub modules: u32,
    /// Address of the module list.
    pub modlist: u64,
    /// Address of the command line, or 0.
    pub cmdline: u64,
    /// Address of the ACPI RSDP, or 0.
    pub rsdp: u64,
    /// Address of the memory map.
    pub memmap: u64,
    /// Entries of the memory map.
    pub memmap_entries: u32,
    /// Reserved.
    pub reserved: u32,
}

/// One region of the memory map.
#[repr(C)]
pub struct MemmapEntry {
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// E820 type: 1 is RAM.
    pub kind: u32,
    /// Reserved.
    pub reserved: u32,
}

impl StartInfo {
    /// The memory map.
    pub fn memory(&self) -> &'static [MemmapEntry] {
        // SAFETY: the loader promises as many entries at that address, for the guest's lifetime.
        unsafe {
            core::slice::from_raw_parts(
                self.memmap as *const MemmapEntry,
                self.memmap_entries as usize,
            )
        }
    }

    /// The command line, empty where there is none.
    pub fn cmdline(&self) -> &'static str {
        if self.cmdline == 0 {
            return "";
        }
        let len = (0..)
            .take_while(|at| io::read::<u8>(self.cmdline + at) != 0)
            .count();
        // SAFETY: the loader promises a NUL-terminated string, for the guest's lifetime.
        let text = unsafe { core::slice::from_raw_parts(self.cmdline as *const u8, len) };
        core::str::from_utf8(text).unwrap_or("")
    }

    /// The value of `key=value` on the command line; the last one counts.
    pub fn option(&self, key: &str) -> Option<&'static str> {
        let words = self.cmdline().split_ascii_whitespace();
        words
            .filter_map(|w| w.split_once('=').filter(|(k, _)| *k == key))
            .map(|(_, value)| value)
            .next_back()
    }
}
