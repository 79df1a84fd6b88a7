//! The watchdog with Debian's own driver (`wdat_wdt`), on both transports.

use std::time::Duration;

use crate::common::{Bulle, debian_kernel};

/// Generous, for the lab.
const PATIENCE: Duration = Duration::from_secs(150);

/// Feeding keeps the guest alive, closing with 'V' stops the watch, and a feeder that hangs ends the
/// VM with the code for that.
fn watched(flavour: &str, more: &[&str]) {
    let script = "cd /sys/class/watchdog/watchdog0
        echo identity $(cat identity)
        echo at first $(cat state)
        watchdog -t 1 -T 4 /dev/watchdog; sleep 9
        echo fed $(cat state) $(cat timeout)
        kill $(pidof watchdog); sleep 7
        echo closed $(cat state)
        watchdog -t 1 -T 4 /dev/watchdog; sleep 1
        kill -STOP $(pidof watchdog); echo starving
        sleep 100; echo still alive";
    let outcome = Bulle::run()
        .patience(PATIENCE)
        .timeout("140s")
        .arg("--kernel")
        .arg(debian_kernel(flavour))
        .args(["--watchdog=timeout=1m", "--entropy"])
        .args(more)
        .command(["sh", "-ec", script])
        .outcome()
        .exits(120);
    assert_eq!(outcome.value("identity"), "wdat_wdt");
    assert_eq!(outcome.value("at first"), "inactive");
    assert_eq!(outcome.value("fed"), "active 4");
    assert_eq!(outcome.value("closed"), "inactive");
    assert!(outcome.stdout.ends_with("starving\n"), "{outcome:#?}");
    outcome.complains("did not feed its watchdog");
}

#[test]
fn watched_beside_mmio_amd64() {
    watched("amd64", &[]);
}

#[test]
fn watched_beside_pci_cloud() {
    watched("cloud-amd64", &["--pci"]);
}

#[test]
fn an_interrupt_that_cannot_be_masked_makes_a_kernel_panic_that_is_told_to() {
    // A stopped program does not feed, and the kernel does not feed for it.
    let script = "sysctl -w kernel.unknown_nmi_panic=1 kernel.panic=-1
        watchdog -t 1 -T 3 /dev/watchdog; sleep 1; kill -STOP $(pidof watchdog)
        sleep 100";
    for irqchip in ["split", "kernel"] {
        let outcome = Bulle::run()
            .patience(PATIENCE)
            .timeout("140s")
            .arg("--kernel")
            .arg(debian_kernel("cloud-amd64"))
            .args(["--watchdog=action=nmi", "--irqchip", irqchip])
            .command(["sh", "-ec", script])
            .outcome();
        outcome.exits(121).complains("did not feed its watchdog");
    }
}
