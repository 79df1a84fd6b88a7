//! Runs a shell script on a share that this machine's own kernel mounts, such as a test suite for
//! filesystems:
//!
//!     cargo run -p devices --example share -- DIR 'cd "$MNT" && prove -r …'
//!
//! DIR is shared, read-write, and mounted on `$MNT` for the script alone. Needs the right to mount.

mod fuse;

use std::error::Error;
use std::process::{Command, ExitCode};

use devices::virtio::GuestRam;
use devices::virtio::fs::{Fs, FsOptions};
use devices::virtio::io::Segment;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dir, script] = arguments.as_slice() else {
        return Err("usage: share DIR SCRIPT".into());
    };
    let mut options = FsOptions::new("share", dir);
    options.read_only = false;
    options.max_fds = Some(1024);
    let fs = Fs::new(options, &Default::default())?;
    let target = std::env::temp_dir().join(format!("bulle-share-{}", std::process::id()));
    std::fs::create_dir(&target)?;
    let device = fuse::mount_share(&target)?;
    // The server ends when the last user of the mount is gone.
    let script = format!("({script}\n)\ncode=$?; cd /; umount -l \"$MNT\"; exit $code");
    let mut shell = Command::new("sh")
        .args(["-c", &script])
        .env("MNT", &target)
        .spawn()?;
    fuse::serve(device, fs)?;
    let status = shell.wait()?;
    std::fs::remove_dir(&target)?;
    Ok(match status.success() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
