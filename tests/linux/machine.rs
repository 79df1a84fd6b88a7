//! A Linux guest built through the library, for what only a device's handle can ask for.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arch::kernel::KernelImage;
use bulle::board::plan::{open_files, plan};
use bulle::board::{SerialEnd, Wiring};
use bulle::config::Config;
use bulle::guest::modules::{Wanted, default_directory, resolve};
use bulle::vm::build::Initrd;
use bulle::vm::{Host, Vm};
use devices::virtio::registry::DeviceHandle;
use vmm_sys_util::eventfd::EventFd;

use crate::common::debian_kernel;

/// What the guest wrote to its console.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An initial RAM disk that loads `modules` of the `flavour` kernel and then is `script`, with busybox
/// and what is in `tree/bin` of `dir`.
pub fn initrd_with(dir: &Path, flavour: &str, modules: &[&str], script: &str) -> PathBuf {
    let image = KernelImage::open(&debian_kernel(flavour)).unwrap();
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("modules")).unwrap();
    let release = image.version().unwrap();
    let wanted = modules.iter().map(|name| Wanted {
        name,
        required: true,
    });
    let wanted: Vec<_> = wanted.collect();
    let resolved = resolve(&default_directory(&release), &release, &wanted).unwrap();
    for (index, module) in resolved.modules.iter().enumerate() {
        let name = format!("modules/{index:02}.ko");
        fs::write(tree.join(name), &module.data).unwrap();
    }
    let script = format!(
        "for dir in bin proc sys dev; do /bin/busybox mkdir -p /$dir; done
        /bin/busybox --install -s /bin; export PATH=/bin
        mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
        exec >/dev/console 2>&1
        for module in /modules/*.ko; do insmod $module; done
        {script}"
    );
    crate::initrd(dir, &script)
}

/// A running guest, on its own.
pub struct Machine {
    vm: Vm,
    console: Console,
}

impl Machine {
    /// Boots the `flavour` kernel with `modules` and then `script` as its init. `config` is the
    /// configuration in JSON, without the boot source.
    pub fn start(flavour: &str, modules: &[&str], script: &str, config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = debian_kernel(flavour);
        let image = KernelImage::open(&kernel).unwrap();
        let initrd = initrd_with(dir.path(), flavour, modules, script);
        let mut config: Config = serde_json::from_str(&config.replacen(
            '{',
            &format!(r#"{{"boot-source":{{"kernel_image_path":{kernel:?}}},"#),
            1,
        ))
        .unwrap();
        config.boot_source.boot_args = Some("console=ttyS0 quiet".to_owned());
        let spec = config.validate().unwrap();
        let console = Console::default();
        let end = |out: Box<dyn Write + Send>| SerialEnd {
            out,
            drained: EventFd::new(0).unwrap(),
        };
        let (devices, _) = plan(&spec, &std::sync::Arc::new(devices::mmds::Mmds::new(0))).unwrap();
        let host = Host::open(&spec, open_files(&devices)).unwrap();
        let wiring = Wiring {
            console: end(Box::new(console.clone())),
            agent: end(Box::new(io::sink())),
            watchdog: None,
            io: Vec::new(),
            boot_timer: None,
            devices,
        };
        let initrd = Initrd::open(Path::new(&initrd)).unwrap();
        let vm = Vm::build(&spec, host, &image, initrd, wiring).unwrap();
        vm.start();
        Self { vm, console }
    }

    /// The virtual machine.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The handles of its devices, in order.
    pub fn handles(&self) -> impl Iterator<Item = DeviceHandle> {
        let devices = self.vm.board().devices.list().into_iter();
        devices.map(|device| device.handle.clone())
    }

    /// The last value that the guest printed behind `key` and a space.
    pub fn value(&self, key: &str) -> Option<u64> {
        let bytes = self.console.0.lock().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut lines = whole.lines().rev();
        lines.find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
    }

    /// Waits until `done`.
    #[track_caller]
    pub fn wait(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !done(self) {
            let text = || String::from_utf8_lossy(&self.console.0.lock().unwrap()).into_owned();
            assert!(
                started.elapsed() < Duration::from_secs(150),
                "{what}: never; the console:\n{}",
                text()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
