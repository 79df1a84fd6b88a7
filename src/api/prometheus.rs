//! Statistics in the text format of Prometheus (OpenMetrics 1.0). bulle's own.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::counts::Counts;
use super::http::Response;
use crate::control::{DeviceStatistics, State, VmStatistics};

/// The content type of the format.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All figures of a microVM as an answer.
pub fn response(statistics: VmStatistics, counts: &Counts) -> Response {
    let mut registry = Registry::with_prefix("bulle");
    registry.register_collector(Box::new(Machine(statistics)));
    counts.register(&mut registry);
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = encode(&mut text, &registry);
    Response::text(CONTENT_TYPE, text)
}

/// Labels of a figure.
type Labels<'a> = Vec<(&'a str, &'a str)>;

/// Name, help and unit of a family.
type Head<'a> = (&'a str, &'a str, Option<Unit>);

/// All figures of one name.
fn family<M: EncodeMetric>(
    out: &mut DescriptorEncoder<'_>,
    (name, help, unit): Head<'_>,
    samples: &[(Labels<'_>, M)],
) -> fmt::Result {
    let Some((_, first)) = samples.first() else {
        return Ok(());
    };
    let kind = first.metric_type();
    let mut metric = out.encode_descriptor(name, help, unit.as_ref(), kind)?;
    for (labels, sample) in samples {
        sample.encode(metric.encode_family(labels)?)?;
    }
    Ok(())
}

fn gauge(out: &mut DescriptorEncoder<'_>, head: Head<'_>, value: Option<u64>) -> fmt::Result {
    let sample = value.map(|value| (vec![], ConstGauge::new(value)));
    family(out, head, sample.as_slice())
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

#[derive(Debug)]
struct Machine(VmStatistics);

impl Collector for Machine {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (vm, out) = (&self.0, &mut encoder);
        let running = u64::from(vm.state == State::Running);
        gauge(
            out,
            ("running", "Whether the vCPUs run", None),
            Some(running),
        )?;
        let uptime = ("uptime", "Time since the start", Some(Unit::Seconds));
        family(
            out,
            uptime,
            &[(vec![], ConstGauge::new(seconds(vm.uptime_us)))],
        )?;
        self.vcpus(out)?;
        let help =
            "Pages of 4 KiB of RAM that the guest used or, where files are mapped, changed since";
        gauge(out, ("memory_dirtied_pages", help, None), vm.dirtied_pages)?;
        self.devices(out)?;
        let process = &vm.process;
        let cpu = ConstCounter::new(seconds(process.cpu_time_us));
        let help = "Processor time of the process";
        family(
            out,
            ("process_cpu", help, Some(Unit::Seconds)),
            &[(vec![], cpu)],
        )?;
        let help = "Memory of the process, with what it has of the guest's";
        let memory = ("process_resident_memory", help, Some(Unit::Bytes));
        gauge(out, memory, process.rss_bytes)?;
        gauge(out, ("process_threads", "Threads", None), process.threads)?;
        gauge(
            out,
            ("process_open_fds", "Open files", None),
            process.open_files,
        )
    }
}

impl Machine {
    fn vcpus(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let names: Vec<_> = (0..self.0.vcpus.len())
            .map(|index| index.to_string())
            .collect();
        let vcpus = || self.0.vcpus.iter().zip(&names);
        let time = |micros| ConstCounter::new(seconds(micros));
        let times = vcpus().map(|(vcpu, name)| (vec![("vcpu", &**name)], time(vcpu.cpu_time_us)));
        let help = "Processor time of each vCPU's thread, guest and host";
        let head = ("vcpu_cpu", help, Some(Unit::Seconds));
        family(out, head, &times.collect::<Vec<_>>())?;
        let exits = vcpus().flat_map(|(vcpu, name)| {
            let labels = move |reason| vec![("vcpu", &**name), ("reason", reason)];
            let exits = vcpu.exits.iter();
            exits.map(move |(reason, count)| (labels(reason.as_str()), ConstCounter::new(*count)))
        });
        let head = ("vcpu_exits", "Exits of each vCPU to bulle, by reason", None);
        family(out, head, &exits.collect::<Vec<_>>())
    }

    /// What several kinds of device have, such as failures, is one family.
    fn devices(&self, out: &mut DescriptorEncoder<'_>) -> fmt::Result {
        fn labels(device: &DeviceStatistics) -> Labels<'_> {
            vec![("device", &device.id), ("kind", &device.kind)]
        }
        let mut totals = BTreeMap::<_, Vec<_>>::new();
        let mut values = BTreeMap::<_, Vec<_>>::new();
        for device in &self.0.devices {
            for (name, total) in &device.totals {
                let sample = (labels(device), ConstCounter::new(*total));
                totals.entry(name).or_default().push(sample);
            }
            for (name, value) in &device.values {
                let sample = (labels(device), ConstGauge::new(*value));
                values.entry(name).or_default().push(sample);
            }
        }
        for (name, samples) in totals {
            let head = (
                &*format!("device_{name}"),
                "Total of each virtio device",
                None,
            );
            family(out, head, &samples)?;
        }
        for (name, samples) in values {
            let head = (
                &*format!("device_{name}"),
                "Value of each virtio device",
                None,
            );
            family(out, head, &samples)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ProcessStatistics, VcpuStatistics};

    #[test]
    fn figures_have_their_labels() {
        let device = |id: &str, kind: &str, total: u64| DeviceStatistics {
            id: id.into(),
            kind: kind.into(),
            needs_reset: false,
            totals: [("failures".into(), total)].into(),
            values: [("actual_bytes".into(), 4096)].into(),
        };
        let vcpu = VcpuStatistics {
            cpu_time_us: 1_500_000,
            exits: [("io_in".into(), 3), ("mmio_read".into(), 0)].into(),
        };
        let statistics = VmStatistics {
            state: State::Running,
            uptime_us: 2_000_000,
            vcpus: vec![vcpu.clone(), vcpu],
            devices: vec![device("d\"1", "block", 0), device("b", "balloon", 7)],
            process: ProcessStatistics::default(),
            snapshot: None,
            dirtied_pages: Some(5),
        };
        let text = response(statistics, &Counts::default()).body.unwrap();
        for line in [
            "# TYPE bulle_vcpu_exits counter",
            "bulle_vcpu_exits_total{vcpu=\"1\",reason=\"io_in\"} 3",
            "bulle_vcpu_cpu_seconds_total{vcpu=\"0\"} 1.5",
            "bulle_device_failures_total{device=\"d\\\"1\",kind=\"block\"} 0",
            "bulle_device_failures_total{device=\"b\",kind=\"balloon\"} 7",
            "bulle_device_actual_bytes{device=\"b\",kind=\"balloon\"} 4096",
            "bulle_uptime_seconds 2.0",
            "bulle_running 1",
            "bulle_memory_dirtied_pages 5",
            "# EOF",
        ] {
            assert!(
                text.lines().any(|other| other == line),
                "no {line} in {text}"
            );
        }
        assert_eq!(text.matches("# TYPE bulle_device_failures ").count(), 1);
        assert!(!text.contains("resident_memory"));
    }
}
