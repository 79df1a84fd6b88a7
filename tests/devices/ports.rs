//! Named ports and hvc0 of the virtio console.

use std::fs;
use std::os::unix::net::UnixListener;

use crate::common::{Bulle, Outcome};
use crate::refuses;

fn with(options: &[&str]) -> Outcome {
    let bulle = Bulle::run().args(["--root", "none", "--kernel", "/dev/null"]);
    bulle.args(options).outcome()
}

fn port(text: &str) -> Outcome {
    with(&["--port", text])
}

#[test]
fn ends_that_cannot_be_had() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    refuses(port("a=file:/no/such/file"), &["/no/such/file", "port 'a'"]);
    refuses(
        with(&["--console", "hvc0=/no/file"]),
        &["/no/file", "the console"],
    );
    refuses(port(&format!("a=file:{}", path(""))), &["directory"]);
    fs::write(path("file"), "x").unwrap();
    refuses(
        port(&format!("a=socket:{}", path("file"))),
        &["port 'a'", "no socket"],
    );
    let _held = UnixListener::bind(path("taken")).unwrap();
    refuses(
        port(&format!("a=socket:{}", path("taken"))),
        &["taken", "in use"],
    );
    // Two ports on one path.
    let both = format!("b=socket:{}", path("s"));
    let twice = [
        "--port",
        &format!("a=socket:{}", path("s")),
        "--port",
        &both,
    ];
    refuses(with(&twice), &["port 'b'", "in use"]);
    assert!(!dir.path().join("s").exists());
}

#[test]
fn names_and_lists_that_make_no_sense() {
    refuses(
        port("bulle.agent=file:/x"),
        &["'bulle.agent'", "cannot be used"],
    );
    refuses(port("a/b=file:/x"), &["'a/b'"]);
    refuses(
        with(&["--port", "a=file:/x", "--port", "a=file:/y"]),
        &["each name once"],
    );
    for text in ["a", "a=", "a=file:", "a=pipe:/x", "a=/x"] {
        let outcome = port(text).exits(125);
        assert!(outcome.stderr.contains("NAME=socket:PATH"), "{outcome:#?}");
    }
}
