//! The watchdog under a bare-metal guest that reads its ACPI table, in real time.

use std::time::Duration;

use crate::IRQCHIPS;
use crate::common::{Bulle, Outcome};

fn run(watchdog: &str, append: &str) -> Outcome {
    let payload = Bulle::payload("watchdog").arg(watchdog);
    payload.args(["--append", append]).outcome()
}

#[test]
fn a_guest_that_does_not_feed_ends_with_a_code_of_its_own() {
    for irqchip in IRQCHIPS {
        let outcome = Bulle::payload("watchdog")
            .args(["--watchdog", "--irqchip", irqchip, "--append", "count=5"])
            .outcome()
            .exits(120);
        assert!(
            outcome.elapsed >= Duration::from_millis(500),
            "{outcome:#?}"
        );
        assert_eq!(outcome.stdout, "running 0\nrunning 1\n");
        outcome.complains("did not feed its watchdog");
    }
}

#[test]
fn feeding_keeps_a_guest_alive_and_stopping_ends_the_watch() {
    let outcome = run("--watchdog", "count=30 after=5 feeds=8 stop=1").exits(9);
    let fed = outcome
        .stdout
        .lines()
        .filter(|line| line.starts_with("fed "));
    assert!(
        fed.clone().all(|line| line.ends_with("left 30")),
        "{outcome:#?}"
    );
    assert_eq!(fed.count(), 8);
    assert!(outcome.stdout.ends_with("running 0\n"), "{outcome:#?}");
    // Eight times 0.5 s, although 3 s without feeding are the end.
    assert!(
        outcome.elapsed >= Duration::from_millis(3500),
        "{outcome:#?}"
    );
    let fed_first = run("--watchdog", "count=20 after=2 feeds=3").exits(120);
    assert_eq!(fed_first.stdout.lines().count(), 5, "{fed_first:#?}");
}

#[test]
fn the_longest_time_and_the_action_are_the_hosts() {
    // The guest asks for a day.
    run("--watchdog=timeout=1s", "count=864000").exits(120);
    // A payload is no command: resets and power-offs are successful ends.
    for action in ["reset", "poweroff"] {
        let outcome = run(&format!("--watchdog=action={action}"), "count=1").exits(0);
        assert!(!outcome.stderr.contains("watchdog"), "{outcome:#?}");
    }
    let outcome = run("--watchdog=action=log", "count=2 expires=2").exits(9);
    let told = outcome.stderr.matches("did not feed its watchdog").count();
    assert!((2..=16).contains(&told), "{outcome:#?}");
}

#[test]
fn there_is_no_watchdog_unless_asked_for() {
    let outcome = Bulle::payload("watchdog").outcome().exits(2);
    assert_eq!(outcome.stdout, "no WDAT\n");
}
