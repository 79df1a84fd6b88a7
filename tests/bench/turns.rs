//! What a host process and a guest did by turns, and the lines of the tables.

use std::time::{Duration, Instant};

use super::{Guest, idle, middle};

/// One turn of one of them.
#[derive(Clone, Copy)]
pub struct Turn {
    /// Operations a second.
    pub rate: f64,
    /// Of one operation; nothing where it is not measured.
    pub times: Option<[Duration; 2]>,
    /// Kicks per operation; each is an exit.
    pub kicks: f64,
    /// Seconds of processor time per operation: of the host's process, or of all threads of the VMM
    /// that are no vCPU.
    pub cpu: f64,
}

/// Seconds of processor time of this thread so far.
pub fn thread_time() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is valid for writes.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The same of the threads of a guest's VMM that are no vCPU, to a hundredth of a second.
pub fn vmm_time(guest: &Guest) -> f64 {
    idle::used(guest.child.id()).1 as f64 / 100.0
}

/// Does `what` so many times in this thread.
pub fn host(count: usize, mut what: impl FnMut(usize)) -> Turn {
    let mut times = Vec::with_capacity(count);
    let (begin, cpu) = (Instant::now(), thread_time());
    for n in 0..count {
        let begin = Instant::now();
        what(n);
        times.push(begin.elapsed());
    }
    let elapsed = begin.elapsed().as_secs_f64();
    let cpu = (thread_time() - cpu) / count as f64;
    times.sort_unstable();
    Turn {
        rate: count as f64 / elapsed,
        times: Some([times[(count - 1) / 2], times[(count - 1) * 99 / 100]]),
        kicks: 0.0,
        cpu,
    }
}

/// The head of a table.
pub fn head(what: &str, rounds: usize) {
    println!("\n{what}: {rounds} turns each, medians; thousands a second, µs, per operation");
    println!("{:<36}{:>36}{:>36}", "", "host", "guest");
    print!("{:<36}", "");
    for _ in 0..2 {
        print!("{:>9}{:>9}{:>9}{:>9}", "rate", "p50", "p99", "CPU");
    }
    println!("{:>8}{:>8}{:>8}", "ratio", "kicks", "GB/s");
}

/// Has both take `rounds` turns, prints the line, and gives the median ratio of their rates. An operation
/// moves `bytes`.
pub fn compare(
    name: &str,
    bytes: usize,
    rounds: usize,
    mut host: impl FnMut() -> Turn,
    mut guest: impl FnMut() -> Turn,
) -> f64 {
    let (mut hosts, mut guests) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        if round % 2 == 0 {
            hosts.push(host());
        }
        guests.push(guest());
        if round % 2 != 0 {
            hosts.push(host());
        }
    }
    let of = |turns: &[Turn], what: &dyn Fn(&Turn) -> f64| middle(turns.iter().map(what).collect());
    print!("{name:<36}");
    for turns in [&hosts, &guests] {
        print!("{:>9.2}", of(turns, &|turn| turn.rate) / 1000.0);
        for at in 0..2 {
            let micros = |turn: &Turn| turn.times.map_or(0.0, |t| t[at].as_secs_f64() * 1e6);
            match turns[0].times {
                Some(_) => print!("{:>9.1}", of(turns, &micros)),
                None => print!("{:>9}", "-"),
            }
        }
        // The mean, since one turn's is measured coarsely.
        let cpu: f64 = turns.iter().map(|turn| turn.cpu).sum();
        print!("{:>9.1}", cpu / turns.len() as f64 * 1e6);
    }
    let ratios = hosts.iter().zip(&guests).map(|(h, g)| g.rate / h.rate);
    let ratio = middle(ratios.collect());
    let kicks = of(&guests, &|turn| turn.kicks);
    let rate = of(&guests, &|turn| turn.rate) * bytes as f64 / 1e9;
    println!("{ratio:>8.2}{kicks:>8.3}{rate:>8.2}");
    ratio
}
