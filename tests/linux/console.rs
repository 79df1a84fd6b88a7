//! The virtio console with Debian's own driver, on both transports: the agent's port, hvc0, named
//! ports.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::common::{Bulle, Input, debian_kernel};
use crate::{busybox, initrd, linux};

const MIB: usize = 1 << 20;
/// Input and output of a command.
const BULK: usize = 16 * MIB;
/// Through a port.
const SOME: usize = MIB / 2;
/// Much data takes a while in the lab.
const PATIENCE: Duration = Duration::from_secs(300);

/// The device file of a port by its name, as udev would find it.
const PORT: &str = "port() { for d in /sys/class/virtio-ports/*; do
        [ \"$(cat $d/name 2>/dev/null)\" = $1 ] && echo /dev/${d##*/}; done; }; ";
/// What the agent speaks to its host through.
const CHANNEL: &str = "for f in /proc/1/fd/*; do readlink $f; done | grep -E 'ttyS1|vport'; ";

fn patient(flavour: &str) -> Bulle {
    linux(flavour).patience(PATIENCE).timeout("280s")
}

/// Lines that are all different, `len` bytes in all.
fn text(len: usize) -> String {
    let mut text: String = (0..len / 16).map(|n| format!("{n:015x}\n")).collect();
    text.truncate(len);
    text
}

fn md5(bytes: &[u8]) -> String {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let output = std::process::Command::new("md5sum")
        .arg(file.path())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}

/// A command gets all of its input and nothing else, and so does the host its output, at once.
fn bulk(flavour: &str, options: &[&str]) {
    let sent = text(BULK);
    let script = format!("{CHANNEL} tee /dev/stderr | md5sum; exit 7");
    let bulle = patient(flavour)
        .args(options)
        .input(Input::Bytes(sent.clone().into_bytes()));
    let outcome = bulle.command(["sh", "-c", &script]).outcome().exits(7);
    let mut lines = outcome.stdout.lines();
    assert!(
        lines.next().unwrap().starts_with("/dev/vport"),
        "{}",
        outcome.stdout
    );
    assert!(
        lines.next().unwrap().starts_with(&md5(sent.as_bytes())),
        "{}",
        outcome.stdout
    );
    assert!(
        outcome.stderr == sent,
        "{} bytes came back of {BULK}",
        outcome.stderr.len()
    );
}

#[test]
fn much_input_and_output_on_mmio() {
    bulk("amd64", &[]);
}

#[test]
fn much_input_and_output_on_pci() {
    bulk("cloud-amd64", &["--pci"]);
}

/// The kernel's modules without that of the virtio console.
fn modules_without_console(dir: &Path) -> PathBuf {
    let kernel = debian_kernel("cloud-amd64");
    let release = kernel
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .trim_start_matches("vmlinuz-");
    let installed = Path::new("/lib/modules").join(release);
    let modules = dir.join("modules");
    fs::create_dir(&modules).unwrap();
    symlink(installed.join("kernel"), modules.join("kernel")).unwrap();
    let index = fs::read_to_string(installed.join("modules.dep")).unwrap();
    let lines = index
        .lines()
        .filter(|line| !line.contains("virtio_console.ko"));
    let index: Vec<_> = lines.collect();
    fs::write(modules.join("modules.dep"), index.join("\n") + "\n").unwrap();
    modules
}

#[test]
fn a_guest_without_the_driver_or_told_otherwise_has_its_agent_on_the_uart() {
    let dir = tempfile::tempdir().unwrap();
    let modules = modules_without_console(dir.path());
    let modules = modules.to_str().unwrap();
    let script = format!("{CHANNEL} cat; exit 5");
    for options in [
        ["--modules", modules],
        ["--append", "bulle.agent=ttyS1"],
        ["--append", "bulle.agent=port:no.such.port,ttyS1"],
    ] {
        let input = Input::Bytes(b"over the uart\n".to_vec());
        let bulle = patient("cloud-amd64").args(options).input(input);
        let outcome = bulle.command(["sh", "-c", &script]).outcome().exits(5);
        assert_eq!(
            outcome.stdout, "/dev/ttyS1\nover the uart\n",
            "{options:?}: {outcome:#?}"
        );
    }
}

/// Bytes go both ways through a socket's port and into a file's, clients take turns, a client that
/// does not read stops its writer and nothing else, hvc0 floods a file.
fn ports(flavour: &str, options: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // Ports are there one after the other, the last of them last.
    let script = format!(
        "{PORT} dmesg -n 1; until [ $(port deaf) ]; do sleep 0.1; done; s=$(port com.example.socket); f=$(port file); d=$(port deaf)
        exec 3<>$s; head -c {SOME} <&3 | md5sum >&3; echo first done
        head -c {SOME} /dev/zero | tr '\\0' x >&3
        # The end of the first client, and the next.
        while ! read -r line <&3; do sleep 0.1; done; echo second says $line
        cat /dev/zero >$d & sleep 1
        seq 1 50000 >$f; echo BEGIN >/dev/hvc0; seq 1 300 >/dev/hvc0
        echo END >/dev/hvc0; kill %1; echo alive"
    );
    // A console takes sixteen bytes at a time, for which the processor waits.
    let bulle = patient(flavour)
        .args(["--append", "quiet"])
        .arg("--console")
        .arg(format!("hvc0={}", path("hvc0").display()))
        .arg("--port")
        .arg(format!("com.example.socket=socket:{}", path("s").display()))
        .arg("--port")
        .arg(format!("file=file:{}", path("f").display()))
        .arg("--port")
        .arg(format!("deaf=socket:{}", path("d").display()))
        .args(options);
    let running = bulle.command(["sh", "-c", &script]).start();
    while !path("s").exists() || !path("d").exists() {
        thread::sleep(Duration::from_millis(20));
    }
    // Clients wait for the guest, however early they are.
    let mut deaf = UnixStream::connect(path("d")).unwrap();
    let mut first = UnixStream::connect(path("s")).unwrap();
    let mut second = UnixStream::connect(path("s")).unwrap();
    let sent = text(SOME);
    first.write_all(sent.as_bytes()).unwrap();
    let mut answer = vec![0; SOME];
    first.read_exact(&mut answer[..36]).unwrap();
    assert!(answer.starts_with(md5(sent.as_bytes()).as_bytes()));
    first.read_exact(&mut answer).unwrap();
    assert!(answer.iter().all(|byte| *byte == b'x'));
    drop(first);
    second.write_all(b"hello\n").unwrap();
    let outcome = running.finish().exits(0);
    assert_eq!(
        outcome.stdout, "first done\nsecond says hello\nalive\n",
        "{outcome:#?}"
    );
    let numbers = |to: u32| -> String { (1..=to).map(|n| format!("{n}\n")).collect() };
    assert!(fs::read_to_string(path("f")).unwrap() == numbers(50_000));
    // As a terminal ends lines.
    let console = fs::read_to_string(path("hvc0"))
        .unwrap()
        .replace("\r\n", "\n");
    let flood = console
        .split("BEGIN\n")
        .nth(1)
        .and_then(|rest| rest.split("END\n").next());
    assert!(
        flood.is_some_and(|flood| flood == numbers(300)),
        "{console}"
    );
    let mut zeros = Vec::new();
    deaf.read_to_end(&mut zeros).unwrap();
    assert!(
        zeros.len() > 4096 && zeros.iter().all(|byte| *byte == 0),
        "{}",
        zeros.len()
    );
    assert!(!path("s").exists() && !path("d").exists());
}

#[test]
fn ports_and_hvc0_on_mmio() {
    ports("cloud-amd64", &[]);
}

#[test]
fn ports_and_hvc0_on_pci() {
    ports("amd64", &["--pci", "--cpus", "2"]);
}

#[test]
fn hvc0_is_the_console_of_a_guest_on_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = debian_kernel("cloud-amd64");
    let release = kernel
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .trim_start_matches("vmlinuz-");
    let drivers = Path::new("/lib/modules")
        .join(release)
        .join("kernel/drivers");
    let modules = [
        "virtio/virtio",
        "virtio/virtio_ring",
        "virtio/virtio_mmio",
        "char/virtio_console",
    ];
    fs::create_dir_all(dir.path().join("tree")).unwrap();
    for module in modules {
        let name = format!("tree/{}.ko", module.rsplit('/').next().unwrap());
        fs::copy(
            drivers.join(module).with_extension("ko"),
            dir.path().join(name),
        )
        .unwrap();
    }
    let script = "b=/bin/busybox; $b mount -t devtmpfs none /dev
        for m in virtio virtio_ring virtio_mmio virtio_console; do $b insmod /$m.ko; done
        until [ -e /dev/hvc0 ]; do $b sleep 0.1; done; $b sleep 1
        exec </dev/hvc0 >/dev/hvc0 2>&1
        $b stty -echo; echo ready for input; read -r line; echo \"the line is $line.\"; $b poweroff -f";
    assert!(busybox().exists());
    let file = initrd(dir.path(), script);
    let bulle = patient("cloud-amd64")
        .args(["--append", "quiet"])
        .args(["--root", "none", "--console", "hvc0", "--initrd"])
        .arg(file)
        .input(Input::Bytes(b"typed\n".to_vec()));
    let outcome = bulle.outcome().exits(0);
    outcome
        .prints("ready for input")
        .prints("the line is typed.");
}
