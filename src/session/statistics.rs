//! What a machine has done so far, gathered on the vmm thread.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use devices::counters::Values;
use devices::virtio::registry::DeviceHandle;

use crate::board::attach::Attached;
use crate::control::{DeviceStatistics, ProcessStatistics, State, VcpuStatistics, VmStatistics};
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
        dirtied_pages: None,
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
pub fn reasons(counts: &ExitCounts) -> [(&'static str, u64); 6] {
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
        DeviceHandle::VhostUserBlock(block) => {
            totals.extend(plain(block.counters()));
            "vhost-user-block"
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
            totals.extend(plain(balloon.counters()));
            "balloon"
        }
        DeviceHandle::Mem(mem) => {
            let status = mem.status();
            value("requested_bytes", status.requested);
            value("plugged_bytes", status.plugged);
            totals.extend(plain(mem.counters()));
            "mem"
        }
        DeviceHandle::Net(net) => {
            totals.extend(plain(net.counters()));
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

/// Counters without the words that only Firecracker's names have, and without those that are no sums or say
/// what another one says.
fn plain(counters: Values) -> impl Iterator<Item = (String, u64)> {
    let twice = |name| matches!(name, "rx_count" | "tx_count");
    let counters = counters.into_iter();
    let sums = counters.filter(move |(name, _)| !is_bound(name) && !twice(*name));
    sums.map(|(name, value)| {
        let name = name.strip_suffix("_count").unwrap_or(name);
        (name.replace('.', "_"), value)
    })
}

/// The shortest and the longest of all are no sum, nor is the last.
pub fn is_bound(name: &str) -> bool {
    [".min_us", ".max_us", "_time_us"]
        .iter()
        .any(|end| name.ends_with(end))
}
