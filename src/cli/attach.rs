//! `bulle attach` and `bulle detach`: devices come and go while the guest runs.

use std::io::{self, Write};
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use super::devices::MaybeNetwork;
use super::target::Target;
use crate::config::{Config, Drive, NetworkInterface, Pmem, parse_list, parse_net};
use crate::remote::Remote;

/// Arguments of `bulle attach`.
#[derive(Debug, Args)]
#[group(id = "devices", required = true, multiple = true, args = ["disk", "net", "pmem"])]
pub struct AttachArgs {
    #[command(flatten)]
    target: Target,
    /// Disk (repeatable), as with `bulle run`: path=FILE[,ro][,id=NAME] and more
    #[arg(long, value_name = "LIST", value_parser = parse_list::<Drive>)]
    disk: Vec<Drive>,
    /// Network interface (repeatable), as with `bulle run`: user or tap=NAME[,mac=ADDRESS][,id=NAME] and
    /// more
    #[arg(long, value_name = "NETWORK", value_parser = parse_net)]
    net: Vec<MaybeNetwork>,
    /// Persistent memory (repeatable), as with `bulle run`: path=FILE[,ro][,id=NAME]
    #[arg(long, value_name = "LIST", value_parser = parse_list::<Pmem>)]
    pmem: Vec<Pmem>,
}

/// Arguments of `bulle detach`.
#[derive(Debug, Args)]
pub struct DetachArgs {
    #[command(flatten)]
    target: Target,
    /// Names of devices, as `bulle attach` printed them and `bulle inspect` shows them
    #[arg(required = true, value_name = "DEVICE")]
    devices: Vec<String>,
    /// Take them away at once, also where the guest uses them: what it has not written is lost
    #[arg(long)]
    force: bool,
}

/// `bulle attach`: prints the name of each device.
pub fn attach(args: &AttachArgs) -> Result<u8> {
    let mut remote = Remote::connect(&args.target.find()?)?;
    for drive in &args.disk {
        let mut drive = drive.clone();
        drive.path_on_host = whole(&drive.path_on_host)?;
        let of = |config: &Config| config.drives.iter().map(|d| d.drive_id.clone()).collect();
        name(&mut remote, &mut drive.drive_id, "disk", of)?;
        put(&mut remote, "drives", &drive.drive_id, &drive)?;
    }
    for net in &args.net {
        let Some(net) = net else {
            bail!("--net none adds nothing: name an interface, such as user or tap=NAME");
        };
        let mut net: NetworkInterface = net.clone();
        if net.fd.is_some() {
            bail!(
                "--net fd= names a descriptor of the microVM's own process: give it to `bulle run`, or name a \
                 tap interface here"
            );
        }
        let of = |config: &Config| {
            let all = config.network_interfaces.iter();
            all.map(|net| net.iface_id.clone()).collect()
        };
        name(&mut remote, &mut net.iface_id, "net", of)?;
        put(&mut remote, "network-interfaces", &net.iface_id, &net)?;
    }
    for pmem in &args.pmem {
        let mut pmem = pmem.clone();
        pmem.path_on_host = whole(&pmem.path_on_host)?;
        let of = |config: &Config| config.pmem.iter().map(|p| p.id.clone()).collect();
        name(&mut remote, &mut pmem.id, "pmem", of)?;
        put(&mut remote, "pmem", &pmem.id, &pmem)?;
    }
    Ok(0)
}

/// The microVM's process is somewhere else.
fn whole(path: &Path) -> Result<PathBuf> {
    absolute(path).with_context(|| format!("Cannot tell where {} is", path.display()))
}

/// Gives a device that has no name the first that is free.
fn name(
    remote: &mut Remote,
    id: &mut String,
    kind: &str,
    of: impl Fn(&Config) -> Vec<String>,
) -> Result<()> {
    if id.is_empty() {
        let config = config(remote)?;
        let taken = of(&config);
        let free = (0..).map(|n| format!("{kind}{n}"));
        let free = free.filter(|id| !taken.contains(id));
        *id = free.take(1).collect();
    }
    Ok(())
}

fn config(remote: &mut Remote) -> Result<Config> {
    let body = remote.ask("GET", "/vm/config", "")?;
    Ok(remote.parse(&body)?)
}

fn put(remote: &mut Remote, kind: &str, id: &str, device: &impl Serialize) -> Result<()> {
    let body = serde_json::to_string(device)?;
    remote.ask("PUT", &format!("/{kind}/{id}"), &body)?;
    writeln!(io::stdout(), "{id}").context("Cannot print to stdout")
}

/// `bulle detach`.
pub fn detach(args: &DetachArgs) -> Result<u8> {
    let mut remote = Remote::connect(&args.target.find()?)?;
    let config = config(&mut remote)?;
    for id in &args.devices {
        let kind = if config.drives.iter().any(|drive| drive.drive_id == *id) {
            "drives"
        } else if config.pmem.iter().any(|pmem| pmem.id == *id) {
            "pmem"
        } else if config
            .network_interfaces
            .iter()
            .any(|net| net.iface_id == *id)
        {
            "network-interfaces"
        } else {
            bail!(
                "The microVM has no device '{id}' that can be detached: `bulle inspect` shows its drives, \
                 network-interfaces and pmem"
            );
        };
        let query = if args.force { "?force=true" } else { "" };
        remote.ask("DELETE", &format!("/{kind}/{id}{query}"), "")?;
    }
    Ok(0)
}
