//! A passt that ends is started again, a few times and with a pause before each.
//!
//! The device says on its I/O thread that it has lost the host's side; a thread of its own then starts
//! another passt, since that takes a while. One that fails over and over is given up: its guest keeps a link
//! that is down.

use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::virtio::net::{Keeper, Renewal, Stream};

use super::{Passt, PasstError, end, start};
use crate::config::{Publish, UserNetwork};
use crate::control::chain;
use crate::sandbox::thread::{Role, spawn};

/// Pause before the first start; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Starts until one lasts for [`LASTING`].
const MOST: u32 = 8;
const LASTING: Duration = Duration::from_secs(60);

/// What passt is started with.
#[derive(Debug)]
pub(in crate::board) struct Recipe {
    /// The interface, for people.
    pub id: String,
    /// The guest's addresses.
    pub network: UserNetwork,
    /// Bytes.
    pub mtu: u16,
    /// Ports of the host.
    pub publish: Vec<Publish>,
}

impl Recipe {
    /// Starts it.
    ///
    /// # Errors
    /// [`PasstError`].
    pub fn start(&self) -> Result<Passt, PasstError> {
        start(&self.network, self.mtu, &self.publish)
    }
}

/// How often it was started of late.
#[derive(Debug, Default)]
struct Starts {
    count: u32,
    last: Option<Instant>,
}

impl Starts {
    /// How long to wait before the next; `None` where there were enough.
    fn next(&mut self, now: Instant) -> Option<Duration> {
        let lasted = |last: Instant| now.saturating_duration_since(last) >= LASTING;
        if self.last.is_none_or(lasted) {
            self.count = 0;
        }
        if self.count >= MOST {
            return None;
        }
        let pause = (FIRST_PAUSE * 2_u32.pow(self.count)).min(LONGEST_PAUSE);
        self.count += 1;
        self.last = Some(now + pause);
        Some(pause)
    }
}

#[derive(Debug)]
struct Kept {
    recipe: Recipe,
    running: Mutex<(Child, Starts)>,
}

/// Keeps the passt of one device.
#[derive(Debug)]
pub(in crate::board) struct PasstKeeper(Arc<Kept>);

impl PasstKeeper {
    /// Of a passt that runs as `child`.
    pub fn new(recipe: Recipe, child: Child) -> Self {
        let running = Mutex::new((child, Starts::default()));
        Self(Arc::new(Kept { recipe, running }))
    }
}

impl Keeper for PasstKeeper {
    fn lost(&self, renewal: Renewal) {
        let kept = self.0.clone();
        if let Err(error) = spawn(Role::Passt, move || kept.start_again(&renewal)) {
            log::warn!("passt is not started again: {}", chain(&error));
        }
    }
}

impl Kept {
    fn start_again(&self, renewal: &Renewal) {
        let id = &self.recipe.id;
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (child, starts) = &mut *running;
        end(child);
        while renewal.is_wanted() {
            let Some(pause) = starts.next(Instant::now()) else {
                log::warn!(
                    "network interface '{id}': passt ended or did not start {MOST} times in a row: it is not \
                     started again, and the link stays down"
                );
                return;
            };
            std::thread::sleep(pause);
            match self.recipe.start() {
                Ok(passt) => {
                    *child = passt.child;
                    let stream = Stream::new(passt.socket);
                    let stream = stream.map(|stream| stream.with_complaints(passt.complaints));
                    match stream.and_then(|stream| renewal.renew(stream)) {
                        Ok(()) => log::warn!("network interface '{id}': passt is started again"),
                        Err(error) => log::warn!("network interface '{id}': {error}"),
                    }
                    return;
                }
                Err(error) => {
                    log::warn!("network interface '{id}': {}", chain(&error));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_become_rarer_and_have_an_end() {
        let (mut starts, mut now) = (Starts::default(), Instant::now());
        let mut pauses = Vec::new();
        while let Some(pause) = starts.next(now) {
            pauses.push(pause.as_millis());
            now += pause;
        }
        let expected = [100, 200, 400, 800, 1600, 3200, 6400, 10_000];
        assert_eq!(pauses, expected);
        assert_eq!(starts.next(now + LASTING / 2), None);
        // One that lasted begins anew.
        assert_eq!(starts.next(now + LASTING), Some(FIRST_PAUSE));
    }
}
