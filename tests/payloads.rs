//! Bare-metal guests on this machine's /dev/kvm: what `bulle run` prints and how it ends.
//!
//! Not part of a plain `cargo test`, since they need KVM: `cargo test --test payloads`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "payloads/clock.rs"]
mod clock;
mod common;
#[path = "payloads/disks.rs"]
mod disks;
#[path = "payloads/many.rs"]
mod many;
#[path = "payloads/memory.rs"]
mod memory;
#[path = "payloads/messages.rs"]
mod messages;
#[path = "payloads/passt.rs"]
mod passt;
#[path = "payloads/vhost_user.rs"]
mod vhost_user;
#[path = "payloads/watchdog.rs"]
mod watchdog;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Bulle, Input};
use nix::sys::signal::Signal;

const IRQCHIPS: [&str; 2] = ["split", "kernel"];
/// Less than its time limit, and more than a busy machine takes.
const SOON: Duration = Duration::from_secs(60);

#[test]
fn hello_prints_and_ends_with_its_code() {
    for irqchip in IRQCHIPS {
        let hello = Bulle::payload("hello")
            .args(["--irqchip", irqchip])
            .outcome()
            .exits(7);
        assert_eq!(hello.stdout, "hello from the guest\n");
        assert_eq!(hello.stderr, "");
    }
}

#[test]
fn every_exit_code_passes() {
    for code in [0, 1, 37, 124, 255] {
        let append = format!("exit={code}");
        let outcome = Bulle::payload("exit_code")
            .args(["--append", &append])
            .outcome();
        outcome.exits(code).prints(&append);
    }
}

#[test]
fn the_memory_map_is_all_of_the_memory() {
    for (memory, mib) in [
        ("32M", 32),
        ("128M", 128),
        ("3G", 3072),
        ("3200M", 3200),
        ("5G", 5120),
    ] {
        let map = Bulle::payload("memory_map")
            .args(["--memory", memory])
            .outcome()
            .exits(0);
        let total = map
            .value("RAM")
            .split(' ')
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap();
        // The legacy hole between 639 KiB and 1 MiB is not RAM.
        let wanted = mib * 1024 - 1024..=mib * 1024;
        assert!(
            wanted.contains(&total),
            "{memory} gave {total} KiB: {}",
            map.stdout
        );
        let high = map.stdout.contains("0x100000000..");
        assert_eq!(high, mib > 3072, "{memory}: {}", map.stdout);
        assert!(
            !map.stdout.contains("0x1000..0x100000000 "),
            "{}",
            map.stdout
        );
    }
}

#[test]
fn cpuid_names_kvm() {
    let one = Bulle::payload("cpuid")
        .args(["--cpus", "1"])
        .outcome()
        .exits(0);
    assert_eq!(one.value("hypervisor bit"), "1");
    assert!(
        one.stdout.contains("hypervisor KVMKVMKVM\n"),
        "{}",
        one.stdout
    );
    assert_eq!(one.value("logical processors"), "1");
    assert_eq!(processors(&one.stdout).len(), 1);
}

/// The `processor` lines of the cpuid payload: APIC id, x2APIC id, threads, shift, package, shift.
fn processors(stdout: &str) -> Vec<[u32; 6]> {
    let lines = stdout.lines().filter(|l| l.starts_with("processor "));
    let numbers = lines.map(|l| {
        let all: Vec<u32> = l.split(' ').filter_map(|word| word.parse().ok()).collect();
        all.try_into().unwrap_or_else(|_| panic!("{l}"))
    });
    numbers.collect()
}

#[test]
fn each_processor_sees_its_place_in_one_package() {
    for cpus in [1u32, 4, 64] {
        let count = cpus.to_string();
        let cpuid = Bulle::payload("cpuid")
            .args(["--cpus", &count])
            .outcome()
            .exits(0);
        let mut seen = processors(&cpuid.stdout);
        seen.sort_unstable();
        assert_eq!(seen.len(), cpus as usize, "{}", cpuid.stdout);
        for (id, [apic, x2apic, threads, thread_shift, package, shift]) in (0..).zip(seen) {
            assert_eq!((apic, x2apic), (id, id), "{}", cpuid.stdout);
            assert!(
                thread_shift <= shift && threads <= package,
                "{}",
                cpuid.stdout
            );
            assert_eq!(package, cpus, "{}", cpuid.stdout);
            assert_eq!(x2apic >> shift, 0, "all in one package: {}", cpuid.stdout);
        }
    }
}

#[test]
fn all_processors_start() {
    for (cpus, irqchip) in [
        (1, "split"),
        (4, "split"),
        (4, "kernel"),
        (64, "split"),
        (64, "kernel"),
    ] {
        let count = cpus.to_string();
        let smp = Bulle::payload("smp")
            .args(["--cpus", &count, "--irqchip", irqchip])
            .outcome();
        smp.exits(0)
            .prints(&format!("{cpus} listed, {cpus} running, {cpus} distinct"));
    }
}

#[test]
fn ports_and_mmio_answer_in_every_width() {
    for irqchip in IRQCHIPS {
        let io = Bulle::payload("mmio_pio")
            .args(["--irqchip", irqchip])
            .outcome()
            .exits(0);
        assert!(!io.stdout.contains("WRONG"), "{}", io.stdout);
        assert_eq!(io.stdout.matches(": ok\n").count(), 13, "{}", io.stdout);
    }
}

#[test]
fn a_triple_fault_has_its_own_code_and_a_report() {
    let fault = Bulle::payload("triple_fault")
        .outcome()
        .exits(122)
        .within(SOON);
    let fault = fault.prints("about to fault\n").complains("triple fault");
    assert!(
        fault.stderr.to_lowercase().contains("rip"),
        "registers: {}",
        fault.stderr
    );
}

#[test]
fn a_guest_that_never_ends_meets_its_timeout() {
    for payload in ["hlt_forever", "hlt_interruptible", "spin_forever"] {
        for irqchip in IRQCHIPS {
            let bulle = Bulle::payload(payload)
                .args(["--irqchip", irqchip])
                .timeout("300ms");
            let outcome = bulle.outcome().exits(124);
            assert!(outcome.elapsed >= Duration::from_millis(300), "{outcome:?}");
            outcome.within(SOON);
        }
    }
}

#[test]
fn signals_end_it() {
    for payload in ["hlt_forever", "hlt_interruptible", "spin_forever"] {
        let start = || {
            Bulle::payload(payload)
                .input(Input::Open)
                .start()
                .wait_for_output()
        };
        start()
            .signal(Signal::SIGINT)
            .finish()
            .exits(130)
            .within(SOON);
        // The second one does not wait for the guest to switch itself off, which the first does for 5 s. Both are
        // one if they meet.
        let at_once = (0..5).any(|_| {
            let mut running = start().signal(Signal::SIGTERM);
            let begin = Instant::now();
            std::thread::sleep(Duration::from_millis(100));
            running = running.signal(Signal::SIGTERM);
            running.finish().exits(143);
            begin.elapsed() < Duration::from_secs(5)
        });
        assert!(at_once, "{payload} is waited for");
    }
}

#[test]
fn sigterm_ends_a_guest_that_ignores_the_power_button() {
    let running = Bulle::payload("hlt_forever")
        .input(Input::Open)
        .start()
        .wait_for_output();
    running.signal(Signal::SIGTERM).finish().exits(143);
}

#[test]
fn the_console_loses_nothing() {
    // A megabyte is a million exits, which a busy machine takes its time for.
    let flood = Bulle::payload("console_flood").timeout("200s");
    let flood = flood.patience(Duration::from_secs(210)).outcome().exits(0);
    let (text, checksum) = flood.stdout.split_at(1 << 20);
    let fnv1a = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    assert_eq!(checksum.trim_end(), format!("fnv1a {fnv1a:016x}"));
}

#[test]
fn the_console_goes_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("console");
    let console = format!("file={}", file.display());
    let hello = Bulle::payload("hello")
        .args(["--console", &console])
        .outcome()
        .exits(7);
    assert_eq!(hello.stdout, "");
    assert_eq!(
        std::fs::read_to_string(file).unwrap(),
        "hello from the guest\n"
    );
    let hello = Bulle::payload("hello")
        .args(["--console", "off"])
        .outcome()
        .exits(7);
    assert_eq!(hello.stdout, "");
}

#[test]
fn input_reaches_the_guest() {
    let short = Input::Bytes(b"abc def\n".to_vec());
    let echo = Bulle::payload("serial_echo")
        .input(short)
        .outcome()
        .exits(0);
    assert_eq!(echo.stdout, "ready\nabc def\n7 bytes\n");
    // More than any FIFO holds: the guest must lose nothing though it reads a byte at a time.
    let mut long = vec![b'x'; 20_000];
    long.push(b'\n');
    let echo = Bulle::payload("serial_echo")
        .input(Input::Bytes(long))
        .outcome()
        .exits(0);
    echo.prints("\n20000 bytes\n");
}

#[test]
fn the_end_of_input_does_not_end_the_guest_nor_spin() {
    for input in [Input::Null, Input::Bytes(Vec::new())] {
        let running = Bulle::payload("hlt_forever")
            .input(input)
            .start()
            .wait_for("halted\n");
        let before = running.cpu_time();
        std::thread::sleep(Duration::from_millis(700));
        let used = running.cpu_time() - before;
        // It is still there to be interrupted.
        running.signal(Signal::SIGINT).finish().exits(130);
        assert!(
            used < Duration::from_millis(300),
            "{used:?} of processor time"
        );
    }
}

#[test]
fn acpi_tables_are_whole() {
    for cpus in ["1", "64"] {
        let acpi = Bulle::payload("acpi")
            .args(["--cpus", cpus])
            .outcome()
            .exits(0);
        let acpi = acpi
            .prints("RSDP revision 2 ok\n")
            .prints(&format!("{cpus} processors\n"));
        for table in ["XSDT", "FACP", "DSDT", "APIC"] {
            let good = acpi
                .stdout
                .lines()
                .any(|l| l.starts_with(table) && l.ends_with(" ok"));
            assert!(good, "{table}: {}", acpi.stdout);
        }
    }
}

/// Seconds since 1970 of `YYYY-MM-DDTHH:MM:SSZ`.
fn seconds(text: &str) -> i64 {
    let numbers: Vec<i64> = text
        .trim()
        .split(['-', 'T', ':', 'Z'])
        .flat_map(str::parse)
        .collect();
    let [year, month, day, hours, minutes, seconds] = numbers[..] else {
        panic!("not a time: {text}")
    };
    // Days from the civil calendar, March first.
    let (y, m) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    ((days * 24 + hours) * 60 + minutes) * 60 + seconds
}

#[test]
fn the_clock_is_right() {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs() as i64
    };
    let before = now();
    let rtc = Bulle::payload("rtc").outcome().exits(0);
    let guest = seconds(&rtc.stdout);
    assert!(
        (before - 1..=now() + 1).contains(&guest),
        "{} at {before}",
        rtc.stdout
    );
}

#[test]
fn the_timer_interrupts_a_halted_processor() {
    for irqchip in IRQCHIPS {
        let timer = Bulle::payload("timer")
            .args(["--irqchip", irqchip])
            .outcome();
        timer.exits(0).prints("10 ticks\n").within(SOON);
    }
}

#[test]
fn a_panic_is_seen_at_once() {
    Bulle::payload("pvpanic").outcome().exits(121).within(SOON);
}

#[test]
fn power_off_and_resets_end_it_well() {
    for payload in ["poweroff", "reset", "i8042_reset"] {
        Bulle::payload(payload).outcome().exits(0).within(SOON);
    }
}

#[test]
fn the_resolved_configuration_runs_again() {
    let args = ["--print-config", "--append", "exit=9", "--memory", "64M"];
    let printed = Bulle::payload("exit_code").args(args).outcome().exits(0);
    let json: serde_json::Value = serde_json::from_str(&printed.stdout).unwrap();
    assert!(json.is_object(), "{json}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &printed.stdout).unwrap();
    let again = Bulle::run().arg("--config").arg(file.path()).outcome();
    again.exits(9).prints("exit=9");
}

#[test]
fn two_at_once_do_not_meet() {
    let first = Bulle::payload("hlt_forever")
        .input(Input::Open)
        .start()
        .wait_for_output();
    Bulle::payload("hello").outcome().exits(7);
    first.signal(Signal::SIGINT).finish().exits(130);
}

/// `hello` with `count` disks, on KVM.
fn hello_with_disks(count: usize, more: &[&str]) -> common::Outcome {
    let dir = tempfile::tempdir().unwrap();
    let mut hello = Bulle::payload("hello").args(more);
    for n in 0..count {
        let path = dir.path().join(n.to_string());
        std::fs::write(&path, [0; 512]).unwrap();
        hello = hello.arg("--disk").arg(format!("path={}", path.display()));
    }
    hello.outcome()
}

#[test]
fn as_many_disks_as_the_transport_holds() {
    for irqchip in IRQCHIPS {
        let outcome = hello_with_disks(17, &["--irqchip", irqchip]).exits(7);
        assert_eq!(outcome.stderr, "");
        hello_with_disks(31, &["--pci", "--irqchip", irqchip]).exits(7);
    }
}

#[test]
fn a_disk_serves_a_driver_and_survives_a_hostile_one() {
    for options in [["--irqchip", "split"], ["--irqchip", "kernel"]] {
        for engine in ["io_uring", "sync"] {
            let dir = tempfile::tempdir().unwrap();
            let image = dir.path().join("disk");
            std::fs::write(&image, [7; 4096]).unwrap();
            let disk = format!("path={},engine={engine}", image.display());
            let outcome = Bulle::payload("virtio_disk")
                .args(options)
                .args(["--append", "reads=1000 attack=1", "--disk", &disk])
                .outcome()
                .exits(0)
                .within(SOON);
            let lines = "status 15\nsectors 8\nsane true\nbeyond the end 1\nreads true\n\
                         after the attack true\n";
            assert_eq!(outcome.stdout, lines, "{outcome:#?}");
            let image = std::fs::read(&image).unwrap();
            let expected: Vec<u8> = [vec![7; 512], vec![0xa5; 512], vec![7; 3072]].concat();
            assert!(image == expected, "only sector 1 was written");
        }
    }
}
