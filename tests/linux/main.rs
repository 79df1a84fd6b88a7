//! Unmodified Debian kernels in `bulle run`: the stock one and the cloud one.
//!
//! They need VT-x or AMD-V. Where the processor has neither, `make test` runs this very binary in the
//! lab, in which a boot takes some five seconds; hence one boot checks several things where it can.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod api;
#[path = "../api/client.rs"]
mod client;
mod clients;
#[path = "../common/mod.rs"]
mod common;
mod console;
mod disks;
mod disks_fs;
mod generation;
mod hotplug;
mod machine;
mod manage;
mod memory;
mod mmds;
mod net;
mod ready;
#[path = "../api/served.rs"]
mod served;
mod shares;
mod snapshot;
#[path = "../common/state_file.rs"]
mod state_file;
mod vsock;
mod watchdog;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{Bulle, Input, Outcome, debian_kernel as kernel};
use nix::sys::signal::Signal;

/// Generous, for the lab: a boot there takes some five seconds alone and minutes beside others.
const PATIENCE: Duration = Duration::from_secs(300);

fn linux(flavour: &str) -> Bulle {
    let bulle = Bulle::run()
        .patience(PATIENCE)
        .timeout("290s")
        .arg("--kernel");
    bulle.arg(kernel(flavour))
}

/// `linux` with a shell script as the command.
fn shell(flavour: &str, options: &[&str], script: &str) -> Outcome {
    linux(flavour)
        .args(options)
        .command(["sh", "-c", script])
        .outcome()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// What a command sees, where its output goes, its exit code, the clock.
#[test]
fn amd64_on_one_processor() {
    let before = now();
    let script =
        "echo release $(uname -r); echo cpus $(nproc); echo time $(date +%s); echo cwd $(pwd);
        echo env $GREETING; echo pid1 $(cat /proc/1/comm); echo name $(uname -n);
        echo nets $(ls /sys/class/net); echo to stderr >&2; exit 37";
    let options = ["--env", "GREETING=hello there", "--cwd", "/proc"];
    let outcome = shell("amd64", &options, script).exits(37);
    let release = kernel("amd64")
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    assert_eq!(
        outcome.value("release"),
        release.trim_start_matches("vmlinuz-")
    );
    assert_eq!(outcome.value("cpus"), "1");
    assert_eq!(outcome.value("cwd"), "/proc");
    assert_eq!(outcome.value("env"), "hello there");
    assert_eq!(outcome.value("name"), "bulle");
    // Nobody asked for a network.
    assert_eq!(outcome.value("nets"), "lo");
    let time: u64 = outcome.value("time").parse().unwrap();
    assert!(
        (before - 1..=now() + 1).contains(&time),
        "{time}, host {before}..{}",
        now()
    );
    // Nothing but the command's own: no kernel messages, no carriage returns.
    assert_eq!(outcome.stdout.lines().count(), 8, "{outcome:#?}");
    assert_eq!(outcome.stderr, "to stderr\n");
    assert!(!outcome.stdout.contains('\r'), "{outcome:#?}");
}

/// Four processors, all online, in one package, and a kernel without complaints, except of what the
/// lab's emulated processor is at odds with itself about (the size of the XSAVE area).
#[test]
fn cloud_on_four_processors() {
    let script = "echo online $(cat /sys/devices/system/cpu/online);
        echo packages $(cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u);
        echo clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource);
        dmesg | sed '/XSAVE consistency problem/,/end trace/d' | grep -iE 'warning:|call trace|bug:|firmware error|acpi error' |
            grep -v hw-vuln || true";
    let outcome = shell("cloud-amd64", &["--cpus", "4"], script).exits(0);
    assert_eq!(outcome.value("online"), "0-3");
    assert_eq!(outcome.value("packages"), "0");
    assert!(
        ["kvm-clock", "tsc"].contains(&outcome.value("clock")),
        "{outcome:#?}"
    );
    assert_eq!(outcome.stdout.lines().count(), 3, "{outcome:#?}");
    assert_eq!(outcome.stderr, "");
}

#[test]
fn amd64_panic() {
    let script = "echo before; echo c > /proc/sysrq-trigger; sleep 100";
    let outcome = shell("amd64", &[], script).exits(121).prints("before\n");
    outcome
        .complains("sysrq triggered crash")
        .within(Duration::from_secs(90));
}

#[test]
fn timeout() {
    let bulle = linux("cloud-amd64").timeout("40s");
    let outcome = bulle
        .command(["sh", "-c", "echo started; sleep 1000"])
        .outcome()
        .exits(124)
        .prints("started\n");
    outcome.within(Duration::from_secs(45));
}

#[test]
fn an_interrupt_reaches_the_command() {
    let script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 1; done";
    let bulle = linux("cloud-amd64")
        .command(["sh", "-c", script])
        .input(Input::Open);
    let running = bulle.start().wait_for_output();
    running
        .signal(Signal::SIGINT)
        .finish()
        .exits(5)
        .prints("caught\n");
}

#[test]
fn a_reader_that_goes_away_ends_the_command() {
    let script = "\"$0\" run --timeout 290s --kernel \"$1\" -- yes | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}";
    let status = Command::new("bash")
        .args(["-c", script, env!("CARGO_BIN_EXE_bulle")])
        .arg(kernel("cloud-amd64"))
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(141));
}

#[test]
fn a_guest_without_the_second_uart_has_the_port() {
    let options = ["--append", "8250.nr_uarts=1"];
    shell("cloud-amd64", &options, "exit 9").exits(9);
}

#[test]
fn sigterm_switches_the_guest_off() {
    let bulle = linux("cloud-amd64").command(["sh", "-c", "echo ready; sleep 1000"]);
    let running = bulle.input(Input::Open).start().wait_for_output();
    running.signal(Signal::SIGTERM).finish().exits(143);
}

/// Runs a tool of this machine on `input`.
fn filter(tool: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{tool}: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}",
        output.status
    );
    output.stdout
}

#[test]
fn input_and_output_pass_unchanged() {
    // Every byte value, and more than any FIFO on the way holds. Each byte is an exit, so not more.
    let bytes: Vec<u8> = (0..8_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let script = "tee /tmp/copy | md5sum; wc -c </tmp/copy; seq 1 2000";
    let bulle = linux("cloud-amd64").command(["sh", "-c", script]);
    let outcome = bulle.input(Input::Bytes(bytes.clone())).outcome().exits(0);
    let digest = filter("md5sum", &[], &bytes);
    let numbers: String = (1..=2000).map(|n| format!("{n}\n")).collect();
    let wanted = format!("{}8000\n{numbers}", String::from_utf8(digest).unwrap());
    assert!(
        outcome.stdout == wanted,
        "{} bytes: {:.300}",
        outcome.stdout.len(),
        outcome.stdout
    );
}

/// A cpio archive of busybox, /init with `script`, and the directories it mounts on.
fn initrd(dir: &Path, script: &str) -> PathBuf {
    let root = dir.join("tree");
    for name in ["bin", "proc", "dev", "sys"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(busybox(), root.join("bin/busybox")).unwrap();
    fs::write(root.join("init"), format!("#!/bin/busybox sh\n{script}\n")).unwrap();
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let list = Command::new("sh")
        .args(["-c", "find . | busybox cpio -o -H newc 2>/dev/null"])
        .current_dir(&root)
        .output()
        .unwrap();
    assert!(
        list.status.success() && !list.stdout.is_empty(),
        "busybox cpio failed"
    );
    let file = dir.join("initrd.cpio");
    fs::write(&file, list.stdout).unwrap();
    file
}

fn busybox() -> PathBuf {
    let found = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find(|p| Path::new(p).exists());
    PathBuf::from(found.expect("apt-get install busybox-static"))
}

/// A root for commands with busybox and the guest tool, as a cpio archive.
fn tool_root(dir: &Path) -> PathBuf {
    let bin = dir.join("tree/bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy(common::guest_tool(), bin.join("guest-tool")).unwrap();
    symlink("busybox", bin.join("sh")).unwrap();
    initrd(dir, "")
}

#[test]
fn an_initrd_of_the_user() {
    let dir = tempfile::tempdir().unwrap();
    let script = "/bin/busybox mount -t devtmpfs none /dev
        /bin/busybox echo greetings from init > /dev/console
        /bin/busybox poweroff -f";
    let plain = initrd(dir.path(), script);
    let packed = dir.path().join("initrd.gz");
    fs::write(
        &packed,
        filter("gzip", &["-1c"], &fs::read(&plain).unwrap()),
    )
    .unwrap();
    let bulle = linux("cloud-amd64").args(["--root", "none", "--append", "console=ttyS0 quiet"]);
    let bulle = bulle.arg("--initrd").arg(packed);
    bulle.outcome().exits(0).prints("greetings from init");
}

#[test]
fn ctrl_alt_del_resets() {
    let dir = tempfile::tempdir().unwrap();
    let script = "/bin/busybox mount -t devtmpfs none /dev
        /bin/busybox echo ready for keys > /dev/console
        /bin/busybox sleep 1000";
    let file = initrd(dir.path(), script);
    let options = ["--root", "none", "--append", "console=ttyS0 loglevel=1"];
    let bulle = linux("amd64")
        .args(options)
        .arg("--initrd")
        .arg(file)
        .input(Input::Open);
    let running = bulle.start().wait_for("ready for keys");
    running
        .signal(Signal::SIGUSR2)
        .finish()
        .exits(0)
        .within(Duration::from_secs(90));
}

/// The ELF file inside a bzImage, unpacked with the tool that fits (boot protocol 2.08 and later).
fn vmlinux(bz_image: &Path, to: &Path) {
    let image = fs::read(bz_image).unwrap();
    let field = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    let start = (usize::from(image[0x1f1]) + 1) * 512 + field(0x248);
    // The last four bytes are the unpacked size, which is not part of the stream.
    let payload = &image[start..start + field(0x24c) - 4];
    let (tool, payload) = match payload {
        [0x1f, 0x8b, ..] => ("gzip", &image[start..start + field(0x24c)]),
        [0xfd, b'7', ..] => ("xz", payload),
        [0x28, 0xb5, ..] => ("zstd", payload),
        [0x02, 0x21, ..] => ("lz4", payload),
        other => panic!(
            "payload of {} starts with {:x?}",
            bz_image.display(),
            &other[..4]
        ),
    };
    fs::write(to, filter(tool, &["-dc"], payload)).unwrap();
}

#[test]
fn every_kernel_entry() {
    // PVH is what all other tests enter by.
    for entry in ["linux64", "bzimage"] {
        let outcome = shell(
            "amd64",
            &["--kernel-entry", entry],
            "echo up by $(uname -m)",
        );
        outcome.exits(0).prints("up by x86_64\n");
    }
}

#[test]
fn an_elf_kernel_by_both_entries() {
    let dir = tempfile::tempdir().unwrap();
    let elf = dir.path().join("vmlinux");
    vmlinux(&kernel("amd64"), &elf);
    for entry in ["pvh", "linux64"] {
        // The modules of an ELF file are found by its version, as those of the bzImage are.
        let bulle = Bulle::run()
            .patience(PATIENCE)
            .timeout("290s")
            .arg("--kernel");
        let bulle = bulle.arg(&elf).args(["--kernel-entry", entry]);
        bulle
            .command(["uname", "-s"])
            .outcome()
            .exits(0)
            .prints("Linux\n");
    }
}

#[test]
fn memory_above_four_gigabytes() {
    let script = "echo kib $(awk '/MemTotal/ { print $2 }' /proc/meminfo);
        echo high $(grep -c '^1[0-9a-f]*-[0-9a-f]* : System RAM' /proc/iomem)";
    let outcome = shell("cloud-amd64", &["--memory", "4608M"], script).exits(0);
    let kib: u64 = outcome.value("kib").parse().unwrap();
    assert!((4300 << 10..=4608 << 10).contains(&kib), "{kib} KiB");
    assert_eq!(outcome.value("high"), "1");
}

#[test]
fn the_kernel_address_is_random() {
    let mut seen = BTreeSet::new();
    // Two boots hit the same of some 500 places now and then, three in a row hardly ever.
    for _ in 0..3 {
        let outcome = shell("cloud-amd64", &[], "grep ' _text$' /proc/kallsyms").exits(0);
        let address = outcome.stdout.split(' ').next().unwrap().to_owned();
        assert!(address.starts_with("ffffffff"), "{outcome:#?}");
        seen.insert(address);
        if seen.len() > 1 {
            return;
        }
    }
    panic!("the kernel is always at {seen:?}");
}

#[test]
fn a_directory_is_copied_as_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy(busybox(), root.join("bin/busybox")).unwrap();
    symlink("busybox", root.join("bin/sh")).unwrap();
    symlink("../etc/motd", root.join("bin/link")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/motd"), "hello from the host\n").unwrap();
    fs::set_permissions(root.join("etc/motd"), fs::Permissions::from_mode(0o640)).unwrap();
    let script = "busybox cat /bin/link; busybox stat -c 'mode %a' /etc/motd; busybox ls /";
    let bulle = linux("cloud-amd64")
        .args(["--root-copy", "--root"])
        .arg(root)
        .command(["/bin/sh", "-c", script]);
    let outcome = bulle
        .outcome()
        .exits(0)
        .prints("hello from the host\n")
        .prints("mode 640\n");
    assert!(
        !outcome.stdout.contains("home"),
        "only what was given: {outcome:#?}"
    );
}
