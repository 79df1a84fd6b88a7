//! What the integration tests and the benchmark share: payloads built once, `bulle` run under a deadline.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Nothing that a test starts may take longer, unless it says so.
const PATIENCE: Duration = Duration::from_secs(120);

/// The repository.
pub fn tree() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The ELF file of a payload. All are built on first use; a file lock keeps test processes apart.
pub fn payload(name: &str) -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let dir = BUILT.get_or_init(build_payloads);
    let path = dir.join(name);
    assert!(path.is_file(), "no payload {name} in {}", dir.display());
    path
}

fn build_payloads() -> PathBuf {
    let target = tree().join("target/payloads");
    fs::create_dir_all(&target).unwrap();
    let lock = File::create(target.join("lock")).unwrap();
    let _held = Flock::lock(lock, FlockArg::LockExclusive).expect("lock of target/payloads");
    let mut cargo = Command::new(env!("CARGO"));
    // What cargo or a coverage tool set for this build is not meant for a free-standing one.
    for (name, _) in
        std::env::vars().filter(|(n, _)| n.contains("RUSTFLAGS") || n == "CARGO_TARGET_DIR")
    {
        cargo.env_remove(name);
    }
    let output = cargo
        .args(["build", "--release", "--locked", "--quiet", "--target-dir"])
        .arg(&target)
        .arg("--manifest-path")
        .arg(tree().join("resources/payloads/Cargo.toml"))
        .output()
        .expect("cargo runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the payloads do not build:\n{errors}"
    );
    target.join("release")
}

/// The program for guests of tests/guest, linked statically. Built on first use; in the lab, where
/// there is no cargo or the tree is read-only, it has to be there.
pub fn guest_tool() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let path = BUILT.get_or_init(|| {
        let target = tree().join("target/guest-tool");
        let is_writable =
            fs::create_dir_all(&target).is_ok() && File::create(target.join("lock")).is_ok();
        if is_writable && Command::new("cargo").arg("--version").output().is_ok() {
            let build = tree().join("tests/guest/build");
            let status = Command::new(build).status().expect("bash runs");
            assert!(status.success(), "tests/guest/build failed");
        }
        target.join("release/guest-tool")
    });
    assert!(path.is_file(), "run tests/guest/build first");
    path.clone()
}

/// The newest installed Debian kernel of a flavour.
pub fn debian_kernel(flavour: &str) -> PathBuf {
    let suffix = format!("-{flavour}");
    let names = fs::read_dir("/boot")
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<(Vec<u32>, String)> = names
        .filter(|name| name.starts_with("vmlinuz-") && name.ends_with(&suffix))
        .filter(|name| flavour != "amd64" || !name.contains("-cloud-") && !name.contains("-rt-"))
        .map(|name| (name.split(['.', '-']).flat_map(str::parse).collect(), name))
        .collect();
    found.sort();
    let (_, name) = found
        .pop()
        .unwrap_or_else(|| panic!("no kernel in /boot: apt-get install linux-image-{flavour}"));
    Path::new("/boot").join(name)
}

/// How a process ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub elapsed: Duration,
}

impl Outcome {
    /// Fails the test unless the exit code is `code`; shows everything.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }
    /// Fails the test unless stdout contains `text`.
    #[track_caller]
    pub fn prints(self, text: &str) -> Self {
        assert!(
            self.stdout.contains(text),
            "no {text:?} in the output of {self:#?}"
        );
        self
    }
    /// Fails the test unless stderr contains `text`.
    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(
            self.stderr.contains(text),
            "no {text:?} in the errors of {self:#?}"
        );
        self
    }
    /// Fails the test unless the process ended within `limit`.
    #[track_caller]
    pub fn within(self, limit: Duration) -> Self {
        assert!(self.elapsed <= limit, "took more than {limit:?}: {self:#?}");
        self
    }
    /// The value of the first output line that starts with `key` and a space.
    #[track_caller]
    pub fn value(&self, key: &str) -> &str {
        let line = self
            .stdout
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no line {key:?} in {self:#?}"))
            .trim()
    }
}

/// What a started process gets as its standard input.
pub enum Input {
    /// /dev/null.
    Null,
    /// A pipe that stays open, with nothing in it.
    Open,
    /// These bytes, then the end of the file.
    Bytes(Vec<u8>),
}

/// A running `bulle`, killed when dropped.
pub struct Running {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
    seen: std::sync::mpsc::Receiver<Vec<u8>>,
    started: Instant,
    patience: Duration,
}

fn collect(
    mut from: impl Read + Send + 'static,
    seen: Option<std::sync::mpsc::Sender<Vec<u8>>>,
) -> Option<JoinHandle<Vec<u8>>> {
    Some(std::thread::spawn(move || {
        let (mut all, mut some) = (Vec::new(), [0; 4096]);
        while let Ok(n @ 1..) = from.read(&mut some) {
            all.extend_from_slice(&some[..n]);
            if let Some(seen) = &seen {
                let _ = seen.send(some[..n].to_vec());
            }
        }
        all
    }))
}

impl Running {
    /// Starts `command` with its outputs collected.
    pub fn start(mut command: Command, input: Input, patience: Duration) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if command
            .get_envs()
            .all(|(name, _)| name != "BULLE_RUNTIME_DIR")
        {
            command.env(
                "BULLE_RUNTIME_DIR",
                std::env::temp_dir().join("bulle-tests"),
            );
        }
        command.stdin(match input {
            Input::Null => Stdio::null(),
            _ => Stdio::piped(),
        });
        let started = Instant::now();
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        if let Input::Bytes(bytes) = input {
            let mut stdin = child.stdin.take().unwrap();
            std::thread::spawn(move || stdin.write_all(&bytes)); // may block on the guest
        }
        let (sender, seen) = std::sync::mpsc::channel();
        let stdout = collect(child.stdout.take().unwrap(), Some(sender));
        let stderr = collect(child.stderr.take().unwrap(), None);
        Running {
            child,
            stdout,
            stderr,
            seen,
            started,
            patience,
        }
    }

    /// Waits until it wrote something to stdout.
    pub fn wait_for_output(self) -> Self {
        self.wait_for("")
    }

    /// Waits until `text` is part of what it wrote to stdout.
    pub fn wait_for(self, text: &str) -> Self {
        let mut all = Vec::new();
        loop {
            let more = self.seen.recv_timeout(self.patience);
            let so_far = || String::from_utf8_lossy(&all).into_owned();
            all.extend(
                more.unwrap_or_else(|_| panic!("it never wrote {text:?}, only {:?}", so_far())),
            );
            if String::from_utf8_lossy(&all).contains(text) {
                return self;
            }
        }
    }

    /// What it has written to stdout and nobody has waited for.
    pub fn more_output(&self) -> String {
        let all: Vec<u8> = self.seen.try_iter().flatten().collect();
        String::from_utf8_lossy(&all).into_owned()
    }

    /// Kills it; what it has written to stdout until then and nobody has waited for.
    pub fn last_output(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // To the end of the pipe, however late its reader is.
        let all: Vec<u8> = self.seen.iter().flatten().collect();
        String::from_utf8_lossy(&all).into_owned()
    }

    /// Its standard input, for a test that writes to it now and then.
    pub fn take_stdin(&mut self) -> std::process::ChildStdin {
        self.child.stdin.take().unwrap()
    }

    /// Writes to its standard input, which is [`Input::Open`].
    pub fn types(mut self, text: &str) -> Self {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        self
    }

    /// Sends a signal.
    pub fn signal(self, signal: Signal) -> Self {
        kill(self.pid(), signal).unwrap();
        self
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Processor time it used so far, to the hundredth of a second.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let (_, after_name) = stat.rsplit_once(')').unwrap();
        let ticks = after_name.split_ascii_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|t| t.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10) // USER_HZ is 100 everywhere
    }

    /// Waits for its end. A death by signal N counts as exit code 128 + N, as in a shell.
    pub fn finish(mut self) -> Outcome {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if begin.elapsed() > self.patience {
                let _ = self.child.kill();
                let _ = self.child.wait();
                let (stdout, stderr) = self.outputs();
                panic!(
                    "still running after {:?}\n{stdout}\n{stderr}",
                    self.patience
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let elapsed = self.started.elapsed();
        let (stdout, stderr) = self.outputs();
        let code = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        Outcome {
            code,
            stdout,
            stderr,
            elapsed,
        }
    }

    fn outputs(&mut self) -> (String, String) {
        let text = |from: Option<JoinHandle<Vec<u8>>>| {
            String::from_utf8_lossy(&from.unwrap().join().unwrap()).into_owned()
        };
        (text(self.stdout.take()), text(self.stderr.take()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command that finds microVMs in `base`.
pub fn bulle_at(base: &Path, words: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(words).env("BULLE_RUNTIME_DIR", base);
    Running::start(command, Input::Null, Duration::from_secs(60)).finish()
}

/// A `bulle` command line to come.
pub struct Bulle {
    command: Command,
    timeout: String,
    operands: Vec<std::ffi::OsString>,
    input: Input,
    patience: Duration,
}

impl Bulle {
    /// `bulle run`, nothing else yet.
    pub fn run() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
        command.arg("run");
        Bulle {
            command,
            timeout: "110s".to_owned(),
            operands: Vec::new(),
            input: Input::Null,
            patience: PATIENCE,
        }
    }
    /// `bulle run` without any capability, for root too.
    pub fn unprivileged() -> Self {
        let mut bulle = Bulle::run();
        if nix::unistd::geteuid().is_root() {
            bulle.command = Command::new("setpriv");
            let drop = ["--bounding-set=-all", "--inh-caps=-all", "--"];
            bulle.command.args(drop);
            bulle.command.args([env!("CARGO_BIN_EXE_bulle"), "run"]);
        }
        bulle
    }
    /// `bulle run` in a network of its own, where it may make interfaces.
    pub fn in_a_network() -> Self {
        let mut bulle = Bulle::run();
        bulle.command = Command::new("unshare");
        let own = ["--user", "--map-root-user", "--net", "--"];
        bulle.command.args(own);
        bulle.command.args([env!("CARGO_BIN_EXE_bulle"), "run"]);
        bulle
    }
    /// `bulle run --root none --kernel PAYLOAD`.
    pub fn payload(name: &str) -> Self {
        let path = payload(name);
        Bulle::run().args(["--root", "none", "--kernel"]).arg(path)
    }
    /// What `--timeout` says: no guest may run forever. 110 s if this is not called.
    pub fn timeout(mut self, timeout: &str) -> Self {
        self.timeout = timeout.to_owned();
        self
    }
    /// The command to run in the guest.
    pub fn command<S: Into<std::ffi::OsString>>(
        mut self,
        words: impl IntoIterator<Item = S>,
    ) -> Self {
        self.operands = words.into_iter().map(Into::into).collect();
        self
    }
    /// One more argument.
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(arg);
        self
    }
    /// More arguments.
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }
    /// Runs in `dir`.
    pub fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }
    /// Standard input.
    pub fn input(mut self, input: Input) -> Self {
        self.input = input;
        self
    }
    /// How long it may take before the test fails.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
    /// Starts it.
    pub fn start(mut self) -> Running {
        self.command.arg("--timeout").arg(self.timeout);
        if !self.operands.is_empty() {
            self.command.arg("--").args(self.operands);
        }
        Running::start(self.command, self.input, self.patience)
    }
    /// Starts it and waits for its end.
    pub fn outcome(self) -> Outcome {
        self.start().finish()
    }
}
