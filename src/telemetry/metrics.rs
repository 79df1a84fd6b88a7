//! Figures as lines of JSON, in the shape of Firecracker's: counters say what came since the last line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::logger::{self, LogFileError};
use crate::config;

/// The figures of one moment, by group and name.
#[derive(Debug, Default)]
pub struct Figures(BTreeMap<(String, String), Figure>);

#[derive(Clone, Copy, Debug)]
enum Figure {
    /// Since the start, which is made a difference.
    Total(u64),
    /// As it is.
    Value(u64),
}

impl Figures {
    /// A counter, since the start. What is told twice is summed up. A name with a dot is one of a group in
    /// the group.
    pub fn total(&mut self, group: &str, name: &str, value: u64) {
        let key = (group.to_owned(), name.to_owned());
        let figure = self.0.entry(key).or_insert(Figure::Total(0));
        if let Figure::Total(sum) = figure {
            *sum = sum.wrapping_add(value);
        }
    }

    /// Adds the counters of `other`.
    pub fn add(&mut self, other: &Self) {
        for ((group, name), figure) in &other.0 {
            if let Figure::Total(total) = figure {
                self.total(group, name, *total);
            }
        }
    }

    /// The same without those of a group.
    pub fn without(mut self, group: &str) -> Self {
        self.0.retain(|(other, _), _| other != group);
        self
    }

    /// A value that is no counter.
    pub fn value(&mut self, group: &str, name: &str, value: u64) {
        let key = (group.to_owned(), name.to_owned());
        self.0.insert(key, Figure::Value(value));
    }
}

/// Where figures are written.
#[derive(Debug)]
pub struct Metrics {
    file: File,
    last: BTreeMap<(String, String), u64>,
    /// What each line says beside figures.
    labels: Map<String, Value>,
    /// Lines that could not be written.
    failures: u64,
}

impl Metrics {
    /// Opens the file or pipe, for the microVM `id`.
    pub fn open(metrics: &config::Metrics, id: &str) -> Result<Self, LogFileError> {
        let mut labels = Map::new();
        if metrics.emit_id {
            labels.insert("id".to_owned(), id.into());
        }
        if let Some(properties) = &metrics.properties {
            labels.insert("properties".to_owned(), json!(properties));
        }
        Ok(Self {
            labels,
            file: logger::open(&metrics.metrics_path)?,
            last: BTreeMap::new(),
            failures: 0,
        })
    }

    /// What is counted in this group begins anew.
    pub fn forget(&mut self, group: &str) {
        self.last.retain(|(other, _), _| other != group);
    }

    /// Writes a line. One that cannot be written, as into a full pipe, is counted and its differences
    /// are in the next.
    pub fn write(&mut self, mut figures: Figures) -> io::Result<()> {
        for name in ["metrics_fails", "missed_metrics_count"] {
            figures.total("logger", name, self.failures);
        }
        figures.total("logger", "missed_log_count", logger::missed());
        figures.total("logger", "rate_limited_log_count", super::suppressed());
        let (line, now) = self.line(&figures);
        match self.file.write_all(line.as_bytes()) {
            Ok(()) => self.last.extend(now),
            Err(error) => {
                self.failures += 1;
                return Err(error);
            }
        }
        Ok(())
    }

    fn line(&self, figures: &Figures) -> (String, BTreeMap<(String, String), u64>) {
        let mut groups: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
        let mut totals = BTreeMap::new();
        for ((group, name), figure) in &figures.0 {
            let key = (group.clone(), name.clone());
            let value = match *figure {
                Figure::Value(value) => value,
                Figure::Total(total) => {
                    let last = self.last.get(&key).copied().unwrap_or(0);
                    totals.insert(key, total);
                    total.wrapping_sub(last)
                }
            };
            let group = groups.entry(group).or_default();
            match name.split_once('.') {
                None => drop(group.insert(name.clone(), value.into())),
                Some((outer, inner)) => {
                    let entry = group.entry(outer).or_insert_with(|| Map::new().into());
                    if let Value::Object(entry) = entry {
                        entry.insert(inner.to_owned(), value.into());
                    }
                }
            }
        }
        let mut all = Map::new();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = since.map_or(0, |since| since.as_millis() as u64);
        all.insert("utc_timestamp_ms".to_owned(), now.into());
        all.extend(self.labels.clone());
        let groups = groups.into_iter();
        all.extend(groups.map(|(name, group)| (name.to_owned(), Value::Object(group))));
        (format!("{}\n", Value::Object(all)), totals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_differences_and_a_lost_line_is_made_up_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let properties = [("a".to_owned(), "b".to_owned())].into();
        let options = config::Metrics {
            emit_id: true,
            properties: Some(properties),
            ..config::Metrics::to(path.clone())
        };
        let mut metrics = Metrics::open(&options, "x").unwrap();
        let figures = |total: u64| {
            let mut figures = Figures::default();
            figures.total("vcpu", "exit_io_in", total);
            figures.total("vcpu", "exit_io_in", 1);
            figures.value("latencies_us", "pause_vm", 5);
            figures.total("block", "read_agg.sum_us", total);
            figures
        };
        metrics.write(figures(10)).unwrap();
        metrics.write(figures(15)).unwrap();
        let file = std::mem::replace(&mut metrics.file, File::create("/dev/full").unwrap());
        metrics.write(figures(20)).unwrap_err();
        metrics.file = file;
        metrics.write(figures(21)).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        let of = |name: &str| -> Vec<u64> {
            let values = lines
                .iter()
                .map(|l| l.pointer(name).unwrap().as_u64().unwrap());
            values.collect()
        };
        assert_eq!(of("/vcpu/exit_io_in"), [11, 5, 6]);
        assert_eq!(of("/latencies_us/pause_vm"), [5, 5, 5]);
        assert_eq!(of("/block/read_agg/sum_us"), [10, 5, 6]);
        assert_eq!(of("/logger/metrics_fails"), [0, 0, 1]);
        assert!(
            lines
                .iter()
                .all(|l| l["id"] == "x" && l["properties"]["a"] == "b")
        );
        assert!(of("/utc_timestamp_ms").iter().all(|ms| *ms > 1 << 40));
    }
}
