//! What a machine has done under the names of Firecracker's metrics, gathered on the vmm thread.
//!
//! Each line has all that Firecracker 1.17 has and that is counted here; what cannot happen is zero.
//! docs/firecracker-compat.md lists those, and what is not counted.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::counters::Values;
use devices::mmds::Mmds;
use devices::virtio::registry::DeviceHandle;
use nix::sys::signal::Signal;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::outcome::Outcome;
use super::readers::Console;
use super::statistics::{is_bound, reasons};
use crate::api::Counts;
use crate::board::attach::Attached;
use crate::telemetry::{Figures, Metrics};
use crate::vcpu::{ExitCounts, Spent};

/// Time between two lines of figures.
const FLUSH_EVERY: Duration = Duration::from_secs(60);

/// What Firecracker counts of a block device, and so on.
const BLOCK: &str = "activate_fails cfg_fails event_fails execute_fails flush_count invalid_reqs_count \
    io_engine_throttled_events no_avail_buffer queue_event_count rate_limiter_event_count \
    rate_limiter_throttled_events read_agg.max_us read_agg.min_us read_agg.sum_us read_bytes read_count \
    remaining_reqs_count update_count update_fails write_agg.max_us write_agg.min_us write_agg.sum_us write_bytes write_count";
const NET: &str = "activate_fails cfg_fails event_fails no_rx_avail_buffer no_tx_avail_buffer rx_bytes_count \
    rx_count rx_event_rate_limiter_count rx_fails rx_packets_count rx_queue_event_count \
    rx_rate_limiter_throttled rx_tap_event_count tap_read_fails tap_write_agg.max_us \
    tap_write_agg.min_us tap_write_agg.sum_us tap_write_fails tx_bytes_count tx_count \
    tx_fails tx_malformed_frames tx_remaining_reqs_count tx_spoofed_mac_count tx_packets_count tx_queue_event_count tx_rate_limiter_event_count \
    tx_rate_limiter_throttled";
const PMEM: &str = "activate_fails cfg_fails event_fails queue_event_count rate_limiter_event_count \
    rate_limiter_throttled_events";

/// Of disks that other processes serve, which have no sums.
const VHOST_USER: &str = "vhost_user_block";
const VHOST_USER_BLOCK: &str =
    "activate_fails activate_time_us cfg_fails config_change_time_us init_time_us";

/// The same of all groups whose figures are there without a device, too.
const GROUPS: &[(&str, &str)] = &[
    (
        "balloon",
        "activate_fails deflate_count event_fails free_page_hint_count free_page_hint_fails free_page_hint_freed \
         free_page_report_count free_page_report_fails free_page_report_freed inflate_count stats_update_fails \
         stats_updates_count",
    ),
    ("block", BLOCK),
    (
        "entropy",
        "activate_fails entropy_bytes entropy_event_count entropy_event_fails entropy_rate_limiter_throttled \
         host_rng_fails rate_limiter_event_count",
    ),
    (
        "i8042",
        "error_count missed_read_count missed_write_count read_count reset_count write_count",
    ),
    ("interrupts", "config_updates triggers"),
    (
        "latencies_us",
        "diff_create_snapshot full_create_snapshot load_snapshot pause_vm resume_vm vmm_diff_create_snapshot \
         vmm_full_create_snapshot vmm_load_snapshot vmm_pause_vm vmm_resume_vm",
    ),
    (
        "memory_hotplug",
        "activate_fails plug_agg.max_us plug_agg.min_us plug_agg.sum_us plug_bytes plug_count plug_fails \
         queue_event_count queue_event_fails state_agg.max_us state_agg.min_us state_agg.sum_us state_count \
         state_fails unplug_agg.max_us unplug_agg.min_us unplug_agg.sum_us unplug_all_agg.max_us \
         unplug_all_agg.min_us unplug_all_agg.sum_us unplug_all_count unplug_all_fails unplug_bytes \
         unplug_count unplug_discard_fails unplug_fails",
    ),
    ("mmds", "rx_accepted_err tx_errors"),
    ("net", NET),
    ("pmem", PMEM),
    ("seccomp", "num_faults"),
    (
        "signals",
        "sigbus sighup sigill sigpipe sigsegv sigxcpu sigxfsz",
    ),
    (
        "uart",
        "error_count flush_count missed_read_count missed_write_count rate_limiter_dropped_bytes read_count \
         write_count",
    ),
    (
        "vcpu",
        "exit_io_in exit_io_in_agg.max_us exit_io_in_agg.min_us exit_io_in_agg.sum_us exit_io_out \
         exit_io_out_agg.max_us exit_io_out_agg.min_us exit_io_out_agg.sum_us exit_mmio_read \
         exit_mmio_read_agg.max_us exit_mmio_read_agg.min_us exit_mmio_read_agg.sum_us exit_mmio_write \
         exit_mmio_write_agg.max_us exit_mmio_write_agg.min_us exit_mmio_write_agg.sum_us failures \
         kvmclock_ctrl_fails",
    ),
    ("vmm", "panic_count"),
    (
        "vsock",
        "activate_fails cfg_fails conn_event_fails conns_added conns_killed conns_removed ev_queue_event_fails \
         killq_resync muxer_event_fails rx_bytes_count rx_packets_count rx_queue_event_count rx_queue_event_fails \
         rx_read_fails tx_bytes_count tx_flush_fails tx_packets_count tx_queue_event_count \
         tx_queue_event_fails tx_write_fails",
    ),
];

/// Time from the start of the process to the API, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Startup {
    /// By the clock.
    pub wall_us: u64,
    /// Of the processor.
    pub cpu_us: u64,
}

/// Where figures come from and go to, beside the machine.
pub struct FigureWriter {
    metrics: Metrics,
    timer: TimerFd,
    startup: Startup,
    api: Option<Arc<Counts>>,
    /// What devices counted that are gone.
    gone: Figures,
}

/// What is told beside counters.
pub struct Told<'a> {
    /// How long operations took.
    pub latencies: &'a BTreeMap<String, Duration>,
    /// The metadata service.
    pub mmds: &'a Mmds,
    /// The signal that ended the machine, if one did.
    pub ended_by: Option<i32>,
}

impl FigureWriter {
    /// Writes to `metrics` each minute, when somebody looks at the descriptor.
    pub fn new(metrics: Metrics, startup: Startup, api: Option<Arc<Counts>>) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let every = Expiration::Interval(TimeSpec::from_duration(FLUSH_EVERY));
        timer.set(every, TimerSetTimeFlags::empty())?;
        Ok(Self {
            metrics,
            timer,
            startup,
            api,
            gone: Figures::default(),
        })
    }

    /// Whether a minute is over.
    pub fn is_due(&self) -> bool {
        nix::unistd::read(&self.timer, &mut [0; 8]).is_ok()
    }

    /// A device is gone: what it counted stays in the sums of its kind.
    pub fn gone(&mut self, device: &Attached) {
        let mut figures = Figures::default();
        let own = device_figures(device, &mut figures);
        if let Some(own) = own {
            self.gone.add(&figures.without(&own));
            self.metrics.forget(&own);
        }
    }

    /// Writes a line.
    pub fn write(&mut self, console: Console<'_>, told: &Told<'_>) {
        let mut figures = figures(console);
        figures.add(&self.gone);
        let Startup { wall_us, cpu_us } = self.startup;
        figures.value("api_server", "process_startup_time_us", wall_us);
        figures.value("api_server", "process_startup_time_cpu_us", cpu_us);
        add(&mut figures, "mmds", told.mmds.counters().values());
        for (name, latency) in told.latencies {
            let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
            figures.value("latencies_us", name, micros);
        }
        if told.ended_by == Some(Signal::SIGHUP as i32) {
            figures.value("signals", "sighup", 1);
        }
        if let Some(api) = &self.api {
            api.figures(&mut figures);
        }
        if let Err(error) = self.metrics.write(figures) {
            log::warn!("figures cannot be written: {error}");
        }
    }
}

impl AsRawFd for FigureWriter {
    fn as_raw_fd(&self) -> RawFd {
        use std::os::fd::AsFd;
        self.timer.as_fd().as_raw_fd()
    }
}

/// The number of the signal that ended a machine so.
pub fn signal_of(outcome: &Outcome) -> Option<i32> {
    match outcome {
        Outcome::Signal(signal) => Some(*signal),
        _ => None,
    }
}

fn add(figures: &mut Figures, group: &str, values: impl IntoIterator<Item = (&'static str, u64)>) {
    for (name, value) in values {
        figures.total(group, name, value);
    }
}

fn zeros(figures: &mut Figures, group: &str, names: &'static str) {
    add(
        figures,
        group,
        names.split_ascii_whitespace().map(|name| (name, 0)),
    );
}

/// How long exits took, of all vCPUs together.
fn times(figures: &mut Figures, vcpus: &[&ExitCounts]) {
    for (index, name) in ["io_in", "io_out", "mmio_read", "mmio_write"]
        .into_iter()
        .enumerate()
    {
        let spent = vcpus.iter().filter_map(|counts| counts.spent.get(index));
        let spent: Vec<_> = spent.map(Spent::get).collect();
        let sum: u64 = spent.iter().map(|(sum, ..)| sum).sum();
        let least = spent.iter().filter_map(|(_, least, _)| *least).min();
        let most = spent.iter().map(|(.., most)| *most).max();
        let name = |of: &str| format!("exit_{name}_agg.{of}_us");
        figures.total("vcpu", &name("sum"), sum / 1000);
        figures.value("vcpu", &name("min"), least.unwrap_or(0) / 1000);
        figures.value("vcpu", &name("max"), most.unwrap_or(0) / 1000);
    }
}

/// What the machine whose console this is has done.
fn figures(console: Console<'_>) -> Figures {
    let vm = console.vm;
    let mut figures = Figures::default();
    for (group, names) in GROUPS {
        zeros(&mut figures, group, names);
    }
    for vcpu in vm.vcpus() {
        for (name, count) in reasons(vcpu.counts()).into_iter().take(4) {
            figures.total("vcpu", &format!("exit_{name}"), count);
        }
        add(&mut figures, "vcpu", vcpu.counts().failures());
    }
    let counts: Vec<_> = vm.vcpus().iter().map(|vcpu| vcpu.counts()).collect();
    times(&mut figures, &counts);
    let board = vm.board();
    add(&mut figures, "uart", board.console.counters());
    let dropped = console.tap.dropped();
    figures.total("uart", "rate_limiter_dropped_bytes", dropped);
    add(&mut figures, "i8042", board.keyboard.counters());
    for device in &board.devices.list() {
        device_figures(device, &mut figures);
    }
    figures
}

/// The group of a device, what all devices of its kind have, where there may be several, and what it has
/// counted.
fn counted(handle: &DeviceHandle) -> Option<(&'static str, Option<&'static str>, Values)> {
    Some(match handle {
        DeviceHandle::Block(block) => ("block", Some(BLOCK), block.counters()),
        DeviceHandle::VhostUserBlock(block) => {
            (VHOST_USER, Some(VHOST_USER_BLOCK), block.counters())
        }
        DeviceHandle::Net(net) => ("net", Some(NET), net.counters()),
        DeviceHandle::Pmem(pmem) => ("pmem", Some(PMEM), pmem.counters()),
        DeviceHandle::Vsock(vsock) => ("vsock", None, vsock.counters()),
        DeviceHandle::Entropy(entropy) => ("entropy", None, entropy.counters()),
        DeviceHandle::Balloon(balloon) => ("balloon", None, balloon.counters()),
        DeviceHandle::Mem(mem) => ("memory_hotplug", None, mem.counters()),
        DeviceHandle::Console(_) | DeviceHandle::Fs | DeviceHandle::Rtc(_) => return None,
    })
}

/// What a device counted, for all of its kind and, where there may be several, by its name: the group of
/// its own.
fn device_figures(device: &Attached, figures: &mut Figures) -> Option<String> {
    let notifier = device.core.notifier();
    figures.total("interrupts", "triggers", notifier.triggers());
    figures.total("interrupts", "config_updates", notifier.message_changes());
    let (kind, several, values) = counted(&device.handle)?;
    let own = format!("{kind}_{}", device.id);
    if let Some(names) = several {
        zeros(figures, &own, names);
    }
    let failures = notifier.counters().into_iter().map(|(name, value)| {
        let name = match (kind, name) {
            ("entropy", "event_fails") => "entropy_event_fails",
            ("memory_hotplug", "event_fails") => "queue_event_fails",
            _ => name,
        };
        (name, value)
    });
    for (name, value) in values.into_iter().chain(failures) {
        match (several.is_some(), is_bound(name)) {
            (false, false) => figures.total(kind, name, value),
            (false, true) => figures.value(kind, name, value),
            (true, true) => figures.value(&own, name, value),
            (true, false) if kind == VHOST_USER => figures.total(&own, name, value),
            (true, false) => {
                figures.total(kind, name, value);
                figures.total(&own, name, value);
            }
        }
    }
    Some(own)
}
