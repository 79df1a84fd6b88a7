//! Commands that find a Linux guest by its name: `bulle exec`, `console`, `logs`, `stop` and the others.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::{Input, Outcome, Running};
use crate::{PATIENCE, linux};

/// A guest called `web` whose command says `ready` and waits, and the directory in which it is found.
pub struct Guest {
    pub running: Running,
    place: TempDir,
}

impl Guest {
    pub fn start(options: &[&str]) -> Self {
        let place = tempfile::tempdir().unwrap();
        let bulle = linux("amd64").args(options).args(["--name", "web"]);
        let bulle = bulle.arg("--runtime-dir").arg(place.path());
        let script = "echo ready; exec sleep 1000";
        let bulle = bulle
            .args(["--env", "A=first"])
            .command(["sh", "-c", script]);
        let running = bulle.start().wait_for("ready");
        Self { running, place }
    }

    fn begin(&self, words: &[&str], input: Input) -> Running {
        bulle(self.place.path(), words, input)
    }

    pub fn bulle(&self, words: &[&str]) -> Outcome {
        self.begin(words, Input::Null).finish()
    }
}

fn bulle(place: &Path, words: &[&str], input: Input) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
    command.args(words).env("BULLE_RUNTIME_DIR", place);
    Running::start(command, input, PATIENCE)
}

/// Bytes of all kinds arrive as they are.
fn exact(guest: &Guest) {
    let bytes: Vec<u8> = (0..1u32 << 20).map(|i| (i ^ (i >> 8)) as u8).collect();
    let copied = guest.begin(
        &["exec", "web", "--", "md5sum"],
        Input::Bytes(bytes.clone()),
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bytes"), &bytes).unwrap();
    let sum = Command::new("md5sum")
        .arg(dir.path().join("bytes"))
        .output()
        .unwrap();
    copied
        .finish()
        .exits(0)
        .prints(&String::from_utf8_lossy(&sum.stdout)[..32]);
}

/// A terminal, several at once, and those whose client goes.
fn several(guest: &Guest) {
    let tty = [
        "exec",
        "web",
        "--tty",
        "yes",
        "--",
        "sh",
        "-c",
        "tty; stty size",
    ];
    guest
        .bulle(&tty)
        .exits(0)
        .prints("/dev/pts/")
        .prints("24 80");
    let sleepers: Vec<_> = (0..3)
        .map(|_| {
            guest.begin(
                &["exec", "web", "--", "sh", "-c", "echo up; exec sleep 1000"],
                Input::Null,
            )
        })
        .map(|running| running.wait_for("up"))
        .collect();
    guest
        .bulle(&[
            "exec",
            "web",
            "--",
            "sh",
            "-c",
            "ps | grep -c '[s]leep 1000'",
        ])
        .exits(0)
        .prints("4");
    // The client's end is a hang-up of its command.
    drop(sleepers);
    let begin = Instant::now();
    let one = [
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "ps | grep -c '[s]leep 1000'",
    ];
    while guest.bulle(&one).stdout.trim() != "1" {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What one guest is asked for, so that it boots once.
fn commands(options: &[&str]) {
    let guest = Guest::start(options);
    let said = guest.bulle(&[
        "exec",
        "web",
        "--env",
        "B=second",
        "--",
        "sh",
        "-c",
        "echo $A $B; echo wrong >&2; exit 37",
    ]);
    let said = said.exits(37);
    assert_eq!(
        (&*said.stdout, &*said.stderr),
        ("first second\n", "wrong\n")
    );
    guest
        .bulle(&["exec", "w", "--", "sh", "-c", "kill -TERM $$"])
        .exits(128 + 15);
    guest
        .bulle(&["exec", "web", "--", "nothing"])
        .exits(127)
        .complains("not found");
    exact(&guest);
    several(&guest);
    guest
        .bulle(&[
            "exec",
            "web",
            "--",
            "sh",
            "-c",
            "echo for the log > /dev/console",
        ])
        .exits(0);
    guest.bulle(&["logs", "web"]).exits(0).prints("for the log");
    guest.bulle(&["ps"]).exits(0).prints("sleep 1000");
    guest.bulle(&["stats", "web"]).exits(0).prints("NAME  CPU%");
    guest.bulle(&["pause", "web"]).exits(0);
    guest.bulle(&["ps"]).exits(0).prints("paused");
    // A guest that is paused goes on to stop.
    guest.bulle(&["stop", "--timeout", "120s", "web"]).exits(0);
    let outcome = guest.running.finish().exits(128 + 15);
    outcome.complains("stopped before the command ended");
    assert_eq!(std::fs::read_dir(guest.place.path()).unwrap().count(), 0);
}

#[test]
fn a_guest_is_commanded_by_name_over_the_port() {
    commands(&[]);
}

#[test]
fn a_shell_on_the_console_is_typed_into_from_elsewhere() {
    let place = tempfile::tempdir().unwrap();
    let script = "/bin/busybox mount -t devtmpfs none /dev
        exec /bin/busybox sh </dev/ttyS0 >/dev/ttyS0 2>&1";
    let image = crate::initrd(place.path(), script);
    let run = linux("amd64").args(["--root", "none", "--name", "own", "--initrd"]);
    let run = run
        .arg(image)
        .arg("--runtime-dir")
        .arg(place.path().join("run"));
    let vm = run.input(Input::Open).start().wait_for("# ");
    let place = place.path().join("run");
    let reader = bulle(&place, &["logs", "--follow", "own"], Input::Null);
    let typed = Input::Bytes(b"echo $((40 + 2)) things; /bin/busybox poweroff -f\n".to_vec());
    let typist = bulle(&place, &["console", "own"], typed);
    vm.finish().exits(0).prints("42 things");
    for reader in [reader, typist] {
        reader.finish().exits(0).prints("42 things");
    }
}
