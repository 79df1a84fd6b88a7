//! Start-up of one small virtual machine, side by side with other monitors: `make bench`.
//!
//! Each contender runs the same PVH payload with one processor and 128 MiB: it writes one byte to COM1
//! and ends. Contenders take turns, in an order that reverses every round, so that a noisy machine is
//! noisy for all. Paths come from FIRECRACKER, CLOUD_HYPERVISOR, QEMU and BULLE; BENCH_N is the number
//! of samples. Nothing is dropped: a sample that fails ends the benchmark.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod peers;
mod report;

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use peers::Contender;

/// What one run took.
#[derive(Clone, Copy)]
pub struct Sample {
    /// From before the spawn until the guest's byte was read.
    first_byte: Duration,
    /// From before the spawn until the process was waited for.
    reaped: Duration,
    /// User and system time of the process.
    cpu: Duration,
}

/// Memory of the process while its guest halts, in KiB.
#[derive(Clone, Copy, Default)]
pub struct Memory {
    /// Resident at most so far, guest RAM included.
    peak_rss: u64,
    /// Resident in mappings that are not guest RAM.
    rss: u64,
    /// The same, pages shared with other processes counted in part.
    pss: u64,
}

const DEADLINE: u16 = 10_000;
const WARM_UP: usize = 3;

fn spawn(command: &mut Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Reads until `byte` comes; false at the end of the output or after ten seconds.
fn read_until(child: &mut Child, byte: u8) -> bool {
    let stdout = child.stdout.as_mut().unwrap();
    let mut some = [0; 256];
    loop {
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(DEADLINE)) != Ok(1) {
            return false;
        }
        match stdout.read(&mut some) {
            Ok(n @ 1..) if some[..n].contains(&byte) => return true,
            Ok(1..) => {}
            _ => return false,
        }
    }
}

/// Waits for `child`; the processor time it used.
fn reap(child: &Child) -> Duration {
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both pointers are valid for writes; a zeroed rusage is a valid one.
    let (pid, usage) = unsafe {
        let pid = libc::wait4(child.id() as i32, &raw mut status, 0, usage.as_mut_ptr());
        (pid, usage.assume_init())
    };
    assert_eq!(
        pid,
        child.id() as i32,
        "wait4: {}",
        std::io::Error::last_os_error()
    );
    [usage.ru_utime, usage.ru_stime]
        .iter()
        .map(|t| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000))
        .sum()
}

/// One run of the payload; `None` if its byte never came.
fn sample(contender: &Contender) -> Option<Sample> {
    let mut command = contender.command("first_byte");
    let started = Instant::now();
    let mut child = spawn(&mut command);
    let seen = read_until(&mut child, b'B');
    let first_byte = started.elapsed();
    if !seen {
        let _ = child.kill();
    }
    let cpu = reap(&child);
    let reaped = started.elapsed();
    seen.then_some(Sample {
        first_byte,
        reaped,
        cpu,
    })
}

/// The memory of the monitor while its guest halts forever.
fn memory(contender: &Contender) -> Memory {
    let mut child = spawn(&mut contender.command("hlt_forever"));
    assert!(
        read_until(&mut child, b'h'),
        "{} does not run hlt_forever",
        contender.name
    );
    std::thread::sleep(Duration::from_millis(50));
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.id())).unwrap();
    let _ = child.kill();
    reap(&child);
    let mut memory = Memory {
        peak_rss: field(&status, "VmHWM:"),
        ..Memory::default()
    };
    for mapping in mappings(&smaps) {
        // Guest RAM is one mapping of 128 MiB, or the part of it that a legacy hole leaves.
        if !(100 << 10..=128 << 10).contains(&field(&mapping, "Size:")) {
            memory.rss += field(&mapping, "Rss:");
            memory.pss += field(&mapping, "Pss:");
        }
    }
    memory
}

/// `/proc/PID/smaps` cut into one text per mapping.
fn mappings(smaps: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for line in smaps.lines() {
        let header = line
            .split(' ')
            .next()
            .is_some_and(|word| word.contains('-'));
        match all.last_mut() {
            Some(text) if !header => text.push_str(line),
            _ => all.push(String::new()),
        }
        all.last_mut().unwrap().push('\n');
    }
    all
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(name));
    let number = line.and_then(|l| l.split_ascii_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {name} in {text}"))
}

fn main() {
    let count = std::env::var("BENCH_N").map_or(60, |n| n.parse().expect("BENCH_N is a number"));
    let contenders = peers::find();
    let mut samples = vec![Vec::with_capacity(count); contenders.len()];
    for round in 0..count + WARM_UP {
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let contender = &contenders[at];
            let sample = sample(contender);
            let sample = sample.unwrap_or_else(|| panic!("{} lost a sample", contender.name));
            if round >= WARM_UP {
                samples[at].push(sample);
            }
        }
    }
    let memory: Vec<Memory> = contenders.iter().map(memory).collect();
    report::print(&contenders, &samples, &memory);
}

/// The file behind an environment variable, if it is set.
fn path_from(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}
