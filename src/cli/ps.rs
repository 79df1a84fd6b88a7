//! `bulle ps`: the microVMs of this user that live.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use devices::console::clean;
use serde::Serialize;

use super::table::table;
use super::target::RuntimeArgs;
use crate::registry::{self, Entry};
use crate::remote::{GLANCE, Remote, RemoteError};

/// Arguments of `bulle ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print JSON: a list of objects
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// A microVM as it is listed.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// `not started`, `running`, `paused`, or `no answer` where its process hangs, or has no place for another client.
    state: String,
    pid: i32,
    vcpu_count: Option<u64>,
    mem_size_mib: Option<u64>,
    created_ms: u64,
    uptime_s: u64,
    /// In the guest; empty where there is none.
    command: Vec<String>,
    kernel: Option<String>,
    arguments: Vec<String>,
    socket: std::path::PathBuf,
}

/// Runs the subcommand.
pub fn run(args: &PsArgs) -> Result<u8> {
    let entries = registry::list(&args.runtime.base()?)?;
    let mut rows = Vec::new();
    for entry in &entries {
        match row(entry) {
            Ok(row) => rows.push(row),
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error.into()),
        }
    }
    let text = match args.json {
        true => serde_json::to_string_pretty(&rows)? + "\n",
        false => text(&rows),
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("Cannot print to stdout")?;
    Ok(0)
}

fn row(entry: &Entry) -> Result<Row, RemoteError> {
    let about = &entry.about;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_millis() as u64);
    let mut row = Row {
        name: entry.name.clone(),
        state: "no answer".to_owned(),
        pid: about.pid,
        vcpu_count: about.vcpu_count.map(u64::from),
        mem_size_mib: about.mem_size_mib,
        created_ms: about.created_ms,
        uptime_s: now.saturating_sub(about.created_ms) / 1000,
        command: about.command.clone(),
        kernel: None,
        arguments: about.arguments.clone(),
        socket: entry.socket(),
    };
    let mut vm = Remote::connect(entry)?.patience(GLANCE);
    let answers = vm
        .state()
        .and_then(|state| Ok((state, vm.get("/vm/config")?)));
    let (state, config) = match answers {
        Ok(answers) => answers,
        Err(RemoteError::Silent { .. } | RemoteError::Refused { .. }) => return Ok(row),
        Err(error) => return Err(error),
    };
    row.state = state.to_lowercase();
    let machine = &config["machine-config"];
    row.vcpu_count = machine["vcpu_count"].as_u64().or(row.vcpu_count);
    row.mem_size_mib = machine["mem_size_mib"].as_u64().or(row.mem_size_mib);
    if let Some(command) = config["guest"]["command"].as_array() {
        let words = command.iter().filter_map(|word| word.as_str());
        row.command = words.map(str::to_owned).collect();
    }
    let kernel = config["boot-source"]["kernel_image_path"].as_str();
    row.kernel = kernel.filter(|path| !path.is_empty()).map(str::to_owned);
    Ok(row)
}

fn text(rows: &[Row]) -> String {
    let number = |number: Option<u64>| number.map_or("-".to_owned(), |n| n.to_string());
    let cells = |row: &Row| {
        let uptime = Duration::from_secs(row.uptime_s);
        [
            row.name.clone(),
            row.state.clone(),
            row.pid.to_string(),
            number(row.vcpu_count),
            row.mem_size_mib.map_or("-".to_owned(), memory),
            humantime::format_duration(uptime).to_string(),
            clean(what(row).as_bytes()),
        ]
    };
    let head = [
        "NAME", "STATE", "PID", "VCPUS", "MEMORY", "UPTIME", "COMMAND",
    ];
    table(head, &rows.iter().map(cells).collect::<Vec<_>>())
}

/// The command, or the kernel of a guest that has none.
fn what(row: &Row) -> String {
    match &row.kernel {
        Some(kernel) if row.command.is_empty() => format!("({kernel})"),
        _ => row.command.join(" "),
    }
}

/// A size in MiB, as it is given to `--memory`.
pub fn memory(mib: u64) -> String {
    match mib {
        0 => "0".to_owned(),
        mib if mib % 1024 == 0 => format!("{}G", mib / 1024),
        mib => format!("{mib}M"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each() {
        let row = Row {
            name: "web".into(),
            state: "running".into(),
            pid: 42,
            vcpu_count: Some(2),
            mem_size_mib: Some(1024),
            created_ms: 0,
            uptime_s: 3661,
            command: ["sh", "-c", "a\x1b[31mb\nc"].map(str::to_owned).to_vec(),
            kernel: Some("/boot/vmlinuz".into()),
            arguments: Vec::new(),
            socket: "/s".into(),
        };
        assert_eq!(
            text(&[row]),
            "NAME  STATE    PID  VCPUS  MEMORY  UPTIME    COMMAND\n\
             web   running  42   2      1G      1h 1m 1s  sh -c ab c\n"
        );
        assert_eq!(memory(1536), "1536M");
    }
}
