//! Before the start: a configuration is collected, checked piece by piece.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::mmds::Mmds;

use super::{Action, ActionError, Instance, Reply, SnapshotLoad, VmStatistics};
use crate::config::{
    self, BootSource, Config, Drive, Logger, MachineConfig, MachineUpdate, NetworkInterface, Spec,
    Transport,
};
use crate::telemetry::{self, Metrics};

/// RAM of a machine of which nobody says how much it has, as Firecracker has it.
pub const DEFAULT_MEMORY_MIB: u64 = 128;

/// A microVM that is being configured.
#[derive(Debug)]
pub struct Preboot {
    instance: Instance,
    config: Config,
    has_kernel: bool,
    /// Something of the machine was configured, so that it cannot come from a snapshot.
    touched: bool,
    metrics: Option<Metrics>,
    mmds: Arc<Mmds>,
}

impl Preboot {
    /// The microVM `instance`, with what `config` has already, its virtio devices on a PCI bus if
    /// `pci` says so, with the metadata in `mmds`.
    pub fn new(instance: Instance, config: Option<Config>, pci: bool, mmds: Arc<Mmds>) -> Self {
        let has_kernel = config.is_some();
        let mut config = config.unwrap_or_else(|| {
            let mut config = Config::new(PathBuf::new());
            config.machine_config.mem_size_mib = DEFAULT_MEMORY_MIB;
            config
        });
        if pci {
            config.machine_config.virtio_transport = Transport::Pci;
        }
        Self {
            instance,
            config,
            has_kernel,
            touched: has_kernel,
            metrics: None,
            mmds,
        }
    }

    /// Has the log say how long the guest takes to boot.
    pub fn time_boot(&mut self) {
        self.config.boot_timer = true;
    }

    /// Who it is.
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// As far as it has come.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its metadata.
    pub fn mmds(&self) -> &Arc<Mmds> {
        &self.mmds
    }

    /// Does what can be done without a machine; [`Action::InstanceStart`] is the caller's, who
    /// takes [`spec`](Self::spec), and so is [`Action::LoadSnapshot`], after [`may_load`](Self::may_load).
    ///
    /// Table: an arm for each action.
    pub fn act(&mut self, action: Action) -> Result<Reply, ActionError> {
        match action {
            Action::DescribeInstance => Ok(Reply::Instance(self.instance.clone())),
            Action::Version => Ok(Reply::Version(self.instance.vmm_version)),
            Action::GetConfig => Ok(Reply::Config(Box::new(self.config.clone()))),
            Action::GetMachine => Ok(Reply::Machine(self.config.machine_config.clone())),
            Action::GetStatistics | Action::GetMetrics => {
                Ok(Reply::Vm(Box::new(VmStatistics::not_started())))
            }
            Action::PutMachine(update) => {
                let base = MachineConfig {
                    virtio_transport: self.config.machine_config.virtio_transport,
                    mem_size_mib: DEFAULT_MEMORY_MIB,
                    cpu_template: self.config.machine_config.cpu_template,
                    ..MachineConfig::default()
                };
                self.machine(&update, &base)
            }
            Action::PatchMachine(update) => {
                let base = self.config.machine_config.clone();
                self.machine(&update, &base)
            }
            Action::PutCpu(template) => self.change(|config| config.set_cpu(*template)),
            Action::PutBootSource(boot) => self.boot_source(boot),
            Action::PutDrive(drive) => {
                let path = Some(&drive.path_on_host).filter(|path| **path != Path::new(""));
                match (&drive.socket, path) {
                    (Some(socket), None) => find_socket(&drive.drive_id, socket)?,
                    (None, Some(path)) => try_open("block", &drive.drive_id, path)?,
                    // Refused below.
                    (Some(_), Some(_)) | (None, None) => {}
                }
                let same = |other: &Drive| other.drive_id == drive.drive_id;
                let at = self.config.drives.iter().position(same);
                self.device(|config| place(&mut config.drives, at, drive))
            }
            Action::PutPmem(pmem) => {
                try_open("pmem", &pmem.id, &pmem.path_on_host)?;
                let at = self.config.pmem.iter().position(|p| p.id == pmem.id);
                self.device(|config| place(&mut config.pmem, at, pmem))
            }
            Action::PutNetwork(net) => {
                let same = |other: &NetworkInterface| other.iface_id == net.iface_id;
                let at = self.config.network_interfaces.iter().position(same);
                self.device(|config| place(&mut config.network_interfaces, at, *net))
            }
            Action::PutEntropy(entropy) => self.device(|config| config.entropy = Some(entropy)),
            Action::PutVsock(vsock) => self.device(|config| config.vsock = Some(vsock)),
            Action::PutBalloon(balloon) => self.device(|config| config.balloon = Some(balloon)),
            Action::GetBalloon => match self.config.balloon {
                Some(balloon) => Ok(Reply::Balloon(balloon)),
                None => Err(no_balloon()),
            },
            Action::PutMemoryHotplug(memory) => {
                self.device(|config| config.memory_hotplug = Some(memory))
            }
            Action::PutMmdsConfig(mmds) => self.device(|config| config.mmds_config = Some(mmds)),
            Action::PutMmds(document) => {
                self.mmds.put(document)?;
                Ok(Reply::Done)
            }
            Action::PatchMmds(patch) => {
                self.mmds.patch(patch)?;
                Ok(Reply::Done)
            }
            Action::GetMmds => Ok(Reply::Metadata(self.mmds.document())),
            Action::PutSerial(serial) => self.change(|config| config.serial = Some(serial)),
            Action::PutLogger(logger) => self.logger(&logger),
            Action::PutMetrics(metrics) => self.metrics(metrics),
            Action::InstanceStart
            | Action::LoadSnapshot(_)
            | Action::FlushMetrics
            | Action::Listen
            | Action::Exec(_)
            | Action::ReadConsole
            | Action::GetLog
            | Action::SendCtrlAltDel
            | Action::Shutdown
            | Action::Pause
            | Action::Resume
            | Action::PatchDrive(_)
            | Action::PatchPmem(_)
            | Action::PatchNetwork(_)
            | Action::PatchBalloon(_)
            | Action::GetBalloonStatistics
            | Action::PatchBalloonStatistics(_)
            | Action::StartHinting(_)
            | Action::GetHinting
            | Action::StopHinting
            | Action::GetMemoryHotplug
            | Action::PatchMemoryHotplug(_)
            | Action::Unplug(_)
            | Action::Fork(_)
            | Action::RecordWorkingSet
            | Action::CreateSnapshot(_)
            | Action::CancelSnapshot => Err(ActionError::BeforeStart),
        }
    }

    /// What is to be started.
    pub fn spec(&self) -> Result<Spec, ActionError> {
        match self.has_kernel {
            true => startable(&self.config),
            false => Err(ActionError::NoKernel),
        }
    }

    /// Has the configuration of a machine that was loaded.
    pub fn adopt(&mut self, config: Config) {
        self.config = config;
        (self.has_kernel, self.touched) = (true, true);
    }

    /// Changes the log.
    pub fn logger(&mut self, logger: &Logger) -> Result<Reply, ActionError> {
        telemetry::configure(logger)?;
        let present = self.config.logger.get_or_insert_default();
        present.merge(logger);
        Ok(Reply::Done)
    }

    /// Says where figures go, once.
    pub fn metrics(&mut self, metrics: config::Metrics) -> Result<Reply, ActionError> {
        if self.metrics.is_some() {
            return Err(ActionError::MetricsTwice);
        }
        self.metrics = Some(Metrics::open(&metrics, &self.instance.id)?);
        self.config.metrics = Some(metrics);
        Ok(Reply::Done)
    }

    /// Where figures go, for whoever has them.
    pub fn take_metrics(&mut self) -> Option<Metrics> {
        self.metrics.take()
    }

    fn boot_source(&mut self, boot: BootSource) -> Result<Reply, ActionError> {
        can_open(&boot.kernel_image_path).map_err(ActionError::Kernel)?;
        if let Some(initrd) = &boot.initrd_path {
            can_open(initrd).map_err(ActionError::Initrd)?;
        }
        let words = boot.boot_args.as_deref().unwrap_or_default();
        arch::cmdline::build("", words, arch::layout::ELF_CMDLINE_MAX_SIZE - 1)
            .map_err(ActionError::CommandLine)?;
        self.device(|config| config.boot_source = boot)?;
        self.has_kernel = true;
        Ok(Reply::Done)
    }

    /// Whether a snapshot may be loaded now, as asked; loading is the caller's.
    ///
    /// # Errors
    /// Where something of the machine was configured, or its memory is in two places or none.
    pub fn may_load(&self, load: &SnapshotLoad) -> Result<(), ActionError> {
        if self.touched {
            return Err(ActionError::LoadAfterConfig);
        }
        match load.mem_backend.is_some() == load.mem_file_path.is_some() {
            true => Err(ActionError::LoadMemory),
            false => Ok(()),
        }
    }

    /// Changes a machine. Of `cpu_template` and a CPU template of the user's the later counts.
    fn machine(
        &mut self,
        update: &MachineUpdate,
        base: &MachineConfig,
    ) -> Result<Reply, ActionError> {
        let machine = update.apply(base)?;
        self.device(|config| {
            config.machine_config = machine;
            if update.cpu_template.is_some() {
                config.cpu_config = None;
            }
        })
    }

    /// A change of what only a machine that is not loaded can have.
    fn device(&mut self, change: impl FnOnce(&mut Config)) -> Result<Reply, ActionError> {
        self.change(change)?;
        self.touched = true;
        Ok(Reply::Done)
    }

    /// Takes a change if what comes of it is valid; nothing changes otherwise.
    fn change(&mut self, change: impl FnOnce(&mut Config)) -> Result<Reply, ActionError> {
        let mut config = self.config.clone();
        change(&mut config);
        config.clone().validate()?;
        self.config = config;
        Ok(Reply::Done)
    }
}

/// What is started of a configuration that came over the API. Network interfaces and persistent
/// memory have limiters that limit nothing where none were asked for, so that limits can come later.
pub fn startable(config: &Config) -> Result<Spec, ActionError> {
    let mut config = config.clone();
    for net in &mut config.network_interfaces {
        net.allow_limits();
    }
    for pmem in &mut config.pmem {
        pmem.rate_limiter.get_or_insert_default();
    }
    Ok(config.validate()?)
}

/// The balloon that is not there.
pub fn no_balloon() -> ActionError {
    ActionError::NoDevice {
        kind: "balloon",
        id: None,
    }
}

/// Whether there is something to read at `path`, so that a wrong name is said where it is given. It is
/// opened again for the start.
fn can_open(path: &Path) -> io::Result<()> {
    // A pipe without a writer would be waited for.
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    options.open(path).map(drop)
}

fn try_open(kind: &'static str, id: &str, path: &Path) -> Result<(), ActionError> {
    can_open(path).map_err(|source| ActionError::File {
        kind,
        id: id.to_owned(),
        path: path.to_owned(),
        source,
    })
}

/// Backends may end with their first connection: they are not tried.
fn find_socket(id: &str, path: &Path) -> Result<(), ActionError> {
    let kind = std::fs::metadata(path).map(|meta| meta.file_type().is_socket());
    let found = kind.and_then(|is_socket| match is_socket {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no socket",
        )),
    });
    found.map_err(|source| ActionError::Socket {
        id: id.to_owned(),
        path: path.to_owned(),
        source,
    })
}

/// Puts a device at its place, or behind all others.
fn place<T>(devices: &mut Vec<T>, at: Option<usize>, device: T) {
    match at.and_then(|at| devices.get_mut(at)) {
        Some(place) => *place = device,
        None => devices.push(device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;

    fn preboot() -> Preboot {
        Preboot::new(
            Instance::new("a".into()),
            None,
            false,
            Arc::new(Mmds::new(1000)),
        )
    }

    fn boot() -> BootSource {
        serde_json::from_str(r#"{"kernel_image_path":"/dev/null"}"#).unwrap()
    }

    fn machine(vcpu_count: u16, mem_size_mib: u64) -> MachineUpdate {
        MachineUpdate {
            vcpu_count: Some(vcpu_count),
            mem_size_mib: Some(mem_size_mib),
            ..MachineUpdate::default()
        }
    }

    #[test]
    fn a_bad_change_changes_nothing() {
        let mut preboot = preboot();
        preboot.act(Action::PutMachine(machine(2, 256))).unwrap();
        let before = preboot.config.clone();
        for action in [
            Action::PutMachine(machine(0, 256)),
            Action::PutMachine(machine(1, 1)),
            Action::PatchMachine(MachineUpdate {
                smt: Some(true),
                vcpu_count: Some(3),
                ..MachineUpdate::default()
            }),
            Action::PutDrive(Drive::new("", "/dev/null".into())),
            Action::PutDrive(Drive::new("a", "/nothing".into())),
            Action::PutBootSource(BootSource {
                initrd_path: Some("/nothing".into()),
                ..boot()
            }),
        ] {
            assert!(preboot.act(action.clone()).is_err(), "{action:?}");
            assert_eq!(preboot.config, before);
        }
    }

    #[test]
    fn a_put_sets_all_and_a_patch_what_it_names() {
        let mut preboot = preboot();
        let mut put = machine(2, 256);
        (put.smt, put.huge_pages) = (Some(true), Some(HugePages::Transparent));
        preboot.act(Action::PutMachine(put)).unwrap();
        preboot.act(Action::PatchMachine(machine(4, 512))).unwrap();
        let now = &preboot.config.machine_config;
        assert_eq!((now.vcpu_count, now.mem_size_mib), (4, 512));
        assert_eq!(now.threads_per_core, 2);
        assert_eq!(now.huge_pages, HugePages::Transparent);
        preboot.act(Action::PutMachine(machine(1, 64))).unwrap();
        assert_eq!(preboot.config.machine_config.threads_per_core, 1);
    }

    #[test]
    fn a_single_vcpu_has_one_thread_whatever_is_said() {
        let mut preboot = preboot();
        let mut put = machine(1, 256);
        put.smt = Some(true);
        preboot.act(Action::PutMachine(put.clone())).unwrap();
        assert_eq!(preboot.config.machine_config.threads_per_core, 1);
        put.vcpu_count = Some(4);
        preboot.act(Action::PutMachine(put)).unwrap();
        assert_eq!(preboot.config.machine_config.threads_per_core, 2);
        preboot.act(Action::PatchMachine(machine(1, 256))).unwrap();
        assert_eq!(preboot.config.machine_config.threads_per_core, 1);
    }

    #[test]
    fn drives_keep_their_places() {
        let mut preboot = preboot();
        for (id, path) in [("a", "/"), ("b", "/dev/null"), ("a", "/dev/zero")] {
            preboot
                .act(Action::PutDrive(Drive::new(id, path.into())))
                .unwrap();
        }
        let paths: Vec<_> = preboot
            .config
            .drives
            .iter()
            .map(|d| d.path_on_host.clone())
            .collect();
        assert_eq!(paths, ["/dev/zero", "/dev/null"].map(PathBuf::from));
    }

    #[test]
    fn what_needs_a_machine_waits_for_it() {
        let mut preboot = preboot();
        assert!(matches!(preboot.spec(), Err(ActionError::NoKernel)));
        preboot.act(Action::PutBootSource(boot())).unwrap();
        assert_eq!(preboot.spec().unwrap().ram_size(), DEFAULT_MEMORY_MIB << 20);
        for action in [Action::Pause, Action::Resume, Action::SendCtrlAltDel] {
            let error = preboot.act(action).unwrap_err();
            assert!(matches!(error, ActionError::BeforeStart));
        }
    }
}
