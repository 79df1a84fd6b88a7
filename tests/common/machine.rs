//! A machine of the library with a payload in it, without a session: what clones are made of.
#![allow(dead_code)]

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arch::kernel::KernelImage;
use bulle::board::plan::{open_files, plan};
use bulle::board::{SerialEnd, Wiring};
use bulle::config::{Config, Spec};
use bulle::snapshot::ram::Origin;
use bulle::snapshot::{self, GuestFacts, Request, Snapshot};
use bulle::vm::build::Initrd;
use bulle::vm::{Host, Vm};
use devices::mmds::Mmds;
use vmm_sys_util::eventfd::EventFd;

/// How long a guest may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a guest has written, and when its first byte came.
#[derive(Clone, Default)]
pub struct Output(Arc<(Mutex<Written>, Condvar)>);

#[derive(Default)]
struct Written {
    bytes: Vec<u8>,
    first: Option<Instant>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = Instant::now();
        let mut inner = self.0.0.lock().unwrap();
        inner.bytes.extend_from_slice(bytes);
        inner.first.get_or_insert(now);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    /// Forgets what was not taken.
    pub fn clear(&self) {
        let mut inner = self.0.0.lock().unwrap();
        *inner = Written::default();
    }

    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.0.0.lock().unwrap().bytes.is_empty()
    }

    /// Waits for `len` bytes and takes them; also says when the first came.
    #[track_caller]
    pub fn take(&self, len: usize) -> (Vec<u8>, Instant) {
        let mut inner = self.wait(|written| written.len() >= len);
        let bytes = inner.bytes.drain(..len).collect();
        (bytes, inner.first.take().unwrap())
    }

    /// Waits for a line and takes it, without its end.
    #[track_caller]
    pub fn line(&self) -> String {
        let mut inner = self.wait(|written| written.contains(&b'\n'));
        let end = inner.bytes.iter().position(|byte| *byte == b'\n').unwrap();
        let line = inner.bytes.drain(..=end).collect();
        String::from_utf8(line).unwrap().trim().to_owned()
    }

    #[track_caller]
    fn wait(&self, there: impl Fn(&[u8]) -> bool) -> MutexGuard<'_, Written> {
        let inner = self.0.0.lock().unwrap();
        let (inner, timeout) = self
            .0
            .1
            .wait_timeout_while(inner, PATIENCE, |inner| !there(&inner.bytes))
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "{:?}",
            String::from_utf8_lossy(&inner.bytes)
        );
        inner
    }
}

/// A configuration: `kernel` and sections as JSON.
pub fn config(kernel: &Path, sections: &str) -> Config {
    let boot = format!(r#"{{"boot-source":{{"kernel_image_path":{kernel:?}}},"#);
    serde_json::from_str(&sections.replacen('{', &boot, 1)).unwrap()
}

/// The host's side of the machine of `spec`.
pub fn wiring(spec: &Spec, output: &Output) -> Wiring {
    let end = |out: Box<dyn Write + Send>| SerialEnd {
        out,
        drained: EventFd::new(0).unwrap(),
    };
    Wiring {
        console: end(Box::new(output.clone())),
        agent: end(Box::new(io::sink())),
        watchdog: None,
        boot_timer: None,
        io: Vec::new(),
        devices: plan(spec, &Arc::new(Mmds::new(0))).unwrap().0,
    }
}

/// KVM, for machines like that of `spec`, a hundred of them at once.
pub fn host(spec: &Spec) -> Host {
    let files = open_files(&plan(spec, &Arc::new(Mmds::new(0))).unwrap().0);
    Host::open(spec, 100 * files).unwrap()
}

/// Types `bytes` on the machine's first serial port.
#[track_caller]
pub fn types(vm: &Vm, mut bytes: &[u8]) {
    let begin = Instant::now();
    while !bytes.is_empty() {
        // Nothing is taken while the guest is at the port's registers.
        let taken = vm.board().console.input(bytes);
        bytes = &bytes[taken..];
        assert!(begin.elapsed() < PATIENCE, "the guest takes no input");
    }
}

/// Boots the payload at `kernel` and waits for its line `nonce …`; the machine runs.
pub fn boot(spec: &Spec, host: Host) -> (Vm, Output, u64) {
    let kernel = KernelImage::open(&spec.config().boot_source.kernel_image_path).unwrap();
    let output = Output::default();
    let wiring = wiring(spec, &output);
    let vm = Vm::build(spec, host, &kernel, Initrd::default(), wiring).unwrap();
    vm.start();
    let (line, _) = output.take("nonce 0123456789abcdef\n".len());
    let line = String::from_utf8(line).unwrap();
    let nonce = line.trim().strip_prefix("nonce ").unwrap();
    let nonce = u64::from_str_radix(nonce, 16).unwrap();
    (vm, output, nonce)
}

/// Saves the machine below `dir`, in files of that name, and opens what was saved.
pub fn save(vm: &Vm, spec: &Spec, dir: &Path, name: &str) -> Snapshot {
    vm.pause(PATIENCE).unwrap();
    let (state, memory) = (
        dir.join(format!("{name}.state")),
        dir.join(format!("{name}.memory")),
    );
    snapshot::create(&Request {
        state_path: &state,
        memory_path: &memory,
        config: spec.config(),
        machine: &vm.save().unwrap(),
        guest: &GuestFacts::default(),
        memory: vm.memory(),
        origin: &Origin::Nothing,
        base: None,
        plugged: &vm.plugged(),
        watch: None,
    })
    .unwrap();
    Snapshot::open(&state, &memory).unwrap()
}
