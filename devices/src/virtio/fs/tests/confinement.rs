//! Nothing outside of the share is reached, and nothing that is not a file is opened.

use std::os::unix::fs::{MetadataExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_abi::os::{
    fuse_access_in, fuse_create_in, fuse_fallocate_in, fuse_getxattr_in, fuse_link_in,
    fuse_mkdir_in, fuse_mknod_in, fuse_opcode as op, fuse_rename_in, fuse_rename2_in,
    fuse_setattr_in, fuse_write_in,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use zerocopy::IntoBytes;

use super::{Guest, ROOT, get, name, put};

const BAD_NAMES: [&str; 8] = [
    "",
    ".",
    "..",
    "/",
    "a/b",
    "../secret",
    "/etc/passwd",
    "sub/..",
];

#[test]
fn names_are_one_component_in_every_request() {
    let mut guest = Guest::writable();
    put(guest.dir.path(), "file", "x");
    std::fs::create_dir(guest.path("sub")).unwrap();
    put(guest.dir.path(), "sub/b", "y");
    let file = guest.look_up(ROOT, "file").unwrap().nodeid;
    let sub = guest.look_up(ROOT, "sub").unwrap().nodeid;
    let link = fuse_link_in { oldnodeid: file };
    let rename = fuse_rename_in { newdir: ROOT };
    let create = fuse_create_in {
        flags: libc::O_RDWR as u32,
        mode: 0o644,
        ..Default::default()
    };
    let regular = fuse_mknod_in {
        mode: libc::S_IFREG | 0o644,
        ..Default::default()
    };
    for bad in BAD_NAMES {
        let bad = name(bad);
        let bad = bad.as_slice();
        let ok = name("ok");
        let ok = ok.as_slice();
        let mkdir = fuse_mkdir_in::default();
        let requests: [(op, &[&[u8]]); 11] = [
            (op::FUSE_LOOKUP, &[bad]),
            (op::FUSE_UNLINK, &[bad]),
            (op::FUSE_RMDIR, &[bad]),
            (op::FUSE_SYMLINK, &[bad, b"target\0"]),
            (op::FUSE_MKDIR, &[mkdir.as_bytes(), bad]),
            (op::FUSE_MKNOD, &[regular.as_bytes(), bad]),
            (op::FUSE_CREATE, &[create.as_bytes(), bad]),
            (op::FUSE_LINK, &[link.as_bytes(), bad]),
            (op::FUSE_RENAME, &[rename.as_bytes(), bad, ok]),
            (op::FUSE_RENAME, &[rename.as_bytes(), b"file\0", bad]),
            (op::FUSE_LOOKUP, &[&bad[..bad.len() - 1]]),
        ];
        for parent in [ROOT, sub] {
            for (opcode, parts) in requests {
                let answer = guest.call(opcode, parent, parts);
                assert_eq!(answer, Err(libc::EINVAL), "{opcode:?} {bad:?}");
            }
        }
    }
    let long = "n".repeat(256);
    assert_eq!(guest.look_up(ROOT, &long), Err(libc::ENAMETOOLONG));
    let mut left: Vec<_> = std::fs::read_dir(guest.dir.path()).unwrap().collect();
    assert_eq!(left.drain(..).count(), 2);
}

#[test]
fn symbolic_links_are_shown_and_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "secret", "secret");
    let mut guest = Guest::writable();
    symlink(outside.path(), guest.path("dir")).unwrap();
    symlink(outside.path().join("secret"), guest.path("file")).unwrap();
    symlink("..", guest.path("up")).unwrap();
    symlink("/proc/self/root", guest.path("magic")).unwrap();
    for link in ["dir", "file", "up", "magic"] {
        let entry = guest.look_up(ROOT, link).unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        let node = entry.nodeid;
        let target = guest.call(op::FUSE_READLINK, node, &[]).unwrap();
        let real = std::fs::read_link(guest.path(link)).unwrap();
        assert_eq!(target, real.to_str().unwrap().as_bytes());
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_DIRECTORY] {
            assert_eq!(guest.open(node, flags), Err(libc::ELOOP));
        }
        assert_eq!(guest.open_dir(node), Err(libc::ENOTDIR));
        assert_eq!(guest.look_up(node, "secret"), Err(libc::ENOTDIR));
        let mkdir = fuse_mkdir_in::default();
        let made = guest.call(op::FUSE_MKDIR, node, &[mkdir.as_bytes(), b"new\0"]);
        assert_eq!(made, Err(libc::ENOTDIR));
        let create = fuse_create_in {
            flags: libc::O_RDWR as u32,
            ..Default::default()
        };
        let made = guest.call(op::FUSE_CREATE, node, &[create.as_bytes(), b"new\0"]);
        assert_eq!(made, Err(libc::ENOTDIR));
        // Creating over it does not go through it either.
        let over = guest.call(op::FUSE_CREATE, ROOT, &[create.as_bytes(), &name(link)]);
        assert_eq!(over, Err(libc::ELOOP));
        let size = fuse_setattr_in {
            valid: fuse_abi::os::FATTR_SIZE,
            ..Default::default()
        };
        assert_eq!(
            guest.call(op::FUSE_SETATTR, node, &[size.as_bytes()]),
            Err(libc::ELOOP)
        );
    }
    let content = std::fs::read(outside.path().join("secret")).unwrap();
    assert_eq!(content, b"secret");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn attributes_are_set_on_the_link_itself() {
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "target", "x");
    let target = outside.path().join("target");
    let before = std::fs::metadata(&target).unwrap();
    let mut guest = Guest::writable();
    symlink(&target, guest.path("link")).unwrap();
    let node = guest.look_up(ROOT, "link").unwrap().nodeid;
    let times = fuse_setattr_in {
        valid: fuse_abi::os::FATTR_MTIME | fuse_abi::os::FATTR_ATIME,
        mtime: 1000,
        atime: 1000,
        ..Default::default()
    };
    guest
        .call(op::FUSE_SETATTR, node, &[times.as_bytes()])
        .unwrap();
    let mode = fuse_setattr_in {
        valid: fuse_abi::os::FATTR_MODE,
        mode: 0o777,
        ..Default::default()
    };
    assert!(
        guest
            .call(op::FUSE_SETATTR, node, &[mode.as_bytes()])
            .is_err()
    );
    let link = fuse_link_in { oldnodeid: node };
    guest
        .call(op::FUSE_LINK, ROOT, &[link.as_bytes(), b"second\0"])
        .unwrap();
    let second = std::fs::symlink_metadata(guest.path("second")).unwrap();
    assert!(second.file_type().is_symlink());
    assert_eq!(second.mtime(), 1000);
    let after = std::fs::metadata(&target).unwrap();
    assert_eq!(
        (before.mode(), before.mtime()),
        (after.mode(), after.mtime())
    );
    assert_eq!(before.nlink(), after.nlink());
}

#[test]
fn a_link_swapped_in_during_lookup_leads_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "secret", "outside");
    let secret = std::fs::metadata(outside.path().join("secret"))
        .unwrap()
        .ino();
    let mut guest = Guest::writable();
    std::fs::create_dir(guest.path("real")).unwrap();
    put(&guest.path("real"), "secret", "inside");
    symlink(outside.path(), guest.path("trap")).unwrap();
    let stop = AtomicBool::new(false);
    let (a, b) = (guest.path("real"), guest.path("trap"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, &a, CWD, &b, exchange).unwrap();
            }
        });
        let mut inside = 0;
        for round in 0..4000 {
            let name = if round % 2 == 0 { "real" } else { "trap" };
            let dir = guest.look_up(ROOT, name).unwrap().nodeid;
            if round % 3 == 0 {
                // It is found again by its name, which may be the other's now.
                guest.fs.server.nodes.close_all();
            }
            match guest.look_up(dir, "secret") {
                Ok(entry) => {
                    assert_ne!(entry.attr.ino, secret);
                    let fh = guest.open(entry.nodeid, libc::O_RDONLY).unwrap();
                    assert_eq!(guest.read(fh, 0, 64).unwrap(), b"inside");
                    guest.release(fh, false).unwrap();
                    inside += 1;
                }
                Err(errno) => assert!([libc::ENOTDIR, libc::ESTALE].contains(&errno)),
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(inside > 0);
    });
}

#[test]
fn only_files_and_directories_are_opened() {
    let mut guest = Guest::writable();
    let mode = Mode::from_raw_mode(0o666);
    mknodat(CWD, guest.path("fifo"), FileType::Fifo, mode, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(guest.path("socket")).unwrap();
    let mut specials = vec!["fifo", "socket"];
    let zero = rustix::fs::makedev(1, 5);
    if mknodat(
        CWD,
        guest.path("zero"),
        FileType::CharacterDevice,
        mode,
        zero,
    )
    .is_ok()
    {
        specials.push("zero");
    }
    for special in specials {
        let node = guest.look_up(ROOT, special).unwrap().nodeid;
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_RDWR | libc::O_TRUNC,
        ] {
            assert_eq!(guest.open(node, flags), Err(libc::EACCES), "{special}");
        }
        assert_eq!(guest.open_dir(node), Err(libc::ENOTDIR));
        let create = fuse_create_in {
            flags: libc::O_RDWR as u32,
            ..Default::default()
        };
        let over = guest.call(op::FUSE_CREATE, ROOT, &[create.as_bytes(), &name(special)]);
        assert_eq!(over, Err(libc::EACCES));
        let size = fuse_setattr_in {
            valid: fuse_abi::os::FATTR_SIZE,
            ..Default::default()
        };
        assert_eq!(
            guest.call(op::FUSE_SETATTR, node, &[size.as_bytes()]),
            Err(libc::EACCES)
        );
        let xattr = fuse_getxattr_in::default();
        let value = guest.call(op::FUSE_GETXATTR, node, &[xattr.as_bytes(), b"user.a\0"]);
        assert_eq!(value, Err(libc::EOPNOTSUPP));
        // Attributes are another matter.
        guest.call(op::FUSE_GETATTR, node, &[&[0; 16]]).unwrap();
    }
}

#[test]
fn guests_make_no_devices() {
    let mut guest = Guest::writable();
    for (mode, rdev, errno) in [
        (libc::S_IFBLK, 0x0801, libc::EPERM),
        (libc::S_IFCHR, 0x0105, libc::EPERM),
        (libc::S_IFBLK, 0, libc::EPERM),
        (libc::S_IFDIR, 0, libc::EPERM),
        (libc::S_IFLNK, 0, libc::EPERM),
        (0, 0, libc::EPERM),
    ] {
        let mknod = fuse_mknod_in {
            mode: mode | 0o600,
            rdev,
            ..Default::default()
        };
        let made = guest.call(op::FUSE_MKNOD, ROOT, &[mknod.as_bytes(), b"node\0"]);
        assert_eq!(made, Err(errno), "{mode:o}");
        assert!(!guest.path("node").exists());
    }
}

#[test]
fn filesystems_of_the_kernel_are_not_shared_or_entered() {
    for path in ["/proc", "/proc/self", "/sys"] {
        let error = super::Fs::new(super::FsOptions::new("t", path), &Default::default());
        assert!(
            matches!(error, Err(crate::virtio::fs::FsError::Kernels { .. })),
            "{path}"
        );
    }
    // The whole host: /proc is there, and nothing in it.
    let mut guest = Guest::silent(
        tempfile::tempdir().unwrap(),
        |options| {
            options.path = "/".into();
            options.read_only = false;
        },
        &Default::default(),
    );
    guest.init();
    let proc = guest.look_up(ROOT, "proc").unwrap();
    assert_eq!(proc.attr.mode & libc::S_IFMT, libc::S_IFDIR);
    for file in ["self", "1", "sysrq-trigger", "mounts"] {
        assert_eq!(guest.look_up(proc.nodeid, file), Err(libc::ENOENT));
    }
    let fh = guest.open_dir(proc.nodeid).unwrap();
    let read = fuse_abi::os::fuse_read_in {
        fh,
        size: 4096,
        ..Default::default()
    };
    let list = guest.call(op::FUSE_READDIR, proc.nodeid, &[read.as_bytes()]);
    assert_eq!(list, Ok(Vec::new()));
    guest.release(fh, true).unwrap();
    let mkdir = fuse_mkdir_in::default();
    let made = guest.call(op::FUSE_MKDIR, proc.nodeid, &[mkdir.as_bytes(), b"new\0"]);
    assert_eq!(made, Err(libc::EACCES));
    let state = crate::virtio::device::VirtioDevice::save(&guest.fs);
    let crate::virtio::device::DeviceState::Fs(state) = state else {
        panic!("not the state of a share");
    };
    // The same when the node is found again after a restore.
    let mut again = Guest::silent(
        tempfile::tempdir().unwrap(),
        |options| {
            options.path = "/".into();
            options.read_only = false;
        },
        &state,
    );
    assert_eq!(again.look_up(proc.nodeid, "self"), Err(libc::ENOENT));
    assert_eq!(again.open(proc.nodeid, libc::O_RDONLY), Err(libc::EACCES));
}

/// A structure and what follows it.
fn with(value: impl IntoBytes + zerocopy::Immutable, tail: &[u8]) -> Vec<u8> {
    [value.as_bytes(), tail].concat()
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let mut guest = Guest::new(|_| {});
    put(guest.dir.path(), "file", "content");
    let before = std::fs::metadata(guest.path("file")).unwrap();
    let node = guest.look_up(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    let write = fuse_write_in {
        fh,
        size: 1,
        ..Default::default()
    };
    let allocate = fuse_fallocate_in {
        fh,
        length: 1,
        ..Default::default()
    };
    let requests: [(op, Vec<u8>); 15] = [
        (op::FUSE_SETATTR, with(fuse_setattr_in::default(), b"")),
        (op::FUSE_SYMLINK, b"a\0b\0".to_vec()),
        (op::FUSE_MKNOD, with(fuse_mknod_in::default(), b"a\0")),
        (op::FUSE_MKDIR, with(fuse_mkdir_in::default(), b"a\0")),
        (op::FUSE_UNLINK, b"file\0".to_vec()),
        (op::FUSE_RMDIR, b"file\0".to_vec()),
        (
            op::FUSE_RENAME,
            with(fuse_rename_in { newdir: 1 }, b"file\0b\0"),
        ),
        (
            op::FUSE_RENAME2,
            with(fuse_rename2_in::default(), b"file\0b\0"),
        ),
        (
            op::FUSE_LINK,
            with(fuse_link_in { oldnodeid: node }, b"a\0"),
        ),
        (op::FUSE_WRITE, with(write, b"x")),
        (op::FUSE_SETXATTR, with([0_u32; 2], b"user.a\0")),
        (op::FUSE_REMOVEXATTR, b"user.a\0".to_vec()),
        (op::FUSE_CREATE, with(fuse_create_in::default(), b"a\0")),
        (op::FUSE_FALLOCATE, with(allocate, b"")),
        (op::FUSE_COPY_FILE_RANGE, vec![0; 56]),
    ];
    for (opcode, body) in &requests {
        for at in [ROOT, node] {
            assert_eq!(
                guest.call(*opcode, at, &[body]),
                Err(libc::EROFS),
                "{opcode:?}"
            );
        }
    }
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_TRUNC,
        libc::O_RDWR | libc::O_APPEND,
    ] {
        assert_eq!(guest.open(node, flags), Err(libc::EROFS));
    }
    let access = fuse_access_in {
        mask: 2,
        ..Default::default()
    };
    assert_eq!(
        guest.call(op::FUSE_ACCESS, node, &[access.as_bytes()]),
        Err(libc::EROFS)
    );
    assert_eq!(guest.read(fh, 0, 64).unwrap(), b"content");
    let after = std::fs::metadata(guest.path("file")).unwrap();
    assert_eq!(before.mtime_nsec(), after.mtime_nsec());
    assert_eq!(before.ctime_nsec(), after.ctime_nsec());
    assert_eq!(before.atime_nsec(), after.atime_nsec());
    assert_eq!(std::fs::read_dir(guest.dir.path()).unwrap().count(), 1);
    let statfs = guest.call(op::FUSE_STATFS, ROOT, &[]).unwrap();
    assert!(get::<fuse_abi::os::fuse_statfs_out>(&statfs).st.blocks > 0);
}
