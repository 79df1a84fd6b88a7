//! A root file system that is a shared directory or on a disk, mounted and entered. A disk is
//! found by its serial number.
//!
//! What is read-only gets a tmpfs over it: the guest may write, and the host's side stays as it is.

use core::fmt::Write;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};

use crate::text::Text;
use crate::{setup, shares, sys};

/// How long the kernel may take to find a device.
pub const PATIENCE_MS: u64 = 10_000;
/// Between two looks.
pub const PAUSE_MS: u64 = 10;
const DISK: &str = "/.bulle/disk";
const LAYER: &str = "/.bulle/layer";
const UNITED: &str = "/.bulle/root";

/// Why there is no root to run a command in.
pub struct Trouble {
    /// Linux error number.
    pub errno: Errno,
    /// A sentence without its end.
    pub text: Text<400>,
}

/// For `map_err`: what was to be done.
pub fn trouble(text: core::fmt::Arguments<'_>) -> impl FnOnce(Errno) -> Trouble + use<> {
    let mut sentence = Text::new();
    let _ = sentence.write_fmt(text);
    move |errno| Trouble {
        errno,
        text: sentence,
    }
}

/// Makes the root what `shares` has for it, or the file system on the disk that `bulle.root=`
/// names. Without both there is nothing to do.
pub fn enter(shares: &[u8]) -> Result<(), Trouble> {
    if let Some(share) = shares::root(shares) {
        let _ = rustix::fs::mkdir(DISK, Mode::from_raw_mode(0o755));
        shares::mount_on(share, DISK)?;
        let root = if share.read_only { unite()? } else { DISK };
        return move_into(root).map_err(trouble(format_args!("the shared root cannot be entered")));
    }
    let serial = setup::command_line_word(b"bulle.root=");
    let Some(serial) = serial.as_ref().map(Text::as_str) else {
        return Ok(());
    };
    let Some(name) = wait_for(serial) else {
        return Err(trouble(format_args!(
            "there is no disk {serial}: does the kernel lack a virtio driver?"
        ))(Errno::NODEV));
    };
    let name = name.as_str();
    let read_only = is(name, "ro", b"1");
    mount_disk(name, read_only)?;
    let root = if read_only { unite()? } else { DISK };
    move_into(root).map_err(trouble(format_args!("the disk {serial} cannot be entered")))
}

/// The name of the disk with this serial number, once it is there.
fn wait_for(serial: &str) -> Option<Text<64>> {
    let end = sys::now_ms() + PATIENCE_MS;
    loop {
        let mut found = None;
        setup::any_entry("/sys/block", |name| {
            let name = core::str::from_utf8(name).unwrap_or_default();
            let here = is(name, "serial", serial.as_bytes());
            if here {
                let mut text = Text::new();
                text.push(name.as_bytes());
                found = Some(text);
            }
            here
        });
        if found.is_some() || sys::now_ms() > end {
            return found;
        }
        sys::sleep_ms(PAUSE_MS);
    }
}

/// The attribute of a disk has this value.
fn is(name: &str, attribute: &str, value: &[u8]) -> bool {
    let mut path = Text::<128>::new();
    let _ = write!(path, "/sys/block/{name}/{attribute}");
    let mut buffer = [0; 64];
    setup::read_file(path.as_str(), &mut buffer).trim_ascii_end() == value
}

/// Mounts a disk with the first file system of the kernel that knows its content.
fn mount_disk(name: &str, read_only: bool) -> Result<(), Trouble> {
    let mut device = Text::<64>::new();
    let _ = write!(device, "/dev/{name}");
    let flags = if read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    let _ = rustix::fs::mkdir(DISK, Mode::from_raw_mode(0o755));
    let mut buffer = [0; 4096];
    let list = setup::read_file("/proc/filesystems", &mut buffer);
    let mut worst = Errno::INVAL;
    for line in list.split(|&b| b == b'\n') {
        // The others are "nodev", a tab and the name.
        let Some(kind) = line.strip_prefix(b"\t").filter(|kind| !kind.is_empty()) else {
            continue;
        };
        match mount(device.as_str(), DISK, kind, flags, None) {
            Ok(()) => return Ok(()),
            // Not of this kind.
            Err(Errno::INVAL) => {}
            Err(errno) => worst = errno,
        }
    }
    let device = device.as_str();
    let text = match worst {
        Errno::INVAL => trouble(format_args!(
            "{device} has no file system that this kernel knows"
        )),
        Errno::ROFS => trouble(format_args!(
            "{device} was not unmounted cleanly; boot it once with --root-rw to repair it"
        )),
        _ => trouble(format_args!("{device} cannot be mounted")),
    };
    Err(text(worst))
}

/// Lays a tmpfs over the disk.
fn unite() -> Result<&'static str, Trouble> {
    let directory = |path| rustix::fs::mkdir(path, Mode::from_raw_mode(0o755));
    let prepare = || {
        let _ = (directory(LAYER), directory(UNITED));
        mount(
            "tmpfs",
            LAYER,
            "tmpfs",
            MountFlags::empty(),
            Some(c"mode=0755"),
        )?;
        directory("/.bulle/layer/upper")?;
        directory("/.bulle/layer/work")
    };
    prepare().map_err(trouble(format_args!("there is no tmpfs to write to")))?;
    let data = c"lowerdir=/.bulle/disk,upperdir=/.bulle/layer/upper,workdir=/.bulle/layer/work";
    let flags = MountFlags::empty();
    match mount("overlay", UNITED, "overlay", flags, Some(data)) {
        Ok(()) => Ok(UNITED),
        Err(Errno::NODEV) => Err(trouble(format_args!(
            "the kernel has no overlayfs; use --root-rw, or a kernel that has it"
        ))(Errno::NODEV)),
        Err(errno) => Err(trouble(format_args!(
            "the root cannot have a tmpfs laid over it; use --root-rw"
        ))(errno)),
    }
}

/// Makes the file system at `root` that of every path, as switch_root does.
fn move_into(root: &str) -> Result<(), Errno> {
    for directory in ["/proc", "/sys", "/dev"] {
        let mut target = Text::<64>::new();
        let _ = write!(target, "{root}{directory}");
        let _ = rustix::fs::mkdir(target.as_str(), Mode::from_raw_mode(0o755));
        mount_move(directory, target.as_str())?;
    }
    rustix::process::chdir(root)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")
}
