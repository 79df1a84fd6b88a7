//! File systems on disks, with Debian's own drivers: made, filled, cut off and found whole again.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::{Bulle, Input, debian_kernel, tree};

/// Generous, for the lab.
const PATIENCE: Duration = Duration::from_secs(200);
const MIB: u64 = 1 << 20;

fn image(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    path
}

/// The libraries of a program, as `ldd` names them.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/'));
    words.map(PathBuf::from).collect()
}

/// An ext4 image as the guest's root, with busybox, e2fsprogs and, thereby, the driver for ext4.
fn root(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    let copy = |from: &Path| {
        let to = tree.join(from.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    fs::create_dir_all(tree.join("mnt")).unwrap();
    copy(Path::new("/bin/busybox"));
    for program in ["/sbin/mke2fs", "/sbin/e2fsck"].map(Path::new) {
        assert!(program.exists(), "apt-get install e2fsprogs");
        copy(program);
        libraries(program).iter().for_each(|library| copy(library));
    }
    let output = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(output.stdout).unwrap().lines() {
        // e2fsprogs has the better ones, and busybox is itself.
        if !["busybox", "mke2fs"].contains(&applet) {
            symlink("busybox", tree.join("bin").join(applet)).unwrap();
        }
    }
    let image = image(dir, "root.ext4", 32);
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .args([&tree, &image])
        .status()
        .unwrap();
    assert!(made.success());
    image
}

fn guest(flavour: &str, root: &Path, disks: &[String], more: &[&str], script: &str) -> Bulle {
    let bulle = Bulle::run().patience(PATIENCE).timeout("190s");
    let bulle = bulle.arg("--kernel").arg(debian_kernel(flavour));
    let bulle = bulle.arg("--root").arg(root).args(more);
    let bulle = disks
        .iter()
        .fold(bulle, |b, disk| b.arg("--disk").arg(disk));
    bulle.command(["/bin/sh", "-ec", script])
}

fn disk(path: &Path, options: &str) -> String {
    format!("path={}{options}", path.display())
}

/// A file system that needs no repair, and none by its journal either.
#[track_caller]
fn is_clean(image: &Path) {
    let output = Command::new("/sbin/e2fsck")
        .args(["-f", "-n"])
        .arg(image)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && !said.contains("recover"),
        "{output:?}"
    );
}

/// A file system is made, filled and checked in the guest, found the same after it was mounted
/// again, and clean on the host; blocks of files that were removed are the host's again.
fn made_in_the_guest(flavour: &str, options: &str, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    let image = image(dir.path(), "data", 64);
    let script = "/sbin/mke2fs -q -t ext4 /dev/vdb
        mount -t ext4 -o discard /dev/vdb /mnt
        mkdir -p /mnt/a/b/c /mnt/many
        n=0; while [ $n -lt 200 ]; do echo $n > /mnt/many/$n; n=$((n+1)); done
        dd if=/dev/urandom of=/mnt/a/b/c/random bs=64k count=64 2>/dev/null
        ln -s random /mnt/a/b/c/link; ln /mnt/a/b/c/random /mnt/hard
        cp -r /lib /bin/busybox /mnt/
        dd if=/dev/zero of=/mnt/removed bs=1M count=16 conv=fsync 2>/dev/null
        (cd /mnt; find . -type f | sort | xargs md5sum) > /tmp/sums
        umount /mnt
        /sbin/e2fsck -f -n /dev/vdb >/dev/null 2>&1 && echo clean in the guest
        echo 3 > /proc/sys/vm/drop_caches
        mount -t ext4 -o discard /dev/vdb /mnt
        (cd /mnt; md5sum -c /tmp/sums >/dev/null && echo the same)
        echo files $(wc -l < /tmp/sums) $(readlink /mnt/a/b/c/link)
        rm /mnt/removed; sync; umount /mnt";
    let disks = [disk(&image, options)];
    let outcome = guest(flavour, &root, &disks, more, script)
        .outcome()
        .exits(0);
    outcome.value("clean in the");
    outcome.value("the");
    let files = outcome.value("files");
    assert!(files.ends_with(" random"), "{outcome:#?}");
    is_clean(&image);
    let allocated = fs::metadata(&image).unwrap().blocks() * 512 / MIB;
    assert!(allocated < 40, "{allocated} MiB allocated");
}

#[test]
fn a_file_system_made_in_the_guest_on_mmio_amd64() {
    made_in_the_guest("amd64", ",engine=io_uring", &["--cpus", "2"]);
}

#[test]
fn a_file_system_made_in_the_guest_on_pci_cloud() {
    made_in_the_guest("cloud-amd64", ",engine=sync", &["--pci", "--cpus", "2"]);
}

/// What a guest says it has synced is there after a power cut in the middle of other writes.
fn cut_off(flavour: &str, options: &str, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let root = root(dir.path());
    let image = image(dir.path(), "data", 64);
    let script = "/sbin/mke2fs -q -t ext4 /dev/vdb; mount -t ext4 /dev/vdb /mnt
        (while :; do cp /bin/busybox /mnt/churn; rm /mnt/churn; done) &
        n=0; while :; do
            n=$((n+1))
            yes $n | dd of=/mnt/file$n bs=10000 count=1 iflag=fullblock conv=fsync 2>/dev/null
            echo synced $n
        done";
    let disks = [disk(&image, options)];
    let killed = guest(flavour, &root, &disks, more, script)
        .input(Input::Open)
        .start()
        .wait_for("synced 8\n")
        .signal(Signal::SIGKILL)
        .finish();
    let synced = killed
        .stdout
        .lines()
        .filter(|line| line.starts_with("synced "));
    // The last line may be cut.
    let synced = synced.count() - usize::from(!killed.stdout.ends_with('\n'));
    let script = format!(
        "mount -t ext4 /dev/vdb /mnt
        n=0; while [ $n -lt {synced} ]; do
            n=$((n+1))
            yes $n | dd bs=10000 count=1 iflag=fullblock 2>/dev/null | cmp - /mnt/file$n
        done
        umount /mnt; dmesg | grep -c 'vdb.*recovery complete'; echo whole $n"
    );
    let outcome = guest(flavour, &root, &disks, more, &script)
        .outcome()
        .exits(0);
    assert_eq!(
        outcome.stdout,
        format!("1\nwhole {synced}\n"),
        "{outcome:#?}"
    );
    is_clean(&image);
}

#[test]
fn what_was_synced_survives_a_power_cut_on_mmio_cloud() {
    cut_off("cloud-amd64", ",engine=io_uring", &["--cpus", "2"]);
}

#[test]
fn what_was_synced_survives_a_power_cut_on_pci_amd64() {
    cut_off("amd64", ",engine=sync", &["--pci", "--cpus", "2"]);
}

/// The byte that fills a slot of 64 KiB, written by a processor in a round, or zero.
fn fills(slot: usize) -> u8 {
    let (cpu, slot) = (slot / 40, slot % 40);
    let last = (0..60).rev().find(|round| round * 7 % 40 == slot);
    last.map_or(0, |round| (1 + 100 * cpu + round) as u8)
}

/// Two processors overwrite a disk in an order of their own, each through its queue. Host and guest
/// find what was written last, and a third disk that has become larger is seen.
fn written_by_two(flavour: &str, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (data, grows) = (image(dir.path(), "data", 8), image(dir.path(), "grows", 1));
    let script = "echo queues $(ls /sys/block/vda/mq | wc -l)
        cat > /tmp/work <<'END'
            n=0; while [ $n -lt 60 ]; do
                byte=$(printf '\\\\%03o' $((1 + 100 * $1 + n)))
                dd if=/dev/zero bs=64k count=1 2>/dev/null | tr '\\000' \"$byte\" |
                    dd of=/dev/vda bs=64k seek=$(($1 * 40 + n * 7 % 40)) conv=notrunc iflag=fullblock 2>/dev/null
                n=$((n+1))
            done
END
        taskset 1 sh -e /tmp/work 0 & first=$!
        taskset 2 sh -e /tmp/work 1 & second=$!
        wait $first; wait $second; sync; echo 3 > /proc/sys/vm/drop_caches
        echo data $(md5sum < /dev/vda)
        echo size $(cat /sys/block/vdb/size)
        until [ $(cat /sys/block/vdb/size) = 4096 ]; do sleep 0.1; done
        printf end | dd of=/dev/vdb bs=1 seek=2097149 conv=fsync,notrunc 2>/dev/null; echo grown";
    let running = Bulle::run()
        .patience(PATIENCE)
        .timeout("190s")
        .arg("--kernel")
        .arg(debian_kernel(flavour))
        .args(["--cpus", "2", "--disk", &disk(&data, "")])
        .args(["--disk", &disk(&grows, "")])
        .args(more)
        .command(["sh", "-ec", script])
        .start()
        .wait_for("size 2048");
    let larger = File::options().write(true).open(&grows).unwrap();
    larger.set_len(2 * MIB).unwrap();
    let outcome = running.signal(Signal::SIGIO).finish().exits(0);
    assert_eq!(outcome.value("queues"), "2");
    assert!(outcome.stdout.ends_with("grown\n"), "{outcome:#?}");
    let mut expected: Vec<u8> = (0..80).flat_map(|slot| vec![fills(slot); 65536]).collect();
    expected.resize(8 * MIB as usize, 0);
    let on_host = fs::read(&data).unwrap();
    let wrong = on_host.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{outcome:#?}");
    let sum = Command::new("md5sum").arg(&data).output().unwrap().stdout;
    assert_eq!(outcome.value("data").as_bytes()[..32], sum[..32]);
    let mut end = [0; 3];
    File::open(&grows)
        .unwrap()
        .read_exact_at(&mut end, 2 * MIB - 3)
        .unwrap();
    assert_eq!(&end, b"end");
}

#[test]
fn two_processors_write_and_a_disk_grows_on_mmio_cloud() {
    written_by_two("cloud-amd64", &[]);
}

#[test]
fn two_processors_write_and_a_disk_grows_on_pci_amd64() {
    written_by_two("amd64", &["--pci"]);
}

/// A temporary directory on a file system that has O_DIRECT: that of all temporary files, or of
/// the one place of the tree that the lab can write to.
fn directory_with_direct_io() -> tempfile::TempDir {
    let places = [
        std::env::temp_dir(),
        tree().join("target/lab"),
        tree().join("target"),
    ];
    let mut places = places
        .iter()
        .filter_map(|place| tempfile::tempdir_in(place).ok());
    let direct = |dir: &tempfile::TempDir| {
        let path = image(dir.path(), "probe", 1);
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        options.open(path).is_ok()
    };
    places.find(direct).expect("a file system with O_DIRECT")
}

/// Each cache mode keeps what is written, and the guest can choose to have no write cache.
#[test]
fn every_cache_keeps_what_is_written() {
    let dir = directory_with_direct_io();
    let modes = ["writeback", "unsafe", "none"];
    let images = modes.map(|mode| image(dir.path(), mode, 2));
    let disks =
        [0, 1, 2].map(|n| disk(&images[n], &format!(",cache={},id={}", modes[n], modes[n])));
    let script = "for d in vda vdb vdc; do
            echo $(cat /sys/block/$d/serial) $(cat /sys/block/$d/cache_type)
            yes $d | dd of=/dev/$d bs=64k count=16 iflag=fullblock conv=fsync 2>/dev/null
            echo 'write through' > /sys/block/$d/cache_type
            yes $d | dd of=/dev/$d bs=64k count=16 seek=16 iflag=fullblock conv=notrunc 2>/dev/null
            sync; echo 3 > /proc/sys/vm/drop_caches
            yes $d | dd bs=64k count=32 iflag=fullblock 2>/dev/null | cmp - /dev/$d && echo $d is good
            cat /sys/block/$d/cache_type
        done";
    let bulle = Bulle::run().patience(PATIENCE).timeout("190s");
    let bulle = bulle.arg("--kernel").arg(debian_kernel("cloud-amd64"));
    let bulle = disks
        .iter()
        .fold(bulle, |b, disk| b.arg("--disk").arg(disk));
    let outcome = bulle.command(["sh", "-ec", script]).outcome().exits(0);
    for (mode, name) in modes.iter().zip(["vda", "vdb", "vdc"]) {
        let lines = format!("{mode} write back\n{name} is good\nwrite through\n");
        assert!(
            outcome.stdout.contains(&lines),
            "no {lines:?} in {outcome:#?}"
        );
    }
    for (path, name) in images.iter().zip(["vda\n", "vdb\n", "vdc\n"]) {
        let expected = name.bytes().cycle().take(2 * MIB as usize);
        assert!(fs::read(path).unwrap().into_iter().eq(expected), "{path:?}");
    }
}
