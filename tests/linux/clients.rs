//! Clients of Firecracker's API, unchanged (tests/clients), with an unmodified kernel of Debian and a
//! root file system on a disk.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulle::guest::initramfs::{Content, Initramfs, Node};
use bulle::guest::modules::{Wanted, default_directory, resolve};

use crate::common::{Input, Outcome, Running, debian_kernel, guest_tool, tree};
use crate::net::{in_a_network, sh};
use crate::{PATIENCE, busybox};

/// What a kernel of Debian's needs for a disk, a network interface and sockets to the host.
const MODULES: [&str; 5] = [
    "virtio_mmio",
    "virtio_blk",
    "ext4",
    "virtio_net",
    "vmw_vsock_virtio_transport",
];

/// Goes on in the root file system.
const INIT_OF_INITRD: &str = "#!/bin/busybox sh
for module in /modules/*; do /bin/busybox insmod $module; done
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t ext4 /dev/vda /root && exec /bin/busybox switch_root /root /sbin/init
";

/// Takes the address that clients of Firecracker give as `ip=ADDRESS::GATEWAY:MASK:…`, which kernels of
/// Debian leave alone, and answers lines on a port of TCP and, as the guest tool does, of vsock.
const INIT_OF_ROOT: &str = "#!/bin/sh
mount -t proc none /proc
mount -t devtmpfs none /dev
for word in $(cat /proc/cmdline); do
    case $word in ip=*)
        IFS=:
        set -- ${word#ip=}
        unset IFS
        ifconfig eth0 $1 netmask $4 up;;
    esac
done
guest-tool serve &
exec nc -ll -p 7777 -e answer
";

const ANSWER: &str = "#!/bin/sh
read line
echo $line from $(uname -r) on $(grep ' / ' /proc/mounts | cut -d ' ' -f 1-3)
";

struct Guest {
    kernel: PathBuf,
    initrd: PathBuf,
    rootfs: PathBuf,
    release: String,
}

impl Guest {
    fn new(dir: &Path, flavour: &str) -> Self {
        let kernel = debian_kernel(flavour);
        let name = kernel.file_name().unwrap().to_str().unwrap();
        let release = name.trim_start_matches("vmlinuz-").to_owned();
        Self {
            initrd: initrd(dir, &release),
            rootfs: rootfs(dir),
            kernel,
            release,
        }
    }

    /// What it answers to a line over the network.
    fn answer(&self, line: &str) -> String {
        format!("{line} from {} on /dev/vda / ext4", self.release)
    }
}

fn initrd(dir: &Path, release: &str) -> PathBuf {
    let wanted = MODULES.map(|name| Wanted {
        name,
        required: true,
    });
    let found = resolve(&default_directory(release), release, &wanted).unwrap();
    let directory = |path: &str| Node::new(path, 0o755, Content::Directory);
    let file = |path: String, content| Node::new(path, 0o755, content);
    let mut nodes = ["bin", "dev", "root", "modules"].map(directory).to_vec();
    nodes.push(file("bin/busybox".into(), Content::HostFile(busybox())));
    nodes.push(file(
        "init".into(),
        Content::Bytes(INIT_OF_INITRD.as_bytes().into()),
    ));
    for (n, module) in found.modules.into_iter().enumerate() {
        let path = format!("modules/{n:02}-{}", module.name);
        nodes.push(file(path, Content::Bytes(module.data.into())));
    }
    let archive = Initramfs::builder().nodes(&nodes).build(64 << 20).unwrap();
    let path = dir.join("initrd");
    fs::write(&path, archive).unwrap();
    path
}

fn rootfs(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "sbin", "proc", "dev"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(busybox(), root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "mount", "cat", "ifconfig", "nc", "uname", "grep", "cut",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::copy(guest_tool(), root.join("bin/guest-tool")).unwrap();
    for (path, script) in [("sbin/init", INIT_OF_ROOT), ("bin/answer", ANSWER)] {
        fs::write(root.join(path), script).unwrap();
        sh(&format!("chmod 755 {}", root.join(path).display()));
    }
    let image = dir.join("rootfs.ext4");
    sh(&format!(
        "truncate -s 16M {1}; /sbin/mke2fs -q -F -t ext4 -d {0} {1}",
        root.display(),
        image.display()
    ));
    image
}

/// bulle under the names `firecracker` and `jailer`, as a copy: clients wait three seconds for its socket, and the lab
/// takes longer to start a program that it has to read from this machine.
fn firecracker(dir: &Path) -> PathBuf {
    let path = dir.join("firecracker");
    fs::copy(env!("CARGO_BIN_EXE_bulle"), &path).unwrap();
    fs::hard_link(&path, dir.join("jailer")).unwrap();
    path
}

/// Where control groups of version 2 are, if they are the host's only ones.
const GROUPS: &str = "/sys/fs/cgroup";

/// Whether there are control groups of version 2, and this process may make some.
fn has_control_groups() -> bool {
    let probe = Path::new(GROUPS).join("bulle-probe");
    let controllers = fs::read_to_string(Path::new(GROUPS).join("cgroup.controllers"));
    controllers.is_ok_and(|all| all.contains("pids"))
        && fs::create_dir(&probe).is_ok()
        && fs::remove_dir(probe).is_ok()
}

/// Runs a client, which gets bulle, the guest, and a directory of its own with the console's file.
fn drive_by(program: &str, guest: &Guest, more: &[&str]) -> Outcome {
    let program = tree().join("target/clients/debug").join(program);
    assert!(program.is_file(), "run tests/clients/build first");
    let dir = tempfile::tempdir().unwrap();
    // Which also ends the microVM of a client that hangs.
    let mut command = Command::new("timeout");
    command.arg("200").arg(program).arg(firecracker(dir.path()));
    command.args([&guest.kernel, &guest.initrd, &guest.rootfs]);
    command.arg(dir.path()).args(more);
    let outcome = Running::start(command, Input::Null, PATIENCE).finish();
    let console = fs::read_to_string(dir.path().join("console"));
    assert_eq!(outcome.code, 0, "{outcome:#?}\n{console:?}");
    outcome
}

#[test]
fn crates_that_drive_firecracker() {
    in_a_network(|| {
        sh("ip tuntap add dev vm0 mode tap; ip addr add 10.9.0.1/24 dev vm0; ip link set vm0 up");
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::new(dir.path(), "amd64");

        let outcome = drive_by("firecracker_rs_sdk", &guest, &[]);
        assert_eq!(outcome.value("version"), "1.17.0");
        assert_eq!(outcome.value("first"), guest.answer("one"));
        assert_eq!(outcome.value("state"), "Paused");
        assert_eq!(outcome.value("second"), guest.answer("two"));
        assert_eq!(outcome.value("interfaces"), "1");
        outcome.prints("stopped\n");

        let limit: &[&str] = if has_control_groups() { &["77"] } else { &[] };
        let outcome = drive_by("fc_sdk", &guest, limit);
        if !limit.is_empty() {
            assert_eq!(outcome.value("group"), "/firecracker/sdk");
            let group = Path::new(GROUPS).join("firecracker");
            let max = fs::read_to_string(group.join("sdk/pids.max")).unwrap();
            fs::remove_dir(group.join("sdk")).unwrap();
            fs::remove_dir(group).unwrap();
            assert_eq!(max, "77\n");
        }
        assert_eq!(outcome.value("version"), "1.17.0");
        assert_eq!(outcome.value("first"), "one");
        assert_eq!(outcome.value("state"), "Paused");
        assert_eq!(outcome.value("second"), "two");
        assert_eq!(outcome.value("drives"), "1");
        assert_eq!(outcome.value("stopped"), "exit status: 0");
    });
}

/// Puts the package's fixed paths in place for this thread and what it starts, without changing those
/// of the machine.
fn fixed_paths(dir: &Path) {
    firecracker(dir);
    sh(&format!(
        "cd {}
        mkdir old new; mount --bind /usr/local/bin old; ln -s $PWD/old/* new/ 2>/dev/null || true
        ln -sf $PWD/firecracker new/firecracker; mount --bind new /usr/local/bin
        mount -t tmpfs none /var/lib; mkdir /var/lib/firecracker",
        dir.display()
    ));
}

#[test]
fn the_python_package() {
    in_a_network(|| {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::new(dir.path(), "cloud-amd64");
        fixed_paths(dir.path());
        let python = tree().join("target/tools/venv/bin/python");
        assert!(python.exists(), "run tests/setup test first");
        let mut command = Command::new(python);
        command.arg(tree().join("tests/clients/firecracker_python.py"));
        command.args([&guest.kernel, &guest.initrd, &guest.rootfs]);
        let outcome = Running::start(command, Input::Null, PATIENCE)
            .finish()
            .exits(0);
        assert!(
            outcome.value("created").ends_with("created"),
            "{outcome:#?}"
        );
        assert_eq!(outcome.value("first"), guest.answer("one"));
        assert!(outcome.value("paused").ends_with("paused successfully"));
        assert!(outcome.value("resumed").ends_with("resumed successfully"));
        assert_eq!(outcome.value("second"), guest.answer("two"));
        assert_eq!(outcome.value("drives"), "1");
        assert_eq!(outcome.value("listed"), "['Running']");
        assert!(outcome.value("deleted").ends_with("is deleted"));
        assert_eq!(outcome.value("left"), "[]");
        sh("! ip link show | grep tap_");
    });
}
