//! The session's end of the agent: its protocol client, joined to its channel and to stdout and stderr.

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::legacy::serial::Serial;
use devices::virtio::console::HostPort;
use devices::virtio::device::DeviceState;
use devices::virtio::net::Mac;
use nix::sys::signal::Signal;

use super::agent_port::{AgentPort, Channel};
use super::outcome::Outcome;
use super::output::Output;
use super::terminal::window_size;
use crate::board::BoardState;
use crate::config::{Guest, Spec};
use crate::control::ExecRequest;
use crate::guest::client::{
    AgentClient, AgentEvent, Exit, ExtraError, Job, Level, Power, RequestError, StartRequest,
    TalkError, WinSize, features,
};
use crate::snapshot::{AgentReady, AgentTalk};
use crate::telemetry::Limited;

/// The guest chooses how many notes it sends.
static NOTES: Limited = Limited::new(64);

/// What runs when no command is given.
const SHELL: &str = "/bin/sh";
/// Environment that every command has; the user's entries come after and win.
const ENVIRONMENT: [&str; 3] = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "USER=root",
];
/// A terminal whose size cannot be asked.
const DEFAULT_SIZE: (u16, u16) = (24, 80);

/// The agent of a foreground run.
pub struct AgentLink {
    client: AgentClient,
    channel: Channel,
    /// Whether the command has a terminal.
    tty: bool,
    features: u32,
    /// What came and is not looked at yet.
    events: Vec<AgentEvent>,
    /// What came about commands beside the first.
    extra: Vec<(u8, AgentEvent)>,
    running: bool,
    interrupted: bool,
    told_of_no_reader: bool,
}

impl AgentLink {
    /// For the command of `guest`, on a terminal if `tty`.
    pub fn new(guest: &Guest, tty: bool, channel: Channel) -> Result<Self, RequestError> {
        let client = AgentClient::new(&request(guest, tty))?;
        Ok(Self::of(client, channel, tty, 0))
    }

    fn of(client: AgentClient, channel: Channel, tty: bool, features: u32) -> Self {
        Self {
            client,
            channel,
            tty,
            features,
            events: Vec::new(),
            extra: Vec::new(),
            running: false,
            interrupted: false,
            told_of_no_reader: false,
        }
    }

    /// For the command of `guest` in a guest whose agent waits for one, as `ready` says.
    pub fn resumed(
        guest: &Guest,
        tty: bool,
        (uart, port): (Arc<AgentPort>, Option<HostPort>),
        ready: &AgentReady,
    ) -> Result<Self, RequestError> {
        let channel = Channel::chosen(uart, port, Some(ready.port));
        let request = request(guest, tty);
        let mut client = AgentClient::resumed(&request, ready.features, ready.window)?;
        if channel.is_lossless() {
            client.widen();
        }
        client.received(&[], &mut Vec::new());
        Ok(Self::of(client, channel, tty, ready.features))
    }

    /// For an agent with which another process has talked until `talk` was saved.
    ///
    /// # Errors
    /// A conversation that cannot have been.
    pub fn restored(
        talk: AgentTalk,
        (uart, port): (Arc<AgentPort>, Option<HostPort>),
    ) -> Result<Self, TalkError> {
        let channel = Channel::chosen(uart, port, talk.port);
        let (features, running) = (talk.client.features, talk.client.main.running);
        let client = AgentClient::restored(talk.client)?;
        let mut link = Self::of(client, channel, talk.tty, features);
        link.running = running;
        if let Some(size) = window_size().filter(|_| talk.tty) {
            link.resize(size);
        }
        Ok(link)
    }

    /// The conversation, with vCPUs and devices at rest; `None` once the command has ended.
    pub fn save(&mut self) -> Option<AgentTalk> {
        self.collect();
        let mut client = self.client.save()?;
        client.unread(self.channel.unread());
        Some(AgentTalk {
            port: self.channel.choice(),
            tty: self.tty,
            client,
        })
    }

    /// Whether the command has a terminal.
    pub fn has_tty(&self) -> bool {
        self.tty
    }

    /// Has the agent wait for its command when it is there.
    pub fn hold(&mut self) {
        self.client.hold();
    }

    /// The agent, if it waits for its command.
    pub fn ready(&self) -> Option<AgentReady> {
        Some(AgentReady {
            window: self.client.ready()?,
            features: self.features,
            port: self.channel.is_lossless(),
        })
    }

    /// Whether the command runs.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Whether the guest reports panics through pvpanic.
    pub fn has_pvpanic(&self) -> bool {
        self.features & features::PVPANIC != 0
    }

    /// Has the guest's network interfaces that have the first of two addresses get the second.
    pub fn change_addresses(&mut self, all: &[[Mac; 2]]) {
        let old = self.client.is_connected() && self.features & features::ADDRESS == 0;
        if old && !all.is_empty() {
            log::warn!(
                "the agent in this guest is that of an older bulle: the guest itself has to take the other \
                 addresses of its network interfaces"
            );
        }
        for [from, to] in all {
            self.client.change_address(*from, *to);
        }
    }

    /// Whether input would be taken.
    pub fn takes_input(&self) -> bool {
        self.client.wants_stdin()
    }

    /// Input for the command; says how much was taken.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        self.client.stdin(bytes)
    }

    /// No more input comes.
    pub fn input_ended(&mut self) {
        self.client.stdin_eof();
    }

    /// Runs another command, as `request` says and in `guest`'s environment otherwise; returns its number.
    pub fn begin(&mut self, request: &ExecRequest, guest: &Guest) -> Result<u8, ExtraError> {
        let own = ENVIRONMENT.iter().map(|entry| entry.to_string());
        let more = guest.env.iter().chain(&request.env).cloned();
        let cwd = request.cwd.as_ref().or(guest.cwd.as_ref());
        let size = request.tty.map(|size| (size.rows, size.cols));
        self.client.begin(&StartRequest {
            argv: request.command.iter().map(OsString::from).collect(),
            env: merge(own.chain(more)),
            cwd: cwd.map(OsString::from),
            tty: size.map(win_size),
        })
    }

    /// Does something with the command `number`; `None` once it has ended.
    pub fn with<R>(&mut self, number: u8, act: impl FnOnce(&mut Job) -> R) -> Option<R> {
        self.client.with(number, act)
    }

    /// What came about other commands than the first.
    pub fn take_extra(&mut self) -> Vec<(u8, AgentEvent)> {
        std::mem::take(&mut self.extra)
    }

    /// The terminal has a new size.
    pub fn resize(&mut self, size: (u16, u16)) {
        self.client.resize(win_size(size));
    }

    /// Passes `signal` to the command, the first time; says whether it did.
    pub fn forward_once(&mut self, signal: Signal) -> bool {
        if !self.running || std::mem::replace(&mut self.interrupted, true) {
            return false;
        }
        self.client.signal(signal as u8);
        true
    }

    /// Asks the guest to end the command and power off.
    pub fn power_off(&mut self) {
        self.client.shutdown(Power::Off);
    }

    /// So many bytes of output reached their reader.
    pub fn written(&mut self, bytes: usize) {
        self.client.consumed(bytes);
    }

    /// Descriptors that are readable when the channel has bytes, and when it has room, beside those of
    /// COM2.
    pub fn events(&self) -> Option<[i32; 2]> {
        let port = self.channel.port()?;
        Some([port.readable().as_raw_fd(), port.writable().as_raw_fd()])
    }

    /// Moves what there is to say into the channel, as far as that takes it.
    pub fn pump(&mut self, uart: &Serial) {
        loop {
            // Nothing at all is written as well: that takes the event of room.
            match self.channel.write(self.client.outgoing(), uart) {
                0 => return,
                taken => self.client.sent(taken),
            }
        }
    }

    /// Takes what the guest has sent; says whether anything came.
    fn collect(&mut self) -> bool {
        let bytes = self.channel.take();
        if self.channel.is_lossless() && !self.client.is_held() {
            self.client.widen();
        }
        self.client.received(&bytes, &mut self.events);
        if self.client.is_connected() {
            self.channel.settle();
        }
        !bytes.is_empty()
    }

    /// Takes what the guest has sent; output goes to its queue. An end of the run is returned, and
    /// whether anything came.
    pub fn receive(&mut self, stdout: &mut Output, stderr: &mut Output) -> (Option<Outcome>, bool) {
        let came = self.collect();
        let mut end = None;
        for event in std::mem::take(&mut self.events) {
            match event {
                AgentEvent::Stdout(bytes) => self.print(stdout, &bytes),
                AgentEvent::Stderr(bytes) => self.print(stderr, &bytes),
                event => end = end.or(self.on_event(event)),
            }
        }
        (end, came)
    }

    fn print(&mut self, output: &mut Output, bytes: &[u8]) {
        if output.push(bytes) {
            return;
        }
        // Nobody reads it any more. The command is told as a pipe would tell it, once, and not
        // held up if it goes on.
        self.client.consumed(bytes.len());
        if output.has_no_reader() && !std::mem::replace(&mut self.told_of_no_reader, true) {
            self.client.signal(Signal::SIGPIPE as u8);
        }
    }

    fn on_event(&mut self, event: AgentEvent) -> Option<Outcome> {
        match event {
            AgentEvent::Hello { features, release } => {
                log::info!("the agent runs on Linux {release}");
                self.features = features;
            }
            AgentEvent::Started { pid } => {
                log::info!("the command runs as process {pid}");
                self.running = true;
            }
            AgentEvent::Log { level, text } => {
                if NOTES.allow() {
                    log::log!(log_level(level), "agent: {text}");
                }
            }
            AgentEvent::Stopping(power) => log::info!("the guest is stopping: {power:?}"),
            AgentEvent::Exited(Exit::Code(code)) => return Some(Outcome::Exited(code)),
            AgentEvent::Exited(Exit::Signal(signal)) => return Some(Outcome::Killed(signal)),
            AgentEvent::Failed(failure) => {
                let (code, text) = (failure.exit_code(), failure.to_string());
                return Some(Outcome::NotStarted { code, text });
            }
            AgentEvent::ProtocolError(error) => {
                return Some(Outcome::AgentLost(error.to_string()));
            }
            AgentEvent::Extra(number, event) => self.extra.push((number, *event)),
            AgentEvent::Stdout(_) | AgentEvent::Stderr(_) => {}
        }
        None
    }
}

/// Of the network interfaces of `spec` that have another address than `saved` ones had: that, and the new one.
pub fn new_addresses(spec: &Spec, saved: &BoardState) -> Vec<[Mac; 2]> {
    let had = |id: &str| {
        let mut states = saved.parts.iter().flat_map(|parts| &parts.virtio);
        states.find_map(|state| match &state.virtio.device {
            DeviceState::Net(net) if state.id == id => net.mac,
            _ => None,
        })
    };
    let interfaces = spec.config().network_interfaces.iter();
    let both = interfaces.filter_map(|net| Some([had(&net.iface_id)?, net.mac()?]));
    both.filter(|[from, to]| from != to).collect()
}

fn request(guest: &Guest, tty: bool) -> StartRequest {
    let term = std::env::var("TERM").ok().filter(|_| tty);
    let own = ENVIRONMENT.iter().map(|entry| entry.to_string());
    let term = term.into_iter().map(|term| format!("TERM={term}"));
    let argv: Vec<OsString> = match guest.command.as_slice() {
        [] => vec![SHELL.into()],
        command => command.iter().map(OsString::from).collect(),
    };
    StartRequest {
        argv,
        env: merge(own.chain(term).chain(guest.env.iter().cloned())),
        cwd: guest.cwd.as_ref().map(OsString::from),
        tty: tty.then(|| win_size(window_size().unwrap_or(DEFAULT_SIZE))),
    }
}

/// Keeps the last entry of each name, in the order of first mention.
fn merge(entries: impl Iterator<Item = String>) -> Vec<OsString> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_string();
    let mut merged: Vec<(String, String)> = Vec::new();
    for entry in entries {
        let key = name(&entry);
        match merged.iter_mut().find(|(known, _)| *known == key) {
            Some((_, value)) => *value = entry,
            None => merged.push((key, entry)),
        }
    }
    merged.into_iter().map(|(_, entry)| entry.into()).collect()
}

fn win_size((rows, cols): (u16, u16)) -> WinSize {
    WinSize { rows, cols }
}

fn log_level(level: Level) -> log::Level {
    match level {
        Level::Error => log::Level::Error,
        Level::Warn => log::Level::Warn,
        Level::Info => log::Level::Info,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_environment_wins() {
        let guest = Guest {
            env: vec!["HOME=/x".into(), "A=1".into(), "A=2".into()],
            ..Guest::default()
        };
        let request = request(&guest, false);
        let env: Vec<_> = request
            .env
            .iter()
            .map(|entry| entry.to_string_lossy())
            .collect();
        assert!(
            env.contains(&"HOME=/x".into()) && env.contains(&"A=2".into()),
            "{env:?}"
        );
        assert_eq!(
            env.iter()
                .filter(|entry| entry.starts_with("HOME="))
                .count(),
            1
        );
        assert!(!env.iter().any(|entry| entry.starts_with("TERM=")));
        assert_eq!(request.argv, ["/bin/sh"]);
        assert_eq!(request.tty, None);
    }
}
