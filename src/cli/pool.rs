//! `bulle clone --pool`: processes that wait, and a clone for each line of standard input.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::api::parse_id;
use super::chain;
use super::clone::program;
use crate::config::Config;
use crate::pool::{Order, Pool};
use crate::session::CODE_FAILURE;
use crate::snapshot::{Template, exclusive};
use crate::telemetry::tell;

/// Most bytes of a line.
const MAX_LINE: usize = 4096;

/// A clone that runs.
struct Alive {
    process: Child,
    /// Readable when it has ended.
    end: Option<OwnedFd>,
    config: Config,
}

/// Lines of standard input, as they come.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// Takes what is there; false at the end.
    fn read(&mut self) -> Result<bool> {
        let mut bytes = [0; MAX_LINE];
        let count = match nix::unistd::read(rustix::stdio::stdin(), &mut bytes) {
            Err(Errno::EINTR | Errno::EAGAIN) => return Ok(true),
            count => count.context("Cannot read names from stdin")?,
        };
        self.0.extend(bytes.iter().take(count));
        if count == 0 && !self.0.is_empty() {
            // The last line need not have an end.
            self.0.push(b'\n');
            return Ok(true);
        }
        Ok(count > 0)
    }

    /// The next whole one.
    fn next(&mut self) -> Result<Option<String>> {
        let Some(end) = self.0.iter().position(|byte| *byte == b'\n') else {
            anyhow::ensure!(self.0.len() < MAX_LINE, "A line of stdin is no name");
            return Ok(None);
        };
        let line: Vec<u8> = self.0.drain(..=end).collect();
        Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()))
    }
}

/// Makes clones of `template`, each as `order` says of its number and its name, and prints their names. A process
/// that waits and is killed has another in its place. Clones outlive this.
pub fn serve(
    template: &Template,
    size: usize,
    order: impl Fn(usize, Option<String>) -> Result<(Order, Config)>,
) -> Result<u8> {
    let mut pool = Pool::new(program()?, template.clone(), size);
    pool.fill()?;
    pool.ready()?;
    let (mut lines, mut number, mut code) = (Lines::default(), 0, 0);
    let mut alive: Vec<Alive> = Vec::new();
    loop {
        let stdin = rustix::stdio::stdin();
        let mut fds = vec![PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let ends = alive.iter().filter_map(|clone| clone.end.as_ref());
        let events = pool.events().chain(ends.map(AsFd::as_fd));
        fds.extend(events.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            count => count.context("Cannot wait for names on stdin")?,
        };
        let more = fds.first().and_then(PollFd::any).unwrap_or(false);
        alive.retain_mut(|clone| matches!(clone.process.try_wait(), Ok(None)));
        if more && !lines.read()? {
            return Ok(code);
        }
        while let Some(name) = lines.next()? {
            number += 1;
            match one(&mut pool, &alive, &order, (number, &name)) {
                Ok(clone) => alive.push(clone),
                Err(error) => {
                    tell(format_args!("clone '{name}': {}", chain(&error)));
                    code = CODE_FAILURE;
                }
            }
        }
        pool.fill()?;
    }
}

fn one(
    pool: &mut Pool,
    alive: &[Alive],
    order: &impl Fn(usize, Option<String>) -> Result<(Order, Config)>,
    (number, name): (usize, &str),
) -> Result<Alive> {
    let name = match name {
        "" => None,
        name => Some(parse_id(name).map_err(anyhow::Error::msg)?),
    };
    let (order, config) = order(number, name)?;
    let mut configs: Vec<_> = alive.iter().map(|clone| clone.config.clone()).collect();
    configs.push(config.clone());
    exclusive::check(None, &configs)?;
    let process = pool.clone(&order)?.process;
    let name = order.name.unwrap_or_default();
    writeln!(io::stdout(), "{name}").context("Cannot print to stdout")?;
    // Without one its end is noticed with the next line.
    let end = pidfd_open(Pid::from_child(&process), PidfdFlags::empty()).ok();
    Ok(Alive {
        process,
        end,
        config,
    })
}
