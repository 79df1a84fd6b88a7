//! What a machine has done so far, gathered on the vmm thread.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use devices::counters::Values;
use devices::virtio::registry::DeviceHandle;

use crate::board::attach::Attached;
use crate::control::{DeviceStatistics, ProcessStatistics, State, VcpuStatistics, VmStatistics};
use crate::telemetry::Figures;
use crate::vcpu::ExitCounts;
use crate::vcpu::handle::VcpuHandle;
use crate::vm::Vm;

/// Bytes of a page of the balloon.
const PAGE: u64 = devices::virtio::balloon::PAGE;

/// Statistics of `vm`, which is in this state and was started so long ago.
pub fn statistics(vm: &Vm, state: State, uptime: Duration) -> VmStatistics {
    VmStatistics {
        state,
        uptime_us: u64::try_from(uptime.as_micros()).unwrap_or(u64::MAX),
        vcpus: vm.vcpus().iter().map(vcpu).collect(),
        devices: vm
            .board()
            .devices
            .list()
            .iter()
            .map(|d| device(d))
            .collect(),
        process: ProcessStatistics::now(),
        snapshot: None,
    }
}

fn vcpu(vcpu: &VcpuHandle) -> VcpuStatistics {
    let exits = reasons(vcpu.counts()).map(|(name, count)| (name.to_owned(), count));
    VcpuStatistics {
        cpu_time_us: u64::try_from(vcpu.cpu_time().as_micros()).unwrap_or(u64::MAX),
        exits: exits.into(),
    }
}

/// Exits by reason.
fn reasons(counts: &ExitCounts) -> [(&'static str, u64); 6] {
    [
        ("io_in", &counts.io_in),
        ("io_out", &counts.io_out),
        ("mmio_read", &counts.mmio_read),
        ("mmio_write", &counts.mmio_write),
        ("ioapic_eoi", &counts.ioapic_eoi),
        ("interrupted", &counts.interrupted),
    ]
    .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
}

fn device(device: &Attached) -> DeviceStatistics {
    let mut totals = BTreeMap::new();
    let mut values = BTreeMap::new();
    let notifier = device.core.notifier();
    totals.insert("failures".to_owned(), notifier.failures().into());
    totals.insert("interrupts".to_owned(), notifier.interrupts());
    let mut value = |name: &str, value: u64| values.insert(name.to_owned(), value);
    let kind = match &device.handle {
        DeviceHandle::Entropy(entropy) => {
            totals.extend(plain(entropy.counters()));
            "entropy"
        }
        DeviceHandle::Block(block) => {
            totals.extend(plain(block.counters()));
            "block"
        }
        DeviceHandle::Console(_) => "console",
        DeviceHandle::Vsock(vsock) => {
            totals.extend(plain(vsock.counters()));
            "vsock"
        }
        DeviceHandle::Fs => "fs",
        DeviceHandle::Rtc(_) => "rtc",
        DeviceHandle::Pmem(pmem) => {
            totals.extend(plain(pmem.counters()));
            "pmem"
        }
        DeviceHandle::Balloon(balloon) => {
            let status = balloon.status();
            value("target_bytes", u64::from(status.target_pages) * PAGE);
            value("actual_bytes", u64::from(status.actual_pages) * PAGE);
            "balloon"
        }
        DeviceHandle::Mem(mem) => {
            let status = mem.status();
            value("requested_bytes", status.requested);
            value("plugged_bytes", status.plugged);
            "mem"
        }
        DeviceHandle::Net(net) => {
            let [rx, tx] = net.traffic();
            for (direction, traffic) in [("rx", rx), ("tx", tx)] {
                totals.insert(format!("{direction}_bytes"), traffic.bytes);
                totals.insert(format!("{direction}_packets"), traffic.frames);
            }
            "net"
        }
    };
    DeviceStatistics {
        id: device.id.clone(),
        kind: kind.to_owned(),
        needs_reset: device.core.notifier().needs_reset(),
        totals,
        values,
    }
}

/// Counters without the words that only Firecracker's names have, and without those that are no sums.
fn plain(counters: Values) -> impl Iterator<Item = (String, u64)> {
    let sums = counters.into_iter().filter(|(name, _)| !is_bound(name));
    sums.map(|(name, value)| {
        let name = name.strip_suffix("_count").unwrap_or(name);
        (name.replace('.', "_"), value)
    })
}

/// The shortest and the longest of all are no sum.
fn is_bound(name: &str) -> bool {
    name.ends_with(".min_us") || name.ends_with(".max_us")
}

/// The same in the shape of Firecracker's figures, as far as those have them.
pub fn figures(vm: &Vm) -> Figures {
    let mut figures = Figures::default();
    for vcpu in vm.vcpus() {
        for (name, count) in reasons(vcpu.counts()).into_iter().take(4) {
            figures.total("vcpu", &format!("exit_{name}"), count);
        }
    }
    for device in &vm.board().devices.list() {
        device_figures(device, &mut figures);
    }
    figures
}

/// What a device counted, for all of its kind and, where there may be several, by its name.
fn device_figures(device: &Attached, figures: &mut Figures) {
    let (kind, values) = match &device.handle {
        DeviceHandle::Block(block) => ("block", block.counters()),
        DeviceHandle::Pmem(pmem) => ("pmem", pmem.counters()),
        DeviceHandle::Vsock(vsock) => ("vsock", vsock.counters()),
        DeviceHandle::Entropy(entropy) => ("entropy", entropy.counters()),
        DeviceHandle::Net(net) => {
            let [rx, tx] = net.traffic();
            let values = vec![
                ("rx_bytes_count", rx.bytes),
                ("rx_packets_count", rx.frames),
                ("tx_bytes_count", tx.bytes),
                ("tx_packets_count", tx.frames),
            ];
            ("net", values)
        }
        _ => return,
    };
    let own = format!("{kind}_{}", device.id);
    let several = matches!(kind, "block" | "pmem" | "net");
    for (name, value) in values {
        match (several, is_bound(name)) {
            (false, _) => figures.total(kind, name, value),
            (true, true) => figures.value(&own, name, value),
            (true, false) => {
                figures.total(kind, name, value);
                figures.total(&own, name, value);
            }
        }
    }
}
