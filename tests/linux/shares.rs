//! Shared directories with Debian's own drivers, on both transports.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Bulle, Input, Outcome, Running};
use crate::{PATIENCE, busybox, linux};

const MMIO: (&str, &[&str]) = ("cloud-amd64", &[]);
const PCI: (&str, &[&str]) = ("amd64", &["--pci"]);

fn guest((flavour, more): (&str, &[&str])) -> Bulle {
    linux(flavour).args(more)
}

fn share(dir: &Path, rest: &str) -> String {
    format!("{}:{rest}", dir.display())
}

/// Everything below a directory, with what there is to know of it but the time of last access.
fn everything(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            pending.extend(entries.map(|entry| entry.unwrap().path()));
            String::new()
        } else if meta.is_symlink() {
            format!("{:?}", fs::read_link(&path).unwrap())
        } else {
            format!("{:?}", fs::read(&path).unwrap())
        };
        let numbers = [
            meta.ino() as i64,
            meta.mode().into(),
            meta.uid().into(),
            meta.gid().into(),
            meta.nlink() as i64,
            meta.size() as i64,
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        ];
        found.insert(path, format!("{numbers:?} {content}"));
    }
    found
}

/// 60 files of several sizes in 10 directories.
fn many_files(dir: &Path) {
    for n in 0..60u32 {
        let parent = dir.join(format!("d{}", n % 10));
        fs::create_dir_all(&parent).unwrap();
        let byte = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(n) >> 24) as u8;
        let bytes: Vec<u8> = (0..n * n).map(byte).collect();
        fs::write(parent.join(format!("file {n}")), bytes).unwrap();
    }
}

/// A checksum over the names and contents of all files below a directory, by the same commands on
/// the host and in the guest.
const CHECKSUM: &str = "find . -type f -exec md5sum {} + | sort | md5sum";

fn checksum(dir: &Path) -> String {
    let output = Command::new("sh")
        .args(["-c", CHECKSUM])
        .current_dir(dir)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

fn says(outcome: &Outcome, pairs: &[(&str, &str)]) {
    for (key, value) in pairs {
        assert_eq!(outcome.value(key), *value, "{key} in {outcome:#?}");
    }
}

/// A directory to write to, one that is not to be written to, and a file outside of both.
fn two_directories(dir: &Path) -> (PathBuf, PathBuf) {
    let (open, closed) = (dir.join("open"), dir.join("closed"));
    fs::create_dir_all(open.join("many")).unwrap();
    fs::create_dir(&closed).unwrap();
    many_files(&open.join("many"));
    fs::write(dir.join("outside"), "outside").unwrap();
    symlink(dir.join("outside"), open.join("absolute")).unwrap();
    symlink("../outside", open.join("relative")).unwrap();
    symlink("/etc/name", open.join("inside")).unwrap();
    fs::copy(busybox(), open.join("busybox")).unwrap();
    fs::write(closed.join("file"), "as it was").unwrap();
    fs::set_permissions(closed.join("file"), PermissionsExt::from_mode(0o666)).unwrap();
    (open, closed)
}

/// What the guest of [`shares`] left in the directory that it may write to.
fn expect_what_was_written(open: &Path) {
    let new = fs::metadata(open.join("new")).unwrap();
    assert_eq!(fs::read(open.join("new")).unwrap(), b"newmore");
    assert_eq!(
        (new.mode() & 0o7777, new.mtime(), new.nlink()),
        (0o600, 12345, 2)
    );
    assert_eq!(fs::read(open.join("stat")).unwrap(), b"links 2\n");
    assert_eq!(fs::metadata(open.join("holes")).unwrap().len(), 1001 << 10);
    fs::rename(open.join("copy/renamed"), open.join("copy/d8")).unwrap();
    fs::remove_dir_all(open.join("many/d9")).unwrap();
    assert_eq!(checksum(&open.join("copy")), checksum(&open.join("many")));
}

/// Two shares: one is written to, the other cannot be, whatever the guest does.
fn shares(ground: (&str, &[&str])) {
    let dir = tempfile::tempdir().unwrap();
    let (open, closed) = two_directories(dir.path());
    let mounted = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::write(mounted.path().join("file"), "below").unwrap();
    let submount = mounted.path().file_name().unwrap().to_str().unwrap();
    let script = format!(
        r#"
        echo types $(grep virtiofs /proc/mounts | cut -d' ' -f1,2,3 | tr ' \n' ': ')
        mkdir -p /etc; echo guest > /etc/name
        cd /deep/open
        echo escapes $(cat absolute relative ../outside ../../outside 2>/dev/null | wc -c)
        echo link $(cat inside)
        echo magic $(cat /proc/self/cwd/../outside 2>/dev/null | wc -c)
        ln -s {outside} made; echo made $(cat made 2>/dev/null | wc -c)
        echo mapped $(./busybox echo runs)
        echo sum $(cd many && {CHECKSUM} | cut -d" " -f1)
        cp -a many copy; rm -r copy/d9; mv copy/d8 copy/renamed
        printf new > new; printf more >> new; chmod 600 new; touch -d @12345 new
        ln new hard; mkfifo fifo; echo links $(stat -c %h new) > stat
        dd if=/dev/zero of=holes bs=1k count=1 seek=1000 2>/dev/null
        sync
        echo submount $(cat /hostdev/shm/{submount}/file)
        cd /closed
        echo content $(cat file)
        try() {{ "$@" 2>/dev/null && echo "did $*"; }}
        for round in as-mounted remounted again; do
            try touch new; try touch file; try rm file; try mv file x; try mkdir d; try mknod n c 1 3
            try ln file hard; try chmod 600 file; try truncate -s 0 file; try ln -s a b
            try sh -c 'echo x >> file'; try mkfifo f; try chown 5 file
            case $round in
            as-mounted) mount -o remount,rw /closed && echo remounted ;;
            remounted) cd /; umount /closed; mount -t virtiofs share1 /closed && cd /closed && echo again ;;
            esac
        done
        grep -q "virtiofs rw" /proc/mounts && echo writable for the guest"#,
        outside = dir.path().join("outside").display(),
    );
    let before = everything(&closed);
    let outcome = guest(ground)
        .arg("--share")
        .arg(share(&open, "/deep/open"))
        .arg("--share")
        .arg(share(&closed, "/closed:ro"))
        .args(["--share", "/dev:/hostdev:ro"])
        .command(["sh", "-c", &script])
        .outcome()
        .exits(0);
    let types = "share1:/closed:virtiofs share0:/deep/open:virtiofs share2:/hostdev:virtiofs";
    says(
        &outcome,
        &[
            ("types", types),
            ("escapes", "0"),
            ("link", "guest"),
            ("magic", "0"),
            ("made", "0"),
            ("mapped", "runs"),
            ("submount", "below"),
            ("content", "as it was"),
        ],
    );
    assert_eq!(outcome.value("sum"), checksum(&open.join("many")));
    for line in ["remounted\n", "again\n", "writable for the guest\n"] {
        assert!(outcome.stdout.contains(line), "{line}: {outcome:#?}");
    }
    assert!(!outcome.stdout.contains("did "), "{outcome:#?}");
    assert_eq!(everything(&closed), before);
    expect_what_was_written(&open);
}

#[test]
fn shares_on_mmio() {
    shares(MMIO);
}

#[test]
fn shares_on_pci() {
    shares(PCI);
}

/// A tree with busybox and things to change.
fn root_tree(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy(busybox(), root.join("bin/busybox")).unwrap();
    symlink("busybox", root.join("bin/sh")).unwrap();
    fs::create_dir_all(root.join("etc/deep/er")).unwrap();
    fs::write(root.join("etc/deep/er/file"), "deep").unwrap();
    fs::write(root.join("etc/motd"), "hello\n").unwrap();
    fs::hard_link(root.join("etc/motd"), root.join("etc/linked")).unwrap();
    fs::set_permissions(root.join("etc/motd"), PermissionsExt::from_mode(0o640)).unwrap();
    many_files(&root.join("srv"));
    root
}

/// Changes of all kinds to the root of [`root_tree`].
const CHANGES: &str = r#"
    PATH=/bin; busybox mkdir -p /bin; busybox --install -s /bin
    cat /etc/motd; stat -c 'mode %a' /etc/motd
    echo new > /etc/motd; cat /etc/motd; echo more >> /etc/motd; chmod 600 /etc/motd
    rm -r /etc/deep; mkdir /etc/deep; echo again > /etc/deep/file; ls /etc/deep
    mv /etc/linked /etc/moved; mv /srv/d1 /srv/e1; rm -r /srv/d2; ls -d /srv/e1 /srv/d2
    ln -s motd /etc/link; mkfifo /etc/fifo; dd if=/dev/zero of=/zeros bs=1M count=3 2>/dev/null
    mkdir -p /srv/own; cd /srv/d3; echo sum $(find . -type f -exec md5sum {} + | sort | md5sum | cut -d" " -f1)
    ls -d /proc/1 /sys/block /dev/null /run /tmp; mount -t tmpfs none /srv/own && echo mounted
    ls /.bulle 2>/dev/null || echo no trace; sync"#;

fn change(ground: (&str, &[&str]), root: &Path, options: &[&str]) -> Outcome {
    let bulle = guest(ground).args(options).arg("--root").arg(root);
    let outcome = bulle.command(["/bin/sh", "-c", CHANGES]).outcome().exits(0);
    for words in [
        "hello\nmode 640\nnew\n",
        "file\n/srv/e1\n",
        "mounted\nno trace\n",
    ] {
        assert!(outcome.stdout.contains(words), "{words}: {outcome:#?}");
    }
    let kept = "/dev/null\n/proc/1\n/run\n/sys/block\n/tmp\n";
    assert!(outcome.stdout.contains(kept), "{outcome:#?}");
    assert_eq!(outcome.value("sum"), checksum(&root.join("srv/d3")));
    outcome
}

#[test]
fn a_directory_as_root_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let root = root_tree(dir.path());
    let before = everything(&root);
    change(MMIO, &root, &[]);
    change(PCI, &root, &[]);
    assert_eq!(everything(&root), before);
}

#[test]
fn a_directory_as_root_is_written_through_if_asked() {
    let dir = tempfile::tempdir().unwrap();
    let root = root_tree(dir.path());
    change(MMIO, &root, &["--root-rw"]);
    let content = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(content("etc/motd"), "new\nmore\n");
    assert_eq!(content("etc/moved"), "new\nmore\n");
    assert_eq!(content("etc/deep/file"), "again\n");
    let meta = |name: &str| fs::symlink_metadata(root.join(name));
    assert_eq!(meta("etc/motd").unwrap().mode() & 0o7777, 0o600);
    assert_eq!(meta("zeros").unwrap().len(), 3 << 20);
    assert!(meta("etc/link").unwrap().is_symlink() && meta("srv/e1").unwrap().is_dir());
    assert!(meta("srv/d2").is_err() && meta("etc/deep/er").is_err());
}

/// The whole machine as root: a program of it, in the caller's directory, with the caller's PATH.
#[test]
fn the_hosts_own_root_runs_its_programs_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    let script = r#"
import hashlib, mmap, os, subprocess, sys
print("cwd", os.getcwd())
print("path", os.environ["PATH"])
print("home", os.environ["HOME"])
print("secret", os.environ.get("BULLE_SECRET"))
with open("file", "r+b") as file:
    with mmap.mmap(file.fileno(), 0) as map:
        map[0:4] = b"MMAP"
        map.flush()
    print("mapped", file.read().decode())
print("hosts", hashlib.md5(open("/etc/passwd", "rb").read()).hexdigest())
walked = [os.lstat(os.path.join(top, name)) for top, dirs, names in os.walk("tree") for name in names]
print("walked", len(walked), sum(stat.st_size for stat in walked))
os.makedirs("/var/tmp/made/by/guest", exist_ok=True)
open("new", "w").write("new")
os.remove("gone")
os.rename("tree/d0", "tree/renamed")
print("run", sorted(os.listdir("/run")) == [])
print("self", open("/proc/self/comm").read())
print("shell", subprocess.run(["sh", "-c", "uname -r"], capture_output=True, text=True).stdout)
"#;
    fs::write(work.join("script.py"), script).unwrap();
    fs::write(work.join("file"), "mmap this").unwrap();
    fs::write(work.join("gone"), "").unwrap();
    many_files(&work.join("tree"));
    let before = everything(&work);
    let (flavour, more) = PCI;
    let mut bulle = Command::new(env!("CARGO_BIN_EXE_bulle"));
    let kernel = crate::kernel(flavour);
    bulle.args(["run", "--timeout", "280s", "--root", "/", "--kernel"]);
    bulle
        .arg(&kernel)
        .args(more)
        .args(["--", "python3", "script.py"]);
    bulle
        .current_dir(&work)
        .env("BULLE_SECRET", "secret")
        .env("HOME", "/somebody");
    let outcome = Running::start(bulle, Input::Null, 2 * PATIENCE)
        .finish()
        .exits(0);
    let release = kernel.file_name().unwrap().to_str().unwrap();
    let digest = Command::new("md5sum").arg("/etc/passwd").output().unwrap();
    let digest = String::from_utf8(digest.stdout).unwrap();
    let size: u64 = (0..60).map(|n: u64| n * n).sum();
    says(
        &outcome,
        &[
            ("cwd", work.to_str().unwrap()),
            ("path", &std::env::var("PATH").unwrap()),
            ("home", "/somebody"),
            ("secret", "None"),
            ("mapped", "MMAP this"),
            ("hosts", digest.split(' ').next().unwrap()),
            ("walked", &format!("60 {size}")),
            ("run", "True"),
            ("self", "python3"),
            ("shell", release.trim_start_matches("vmlinuz-")),
        ],
    );
    assert_eq!(everything(&work), before);
    assert!(!Path::new("/var/tmp/made").exists());
}

#[test]
fn a_kernel_without_virtiofs_is_told_in_a_sentence() {
    let refused = |module: &str, words: &[&str], text: &str| {
        let mut bulle = linux("cloud-amd64").arg("--append");
        bulle = bulle.arg(format!("module_blacklist={module}")).args(words);
        bulle.command(["true"]).outcome().exits(125).complains(text);
    };
    let share = ["--share", "/usr:/usr/host:ro"];
    refused("virtiofs", &share, "no virtiofs for the share on /usr/host");
    refused("overlay", &["--root", "/"], "no overlayfs; use --root-rw");
}
