//! Disks and the entropy device with Debian's own drivers, on both transports.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::{Bulle, Input, Outcome, debian_kernel};
use devices::virtio::vhost_user::peer::{Peer, PeerOptions};
use nix::sys::signal::Signal;

/// Generous, for the lab on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;

fn linux(flavour: &str) -> Bulle {
    let bulle = Bulle::run().patience(PATIENCE).timeout("290s");
    bulle.arg("--kernel").arg(debian_kernel(flavour))
}

/// A disk image of `mib` MiB, without content.
fn image(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    path
}

fn disk(path: &Path, options: &str) -> String {
    format!("path={}{options}", path.display())
}

fn shell(bulle: Bulle, script: &str) -> Outcome {
    bulle.command(["sh", "-ec", script]).outcome()
}

fn md5(path: &Path) -> String {
    let output = Command::new("md5sum").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// Patterns written by the guest are on the host's file, or with the process that serves a disk, a read-only disk stays
/// as it is, discards free blocks of the host, and the random number generator gives numbers.
fn disks(flavour: &str, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let written = image(dir.path(), "written", 32);
    let kept = image(dir.path(), "kept", 1);
    let pattern: Vec<u8> = (0..MIB as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    fs::write(&kept, &pattern).unwrap();
    let socket = dir.path().join("far");
    let far = Peer::start(&socket, MIB as usize / 512, PeerOptions::default());
    let script = "echo serials $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)
        echo readonly $(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)
        echo queues $(ls /sys/block/vda/mq | wc -l) $(ls /sys/block/vdc/mq | wc -l)
        echo kept $(md5sum </dev/vdb)
        dd if=/dev/vdb of=/dev/vdb bs=4k count=1 conv=notrunc 2>/dev/null && echo wrote to a read-only disk
        for n in 1 2 3 4 5 6 7 8; do cat /dev/vdb; done | dd of=/dev/vda bs=64k conv=fsync 2>/dev/null
        dd if=/dev/vdb of=/dev/vdc bs=64k conv=fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches; echo far $(md5sum </dev/vdc)
        dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum | sed 's/^/back /'
        blkdiscard -o 4194304 -l 4194304 /dev/vda || echo cannot discard
        dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c | sed 's/^/random /'";
    let outcome = shell(
        linux(flavour)
            .args([
                "--cpus",
                "2",
                "--entropy",
                "--disk",
                &disk(&written, ",id=first"),
                "--disk",
            ])
            .arg(disk(&kept, ",ro,id=second"))
            .args(["--disk", &format!("socket={},id=third", socket.display())])
            .args(more),
        script,
    )
    .exits(0);
    assert_eq!(outcome.value("serials"), "first second");
    assert_eq!(outcome.value("readonly"), "0 1");
    assert_eq!(outcome.value("queues"), "2 2");
    assert!(
        outcome.value("kept").starts_with(&md5(&kept)),
        "{outcome:#?}"
    );
    assert_eq!(outcome.value("random"), "16", "{outcome:#?}");
    assert!(!outcome.stdout.contains("cannot discard"), "{outcome:#?}");
    assert!(!outcome.stdout.contains("wrote to"), "{outcome:#?}");
    assert_eq!(fs::read(&kept).unwrap(), pattern);
    let eight: Vec<u8> = pattern
        .iter()
        .copied()
        .cycle()
        .take(8 * MIB as usize)
        .collect();
    let copy = dir.path().join("copy");
    fs::write(&copy, &eight).unwrap();
    assert!(
        outcome.value("back").starts_with(&md5(&copy)),
        "{outcome:#?}"
    );
    let kept_sum = md5(&kept);
    assert!(outcome.value("far").starts_with(&kept_sum), "{outcome:#?}");
    assert!(far.read(0, pattern.len()) == pattern && far.flushes() > 0);
    // The second half was discarded: the first is there, of the other the blocks are free.
    let on_host = fs::read(&written).unwrap();
    assert!(on_host[..4 * MIB as usize] == eight[..4 * MIB as usize]);
    assert!(on_host[4 * MIB as usize..].iter().all(|byte| *byte == 0));
    let allocated = fs::metadata(&written).unwrap().blocks() * 512;
    assert!(allocated < 5 * MIB, "{allocated} bytes are allocated");
}

#[test]
fn disks_on_mmio_amd64() {
    disks("amd64", &[]);
}

#[test]
fn disks_on_pci_cloud() {
    disks("cloud-amd64", &["--pci"]);
}

#[test]
fn disks_on_pci_beside_an_interrupt_controller_of_kvm() {
    disks("cloud-amd64", &["--pci", "--irqchip", "kernel"]);
}

/// INTA# instead of MSI-X: each function has a line of its own, and the disks do their work.
#[test]
fn disks_on_pci_without_messages() {
    for irqchip in ["split", "kernel"] {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (image(dir.path(), "a", 8), image(dir.path(), "b", 8));
        let script = "for disk in vda vdb; do
                yes $disk | dd of=/dev/$disk bs=1M count=4 iflag=fullblock conv=fsync 2>/dev/null
            done
            echo functions $(ls /sys/bus/virtio/devices | wc -l)
            echo lines $(grep virtio /proc/interrupts | grep -c IO-APIC)
            echo messages $(grep virtio /proc/interrupts | grep -c MSI)";
        let bulle = linux("cloud-amd64").args(["--pci", "--append", "pci=nomsi"]);
        let bulle = bulle.args(["--irqchip", irqchip]);
        let bulle = bulle.arg("--disk").arg(disk(&first, ""));
        let outcome = shell(bulle.arg("--disk").arg(disk(&second, "")), script).exits(0);
        assert_eq!(
            (outcome.value("lines"), outcome.value("messages")),
            (outcome.value("functions"), "0"),
            "{outcome:#?}"
        );
        for (path, line) in [(first, "vda\n"), (second, "vdb\n")] {
            let content = fs::read(path).unwrap();
            let expected = line.bytes().cycle().take(4 << 20);
            assert!(content[..4 << 20].iter().copied().eq(expected), "{line}");
        }
    }
}

#[test]
fn disks_with_interrupts_by_irqfd() {
    disks("cloud-amd64", &["--irqchip", "kernel"]);
}

/// An ext4 image with busybox and a file.
fn root_image(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("apt-get install busybox-static");
    fs::set_permissions(tree.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("busybox", tree.join("bin/sh")).unwrap();
    fs::write(tree.join("etc/motd"), "hello from the image\n").unwrap();
    let image = image(dir, "root.ext4", 16);
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .args([&tree, &image])
        .status()
        .expect("apt-get install e2fsprogs");
    assert!(made.success());
    image
}

fn fsck(image: &Path) {
    let output = Command::new("/sbin/e2fsck")
        .args(["-f", "-n"])
        .arg(image)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_image_as_root_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let image = root_image(dir.path());
    let before = md5(&image);
    let script = "busybox cat /etc/motd; busybox echo new > /etc/motd; busybox cat /etc/motd;
        busybox ls -d /proc/1 /sys/block /dev/null; busybox ls /.bulle 2>/dev/null || busybox echo no trace";
    let bulle = linux("cloud-amd64").arg("--root").arg(&image);
    let outcome = bulle.command(["/bin/sh", "-c", script]).outcome().exits(0);
    assert_eq!(
        outcome.stdout,
        "hello from the image\nnew\n/dev/null\n/proc/1\n/sys/block\nno trace\n"
    );
    assert_eq!(md5(&image), before);
}

#[test]
fn an_image_as_root_is_written_through_if_asked() {
    let dir = tempfile::tempdir().unwrap();
    let image = root_image(dir.path());
    let run = |script: &str| {
        let bulle = linux("amd64").args(["--root-rw", "--root"]).arg(&image);
        bulle.command(["/bin/sh", "-c", script]).outcome().exits(0)
    };
    run("busybox echo new > /etc/motd; busybox dd if=/dev/zero of=/big bs=1M count=4 2>/dev/null");
    fsck(&image);
    let outcome = run("busybox cat /etc/motd; busybox wc -c </big");
    assert_eq!(outcome.stdout, "new\n4194304\n");
    fsck(&image);
}

#[test]
fn an_image_without_a_file_system_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let empty = image(dir.path(), "empty", 1);
    let outcome = linux("cloud-amd64")
        .arg("--root")
        .arg(&empty)
        .command(["true"])
        .outcome();
    outcome
        .exits(125)
        .complains("no file system that this kernel knows");
}

#[test]
fn what_was_flushed_survives_a_killed_monitor() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), "disk", 8);
    // Each round flushes one more megabyte, and says so afterwards.
    let script = "for n in 1 2 3 4 5 6 7; do
            yes $n | dd of=/dev/vda bs=1M count=1 seek=$n iflag=fullblock conv=fsync,notrunc 2>/dev/null
            echo flushed $n
        done; sleep 1000";
    let bulle = linux("cloud-amd64").arg("--disk").arg(disk(&image, ""));
    let running = bulle
        .command(["sh", "-ec", script])
        .input(Input::Open)
        .start();
    let outcome = running
        .wait_for("flushed 3")
        .signal(Signal::SIGKILL)
        .finish();
    let flushed = outcome.stdout.lines().count() as u64;
    assert!(flushed >= 3, "{outcome:#?}");
    let file = File::open(&image).unwrap();
    for n in 1..=flushed {
        let mut block = vec![0; MIB as usize];
        file.read_exact_at(&mut block, n * MIB).unwrap();
        let expected = format!("{n}\n");
        let expected = expected.bytes().cycle().take(block.len());
        assert!(
            block.iter().copied().eq(expected),
            "megabyte {n} of {flushed}"
        );
    }
}
