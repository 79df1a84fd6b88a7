//! Disks.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use devices::virtio::vhost_user::peer::{Fault, Peer, PeerOptions, request};

use crate::common::{Bulle, Outcome};
use crate::refuses;

fn with_disks(lists: &[String]) -> Outcome {
    let mut bulle = Bulle::run().args(["--root", "none", "--kernel", "/dev/null"]);
    for list in lists {
        bulle = bulle.arg("--disk").arg(list);
    }
    bulle.outcome()
}

fn list(path: &Path, more: &str) -> String {
    format!("path={}{more}", path.display())
}

#[test]
fn files_that_are_no_disks() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd");
    fs::write(&odd, [0; 513]).unwrap();
    let missing = dir.path().join("missing");
    refuses(
        with_disks(&[list(&missing, "")]),
        &["missing", "No such file"],
    );
    refuses(
        with_disks(&[list(dir.path(), "")]),
        &["neither a regular file nor a block device"],
    );
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [Path::new("/dev/zero"), &pipe] {
        let name = path.to_str().unwrap();
        refuses(with_disks(&[list(path, "")]), &[name, "neither"]);
        refuses(with_disks(&[list(path, ",ro")]), &[name, "neither"]);
    }
    refuses(with_disks(&[list(&socket, "")]), &["socket", "neither"]);
    refuses(with_disks(&[list(&odd, "")]), &["513 bytes", "truncate"]);
    refuses(
        with_disks(&[list(&odd, ",logical_block_size=1000")]),
        &["1000 (logical)"],
    );
}

/// Takes an open file description lock, as other monitors do.
fn lock(file: &File) {
    let range = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `range` is a valid flock to read.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &range) };
    assert_eq!(result, 0);
}

#[test]
fn a_disk_in_use_names_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, [0; 4096]).unwrap();
    let held = File::options().read(true).write(true).open(&path).unwrap();
    lock(&held);
    let holder = format!("process {} (", std::process::id());
    for options in ["", ",ro"] {
        refuses(with_disks(&[list(&path, options)]), &["in use by", &holder]);
    }
    drop(held);
    // The same disk twice, under whatever name.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("disk", &link).unwrap();
    for options in ["", ",ro"] {
        let twice = [
            list(&path, ",id=a"),
            list(&link, &format!(",id=b{options}")),
        ];
        refuses(
            with_disks(&twice),
            &["'a' and 'b' are the same disk", "link", "ro to both"],
        );
    }
    let readers = [list(&path, ",ro,id=a"), list(&link, ",ro,id=b")];
    let outcome = with_disks(&readers).exits(125);
    assert!(
        outcome.stderr.contains("/dev/null"),
        "only the kernel is wrong: {outcome:#?}"
    );
}

#[test]
fn more_disks_than_the_transport_holds() {
    let dir = tempfile::tempdir().unwrap();
    let lists: Vec<_> = (0..32).map(|n| dir.path().join(n.to_string())).collect();
    lists
        .iter()
        .for_each(|path| fs::write(path, [0; 512]).unwrap());
    let lists: Vec<_> = lists.iter().map(|path| list(path, "")).collect();
    let words = ["18 virtio devices", "17 interrupt lines", "--pci"];
    refuses(with_disks(&lists[..18]), &words);
    let pci = Bulle::run().args(["--root", "none", "--kernel", "/dev/null", "--pci"]);
    let pci = lists
        .iter()
        .fold(pci, |bulle, list| bulle.arg("--disk").arg(list));
    refuses(
        pci.outcome(),
        &["32 virtio devices", "31 slots of the PCI bus"],
    );
}

#[test]
fn groups_of_limits_that_make_no_sense() {
    let lists = |first: &str, second: &str| {
        let list = |id: &str, more: &str| format!("path=/x,id={id},{more}");
        with_disks(&[list("a", first), list("b", second)])
    };
    let (one, two) = (
        "rate.group=g,rate.ops.size=1",
        "rate.group=g,rate.ops.size=2",
    );
    refuses(lists(one, two), &["'a' and 'b'", "different limits", "'g'"]);
    refuses(
        lists("ro", "rate.group=h"),
        &["'b'", "'h'", "bandwidth or ops"],
    );
}

#[test]
fn lists_that_make_no_sense() {
    let bad = |text: &str, words: &[&str]| {
        let outcome = with_disks(&[text.to_string()]).exits(125);
        for word in words {
            assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:#?}");
        }
    };
    bad("path=/x,speed=9", &["unknown field `speed`", "cache_type"]);
    bad("ro", &["either path_on_host"]);
    bad("path=/x,cache=fast", &["unknown variant `fast`"]);
    let same = ["path=/x,id=a".to_string(), "path=/y,id=a".to_string()];
    refuses(with_disks(&same), &["'a' and 'a'", "own id"]);
}

#[test]
fn a_root_image_that_is_not_there() {
    let words = ["--kernel", "/dev/null", "--root", "/no/image"].map(OsString::from);
    let outcome = Bulle::run().args(words).command(["true"]).outcome();
    refuses(outcome, &["/no/image", "No such file"]);
}

/// A directory with a backend that listens at `s` in it.
fn backend(options: PeerOptions) -> (tempfile::TempDir, Peer) {
    let dir = tempfile::tempdir().unwrap();
    let peer = Peer::start(&dir.path().join("s"), 8, options);
    (dir, peer)
}

#[test]
fn vhost_user_backends_that_are_none() {
    let (dir, peer) = backend(PeerOptions::default());
    let socket = format!("socket={}", dir.path().join("s").display());
    refuses(
        with_disks(&["socket=/nowhere".to_owned()]),
        &["'disk0'", "/nowhere", "start it first", "No such file"],
    );
    let both = format!("{socket},path=/dev/null");
    refuses(with_disks(&[both]), &["either path_on_host", "or socket"]);
    for (more, field) in [
        ("ro", "is_read_only"),
        ("cache=none", "cache_type"),
        ("engine=sync", "io_engine"),
        ("rate.ops.size=1", "rate_limiter"),
        ("logical_block_size=512", "logical_block_size"),
    ] {
        refuses(
            with_disks(&[format!("{socket},{more}")]),
            &["Invalid block config", field],
        );
    }
    refuses(
        with_disks(&[format!("{socket},queues=3")]),
        &["3 queues", "has 2"],
    );
    let plugged = Bulle::run().args(["--root", "none", "--kernel", "/dev/null"]);
    let plugged = plugged.args(["--disk", &socket, "--hotplug-memory", "total=1G"]);
    refuses(plugged.outcome(), &["'disk0'", "hot-pluggable memory"]);
    peer.set_fault(Some(Fault::Close(request::GET_CONFIG)));
    refuses(
        with_disks(std::slice::from_ref(&socket)),
        &["'disk0'", "tell the configuration space"],
    );
    drop(peer);
    refuses(with_disks(&[socket]), &["start it first", "refused"]);
    let (dir, _peer) = backend(PeerOptions {
        protocol: 1,
        ..PeerOptions::default()
    });
    let socket = format!("socket={}", dir.path().join("s").display());
    refuses(with_disks(&[socket]), &["VHOST_USER_PROTOCOL_F_CONFIG"]);
}
