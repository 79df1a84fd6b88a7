//! `bulle run`: from arguments to a configuration, and from that to a session.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use devices::mmds::DEFAULT_LIMIT;

use super::api::parse_id;
use super::caller;
use super::devices::DeviceArgs;
use super::kernel::default_kernel;
use super::metadata;
use super::target::RuntimeArgs;
use crate::config::{
    BootSource, Config, Console, CpuConfig, Drive, Guest, HugePages, Irqchip, KernelEntry,
    MachineConfig, MemoryBacking, Root, Share, parse_size,
};
use crate::registry::Place;
use crate::session;
use crate::telemetry;

const AFTER_HELP: &str = "\
Exit codes: the command's own, 128+N when signal N killed it, 126 and 127 as in a shell;
120 watchdog not fed, 121 kernel panic, 122 triple fault or KVM failure, 123 the guest ended
before the command did, 124 time limit, 125 bulle's own failure.

On a terminal, Ctrl-A x ends the virtual machine and Ctrl-A h lists more.
SIGTERM asks the guest to power off, SIGUSR1 presses its power button, SIGUSR2 sends Ctrl-Alt-Del,
SIGIO tells it of disks that have another size now.";

/// Most bytes of a configuration file.
const MAX_CONFIG: u64 = 1 << 20;

/// Arguments of `bulle run`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// Kernel: a bzImage or an ELF vmlinux [default: the newest readable one under /boot]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// How the kernel is entered [default: auto]
    #[arg(long, value_name = "HOW")]
    kernel_entry: Option<KernelEntry>,
    /// Unpack a compressed kernel at every start, and keep nothing in ~/.cache/bulle/kernels
    #[arg(long)]
    no_kernel_cache: bool,
    /// Initial RAM disk; with a COMMAND, bulle's agent is added to it
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Words appended to the kernel command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    append: Option<String>,
    /// Number of virtual CPUs [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u16>,
    /// Hardware threads per core, 1 or 2 [default: 1]
    #[arg(long, value_name = "N")]
    threads_per_core: Option<u16>,
    /// Dies in the socket [default: 1]
    #[arg(long, value_name = "N")]
    dies: Option<u16>,
    /// Guest memory, such as 512M or 2GiB [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// What backs guest memory on the host [default: anonymous]
    #[arg(long, value_name = "KIND")]
    memory_backing: Option<MemoryBacking>,
    /// Page size of guest memory on the host [default: none]
    #[arg(long, value_name = "SIZE")]
    huge_pages: Option<HugePages>,
    /// Who emulates the interrupt controllers [default: split]
    #[arg(long, value_name = "WHO")]
    irqchip: Option<Irqchip>,
    /// The guest's root: a disk image with a file system or a directory (both read-only, a tmpfs
    /// over them), an initramfs, or `none` for a guest without bulle's agent. With `/`, the command
    /// also gets the caller's PATH, HOME, USER and locale [default: a minimal tree of the host's
    /// busybox]
    #[arg(long, value_name = "IMAGE|DIR|INITRAMFS|none")]
    root: Option<PathBuf>,
    /// Let the guest write to the image or directory given by --root
    #[arg(long, requires = "root")]
    root_rw: bool,
    /// Copy the directory given by --root into guest memory, for kernels without virtiofs or
    /// overlayfs
    #[arg(long, requires = "root", conflicts_with = "root_rw")]
    root_copy: bool,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Directory with the kernel's modules [default: /lib/modules/RELEASE]
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Environment variable for the command (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Working directory of the command in the guest [default: the caller's, where --root is a
    /// directory that it is in; else /]
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Whether the command gets a terminal [default: auto, when stdin and stdout are one]
    #[arg(long, value_name = "WHEN")]
    tty: Option<When>,
    /// End the VM after this time, such as 30s or 2m
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Where the guest's console goes: tty, off or file=PATH over the serial port; hvc0 or
    /// hvc0=PATH over the virtio console to the terminal or a file [default: off, or tty without
    /// agent]
    #[arg(long, value_name = "WHERE", value_parser = parse_console)]
    console: Option<Console>,
    /// Show bulle's log at this level: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    log: Option<log::LevelFilter>,
    /// Show the guest's boot messages and bulle's progress on stderr
    #[arg(long, short)]
    verbose: bool,
    /// Print the resolved configuration as JSON and end
    #[arg(long)]
    print_config: bool,
    /// Start from a configuration file, as --print-config prints it; other options override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Boot until the guest waits for a command, save it to this directory, and end
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    save: Option<PathBuf>,
    /// Name by which other commands find this VM: 1 to 64 letters, digits and '-' [default: eight digits]
    #[arg(long, alias = "id", value_name = "NAME", value_parser = parse_id)]
    name: Option<String>,
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Command to run in the guest, and its arguments [default: a shell]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// When something is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// When both stdin and stdout are one.
    Auto,
    /// In any case.
    Yes,
    /// Never.
    No,
}

impl When {
    /// Whether it is, with `auto` for the case that nothing is said.
    pub fn is_wanted(self, auto: impl FnOnce() -> bool) -> bool {
        match self {
            Self::Auto => auto(),
            Self::Yes => true,
            Self::No => false,
        }
    }
}

fn parse_console(text: &str) -> Result<Console, String> {
    match text {
        "tty" => Ok(Console::Tty),
        "off" => Ok(Console::Off),
        "hvc0" => Ok(Console::Hvc0),
        _ => match text.split_once('=') {
            Some(("file", path)) if !path.is_empty() => Ok(Console::File(path.into())),
            Some(("hvc0", path)) if !path.is_empty() => Ok(Console::Hvc0File(path.into())),
            _ => Err("write tty, off, file=PATH, hvc0 or hvc0=PATH".to_string()),
        },
    }
}

/// Runs the subcommand.
pub fn run(args: RunArgs) -> Result<u8> {
    let level = match (args.log, args.verbose) {
        (Some(level), _) => level,
        (None, true) => log::LevelFilter::Info,
        (None, false) => log::LevelFilter::Warn,
    };
    telemetry::init(level);
    let print = args.print_config;
    let place = args.place();
    let save = args.save.clone();
    let metadata = args.devices.metadata().map(Path::to_path_buf);
    let mut config = args.into_config()?;
    if print {
        let text = serde_json::to_string_pretty(&config)?;
        writeln!(io::stdout(), "{text}").context("Cannot print the configuration to stdout")?;
        config.validate()?;
        return Ok(0);
    }
    config
        .make_paths_absolute()
        .context("There is no current directory")?;
    if let Some(logger) = &config.logger {
        telemetry::configure(logger)?;
    }
    let mmds = metadata::read(metadata.as_deref(), DEFAULT_LIMIT)?;
    if let Some(directory) = save {
        if config.guest.is_none() {
            bail!("--save waits for bulle's agent, which a guest with --root none does not have");
        }
        let create = super::snapshot::target(&directory)?;
        return Ok(session::save_ready(
            config.validate()?,
            &mmds,
            place,
            create,
        )?);
    }
    session::launch(config.validate()?, &mmds, place).map_err(anyhow::Error::from)
}

impl RunArgs {
    /// Where others find the VM, where there is such a place.
    fn place(&self) -> Option<Place> {
        self.runtime.place(self.name.clone())
    }

    fn into_config(self) -> Result<Config> {
        let mut config = match &self.config {
            Some(path) => read_config(path)?,
            None => Config::new(match &self.kernel {
                Some(path) => path.clone(),
                None => default_kernel()?,
            }),
        };
        let from_file = self.config.is_some();
        if self.devices.contradicts_itself() {
            bail!(
                "--net none means no network at all: leave it out, or the other --net and --publish"
            );
        }
        self.devices.apply(&mut config);
        self.boot_source(&mut config.boot_source);
        self.machine(&mut config.machine_config);
        self.guest(&mut config, from_file)?;
        if let Some(timeout) = self.timeout {
            let limit = "--timeout is longer than bulle can count";
            config.timeout_ms = Some(timeout.as_millis().try_into().context(limit)?);
        }
        if let Some(console) = self.console {
            config.console = Some(console);
        } else if self.verbose && config.guest.is_some() && config.console.is_none() {
            config.console = Some(Console::Tty);
        }
        Ok(config)
    }

    fn boot_source(&self, boot: &mut BootSource) {
        if let Some(kernel) = &self.kernel {
            boot.kernel_image_path.clone_from(kernel);
        }
        if let Some(entry) = self.kernel_entry {
            boot.kernel_entry = entry;
        }
        if self.no_kernel_cache {
            boot.kernel_cache = false;
        }
        if self.initrd.is_some() {
            boot.initrd_path.clone_from(&self.initrd);
        }
        if self.append.is_some() {
            boot.boot_args.clone_from(&self.append);
        }
    }

    fn machine(&self, machine: &mut MachineConfig) {
        let set = |field: &mut u16, value: Option<u16>| *field = value.unwrap_or(*field);
        set(&mut machine.vcpu_count, self.cpus);
        set(&mut machine.threads_per_core, self.threads_per_core);
        set(&mut machine.dies, self.dies);
        machine.mem_size_mib = self.memory.unwrap_or(machine.mem_size_mib);
        machine.memory_backing = self.memory_backing.unwrap_or(machine.memory_backing);
        machine.huge_pages = self.huge_pages.unwrap_or(machine.huge_pages);
        machine.irqchip = self.irqchip.unwrap_or(machine.irqchip);
    }

    /// The guest section: from the file, changed by options; without either, a guest with agent
    /// unless `--root none` or a bare `--initrd` says otherwise.
    fn guest(&self, config: &mut Config, from_file: bool) -> Result<()> {
        let none = self.root.as_deref() == Some(Path::new("none"));
        let asks = !self.command.is_empty()
            || !self.env.is_empty()
            || self.cwd.is_some()
            || self.modules.is_some()
            || self.tty.is_some();
        if none {
            if asks {
                bail!(
                    "--root none means a guest without bulle's agent, which cannot run a command: \
                     leave out the command, --env, --cwd, --modules and --tty, or name a root"
                );
            }
            config.guest = None;
            config.shares.retain(|share| !share.is_root());
            return Ok(());
        }
        let root = match &self.root {
            Some(path) => Some(self.root_of(path, config)?),
            None => None,
        };
        let bare = self.root.is_none() && !asks;
        if bare && (from_file || self.initrd.is_some()) {
            return Ok(());
        }
        let guest = config.guest.get_or_insert_with(|| Guest {
            root: if self.initrd.is_some() {
                Root::Initrd
            } else {
                Root::Busybox
            },
            ..Guest::default()
        });
        guest.root = root.unwrap_or_else(|| guest.root.clone());
        if !self.command.is_empty() {
            guest.command.clone_from(&self.command);
        }
        guest.env.extend(self.env.iter().cloned());
        if let (Some(path), Root::Share | Root::Directory(_)) = (&self.root, &guest.root) {
            guest.env.splice(0..0, caller::environment(path));
            guest.cwd = guest.cwd.take().or_else(|| caller::cwd(path));
        }
        if self.cwd.is_some() {
            guest.cwd.clone_from(&self.cwd);
        }
        if self.modules.is_some() {
            guest.modules_dir.clone_from(&self.modules);
        }
        match self.tty {
            Some(When::Yes) => guest.tty = Some(true),
            Some(When::No) => guest.tty = Some(false),
            Some(When::Auto) => guest.tty = None,
            None => {}
        }
        Ok(())
    }
}

impl RunArgs {
    /// What `--root` names, by what is there.
    fn root_of(&self, path: &Path, config: &mut Config) -> Result<Root> {
        let kind = fs::metadata(path)
            .with_context(|| format!("Cannot use {} as the guest's root", path.display()))?
            .file_type();
        let is_archive = kind.is_file() && is_initramfs(path)?;
        if self.root_rw && is_archive {
            bail!(
                "--root-rw is for disk images and directories: the guest has {} in memory only",
                path.display()
            );
        }
        if self.root_copy && !kind.is_dir() {
            bail!(
                "--root-copy is for directories, which {} is not: leave it out",
                path.display()
            );
        }
        config.shares.retain(|share| !share.is_root());
        config.drives.retain(|drive| !drive.is_root_device);
        if kind.is_dir() && self.root_copy {
            return Ok(Root::Directory(path.to_path_buf()));
        }
        if kind.is_dir() {
            let share = Share {
                tag: "root".to_owned(),
                path_on_host: path.to_path_buf(),
                mount_point: Some("/".to_owned()),
                is_read_only: !self.root_rw,
                ..Share::default()
            };
            config.shares.insert(0, share);
            return Ok(Root::Share);
        }
        if is_archive {
            config.boot_source.initrd_path = Some(path.to_path_buf());
            return Ok(Root::Initrd);
        }
        let drive = Drive {
            is_root_device: true,
            is_read_only: !self.root_rw,
            ..Drive::new("root", path.to_path_buf())
        };
        config.drives.insert(0, drive);
        Ok(Root::Drive)
    }
}

/// Whether the kernel would unpack this file: a cpio archive, compressed or not.
fn is_initramfs(path: &Path) -> Result<bool> {
    const MAGICS: [&[u8]; 7] = [
        b"07070",
        b"\x1f\x8b",
        b"\xfd7zXZ",
        b"\x28\xb5\x2f\xfd",
        b"\x02\x21\x4c\x18",
        b"BZh",
        b"\x5d\0\0",
    ];
    let cannot = || format!("Cannot read {}", path.display());
    let mut head = Vec::new();
    let file = fs::File::open(path).with_context(cannot)?;
    file.take(8).read_to_end(&mut head).with_context(cannot)?;
    Ok(MAGICS.iter().any(|magic| head.starts_with(magic)))
}

fn read_config(path: &Path) -> Result<Config> {
    parse_config(path, &read_text(path)?)
}

/// Reads the text of a configuration file.
pub fn read_text(path: &Path) -> Result<String> {
    // A pipe is welcome, but what has no end must not be read to it.
    let mut text = String::new();
    let length = File::open(path)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_string(&mut text))
        .with_context(|| format!("Cannot read the configuration {}", path.display()))?;
    if length as u64 > MAX_CONFIG {
        let path = path.display();
        bail!("The configuration {path} has more than {MAX_CONFIG} bytes: no configuration has");
    }
    Ok(text)
}

/// Takes the text of the configuration file at `path` apart.
pub fn parse_config(path: &Path, text: &str) -> Result<Config> {
    let mut config: Config = serde_json::from_str(text)
        .with_context(|| format!("The configuration {} is not valid", path.display()))?;
    match config.cpu_config.take() {
        Some(CpuConfig::File(path)) => {
            let template = serde_json::from_str(&read_text(&path)?)
                .with_context(|| format!("The CPU template {} is not valid", path.display()))?;
            config.set_cpu(template);
        }
        Some(CpuConfig::Template(template)) => config.set_cpu(template),
        None => {}
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Wrapper {
        #[command(flatten)]
        args: RunArgs,
    }

    fn config(words: &[&str]) -> Config {
        let words = ["bulle", "--kernel", "/k"].iter().chain(words);
        Wrapper::parse_from(words).args.into_config().unwrap()
    }

    #[test]
    fn a_guest_has_an_agent_unless_told_otherwise() {
        assert_eq!(config(&[]).guest, Some(Guest::default()));
        assert_eq!(config(&["--root", "none"]).guest, None);
        assert_eq!(config(&["--initrd", "/i"]).guest, None);
        let guest = config(&["--initrd", "/i", "--", "ls"]).guest.unwrap();
        assert_eq!(
            (guest.root, guest.command),
            (Root::Initrd, vec!["ls".to_string()])
        );
        let guest = config(&["--root", "/"]).guest.unwrap();
        assert_eq!(guest.root, Root::Share);
        let here = std::env::current_dir().unwrap();
        assert_eq!(guest.cwd.as_deref(), here.to_str());
        assert!(guest.env.iter().any(|entry| entry.starts_with("PATH=")));
    }

    #[test]
    fn a_printed_configuration_runs_again_and_options_override_it() {
        let words = [
            "--memory",
            "1G",
            "--cpus",
            "4",
            "--env",
            "A=1",
            "--timeout",
            "2s",
            "--",
            "x",
        ];
        let first = config(&words);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serde_json::to_string_pretty(&first).unwrap()).unwrap();
        let again = |more: &[&str]| {
            let words = ["bulle", "--config", file.path().to_str().unwrap()];
            Wrapper::parse_from(words.iter().chain(more))
                .args
                .into_config()
                .unwrap()
        };
        assert_eq!(again(&[]), first);
        assert_eq!(again(&["--memory", "2G"]).machine_config.mem_size_mib, 2048);
        assert!(first.boot_source.kernel_cache);
        assert!(!again(&["--no-kernel-cache"]).boot_source.kernel_cache);
        assert_eq!(again(&["--", "y"]).guest.unwrap().command, ["y"]);
    }

    #[test]
    fn a_command_without_an_agent_is_refused() {
        let words = ["bulle", "--kernel", "/k", "--root", "none", "--", "ls"];
        let error = Wrapper::parse_from(words)
            .args
            .into_config()
            .unwrap_err()
            .to_string();
        assert!(error.contains("--root none"), "{error}");
    }

    #[test]
    fn disks_and_root_images_become_drives() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, [0; 512]).unwrap();
        let image = image.to_str().unwrap();
        let disk = "path=/d,ro,rate.ops.size=9";
        let made = config(&["--disk", disk, "--root", image, "--entropy"]);
        assert_eq!(made.guest.as_ref().unwrap().root, Root::Drive);
        let ids: Vec<_> = made.drives.iter().map(|d| d.drive_id.as_str()).collect();
        assert_eq!(ids, ["root", "disk0"]);
        assert_eq!(made.root_drive(), made.drives.first());
        assert!(made.drives.iter().all(|d| d.is_read_only));
        let text = serde_json::to_string(&made).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), made);
        made.validate().unwrap();
        assert!(!config(&["--root", image, "--root-rw"]).drives[0].is_read_only);

        fs::write(image, "070701").unwrap();
        let made = config(&["--root", image]);
        assert_eq!(made.guest.unwrap().root, Root::Initrd);
        assert_eq!(made.boot_source.initrd_path.unwrap(), Path::new(image));
        for (option, words) in [
            ("--root-rw", "in memory only"),
            ("--root-copy", "directories"),
        ] {
            let all = ["bulle", "--kernel", "/k", option, "--root", image];
            let error = Wrapper::parse_from(all).args.into_config().unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn directories_are_shared_as_the_root_or_copied() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap();
        let made = config(&["--share", "/a:/x:ro", "--root", root, "--cwd", "/x"]);
        assert_eq!(made.guest.as_ref().unwrap().cwd.as_deref(), Some("/x"));
        let share = made.root_share().unwrap();
        assert_eq!((share.tag.as_str(), share.is_read_only), ("root", true));
        let tags: Vec<_> = made.shares.iter().map(|share| share.tag.as_str()).collect();
        assert_eq!(tags, ["root", "share0"]);
        let text = serde_json::to_string(&made).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), made);
        made.validate().unwrap();
        let made = config(&["--root", root, "--root-rw"]);
        assert!(!made.shares[0].is_read_only);
        // Nothing of the caller's is in there.
        let guest = made.guest.unwrap();
        assert_eq!((guest.cwd, guest.env), (None, vec![]));
        let made = config(&["--root", root, "--root-copy"]);
        assert_eq!(
            made.guest.as_ref().unwrap().root,
            Root::Directory(root.into())
        );
        assert_eq!(made.shares, []);
        made.validate().unwrap();
    }

    #[test]
    fn console_words() {
        assert_eq!(parse_console("file=/x"), Ok(Console::File("/x".into())));
        assert_eq!(parse_console("hvc0"), Ok(Console::Hvc0));
        assert_eq!(parse_console("hvc0=/x"), Ok(Console::Hvc0File("/x".into())));
        assert!(parse_console("file=").is_err());
        assert!(parse_console("serial").is_err());
    }
}
