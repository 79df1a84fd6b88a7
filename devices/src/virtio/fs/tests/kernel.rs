//! The host's own kernel as the guest: its FUSE client speaks to the server through /dev/fuse.
//!
//! Needs the right to mount, and is passed over without it. Each test has a mount namespace of its
//! own, so nothing of this is seen outside of its thread and its children.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::{CachePolicy, Fs, FsOptions, Ownership};
use super::segment;
use crate::virtio::GuestRam;

const MIB: usize = 1 << 20;
const REPLY: usize = 4 * MIB;

fn mount(kind: &str, source: &str, target: &Path, flags: libc::c_ulong, data: &str) -> bool {
    let text = |text: &str| CString::new(text).unwrap();
    let (kind, source, data) = (text(kind), text(source), text(data));
    let target = text(target.to_str().unwrap());
    let (source, target, kind) = (source.as_ptr(), target.as_ptr(), kind.as_ptr());
    // SAFETY: all are strings that live until the call is over.
    unsafe { libc::mount(source, target, kind, flags, data.as_ptr().cast()) == 0 }
}

/// Serves until the filesystem is unmounted.
fn serve(mut device: File, options: FsOptions) {
    let mut fs = Fs::new(options, &Default::default()).unwrap();
    let ram: GuestRam = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 * MIB)]).unwrap();
    let mut bytes = vec![0; 2 * MIB];
    loop {
        let len = match device.read(&mut bytes) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
            // The request was taken back.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) => panic!("{error}"),
        };
        ram.write_slice(&bytes[..len], GuestAddress(0)).unwrap();
        let readable = [segment(0, len)];
        let writable = [segment(REPLY as u64, 2 * MIB)];
        let len = fs.serve(&ram, &readable, &writable).unwrap() as usize;
        if len > 0 {
            let mut answer = vec![0; len];
            ram.read_slice(&mut answer, GuestAddress(REPLY as u64))
                .unwrap();
            match device.write_all(&answer) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => panic!("opcode {}: {error}", bytes[4]),
            }
        }
    }
}

/// Runs a shell script with a share mounted on `$MNT` and its directory on the host in `$HOST`.
/// Says whether that was possible.
fn run(script: &str, change: impl FnOnce(&mut FsOptions) + Send) -> bool {
    // The tests' other threads stay where they are.
    std::thread::scope(|scope| scope.spawn(|| mounted(script, change)).join().unwrap())
}

fn mounted(script: &str, change: impl FnOnce(&mut FsOptions)) -> bool {
    let Ok(device) = File::options().read(true).write(true).open("/dev/fuse") else {
        return false;
    };
    // SAFETY: this thread alone gets a mount namespace of its own.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return false;
    }
    let private = libc::MS_REC | libc::MS_PRIVATE;
    assert!(mount("", "none", Path::new("/"), private, ""));
    let host = tempfile::tempdir().unwrap();
    let target = tempfile::tempdir().unwrap();
    let work = tempfile::tempdir().unwrap();
    let fd = device.as_raw_fd();
    let data =
        format!("fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other");
    if !mount("fuse", "share", target.path(), 0, &data) {
        return false;
    }
    let mut options = FsOptions::new("share", host.path());
    options.read_only = false;
    options.max_fds = Some(64);
    change(&mut options);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(device, options));
        let mut shell = Command::new("sh");
        let shell = shell.args(["-euxc", script]).current_dir("/");
        let shell = shell.env("MNT", target.path()).env("HOST", host.path());
        let output = shell.env("WORK", work.path()).output().unwrap();
        let path = CString::new(target.path().to_str().unwrap()).unwrap();
        // SAFETY: the path is a string.
        let unmounted = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        assert_eq!(unmounted, 0);
        let served = server.join();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success() && served.is_ok(), "{out}\n{err}");
    });
    true
}

const WORK: &str = r#"
cd "$MNT"
mkdir -p a/b/c
i=0
while [ $i -lt 150 ]; do echo "file $i" > a/b/f$i; i=$((i+1)); done
[ "$(ls a/b | wc -l)" = 151 ]
[ "$(find . -type f | wc -l)" = 150 ]
[ "$(cat a/b/f77)" = "file 77" ]
dd if=/dev/urandom of=big bs=64k count=60 2>/dev/null
cmp big "$HOST/big"
cp big copy
cmp big copy
dd if=big of=copy bs=4096 seek=3 count=1 conv=notrunc 2>/dev/null
! cmp -s big copy
truncate -s 100 copy
[ "$(stat -c %s copy)" = 100 ]
ln big hard
[ "$(stat -c %h big)" = 2 ]
[ "$(stat -c %i big)" = "$(stat -c %i hard)" ]
ln -s /etc/passwd sym
[ "$(readlink sym)" = /etc/passwd ]
mv a/b a/renamed
[ "$(cat a/renamed/f149)" = "file 149" ]
chmod 4711 big
[ "$(stat -c %a "$HOST/big")" = 4711 ]
touch -d @12345 big
[ "$(stat -c %Y "$HOST/big")" = 12345 ]
mkfifo fifo
(echo through > fifo) & [ "$(cat fifo)" = through ]
tar -cf - a | (mkdir t; cd t; tar -xf -)
diff -r a t/a
exec 9< hard
rm -r a t sym fifo big hard copy
[ "$(head -c 10 <&9 | wc -c)" = 10 ]
exec 9<&-
[ -z "$(ls -A "$HOST")" ]
echo '#!/bin/sh
echo ran' > program
chmod +x program
[ "$(./program)" = ran ]
cp /bin/true binary && ./binary
df . > /dev/null
sync
"#;

#[test]
fn shells_work_on_a_share() {
    for cache in [CachePolicy::None, CachePolicy::Auto, CachePolicy::Always] {
        for writeback in [false, true] {
            run(WORK, |options| {
                options.cache = cache;
                options.writeback = writeback;
                options.ownership = match writeback {
                    true => Ownership::Squash,
                    false => Ownership::Auto,
                };
            });
        }
    }
}

#[test]
fn a_share_that_is_read_only_stays_so() {
    let script = r#"
        cd "$MNT"
        echo content > "$HOST/file"
        [ "$(cat file)" = content ]
        mount -o remount,rw "$MNT" || true
        ! touch file
        ! touch new
        ! mkdir new
        ! rm file
        ! mv file other
        ! (echo x >> file)
        ! truncate -s 0 file
        [ "$(cat "$HOST/file")" = content ]
    "#;
    run(script, |options| options.read_only = true);
}

#[test]
fn overlayfs_has_a_share_below_it() {
    let script = r#"
        mkdir -p "$HOST/dir/sub" "$WORK/merged" "$WORK/disk"
        echo lower > "$HOST/dir/file"
        echo gone > "$HOST/dir/sub/gone"
        # What is left mounted would keep the share mounted.
        trap 'cd /; umount -l "$WORK/merged" "$WORK/disk" 2>/dev/null || true' EXIT
        mount -t tmpfs none "$WORK/disk"
        mkdir "$WORK/disk/upper" "$WORK/disk/work"
        layers="lowerdir=$MNT,upperdir=$WORK/disk/upper,workdir=$WORK/disk/work"
        mount -t overlay none "$WORK/merged" -o "$layers"
        cd "$WORK/merged"
        [ "$(cat dir/file)" = lower ]
        echo upper > dir/file
        rm -r dir/sub
        mkdir dir/sub
        mv dir/file dir/sub/moved
        [ "$(cat dir/sub/moved)" = upper ]
        [ "$(ls dir)" = sub ]
        [ "$(cat "$HOST/dir/file")" = lower ]
        [ -e "$HOST/dir/sub/gone" ]
    "#;
    run(script, |options| options.read_only = true);
}

/// Runs the script in `BULLE_FS_SCRIPT`, such as a test suite for filesystems.
#[test]
#[ignore = "runs what BULLE_FS_SCRIPT says"]
fn script_of_the_environment() {
    let script = std::env::var("BULLE_FS_SCRIPT").unwrap();
    assert!(run(&script, |options| options.max_fds = Some(1024)));
}
