//! bulle under the name `jailer`. Needs root, as jails do.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

use crate::client::Client;
use crate::common::{self, Input, Outcome, Running};

/// Nobody's.
const UID: u32 = 30_001;
const GID: u32 = 30_002;
const ID: &str = "one-1";
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory with bulle's two names, and the jails.
pub struct Jails(TempDir);

impl Jails {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        for name in ["jailer", "firecracker"] {
            symlink(env!("CARGO_BIN_EXE_bulle"), dir.path().join(name)).unwrap();
        }
        Self(dir)
    }

    fn base(&self) -> PathBuf {
        self.0.path().join("jails")
    }

    /// What is `/` in the jail.
    pub fn root(&self) -> PathBuf {
        self.base().join("firecracker").join(ID).join("root")
    }

    /// A payload as /kernel in the jail to come.
    pub fn with_kernel(self, payload: &str) -> Self {
        fs::create_dir_all(self.root()).unwrap();
        let kernel = self.root().join("kernel");
        fs::copy(common::payload(payload), &kernel).unwrap();
        fs::set_permissions(kernel, Permissions::from_mode(0o644)).unwrap();
        self
    }

    fn command(&self, options: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::new(self.0.path().join("jailer"));
        command.args(["--id", ID, "--exec-file"]);
        command.arg(self.0.path().join("firecracker"));
        command.args(["--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        command.arg("--chroot-base-dir").arg(self.base());
        command.args(options).arg("--").args(arguments);
        command
    }

    pub fn start(&self, options: &[&str], arguments: &[&str]) -> Running {
        Running::start(self.command(options, arguments), Input::Open, PATIENCE)
    }

    fn outcome(&self, options: &[&str], arguments: &[&str]) -> Outcome {
        Running::start(self.command(options, arguments), Input::Null, PATIENCE).finish()
    }

    pub fn client(&self, socket: &str) -> Client {
        Client::connect(&self.root().join(socket))
    }

    /// The process that says that it is in the jail.
    pub fn pid(&self) -> i32 {
        let text = fs::read_to_string(self.root().join("firecracker.pid")).unwrap();
        text.parse().unwrap()
    }
}

fn proc(pid: i32, file: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap()
}

/// The fields of a line of /proc/PID/status.
pub fn status(pid: i32, key: &str) -> Vec<String> {
    let text = proc(pid, "status");
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let fields = line.unwrap().trim_start_matches(':');
    fields.split_whitespace().map(str::to_owned).collect()
}

fn same_file(one: impl AsRef<Path>, other: impl AsRef<Path>) -> bool {
    let file = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    file(one.as_ref()).unwrap() == file(other.as_ref()).unwrap()
}

fn boot(client: &mut Client, kernel: &str, arguments: &str) {
    let source = json!({ "kernel_image_path": kernel, "boot_args": arguments });
    client
        .ask("PUT", "/boot-source", &source.to_string())
        .done();
    let action = json!({ "action_type": "InstanceStart" }).to_string();
    client.ask("PUT", "/actions", &action).done();
}

#[test]
fn a_guest_runs_in_a_jail() {
    let jails = Jails::new().with_kernel("exit_code");
    let running = jails.start(&["--resource-limit", "fsize=1000000"], &[]);
    let mut client = jails.client("run/firecracker.socket");
    let pid = jails.pid();
    assert_eq!(pid, running.pid().as_raw());
    assert_eq!(proc(pid, "comm"), "firecracker\n");
    assert_eq!(status(pid, "Uid"), vec![UID.to_string(); 4]);
    assert_eq!(status(pid, "Gid"), vec![GID.to_string(); 4]);
    assert_eq!(status(pid, "Groups"), Vec::<String>::new());
    assert_eq!(status(pid, "CapEff"), ["0000000000000000"]);
    assert!(same_file(format!("/proc/{pid}/root/."), jails.root()));
    assert_eq!(
        proc(pid, "mountinfo").lines().count(),
        1,
        "the host's mounts are seen"
    );
    let limits = proc(pid, "limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max open files"), "2048");
    assert_eq!(limit("Max file size"), "1000000");
    assert_eq!(proc(pid, "environ").trim_matches('\0'), "");
    for (path, mode) in [
        ("dev", 0o40_700),
        ("dev/kvm", 0o20_600),
        ("dev/net/tun", 0o20_600),
        ("run", 0o40_700),
    ] {
        let file = fs::symlink_metadata(jails.root().join(path)).unwrap();
        assert_eq!(
            (file.mode(), file.uid(), file.gid()),
            (mode, UID, GID),
            "{path}"
        );
    }
    let answer = client.ask("GET", "/", "").value();
    assert_eq!(answer["id"], ID);
    // A file of the host's is not there.
    let outside = common::payload("exit_code").display().to_string();
    let source = json!({ "kernel_image_path": outside }).to_string();
    client
        .ask("PUT", "/boot-source", &source)
        .refused(&["kernel", "No such file"]);
    boot(&mut client, "/kernel", "exit=37");
    running.finish().exits(37).prints("exit=37");
}

#[test]
fn a_daemon_in_a_namespace_of_processes() {
    let jails = Jails::new().with_kernel("exit_code");
    // Another group of processes than the test's, so that it is a leader.
    let mut command = jails.command(&["--daemonize", "--new-pid-ns"], &["--api-sock", "/s"]);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    Running::start(command, Input::Null, PATIENCE)
        .finish()
        .exits(0);
    let mut client = jails.client("s");
    let pid = jails.pid();
    assert_eq!(status(pid, "NSpid"), [pid.to_string().as_str(), "1"]);
    for fd in 0..3 {
        assert!(same_file(format!("/proc/{pid}/fd/{fd}"), "/dev/null"));
    }
    let stat = proc(pid, "stat");
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let own = fs::read_to_string("/proc/self/stat").unwrap();
    let own: Vec<_> = own.rsplit_once(") ").unwrap().1.split(' ').collect();
    assert_ne!(fields[3], own[3], "the test's session");
    assert_eq!(client.ask("GET", "/", "").value()["state"], "Not started");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let begin = Instant::now();
    while Path::new(&format!("/proc/{pid}/root/s")).exists() {
        assert!(begin.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    // The next in the same jail.
    fs::remove_file(jails.root().join("s")).unwrap();
    let running = jails.start(&[], &["--api-sock", "/s"]);
    jails.client("s");
    assert_eq!(jails.pid(), running.pid().as_raw());
}

#[test]
fn a_control_group() {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let v1 = mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let pids = fields[2] == "cgroup" && fields[3].split(',').any(|word| word == "pids");
        pids.then(|| PathBuf::from(fields[1]))
    });
    let v2 = mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
    });
    let version = if v1.is_some() { "1" } else { "2" };
    let top = v1.or(v2).expect("control groups");
    let parent = format!("bulle-test-{}", std::process::id());
    let options = [
        "--cgroup",
        "pids.max=77",
        "--cgroup-version",
        version,
        "--parent-cgroup",
        &parent,
    ];
    let jails = Jails::new();
    let running = jails.start(&options, &["--api-sock", "/s"]);
    jails.client("s");
    let own = top.join(&parent).join(ID);
    let max = fs::read_to_string(own.join("pids.max")).unwrap();
    let procs = fs::read_to_string(own.join("cgroup.procs")).unwrap();
    drop(running);
    let begin = Instant::now();
    while fs::remove_dir(&own).is_err() {
        assert!(begin.elapsed() < PATIENCE, "the group stays busy");
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::remove_dir(top.join(&parent)).unwrap();
    assert_eq!(
        (max.trim(), procs.trim()),
        ("77", jails.pid().to_string().as_str())
    );
    let absent = ["--cgroup", "nonesuch.max=1", "--cgroup-version", version];
    let outcome = Jails::new().outcome(&absent, &[]).exits(1);
    outcome.complains("controller 'nonesuch'");
}

/// Whoever may write into the jail cannot have root do anything outside it.
#[test]
fn links_in_the_jail_lead_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("file");
    fs::write(&target, "mine").unwrap();
    let untouched = || {
        let names = fs::read_dir(outside.path()).unwrap().count();
        let file = fs::metadata(&target).unwrap();
        let content = fs::read_to_string(&target).unwrap();
        assert_eq!((names, content.as_str(), file.uid()), (1, "mine", 0));
        assert_eq!(fs::metadata(outside.path()).unwrap().uid(), 0);
    };
    for (path, target) in [
        ("dev", outside.path()),
        ("run", outside.path()),
        ("dev/net", outside.path()),
        ("dev/kvm", target.as_path()),
    ] {
        let jails = Jails::new();
        let link = jails.root().join(path);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(target, &link).unwrap();
        let outcome = jails.outcome(&[], &[]).exits(1);
        outcome.complains(&format!("cannot make /{path} in the jail"));
        untouched();
    }
    // The jail's own directory.
    for depth in 0..3 {
        let jails = Jails::new();
        let link = jails.root();
        let link = link.ancestors().nth(2 - depth).unwrap();
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(outside.path(), link).unwrap();
        let outcome = jails.outcome(&[], &[]).exits(1);
        outcome.complains(&format!(
            "cannot make the jail's directory {}",
            link.display()
        ));
        untouched();
    }
    // The file with the process's number.
    let jails = Jails::new();
    fs::create_dir_all(jails.root()).unwrap();
    symlink(&target, jails.root().join("firecracker.pid")).unwrap();
    let running = jails.start(&[], &["--api-sock", "/s"]);
    jails.client("s");
    assert_eq!(jails.pid(), running.pid().as_raw());
    untouched();
}

#[test]
fn jails_that_cannot_be_made() {
    let jails = Jails::new();
    let jailer = |arguments: &[&str]| {
        let mut command = Command::new(jails.0.path().join("jailer"));
        command.args(arguments);
        Running::start(command, Input::Null, PATIENCE).finish()
    };
    jailer(&["--version"]).exits(0).prints("Jailer v1.");
    let needed = jailer(&["--id", "x"]).exits(1);
    needed.complains("--exec-file <FILE>");
    let own = [
        "--exec-file",
        env!("CARGO_BIN_EXE_bulle"),
        "--uid",
        "1",
        "--gid",
        "1",
    ];
    for (id, more, word) in [
        ("../x", &[][..], "1 to 64 letters"),
        ("x", &["--cgroup", "cpu=1"], "CONTROLLER.FILE=VALUE"),
        ("x", &["--cgroup-version", "3"], "give 1 or 2"),
        (
            "x",
            &["--resource-limit", "core=1"],
            "fsize=BYTES or no-file=COUNT",
        ),
        (
            "x",
            &["--parent-cgroup", "a/../../b"],
            "--parent-cgroup a/../../b",
        ),
        (
            "x",
            &["--netns", "/nonexistent"],
            "network namespace /nonexistent",
        ),
    ] {
        let base = jails.base().display().to_string();
        let arguments = [&["--id", id, "--chroot-base-dir", &base], &own[..], more].concat();
        jailer(&arguments).exits(1).complains(word);
    }
    let shell = [
        "--id",
        "x",
        "--exec-file",
        "/bin/sh",
        "--uid",
        "1",
        "--gid",
        "1",
    ];
    jailer(&shell).exits(1).complains("it jails bulle only");
    let mut other = Command::new("setpriv");
    other.args(["--reuid", "30001", "--clear-groups", "--"]);
    // Under that name by way of a copy that anybody may execute.
    let copy = jails.0.path().join("copy");
    fs::create_dir(&copy).unwrap();
    // By a process of its own: what this one writes another test's child may have open.
    let bulle = Path::new(env!("CARGO_BIN_EXE_bulle"));
    let mut cp = Command::new("cp");
    let copied = cp.arg("-p").args([bulle, &copy.join("jailer")]).status();
    assert!(copied.unwrap().success());
    other
        .arg(copy.join("jailer"))
        .args(["--id", "x", "--exec-file"]);
    other
        .arg(copy.join("jailer"))
        .args(["--uid", "1", "--gid", "1"]);
    let outcome = Running::start(other, Input::Null, PATIENCE)
        .finish()
        .exits(1);
    outcome.complains("made by root");
}

/// A network namespace, gone when dropped.
struct Netns(String);

impl Netns {
    fn new() -> Self {
        let this = Self(format!("bulle-test-{}", std::process::id()));
        this.ip(&["netns", "add", &this.0]);
        this
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    fn ip(&self, arguments: &[&str]) {
        let status = Command::new("ip").args(arguments).status().unwrap();
        assert!(status.success(), "ip {arguments:?}: {status}");
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.ip(&["netns", "delete", &self.0]);
    }
}

/// The tap of a network namespace that `ip netns` made, which is the user's and nobody else's.
#[test]
fn a_network_namespace() {
    let netns = Netns::new();
    let user = UID.to_string();
    netns.ip(&[
        "-n", &netns.0, "tuntap", "add", "dev", "vm0", "mode", "tap", "user", &user,
    ]);
    let jails = Jails::new().with_kernel("hlt_interruptible");
    let path = netns.path();
    let running = jails.start(&["--netns", path.to_str().unwrap()], &["--api-sock", "/s"]);
    let mut client = jails.client("s");
    let pid = jails.pid();
    assert!(same_file(format!("/proc/{pid}/ns/net"), &path));
    assert!(!same_file(
        format!("/proc/{pid}/ns/net"),
        "/proc/self/ns/net"
    ));
    let interface = json!({ "iface_id": "eth0", "host_dev_name": "vm0" });
    client
        .ask("PUT", "/network-interfaces/eth0", &interface.to_string())
        .done();
    boot(&mut client, "/kernel", "");
    assert!(proc(pid, "net/dev").contains("vm0:"));
    drop(running);
}

/// A snapshot is made in one jail and loaded in another, neither of which has a /proc.
#[test]
fn snapshots_in_jails() {
    let jails = Jails::new().with_kernel("hlt_interruptible");
    let running = jails.start(&[], &["--api-sock", "/s"]);
    let mut client = jails.client("s");
    let mut ask = |method: &str, path: &str, body: serde_json::Value| {
        client.ask(method, path, &body.to_string()).done();
    };
    ask(
        "PUT",
        "/machine-config",
        json!({ "vcpu_count": 1, "mem_size_mib": 32, "track_dirty_pages": true }),
    );
    ask(
        "PUT",
        "/boot-source",
        json!({ "kernel_image_path": "/kernel" }),
    );
    ask("PUT", "/actions", json!({ "action_type": "InstanceStart" }));
    ask("PATCH", "/vm", json!({ "state": "Paused" }));
    for (kind, number) in [("Full", 1), ("Diff", 2)] {
        let (state, memory) = (format!("/state{number}"), format!("/memory{number}"));
        ask(
            "PUT",
            "/snapshot/create",
            json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory }),
        );
    }
    // The guest did nothing between both, as the pages tell that it has.
    let [all, changes] = ["memory1", "memory2"].map(|name| {
        let file = fs::metadata(jails.root().join(name)).unwrap();
        file.blocks() * 512
    });
    assert!(changes <= 64 << 10 && changes < all, "{changes} of {all}");
    drop(running);
    fs::remove_file(jails.root().join("s")).unwrap();
    let _running = jails.start(&["--new-pid-ns"], &["--api-sock", "/s"]);
    let mut client = jails.client("s");
    let body = json!({ "snapshot_path": "/state1", "mem_backend": { "backend_type": "File", "backend_path": "/memory1" }, "resume_vm": true });
    client
        .ask("PUT", "/snapshot/load", &body.to_string())
        .done();
    assert_eq!(client.ask("GET", "/", "").value()["state"], "Running");
    // Who is in the namespace outlives the one that made it.
    kill(Pid::from_raw(jails.pid()), Signal::SIGKILL).unwrap();
}

/// What needs a /proc or programs says so, and the jail's process goes on.
#[test]
fn devices_that_no_jail_has() {
    let share = json!({ "tag": "share0", "path_on_host": "/run" });
    let interface = json!({ "iface_id": "eth0", "mode": "user" });
    for (section, device, word) in [
        ("shares", share, "/proc/self/fd"),
        ("network-interfaces", interface, "passt"),
    ] {
        let jails = Jails::new().with_kernel("hlt_interruptible");
        let mut config = json!({ "boot-source": { "kernel_image_path": "/kernel" } });
        config[section] = json!([device]);
        let file = jails.root().join("vm.json");
        fs::write(&file, config.to_string()).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        let arguments = ["--api-sock", "/s", "--config-file", "/vm.json"];
        let outcome = jails.outcome(&[], &arguments);
        outcome.complains(word);
    }
}
