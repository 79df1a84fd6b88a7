//! `kernel_image`: a kernel file given by a user, opened, loaded and made ready to boot.

use std::sync::OnceLock;

use arch::boot::{self, BootParameters};
use arch::cmdline;
use arch::kernel::{KernelEntry, KernelImage, LoadOptions};
use arch::memory::{self, GuestMemory};
use vm_memory::GuestAddress;

/// RAM of the guest; it also bounds what a payload may unpack to.
const RAM: u64 = 64 << 20;
/// Nothing may be loaded below.
const LOWEST: u64 = 1 << 20;

/// Loads `data` by every entry, with KASLR.
pub fn run(data: &[u8]) {
    let Ok(image) = KernelImage::from_bytes(data.to_vec()) else {
        return;
    };
    image.version();
    for entry in [
        KernelEntry::Auto,
        KernelEntry::Pvh,
        KernelEntry::Linux64,
        KernelEntry::Bzimage,
    ] {
        load(&image, entry);
    }
}

fn load(image: &KernelImage, entry: KernelEntry) {
    let memory = guest_memory();
    let options = LoadOptions {
        entry,
        kaslr_seed: Some(1),
        initrd_size: 1 << 20,
    };
    let Ok(kernel) = image.load(memory, &options) else {
        return;
    };
    assert!(LOWEST <= kernel.start && kernel.start < kernel.end && kernel.end <= RAM);
    assert!((kernel.start..kernel.end).contains(&kernel.entry.0));
    let Ok(cmdline) = cmdline::build("panic=-1", "", kernel.cmdline_max) else {
        return;
    };
    let size = 1 << 20;
    let initrd = boot::initrd_address(&kernel, RAM, size)
        .ok()
        .map(|address| (address, size));
    if let Some((address, size)) = initrd {
        assert!(address.0 + size <= kernel.start || kernel.end <= address.0);
    }
    let parameters = BootParameters {
        kernel: &kernel,
        cmdline: &cmdline,
        initrd,
        rsdp: GuestAddress(arch::layout::RSDP_START),
        ram_size: RAM,
        rng_seed: [0; boot::RNG_SEED_SIZE],
    };
    boot::configure(memory, &parameters).expect("boot structures fit below 1 MiB");
}

/// One guest memory for all runs: loading reads nothing back from it.
fn guest_memory() -> &'static GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        GuestMemory::from_ranges(&memory::ram_regions(RAM)).expect("64 MiB of address space")
    })
}
