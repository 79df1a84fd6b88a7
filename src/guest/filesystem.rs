//! Which file system an image has, to pack the kernel module for it.
//!
//! Only that: the agent mounts what the kernel recognises, whatever is found here.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Module, offset of a magic number, and its bytes.
const MAGICS: [(&str, usize, &[u8]); 9] = [
    ("squashfs", 0, b"hsqs"),
    ("xfs", 0, b"XFSB"),
    ("vfat", 0x36, b"FAT"),
    ("vfat", 0x52, b"FAT"),
    ("erofs", 0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("f2fs", 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    // ext2, ext3 and ext4 have one driver.
    ("ext4", 0x438, &[0x53, 0xef]),
    ("isofs", 0x8001, b"CD001"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
];
/// The end of the last one.
const HEAD: u64 = 0x1_0048;

/// The kernel module for the file system in `image`, if it is a known one.
pub fn module_for(image: &Path) -> io::Result<Option<&'static str>> {
    let mut head = Vec::new();
    File::open(image)?.take(HEAD).read_to_end(&mut head)?;
    let found = MAGICS.iter().find(|(_, offset, magic)| {
        let rest = head.get(*offset..).unwrap_or_default();
        rest.starts_with(magic)
    });
    Ok(found.map(|(module, ..)| *module))
}

/// What the module of a file system asks the kernel for at the mount, when there is nobody who could
/// load it: FAT's character sets, as Linux has them unless told otherwise.
pub fn companions(module: &str) -> &'static [&'static str] {
    match module {
        "vfat" => &["nls_cp437", "nls_ascii", "nls_iso8859-1", "nls_utf8"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_magic_number_is_found_where_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (module, offset, magic) in MAGICS {
            let mut image = vec![0; offset];
            image.extend_from_slice(magic);
            std::fs::write(file.path(), &image).unwrap();
            assert_eq!(module_for(file.path()).unwrap(), Some(module));
            std::fs::write(file.path(), &image[..image.len() - 1]).unwrap();
            assert_eq!(module_for(file.path()).unwrap(), None);
        }
    }

    #[test]
    fn fat_comes_with_its_character_sets() {
        assert!(companions("vfat").contains(&"nls_cp437"));
        assert!(companions("ext4").is_empty());
    }
}
