//! Where bulle's log and its figures go.

use std::collections::BTreeMap;
use std::path::PathBuf;

use log::LevelFilter;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// The log. What is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// File to which it is appended; absent: stderr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// What is logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Each line says its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Each line says where in bulle it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only what comes from the module with this path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// What a line is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<LogFormat>,
}

/// What a line of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogFormat {
    /// For people.
    Text,
    /// An object of JSON with all that is known.
    Json,
}

impl Logger {
    /// Takes over what `other` says.
    pub fn merge(&mut self, other: &Self) {
        let other = other.clone();
        self.log_path = other.log_path.or(self.log_path.take());
        self.level = other.level.or(self.level);
        self.show_level = other.show_level.or(self.show_level);
        self.show_log_origin = other.show_log_origin.or(self.show_log_origin);
        self.module = other.module.or(self.module.take());
        self.format = other.format.or(self.format);
    }
}

/// How much is logged: `Off`, `Error`, `Warn` or `Warning`, `Info`, `Debug` or `Trace`, in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(pub LevelFilter);

impl std::str::FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "warning" => Ok(Self(LevelFilter::Warn)),
            lower => lower.parse().map(Self).map_err(|_| {
                format!("'{text}' is no level: give Off, Error, Warn, Info, Debug or Trace")
            }),
        }
    }
}

impl Serialize for Level {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self.0 {
            LevelFilter::Off => "Off",
            LevelFilter::Error => "Error",
            LevelFilter::Warn => "Warn",
            LevelFilter::Info => "Info",
            LevelFilter::Debug => "Debug",
            LevelFilter::Trace => "Trace",
        })
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// The figures. What else a client says is ignored, as Firecracker does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// File or pipe to which a line of JSON is written now and then.
    pub metrics_path: PathBuf,
    /// Each line has the microVM's name, as `id`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub emit_id: bool,
    /// What else each line has, as `properties`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

impl Metrics {
    /// Figures alone, to this path.
    pub fn to(metrics_path: PathBuf) -> Self {
        Self {
            metrics_path,
            emit_id: false,
            properties: None,
        }
    }
}
