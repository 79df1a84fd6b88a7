use std::fs;

use super::*;

fn open(path: &Path) -> Result<Disk, DiskError> {
    Disk::open(&DiskOptions {
        path: path.into(),
        ..DiskOptions::default()
    })
}

#[test]
fn bad_disks_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    assert!(matches!(open(&path), Err(DiskError::Open { .. })));
    assert!(matches!(open(dir.path()), Err(DiskError::Kind { .. })));
    assert!(matches!(
        open(Path::new("/dev/null")),
        Err(DiskError::Kind { .. })
    ));
    fs::write(&path, [0; 1000]).unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(error, DiskError::Size { size: 1000, .. }));
    assert!(error.to_string().contains("truncate"), "{error}");
    fs::write(&path, [0; 1024]).unwrap();
    let first = open(&path).unwrap();
    let error = open(&path).unwrap_err();
    let pid = format!("process {} ", std::process::id());
    assert!(error.to_string().contains(&pid), "{error}");
    drop(first);
    for (logical, physical) in [(256, 512), (512, 256), (1000, 4096), (8192, 8192)] {
        let options = DiskOptions {
            path: path.clone(),
            logical_block_size: Some(logical),
            physical_block_size: Some(physical),
            ..DiskOptions::default()
        };
        assert!(matches!(
            Disk::open(&options),
            Err(DiskError::BlockSize { .. })
        ));
    }
}

#[test]
fn a_file_that_cannot_be_locked_says_so_and_what_to_do() {
    use std::os::unix::fs::OpenOptionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [0; 512]).unwrap();
    // No lock can be had through such a descriptor, as on file systems that have none.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&path);
    let options = DiskOptions {
        path: path.clone(),
        ..DiskOptions::default()
    };
    let error = Disk::from_file(file.unwrap(), &options).unwrap_err();
    let DiskError::Lock { source, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(source.raw_os_error(), Some(libc::EBADF));
    let text = error.to_string();
    let words = ["lock", &*path.to_string_lossy(), "put it on"].map(|word| text.contains(word));
    assert_eq!(words, [true; 3], "{text}");
}

#[test]
fn zeros_are_written_out_where_holes_are_not() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(3 << 20).unwrap();
    let options = DiskOptions::default();
    let disk = Disk::from_file(file, &options).unwrap();
    let write = |bytes: &[u8], at| {
        std::os::unix::fs::FileExt::write_all_at(disk.file(), bytes, at).unwrap();
    };
    write(&vec![7; 3 << 20], 0);
    disk.write_zeros(512, (2 << 20) + 512).unwrap();
    let mut bytes = vec![0; 3 << 20];
    std::os::unix::fs::FileExt::read_exact_at(disk.file(), &mut bytes, 0).unwrap();
    let end = 1024 + (2 << 20);
    assert!(bytes[..512].iter().all(|b| *b == 7));
    assert!(bytes[512..end].iter().all(|b| *b == 0));
    assert!(bytes[end..].iter().all(|b| *b == 7));
}
