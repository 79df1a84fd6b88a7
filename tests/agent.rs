//! Drives the real agent as an ordinary process, over a pseudo-terminal as its channel.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not tests to clippy"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bulle::guest::client::{AgentFailure, Exit, Power, Stage, WinSize};
use bulle::guest::{AGENT, AgentClient, AgentEvent, StartRequest};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, Signal, signal};

const LIMIT: Duration = Duration::from_secs(60);

/// An agent, and what it has said.
struct Talk {
    agent: Child,
    channel: File,
    _user_side: OwnedFd,
    client: AgentClient,
    input: Vec<u8>,
    events: Vec<AgentEvent>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    begun: Instant,
}

/// The agent as a file. Written once, before any process is started: a child that is not yet executed
/// would have the file open for writing, and it could not be executed.
fn agent() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("agent");
        std::fs::write(&path, AGENT).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    })
}

impl Talk {
    fn start(request: &StartRequest) -> Self {
        let pty = nix::pty::openpty(None, None).unwrap();
        let tty = nix::unistd::ttyname(&pty.slave).unwrap();
        nix::fcntl::fcntl(
            &pty.master,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .unwrap();
        // A shell has it ignored in what it runs in the background, and commands would inherit that.
        // SAFETY: no handler comes or goes.
        unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) }.unwrap();
        let agent = Command::new(agent())
            .arg("--channel")
            .arg(tty)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            agent,
            channel: File::from(pty.master),
            _user_side: pty.slave,
            client: AgentClient::new(request).unwrap(),
            input: Vec::new(),
            events: Vec::new(),
            stdout: Vec::new(),
            stderr: Vec::new(),
            begun: Instant::now(),
        }
    }

    /// Moves bytes until `done`.
    fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            assert!(
                self.begun.elapsed() < LIMIT,
                "too slow; events: {:?}",
                self.events
            );
            self.step();
        }
    }

    fn step(&mut self) {
        let n = self.client.stdin(&self.input);
        self.input.drain(..n);
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, !self.client.outgoing().is_empty());
        poll(
            &mut [PollFd::new(self.channel.as_fd(), flags)],
            PollTimeout::from(20u8),
        )
        .unwrap();
        if let Ok(n) = self.channel.write(self.client.outgoing()) {
            self.client.sent(n);
        }
        let mut bytes = [0; 4096];
        let n = self.channel.read(&mut bytes).unwrap_or(0);
        let mut events = Vec::new();
        self.client.received(&bytes[..n], &mut events);
        for event in events {
            match event {
                AgentEvent::Stdout(b) => {
                    self.stdout.extend_from_slice(&b);
                    self.client.consumed(b.len());
                }
                AgentEvent::Stderr(b) => {
                    self.stderr.extend_from_slice(&b);
                    self.client.consumed(b.len());
                }
                other => self.events.push(other),
            }
        }
    }

    fn finish(&mut self) -> AgentEvent {
        let is_end = |e: &AgentEvent| {
            matches!(
                e,
                AgentEvent::Exited(_)
                    | AgentEvent::Failed(_)
                    | AgentEvent::ProtocolError(_)
                    | AgentEvent::Stopping(_)
            )
        };
        self.until(|talk| talk.events.iter().any(is_end));
        self.events.iter().find(|e| is_end(e)).unwrap().clone()
    }

    fn stdout_has(&mut self, text: &str) {
        self.until(|talk| String::from_utf8_lossy(&talk.stdout).contains(text));
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn request(argv: &[&str]) -> StartRequest {
    StartRequest {
        argv: argv.iter().map(Into::into).collect(),
        env: vec!["PATH=/usr/bin:/bin".into(), "GREETING=hello".into()],
        ..StartRequest::default()
    }
}

fn sh(script: &str) -> StartRequest {
    request(&["sh", "-c", script])
}

fn run(request: &StartRequest) -> (AgentEvent, String, String) {
    let mut talk = Talk::start(request);
    talk.client.stdin_eof();
    let end = talk.finish();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (end, text(&talk.stdout), text(&talk.stderr))
}

fn failure(request: &StartRequest) -> AgentFailure {
    match run(request).0 {
        AgentEvent::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn exit_codes_and_separate_outputs() {
    let (end, out, err) = run(&sh("echo out; echo err >&2; exit 37"));
    assert_eq!(end, AgentEvent::Exited(Exit::Code(37)));
    assert_eq!((out.as_str(), err.as_str()), ("out\n", "err\n"));
}

#[test]
fn environment_and_directory_are_those_given() {
    let request = StartRequest {
        cwd: Some("/usr".into()),
        ..request(&["env", "--", "pwd"])
    };
    assert_eq!(run(&request).1, "/usr\n");
    let (_, out, _) = run(&self::request(&["env"]));
    let mut lines: Vec<&str> = out.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["GREETING=hello", "PATH=/usr/bin:/bin"]);
}

#[test]
fn a_long_command_line_arrives_whole() {
    let long = "x".repeat(100_000);
    let (_, out, _) = run(&request(&["printf", "%s", &long]));
    assert_eq!(out, long);
}

#[test]
fn what_cannot_be_executed_says_why() {
    let missing = failure(&request(&["no-such-program"]));
    assert_eq!(
        (missing.exit_code(), missing.text.as_str()),
        (127, "no-such-program")
    );
    assert_eq!(failure(&request(&["/no/such/program"])).exit_code(), 127);
    assert_eq!(failure(&request(&["/etc/passwd"])).exit_code(), 126);
    assert_eq!(failure(&request(&["/usr"])).exit_code(), 126);
    let cwd = failure(&StartRequest {
        cwd: Some("/nowhere".into()),
        ..request(&["true"])
    });
    assert_eq!((cwd.stage, cwd.text.as_str()), (Stage::Cwd, "/nowhere"));

    let directory = tempfile::tempdir().unwrap();
    let script = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let orphan = failure(&request(&[&script("orphan", "#!/no/interpreter\n")]));
    assert_eq!(
        (orphan.stage, orphan.exit_code()),
        (Stage::Interpreter, 127)
    );
    let plain = script("plain", "echo \"plain $1\"\n");
    assert_eq!(run(&request(&[&plain, "script"])).1, "plain script\n");
}

#[test]
fn signals_reach_the_process_group_and_are_reported() {
    let (end, ..) = run(&sh("kill -9 $$"));
    assert_eq!(end, AgentEvent::Exited(Exit::Signal(9)));
    let mut talk = Talk::start(&sh(
        "trap 'echo got; exit 3' INT; echo up; while :; do sleep 0.1; done",
    ));
    talk.stdout_has("up\n");
    talk.client.signal(2);
    assert_eq!(talk.finish(), AgentEvent::Exited(Exit::Code(3)));
    assert_eq!(talk.stdout, b"up\ngot\n");
}

#[test]
fn ten_megabytes_come_intact_through_a_small_window() {
    let (end, out, err) = run(&sh("seq 1 1400000; seq 1 1000 >&2"));
    assert_eq!(end, AgentEvent::Exited(Exit::Code(0)));
    let expected = |n: u32| (1..=n).fold(String::new(), |s, i| s + &i.to_string() + "\n");
    assert!(out.len() > 10_000_000);
    assert!(out == expected(1_400_000), "stdout is damaged");
    assert!(err == expected(1000), "stderr is damaged");
}

#[test]
fn stdin_arrives_whole_and_ends() {
    let mut talk = Talk::start(&sh("cat; echo end"));
    let input: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    talk.input = input.clone();
    talk.until(|talk| talk.input.is_empty());
    talk.client.stdin_eof();
    assert_eq!(talk.finish(), AgentEvent::Exited(Exit::Code(0)));
    assert!(
        talk.stdout == [&input[..], b"end\n"].concat(),
        "input is damaged"
    );
}

#[test]
fn a_command_that_reads_nothing_does_not_block_its_end() {
    let mut talk = Talk::start(&sh("exec <&-; sleep 0.3; exit 5"));
    talk.input = vec![b'x'; 100_000];
    assert_eq!(talk.finish(), AgentEvent::Exited(Exit::Code(5)));
}

#[test]
fn a_terminal_has_its_size_echoes_and_takes_control_characters() {
    let tty = Some(WinSize { rows: 33, cols: 99 });
    let script = "test -t 0 && test -t 2 && stty size; echo err >&2; \
                  read line; echo \"got $line\"; stty size; read other; echo never";
    let mut talk = Talk::start(&StartRequest { tty, ..sh(script) });
    talk.stdout_has("33 99\r\nerr\r\n");
    talk.client.resize(WinSize {
        rows: 44,
        cols: 111,
    });
    talk.input = b"typed\r".to_vec();
    talk.stdout_has("got typed\r\n44 111\r\n");
    talk.input = vec![3];
    assert_eq!(talk.finish(), AgentEvent::Exited(Exit::Signal(2)));
    let out = String::from_utf8_lossy(&talk.stdout).into_owned();
    assert_eq!(
        out.matches("typed\r\n").count(),
        2,
        "echo and answer: {out:?}"
    );
    assert!(out.contains("^C"), "{out:?}");
    assert!(talk.stderr.is_empty());
}

#[test]
fn a_process_left_behind_does_not_hold_the_end_and_its_last_words_are_kept() {
    let begun = Instant::now();
    // The substitution ends when the process behind has written.
    let (end, out, _) = run(&sh(
        "exec 3>&1; : $( (echo from behind >&3; exec sleep 200 >&3) & ); echo from command",
    ));
    assert_eq!(end, AgentEvent::Exited(Exit::Code(0)));
    let mut lines: Vec<&str> = out.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["from behind", "from command"]);
    assert!(begun.elapsed() < LIMIT);
    let (end, ..) = run(&sh("yes & exit 4"));
    assert_eq!(end, AgentEvent::Exited(Exit::Code(4)));
}

#[test]
fn all_output_written_before_the_end_arrives_though_the_host_is_slow() {
    let mut talk = Talk::start(&sh("sleep 9 & head -c 60000 /dev/zero"));
    talk.until(|talk| !talk.stdout.is_empty());
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(talk.finish(), AgentEvent::Exited(Exit::Code(0)));
    assert_eq!(talk.stdout.len(), 60_000);
}

#[test]
fn orphans_are_reaped() {
    let script = "(sleep 0.1 & echo $! >&2); read pid <&0; n=0; \
                  while test -e /proc/$pid && test $n -lt 300; do sleep 0.1; n=$((n + 1)); done; \
                  test -e /proc/$pid && echo zombie || echo reaped";
    let mut talk = Talk::start(&sh(script));
    talk.until(|talk| talk.stderr.ends_with(b"\n"));
    talk.input = talk.stderr.clone();
    talk.finish();
    assert_eq!(talk.stdout, b"reaped\n");
}

#[test]
fn shutdown_ends_even_what_ignores_it() {
    let mut talk = Talk::start(&sh(
        "trap '' TERM HUP; echo up; while :; do sleep 0.1; done",
    ));
    talk.stdout_has("up\n");
    talk.client.shutdown(Power::Reboot);
    assert_eq!(talk.finish(), AgentEvent::Stopping(Power::Reboot));
    assert!(talk.agent.wait().unwrap().success());
}

#[test]
fn what_a_command_says_while_the_guest_goes_down_is_kept() {
    let mut talk = Talk::start(&sh(
        "trap '' HUP; trap 'echo last words; exit' TERM; echo up; while :; do sleep 0.1; done",
    ));
    talk.stdout_has("up\n");
    talk.client.shutdown(Power::Off);
    talk.stdout_has("last words\n");
    assert!(talk.agent.wait().unwrap().success());
    assert_eq!(talk.events.last(), Some(&AgentEvent::Stopping(Power::Off)));
}

#[test]
fn damage_on_the_way_to_the_agent_is_reported() {
    let mut talk = Talk::start(&sh("sleep 30"));
    talk.until(|talk| {
        talk.events
            .iter()
            .any(|e| matches!(e, AgentEvent::Started { .. }))
    });
    talk.channel
        .write_all(b"not a frame of the protocol")
        .unwrap();
    match talk.finish() {
        AgentEvent::Failed(failure) => assert_eq!(failure.stage, Stage::Protocol),
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_channel_it_says_how_it_is_used() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent");
    std::fs::write(&path, AGENT).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    let run = |args: &[&str]| Command::new(agent()).args(args).output().unwrap();
    assert_eq!(run(&[]).status.code(), Some(125));
    let output = run(&["--channel", "/no/such/tty"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/no/such/tty"));
}

/// The output of the command `number` beside the first, and how it ended.
fn beside(talk: &mut Talk, number: u8) -> (Vec<u8>, AgentEvent) {
    let mut output = Vec::new();
    loop {
        talk.until(|talk| {
            let mut events = talk.events.iter();
            events.any(|event| matches!(event, AgentEvent::Extra(n, _) if *n == number))
        });
        let is_it = |event: &AgentEvent| matches!(event, AgentEvent::Extra(n, _) if *n == number);
        let at = talk.events.iter().position(is_it).unwrap();
        let AgentEvent::Extra(_, event) = talk.events.remove(at) else {
            unreachable!()
        };
        match *event {
            AgentEvent::Stdout(bytes) | AgentEvent::Stderr(bytes) => {
                talk.client.with(number, |job| job.consumed(bytes.len()));
                output.extend(bytes);
            }
            AgentEvent::Started { .. } => {}
            end => return (output, end),
        }
    }
}

#[test]
fn commands_run_beside_the_first() {
    let mut talk = Talk::start(&request(&["cat"]));
    talk.until(|talk| {
        talk.events
            .iter()
            .any(|e| matches!(e, AgentEvent::Started { .. }))
    });
    let echo = request(&["sh", "-c", "echo $0 $A; exit 3", "beside"]);
    let mut with_env = echo.clone();
    with_env.env.push("A=b".into());
    let number = talk.client.begin(&with_env).unwrap();
    let (output, end) = beside(&mut talk, number);
    assert_eq!(String::from_utf8_lossy(&output), "beside b\n");
    assert_eq!(end, AgentEvent::Exited(Exit::Code(3)));
    let number = talk.client.begin(&request(&["/nothing"])).unwrap();
    let (_, end) = beside(&mut talk, number);
    assert!(matches!(end, AgentEvent::Failed(f) if f.exit_code() == 127));
    // The first goes on meanwhile.
    talk.input.extend(b"still here\n");
    talk.stdout_has("still here");
    talk.client.stdin_eof();
    assert_eq!(talk.finish(), AgentEvent::Exited(Exit::Code(0)));
}

#[test]
fn seven_at_once_have_their_own_input_and_output() {
    let mut talk = Talk::start(&request(&["sleep", "600"]));
    talk.until(|talk| {
        talk.events
            .iter()
            .any(|e| matches!(e, AgentEvent::Started { .. }))
    });
    let numbers: Vec<u8> = (0..7)
        .map(|_| talk.client.begin(&request(&["cat"])).unwrap())
        .collect();
    talk.client.begin(&request(&["cat"])).unwrap_err();
    let input = |number: u8| vec![b'0' + number; 100_000];
    let mut given = [0usize; 8];
    let mut outputs = vec![Vec::new(); 8];
    let mut ended = 0;
    while ended < numbers.len() {
        for number in &numbers {
            let at = &mut given[usize::from(*number)];
            let bytes = &input(*number)[*at..];
            *at += talk
                .client
                .with(*number, |job| {
                    if bytes.is_empty() {
                        job.stdin_eof();
                    }
                    job.stdin(bytes)
                })
                .unwrap_or(0);
        }
        talk.step();
        for event in std::mem::take(&mut talk.events) {
            let AgentEvent::Extra(number, event) = event else {
                continue;
            };
            match *event {
                AgentEvent::Stdout(bytes) => {
                    talk.client.with(number, |job| job.consumed(bytes.len()));
                    outputs[usize::from(number)].extend(bytes);
                }
                AgentEvent::Exited(exit) => {
                    assert_eq!(exit, Exit::Code(0));
                    ended += 1;
                }
                _ => {}
            }
        }
        assert!(talk.begun.elapsed() < LIMIT, "{given:?}");
    }
    for number in numbers {
        assert_eq!(outputs[usize::from(number)], input(number), "{number}");
    }
    // Numbers are free again, and signals reach the one that they are for.
    let number = talk.client.begin(&request(&["sleep", "600"])).unwrap();
    talk.until(|talk| {
        talk.events
            .iter()
            .any(|e| matches!(e, AgentEvent::Extra(_, _)))
    });
    talk.client.with(number, |job| job.signal(15));
    let (_, end) = beside(&mut talk, number);
    assert_eq!(end, AgentEvent::Exited(Exit::Signal(15)));
}
