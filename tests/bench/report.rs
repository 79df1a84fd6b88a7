//! The table, the ratios and the goals.

use std::fs;
use std::time::Duration;

use super::{Memory, Sample};
use crate::peers::Contender;

fn sorted(samples: &[Sample], of: fn(&Sample) -> Duration) -> Vec<f64> {
    let mut all: Vec<f64> = samples.iter().map(|s| of(s).as_secs_f64() * 1e3).collect();
    all.sort_by(f64::total_cmp);
    all
}

/// The value that `percent` of the samples do not exceed (nearest rank).
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1]
}

fn median(samples: &[Sample], of: fn(&Sample) -> Duration) -> f64 {
    percentile(&sorted(samples, of), 50)
}

/// The machine, as far as it matters for the figures.
fn machine() {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .unwrap_or(": ?");
    let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let mut kvm: Vec<String> = modules
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    kvm.sort();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let release = read("/proc/sys/kernel/osrelease");
    println!(
        "{}, {cpus} usable",
        model.trim_start_matches(['\t', ' ', ':'])
    );
    println!("Linux {}, KVM modules: {}", release.trim(), kvm.join(" "));
}

/// Prints everything; `samples` and `memory` are in the order of `contenders`, bulle first.
pub fn print(contenders: &[Contender], samples: &[Vec<Sample>], memory: &[Memory]) {
    machine();
    println!(
        "1 processor, 128 MiB, {} samples each; ms and KiB\n",
        samples[0].len()
    );
    println!(
        "{:<17}{:>19}{:>19}{:>17}{:>10}{:>10}{:>10}",
        "", "spawn → byte", "spawn → reaped", "CPU", "peak RSS", "RSS-RAM", "PSS-RAM"
    );
    println!(
        "{:<17}{:>10}{:>9}{:>10}{:>9}{:>9}{:>8}",
        "", "median", "p99", "median", "p99", "median", "p99"
    );
    for ((contender, samples), memory) in contenders.iter().zip(samples).zip(memory) {
        let columns = [
            |s: &Sample| s.first_byte,
            |s: &Sample| s.reaped,
            |s: &Sample| s.cpu,
        ];
        print!("{:<17}", contender.name);
        for (of, width) in columns.into_iter().zip([10, 10, 9]) {
            let all = sorted(samples, of);
            print!(
                "{:>width$.2}{:>2$.2}",
                percentile(&all, 50),
                percentile(&all, 99),
                width - 1
            );
        }
        println!(
            "{:>10}{:>10}{:>10}",
            memory.peak_rss, memory.rss, memory.pss
        );
    }
    println!("\npeak RSS includes guest RAM that was touched; -RAM leaves guest RAM out\n");
    goals(contenders, samples, memory);
}

fn goal(what: &str, value: f64, limit: f64, unit: &str, at_least: bool) {
    let (met, word) = if at_least {
        (value >= limit, "≥")
    } else {
        (value <= limit, "≤")
    };
    let verdict = if met { "met" } else { "MISSED" };
    println!("{verdict:<7} {what}: {value:.2} {unit} (goal {word} {limit:.2})");
}

fn goals(contenders: &[Contender], samples: &[Vec<Sample>], memory: &[Memory]) {
    let first_byte = |s: &Sample| s.first_byte;
    let reaped = |s: &Sample| s.reaped;
    let own = median(&samples[0], first_byte);
    goal("spawn → first guest byte", own, 1.9, "ms", false);
    goal(
        "RSS beyond guest RAM",
        memory[0].rss as f64 / 1024.0,
        3.0,
        "MiB",
        false,
    );
    if contenders.len() == 1 {
        println!("no peer took part: no ratios");
        return;
    }
    let best = |of: fn(&Sample) -> Duration| {
        let all = samples.iter().zip(contenders).skip(1);
        let all = all.map(|(samples, contender)| (median(samples, of), contender.name));
        all.min_by(|a, b| a.0.total_cmp(&b.0))
            .expect("there is a peer")
    };
    let (peer, name) = best(first_byte);
    goal(
        &format!("first byte against {name}, the fastest peer"),
        peer / own,
        3.0,
        "times",
        true,
    );
    let (peer, name) = best(reaped);
    let own = median(&samples[0], reaped);
    goal(
        &format!("reaped, limit {name}, the fastest peer"),
        own,
        peer,
        "ms",
        false,
    );
    println!();
    for (at, contender) in contenders.iter().enumerate().skip(1) {
        let ratio =
            |of: fn(&Sample) -> Duration| median(&samples[at], of) / median(&samples[0], of);
        println!(
            "{} takes {:.1} times as long to the first byte, {:.1} to the end, {:.1} times the CPU, {:.1} times the PSS",
            contender.name,
            ratio(first_byte),
            ratio(reaped),
            ratio(|s| s.cpu),
            memory[at].pss as f64 / memory[0].pss.max(1) as f64,
        );
    }
}
