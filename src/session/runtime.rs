//! Actions on a machine that runs, on the vmm thread.

mod background;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use devices::mmds::{Mmds, MmdsError};
use devices::virtio::registry::DeviceHandle;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

pub use self::background::Behind;
use super::agent::AgentLink;
use super::events::Events;
use super::exec::Execs;
use super::figures::{FigureWriter, Startup, Told, signal_of};
use super::hotplug::{self, Unplugs};
use super::meter::{Meter, Task};
use super::outcome::Outcome;
use super::readers::{Console, Readers};
use super::snapshots::Saver;
use super::{commands, statistics};
use crate::api::Counts;
use crate::config::Config;
use crate::control::{
    Action, ActionError, Event, ExecRequest, ForkRequest, Instance, PAUSE_PATIENCE, PluggedKind,
    Reply, Requests, SnapshotCreate, SnapshotType, State, VmStatistics, chain, no_balloon,
};
use crate::snapshot::{AgentReady, ram};
use crate::telemetry::Metrics;
use crate::vm::Vm;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What the epoll set says of streams: all of them are looked at.
pub const STREAM: u64 = 3;

/// Who answers once a microVM has been started, and writes its figures.
pub struct Runtime {
    requests: Requests,
    instance: Instance,
    config: Config,
    saver: Saver,
    behind: Behind,
    figures: Option<FigureWriter>,
    /// Readable when there are requests, or figures are due.
    ready: Epoll,
    latencies: BTreeMap<String, Duration>,
    /// The operation that the present call had timed.
    timed: Option<&'static str>,
    /// Becomes true when nobody wants the present call's answer.
    cancelled: Arc<AtomicBool>,
    /// The signal that ended the machine.
    ended_by: Option<i32>,
    /// The guest is to be asked to switch itself off.
    stop_asked: bool,
    mmds: Arc<Mmds>,
    started: Instant,
    events: Events,
    /// Tells of devices that fail, once somebody listens.
    alarm: Option<Alarm>,
    panicked: bool,
    readers: Readers,
    execs: Execs,
    unplugs: Unplugs,
}

/// Who announces devices that fail, how often each did, and how often its link went down or up.
struct Alarm {
    event: EventFd,
    /// By kind and name.
    failures: BTreeMap<(&'static str, String), u32>,
    /// Of network interfaces.
    links: BTreeMap<String, u32>,
}

/// What figures are made of and where they go.
pub struct FigureParts {
    /// Where they go.
    pub metrics: Option<Metrics>,
    /// What came over the API.
    pub api: Option<Arc<Counts>>,
    /// How long the start took.
    pub startup: Startup,
    /// Who listens already.
    pub events: Events,
    /// The metadata.
    pub mmds: Arc<Mmds>,
    /// How long a snapshot took to be loaded: as its caller saw it, and here.
    pub loaded: Option<[Duration; 2]>,
}

impl Runtime {
    /// For the microVM `instance`, which `state` says is running or paused, made of `config` and
    /// saved by `saver`.
    pub fn new(
        requests: Requests,
        (instance, state): (Instance, State),
        (config, saver): (Config, Saver),
        parts: FigureParts,
    ) -> io::Result<Self> {
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        ready.add(&requests, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        let writer = |metrics| FigureWriter::new(metrics, parts.startup, parts.api);
        let figures = parts.metrics.map(writer).transpose()?;
        if let Some(writer) = &figures {
            // SAFETY: the descriptor is open as long as `writer`, which lives as long as the set.
            let fd = unsafe { BorrowedFd::borrow_raw(writer.as_raw_fd()) };
            ready.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        }
        let names = ["load_snapshot", "vmm_load_snapshot"].map(str::to_owned);
        let loaded = parts.loaded.into_iter().flatten();
        Ok(Self {
            requests,
            instance: Instance { state, ..instance },
            config,
            saver,
            behind: Behind::default(),
            figures,
            ready,
            latencies: names.into_iter().zip(loaded).collect(),
            timed: None,
            cancelled: Arc::default(),
            ended_by: None,
            stop_asked: false,
            started: Instant::now(),
            events: parts.events,
            alarm: None,
            panicked: false,
            mmds: parts.mmds,
            readers: Readers::default(),
            execs: Execs::default(),
            unplugs: Unplugs::default(),
        })
    }

    /// The microVM is called so.
    pub fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.instance.id);
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the guest is to be asked to switch itself off, once for each time that somebody asked.
    pub fn take_stop(&mut self) -> bool {
        std::mem::take(&mut self.stop_asked)
    }

    /// The machine runs.
    pub fn begun(&mut self, vm: &Vm) {
        self.started = Instant::now();
        Unplugs::watch(vm, &self.ready);
        if !self.events.is_empty() {
            self.watch_devices(vm);
            self.events.emit(&Event::Started);
        }
    }

    /// The guest kernel panicked, as far as is known.
    pub fn panicked(&mut self) {
        if !std::mem::replace(&mut self.panicked, true) {
            self.events.emit(&Event::Panicked);
        }
    }

    /// The machine has ended so.
    pub fn ended(&mut self, outcome: &Outcome) {
        if matches!(outcome, Outcome::Panicked) {
            self.panicked();
        }
        self.ended_by = signal_of(outcome);
        self.events.emit(&outcome.event(has_command(&self.config)));
    }

    /// Listens to devices that fail from now on.
    fn watch_devices(&mut self, vm: &Vm) {
        if self.alarm.is_some() {
            return;
        }
        let devices = vm.board().devices.list();
        let arm = || -> io::Result<EventFd> {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            for device in &devices {
                device.core.notifier().set_alarm(event.try_clone()?);
            }
            // SAFETY: the descriptor is open as long as `event`.
            let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
            self.ready
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 2))?;
            Ok(event)
        };
        match arm() {
            Ok(event) => {
                let failures = devices
                    .iter()
                    .map(|d| ((d.kind, d.id.clone()), d.core.notifier().failures()))
                    .collect();
                let links = BTreeMap::new();
                self.alarm = Some(Alarm {
                    event,
                    failures,
                    links,
                });
            }
            Err(error) => log::warn!("nobody is told of devices that fail: {error}"),
        }
    }

    /// Tells of devices that failed.
    fn look_at_devices(&mut self, vm: &Vm) {
        let Some(alarm) = &mut self.alarm else { return };
        if alarm.event.read().is_err() {
            return;
        }
        for device in vm.board().devices.list() {
            let failures = device.core.notifier().failures();
            let name = (device.kind, device.id.clone());
            let known = alarm.failures.insert(name, failures);
            if known.unwrap_or(0) != failures {
                let device = device.id.clone();
                self.events.emit(&Event::DeviceError { device, failures });
            }
            let DeviceHandle::Net(net) = &device.handle else {
                continue;
            };
            let changes = net.link_changes();
            let known = alarm.links.insert(device.id.clone(), changes);
            for change in known.unwrap_or(0)..changes {
                let device = device.id.clone();
                self.events.emit(&match change % 2 {
                    0 => Event::LinkDown { device },
                    _ => Event::LinkUp { device },
                });
            }
        }
    }

    /// Answers what is asked of the machine whose console this is, and writes figures that are due.
    pub fn serve(&mut self, console: Console<'_>, mut agent: Option<&mut AgentLink>) {
        let vm = console.vm;
        if self.figures.as_ref().is_some_and(FigureWriter::is_due) {
            self.flush(console);
        }
        self.look_at_devices(vm);
        self.look_at_snapshot();
        self.settle_unplugs(vm);
        while let Some(call) = self.requests.next() {
            self.settle_unplugs(vm);
            if let Action::Unplug(unplug) = &call.action {
                let unplug = unplug.clone();
                let machine = (vm, self.instance.state);
                self.unplugs
                    .begin((call, &unplug), machine, &self.config, &self.ready);
                self.settle_unplugs(vm);
                continue;
            }
            self.timed = None;
            self.cancelled = call.cancelled();
            let result = self.act(&call.action, console, agent.as_deref_mut());
            if let Some(name) = self.timed.take() {
                let waited = call.asked().elapsed();
                self.latencies.insert(name.to_owned(), waited);
            }
            call.answer(result);
        }
    }

    /// Takes away the devices that are off the bus.
    fn settle_unplugs(&mut self, vm: &Vm) {
        for device in self.unplugs.settle(vm, &mut self.config, &self.ready) {
            if let Some(writer) = &mut self.figures {
                writer.gone(&device);
            }
            if let Some(alarm) = &mut self.alarm {
                alarm.failures.remove(&(device.kind, device.id.clone()));
                if device.kind == PluggedKind::Net.device() {
                    alarm.links.remove(&device.id);
                }
            }
            let device = device.id.clone();
            self.events.emit(&Event::DeviceRemoved { device });
        }
    }

    /// A device has come, if `reply` says so.
    fn added(
        &mut self,
        reply: Result<Reply, ActionError>,
        vm: &Vm,
        (kind, id): (PluggedKind, &str),
    ) -> Result<Reply, ActionError> {
        let reply = reply?;
        let device = vm.board().devices.find(kind.device(), id);
        if let (Some(alarm), Some(device)) = (&self.alarm, device) {
            match alarm.event.try_clone() {
                Ok(event) => device.core.notifier().set_alarm(event),
                Err(error) => log::warn!("nobody is told when '{id}' fails: {error}"),
            }
        }
        let device = id.to_owned();
        self.events.emit(&Event::DeviceAdded { device });
        Ok(reply)
    }

    /// Whether there are streams beside those of events.
    pub fn has_streams(&self) -> bool {
        !self.readers.is_empty() || !self.execs.is_empty()
    }

    /// Passes on what those wait for.
    pub fn serve_streams(&mut self, console: Console<'_>, agent: Option<&mut AgentLink>) {
        self.readers.serve(console, &self.ready);
        if let Some(agent) = agent {
            self.execs.serve(agent, &self.ready);
        }
    }

    fn exec(
        &mut self,
        request: &ExecRequest,
        agent: Option<&mut AgentLink>,
    ) -> Result<Reply, ActionError> {
        let guest = self.config.guest.as_ref();
        let stream = self.execs.begin(request, (agent, guest), &self.ready)?;
        Ok(Reply::Stream(stream))
    }

    /// Writes a line of figures, where there is a place for them.
    pub fn flush(&mut self, console: Console<'_>) {
        let told = Told {
            latencies: &self.latencies,
            mmds: &self.mmds,
            ended_by: self.ended_by,
        };
        if let Some(writer) = &mut self.figures {
            writer.write(console, &told);
        }
    }

    /// An operation took so long here; how long its caller waited is noted when that is answered.
    fn took(&mut self, name: &'static str, took: Duration) {
        self.latencies.insert(format!("vmm_{name}"), took);
        self.timed = Some(name);
    }

    /// What the machine has done so far.
    fn statistics(&self, vm: &Vm) -> VmStatistics {
        let uptime = self.started.elapsed();
        let mut statistics = statistics::statistics(vm, self.instance.state, uptime);
        statistics.snapshot = self.behind.statistics();
        statistics
    }

    /// Table: an arm for each action.
    fn act(
        &mut self,
        action: &Action,
        console: Console<'_>,
        agent: Option<&mut AgentLink>,
    ) -> Result<Reply, ActionError> {
        let vm = console.vm;
        let devices = &vm.board().devices;
        let config = &mut self.config;
        match action {
            Action::DescribeInstance => Ok(Reply::Instance(self.instance.clone())),
            Action::Version => Ok(Reply::Version(self.instance.vmm_version)),
            Action::GetConfig => Ok(Reply::Config(Box::new(config.clone()))),
            Action::GetStatistics => Ok(Reply::Vm(Box::new(self.statistics(vm)))),
            Action::GetMetrics => {
                let mut statistics = self.statistics(vm);
                let dirtied = ram::dirtied(vm.memory(), &self.saver.ram.origin);
                statistics.dirtied_pages = dirtied.ok();
                Ok(Reply::Vm(Box::new(statistics)))
            }
            Action::Listen => {
                self.watch_devices(vm);
                let state = self.instance.state;
                Ok(Reply::Stream(self.events.listen(&Event::State { state })?))
            }
            // Answered later: `serve` keeps the call.
            Action::Unplug(_) => Err(ActionError::AfterStart),
            Action::PutDrive(drive) => {
                let added = hotplug::add_drive(vm, config, drive);
                self.added(added, vm, (PluggedKind::Drive, &drive.drive_id))
            }
            Action::PutPmem(pmem) => {
                let added = hotplug::add_pmem(vm, config, pmem);
                self.added(added, vm, (PluggedKind::Pmem, &pmem.id))
            }
            Action::PutNetwork(net) => {
                let added = hotplug::add_network(vm, config, net);
                self.added(added, vm, (PluggedKind::Net, &net.iface_id))
            }
            Action::ReadConsole => Ok(Reply::Stream(self.readers.begin(console, &self.ready)?)),
            Action::GetLog => {
                let (bytes, _) = console.since(0);
                Ok(Reply::Text(String::from_utf8_lossy(&bytes).into_owned()))
            }
            Action::GetMachine => Ok(Reply::Machine(config.machine_config.clone())),
            Action::Pause => self.pause(vm),
            Action::Resume => {
                if self.instance.state == State::Paused {
                    let begin = Instant::now();
                    vm.start();
                    self.took("resume_vm", begin.elapsed());
                    self.instance.state = State::Running;
                    self.events.emit(&Event::Resumed);
                }
                Ok(Reply::Done)
            }
            Action::SendCtrlAltDel => match vm.board().keyboard.ctrl_alt_del() {
                true => Ok(Reply::Done),
                false => Err(ActionError::Keyboard),
            },
            Action::Shutdown => {
                self.stop_asked = true;
                Ok(Reply::Done)
            }
            Action::PatchDrive(update) => commands::drive(devices, config, update),
            Action::PatchNetwork(update) => commands::network(devices, config, update),
            Action::PatchPmem(update) => commands::pmem(devices, config, update),
            Action::GetBalloon => match config.balloon {
                Some(balloon) => Ok(Reply::Balloon(balloon)),
                None => Err(no_balloon()),
            },
            Action::PatchBalloon(update) => commands::balloon_size(devices, config, *update),
            Action::GetBalloonStatistics => commands::balloon_statistics(devices),
            Action::PatchBalloonStatistics(update) => {
                commands::balloon_interval(devices, config, *update)
            }
            Action::StartHinting(start) => commands::start_hinting(devices, *start),
            Action::GetHinting => commands::hinting(devices),
            Action::StopHinting => commands::stop_hinting(devices),
            Action::GetMemoryHotplug => commands::plugged(devices, config),
            Action::PatchMemoryHotplug(update) => commands::plug(devices, config, *update),
            Action::PutMmds(document) => {
                self.metadata()?.put(document.clone())?;
                Ok(Reply::Done)
            }
            Action::PatchMmds(patch) => {
                self.metadata()?.patch(patch.clone())?;
                Ok(Reply::Done)
            }
            Action::GetMmds => Ok(Reply::Metadata(self.metadata()?.document())),
            Action::FlushMetrics => {
                self.flush(console);
                Ok(Reply::Done)
            }
            Action::Exec(request) => self.exec(request, agent),
            Action::CreateSnapshot(create) => self.save(create, vm, agent),
            Action::RecordWorkingSet => self.saver.record_working_set(vm),
            Action::CancelSnapshot => self.cancel_behind(),
            Action::Fork(request) => self.fork(request, vm, agent),
            Action::PutMachine(_)
            | Action::PatchMachine(_)
            | Action::PutBootSource(_)
            | Action::PutCpu(_)
            | Action::PutEntropy(_)
            | Action::PutVsock(_)
            | Action::PutSerial(_)
            | Action::PutMmdsConfig(_)
            | Action::PutBalloon(_)
            | Action::PutMemoryHotplug(_)
            | Action::PutLogger(_)
            | Action::PutMetrics(_)
            | Action::LoadSnapshot(_)
            | Action::InstanceStart => Err(ActionError::AfterStart),
        }
    }

    /// The metadata, where the guest can get at them.
    fn metadata(&self) -> Result<&Mmds, ActionError> {
        match &self.config.mmds_config {
            Some(_) => Ok(&self.mmds),
            None => Err(MmdsError::NotInitialized.into()),
        }
    }

    /// Pauses; a vCPU that does not follow leaves all of them running.
    fn pause(&mut self, vm: &Vm) -> Result<Reply, ActionError> {
        if self.instance.state == State::Running {
            let begin = Instant::now();
            if let Err(error) = vm.pause(PAUSE_PATIENCE) {
                vm.start();
                let text = chain(&error);
                return Err(ActionError::Failed { text });
            }
            self.took("pause_vm", begin.elapsed());
            self.instance.state = State::Paused;
            self.events.emit(&Event::Paused);
        }
        Ok(Reply::Done)
    }

    /// Saves the machine, which runs, with its agent as `ready` says when all is at rest; it stays paused.
    ///
    /// # Errors
    /// As a snapshot's, and where the agent no longer waits.
    pub fn save_ready(
        &mut self,
        vm: &Vm,
        create: &SnapshotCreate,
        ready: impl FnOnce() -> Option<AgentReady>,
    ) -> Result<(), ActionError> {
        self.pause(vm)?;
        vm.board().devices.pause();
        let agent = ready().ok_or_else(|| ActionError::Save {
            text: "the guest's agent says something while it should wait".to_owned(),
        })?;
        self.saver.guest.agent = Some(agent);
        self.save(create, vm, None).map(drop)
    }

    fn save(
        &mut self,
        create: &SnapshotCreate,
        vm: &Vm,
        agent: Option<&mut AgentLink>,
    ) -> Result<Reply, ActionError> {
        if let Some(path) = self.behind.path() {
            let path = path.to_owned();
            return Err(ActionError::SnapshotBusy { path });
        }
        if create.background {
            return self.save_behind(create, vm, agent);
        }
        if self.instance.state == State::Running {
            return Err(ActionError::SnapshotRunning);
        }
        let begin = Instant::now();
        self.saver.keep_talk(vm, agent)?;
        let cancelled = create.cancellable.then(|| self.cancelled.clone());
        let path = &create.snapshot_path;
        let meter = Meter::new(Task::Write, path, cancelled, &mut self.events);
        let watch = |done, total| meter.watch(done, total);
        let created = self.saver.create(vm, &self.config, create, &watch);
        meter.give_back(&mut self.events);
        if created.is_err() && meter.is_cancelled() {
            return Err(ActionError::Cancelled);
        }
        created?;
        let name = match create.snapshot_type {
            SnapshotType::Full => "full_create_snapshot",
            SnapshotType::Diff => "diff_create_snapshot",
        };
        self.took(name, begin.elapsed());
        Ok(Reply::Done)
    }
}

impl Runtime {
    /// Sends what copies are made of to whoever asked; the machine goes on as it was.
    fn fork(
        &mut self,
        request: &ForkRequest,
        vm: &Vm,
        agent: Option<&mut AgentLink>,
    ) -> Result<Reply, ActionError> {
        if let Some(path) = self.behind.protecting() {
            let path = path.to_owned();
            return Err(ActionError::SnapshotBusy { path });
        }
        let runs = self.instance.state == State::Running;
        let to = &request.uds_path;
        let pause = self.saver.fork((vm, runs), &self.config, agent, to)?;
        self.latencies.insert("fork".to_owned(), pause);
        Ok(Reply::Done)
    }
}

/// Whether the user named a command, whose status can be lost.
pub fn has_command(config: &Config) -> bool {
    let guest = config.guest.as_ref();
    guest.is_some_and(|guest| !guest.command.is_empty())
}

impl AsRawFd for Runtime {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.0.as_raw_fd()
    }
}
