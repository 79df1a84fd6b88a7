//! The log: one sink, whose place, level and look can be changed while bulle runs.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use log::{LevelFilter, Log, Metadata, Record};
use serde_json::json;

use crate::config::{self, LogFormat};

/// A log file could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("Cannot open {} for the log: name a file that this user can write", path.display())]
pub struct LogFileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Where the log goes and how it looks.
struct Settings {
    /// `None`: stderr.
    file: Option<File>,
    /// Name of the microVM, which makes lines look as Firecracker's do.
    id: Option<String>,
    level: bool,
    origin: bool,
    module: Option<String>,
    format: LogFormat,
}

struct Logger(Mutex<Settings>);

static LOGGER: Logger = Logger(Mutex::new(Settings {
    file: None,
    id: None,
    level: true,
    origin: false,
    module: None,
    format: LogFormat::Text,
}));

/// Lines that could not be written.
static MISSED: AtomicU64 = AtomicU64::new(0);

/// How many lines of the log could not be written.
pub fn missed() -> u64 {
    MISSED.load(Ordering::Relaxed)
}

/// Sends log records of at least `level` to stderr.
pub fn init(level: LevelFilter) {
    // It is in place already where this is called again.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}

/// Has lines carry the name of a microVM and, unless they are asked for, no levels, as those of
/// Firecracker.
pub fn name(id: &str) {
    let mut settings = LOGGER.settings();
    settings.id = Some(id.to_owned());
    settings.level = false;
}

/// Changes what `logger` says, and nothing if its file cannot be opened.
pub fn configure(logger: &config::Logger) -> Result<(), LogFileError> {
    let file = logger.log_path.as_deref().map(open).transpose()?;
    let mut settings = LOGGER.settings();
    if file.is_some() {
        settings.file = file;
    }
    settings.level = logger.show_level.unwrap_or(settings.level);
    settings.origin = logger.show_log_origin.unwrap_or(settings.origin);
    settings.format = logger.format.unwrap_or(settings.format);
    if logger.module.is_some() {
        settings.module.clone_from(&logger.module);
    }
    if let Some(level) = logger.level {
        log::set_max_level(level.0);
    }
    Ok(())
}

/// Opens a file, made if absent and readable by its owner only, or a pipe, which may have no reader yet.
pub fn open(path: &Path) -> Result<File, LogFileError> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|source| LogFileError {
            path: path.to_owned(),
            source,
        })
}

impl Logger {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut settings = self.settings();
        let module = settings.module.as_deref();
        if module.is_some_and(|module| !record.target().starts_with(module)) {
            return;
        }
        // One write, so that the lines of two processes do not mix. What cannot be written is lost.
        let line = match settings.format {
            LogFormat::Text => settings.line(record),
            LogFormat::Json => settings.object(record),
        };
        let written = match &mut settings.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
        if written.is_err() {
            MISSED.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

impl Settings {
    /// A line of JSON.
    fn object(&self, record: &Record<'_>) -> String {
        let mut object = json!({
            "time": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            "level": record.level().as_str(),
            "thread": std::thread::current().name(),
            "module": record.target(),
            "text": record.args().to_string(),
        });
        if let Some(id) = &self.id {
            object["id"] = json!(id);
        }
        if self.origin {
            object["file"] = json!(record.file());
            object["line"] = json!(record.line());
        }
        format!("{object}\n")
    }

    fn line(&self, record: &Record<'_>) -> String {
        let now = SystemTime::now();
        let mut line = String::new();
        // Writing to a string cannot fail.
        let _ = match &self.id {
            None => {
                let (now, level) = (humantime::format_rfc3339_micros(now), record.level());
                write!(line, "[{now} {level:<5} {}]", record.target())
            }
            Some(id) => {
                let now = humantime::format_rfc3339_nanos(now).to_string();
                let thread = std::thread::current();
                let thread = thread.name().unwrap_or("-");
                write!(line, "{} [{id}:{thread}", now.trim_end_matches('Z'))
            }
        };
        if self.id.is_some() {
            if self.level {
                let _ = write!(line, ":{}", record.level());
            }
            if self.origin {
                let file = record.file().unwrap_or("-");
                let _ = write!(line, ":{file}:{}", record.line().unwrap_or(0));
            }
            line.push(']');
        }
        let _ = writeln!(line, " {}", record.args());
        line
    }
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    fn record<T>(use_it: impl FnOnce(&Record<'_>) -> T) -> T {
        let record = Record::builder()
            .args(format_args!("say \"text\""))
            .level(Level::Warn)
            .target("bulle::x")
            .file(Some("src/x.rs"))
            .line(Some(7))
            .build();
        use_it(&record)
    }

    fn settings() -> Settings {
        Settings {
            file: None,
            id: None,
            level: true,
            origin: true,
            module: None,
            format: LogFormat::Text,
        }
    }

    #[test]
    fn lines_of_both_looks() {
        let line = |settings: &Settings| record(|record| settings.line(record));
        let mut settings = settings();
        assert!(line(&settings).ends_with("Z WARN  bulle::x] say \"text\"\n"));
        settings.id = Some("vm".into());
        let full = line(&settings);
        assert!(full.ends_with(":WARN:src/x.rs:7] say \"text\"\n"), "{full}");
        assert!(full.contains(" [vm:"), "{full}");
        (settings.level, settings.origin) = (false, false);
        assert!(!line(&settings).contains("WARN"));
    }

    #[test]
    fn lines_of_json() {
        let object = |settings: &Settings| {
            let line = record(|record| settings.object(record));
            let (line, rest) = line.split_once('\n').unwrap();
            assert_eq!(rest, "");
            serde_json::from_str::<serde_json::Value>(line).unwrap()
        };
        let mut settings = settings();
        let full = object(&settings);
        assert_eq!(full["text"], "say \"text\"");
        assert_eq!(
            (&full["level"], &full["module"]),
            (&json!("WARN"), &json!("bulle::x"))
        );
        assert_eq!(
            (&full["file"], &full["line"]),
            (&json!("src/x.rs"), &json!(7))
        );
        let time = full["time"].as_str().unwrap();
        assert!(humantime::parse_rfc3339(time).is_ok(), "{time}");
        assert!(full.get("id").is_none());
        (settings.id, settings.origin) = (Some("vm".into()), false);
        let short = object(&settings);
        assert_eq!(short["id"], "vm");
        assert!(short.get("file").is_none());
    }
}
