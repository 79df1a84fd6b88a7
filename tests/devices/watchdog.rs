//! The watchdog.

use crate::common::Bulle;
use crate::refuses;

fn with_watchdog(list: &str) -> crate::common::Outcome {
    let list = format!("--watchdog={list}");
    let run = Bulle::run().args(["--root", "none", "--kernel", "/dev/null"]);
    run.arg(list).outcome()
}

#[test]
fn times_that_cannot_be() {
    refuses(with_watchdog("timeout=10ms"), &["10ms", "1s to 24h"]);
    refuses(with_watchdog("timeout=25h"), &["1day 1h", "1s to 24h"]);
    refuses(
        with_watchdog("timeout=2s,min=3s"),
        &["3s", "2s", "min=TIME"],
    );
    refuses(with_watchdog("min=0s"), &["min=TIME"]);
}

#[test]
fn lists_that_make_no_sense() {
    for (list, word) in [
        ("timeout=30", "is not a time"),
        ("action=shout", "unknown variant `shout`"),
        ("speed=9", "unknown field `speed`"),
    ] {
        let outcome = with_watchdog(list).exits(125);
        assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:#?}");
    }
}
