//! A client of one microVM's control socket, for bulle's own commands.
//!
//! One request at a time, answered within [`PATIENCE`]; nothing is kept of an answer beyond [`MAX_ANSWER`] bytes.

mod stream;

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use stream::{Heard, RemoteStream};

use crate::registry::Entry;

/// How long an answer may take. Pausing may take [`crate::control::PAUSE_PATIENCE`].
const PATIENCE: Duration = Duration::from_secs(35);
/// The same for a question about the state, which is answered at once.
pub const GLANCE: Duration = Duration::from_secs(2);
/// How long a microVM that lives may take to open its socket, and the time between two attempts.
const OPENING: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(5);
/// Most bytes of an answer.
const MAX_ANSWER: usize = 64 << 20;
/// Most bytes of its head.
const MAX_HEAD: usize = 16 << 10;

/// A microVM that does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It is not there any more.
    #[error("The microVM '{name}' has ended meanwhile")]
    Gone {
        /// Its name.
        name: String,
    },
    /// It is somebody else's.
    #[error("Not permitted to manage the microVM '{name}': it belongs to another user")]
    NotPermitted {
        /// Its name.
        name: String,
    },
    /// It does not answer.
    #[error(
        "The microVM '{name}' does not answer within {} s: its process hangs; `bulle kill {name}` ends it",
        patience.as_secs()
    )]
    Silent {
        /// Its name.
        name: String,
        /// How long was waited.
        patience: Duration,
    },
    /// It refuses.
    #[error("The microVM '{name}' refuses: {text}")]
    Refused {
        /// Its name.
        name: String,
        /// The word for programs.
        code: String,
        /// Why.
        text: String,
    },
    /// It answers something else than was asked.
    #[error("The microVM '{name}' answers what nobody understands: {what}")]
    Strange {
        /// Its name.
        name: String,
        /// What is wrong.
        what: &'static str,
    },
    /// The socket.
    #[error("Cannot talk to the microVM '{name}'")]
    Io {
        /// Its name.
        name: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

impl RemoteError {
    /// Whether it is that there is nobody any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }

    /// Whether it refuses with this word.
    pub fn is_refused(&self, word: &str) -> bool {
        matches!(self, Self::Refused { code, .. } if code == word)
    }
}

/// A connection to a microVM.
#[derive(Debug)]
pub struct Remote {
    name: String,
    stream: UnixStream,
    patience: Duration,
}

/// The body of a refusal.
#[derive(Deserialize)]
struct Refusal {
    #[serde(alias = "error")]
    fault_message: String,
    #[serde(default)]
    code: String,
}

/// Whether nobody listens although the microVM lives: it opens its socket some time after the start.
fn is_early(error: &io::Error, entry: &Entry) -> bool {
    let nobody = matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    );
    nobody && entry.is_alive()
}

impl Remote {
    /// Connects to the microVM of `entry`.
    pub fn connect(entry: &Entry) -> Result<Self, RemoteError> {
        let name = entry.name.clone();
        let begin = Instant::now();
        let stream = loop {
            match UnixStream::connect(entry.socket()) {
                Err(error) if is_early(&error, entry) && begin.elapsed() < OPENING => {
                    std::thread::sleep(RETRY);
                }
                stream => break stream,
            }
        };
        let stream = stream.map_err(|source| failed(&name, PATIENCE, source))?;
        let patience = PATIENCE;
        Ok(Self {
            name,
            stream,
            patience,
        })
    }

    /// With another patience than the usual.
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Asks something, and waits for the answer, which may be empty.
    pub fn ask(&mut self, method: &str, path: &str, body: &str) -> Result<Vec<u8>, RemoteError> {
        self.send(method, path, body)?;
        self.receive()
    }

    /// Asks something whose answer is waited for elsewhere: [`receive`](Self::receive) takes it when the
    /// descriptor is readable.
    pub fn send(&mut self, method: &str, path: &str, body: &str) -> Result<(), RemoteError> {
        let sent = self.request(method, path, body);
        sent.map_err(|error| failed(&self.name, self.patience, error))
    }

    /// The answer to what was sent last.
    pub fn receive(&mut self) -> Result<Vec<u8>, RemoteError> {
        let answer = self.answer();
        let (status, body) = answer.map_err(|error| failed(&self.name, self.patience, error))?;
        match status {
            200 | 204 => Ok(body),
            _ => Err(self.refusal(&body)),
        }
    }

    /// As [`ask`](Self::ask), for what is answered with JSON.
    pub fn get(&mut self, path: &str) -> Result<Value, RemoteError> {
        let body = self.ask("GET", path, "")?;
        self.parse(&body)
    }

    /// An answer, as JSON.
    pub fn parse<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, RemoteError> {
        serde_json::from_slice(body).map_err(|_| self.strange("no JSON"))
    }

    /// Asks for what is answered with a stream, which goes on until either side ends it.
    pub fn stream(
        mut self,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<RemoteStream, RemoteError> {
        let answered = self.request(method, path, body).and_then(|()| self.head());
        let (status, length) =
            answered.map_err(|error| failed(&self.name, self.patience, error))?;
        if status != 200 {
            let mut body = vec![0; length.unwrap_or(0)];
            let read = self.stream.read_exact(&mut body);
            read.map_err(|error| failed(&self.name, self.patience, error))?;
            return Err(self.refusal(&body));
        }
        let (name, patience) = (self.name.clone(), self.patience);
        RemoteStream::new(self.name, self.stream).map_err(|error| failed(&name, patience, error))
    }

    /// As [`ask`](Self::ask), for an action.
    pub fn action(&mut self, action: &str) -> Result<(), RemoteError> {
        let body = format!(r#"{{"action_type":"{action}"}}"#);
        self.ask("PUT", "/actions", &body).map(drop)
    }

    /// Its state: `Not started`, `Running` or `Paused`.
    pub fn state(&mut self) -> Result<String, RemoteError> {
        let instance = self.get("/")?;
        let state = instance["state"].as_str().map(str::to_owned);
        state.ok_or_else(|| self.strange("no state"))
    }

    fn strange(&self, what: &'static str) -> RemoteError {
        let name = self.name.clone();
        RemoteError::Strange { name, what }
    }

    fn refusal(&self, body: &[u8]) -> RemoteError {
        match serde_json::from_slice::<Refusal>(body) {
            Ok(refusal) => RemoteError::Refused {
                name: self.name.clone(),
                code: refusal.code,
                text: refusal.fault_message,
            },
            Err(_) => self.strange("no reason"),
        }
    }

    fn answer(&mut self) -> io::Result<(u16, Vec<u8>)> {
        let (status, length) = self.head()?;
        let mut body = vec![0; length.unwrap_or(0)];
        self.stream.read_exact(&mut body)?;
        Ok((status, body))
    }

    fn request(&mut self, method: &str, path: &str, body: &str) -> io::Result<()> {
        self.stream.set_write_timeout(Some(self.patience))?;
        self.stream.set_read_timeout(Some(self.patience))?;
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.stream.write_all(request.as_bytes())
    }

    /// Reads the head of an answer: its status, and the length of what follows, where that is said.
    fn head(&mut self) -> io::Result<(u16, Option<usize>)> {
        let bad = || io::Error::from(ErrorKind::InvalidData);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            head.extend(byte);
            if head.len() > MAX_HEAD {
                return Err(bad());
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        response.parse(&head).map_err(|_| bad())?;
        let status = response.code.ok_or_else(bad)?;
        let mut fields = response.headers.iter();
        let length = fields.find(|field| field.name.eq_ignore_ascii_case("content-length"));
        let length = match length {
            None => None,
            Some(field) => {
                let text = std::str::from_utf8(field.value).map_err(|_| bad())?;
                let length = text.trim().parse::<usize>().map_err(|_| bad())?;
                Some(length)
                    .filter(|length| *length <= MAX_ANSWER)
                    .ok_or_else(bad)
                    .map(Some)?
            }
        };
        Ok((status, length))
    }
}

impl AsFd for Remote {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn failed(name: &str, patience: Duration, source: io::Error) -> RemoteError {
    let name = name.to_owned();
    match source.kind() {
        ErrorKind::NotFound
        | ErrorKind::ConnectionRefused
        | ErrorKind::ConnectionReset
        | ErrorKind::BrokenPipe
        | ErrorKind::UnexpectedEof => RemoteError::Gone { name },
        ErrorKind::PermissionDenied => RemoteError::NotPermitted { name },
        ErrorKind::WouldBlock | ErrorKind::TimedOut => RemoteError::Silent { name, patience },
        ErrorKind::InvalidData => RemoteError::Strange {
            name,
            what: "no HTTP",
        },
        _ => RemoteError::Io { name, source },
    }
}
