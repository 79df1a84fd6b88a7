//! No image, however broken, may do more than fail.

use proptest::prelude::*;

use super::*;

/// Loads `bytes` in every way; what comes back must be in RAM.
fn try_everything(bytes: &[u8]) {
    let Ok(image) = KernelImage::from_bytes(bytes.to_vec()) else {
        return;
    };
    image.version();
    let memory = memory(32 * MIB);
    for wanted in [
        KernelEntry::Auto,
        KernelEntry::Pvh,
        KernelEntry::Linux64,
        KernelEntry::Bzimage,
    ] {
        let options = LoadOptions {
            kaslr_seed: Some(9),
            ..entry(wanted)
        };
        if let Ok(kernel) = image.load(&memory, &options) {
            assert!(kernel.start >= MIB && kernel.start < kernel.end && kernel.end <= 32 * MIB);
            assert!((kernel.start..kernel.end).contains(&kernel.entry.0));
        }
    }
}

fn images() -> Vec<Vec<u8>> {
    vec![
        linux_elf().with_pvh().build(),
        TestElf {
            is_64: false,
            machine: 3,
            ..linux_elf().with_pvh()
        }
        .build(),
        linux_bzimage(Compression::Gzip),
        linux_bzimage(Compression::Bzip2),
        linux_bzimage(Compression::Lzma),
        linux_bzimage(Compression::Xz),
        linux_bzimage(Compression::Lz4),
        linux_bzimage(Compression::Zstd),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn truncated_images(which in 0usize..8, keep in 0.0f64..1.0) {
        let image = &images()[which];
        try_everything(&image[..(image.len() as f64 * keep) as usize]);
    }

    #[test]
    fn changed_images(
        which in 0usize..8,
        changes in prop::collection::vec((0.0f64..1.0, any::<u8>()), 1..8),
        headers_only in any::<bool>(),
    ) {
        let mut image = images()[which].clone();
        let length = if headers_only { image.len().min(0x280) } else { image.len() };
        for (at, value) in changes {
            image[(length as f64 * at) as usize] = value;
        }
        try_everything(&image);
    }

    #[test]
    fn changed_kernels_in_good_payloads(
        changes in prop::collection::vec((0usize..512, any::<u8>()), 1..6),
        tail in prop::collection::vec(prop_oneof![Just(0u32), any::<u32>(), 0x8100_0000u32..0x8120_0000], 0..20),
    ) {
        let mut elf = linux_elf().with_pvh().build();
        for (at, value) in changes {
            elf[at] = value;
        }
        elf.extend(tail.into_iter().flat_map(u32::to_le_bytes));
        try_everything(&bzimage(&pack(Compression::Lz4, &elf), |_| {}));
    }

    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        try_everything(&bytes);
    }
}
