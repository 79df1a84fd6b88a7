//! Balloon, pmem and hot-pluggable memory.

use std::fs::{self, File};

use crate::common::{Bulle, Outcome};
use crate::refuses;

fn with(options: &[&str]) -> Outcome {
    let bulle = Bulle::run().args(["--root", "none", "--kernel", "/dev/null"]);
    bulle.args(options).outcome()
}

#[test]
fn balloons_that_cannot_be() {
    let large = ["--memory", "1G", "--balloon", "size=1G"];
    refuses(with(&large), &["1024 MiB leaves nothing", "smaller size"]);
    with(&["--balloon", "size=big"])
        .exits(125)
        .complains("'big' is not a size");
    with(&["--balloon", "stats=often"])
        .exits(125)
        .complains("'often' is not a number of seconds");
}

#[test]
fn files_that_cannot_be_persistent_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let list = |more: &str| format!("path={}{more}", path.display());
    refuses(with(&["--pmem", &list("")]), &["open", "No such file"]);
    fs::write(&path, "").unwrap();
    refuses(with(&["--pmem", &list("")]), &["has 0 bytes", "truncate"]);
    fs::write(&path, "x").unwrap();
    let directory = format!("path={}", dir.path().display());
    refuses(with(&["--pmem", &directory]), &["not a regular file"]);
    let twice = ["--pmem", &list(",id=a"), "--pmem", &list(",id=b")];
    refuses(with(&twice), &["in use by process", "only read it"]);
    let same = ["--pmem", &list(",id=a"), "--pmem", &list(",id=a")];
    refuses(with(&same), &["two pmem devices", "'a'"]);
    refuses(with(&["--pmem", &list(",id=a b")]), &["'a b'"]);
    let roots = ["--pmem", &list(",id=a,root"), "--pmem", &list(",id=b,root")];
    refuses(with(&roots), &["'a' and 'b'", "root device"]);
    // As large as a file may be, and too large for a processor.
    File::create(&path).unwrap().set_len(1 << 43).unwrap();
    let outcome = with(&["--pmem", &list(",ro")]).exits(125);
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:#?}");
}

#[test]
fn memory_that_cannot_be_plugged() {
    let bad = |list: &str, words: &[&str]| refuses(with(&["--hotplug-memory", list]), words);
    bad("total=0", &["0 MiB of hot-pluggable memory", "128 MiB"]);
    bad("total=100M", &["100 MiB", "multiple of 128 MiB"]);
    bad("total=2T", &["up to 1T"]);
    bad(
        "total=1G,block=3M",
        &["blocks of 3 MiB", "power of two from 2 MiB"],
    );
    bad(
        "total=1G,slot=64M",
        &["slot size of 64 MiB", "from 128 MiB"],
    );
    bad("total=1G,requested=2G", &["2048 MiB", "up to 1024 MiB"]);
    bad("total=1G,requested=3M", &["3 MiB", "multiple of 2 MiB"]);
    let huge = [
        "--huge-pages",
        "1G",
        "--memory",
        "1G",
        "--hotplug-memory",
        "total=1G",
    ];
    refuses(with(&huge), &["blocks of 2 MiB", "from 1024 MiB on"]);
    with(&["--hotplug-memory", "block=2M"])
        .exits(125)
        .complains("missing field `total_size_mib`");
}
