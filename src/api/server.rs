//! The API thread: a listening socket, at most [`MAX_CONNECTIONS`] clients, of each one action at a time.
//!
//! It blocks in poll only, and costs nothing while nobody asks. The vmm thread takes actions in turn; one whose
//! answer takes long holds up neither streams nor, where that thread goes on, other clients.

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

use super::connection::{Connection, Waiting};
use super::counts::Counts;
use super::error::ApiError;
use super::http::{FULL, Request, Response};
use super::{prometheus, router};
use crate::control::{ActionError, Caller, Reply, Stream};
use crate::sandbox::thread::{Role, ThreadError, spawn};

/// Clients at a time; one more is turned away.
pub const MAX_CONNECTIONS: usize = 10;

/// How long streams may take to be taken to their ends, once the microVM has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long nobody is let in where this process can have no more descriptors: the listener would go on to be ready.
const NO_ROOM: Duration = Duration::from_millis(100);

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
            rests_until: None,
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
    /// Nobody is let in before.
    rests_until: Option<Instant>,
    limit: usize,
    caller: Caller,
    counts: Arc<Counts>,
}

impl Server {
    fn run(mut self) {
        let mut end = None;
        while let Some(ready) = self.wait(end) {
            let [stop, new, answered, old @ ..] = ready.as_slice() else {
                return;
            };
            for (index, ready) in old.chunks_exact(2).enumerate() {
                let all = ready
                    .iter()
                    .fold(PollFlags::empty(), |all, ready| all | *ready);
                self.serve(index, all);
            }
            if !answered.is_empty() {
                self.caller.clear();
                (0..self.connections.len()).for_each(|index| self.answer(index));
            }
            self.connections
                .retain_mut(|connection| !connection.is_over());
            self.rests_until = self.rests_until.filter(|until| *until > Instant::now());
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

    /// What the stop event, the listener and answers are ready for, and each connection twice: its client, and the
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
        let listened = match self.rests_until {
            None => wanted,
            Some(_) => PollFlags::empty(),
        };
        let mut fds = vec![
            PollFd::new(stop, wanted),
            PollFd::new(self.listener.as_fd(), listened),
            PollFd::new(self.caller.as_fd(), PollFlags::POLLIN),
        ];
        let connections = self.connections.iter();
        fds.extend(connections.flat_map(|connection| connection.poll_fds(stop)));
        let lingers = self.connections.iter();
        let lingers = lingers.filter_map(Connection::lingers_until);
        let next = lingers.chain(end).chain(self.rests_until).min();
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
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            // It is gone again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                log::debug!("an API client waits: {error}");
                self.rests_until = Some(Instant::now() + NO_ROOM);
                return;
            }
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
        if connection.is_waiting() {
            return connection.hang_up();
        }
        if connection.is_relaying() {
            connection.pass(ready);
            return;
        }
        if connection.is_writing() {
            // Also where the client is gone, which the write finds out.
            connection.write();
        } else if !connection.read() {
            connection.ends();
        }
        self.take_requests(index);
    }

    /// Does what a client asks, until it has to wait.
    fn take_requests(&mut self, index: usize) {
        while let Some(connection) = self.connections.get_mut(index)
            && let Some(request) = connection.next()
        {
            match begin(&self.caller, &self.counts, &request) {
                Ok(waiting) => connection.wait(waiting),
                Err(response) => connection.answer(&response, !request.keep_alive),
            }
        }
        if let Some(connection) = self.connections.get_mut(index) {
            connection.close_if_ended();
        }
    }

    /// Answers a client whose answer is there.
    fn answer(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index) else {
            return;
        };
        let Some((waiting, result)) = connection.take_answer() else {
            return;
        };
        let (response, stream) = respond(&self.counts, &waiting, result);
        connection.answer(&response, !waiting.keep_alive);
        if let Some(stream) = stream {
            connection.relay(stream);
        }
        self.take_requests(index);
    }
}

/// Hands a request over; its answer if there is nothing to wait for.
fn begin(caller: &Caller, counts: &Counts, request: &Request) -> Result<Waiting, Response> {
    let begin = Instant::now();
    let route = router::find(request).map_err(|error| error.response())?;
    let sent = router::read(route, request).and_then(|routed| {
        let deprecated = routed.deprecated;
        Ok((caller.send(routed.action)?, deprecated))
    });
    match sent {
        Ok((pending, deprecated)) => Ok(Waiting {
            pending,
            route,
            begin,
            deprecated,
            keep_alive: request.keep_alive,
        }),
        Err(error) => {
            counts.add(route, true, false, begin.elapsed());
            Err(error.response())
        }
    }
}

/// The answer to a request, and the stream that follows it, if one does.
fn respond(
    counts: &Counts,
    waiting: &Waiting,
    result: Result<Reply, ActionError>,
) -> (Response, Option<Stream>) {
    let &Waiting {
        route, deprecated, ..
    } = waiting;
    let mut stream = None;
    let result = result
        .map_err(ApiError::from)
        .and_then(|reply| match reply {
            Reply::Vm(vm) if router::is_metrics(route) => Ok(prometheus::response(*vm, counts)),
            reply => {
                let response = router::respond(&reply);
                if let Reply::Stream(begun) = reply {
                    stream = Some(begun);
                }
                response
            }
        });
    counts.add(route, result.is_err(), deprecated, waiting.begin.elapsed());
    let mut response = result.unwrap_or_else(|error| error.response());
    response.deprecated = deprecated;
    (response, stream)
}

#[cfg(test)]
mod tests;
