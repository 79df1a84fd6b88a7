//! The devices that are driven, each with what it needs of the host.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use devices::virtio::balloon::BalloonOptions;
use devices::virtio::block::{BlockOptions, Cache, Disk, DiskOptions, EngineKind};
use devices::virtio::console::{ConsoleOptions, PortEnd, PortOptions, SizeOrder};
use devices::virtio::device::{DeviceState, VirtioDevice};
use devices::virtio::fs::FsOptions;
use devices::virtio::mem::{MemOptions, Region};
use devices::virtio::net::{NetBackend, NetOptions};
use devices::virtio::pmem::PmemOptions;
use devices::virtio::registry::{DeviceConfig, build};
use devices::virtio::rtc::RtcOptions;
use devices::virtio::vsock::{VsockEnd, VsockOptions};

use super::super::input::Input;
use super::drive;

fn made(config: DeviceConfig, state: &DeviceState) -> Box<dyn VirtioDevice> {
    build(config, state).expect("a saved state is valid").0
}

/// A directory of this process.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIRECTORY
        .get_or_init(|| tempfile::tempdir().expect("a temporary directory"))
        .path()
}

/// A name that is not there yet.
fn fresh() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    directory().join(COUNT.fetch_add(1, Ordering::Relaxed).to_string())
}

/// Entropy device.
pub fn entropy(data: &[u8]) {
    let make = |state: &DeviceState| made(DeviceConfig::Entropy(None), state);
    drive(&make, &mut |_| (), Input(data));
}

/// Block device: engine, cache, number of queues and whether it can be written come first.
pub fn block(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.u8();
    let make = |state: &DeviceState| {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(1 << 16).expect("room for it");
        let options = DiskOptions {
            path: "fuzz".into(),
            cache: [Cache::Writeback, Cache::Unsafe][usize::from(kind >> 1 & 1)],
            ..DiskOptions::default()
        };
        let disk = Disk::from_file(file, &options).expect("a disk");
        let options = BlockOptions {
            engine: [EngineKind::Sync, EngineKind::Auto][usize::from(kind & 1)],
            queues: 1 + u16::from(kind >> 2 & 1),
            queue_size: 16,
            ..BlockOptions::default()
        };
        made(DeviceConfig::Block(disk, options), state)
    };
    drive(&make, &mut |_| (), input);
}

/// Console device with two ports; something always comes in.
pub fn console(data: &[u8]) {
    let null = || {
        File::options()
            .write(true)
            .open("/dev/null")
            .ok()
            .map(Into::into)
    };
    let zero = || File::open("/dev/zero").ok().map(Into::into);
    let make = |state: &DeviceState| {
        let end = |input| PortEnd::fds(input, null()).expect("ends of a port");
        let options = ConsoleOptions {
            ports: vec![
                PortOptions::console(end(zero())),
                PortOptions::named("agent", end(None)),
            ],
            size: (80, 25),
            order: SizeOrder::default(),
        };
        made(DeviceConfig::Console(options), state)
    };
    drive(&make, &mut |_| (), Input(data));
}

/// Socket device; the host connects now and then, and says a line.
pub fn vsock(data: &[u8]) {
    let path = fresh();
    let make = |state: &DeviceState| {
        // The device that was saved still has the first path.
        let path = if path.exists() { fresh() } else { path.clone() };
        let mut options = VsockOptions::new(3, path);
        options.max_connections = 8;
        let end = VsockEnd::bind(options).expect("sockets of the host");
        made(DeviceConfig::Vsock(end), state)
    };
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut host = |byte: u8| match byte % 4 {
        0 if streams.len() < 16 => {
            if let Ok(mut stream) = UnixStream::connect(&path) {
                let _ = stream.set_nonblocking(true);
                let _ = writeln!(stream, "CONNECT {byte}");
                streams.push(stream);
            }
        }
        1 => drop(streams.pop()),
        _ => streams
            .iter_mut()
            .for_each(|stream| _ = stream.write(b"line\n")),
    };
    drive(&make, &mut host, Input(data));
}

/// Network device on a socket, whose other end reads now and then, and says frames or anything.
pub fn net(data: &[u8]) {
    let mut input = Input(data);
    let mtu = input.u16();
    let peer: RefCell<Option<UnixStream>> = RefCell::default();
    let make = |state: &DeviceState| {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        for end in [&ours, &theirs] {
            end.set_nonblocking(true)
                .expect("sockets that do not block");
        }
        *peer.borrow_mut() = Some(theirs);
        let options = NetOptions {
            backend: NetBackend::stream(ours.into()).expect("a socket"),
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: Some(mtu).filter(|mtu| *mtu >= 68),
            rx_limiter: None,
            tx_limiter: None,
            detour: None,
            vhost: None,
            keeper: None,
        };
        made(DeviceConfig::Net(options), state)
    };
    let mut host = |byte: u8| {
        let mut peer = peer.borrow_mut();
        let Some(stream) = peer.as_mut() else { return };
        let frame = |len: u32| [&len.to_be_bytes()[..], &vec![byte; len as usize]].concat();
        let sent = match byte % 8 {
            0 => stream.write(&frame(u32::from(byte) << 8)),
            1 => stream.read(&mut [0; 4096]),
            2 => stream.write(&[byte; 3]),
            3 => stream.write(&frame(1500)[..700]),
            4 if byte > 0xf0 => {
                drop(peer.take());
                return;
            }
            _ => stream.write(&frame(u32::from(byte) + 14)),
        };
        // Full, empty or closed by the device, which may well be.
        let _ = sent;
    };
    drive(&make, &mut host, input);
}

/// Shared directory, read-only, with a file, a directory and a symbolic link.
pub fn fs(data: &[u8]) {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    let tree = TREE.get_or_init(|| {
        let tree = fresh();
        std::fs::create_dir_all(tree.join("d")).expect("a directory");
        std::fs::write(tree.join("f"), "content").expect("a file");
        std::os::unix::fs::symlink("/etc/passwd", tree.join("l")).expect("a link");
        tree
    });
    let make = |state: &DeviceState| {
        let mut options = FsOptions::new("share", tree);
        options.queue_size = 16;
        options.max_nodes = 64;
        made(DeviceConfig::Fs(options), state)
    };
    drive(&make, &mut |_| (), Input(data));
}

/// Clock device.
pub fn rtc(data: &[u8]) {
    let make = |state: &DeviceState| made(DeviceConfig::Rtc(RtcOptions::default()), state);
    drive(&make, &mut |_| (), Input(data));
}

/// Memory balloon with all that it can do, over small or large pages of the host.
pub fn balloon(data: &[u8]) {
    let mut input = Input(data);
    let large = input.u8() & 1 != 0;
    let make = |state: &DeviceState| {
        let options = BalloonOptions {
            num_pages: 16,
            max_pages: 512,
            host_page: if large { 1 << 16 } else { 4096 },
            deflate_on_oom: true,
            statistics: Some(std::time::Duration::ZERO),
            reporting: true,
            hinting: true,
        };
        made(DeviceConfig::Balloon(options), state)
    };
    drive(&make, &mut |_| (), input);
}

/// Persistent memory.
pub fn pmem(data: &[u8]) {
    let path = fresh();
    File::create(&path)
        .and_then(|file| file.set_len(1 << 16))
        .expect("room for a file");
    let options = PmemOptions::open(&path, false).expect("a file");
    let options = PmemOptions {
        address: 1 << 32,
        ..options
    };
    let make = |state: &DeviceState| made(DeviceConfig::Pmem(options.clone()), state);
    drive(&make, &mut |_| (), Input(data));
    let _ = std::fs::remove_file(path);
}

/// Memory device of eight blocks.
pub fn mem(data: &[u8]) {
    const BLOCK: u64 = 2 << 20;
    let make = |state: &DeviceState| {
        let region = Region::new(8 * BLOCK, 4096).expect("room in the address space");
        let options = MemOptions {
            region: Arc::new(region),
            address: 1 << 32,
            block: BLOCK,
            requested: 4 * BLOCK,
            memory: None,
        };
        made(DeviceConfig::Mem(options), state)
    };
    drive(&make, &mut |_| (), Input(data));
}
