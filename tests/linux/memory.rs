//! Balloon, pmem and hot-pluggable memory with Debian's own drivers, on both transports.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use devices::virtio::registry::DeviceHandle;
use nix::sys::signal::Signal;

use crate::common::{Bulle, Input, Outcome, Running, debian_kernel};
use crate::machine::Machine;

/// Generous, for the lab.
const PATIENCE: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
/// A kernel and a transport for each half of what is tested on both.
const WAYS: [(&str, &[&str]); 2] = [("amd64", &[]), ("cloud-amd64", &["--pci"])];

fn linux(flavour: &str, options: &[&str], script: &str) -> Bulle {
    let bulle = Bulle::run().patience(PATIENCE).timeout("290s");
    let bulle = bulle.arg("--kernel").arg(debian_kernel(flavour));
    bulle.args(options).command(["sh", "-ec", script])
}

/// Resident memory of the monitor, guest RAM included, in bytes.
fn resident(running: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

/// Waits until the monitor has at most `bytes` resident, and says how long it took.
fn shrinks_to(running: &Running, bytes: u64, limit: Duration) -> Duration {
    let started = Instant::now();
    loop {
        let now = resident(running);
        if now <= bytes {
            return started.elapsed();
        }
        assert!(
            started.elapsed() < limit,
            "{} MiB resident, not {}",
            now / MIB,
            bytes / MIB
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A field of the balloon's line in the log at the end.
fn logged(outcome: &Outcome, field: &str) -> u64 {
    let at = outcome.stderr.rfind(&format!(" {field}: "));
    let text = &outcome.stderr[at.unwrap_or_else(|| panic!("no {field}: {outcome:#?}"))..];
    let digits = text.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap();
    digits[..end].parse().unwrap()
}

#[test]
fn freed_memory_goes_back_to_the_host() {
    for (flavour, transport) in WAYS {
        let script = "until [ $(awk '/balloon_inflate/ { print $2 }' /proc/vmstat) -ge 16384 ]; do sleep 0.2; done
            mkdir -p /m; mount -t tmpfs -o size=1700M,huge=always none /m
            fallocate -l 1610612736 /m/big
            echo full; sleep 3; rm /m/big; echo freed; sleep 100";
        let options = [
            &["--memory", "2G", "--balloon", "size=64M,reporting"],
            transport,
        ]
        .concat();
        let running = linux(flavour, &options, script).start().wait_for("full");
        let full = resident(&running);
        assert!(full > 1536 * MIB, "{} MiB", full / MIB);
        let running = running.wait_for("freed");
        let limit = Duration::from_secs(15);
        let took = shrinks_to(&running, full - 1400 * MIB, limit);
        println!("{flavour}: 1400 MiB of 1536 MiB were back after {took:.1?}");
    }
}

/// 160 MiB of 384 MiB in the balloon from the start. Without the driver the guest has it all and uses
/// it; when the driver is back, the host has its memory back, until the guest needs it.
#[test]
fn a_balloon_takes_memory_and_gives_it_in_need() {
    let script = "mkdir -p /m; mount -t tmpfs -o size=350M none /m
        count() { awk \"/balloon_$1/ { print \\$2 }\" /proc/vmstat; }
        until [ $(count inflate) -ge 40960 ]; do sleep 0.5; done
        cd /sys/bus/virtio/drivers/virtio_balloon; device=$(echo virtio*)
        echo $device >unbind; echo came-back $(count deflate)
        fallocate -l 230686720 /m/big; rm /m/big
        echo full; sleep 2; echo $device >bind; until [ $(count inflate) -ge 81920 ]; do sleep 0.5; done
        echo inflated; sleep 5; before=$(count deflate)
        fallocate -l 209715200 /m/big; echo got $(stat -c %s /m/big)
        echo deflated $(($(count deflate) - before))
        sleep 3; dmesg | grep -c 'Out of memory: Killed' || true";
    let balloon = "size=160M,deflate_on_oom,stats=1s";
    let options = ["--memory", "384M", "--log", "debug", "--balloon", balloon];
    let running = linux("amd64", &options, script).start().wait_for("full");
    let full = resident(&running);
    assert!(full > 220 * MIB, "{} MiB", full / MIB);
    let running = running.wait_for("inflated");
    shrinks_to(&running, full - 130 * MIB, Duration::from_secs(4));
    let outcome = running.finish().exits(0);
    let number = |key| outcome.value(key).parse::<u64>().unwrap();
    assert_eq!(number("came-back"), 40_960);
    assert_eq!(number("got"), 200 * MIB);
    assert!(number("deflated") > 5_000, "{outcome:#?}");
    // Nobody was killed.
    assert_eq!(outcome.stdout.lines().last(), Some("0"));
    assert_eq!(logged(&outcome, "target_pages"), 40_960);
    assert!(logged(&outcome, "actual_pages") < 40_960, "{outcome:#?}");
    assert!(logged(&outcome, "discarded") >= 2 * 160 * MIB);
    assert_eq!(logged(&outcome, "outside") + logged(&outcome, "refused"), 0);
    let (free, total) = (
        logged(&outcome, "free_memory"),
        logged(&outcome, "total_memory"),
    );
    assert!(free < total && total < 384 * MIB, "{free} of {total}");
    assert!(logged(&outcome, "disk_caches") > 190 * MIB, "{outcome:#?}");
}

/// Filled before the guest starts, so that whatever the guest sees is the file's.
#[test]
fn persistent_memory_is_a_disk_whose_data_is_in_the_file() {
    for (flavour, transport) in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let (written, kept) = (dir.path().join("written"), dir.path().join("kept"));
        fs::write(&written, vec![0; 16 << 20]).unwrap();
        fs::write(&kept, vec![0x6b; 4 << 20]).unwrap();
        let mut made = Command::new("/sbin/mkfs.ext4");
        made.args(["-q", "-F", "-b", "4096"]).arg(&written);
        assert!(made.status().unwrap().success());
        let script = "echo sizes $(cat /sys/block/pmem0/size /sys/block/pmem1/size)
            echo readonly $(cat /sys/block/pmem0/ro /sys/block/pmem1/ro)
            echo kept $(tr -d k </dev/pmem1 | wc -c) $(wc -c </dev/pmem1)
            dd if=/dev/zero of=/dev/pmem1 bs=4k count=16 conv=fsync 2>/dev/null || echo refused
            echo 3 > /proc/sys/vm/drop_caches; echo still $(tr -d k </dev/pmem1 | wc -c)
            mkdir /m; mount -t ext4 -o dax /dev/pmem0 /m; grep ' /m ' /proc/mounts
            yes hello | dd of=/m/file bs=1M count=4 iflag=fullblock conv=fsync 2>/dev/null
            echo synced; sleep 100";
        let disk = format!("path={}", written.display());
        let read_only = format!("path={},ro", kept.display());
        let options = ["--pmem", &disk, "--pmem", &read_only];
        let options = [&options, transport].concat();
        let running = linux(flavour, &options, script).input(Input::Open).start();
        // Killed: what was flushed is there all the same.
        let running = running.wait_for("synced").signal(Signal::SIGKILL);
        let outcome = running.finish();
        assert_eq!(outcome.value("sizes"), "32768 8192");
        assert_eq!(outcome.value("kept"), "0 4194304");
        assert_eq!(outcome.value("still"), "0");
        assert!(outcome.stdout.contains("dax"), "{outcome:#?}");
        assert!(fs::read(&kept).unwrap().iter().all(|byte| *byte == 0x6b));
        // What the journal has, as the next mount would.
        let mut replayed = Command::new("/sbin/e2fsck");
        replayed.args(["-f", "-y"]).arg(&written);
        assert!(replayed.output().unwrap().status.code() <= Some(1));
        let dump = Command::new("/sbin/debugfs")
            .args(["-R", "cat /file"])
            .arg(&written)
            .output();
        let content = dump.unwrap().stdout;
        assert_eq!(content.len(), 4 << 20);
        assert!(content.chunks(6).all(|line| b"hello\n".starts_with(line)));
    }
}

/// The host's pool of reserved 2 MiB pages, as it was before once the test is over.
struct Pool(u64);

impl Pool {
    const PATH: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    fn read(name: &str) -> u64 {
        let text = fs::read_to_string(Path::new(Self::PATH).join(name));
        text.unwrap().trim().parse().unwrap()
    }

    fn of(pages: u64) -> Self {
        let before = Self::read("nr_hugepages");
        fs::write(
            Path::new(Self::PATH).join("nr_hugepages"),
            pages.to_string(),
        )
        .unwrap();
        assert_eq!(
            Self::read("nr_hugepages"),
            pages,
            "no room for reserved pages"
        );
        Self(before)
    }

    /// Pages that nobody has, nor was promised.
    fn free() -> u64 {
        Self::read("free_hugepages") - Self::read("resv_hugepages")
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let path = Path::new(Self::PATH).join("nr_hugepages");
        let _ = fs::write(path, self.0.to_string());
    }
}

/// 256 MiB of RAM and up to 128 MiB to be plugged, all of reserved pages: a balloon of 128 MiB gives
/// whole pages back to the pool, plugged blocks take some, and the pool has all of them at the end.
#[test]
fn reserved_pages_go_back_to_their_pool_and_are_plugged() {
    let pool = Pool::of(256);
    let script = "total() { awk '/MemTotal/ { print $2 }' /proc/meminfo; }
        until [ $(awk '/balloon_inflate/ { print $2 }' /proc/vmstat) -ge 32768 ]; do sleep 0.5; done
        echo total $(total); sleep 5; echo inflated; sleep 3
        mkdir -p /m; mount -t tmpfs -o size=150M none /m
        fallocate -l 104857600 /m/big && md5sum </m/big; rm /m/big; echo used; sleep 5";
    for (flavour, transport) in WAYS {
        let list = "total=128M,requested=128M";
        let options = [
            "--memory",
            "256M",
            "--huge-pages",
            "2M",
            "--log",
            "debug",
            "--balloon",
            "size=128M",
            "--hotplug-memory",
            list,
        ];
        let options = [&options, transport].concat();
        let running = linux(flavour, &options, script)
            .start()
            .wait_for("inflated");
        // 128 of 256 are the machine's, 64 may be plugged, and most of the balloon's came back.
        let free = Pool::free();
        assert!((64 + 16..=256).contains(&free), "{free} pages");
        let outcome = running.finish().exits(0);
        println!(
            "{flavour}: {free} of 256 pages were free, {}",
            outcome.value("total")
        );
        let digest = "2f282b84e7e608d5852449ed940bfc51";
        assert!(outcome.stdout.contains(digest), "{outcome:#?}");
        assert_eq!(logged(&outcome, "plugged"), 128 * MIB);
        assert!(logged(&outcome, "discarded") >= 32 * MIB, "{outcome:#?}");
        assert_eq!(logged(&outcome, "refused"), 0);
        assert_eq!(Pool::free(), 256);
    }
    drop(pool);
}

/// More than the machine's own RAM can hold, in memory that was plugged.
#[test]
fn plugged_memory_is_the_guests() {
    let script = "total() { awk '/MemTotal/ { print $2 }' /proc/meminfo; }
        echo region $(grep -c 'System RAM (virtio_mem)' /proc/iomem)
        until [ $(total) -gt 300000 ]; do sleep 0.5; done; echo total $(total)
        mkdir -p /m; mount -t tmpfs -o size=300M none /m
        fallocate -l 230686720 /m/big && md5sum </m/big; rm /m/big
        echo used; sleep 5";
    for (flavour, transport) in WAYS {
        let list = "total=256M,requested=128M";
        let options = [
            "--memory",
            "256M",
            "--log",
            "debug",
            "--hotplug-memory",
            list,
        ];
        let options = [&options, transport].concat();
        let running = linux(flavour, &options, script).start().wait_for("used");
        let used = resident(&running);
        assert!(used > 220 * MIB, "{} MiB", used / MIB);
        let outcome = running.finish().exits(0);
        let number = |key| outcome.value(key).parse::<u64>().unwrap();
        assert!(
            (300_000..384 << 10).contains(&number("total")),
            "{outcome:#?}"
        );
        assert!(number("region") > 0);
        let digest = "33cdf6198f2471c615ee9afe620aa8d6";
        assert!(outcome.stdout.contains(digest), "{outcome:#?}");
        assert_eq!(logged(&outcome, "plugged"), 128 * MIB);
        assert_eq!(logged(&outcome, "requested"), 128 * MIB);
    }
}

/// Targets, statistics, hints and requested sizes that change while the guest runs.
#[test]
fn handles_command_a_running_guest() {
    let script = "while :; do
            awk '/MemTotal/ { print \"total\", $2 } /MemFree/ { print \"free\", $2 }' /proc/meminfo
            sleep 0.3
        done";
    for (flavour, transport) in [("amd64", "mmio"), ("cloud-amd64", "pci")] {
        let config = format!(
            r#"{{"machine-config":{{"mem_size_mib":320,"virtio_transport":"{transport}"}},
            "memory-hotplug":{{"total_size_mib":256}},
            "balloon":{{"amount_mib":0,"deflate_on_oom":false,"stats_polling_interval_s":600,
                "free_page_hinting":true}}}}"#
        );
        let bus = format!("virtio_{transport}");
        let modules = [bus.as_str(), "virtio_mem", "virtio_balloon"];
        let machine = Machine::start(flavour, &modules, script, &config);
        let (mut balloon, mut mem) = (None, None);
        for handle in machine.handles() {
            match handle {
                DeviceHandle::Balloon(handle) => balloon = Some(handle),
                DeviceHandle::Mem(handle) => mem = Some(handle),
                _ => {}
            }
        }
        let (balloon, mem) = (balloon.unwrap(), mem.unwrap());
        machine.wait("the guest runs", |m| m.value("free").is_some());
        let total = machine.value("total").unwrap();

        balloon.set_target(8192).unwrap();
        machine.wait("inflated", |_| balloon.status().actual_pages == 8192);
        let smaller = |m: &Machine| m.value("total").unwrap() <= total - (32 << 10);
        machine.wait("the guest has less", smaller);
        balloon.set_target(0).unwrap();
        machine.wait("deflated", |_| balloon.status().actual_pages == 0);

        // One interval of ten minutes after the first, then one of a second.
        balloon.set_interval(Duration::from_secs(1)).unwrap();
        let free = || balloon.statistics().unwrap().and_then(|s| s.free_memory);
        let first = free();
        machine.wait("other statistics", |_| free().is_some() && free() != first);

        let before = balloon.status().discarded;
        balloon.start_hinting(true).unwrap();
        let done = |_: &Machine| balloon.hinting().unwrap().host_cmd == 1;
        machine.wait("a round of hints", done);
        let hinted = balloon.status().discarded - before;
        assert!(hinted > 100 * MIB, "{} MiB", hinted / MIB);
        let free = machine.value("free").unwrap();
        machine.wait("hinted pages are free again", |m| {
            m.value("free").unwrap() > free / 2
        });

        mem.set_requested(128 * MIB).unwrap();
        machine.wait("plugged", |_| mem.status().plugged == 128 * MIB);
        machine.wait("used", |m| m.value("total").unwrap() > total + (100 << 10));
        mem.set_requested(0).unwrap();
        machine.wait("unplugged", |_| mem.status().plugged == 0);
        machine.wait("gone", |m| m.value("total").unwrap() <= total);
    }
}
