use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;

struct Found {
    entry: cpio::newc::Entry,
    data: Vec<u8>,
}

/// Reads an archive with another implementation.
fn read(mut archive: &[u8]) -> BTreeMap<String, Found> {
    let mut found = BTreeMap::new();
    loop {
        let mut reader = cpio::newc::Reader::new(archive).unwrap();
        let entry = reader.entry().clone();
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        archive = reader.finish().unwrap();
        if entry.is_trailer() {
            assert!(archive.is_empty());
            return found;
        }
        found.insert(entry.name().to_owned(), Found { entry, data });
    }
}

const LIMIT: u64 = 1 << 30;

#[test]
fn agent_modules_and_nodes() {
    let modules = [
        Module {
            name: "a".into(),
            data: b"AAA".to_vec(),
        },
        Module {
            name: "b_c".into(),
            data: b"BBBB".to_vec(),
        },
    ];
    let nodes = [
        Node::new("etc", 0o755, Content::Directory),
        Node::new("etc/motd", 0o640, Content::Bytes(b"hello"[..].into())),
        Node::new("sh", 0o777, Content::Symlink("/bin/busybox".into())),
    ];
    let archive = Initramfs::builder()
        .agent()
        .modules(&modules)
        .nodes(&nodes)
        .shares("a ro /x y\n")
        .build(LIMIT)
        .unwrap();
    assert_eq!(archive.len() % 4, 0);
    let found = read(&archive);
    assert_eq!(found[".bulle/init"].data, AGENT);
    assert_eq!(found[".bulle/init"].entry.mode(), 0o100_755);
    let list = String::from_utf8(found[".bulle/modules"].data.clone()).unwrap();
    assert_eq!(
        list,
        "/.bulle/modules.d/000-a.ko\n/.bulle/modules.d/001-b_c.ko\n"
    );
    assert_eq!(found[".bulle/modules.d/001-b_c.ko"].data, b"BBBB");
    assert_eq!(found[".bulle/shares"].data, b"a ro /x y\n");
    assert_eq!(found["etc/motd"].data, b"hello");
    assert_eq!(found["etc/motd"].entry.mode(), 0o100_640);
    assert_eq!(found["sh"].data, b"/bin/busybox");
    assert_eq!(found["sh"].entry.mode(), 0o120_777);
}

#[test]
fn a_directory_is_copied_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    fs::create_dir_all(at("deep/er")).unwrap();
    fs::create_dir_all(at(".bulle")).unwrap();
    fs::write(at(".bulle/init"), "theirs").unwrap();
    fs::write(at("deep/er/file"), vec![7; 10_001]).unwrap();
    fs::set_permissions(at("deep/er/file"), PermissionsExt::from_mode(0o4755)).unwrap();
    fs::hard_link(at("deep/er/file"), at("second")).unwrap();
    symlink("deep/er", at("link")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    fs::write(at("empty"), "").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let archive = Initramfs::builder()
        .directory(root.path())
        .agent()
        .build(LIMIT)
        .unwrap();
    let found = read(&archive);
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    let expected = [
        ".",
        ".bulle",
        ".bulle/init",
        "dangling",
        "deep",
        "deep/er",
        "deep/er/file",
        "empty",
        "fifo",
        "link",
        "second",
    ];
    assert_eq!(names, expected);
    assert_eq!(found[".bulle/init"].data, AGENT);
    let (second, first) = (&found["second"], &found["deep/er/file"]);
    assert_eq!(second.entry.ino(), first.entry.ino());
    assert_eq!(second.entry.nlink(), 2);
    // Whichever comes first has the bytes, the other none.
    assert_eq!(second.data.len() + first.data.len(), 10_001);
    let metadata = fs::metadata(at("deep/er/file")).unwrap();
    assert_eq!(first.entry.mode(), 0o104_755);
    assert_eq!(i64::from(first.entry.mtime()), metadata.mtime());
    assert_eq!(first.entry.uid(), metadata.uid());
    assert_eq!(found["link"].data, b"deep/er");
    assert_eq!(found["fifo"].entry.mode(), 0o010_600);
    let inodes: Vec<u32> = found
        .values()
        .filter(|f| f.entry.nlink() == 1)
        .map(|f| f.entry.ino())
        .collect();
    let distinct: std::collections::BTreeSet<_> = inodes.iter().collect();
    assert_eq!(distinct.len(), inodes.len());
}

#[test]
fn devices_are_copied_and_other_file_systems_are_not_entered() {
    let archive = match Initramfs::builder()
        .directory(Path::new("/dev"))
        .build(LIMIT)
    {
        Ok(archive) => archive,
        Err(InitramfsError::Read { .. }) if !nix::unistd::geteuid().is_root() => return,
        Err(error) => panic!("{error}"),
    };
    let found = read(&archive);
    let null = &found["null"].entry;
    assert_eq!(null.mode() & libc::S_IFMT, libc::S_IFCHR);
    assert_eq!((null.rdev_major(), null.rdev_minor()), (1, 3));
    let device = |path: &str| fs::metadata(path).map(|m| m.dev()).ok();
    if device("/dev/pts").is_some_and(|pts| Some(pts) != device("/dev")) {
        assert_eq!(found["pts"].entry.mode() & libc::S_IFMT, libc::S_IFDIR);
        assert!(!found.keys().any(|name| name.starts_with("pts/")));
    }
}

#[test]
fn a_name_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let root = tempfile::tempdir().unwrap();
    let name = std::ffi::OsStr::from_bytes(b"caf\xe9");
    fs::write(root.path().join(name), "x").unwrap();
    let archive = Initramfs::builder()
        .directory(root.path())
        .build(LIMIT)
        .unwrap();
    assert!(archive.windows(5).any(|w| w == b"caf\xe9\0"));
}

#[test]
fn beyond_the_limit_both_sizes_are_named() {
    let root = tempfile::tempdir().unwrap();
    for n in 0..10 {
        fs::write(root.path().join(n.to_string()), vec![0; 50_001]).unwrap();
    }
    let build = |limit| {
        Initramfs::builder()
            .directory(root.path())
            .agent()
            .build(limit)
    };
    let size = build(LIMIT).unwrap().len() as u64;
    assert_eq!(build(size).unwrap().len() as u64, size);
    for limit in [size - 1, 300_000, 50_000, 10, 0] {
        match build(limit).unwrap_err() {
            InitramfsError::TooLarge { size: s, limit: l } => assert_eq!((s, l), (size, limit)),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let root = tempfile::tempdir().unwrap();
    let missing = root.path().join("missing");
    let build = |path: &Path| {
        Initramfs::builder()
            .directory(path)
            .build(LIMIT)
            .unwrap_err()
    };
    assert!(build(&missing).to_string().contains("missing"));
    let file = root.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(build(&file), InitramfsError::NotADirectory { .. }));
    let nodes = [Node::new("x", 0o644, Content::HostFile(missing))];
    let error = Initramfs::builder().nodes(&nodes).build(LIMIT).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
    // Even root cannot read this one.
    if Path::new("/proc/self/mem").exists() {
        let nodes = [Node::new(
            "x",
            0o644,
            Content::HostFile("/proc/self/mem".into()),
        )];
        let error = Initramfs::builder().nodes(&nodes).build(LIMIT).unwrap_err();
        // Named as it was found behind the link.
        assert!(error.to_string().contains("/mem for"), "{error}");
    }
}

#[test]
fn a_file_that_is_longer_than_it_says_is_packed_whole() {
    // Files in /proc say that they have no bytes.
    let nodes = [Node::new(
        "version",
        0o644,
        Content::HostFile("/proc/version".into()),
    )];
    let found = read(&Initramfs::builder().nodes(&nodes).build(LIMIT).unwrap());
    assert_eq!(found["version"].data, fs::read("/proc/version").unwrap());
    assert!(!found["version"].data.is_empty());
}

#[test]
fn progress_is_told() {
    let last = std::cell::Cell::new(Progress::default());
    let tell = |progress| last.set(progress);
    Initramfs::builder()
        .agent()
        .progress(&tell)
        .build(LIMIT)
        .unwrap();
    assert_eq!(last.get().entries, 2);
    assert!(last.get().bytes > AGENT.len() as u64);
}
