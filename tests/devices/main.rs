//! Devices that cannot be had: one clear error each, before KVM is even opened.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod disks;
mod memory;
mod net;
mod ports;
mod rtc;
mod shares;
mod vsock;
mod watchdog;

use common::Outcome;

/// One line on stderr that has all of `words`.
fn refuses(outcome: Outcome, words: &[&str]) {
    let outcome = outcome.exits(125);
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:#?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:#?}");
    }
}
