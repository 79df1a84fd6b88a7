//! Shared directories.

use std::fs;
use std::path::Path;

use crate::common::{Bulle, Outcome};
use crate::refuses;

fn with_shares(shares: &[&str]) -> Outcome {
    let mut bulle = Bulle::run().args(["--kernel", "/dev/null"]);
    for share in shares {
        bulle = bulle.args(["--share", share]);
    }
    bulle.command(["true"]).outcome()
}

fn at(path: &Path, rest: &str) -> String {
    format!("{}:{rest}", path.display())
}

#[test]
fn what_is_no_directory_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let missing = at(&dir.path().join("missing"), "/x");
    refuses(with_shares(&[&missing]), &["/missing", "No such file"]);
    refuses(
        with_shares(&[&at(&file, "/x")]),
        &["/file", "Not a directory"],
    );
    refuses(
        with_shares(&["/proc:/x"]),
        &["/proc", "filesystem of the kernel"],
    );
    refuses(
        with_shares(&["/sys/kernel:/x:ro"]),
        &["/sys/kernel", "of the kernel"],
    );
    let root = |path: &str| Bulle::run().args(["--kernel", "/dev/null", "--root", path]);
    refuses(
        root("/proc").command(["true"]).outcome(),
        &["/proc", "of the kernel"],
    );
}

#[test]
fn places_in_the_guest() {
    refuses(with_shares(&["/tmp:x"]), &["'x'", "absolute path"]);
    refuses(with_shares(&["/tmp:/a/../b"]), &["'/a/../b'", "'..'"]);
    refuses(with_shares(&["/tmp:/dev/x"]), &["/dev is the guest's own"]);
    refuses(with_shares(&["/tmp:/"]), &["mounted on '/'", "--root DIR"]);
    let twice = ["/tmp:/x", "/usr:/x/"];
    refuses(with_shares(&twice), &["'share0' and 'share1'", "'/x/'"]);
    let same = ["/tmp:/x:tag=a", "/usr:/y:ro,tag=a"];
    refuses(with_shares(&same), &["the tag 'a'", "its own"]);
    let none = Bulle::run().args(["--kernel", "/dev/null", "--root", "none"]);
    let none = none.args(["--share", "/tmp:/x"]).outcome();
    refuses(none, &["'share0'", "no agent", "tag=NAME"]);
}

#[test]
fn shares_that_make_no_sense() {
    let bad = |share: &str, word: &str| {
        let outcome = with_shares(&[share]).exits(125);
        assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:#?}");
    };
    bad("/tmp", "write HOST:GUEST");
    bad("/tmp:/x:rx", "unknown field `rx`");
    bad("/tmp:/x:ownership=me", "unknown variant `me`");
}
