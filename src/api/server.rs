//! The API thread: a listening socket, at most [`MAX_CONNECTIONS`] clients, one action at a time.
//!
//! It blocks in poll, also while the vmm thread works on an action, during which only streams go on; it costs
//! nothing while nobody asks.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::connection::Connection;
use super::counts::Counts;
use super::error::ApiError;
use super::http::{FULL, Request, Response};
use super::{prometheus, router};
use crate::control::{Action, ActionError, Caller, Pending, Reply, Stream};
use crate::sandbox::thread::{Role, ThreadError, spawn};

/// Clients at a time; one more is turned away.
pub const MAX_CONNECTIONS: usize = 10;

/// How long streams may take to be taken to their ends, once the microVM has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Something is at the path.
    #[error(
        "Cannot serve the API on {}: there is something already; name another path, or remove it if \
         no microVM uses it any more", path.display()
    )]
    Exists {
        /// As asked for.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("Cannot serve the API on {}", path.display())]
    Bind {
        /// As asked for.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// No thread.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

/// The API while it is served. Dropping it ends the thread and removes the socket; the answering end
/// of its [`Caller`] must be gone by then, or go on answering.
pub struct ApiThread {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    counts: Arc<Counts>,
}

impl ApiThread {
    /// Serves `caller`'s microVM on a socket at `path`, to clients whose bodies have at most `limit`
    /// bytes.
    pub fn start(path: &Path, limit: usize, caller: Caller) -> Result<Self, ServerError> {
        let error = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ServerError::Exists {
                path: path.to_owned(),
            },
            _ => ServerError::Bind {
                path: path.to_owned(),
                source,
            },
        };
        let listener = UnixListener::bind(path).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        Self::serve(listener, path, limit, caller)
    }

    /// As [`start`](Self::start), with a socket that listens already and does not block.
    pub fn serve(
        listener: UnixListener,
        path: &Path,
        limit: usize,
        caller: Caller,
    ) -> Result<Self, ServerError> {
        let error = |source| ServerError::Bind {
            path: path.to_owned(),
            source,
        };
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(error)?;
        let server = Server {
            listener,
            stop: stop.try_clone().map_err(error)?,
            connections: Vec::new(),
            limit,
            caller,
            counts: Arc::default(),
        };
        Ok(Self {
            counts: server.counts.clone(),
            thread: Some(spawn(Role::Api, move || server.run())?),
            stop,
            path: path.to_owned(),
        })
    }
}

impl ApiThread {
    /// What has come over it.
    pub fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }
}

impl Drop for ApiThread {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        if let Err(error) = self.stop.write(1) {
            log::error!("the API thread cannot be told to end and is left behind: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the API thread panicked");
        }
    }
}

struct Server {
    listener: UnixListener,
    stop: EventFd,
    connections: Vec<Connection>,
    limit: usize,
    caller: Caller,
    counts: Arc<Counts>,
}

impl Server {
    fn run(mut self) {
        let mut end = None;
        while let Some(ready) = self.wait(end) {
            let [stop, new, old @ ..] = ready.as_slice() else {
                return;
            };
            for (index, ready) in old.chunks_exact(2).enumerate() {
                let all = ready
                    .iter()
                    .fold(PollFlags::empty(), |all, ready| all | *ready);
                self.serve(index, all);
            }
            self.connections
                .retain_mut(|connection| !connection.is_over());
            if end.is_none() && !new.is_empty() {
                self.accept();
            }
            self.bound_lingering();
            if end.is_none() && !stop.is_empty() {
                end = Some(Instant::now() + LAST_WORDS);
            }
            // Of the others nobody waits for an answer any more.
            let over = end.is_some_and(|end| Instant::now() >= end);
            if over || end.is_some() && !self.connections.iter().any(Connection::is_relaying) {
                return;
            }
        }
    }

    /// What the stop event and the listener are ready for, and each connection twice: its client, and the
    /// stream that it relays. Waits until `end` at most; `None` where waiting fails.
    fn wait(&self, end: Option<Instant>) -> Option<Vec<PollFlags>> {
        // SAFETY: the eventfd is open as long as `self` is, which outlives the borrow.
        let stop = unsafe {
            std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.stop))
        };
        // Once the end has come, neither is looked at.
        let wanted = match end {
            None => PollFlags::POLLIN,
            Some(_) => PollFlags::empty(),
        };
        let mut fds = vec![
            PollFd::new(stop, wanted),
            PollFd::new(self.listener.as_fd(), wanted),
        ];
        fds.extend(self.connections.iter().flat_map(Connection::poll_fds));
        let lingers = self.connections.iter();
        let lingers = lingers.filter_map(Connection::lingers_until);
        let next = lingers.chain(end).min();
        let left = next.map(|next| next.saturating_duration_since(Instant::now()));
        // Not a moment too early, which would be once more.
        let left = left.map(|left| left + Duration::from_millis(1));
        let left = left.map_or(Ok(PollTimeout::NONE), PollTimeout::try_from);
        match poll(&mut fds, left.unwrap_or(PollTimeout::ZERO)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                log::error!("the API is served no more: {error}");
                return None;
            }
        }
        let ready = fds
            .iter()
            .map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Some(ready.collect())
    }

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else {
            // Gone again, or no descriptor left: the next poll says.
            return;
        };
        let mut connection = match Connection::new(stream, self.limit) {
            Ok(connection) => connection,
            Err(error) => return log::warn!("an API client is turned away: {error}"),
        };
        // Streams have a limit of their own, where they begin.
        let waiting = self
            .connections
            .iter()
            .filter(|connection| !connection.is_relaying() && connection.lingers_until().is_none());
        if waiting.count() >= MAX_CONNECTIONS {
            connection.refuse(FULL);
            if connection.is_over() {
                return;
            }
        }
        self.connections.push(connection);
    }

    /// Ends the connections that only linger, beyond as many as are served: the oldest.
    fn bound_lingering(&mut self) {
        let lingers = |connection: &Connection| connection.lingers_until().is_some();
        let all = self.connections.iter().filter(|c| lingers(c)).count();
        let mut surplus = all.saturating_sub(MAX_CONNECTIONS);
        self.connections.retain(|connection| {
            let goes = surplus > 0 && lingers(connection);
            surplus -= usize::from(goes);
            !goes
        });
    }

    fn serve(&mut self, index: usize, ready: PollFlags) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        if ready.is_empty() || connection.lingers_until().is_some() {
            return;
        }
        if connection.is_relaying() {
            connection.pass(ready);
            return;
        }
        let mut goes_on = true;
        if connection.is_writing() {
            // Also where the client is gone, which the write finds out.
            connection.write();
        } else {
            goes_on = connection.read();
        }
        while let Some(request) = self.connection(index).and_then(Connection::next) {
            let (response, stream) = self.answer(index, &request);
            let Some(connection) = self.connection(index) else {
                return;
            };
            connection.answer(&response, !request.keep_alive);
            if let Some(stream) = stream {
                connection.relay(stream);
            }
        }
        if !goes_on && let Some(connection) = self.connection(index) {
            connection.close();
        }
    }

    fn connection(&mut self, index: usize) -> Option<&mut Connection> {
        self.connections.get_mut(index)
    }

    /// Asks for an action, for the client with this index, and waits for the answer.
    fn ask(&mut self, asker: usize, action: Action) -> Result<Reply, ActionError> {
        let pending = self.caller.send(action)?;
        loop {
            if let Some(result) = pending.take() {
                return result;
            }
            self.meanwhile(asker, &pending);
        }
    }

    /// Waits for something: the answer, the end of the one who asked, or what streams pass on, which they do
    /// meanwhile.
    fn meanwhile(&mut self, asker: usize, pending: &Pending) {
        let mut fds = vec![PollFd::new(pending.as_fd(), PollFlags::POLLIN)];
        let asker = self.connections.get(asker);
        // Nothing is asked of it: only its end is told then. Once is enough.
        let asker = asker.filter(|_| !pending.is_cancelled());
        fds.extend(asker.map(|asker| PollFd::new(asker.as_fd(), PollFlags::empty())));
        let first = fds.len();
        let streams = |connection: &Connection| connection.is_passing();
        let passing = self.connections.iter().filter(|c| streams(c));
        fds.extend(passing.flat_map(Connection::poll_fds));
        // What goes wrong is found out by the next look.
        let _ = poll(&mut fds, PollTimeout::NONE);
        let ready: Vec<_> = fds
            .iter()
            .map(|fd| fd.revents().unwrap_or(PollFlags::empty()))
            .collect();
        let (ours, theirs) = ready.split_at(first);
        if ours.get(1).is_some_and(|asker| !asker.is_empty()) {
            pending.cancel();
        }
        let passing = self.connections.iter_mut().filter(|c| streams(c));
        for (connection, ready) in passing.zip(theirs.chunks_exact(2)) {
            let all = ready
                .iter()
                .fold(PollFlags::empty(), |all, ready| all | *ready);
            if !all.is_empty() {
                connection.pass(all);
            }
        }
    }

    /// The answer to a request of the client with this index, and the stream that follows it, if one does.
    fn answer(&mut self, asker: usize, request: &Request) -> (Response, Option<Stream>) {
        let begin = Instant::now();
        let route = match router::find(request) {
            Ok(route) => route,
            Err(error) => return (error.response(), None),
        };
        let mut stream = None;
        let (result, deprecated) = match router::read(route, request) {
            Ok(routed) => {
                let reply = self.ask(asker, routed.action).map_err(ApiError::from);
                let response = reply.and_then(|reply| match reply {
                    Reply::Vm(vm) if router::is_metrics(route) => {
                        Ok(prometheus::response(*vm, &self.counts))
                    }
                    reply => {
                        let response = router::respond(&reply);
                        if let Reply::Stream(begun) = reply {
                            stream = Some(begun);
                        }
                        response
                    }
                });
                (response, routed.deprecated)
            }
            Err(error) => (Err(error), false),
        };
        let failed = result.is_err();
        self.counts.add(route, failed, deprecated, begin.elapsed());
        let mut response = result.unwrap_or_else(|error| error.response());
        response.deprecated = deprecated;
        (response, stream)
    }
}

#[cfg(test)]
mod tests;
