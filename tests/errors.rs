//! Bad input and poor hosts: one clear error, exit code 125, and nothing left behind.
//!
//! Needs KVM and Debian's kernel, so a plain `cargo test` leaves it out: `cargo test --test errors`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "errors/run.rs"]
mod run;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;

use common::{Input, Running, payload};
use run::{Run, SOON, bare, bzimage, elf, file, kernel, text};

const MIB: u64 = 1 << 20;

/// A guest that works: it ends with 7.
fn hello() -> Run {
    kernel(payload("hello")).args(["--root", "none"])
}

#[test]
fn kernels_that_are_no_files() {
    let empty = file("empty", b"");
    let directory = empty.parent().unwrap();
    let pipe = directory.join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    kernel("/nowhere/vmlinuz").refused(&["/nowhere/vmlinuz", "no such file"]);
    kernel(directory).refused(&[text(directory), "directory", "name the kernel file"]);
    kernel(&empty).refused(&[text(&empty), "empty"]);
    kernel(&pipe).refused(&[text(&pipe), "not a regular file"]);
    let secret = file("secret", &bzimage());
    fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
    kernel(&secret).without_rights().refused(&[
        text(&secret),
        "may not read",
        "readable copy",
        "Permission denied",
    ]);
}

#[test]
fn kernels_that_are_none() {
    let notes = file("notes", b"This is no kernel.\n");
    kernel(&notes).refused(&[text(&notes), "format is unknown", "bzImage", "vmlinux"]);
    let script = file("script", b"#!/bin/sh\n");
    kernel(&script).refused(&[text(&script), "a script"]);
    let cut = file("cut", &elf(2, 62, &[(16 * MIB, 4096)])[..70]);
    kernel(&cut).refused(&[text(&cut), "truncated"]);
    let arm = file("arm", &elf(2, 183, &[(16 * MIB, 4096)]));
    kernel(&arm).refused(&[text(&arm), "aarch64", "x86_64"]);
    let old = file("old", &elf(1, 3, &[(16 * MIB, 4096)]));
    kernel(&old).refused(&[text(&old), "32-bit", "pvh"]);
    let outside = file("outside", &elf(2, 62, &[(16 * MIB, 2048 * MIB)]));
    kernel(&outside).refused(&[
        text(&outside),
        "segment 0",
        "512 MiB of RAM",
        "at least 2064 MiB",
    ]);
    let nowhere = file("nowhere", &elf(2, 62, &[(16 * MIB, u64::MAX / 2)]));
    kernel(&nowhere).refused(&[text(&nowhere), "segment 0"]);
    let both = file(
        "both",
        &elf(2, 62, &[(16 * MIB, 8192), (16 * MIB + 4096, 4096)]),
    );
    kernel(&both).refused(&[text(&both), "segments 0 and 1 overlap", "0x1001000"]);
    let fine = payload("hello");
    let run = hello().args(["--kernel-entry", "bzimage"]);
    run.refused(&[text(&fine), "no bzimage entry", "use pvh or linux64"]);
}

#[test]
fn bzimages_that_lie() {
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    let good = bzimage();
    let u32_at = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap());
    let setup = (usize::from(good[0x1f1]) + 1) * 512;
    let start = setup + u32_at(PAYLOAD_OFFSET) as usize;
    let end = start + u32_at(PAYLOAD_LENGTH) as usize;
    let damaged = |name: &str, at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        file(name, &image)
    };
    let refused = |path: PathBuf, words: &[&str]| {
        let mut words = words.to_vec();
        words.push(text(&path));
        kernel(&path).args(["--root", "none"]).refused(&words);
        fs::remove_file(&path).unwrap();
    };
    refused(file("half", &good[..good.len() / 2]), &["truncated"]);
    refused(
        damaged("length", PAYLOAD_LENGTH, &[0xff; 4]),
        &["payload", "damaged"],
    );
    refused(
        damaged("none", PAYLOAD_LENGTH, &[0; 4]),
        &["payload_length", "damaged"],
    );
    refused(
        damaged("offset", PAYLOAD_OFFSET, &[0xff; 4]),
        &["payload", "damaged"],
    );
    refused(damaged("version", 0x206, &[0x08, 0x02]), &["2.08", "2.12"]);
    refused(damaged("32bit", 0x236, &[0, 0]), &["32-bit"]);
    refused(
        damaged("large", end - 4, &[0xff; 4]),
        &["unpack to 4294967295 bytes", "limit"],
    );
    refused(
        damaged("small", end - 4, &[1, 0, 0, 0]),
        &["payload is corrupt"],
    );
    refused(
        damaged("middle", (start + end) / 2, &[0x55; 64]),
        &["payload is corrupt"],
    );
}

#[test]
fn initial_ram_disks() {
    let empty = file("empty", b"");
    let directory = empty.parent().unwrap();
    hello()
        .args(["--initrd", "/nowhere"])
        .refused(&["/nowhere", "No such file"]);
    let run = hello().args(["--initrd"]).args([directory]);
    run.refused(&[text(directory), "not a regular file"]);
    hello()
        .args(["--initrd"])
        .args([&empty])
        .refused(&[text(&empty), "is empty"]);
    hello()
        .args(["--initrd", "/dev/zero"])
        .refused(&["/dev/zero", "not a regular file"]);
    let large = directory.join("large");
    File::create(&large).unwrap().set_len(100 * MIB).unwrap();
    let run = hello().args(["--memory", "64M", "--initrd"]).args([&large]);
    run.refused(&["100 MiB", "64 MiB of RAM", "at least"]);
    File::create(&large).unwrap().set_len(4096 * MIB).unwrap();
    let run = hello().args(["--memory", "8G", "--initrd"]).args([&large]);
    run.refused(&["4096 MiB", "too large", "below"]);
}

#[test]
fn sizes_and_counts() {
    hello()
        .args(["--memory", "31M"])
        .refused(&["31 MiB", "32M to 1T"]);
    hello()
        .args(["--memory", "2T"])
        .refused(&["2097152 MiB", "32M to 1T"]);
    hello()
        .args(["--cpus", "0"])
        .refused(&["0 vCPUs", "1 to 254"]);
    hello()
        .args(["--cpus", "255"])
        .refused(&["255 vCPUs", "1 to 254"]);
    let odd = ["--cpus", "3", "--threads-per-core", "2"];
    hello()
        .args(odd)
        .refused(&["3 vCPUs", "multiple of dies times threads"]);
    hello()
        .args(["--cpus", "4", "--threads-per-core", "4"])
        .refused(&["1 or 2"]);
    hello().args(["--dies", "0"]).refused(&["0 dies"]);
    hello()
        .args(["--cpus", "252", "--dies", "3"])
        .refused(&["252 vCPUs", "powers of two"]);
    hello()
        .args(["--timeout", "0s"])
        .refused(&["timeout of 0", "1ms"]);
    let small = file("vmlinuz", &bzimage());
    let run = kernel(&small).args(["--root", "none", "--memory", "32M"]);
    run.refused(&[text(&small), "MiB of RAM to start", "32 MiB"]);
    let odd = ["--huge-pages", "1G", "--memory", "1500M"];
    hello()
        .args(odd)
        .refused(&["1500 MiB", "multiple of the 1024 MiB pages"]);
    // More than any host has reserved.
    for backing in ["anonymous", "memfd"] {
        let huge = [
            "--huge-pages",
            "2M",
            "--memory",
            "1T",
            "--memory-backing",
            backing,
        ];
        hello()
            .args(huge)
            .refused(&["pages of 2 MiB", "reserve 524288", "nr_hugepages"]);
    }
}

#[test]
fn command_lines() {
    let long = "x".repeat(3000);
    let run = kernel(payload("hello")).args(["--root", "none", "--append", &long]);
    run.refused(&["bytes", "at most 2047", "3000 bytes of it"]);
    hello()
        .args(["--append", "a\nb"])
        .refused(&["'\\n'", "printable ASCII"]);
    hello()
        .args(["--append", "caf\u{e9}"])
        .refused(&["'\u{e9}'", "printable ASCII"]);
    let many = vec!["x"; 5000];
    kernel(payload("hello"))
        .command(&many)
        .refused(&["5003 arguments", "at most 4096"]);
    let long = "x".repeat(100_000);
    let run = kernel(payload("hello")).command(&[&long, &long]);
    run.refused(&["bytes", "at most 131072"]);
}

#[test]
fn roots_and_commands() {
    let guest = || kernel(payload("hello"));
    let note = file("note", b"x");
    let directory = note.parent().unwrap();
    guest()
        .args(["--root", "/nowhere"])
        .refused(&["/nowhere", "No such file"]);
    guest()
        .args(["--root-copy", "--root"])
        .args([&note])
        .refused(&[text(&note), "--root-copy is for directories"]);
    guest()
        .args(["--modules"])
        .args([directory])
        .refused(&[text(directory), "modules.dep"]);
    let bare = directory.join("modules");
    fs::create_dir(&bare).unwrap();
    fs::write(bare.join("modules.dep"), "").unwrap();
    let shared = || guest().args(["--modules"]).args([&bare]);
    shared().args(["--root"]).args([directory]).refused(&[
        "--root-copy",
        "needs the kernel module",
        text(&bare),
    ]);
    shared()
        .args(["--share"])
        .args([format!("{}:/x", directory.display())])
        .refused(&["the guest needs the kernel module", text(&bare)]);
    guest().args(["--env", "A"]).refused(&["'A'", "KEY=VALUE"]);
    guest()
        .args(["--env", "=A"])
        .refused(&["'=A'", "KEY=VALUE"]);
    guest()
        .args(["--cwd", "tmp"])
        .refused(&["'tmp'", "not absolute"]);
    hello()
        .command(&["true"])
        .refused(&["--root none", "leave out the command"]);
    hello()
        .args(["--tty", "yes"])
        .refused(&["--root none", "--tty"]);
    fs::set_permissions(&note, PermissionsExt::from_mode(0o000)).unwrap();
    let run = guest()
        .args(["--root-copy", "--root"])
        .args([directory])
        .without_rights();
    run.refused(&[text(&note), "make it readable", "Permission denied"]);
    let large = file("large", b"");
    File::create(&large).unwrap().set_len(200 * MIB).unwrap();
    let run = guest()
        .args(["--memory", "128M", "--root-copy", "--root"])
        .args([large.parent().unwrap()]);
    run.refused(&["at most 67108864 fit", "more memory or a smaller root"]);
    // No command but the one that is run is left, nor is busybox.
    let hidden = "mount -t tmpfs none /bin && PATH=/nowhere && export PATH && exec \"$@\"";
    let words = ["busybox", "apt-get install busybox-static", "--root"];
    guest().in_namespace(hidden).refused(&words);
}

#[test]
fn configurations() {
    let config = |text: &str| {
        bare()
            .args(["--config"])
            .args([file("config.json", text.as_bytes())])
    };
    bare()
        .args(["--config", "/nowhere"])
        .refused(&["/nowhere", "No such file"]);
    bare()
        .args(["--config", "/dev/zero"])
        .refused(&["/dev/zero", "more than 1048576 bytes"]);
    config("").refused(&["config.json", "EOF", "line 1"]);
    config("hello").refused(&["config.json", "line 1 column 1"]);
    let deep = format!(r#"{{"console":{}"#, r#"{"file":"#.repeat(100_000));
    config(&deep).refused(&["config.json", "line 1"]);
    config("{}").refused(&["config.json", "missing field `boot-source`"]);
    let unknown = r#"{"boot-source":{"kernel_image_path":"/k","initrd":"/i"}}"#;
    config(unknown).refused(&["unknown field `initrd`", "`initrd_path`"]);
    let wrong = r#"{"boot-source":{"kernel_image_path":"/k"},"machine-config":{"vcpu_count":"2"}}"#;
    config(wrong).refused(&["invalid type: string \"2\"", "u16"]);
    let many = r#"{"boot-source":{"kernel_image_path":"/k"},"machine-config":{"vcpu_count":500}}"#;
    config(many).refused(&["500 vCPUs", "1 to 254"]);
    let nul = r#"{"boot-source":{"kernel_image_path":"/k"},"guest":{"command":["a\u0000b"]}}"#;
    config(nul).refused(&["NUL", "a\\0b"]);
    let run = config(unknown).args(["--config", "/other"]).outcome();
    assert_eq!(run.code, 125, "{run:#?}");
}

#[test]
fn consoles() {
    let console = |path: &str| hello().args(["--console", &format!("file={path}")]);
    console("/nowhere/console").refused(&["/nowhere/console", "for the console", "No such file"]);
    console("/").refused(&["Is a directory", "name a file"]);
}

#[test]
fn arguments() {
    for words in [
        &["--no-such-option"][..],
        &["--memory", "lots"],
        &["--memory", "18446744073709551616T"],
        &["--cpus", "many"],
        &["--cpus", "65536"],
        &["--console", "printer"],
        &["--kernel-entry", "front"],
        &["--timeout", "soon"],
        &["--append"],
        &["--kernel", ""],
        &["--memory", "1G", "--memory", "2G"],
    ] {
        let outcome = bare().args(words).outcome();
        assert_eq!(
            (outcome.code, &outcome.stdout[..]),
            (125, ""),
            "{words:?}: {outcome:#?}"
        );
        assert!(
            outcome.stderr.starts_with("bulle: "),
            "{words:?}: {outcome:#?}"
        );
        assert!(outcome.stderr.contains(words[0]), "{words:?}: {outcome:#?}");
        assert!(outcome.stderr.contains("--help"), "{words:?}: {outcome:#?}");
    }
    for help in ["--help", "-h"] {
        let outcome = bare()
            .args([help])
            .outcome()
            .exits(0)
            .prints("--kernel <FILE>");
        assert_eq!(outcome.stderr, "");
    }
}

#[test]
fn hosts_without_kvm() {
    let gone = "mount -t tmpfs none /dev && exec \"$@\"";
    hello()
        .in_namespace(gone)
        .refused(&["/dev/kvm does not exist"]);
    let other = format!(
        "mount --bind {} /dev/kvm && exec \"$@\"",
        text(&file("kvm", b""))
    );
    hello()
        .in_namespace(&other)
        .refused(&["/dev/kvm does not answer", "load the kvm module"]);
    let secret = file("kvm", b"");
    fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
    let closed = format!(
        "mount --bind {} /dev/kvm && \
         exec setpriv --bounding-set=-all --inh-caps=-all -- \"$@\"",
        text(&secret)
    );
    let words = [
        "No permission to open /dev/kvm",
        "mode 0000",
        "usermod -aG kvm",
    ];
    hello().in_namespace(&closed).refused(&words);
}

#[test]
fn limits_on_open_files() {
    let limited = |n: u32| format!("ulimit -n {n} && exec \"$@\"");
    hello()
        .by_shell(&limited(10))
        .refused(&["open files", "only 10", "ulimit -n"]);
    let many = hello().args(["--cpus", "64"]);
    many.by_shell(&limited(64))
        .refused(&["64 vCPUs", "only 64", "ulimit -n"]);
    hello()
        .by_shell("ulimit -Sn 10 && exec \"$@\"")
        .outcome()
        .exits(7);
}

/// From too little for anything to enough for all: an error each time, never an abort.
#[test]
fn limits_on_address_space() {
    let image = file("vmlinuz", &bzimage());
    let mut seen = [false; 2];
    for mib in (32..320).step_by(16) {
        let limited = format!("ulimit -v {} && exec \"$@\"", mib << 10);
        let words = ["--root", "none", "--memory", "128M", "--timeout", "1ms"];
        let outcome = kernel(&image).args(words).by_shell(&limited).outcome();
        assert!(
            [124, 125].contains(&outcome.code),
            "{mib} MiB: {outcome:#?}"
        );
        assert!(
            outcome.stderr.starts_with("bulle: "),
            "{mib} MiB: {outcome:#?}"
        );
        let has = |text| outcome.stderr.contains(text);
        assert!(
            outcome.code == 124 || has("ulimit -v"),
            "{mib} MiB: {outcome:#?}"
        );
        seen[0] |= has("Cannot map 128 MiB of guest memory");
        seen[1] |= has("Out of memory") || has("too little memory for unpacking");
    }
    assert_eq!(
        seen, [true; 2],
        "guest memory, then memory for unpacking, should be too little"
    );
}

#[test]
fn closed_and_full_streams() {
    for streams in [
        "<&-",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        ">/dev/full",
        "2>/dev/full",
        "</",
    ] {
        let outcome = hello()
            .by_shell(&format!("exec \"$@\" {streams}"))
            .outcome()
            .exits(7);
        assert!(
            !outcome.stderr.contains("panicked"),
            "{streams}: {outcome:#?}"
        );
    }
    for streams in ["2>&-", "2>/dev/full"] {
        let run = kernel("/nowhere").by_shell(&format!("exec \"$@\" {streams}"));
        run.outcome().exits(125);
    }
    let print = hello()
        .args(["--print-config"])
        .by_shell("exec \"$@\" >/dev/full");
    print.refused(&["Cannot print the configuration", "No space left"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let run = hello();
    let status = run
        .build()
        .stdin(Stdio::null())
        .stdout(writer)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(7));
    run.nothing_is_left();
}

#[test]
fn several_at_once() {
    let halted = kernel(payload("hlt_forever")).args(["--root", "none"]);
    let first = Running::start(halted.build(), Input::Null, SOON);
    let runs: Vec<_> = (0..4).map(|_| hello()).collect();
    let start = |run: &Run| Running::start(run.build(), Input::Null, SOON);
    let running: Vec<_> = runs.iter().map(start).collect();
    for running in running {
        running.finish().exits(7).prints("hello from the guest");
    }
    runs.iter().for_each(Run::nothing_is_left);
    first
        .signal(nix::sys::signal::Signal::SIGINT)
        .finish()
        .exits(130);
    halted.nothing_is_left();
}
