//! A shared directory: reads, look-ups and attributes by a guest that speaks FUSE without an operating
//! system, against a process of the host that does the same on the same files. All is in the page cache.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::turns::{self, Turn};
use super::{Guest, middle};

/// Bytes of the file that is read.
const DATA: usize = 64 << 20;
/// How long the peer's file server may take to start.
const PATIENCE: Duration = Duration::from_secs(10);
/// Files that are looked up.
const FILES: usize = 1000;

fn prepare(dir: &Path) -> File {
    for n in 0..FILES {
        File::create(dir.join(format!("f{n}"))).unwrap();
    }
    let bytes: Vec<u8> = (0..DATA).map(|n| (n % 251) as u8).collect();
    fs::write(dir.join("data"), bytes).unwrap();
    File::open(dir.join("data")).unwrap()
}

/// What the guest does: `op` as its payload has it.
#[derive(Clone, Copy)]
struct Work {
    op: &'static str,
    depth: usize,
    size: usize,
    count: usize,
}

impl Work {
    fn append(&self) -> String {
        let Self {
            op,
            depth,
            size,
            count,
        } = self;
        format!("op={op} depth={depth} size={size} count={count} bytes={DATA} files={FILES}")
    }

    /// A turn, of which the file server alone is `server`, if it is a process of its own.
    fn turn(&self, mut guest: Guest, server: Option<u32>, hertz: f64) -> Turn {
        let line = guest.line();
        let numbers: Vec<f64> = line.split_whitespace().flat_map(str::parse).collect();
        let [_, cycles, median, p99, kicks] = numbers[..] else {
            panic!("the guest said {line:?}")
        };
        let count = self.count as f64;
        Turn {
            rate: count * hertz / cycles,
            times: Some([median, p99].map(|cycles| Duration::from_secs_f64(cycles / hertz))),
            kicks: kicks / count,
            cpu: turns::vmm_time(server.unwrap_or(guest.child.id())) / count,
        }
    }

    fn bulle(&self, dir: &Path, hertz: f64) -> Turn {
        let share = format!("path={},tag=bench", dir.display());
        let more = ["--share".to_owned(), share];
        self.turn(Guest::start("fs_bench", &self.append(), &more), None, hertz)
    }

    /// The same in QEMU with VIRTIOFSD, if both are named.
    fn peer(&self, dir: &Path, hertz: f64) -> Option<Turn> {
        let binary = std::env::var_os("VIRTIOFSD").filter(|value| !value.is_empty())?;
        let socket = tempfile::tempdir().unwrap();
        let socket = socket.path().join("socket");
        let more = format!(
            "-machine memory-backend=ram -object memory-backend-memfd,id=ram,size=128M,share=on \
             -chardev socket,id=fs,path={} -device vhost-user-fs-device,chardev=fs,tag=bench,queue-size=1024",
            socket.display()
        );
        let more: Vec<_> = more.split_whitespace().map(str::to_owned).collect();
        let command = turns::qemu("fs_bench", &self.append(), &more)?;
        let mut server = Command::new(binary);
        server
            .arg(format!("--socket-path={}", socket.display()))
            .args(["-f", "-o", &format!("source={}", dir.display())])
            .args(["-o", "cache=auto,sandbox=chroot", "--thread-pool-size=0"])
            .stderr(Stdio::null());
        let mut server = server.spawn().expect("VIRTIOFSD runs");
        let begin = Instant::now();
        while !socket.exists() {
            assert!(begin.elapsed() < PATIENCE, "VIRTIOFSD has no socket");
            thread::sleep(Duration::from_millis(1));
        }
        let turn = self.turn(Guest::spawn(command), Some(server.id()), hertz);
        // It ends by itself where QEMU does; this is for where it does not.
        let _ = server.kill();
        let _ = server.wait();
        Some(turn)
    }
}

/// One look-up as the host has it: a file's attributes by its name in a directory.
fn look_up(dir: &File, name: &str) {
    let name = std::ffi::CString::new(name).unwrap();
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the name ends with a zero byte, and the pointer is valid for writes.
    let result = unsafe { libc::fstatat(dir.as_raw_fd(), name.as_ptr(), stat.as_mut_ptr(), 0) };
    assert_eq!(result, 0);
}

/// Measures and prints the table.
pub fn print(rounds: usize, hertz: f64) {
    let dir = tempfile::tempdir().unwrap();
    let data = prepare(dir.path());
    let names = File::open(dir.path()).unwrap();
    turns::head("shared directory", rounds);
    for (name, size, depth) in [
        ("1 MiB sequential read, depth 1", 1 << 20, 1),
        ("128 KiB sequential read, depth 4", 128 << 10, 4),
        ("4 KiB sequential read, depth 4", 4 << 10, 4),
    ] {
        // On a page, as the guest's: a copy between pages that begin differently is slower.
        let mut room = vec![0; size + 4096];
        let start = room.as_ptr().align_offset(4096);
        let buffer = &mut room[start..start + size];
        let mut turn = |count| {
            turns::host(count, |n| {
                let at = n * size % DATA;
                data.read_exact_at(buffer, at as u64).unwrap();
            })
        };
        let count = enough(turn(200).rate);
        let work = Work {
            op: "read",
            depth,
            size,
            count,
        };
        let (own, peer) = (
            || work.bulle(dir.path(), hertz),
            || work.peer(dir.path(), hertz),
        );
        turns::compare(name, size, rounds, || turn(count), own, peer);
    }
    let by_name = |count| turns::host(count, |n| look_up(&names, &format!("f{}", n % FILES)));
    let attributes = |count| {
        turns::host(count, |_| {
            data.metadata().unwrap();
        })
    };
    type Host<'a> = &'a dyn Fn(usize) -> Turn;
    let cases: [(&str, &'static str, usize, Host); 4] = [
        ("look-up of 1000 names, depth 1", "lookup", 1, &by_name),
        ("look-up of 1000 names, depth 16", "lookup", 16, &by_name),
        ("attributes of a file, depth 1", "getattr", 1, &attributes),
        ("attributes of a file, depth 16", "getattr", 16, &attributes),
    ];
    for (name, op, depth, host) in cases {
        let probe = middle((0..3).map(|_| host(1000).rate).collect());
        let count = enough(probe / 8.0);
        let work = Work {
            op,
            depth,
            size: 4096,
            count,
        };
        let (own, peer) = (
            || work.bulle(dir.path(), hertz),
            || work.peer(dir.path(), hertz),
        );
        turns::compare(name, 0, rounds, || host(count), own, peer);
    }
}

/// Operations that take about a turn at so many a second.
fn enough(rate: f64) -> usize {
    ((rate * super::TURN.as_secs_f64()) as usize).clamp(200, 50_000)
}
