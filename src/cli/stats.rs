//! `bulle stats`: what microVMs take and do, once or again and again.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use devices::console::clean;
use serde::Serialize;

use super::table::table;
use super::target::RuntimeArgs;
use crate::control::{VmStatistics, chain};
use crate::registry::{self, Entry};
use crate::remote::{GLANCE, Remote, RemoteError};
use crate::telemetry::tell;

const AFTER_HELP: &str = "\
CPU% is of one processor: since the start, or with --watch since the last line. EXITS are those that bulle answers, with \
--watch per second. A microVM that is asked for by name has its devices listed as well.";

/// Arguments of `bulle stats`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct StatsArgs {
    /// Names of microVMs, or the beginnings of them [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Print JSON: a list of objects, with --watch one list a line
    #[arg(long)]
    json: bool,
    /// Print again at this interval, such as 2s, until none is left
    #[arg(long, short, value_name = "TIME", num_args = 0..=1, require_equals = true,
          default_missing_value = "1s", value_parser = humantime::parse_duration)]
    watch: Option<Duration>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// One microVM's.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    name: String,
    #[serde(flatten)]
    statistics: VmStatistics,
}

/// Runs the subcommand.
pub fn run(args: &StatsArgs) -> Result<u8> {
    let (base, mut last) = (args.runtime.base()?, BTreeMap::new());
    let named = args.names.iter().map(|name| registry::find(&base, name));
    let mut named: Vec<Entry> = named.collect::<Result<_, _>>()?;
    let mut before = false;
    loop {
        let samples = match args.names.is_empty() {
            true => all(registry::list(&base)?),
            false => those(&mut named, before)?,
        };
        let text = match (args.json, args.watch) {
            (true, None) => serde_json::to_string_pretty(&samples)? + "\n",
            (true, Some(_)) => serde_json::to_string(&samples)? + "\n",
            (false, _) => text(&samples, &last) + &devices(&samples, !args.names.is_empty()),
        };
        let mut out = io::stdout();
        let printed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        printed.context("Cannot print to stdout")?;
        match args.watch {
            Some(interval) if !samples.is_empty() => std::thread::sleep(interval),
            _ => return Ok(0),
        }
        last = samples
            .into_iter()
            .map(|sample| (sample.name.clone(), sample))
            .collect();
        before = true;
    }
}

/// Of whoever lives. One that does not answer hides no other.
fn all(entries: Vec<Entry>) -> Vec<Sample> {
    let sampled = entries.iter().map(sample);
    let told = sampled.filter_map(|sampled| {
        let gone = sampled.as_ref().is_err_and(RemoteError::is_gone);
        sampled
            .inspect_err(|error| {
                if !gone {
                    tell(chain(error))
                }
            })
            .ok()
    });
    told.collect()
}

/// Of those that were named; of those that ended nothing more, where there was something `before`.
fn those(entries: &mut Vec<Entry>, before: bool) -> Result<Vec<Sample>, RemoteError> {
    let (mut samples, mut living) = (Vec::new(), Vec::new());
    for entry in entries.drain(..) {
        match sample(&entry) {
            Ok(sample) => {
                samples.push(sample);
                living.push(entry);
            }
            Err(error) if error.is_gone() && before => {}
            Err(error) => return Err(error),
        }
    }
    *entries = living;
    Ok(samples)
}

fn sample(entry: &Entry) -> Result<Sample, RemoteError> {
    let mut vm = Remote::connect(entry)?.patience(GLANCE);
    let statistics = vm.ask("GET", "/vm/statistics", "")?;
    Ok(Sample {
        name: entry.name.clone(),
        statistics: vm.parse(&statistics)?,
    })
}

fn exits(statistics: &VmStatistics) -> u64 {
    let vcpus = statistics.vcpus.iter();
    vcpus.flat_map(|vcpu| vcpu.exits.values()).sum()
}

fn text(samples: &[Sample], last: &BTreeMap<String, Sample>) -> String {
    let cells = |sample: &Sample| {
        let now = &sample.statistics;
        let before = last.get(&sample.name).map(|sample| &sample.statistics);
        let since = |of: fn(&VmStatistics) -> u64| of(now).saturating_sub(before.map_or(0, of));
        let micros = since(|s| s.uptime_us).max(1);
        let percent = since(|s| s.process.cpu_time_us) as f64 * 100.0 / micros as f64;
        let exits = match before {
            None => exits(now).to_string(),
            Some(_) => format!("{:.0}/s", since(exits) as f64 * 1e6 / micros as f64),
        };
        let number = |number: Option<u64>| number.map_or("-".to_owned(), |n| n.to_string());
        [
            sample.name.clone(),
            format!("{percent:.1}"),
            format!("{:.2}s", now.process.cpu_time_us as f64 / 1e6),
            now.process.rss_bytes.map_or("-".to_owned(), size),
            number(now.process.threads),
            exits,
            now.devices.len().to_string(),
        ]
    };
    let head = [
        "NAME", "CPU%", "CPU TIME", "RSS", "THREADS", "EXITS", "DEVICES",
    ];
    table(head, &samples.iter().map(cells).collect::<Vec<_>>())
}

/// Every figure of every device, where that is wanted and there is any.
fn devices(samples: &[Sample], wanted: bool) -> String {
    let figures = samples.iter().filter(|_| wanted).flat_map(|sample| {
        let devices = sample.statistics.devices.iter();
        devices.flat_map(move |device| {
            let figures = device.totals.iter().chain(&device.values);
            figures.map(move |(figure, value)| {
                let id = clean(device.id.as_bytes());
                [
                    sample.name.clone(),
                    id,
                    device.kind.clone(),
                    figure.clone(),
                    value.to_string(),
                ]
            })
        })
    });
    let rows: Vec<_> = figures.collect();
    match rows.is_empty() {
        true => String::new(),
        false => "\n".to_owned() + &table(["NAME", "DEVICE", "KIND", "FIGURE", "VALUE"], &rows),
    }
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 10 << 30 => format!("{:.1}G", bytes as f64 / (1u64 << 30) as f64),
        bytes => format!("{:.1}M", bytes as f64 / (1u64 << 20) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{DeviceStatistics, ProcessStatistics, State, VcpuStatistics};

    fn at(seconds: u64) -> Sample {
        let vcpu = VcpuStatistics {
            cpu_time_us: 0,
            exits: [
                ("io_in".into(), 40 * seconds),
                ("io_out".into(), 10 * seconds),
            ]
            .into(),
        };
        Sample {
            name: "web".into(),
            statistics: VmStatistics {
                state: State::Running,
                uptime_us: seconds * 1_000_000,
                vcpus: vec![vcpu.clone(), vcpu],
                devices: vec![DeviceStatistics {
                    id: "eth0".into(),
                    kind: "net".into(),
                    needs_reset: false,
                    totals: [("rx_bytes".into(), 7)].into(),
                    values: BTreeMap::new(),
                }],
                process: ProcessStatistics {
                    cpu_time_us: seconds * 250_000,
                    rss_bytes: Some(3 << 19),
                    threads: Some(4),
                    open_files: None,
                },
                snapshot: None,
                dirtied_pages: None,
            },
        }
    }

    #[test]
    fn figures_are_since_the_start_or_since_the_last_line() {
        let mut last = BTreeMap::new();
        assert_eq!(
            text(&[at(2)], &last),
            "NAME  CPU%  CPU TIME  RSS   THREADS  EXITS  DEVICES\n\
             web   25.0  0.50s     1.5M  4        200    1\n"
        );
        last.insert("web".to_owned(), at(2));
        let again = text(&[at(4)], &last);
        assert!(
            again.ends_with("web   25.0  1.00s     1.5M  4        100/s  1\n"),
            "{again}"
        );
        assert_eq!(devices(&[at(1)], false), "");
        assert_eq!(
            devices(&[at(1)], true),
            "\nNAME  DEVICE  KIND  FIGURE    VALUE\nweb   eth0    net   rx_bytes  7\n"
        );
    }
}
