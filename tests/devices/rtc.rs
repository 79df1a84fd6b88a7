//! The clock device.

use crate::common::Bulle;

#[test]
fn lists_that_make_no_sense() {
    for (list, word) in [
        ("leap=second", "unknown variant `second`"),
        ("zone=utc", "unknown field `zone`"),
    ] {
        let run = Bulle::run().args(["--root", "none", "--kernel", "/dev/null"]);
        let outcome = run.arg(format!("--rtc={list}")).outcome().exits(125);
        assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:#?}");
    }
}
