//! File descriptors and files are bounded, requests are what their lengths say.

use fuse_abi::os::{fuse_opcode as op, fuse_read_in, fuse_write_in};
use zerocopy::IntoBytes;

use super::super::{Fs, FsError, FsOptions};
use super::{Guest, IN_HEADER, OUT_HEADER, ROOT, header, name, put, segment};
use crate::virtio::device::DeviceError;

#[test]
fn options_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let make = |change: &dyn Fn(&mut FsOptions)| {
        let mut options = FsOptions::new("tag", dir.path());
        change(&mut options);
        Fs::new(options, &Default::default()).map(drop)
    };
    make(&|o| o.tag = "x".repeat(36)).unwrap();
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let error = make(&|o| o.tag = tag.to_owned());
        assert!(matches!(error, Err(FsError::Tag { .. })));
    }
    for (queues, size) in [(0, 128), (65, 128), (1, 0), (1, 1), (1, 100)] {
        let error = make(&|o| (o.queues, o.queue_size) = (queues, size));
        assert!(matches!(error, Err(FsError::Queues { .. })));
    }
    let error = make(&|o| o.max_fds = Some(15));
    assert!(matches!(error, Err(FsError::Limits { .. })));
    let error = make(&|o| o.path = "/no such directory".into());
    assert!(matches!(error, Err(FsError::Open { .. })));
    put(dir.path(), "file", "");
    let error = make(&|o| o.path = dir.path().join("file"));
    let Err(FsError::Open { source, .. }) = error else {
        panic!("a file was shared");
    };
    assert_eq!(source.raw_os_error(), Some(libc::ENOTDIR));
}

#[test]
fn open_files_end_at_the_limit() {
    let mut guest = Guest::new(|options| options.max_fds = Some(16));
    put(guest.dir.path(), "file", "x");
    let node = guest.look_up(ROOT, "file").unwrap().nodeid;
    let mut open = Vec::new();
    let error = loop {
        match guest.open(node, libc::O_RDONLY) {
            Ok(fh) => open.push(fh),
            Err(errno) => break errno,
        }
    };
    assert_eq!(error, libc::ENFILE);
    assert!((14..=16).contains(&open.len()), "{}", open.len());
    assert_eq!(guest.open_dir(ROOT), Err(libc::ENFILE));
    assert_eq!(guest.look_up(ROOT, "file"), Err(libc::ENFILE));
    guest.release(open[0], false).unwrap();
    guest.look_up(ROOT, "file").unwrap();
    assert_eq!(guest.read(open[1], 0, 9).unwrap(), b"x");
}

#[test]
fn known_files_end_at_the_limit() {
    let mut guest = Guest::new(|options| options.max_nodes = 20);
    for i in 0..30 {
        put(guest.dir.path(), &i.to_string(), "");
    }
    let known = (0..30)
        .filter(|i| guest.look_up(ROOT, &i.to_string()).is_ok())
        .count();
    assert_eq!(known, 19);
    assert_eq!(guest.look_up(ROOT, "29"), Err(libc::ENFILE));
    // What is known can still be looked up, and forgotten.
    let node = guest.look_up(ROOT, "0").unwrap().nodeid;
    guest.forget(node, 1);
    assert_eq!(guest.look_up(ROOT, "29"), Err(libc::ENFILE));
    guest.forget(node, 1);
    guest.look_up(ROOT, "29").unwrap();
}

#[test]
fn more_files_are_known_than_open() {
    let mut guest = Guest::new(|options| {
        options.max_fds = Some(16);
        options.read_only = false;
    });
    let mut parent = ROOT;
    let mut path = guest.dir.path().to_owned();
    let mut nodes = Vec::new();
    for i in 0..100 {
        path = path.join("d");
        std::fs::create_dir(&path).unwrap();
        put(&path, "file", &i.to_string());
        parent = guest.look_up(parent, "d").unwrap().nodeid;
        nodes.push(guest.look_up(parent, "file").unwrap().nodeid);
    }
    let (known, open) = guest.fs.server.nodes.counts();
    assert_eq!(known, 200);
    assert!(open <= 16);
    for (i, node) in nodes.iter().enumerate() {
        let fh = guest.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(fh, 0, 9).unwrap(), i.to_string().as_bytes());
        guest.release(fh, false).unwrap();
        assert!(guest.fs.server.nodes.counts().1 <= 16);
    }
    // Renamed by the guest, all below it is found where it is now.
    let rename = fuse_abi::os::fuse_rename_in { newdir: ROOT };
    guest
        .call(op::FUSE_RENAME, ROOT, &[rename.as_bytes(), b"d\0e\0"])
        .unwrap();
    let fh = guest.open(nodes[99], libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(fh, 0, 9).unwrap(), b"99");
    // Another file where one was: it is not taken for it.
    for i in 0..20 {
        put(guest.dir.path(), &format!("f{i}"), "");
    }
    let first = guest.look_up(ROOT, "f0").unwrap().nodeid;
    for _ in 0..3 {
        for node in &nodes {
            guest.call(op::FUSE_GETATTR, *node, &[&[0; 16]]).unwrap();
        }
    }
    put(guest.dir.path(), "new", "");
    std::fs::rename(guest.path("new"), guest.path("f0")).unwrap();
    assert_eq!(guest.open(first, libc::O_RDONLY), Err(libc::ESTALE));
    // The guest looks it up again, which is another file.
    let now = guest.look_up(ROOT, "f0").unwrap().nodeid;
    assert_ne!(now, first);
    guest.open(now, libc::O_RDONLY).unwrap();
}

#[test]
fn lookups_and_forgets_leave_nothing_behind() {
    let mut guest = Guest::new(|_| {});
    put(guest.dir.path(), "file", "");
    for _ in 0..2000 {
        let node = guest.look_up(ROOT, "file").unwrap().nodeid;
        guest.forget(node, 1);
    }
    assert_eq!(guest.fs.server.nodes.counts(), (0, 0));
    let debug = format!("{:?}", guest.fs.server.nodes);
    assert!(debug.len() < 4000, "{}", debug.len());
    // More than there were, and what never was.
    let node = guest.look_up(ROOT, "file").unwrap().nodeid;
    let batch = [[2, 0_u32].as_bytes(), [node, u64::MAX, 999, 1].as_bytes()].concat();
    guest
        .call_in(op::FUSE_BATCH_FORGET, 0, &[&batch], 0)
        .unwrap();
    assert_eq!(guest.fs.server.nodes.counts(), (0, 0));
    guest.forget(ROOT, u64::MAX);
    guest.look_up(ROOT, "file").unwrap();
    // A count that the request does not hold.
    let batch = [u32::MAX, 0];
    guest
        .call_in(op::FUSE_BATCH_FORGET, 0, &[batch.as_bytes()], 0)
        .unwrap();
}

#[test]
fn lengths_are_not_believed() {
    let mut guest = Guest::writable();
    put(guest.dir.path(), "file", "content");
    let node = guest.look_up(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    let error = |answer: &[u8]| super::get::<fuse_abi::os::fuse_out_header>(answer).error;
    // A header that says more or less than there is.
    for len in [0, 39, 1 << 20, u32::MAX as usize] {
        let mut request = header(len, op::FUSE_LOOKUP as u32, 5, ROOT, (0, 0));
        request.extend_from_slice(&name("file"));
        let answer = guest.raw(&request, 4096);
        assert_eq!((answer.len(), error(&answer)), (OUT_HEADER, -libc::EINVAL));
    }
    // No header, no room for an answer.
    assert!(guest.raw(&[0; 39], 4096).is_empty());
    let request = header(40, op::FUSE_STATFS as u32, 5, ROOT, (0, 0));
    assert!(guest.raw(&request, 15).is_empty());
    let answer = guest.raw(&request, OUT_HEADER + 8);
    assert_eq!(error(&answer), -libc::ERANGE);
    // An unknown opcode.
    let request = header(40, 12345, 5, ROOT, (0, 0));
    let answer = guest.raw(&request, 4096);
    assert_eq!(error(&answer), -libc::ENOSYS);
    // Data that is not there, and more than a body may have.
    let write = fuse_write_in {
        fh,
        size: 100,
        ..Default::default()
    };
    let written = guest.call(op::FUSE_WRITE, node, &[write.as_bytes(), b"short"]);
    assert_eq!(written, Err(libc::EINVAL));
    let big = vec![0; 200_000];
    assert_eq!(guest.call(op::FUSE_LOOKUP, ROOT, &[&big]), Err(libc::E2BIG));
    // Reads give no more than there is room for.
    let read = fuse_read_in {
        fh,
        size: u32::MAX,
        ..Default::default()
    };
    let data = guest
        .call_in(op::FUSE_READ, node, &[read.as_bytes()], 3)
        .unwrap();
    assert_eq!(data, b"con");
    let read = fuse_read_in {
        fh,
        offset: u64::MAX,
        size: 9,
        ..Default::default()
    };
    let data = guest.call(op::FUSE_READ, node, &[read.as_bytes()]);
    assert_eq!(data, Err(libc::EINVAL));
    for node in [0, 999, u64::MAX] {
        assert_eq!(guest.open(node, 0), Err(libc::ESTALE));
        assert_eq!(guest.look_up(node, "x"), Err(libc::ESTALE));
    }
    for opcode in [
        op::FUSE_OPEN,
        op::FUSE_READ,
        op::FUSE_SETATTR,
        op::FUSE_RENAME2,
    ] {
        assert_eq!(guest.call(opcode, node, &[&[0; 3]]), Err(libc::EINVAL));
    }
    assert_eq!(std::fs::read(guest.path("file")).unwrap(), b"content");
}

#[test]
fn buffers_outside_of_ram_break_the_device() {
    let mut guest = Guest::new(|_| {});
    put(guest.dir.path(), "file", "content");
    let node = guest.look_up(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    let read = fuse_read_in {
        fh,
        size: 64,
        ..Default::default()
    };
    let mut request = header(80, op::FUSE_READ as u32, 5, ROOT, (0, 0));
    request.extend_from_slice(read.as_bytes());
    use vm_memory::{Bytes, GuestAddress};
    guest
        .ram
        .write_slice(&request, GuestAddress(0x1000))
        .unwrap();
    let good = segment(0x1000, request.len());
    for bad in [0x7000_0000, u64::MAX - 8] {
        let bad = segment(bad, 64);
        let reply = [segment(0x8000, OUT_HEADER), bad];
        for (readable, writable) in [(&[good][..], &reply[..]), (&[bad][..], &[good][..])] {
            let served = guest.fs.serve(&guest.ram, readable, writable);
            assert!(matches!(served, Err(DeviceError::Memory { .. })));
        }
    }
    assert_eq!(IN_HEADER, 40);
}
