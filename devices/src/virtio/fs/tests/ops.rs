//! Each operation does on the host what the guest asked for.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use fuse_abi::os::{
    FATTR_ATIME, FATTR_FH, FATTR_GID, FATTR_MODE, FATTR_MTIME, FATTR_MTIME_NOW, FATTR_SIZE,
    FATTR_UID, FUSE_GETATTR_FH, FUSE_HANDLE_KILLPRIV_V2, FUSE_INIT_EXT, FUSE_POSIX_ACL,
    FUSE_SUBMOUNTS, FUSE_WRITE_KILL_SUIDGID, FUSE_WRITEBACK_CACHE, fuse_access_in, fuse_attr_out,
    fuse_copy_file_range_in, fuse_create_in, fuse_entry_out, fuse_fallocate_in, fuse_flush_in,
    fuse_fsync_in, fuse_getattr_in, fuse_init_in, fuse_init_out, fuse_link_in, fuse_lseek_in,
    fuse_lseek_out, fuse_mkdir_in, fuse_mknod_in, fuse_opcode as op, fuse_open_in, fuse_open_out,
    fuse_read_in, fuse_rename_in, fuse_rename2_in, fuse_setattr_in, fuse_statfs_out, fuse_write_in,
    fuse_write_out,
};
use zerocopy::IntoBytes;

use super::{Guest, ROOT, get, name, put};

pub fn create(guest: &mut Guest, file: &str, flags: i32, mode: u32) -> Result<(u64, u64), i32> {
    let create = fuse_create_in {
        flags: flags as u32,
        mode: libc::S_IFREG | mode,
        ..Default::default()
    };
    let answer = guest.call(op::FUSE_CREATE, ROOT, &[create.as_bytes(), &name(file)])?;
    let entry: fuse_entry_out = get(&answer);
    let open: fuse_open_out = get(&answer[size_of::<fuse_entry_out>()..]);
    Ok((entry.nodeid, open.fh))
}

pub fn attr(guest: &mut Guest, node: u64, fh: Option<u64>) -> Result<fuse_abi::os::fuse_attr, i32> {
    let arg = fuse_getattr_in {
        getattr_flags: fh.map_or(0, |_| FUSE_GETATTR_FH),
        fh: fh.unwrap_or_default(),
        ..Default::default()
    };
    let answer = guest.call(op::FUSE_GETATTR, node, &[arg.as_bytes()])?;
    Ok(get::<fuse_attr_out>(&answer).attr)
}

#[test]
fn sessions_agree_on_what_both_know() {
    let mut guest = Guest::silent(tempfile::tempdir().unwrap(), |_| {}, &Default::default());
    assert_eq!(guest.look_up(ROOT, "a"), Err(libc::ENOTCONN));
    let init = |major, minor, flags| fuse_init_in {
        major,
        minor,
        max_readahead: 4096,
        flags,
        ..Default::default()
    };
    for old in [init(7, 30, 0), init(6, 40, 0)] {
        let answer = guest.call(op::FUSE_INIT, 0, &[old.as_bytes()]);
        assert_eq!(answer, Err(libc::EPROTO));
    }
    let newer = guest
        .call(op::FUSE_INIT, 0, &[init(8, 0, 0).as_bytes()])
        .unwrap();
    assert_eq!(get::<fuse_init_out>(&newer).major, 7);
    assert_eq!(guest.look_up(ROOT, "a"), Err(libc::ENOTCONN));
    // 16 bytes, as guests before 7.36 send it.
    let old = init(7, 31, !FUSE_INIT_EXT);
    let answer = guest
        .call(op::FUSE_INIT, 0, &[&old.as_bytes()[..16]])
        .unwrap();
    let out: fuse_init_out = get(&answer);
    assert_eq!(
        (out.minor, out.max_write, out.max_pages),
        (31, 1 << 20, 256)
    );
    assert_eq!(out.max_readahead, 4096);
    assert_eq!((out.flags & FUSE_INIT_EXT, out.flags2), (0, 0));
    let full = fuse_init_in {
        flags2: u32::MAX,
        ..init(7, 99, u32::MAX)
    };
    let answer = guest.call(op::FUSE_INIT, 0, &[full.as_bytes()]).unwrap();
    let out: fuse_init_out = get(&answer);
    assert_eq!(out.minor, 40);
    assert_ne!(out.flags & FUSE_HANDLE_KILLPRIV_V2, 0);
    assert_eq!(
        out.flags & (FUSE_POSIX_ACL | FUSE_SUBMOUNTS | FUSE_WRITEBACK_CACHE),
        0
    );
    // CREATE_SUPP_GROUP alone: ALLOW_IDMAP is bit 40.
    assert_eq!(out.flags2, 1 << 2);
    assert_eq!(guest.look_up(ROOT, "a"), Err(libc::ENOENT));
    guest.call(op::FUSE_DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.look_up(ROOT, "a"), Err(libc::ENOTCONN));
}

#[test]
fn files_are_created_written_and_read() {
    let mut guest = Guest::writable();
    let (node, fh) = create(&mut guest, "file", libc::O_RDWR, 0o666).unwrap();
    let mode = std::fs::metadata(guest.path("file")).unwrap().mode();
    assert_eq!(
        mode & 0o7777,
        0o666,
        "the guest's mask is applied by the guest"
    );
    assert_eq!(guest.write(fh, 0, b"hello"), Ok(5));
    assert_eq!(guest.write(fh, 4, b"owner"), Ok(5));
    assert_eq!(std::fs::read(guest.path("file")).unwrap(), b"hellowner");
    assert_eq!(guest.read(fh, 2, 100).unwrap(), b"llowner");
    assert_eq!(guest.read(fh, 9, 100).unwrap(), b"");
    assert_eq!(guest.read(fh, 1, 3).unwrap(), b"ell");
    assert_eq!(attr(&mut guest, node, Some(fh)).unwrap().size, 9);
    let excl = libc::O_RDWR | libc::O_EXCL;
    assert_eq!(create(&mut guest, "file", excl, 0o600), Err(libc::EEXIST));
    let (same, other) = create(&mut guest, "file", libc::O_RDWR | libc::O_TRUNC, 0).unwrap();
    assert_eq!(same, node);
    assert_eq!(attr(&mut guest, node, None).unwrap().size, 0);
    let append = guest.open(node, libc::O_WRONLY | libc::O_APPEND).unwrap();
    guest.write(other, 0, b"abc").unwrap();
    guest.write(append, 0, b"def").unwrap();
    assert_eq!(std::fs::read(guest.path("file")).unwrap(), b"abcdef");
    assert_eq!(guest.read(append, 0, 1), Err(libc::EBADF));
    let flush = fuse_flush_in {
        fh,
        ..Default::default()
    };
    let sync = fuse_fsync_in {
        fh,
        ..Default::default()
    };
    guest
        .call(op::FUSE_FLUSH, node, &[flush.as_bytes()])
        .unwrap();
    guest
        .call(op::FUSE_FSYNC, node, &[sync.as_bytes()])
        .unwrap();
    guest.call(op::FUSE_SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    for fh in [fh, other, append] {
        guest.release(fh, false).unwrap();
        assert_eq!(guest.release(fh, false), Err(libc::EBADF));
        assert_eq!(guest.read(fh, 0, 1), Err(libc::EBADF));
    }
    assert_eq!(guest.open(node, 3), Err(libc::EINVAL));
}

#[test]
fn large_transfers_go_through_many_pieces() {
    let mut guest = Guest::writable();
    let data: Vec<u8> = (0..700_000_u32).map(|i| (i / 7) as u8).collect();
    std::fs::write(guest.path("big"), &data).unwrap();
    let node = guest.look_up(ROOT, "big").unwrap().nodeid;
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(fh, 3, 699_000).unwrap(), data[3..699_003]);
    assert_eq!(guest.write(fh, 100_000, &data[..600_000]), Ok(600_000));
    let now = std::fs::read(guest.path("big")).unwrap();
    assert_eq!(
        (&now[..100_000], &now[100_000..]),
        (&data[..100_000], &data[..600_000])
    );
    // More buffers than one system call takes.
    use crate::virtio::fs::message::Buffers;
    let pieces: Vec<_> = (0..3000)
        .map(|i| super::segment(0x2000 + 2 * i, 1))
        .collect();
    let buffers = Buffers {
        ram: &guest.ram,
        readable: &pieces,
        writable: &[],
    };
    let file = guest.fs.server.file(fh).unwrap().clone();
    let pieces: Vec<u8> = {
        use vm_memory::{Bytes, GuestAddress};
        let mut all = vec![0; 6000];
        guest
            .ram
            .read_slice(&mut all, GuestAddress(0x2000))
            .unwrap();
        all.into_iter().step_by(2).collect()
    };
    assert_eq!(buffers.write_file(&file, 0, 5, 3000).unwrap(), 3000);
    let mut back = vec![0; 3000];
    std::fs::File::open(guest.path("big"))
        .unwrap()
        .read_exact_at(&mut back, 5)
        .unwrap();
    assert_eq!(back, pieces);
}

#[test]
fn attributes_are_set() {
    let mut guest = Guest::writable();
    let (node, fh) = create(&mut guest, "file", libc::O_RDWR, 0o600).unwrap();
    let mut set = |arg: fuse_setattr_in| {
        let answer = guest.call(op::FUSE_SETATTR, node, &[arg.as_bytes()])?;
        Ok::<_, i32>(get::<fuse_attr_out>(&answer).attr)
    };
    let arg = fuse_setattr_in::default;
    let attr = set(fuse_setattr_in {
        valid: FATTR_MODE,
        mode: libc::S_IFREG | 0o4755,
        ..arg()
    });
    assert_eq!(attr.unwrap().mode, libc::S_IFREG | 0o4755);
    for (valid, size) in [(FATTR_SIZE, 4096), (FATTR_SIZE | FATTR_FH, 77)] {
        let attr = set(fuse_setattr_in {
            valid,
            size,
            fh,
            ..arg()
        });
        assert_eq!(attr.unwrap().size, size);
    }
    let attr = set(fuse_setattr_in {
        valid: FATTR_ATIME | FATTR_MTIME,
        atime: 11,
        atimensec: 22,
        mtime: 33,
        mtimensec: 44,
        ..arg()
    });
    let attr = attr.unwrap();
    assert_eq!((attr.atime, attr.atimensec), (11, 22));
    assert_eq!((attr.mtime, attr.mtimensec), (33, 44));
    let attr = set(fuse_setattr_in {
        valid: FATTR_MTIME | FATTR_MTIME_NOW,
        ..arg()
    });
    let attr = attr.unwrap();
    assert_eq!(attr.atime, 11);
    assert!(attr.mtime > 1_000_000_000);
    // What would mean "now" or "not at all" to the host is a number like others.
    let attr = set(fuse_setattr_in {
        valid: FATTR_MTIME,
        mtime: 5,
        mtimensec: u32::MAX,
        ..arg()
    });
    assert_eq!(attr.unwrap().mtime, 5);
    for valid in [FATTR_UID, FATTR_GID] {
        let attr = set(fuse_setattr_in {
            valid,
            uid: u32::MAX,
            gid: u32::MAX,
            ..arg()
        });
        assert_eq!(attr, Err(libc::EINVAL));
    }
    let error = set(fuse_setattr_in {
        valid: FATTR_SIZE,
        size: u64::MAX,
        ..arg()
    });
    assert_eq!(error, Err(libc::EINVAL));
}

#[test]
fn set_user_id_goes_where_others_write() {
    let mut guest = Guest::writable();
    let (_, fh) = create(&mut guest, "file", libc::O_RDWR, 0o755).unwrap();
    let path = guest.path("file");
    let mode = || std::fs::metadata(&path).unwrap().mode() & 0o7777;
    for (write_flags, left) in [(FUSE_WRITE_KILL_SUIDGID, 0o755), (0, 0o6755)] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6755)).unwrap();
        let write = fuse_write_in {
            fh,
            size: 1,
            write_flags,
            ..Default::default()
        };
        guest
            .call(op::FUSE_WRITE, ROOT, &[write.as_bytes(), b"x"])
            .unwrap();
        // The host's kernel takes them away itself where this process is not root.
        if write_flags != 0 || rustix::process::geteuid().is_root() {
            assert_eq!(mode(), left);
        }
    }
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o4755)).unwrap();
    let node = guest.look_up(ROOT, "file").unwrap().nodeid;
    let open = fuse_open_in {
        flags: (libc::O_RDWR | libc::O_TRUNC) as u32,
        open_flags: fuse_abi::os::FUSE_OPEN_KILL_SUIDGID,
    };
    guest.call(op::FUSE_OPEN, node, &[open.as_bytes()]).unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn names_are_made_moved_and_removed() {
    let mut guest = Guest::writable();
    let mkdir = fuse_mkdir_in {
        mode: 0o777,
        umask: 0,
    };
    let made = guest
        .call(op::FUSE_MKDIR, ROOT, &[mkdir.as_bytes(), b"dir\0"])
        .unwrap();
    let dir = get::<fuse_entry_out>(&made);
    assert_eq!(dir.attr.mode, libc::S_IFDIR | 0o777);
    for (kind, file) in [
        (libc::S_IFREG, "reg"),
        (libc::S_IFIFO, "fifo"),
        (libc::S_IFSOCK, "sock"),
    ] {
        let mknod = fuse_mknod_in {
            mode: kind | 0o622,
            ..Default::default()
        };
        let parts: [&[u8]; 2] = [mknod.as_bytes(), &name(file)];
        let made = guest.call(op::FUSE_MKNOD, dir.nodeid, &parts).unwrap();
        assert_eq!(get::<fuse_entry_out>(&made).attr.mode, kind | 0o622);
    }
    guest
        .call(op::FUSE_SYMLINK, ROOT, &[b"link\0dir/reg\0"])
        .unwrap();
    assert_eq!(
        std::fs::read_link(guest.path("link")).unwrap().to_str(),
        Some("dir/reg")
    );
    let file = guest.look_up(dir.nodeid, "reg").unwrap();
    let link = fuse_link_in {
        oldnodeid: file.nodeid,
    };
    let linked = guest
        .call(op::FUSE_LINK, ROOT, &[link.as_bytes(), b"hard\0"])
        .unwrap();
    let linked: fuse_entry_out = get(&linked);
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2));
    let up = fuse_rename_in { newdir: ROOT };
    let parts: [&[u8]; 2] = [up.as_bytes(), b"reg\0moved\0"];
    guest.call(op::FUSE_RENAME, dir.nodeid, &parts).unwrap();
    assert!(guest.path("moved").exists() && !guest.path("dir/reg").exists());
    let mut rename = |flags, names: &[u8]| {
        let rename = fuse_rename2_in {
            newdir: ROOT,
            flags,
            padding: 0,
        };
        guest.call(op::FUSE_RENAME2, ROOT, &[rename.as_bytes(), names])
    };
    assert_eq!(
        rename(libc::RENAME_NOREPLACE, b"moved\0hard\0"),
        Err(libc::EEXIST)
    );
    assert_eq!(rename(1 << 7, b"moved\0hard\0"), Err(libc::EINVAL));
    rename(libc::RENAME_EXCHANGE, b"moved\0link\0").unwrap();
    assert!(guest.path("moved").is_symlink() && guest.path("link").is_file());
    assert_eq!(
        guest.call(op::FUSE_RMDIR, ROOT, &[b"dir\0"]),
        Err(libc::ENOTEMPTY)
    );
    assert_eq!(
        guest.call(op::FUSE_RMDIR, ROOT, &[b"link\0"]),
        Err(libc::ENOTDIR)
    );
    for file in ["fifo", "sock"] {
        guest
            .call(op::FUSE_UNLINK, dir.nodeid, &[&name(file)])
            .unwrap();
    }
    assert_eq!(
        guest.call(op::FUSE_UNLINK, ROOT, &[b"dir\0"]),
        Err(libc::EISDIR)
    );
    guest.call(op::FUSE_RMDIR, ROOT, &[b"dir\0"]).unwrap();
    assert!(!guest.path("dir").exists());
}

/// Names, types and nodes in directory entries, and the offset behind them.
fn list(guest: &mut Guest, fh: u64, plus: bool, size: u32) -> Vec<(String, u32, u64)> {
    let mut entries = Vec::new();
    let mut offset = 0;
    loop {
        let read = fuse_read_in {
            fh,
            offset,
            size,
            ..Default::default()
        };
        let opcode = if plus {
            op::FUSE_READDIRPLUS
        } else {
            op::FUSE_READDIR
        };
        let answer = guest
            .call_in(opcode, ROOT, &[read.as_bytes()], size as usize)
            .unwrap();
        if answer.is_empty() {
            return entries;
        }
        let mut rest = answer.as_slice();
        while !rest.is_empty() {
            let mut node = 0;
            let mut len = 24;
            let mut entry = rest;
            if plus {
                node = get::<fuse_entry_out>(rest).nodeid;
                len += 128;
                entry = &rest[128..];
            }
            let [_ino, next, words]: [u64; 3] = get(entry);
            let (name_len, kind) = (words as u32 as usize, (words >> 32) as u32);
            let name = String::from_utf8(entry[24..24 + name_len].to_vec()).unwrap();
            entries.push((name, kind, node));
            offset = next;
            rest = &rest[(len + name_len).next_multiple_of(8)..];
        }
    }
}

#[test]
fn directories_are_listed_in_pieces_of_any_size() {
    let mut guest = Guest::new(|options| options.max_fds = Some(16));
    for i in 0..200 {
        put(
            guest.dir.path(),
            &format!("file with a name that is longer {i}"),
            "",
        );
    }
    std::fs::create_dir(guest.path("sub")).unwrap();
    let fh = guest.open_dir(ROOT).unwrap();
    for (plus, size) in [
        (false, 300),
        (false, 4096),
        (true, 400),
        (true, 5000),
        (true, 900_000),
    ] {
        let mut entries = list(&mut guest, fh, plus, size);
        assert_eq!(entries.len(), 203, "{plus} {size}");
        entries.sort();
        entries.dedup();
        assert_eq!(entries.len(), 203);
        for (name, kind, node) in &entries {
            let dir = matches!(name.as_str(), "." | ".." | "sub");
            assert_eq!(*kind, if dir { 4 } else { 8 });
            assert_eq!(*node != 0, plus && !name.starts_with('.'), "{name}");
        }
        if plus {
            assert_eq!(guest.fs.server.nodes.counts().0, 201);
            for (_, _, node) in entries.iter().filter(|entry| entry.2 != 0) {
                guest.forget(*node, 1);
            }
            assert_eq!(guest.fs.server.nodes.counts(), (0, 0));
        }
    }
    let read = fuse_read_in {
        fh,
        size: 10,
        ..Default::default()
    };
    assert_eq!(
        guest.call(op::FUSE_READDIR, ROOT, &[read.as_bytes()]),
        Err(libc::EINVAL)
    );
    let read = fuse_read_in {
        fh,
        size: 4096,
        offset: u64::MAX,
        ..Default::default()
    };
    assert_eq!(
        guest.call(op::FUSE_READDIR, ROOT, &[read.as_bytes()]),
        Err(libc::EINVAL)
    );
    let sync = fuse_fsync_in {
        fh,
        fsync_flags: 1,
        padding: 0,
    };
    guest
        .call(op::FUSE_FSYNCDIR, ROOT, &[sync.as_bytes()])
        .unwrap();
    assert_eq!(guest.release(fh, false), Err(libc::EBADF));
    guest.release(fh, true).unwrap();
}

#[test]
fn holes_are_made_and_found() {
    let mut guest = Guest::writable();
    let (node, fh) = create(&mut guest, "a", libc::O_RDWR, 0o600).unwrap();
    let mut allocate = |mode, offset, length| {
        let arg = fuse_fallocate_in {
            fh,
            offset,
            length,
            mode: mode as u32,
            padding: 0,
        };
        guest.call(op::FUSE_FALLOCATE, node, &[arg.as_bytes()])
    };
    allocate(0, 0, 1 << 20).unwrap();
    assert_eq!(
        allocate(libc::FALLOC_FL_COLLAPSE_RANGE, 0, 4096),
        Err(libc::EOPNOTSUPP)
    );
    assert_eq!(allocate(0, u64::MAX, u64::MAX), Err(libc::EINVAL));
    guest.write(fh, 500_000, b"data").unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let punch = fuse_fallocate_in {
        fh,
        length: 64 << 10,
        mode: punch as u32,
        ..Default::default()
    };
    guest
        .call(op::FUSE_FALLOCATE, node, &[punch.as_bytes()])
        .unwrap();
    let mut seek = |offset, whence: i32| {
        let arg = fuse_lseek_in {
            fh,
            offset,
            whence: whence as u32,
            padding: 0,
        };
        let answer = guest.call(op::FUSE_LSEEK, node, &[arg.as_bytes()])?;
        Ok::<_, i32>(get::<fuse_lseek_out>(&answer).offset)
    };
    assert_eq!(seek(0, libc::SEEK_HOLE), Ok(0));
    assert!(seek(0, libc::SEEK_DATA).unwrap() >= 64 << 10);
    assert_eq!(seek(1 << 30, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_SET), Err(libc::EINVAL));
}

#[test]
fn ranges_are_copied_and_the_rest_is_answered() {
    let mut guest = Guest::writable();
    let (node, fh) = create(&mut guest, "a", libc::O_RDWR, 0o600).unwrap();
    let (_, other) = create(&mut guest, "b", libc::O_RDWR, 0o600).unwrap();
    guest.write(fh, 500_000, b"data").unwrap();
    let copy = fuse_copy_file_range_in {
        fh_in: fh,
        off_in: 500_000,
        nodeid_out: 0,
        fh_out: other,
        off_out: 10,
        len: 4,
        flags: 0,
    };
    let copied = guest
        .call(op::FUSE_COPY_FILE_RANGE, node, &[copy.as_bytes()])
        .unwrap();
    assert_eq!(get::<fuse_write_out>(&copied).size, 4);
    assert_eq!(
        std::fs::read(guest.path("b")).unwrap(),
        b"\0\0\0\0\0\0\0\0\0\0data"
    );
    let statfs: fuse_statfs_out = get(&guest.call(op::FUSE_STATFS, node, &[]).unwrap());
    assert!(statfs.st.bsize >= 512 && statfs.st.namelen == 255);
    let access = fuse_access_in {
        mask: 4,
        padding: 0,
    };
    guest
        .call(op::FUSE_ACCESS, node, &[access.as_bytes()])
        .unwrap();
    for other in [
        op::FUSE_IOCTL,
        op::FUSE_POLL,
        op::FUSE_GETLK,
        op::FUSE_SETUPMAPPING,
    ] {
        assert_eq!(guest.call(other, node, &[&[0; 128]]), Err(libc::ENOSYS));
    }
    let mut read_only = Guest::new(|_| {});
    let ioctl = read_only.call(op::FUSE_IOCTL, ROOT, &[&[0; 128]]);
    assert_eq!(ioctl, Err(libc::ENOSYS), "overlayfs asks");
    // Nothing is answered to these.
    assert_eq!(
        guest.call(op::FUSE_INTERRUPT, node, &[&[0; 8]]),
        Ok(Vec::new())
    );
    assert_eq!(guest.call(op::FUSE_FORGET, node, &[]), Ok(Vec::new()));
}
