//! Preparing the guest: file systems, device links, modules, host name, loopback.
//!
//! Nothing here is fatal: a guest without cgroups still runs commands. What failed is noted and told
//! to the host once it listens.

use core::ffi::CStr;
use core::fmt::Write;
use core::mem::MaybeUninit;

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::sys;
use crate::text::Text;

/// What went wrong, one line each, for the host's log.
pub type Notes = Text<2048>;

/// Lists the modules to load: one path per line, in order.
const MODULE_LIST: &str = "/.bulle/modules";
/// Longest list of modules or of shares, and what is read of the command line.
pub const MAX_LIST: usize = 16 * 1024;

/// Where a root names its host.
const HOST_NAME: &str = "/etc/hostname";
/// The name of one that does not.
const DEFAULT_HOST_NAME: &[u8] = b"bulle";
/// Longest host name of Linux (`HOST_NAME_MAX`).
const MAX_HOST_NAME: usize = 64;

/// How long a port may take to be there once its device has a driver, and how often it is looked for.
const PORT_PATIENCE_MS: u64 = 2000;
const PORT_PAUSE_MS: u64 = 1;

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static CStr,
    /// Leave alone a directory that has something in it.
    only_if_empty: bool,
    /// In a directory of the host as root this has what the host's processes keep there, which is
    /// of no use here.
    hides_hosts: bool,
}

const fn on(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: &'static CStr,
) -> Mount {
    Mount {
        kind,
        target,
        flags,
        data,
        only_if_empty: false,
        hides_hosts: false,
    }
}

const NOTHING_SPECIAL: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);
const SCRATCH: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

const MOUNTS: [Mount; 8] = [
    on("proc", "/proc", NOTHING_SPECIAL, c""),
    on("sysfs", "/sys", NOTHING_SPECIAL, c""),
    on("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
    on(
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        c"gid=5,mode=620,ptmxmode=666",
    ),
    on("tmpfs", "/dev/shm", SCRATCH, c"mode=1777"),
    Mount {
        only_if_empty: true,
        hides_hosts: true,
        ..on("tmpfs", "/run", SCRATCH, c"mode=0755")
    },
    Mount {
        only_if_empty: true,
        ..on("tmpfs", "/tmp", SCRATCH, c"mode=1777")
    },
    on("cgroup2", "/sys/fs/cgroup", NOTHING_SPECIAL, c"nsdelegate"),
];

/// How many of [`MOUNTS`] move with the root: proc, sysfs, devtmpfs.
const FIRST: usize = 3;

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Makes sure that descriptors 0 to 2 are open, so that no other file gets their numbers.
pub fn open_standard_files() {
    loop {
        let open = |path| rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
        let Ok(fd) = open("/dev/console").or_else(|_| open("/dev/null")) else {
            return;
        };
        if rustix::fd::AsRawFd::as_raw_fd(&fd) > 2 {
            return;
        }
        core::mem::forget(fd);
    }
}

/// Mounts what a root on a disk is found by.
pub fn mount_first(notes: &mut Notes) {
    mount_each(&MOUNTS[..FIRST], false, notes);
}

/// Mounts the other usual file systems and makes the usual links. `hosts`: the root is a directory
/// of the host.
pub fn mount_rest(hosts: bool, notes: &mut Notes) {
    mount_each(&MOUNTS[FIRST..], hosts, notes);
    for (to, link) in LINKS {
        let _ = rustix::fs::symlink(to, link);
    }
}

fn mount_each(mounts: &[Mount], hosts: bool, notes: &mut Notes) {
    for m in mounts {
        let _ = rustix::fs::mkdir(m.target, Mode::from_raw_mode(0o755));
        if m.only_if_empty && !(hosts && m.hides_hosts) && any_entry(m.target, |_| true) {
            continue;
        }
        match mount(m.kind, m.target, m.kind, m.flags, Some(m.data)) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(errno) => {
                let errno = errno.raw_os_error();
                note(
                    notes,
                    format_args!("cannot mount {} on {}: error {errno}", m.kind, m.target),
                );
            }
        }
    }
}

/// Loads the modules that the host packed, and frees the memory that their files take.
pub fn load_modules(notes: &mut Notes) {
    let mut buffer = [0; MAX_LIST];
    for line in read_file(MODULE_LIST, &mut buffer).split(|&b| b == b'\n') {
        if line.is_empty() {
            continue;
        }
        if let Err(errno) = load_module(line) {
            let path = core::str::from_utf8(line).unwrap_or("?");
            let errno = errno.raw_os_error();
            note(
                notes,
                format_args!("cannot load module {path}: error {errno}"),
            );
        }
        let _ = rustix::fs::unlink(line);
    }
}

fn load_module(path: &[u8]) -> Result<(), Errno> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::system::finit_module(&file, c"", 0) {
        // Already there, or for hardware that this processor lacks.
        Err(Errno::EXIST | Errno::NODEV) => Ok(()),
        other => other,
    }
}

/// Names the guest as its root says.
pub fn set_host_name(notes: &mut Notes) {
    let mut buffer = [0; 512];
    let name = host_name(read_file(HOST_NAME, &mut buffer));
    if let Err(errno) = rustix::system::sethostname(name) {
        let errno = errno.raw_os_error();
        note(
            notes,
            format_args!("cannot set the host name: error {errno}"),
        );
    }
}

/// The name in a hostname(5) file: its first line that is neither empty nor a comment.
fn host_name(file: &[u8]) -> &[u8] {
    let mut lines = file.split(|&b| b == b'\n').map(<[u8]>::trim_ascii);
    lines
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .filter(|name| name.len() <= MAX_HOST_NAME && name.iter().all(u8::is_ascii_graphic))
        .unwrap_or(DEFAULT_HOST_NAME)
}

/// Sets `lo` up.
pub fn bring_up_loopback(notes: &mut Notes) {
    use rustix::net::{AddressFamily, SocketType, socket};
    let result = socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| sys::interface_up(&socket, b"lo"));
    if let Err(errno) = result {
        note(
            notes,
            format_args!(
                "cannot set up the lo interface: error {}",
                errno.raw_os_error()
            ),
        );
    }
}

/// The channels to the host that `bulle.agent=` on the kernel command line names, best first and with
/// commas between: a file in /dev, or `port:` and the name of a port of a virtio console. `ttyS1`
/// without it.
pub fn channels() -> Text<128> {
    command_line_word(b"bulle.agent=").unwrap_or_else(|| {
        let mut name = Text::new();
        name.push(b"ttyS1");
        name
    })
}

/// The device file of the port called `name`. Where a console device is bound to its driver, which
/// then learns of its ports one by one, it is waited for.
pub fn virtio_port(name: &[u8]) -> Option<Text<64>> {
    let bound = any_entry("/sys/bus/virtio/drivers/virtio_console", |entry| {
        entry.starts_with(b"virtio")
    });
    let deadline = sys::now_ms() + if bound { PORT_PATIENCE_MS } else { 0 };
    loop {
        let mut path = Text::new();
        let found = any_entry("/sys/class/virtio-ports", |port| {
            let Ok(port) = core::str::from_utf8(port) else {
                return false;
            };
            let mut file = Text::<96>::new();
            let _ = write!(file, "/sys/class/virtio-ports/{port}/name");
            let mut buffer = [0; 160];
            if read_file(file.as_str(), &mut buffer).trim_ascii() != name {
                return false;
            }
            let _ = write!(path, "/dev/{port}");
            true
        });
        if found {
            return Some(path);
        }
        if sys::now_ms() >= deadline {
            return None;
        }
        sys::sleep_ms(PORT_PAUSE_MS);
    }
}

/// What follows `key` on the kernel command line, the last time.
pub fn command_line_word(key: &[u8]) -> Option<Text<128>> {
    let mut buffer = [0; MAX_LIST];
    let words = read_file("/proc/cmdline", &mut buffer).split(|b| b.is_ascii_whitespace());
    let value = words
        .filter_map(|word| word.strip_prefix(key))
        .next_back()?;
    let mut text = Text::new();
    text.push(value);
    Some(text)
}

/// A pvpanic device is bound to a driver.
pub fn has_pvpanic() -> bool {
    [
        "/sys/bus/platform/drivers/pvpanic-mmio",
        "/sys/bus/pci/drivers/pvpanic-pci",
    ]
    .into_iter()
    // Only the names of devices have a colon: QEMU0001:00, 0000:00:05.0.
    .any(|driver| any_entry(driver, |name| name.contains(&b':')))
}

/// Pseudo-terminals can be made.
pub fn has_pty() -> bool {
    rustix::fs::access("/dev/ptmx", rustix::fs::Access::READ_OK).is_ok()
        && any_entry("/dev/pts", |_| true)
}

/// Some name in the directory, other than `.` and `..`, satisfies `wanted`.
pub fn any_entry(directory: &str, mut wanted: impl FnMut(&[u8]) -> bool) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::open(directory, flags, Mode::empty()) else {
        return false;
    };
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(fd, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && wanted(name) {
            return true;
        }
    }
    false
}

/// What fits of a file; nothing if it cannot be read.
pub fn read_file<'a>(path: &str, buffer: &'a mut [u8]) -> &'a [u8] {
    let mut length = 0;
    // Not stuck on a FIFO.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(path, flags, Mode::empty()) {
        while let Ok(n @ 1..) = rustix::io::read(&file, &mut buffer[length..]) {
            length += n;
        }
    }
    &buffer[..length]
}

/// Tells the console, and the host once it listens.
pub fn note(notes: &mut Notes, message: core::fmt::Arguments<'_>) {
    sys::complain(message);
    let _ = writeln!(notes, "{message}");
}
