//! The socket device.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::common::{Bulle, Outcome};
use crate::refuses;

fn with_vsock(list: &str) -> Outcome {
    let bulle = Bulle::run().args(["--root", "none", "--kernel", "/dev/null", "--vsock"]);
    bulle.arg(list).outcome()
}

fn at(path: &Path) -> Outcome {
    with_vsock(&format!("path={}", path.display()))
}

#[test]
fn sockets_that_cannot_be_had() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    refuses(at(&file), &["file", "no socket"]);
    refuses(
        at(&dir.path().join("no/s")),
        &["no/s", "directory does not exist"],
    );
    refuses(at(&dir.path().join("x".repeat(97))), &["at most 96"]);
    let taken = dir.path().join("taken");
    let _held = UnixListener::bind(&taken).unwrap();
    refuses(at(&taken), &["taken", "in use"]);
    // The other socket of the device.
    let _other = UnixListener::bind(dir.path().join("s.seqpacket")).unwrap();
    refuses(at(&dir.path().join("s")), &["s.seqpacket", "in use"]);
    assert!(
        !dir.path().join("s").exists(),
        "the first of both is left behind"
    );
    assert!(UnixStream::connect(&taken).is_ok());
}

#[test]
fn what_a_killed_monitor_left_is_no_obstacle() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let outcome = at(&path);
    // It comes as far as the kernel, which is none, and the socket is gone at the end.
    refuses(outcome, &["/dev/null"]);
    assert!(!path.exists());
}

#[test]
fn lists_that_make_no_sense() {
    for (list, word) in [
        ("cid=3", "missing field `uds_path`"),
        ("path=/tmp/x,cid=2", "CID 2"),
        ("path=/tmp/x,cid=4294967295", "CID 4294967295"),
        ("path=/tmp/x,port=5", "unknown field `port`"),
    ] {
        let outcome = with_vsock(list).exits(125);
        assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:#?}");
    }
}
