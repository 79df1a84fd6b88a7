//! The host's own kernel as the guest: its FUSE client speaks to the server through /dev/fuse.
//!
//! Needs the right to mount, and is passed over without it. Each test has a mount namespace of its
//! own, so nothing of this is seen outside of its thread and its children.

#[path = "../../../../examples/share/fuse.rs"]
mod fuse;

use std::ffi::CString;
use std::process::Command;

use super::super::{CachePolicy, Fs, FsOptions, Ownership};
use crate::virtio::GuestRam;
use crate::virtio::io::Segment;

/// Runs a shell script with a share mounted on `$MNT` and its directory on the host in `$HOST`.
/// Says whether that was possible.
fn run(script: &str, change: impl FnOnce(&mut FsOptions) + Send) -> bool {
    // The tests' other threads stay where they are.
    std::thread::scope(|scope| scope.spawn(|| mounted(script, change)).join().unwrap())
}

fn mounted(script: &str, change: impl FnOnce(&mut FsOptions)) -> bool {
    let host = tempfile::tempdir().unwrap();
    let target = tempfile::tempdir().unwrap();
    let work = tempfile::tempdir().unwrap();
    let Ok(device) = fuse::mount_share(target.path()) else {
        return false;
    };
    let mut options = FsOptions::new("share", host.path());
    options.read_only = false;
    options.max_fds = Some(64);
    change(&mut options);
    let fs = Fs::new(options, &Default::default()).unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| fuse::serve(device, fs).unwrap());
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
