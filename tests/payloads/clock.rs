//! The virtio clock device under a bare-metal guest, on both transports.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::common::Bulle;

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_nanos() as u64
}

#[test]
fn clocks_are_the_hosts_and_the_counter_is_the_guests() {
    for transport in [&[][..], &["--pci"]] {
        for (list, kind) in [("--rtc", 4), ("--rtc=leap=noon-linear", 0x103)] {
            let before = now();
            let clock = Bulle::payload("virtio_rtc").arg(list).args(transport);
            let outcome = clock.outcome().exits(0);
            assert_eq!(outcome.value("clocks"), "2");
            assert_eq!(outcome.value("type 0"), format!("{kind:#x}"));
            assert_eq!(outcome.value("type 1"), "0x2");
            let utc: u64 = outcome.value("utc").parse().unwrap();
            assert!((before..=now()).contains(&utc), "{outcome:#?}");
            // A KVM that does not say how far the guest's counter is from the host's (before Linux
            // 5.16) leaves readings with it out.
            let crosses = outcome.value("crosses") == "1";
            let last = outcome.stdout.lines().last();
            let expected = if crosses {
                "between true"
            } else {
                "not crossed"
            };
            assert_eq!(last, Some(expected), "{outcome:#?}");
        }
    }
}

#[test]
fn there_is_no_clock_unless_asked_for() {
    let outcome = Bulle::payload("virtio_rtc").outcome().exits(2);
    assert_eq!(outcome.stdout, "no clock\n");
}
