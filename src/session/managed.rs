//! The machine's control socket: an entry in the registry while it runs, and an API thread from the first client
//! on.
//!
//! All of it happens after the guest was started, on the vmm thread, so that no start waits for it. Whatever does
//! not work is logged, and the machine runs without.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;

use crate::api::{ApiThread, MAX_BODY};
use crate::config::Config;
use crate::control::{Caller, chain};
use crate::registry::{About, Claim, Place, RegistryError};

/// Where a machine is known or to be known, and who asks it things there.
pub struct Door {
    at: At,
    caller: Caller,
}

enum At {
    Claim(Claim),
    Place(Place),
}

impl Door {
    /// At an entry that there is.
    pub fn held(claim: Claim, caller: Caller) -> Self {
        let at = At::Claim(claim);
        Self { at, caller }
    }

    /// At `place`. A name that was asked for is taken at once, any other when the door is opened.
    ///
    /// # Errors
    /// The name is not free.
    pub fn new(place: Place, config: &Config, caller: Caller) -> Result<Self, RegistryError> {
        let at = match place.name {
            Some(_) => At::Claim(Claim::new(&place, &About::new(Some(config)))?),
            None => At::Place(place),
        };
        Ok(Self { at, caller })
    }

    /// Listens.
    pub fn open(self, config: &Config) -> Option<Managed> {
        let claim = match self.at {
            At::Claim(claim) => claim,
            At::Place(place) => Claim::new(&place, &About::new(Some(config)))
                .map_err(|error| {
                    log::debug!("commands do not find this machine: {}", chain(&error))
                })
                .ok()?,
        };
        let listener = claim
            .listen()
            .map_err(|error| log::debug!("commands do not reach this machine: {error}"))
            .ok()?;
        Some(Managed {
            api: None,
            socket: listener.as_raw_fd(),
            listening: Some((listener, self.caller)),
            claim,
        })
    }
}

/// A machine that is known. Fields are dropped in this order: the entry goes last.
pub struct Managed {
    api: Option<ApiThread>,
    /// Until somebody comes.
    listening: Option<(UnixListener, Caller)>,
    socket: RawFd,
    claim: Claim,
}

impl Managed {
    /// The name that it has.
    pub fn name(&self) -> &str {
        self.claim.name()
    }

    /// Readable when a client comes, and whether that is still to be waited for here.
    pub fn socket(&self) -> (RawFd, bool) {
        (self.socket, self.listening.is_some())
    }

    /// Somebody has come: serves them.
    pub fn serve(&mut self) {
        let Some((listener, caller)) = self.listening.take() else {
            return;
        };
        let socket = self.claim.socket();
        match ApiThread::serve(listener, &socket, MAX_BODY, caller) {
            Ok(api) => self.api = Some(api),
            Err(error) => log::warn!("the control socket is not served: {}", chain(&error)),
        }
    }
}
