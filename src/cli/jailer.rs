//! bulle under the name `jailer`: Firecracker's arguments, then the API in a jail.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::time::{ClockId, clock_gettime};

use super::firecracker::{self, parse, printed};
use super::{api, chain};
use crate::sandbox::jail::{CgroupVersion, Jail, Setting};
use crate::telemetry::tell;

/// The name.
pub const NAME: &str = "jailer";
/// Largest number of open files in a jail, unless it is said.
const NO_FILE: u64 = 2048;
/// The process could not be jailed.
const CODE_GENERIC: u8 = 1;

#[derive(Debug, Parser)]
#[command(
    name = NAME,
    about = "Serve Firecracker's API from a jail: bulle in namespaces and a root directory of its own, as a user without rights",
    max_term_width = 100
)]
struct Jailer {
    /// Name of the microVM: 1 to 64 letters, digits and '-'
    #[arg(long, value_name = "ID", value_parser = api::parse_id, required_unless_present = "version")]
    id: Option<String>,
    /// The monitor, which is bulle itself under any name; the name is part of the jail's path
    #[arg(long, value_name = "FILE", required_unless_present = "version")]
    exec_file: Option<PathBuf>,
    /// User that the monitor becomes
    #[arg(long, value_name = "UID", required_unless_present = "version")]
    uid: Option<u32>,
    /// Group that it becomes
    #[arg(long, value_name = "GID", required_unless_present = "version")]
    gid: Option<u32>,
    /// The jail's root directory is DIR/NAME-OF-THE-EXEC-FILE/ID/root
    #[arg(long, value_name = "DIR", default_value = "/srv/jailer")]
    chroot_base_dir: PathBuf,
    /// Join this network namespace
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Have a session of its own, and /dev/null as input and outputs
    #[arg(long)]
    daemonize: bool,
    /// Be the first process of a PID namespace; its PID outside is in NAME-OF-THE-EXEC-FILE.pid
    #[arg(long)]
    new_pid_ns: bool,
    /// Write VALUE to a file of the control group made for the microVM (repeatable)
    #[arg(long, value_name = "FILE=VALUE")]
    cgroup: Vec<Setting>,
    /// Version of control groups: 1 or 2
    #[arg(long, value_name = "VERSION", default_value = "1")]
    cgroup_version: CgroupVersion,
    /// Control group to make the microVM's in [default: the name of the exec file]
    #[arg(long, value_name = "PATH")]
    parent_cgroup: Option<PathBuf>,
    /// Limit a resource (repeatable): fsize=BYTES of a file, no-file=COUNT of open files [default: 2048]
    #[arg(long, value_name = "RESOURCE=VALUE")]
    resource_limit: Vec<ResourceLimit>,
    /// Print the version, and end
    #[arg(long)]
    version: bool,
    /// Arguments of the monitor
    #[arg(last = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

#[derive(Clone, Copy, Debug)]
enum ResourceLimit {
    Fsize(u64),
    NoFile(u64),
}

impl std::str::FromStr for ResourceLimit {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = |value: &str| value.parse().map_err(|_| "the value has to be a number");
        match text.split_once('=') {
            Some(("fsize", value)) => Ok(Self::Fsize(parse(value)?)),
            Some(("no-file", value)) => Ok(Self::NoFile(parse(value)?)),
            _ => Err("write fsize=BYTES or no-file=COUNT"),
        }
    }
}

/// Does what `arguments` say.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let begin = micros(ClockId::CLOCK_MONOTONIC);
    let parsed = match parse::<Jailer>(arguments, CODE_GENERIC) {
        Ok(parsed) => parsed,
        Err(code) => return code,
    };
    if parsed.version {
        let text = format!("Jailer v{}\n", firecracker::VERSION);
        return printed(io::stdout().write_all(text.as_bytes()));
    }
    match enter(parsed, begin) {
        Ok(arguments) => firecracker::main(arguments),
        Err(error) => {
            tell(chain(&error));
            ExitCode::from(CODE_GENERIC)
        }
    }
}

fn micros(clock: ClockId) -> u128 {
    clock_gettime(clock).map_or(0, |time| Duration::from(time).as_micros())
}

/// Jails the process and returns the monitor's arguments.
fn enter(jailer: Jailer, begin: u128) -> Result<Vec<OsString>> {
    let (Some(id), Some(exec_file), Some(uid), Some(gid)) =
        (jailer.id, jailer.exec_file, jailer.uid, jailer.gid)
    else {
        bail!("--id, --exec-file, --uid and --gid are needed");
    };
    let name = name_of_self(&exec_file)?;
    let mut jail = Jail {
        base: jailer.chroot_base_dir,
        name: name.clone(),
        id: id.clone(),
        uid,
        gid,
        netns: jailer.netns,
        daemonize: jailer.daemonize,
        new_pid_ns: jailer.new_pid_ns,
        cgroup_version: jailer.cgroup_version,
        parent_cgroup: jailer.parent_cgroup,
        cgroups: jailer.cgroup,
        no_file: NO_FILE,
        fsize: None,
    };
    for limit in jailer.resource_limit {
        match limit {
            ResourceLimit::Fsize(bytes) => jail.fsize = Some(bytes),
            ResourceLimit::NoFile(count) => jail.no_file = count,
        }
    }
    jail.enter()?;
    // What ps and others show; the rest of the process's command line stays the jailer's.
    let comm: Vec<u8> = name.bytes().take(15).collect();
    if let Ok(comm) = std::ffi::CString::new(comm) {
        nix::sys::prctl::set_name(&comm).context("cannot set the process's name")?;
    }
    let cpu = micros(ClockId::CLOCK_PROCESS_CPUTIME_ID);
    let own = [
        name,
        "--id".into(),
        id,
        "--start-time-us".into(),
        begin.to_string(),
        "--start-time-cpu-us".into(),
        cpu.to_string(),
        "--parent-cpu-time-us".into(),
        cpu.to_string(),
    ];
    let own = own.into_iter().map(OsString::from);
    Ok(own.chain(jailer.arguments).collect())
}

/// The last part of `path`, which has to be this very program: jailer and monitor are one.
fn name_of_self(path: &Path) -> Result<String> {
    let file = fs::metadata(path).with_context(|| format!("--exec-file {}", path.display()))?;
    let own = fs::metadata("/proc/self/exe").context("cannot examine /proc/self/exe")?;
    let linked = (file.dev(), file.ino()) == (own.dev(), own.ino());
    let copied = || file.is_file() && file.len() == own.len();
    let same = linked || copied() && fs::read(path)? == fs::read("/proc/self/exe")?;
    if !same {
        bail!(
            "--exec-file {} is not the program that this jailer is: it jails bulle only, under any \
             name; link both names to one bulle, as make install does",
            path.display()
        );
    }
    let name = path.file_name().and_then(|name| name.to_str());
    match name {
        Some(name) => Ok(name.to_owned()),
        None => bail!(
            "--exec-file {} has no name that a jail could have",
            path.display()
        ),
    }
}
