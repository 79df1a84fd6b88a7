//! A guest goes on after a snapshot with the files that it knows and has open.

use fuse_abi::os::fuse_opcode as op;
use zerocopy::IntoBytes;

use super::super::{Fs, FsError, FsOptions, FsState};
use super::{Guest, ROOT, put};
use crate::virtio::device::{DeviceState, VirtioDevice};

fn state(fs: &Fs) -> FsState {
    match fs.save() {
        DeviceState::Fs(state) => state,
        other => panic!("not the state of a share: {other:?}"),
    }
}

#[test]
fn files_are_found_and_opened_again() {
    let mut guest = Guest::writable();
    std::fs::create_dir_all(guest.path("a/b")).unwrap();
    put(&guest.path("a/b"), "file", "content");
    put(guest.dir.path(), "gone", "x");
    let a = guest.look_up(ROOT, "a").unwrap().nodeid;
    let b = guest.look_up(a, "b").unwrap().nodeid;
    let file = guest.look_up(b, "file").unwrap().nodeid;
    let gone = guest.look_up(ROOT, "gone").unwrap().nodeid;
    let fh = guest
        .open(file, libc::O_RDWR | libc::O_TRUNC | libc::O_CREAT)
        .unwrap();
    guest.write(fh, 0, b"written").unwrap();
    let lost = guest.open(gone, libc::O_RDONLY).unwrap();
    let dir = guest.open_dir(b).unwrap();
    let saved = state(&guest.fs);
    let json = serde_json::to_string(&saved).unwrap();
    let saved: FsState = serde_json::from_str(&json).unwrap();
    std::fs::remove_file(guest.path("gone")).unwrap();

    let mut guest = Guest::silent(guest.dir, |options| options.read_only = false, &saved);
    assert_eq!(state(&guest.fs), saved);
    assert_eq!(
        guest.read(fh, 0, 64).unwrap(),
        b"written",
        "not truncated again"
    );
    guest.write(fh, 0, b"W").unwrap();
    assert_eq!(guest.read(lost, 0, 9), Err(libc::ESTALE));
    guest.release(lost, false).unwrap();
    assert_eq!(guest.open(gone, 0), Err(libc::ESTALE));
    guest.release(dir, true).unwrap();
    guest.call(op::FUSE_GETATTR, file, &[&[0; 16]]).unwrap();
    assert_eq!(guest.look_up(b, "file").unwrap().nodeid, file);
    // In another mount namespace, where the mount has another number, it is the same file too.
    let mut elsewhere = saved.clone();
    elsewhere.mount = 77;
    for node in &mut elsewhere.nodes {
        node.key.mount = 77;
    }
    let mut guest = Guest::silent(guest.dir, |options| options.read_only = false, &elsewhere);
    assert_eq!(guest.look_up(b, "file").unwrap().nodeid, file);
    // New numbers are new.
    put(guest.dir.path(), "new", "");
    assert!(guest.look_up(ROOT, "new").unwrap().nodeid > gone);
    assert!(guest.open(file, 0).unwrap() > dir);
}

#[test]
fn a_share_that_is_read_only_now_opens_nothing_for_writing() {
    let mut guest = Guest::writable();
    put(guest.dir.path(), "file", "content");
    let file = guest.look_up(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(file, libc::O_RDWR).unwrap();
    let saved = state(&guest.fs);
    let mut guest = Guest::silent(guest.dir, |_| {}, &saved);
    assert_eq!(guest.write(fh, 0, b"x"), Err(libc::EROFS));
    assert_eq!(guest.read(fh, 0, 9), Err(libc::ESTALE));
}

#[test]
fn reset_forgets_the_guest() {
    let mut guest = Guest::new(|_| {});
    put(guest.dir.path(), "file", "content");
    let file = guest.look_up(ROOT, "file").unwrap().nodeid;
    let fh = guest.open(file, 0).unwrap();
    guest.fs.reset();
    let nothing = FsState {
        tag: "share".to_owned(),
        mount: guest.fs.server.nodes.mount(),
        ..FsState::default()
    };
    assert_eq!(state(&guest.fs), nothing);
    guest.init();
    assert_eq!(guest.read(fh, 0, 9), Err(libc::EBADF));
    assert_eq!(guest.open(file, 0), Err(libc::ESTALE));
    assert_eq!(guest.fs.server.nodes.handles, 0);
}

#[test]
fn broken_states_are_refused_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "file", "");
    let load = |json: &str| {
        let state: FsState = serde_json::from_str(json).unwrap();
        Fs::new(FsOptions::new("share", dir.path()), &state)
    };
    let node = |id: u64, parent: u64, name: &[u8]| {
        let key = r#"{"dev":1,"ino":2,"mount":3}"#;
        format!(r#"{{"id":{id},"key":{key},"parent":{parent},"name":{name:?},"lookups":1}}"#)
    };
    let nodes = |nodes: &[String]| {
        format!(
            r#"{{"session":{{"minor":38,"flags":0}},"nodes":[{}],"handles":[]}}"#,
            nodes.join(",")
        )
    };
    for bad in [
        nodes(&[node(0, 1, b"a")]),
        nodes(&[node(1, 1, b"a")]),
        nodes(&[node(u64::MAX, 1, b"a")]),
        nodes(&[node(2, 1, b"a"), node(2, 1, b"b")]),
        nodes(&[node(2, 1, b"..")]),
        nodes(&[node(2, 1, b"a/b")]),
        nodes(&[node(2, 1, b"a\0")]),
        nodes(&[node(2, 1, b"")]),
        r#"{"session":null,"nodes":[],"handles":[{"id":0,"node":1,"flags":0,"dir":true}]}"#.into(),
    ] {
        assert!(matches!(load(&bad), Err(FsError::State { .. })), "{bad}");
    }
    // Directories in each other, in nothing, and another file than was there.
    let odd = nodes(&[
        node(2, 3, b"a"),
        node(3, 2, b"b"),
        node(4, 99, b"c"),
        node(5, 1, b"file"),
    ]);
    let state: FsState = serde_json::from_str(&odd).unwrap();
    let mut guest = Guest::silent(dir, |_| {}, &state);
    for id in 2..6 {
        assert_eq!(guest.open(id, 0), Err(libc::ESTALE));
        assert_eq!(guest.open_dir(id), Err(libc::ESTALE));
        assert_eq!(guest.look_up(id, "x"), Err(libc::ESTALE));
        guest
            .call_in(op::FUSE_FORGET, id, &[1_u64.as_bytes()], 0)
            .unwrap();
    }
}
