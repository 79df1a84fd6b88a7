//! HTTP/1.0 and 1.1 as far as clients of a microVM speak it: bytes to requests, responses to bytes.
//!
//! Pure and bounded: a head has at most [`MAX_HEADERS`] lines of [`MAX_LINE`] bytes, a body at most
//! what the server allows, told by Content-Length. Pipelined requests are taken one after the other.
//! The look of responses (no reason phrase, the order of headers) is Firecracker's, whose clients
//! compare it.

use std::fmt::Write;

/// Bytes of the request line or of a header, the end of the line included.
pub const MAX_LINE: usize = 1024;
/// Headers of a request.
pub const MAX_HEADERS: usize = 64;
/// Bytes of a body, if nothing else is asked for.
pub const MAX_BODY: usize = 51_200;

/// Content type of most bodies.
const JSON: &str = "application/json";

/// What is said before a body that the client holds back (`Expect: 100-continue`).
pub const CONTINUE: &[u8] =
    b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
/// What a client gets for which there is no place.
pub const FULL: &[u8] = b"HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\n\
    Content-Type: application/json\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }";

/// Request methods that there are answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET
    Get,
    /// PUT
    Put,
    /// PATCH
    Patch,
    /// DELETE
    Delete,
}

impl Method {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "GET" => Some(Self::Get),
            "PUT" => Some(Self::Put),
            "PATCH" => Some(Self::Patch),
            "DELETE" => Some(Self::Delete),
            _ => None,
        }
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }
}

/// A request, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// With what: an absolute path, without query.
    pub path: String,
    /// What follows the path behind a question mark.
    pub query: String,
    /// The body, empty where there is none.
    pub body: Vec<u8>,
    /// The client goes on with this connection.
    pub keep_alive: bool,
}

/// What the bytes received so far come to.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// More must come. `wait` says that the client holds its body back until it is told to go on.
    Incomplete {
        /// See [`CONTINUE`].
        wait: bool,
    },
    /// A request, and how many bytes it took.
    Request(Request, usize),
}

/// Bytes that are no request.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// A line of the head.
    #[error("Invalid request: a line of the request has more than {MAX_LINE} bytes.")]
    Line,
    /// More headers than any client sends.
    #[error("Invalid request: it has more than {MAX_HEADERS} headers.")]
    Headers,
    /// No HTTP.
    #[error("Invalid request: {0}.")]
    Syntax(httparse::Error),
    /// A method that nothing has.
    #[error("Invalid HTTP Method: Unsupported HTTP method.")]
    Method,
    /// A target that is neither a path nor an http:// address.
    #[error("Invalid URI: URI not valid.")]
    Target,
    /// Content-Length that is no number, or given twice.
    #[error("Invalid content length.")]
    Length,
    /// A body without a length.
    #[error("Unsupported header: Transfer-Encoding. Send the body with Content-Length.")]
    Encoding,
    /// The client takes no plain answer.
    #[error("Invalid value. Key:Accept-Encoding; Value:{0}")]
    AcceptEncoding(String),
    /// A body beyond the limit.
    #[error(
        "Request payload with size {size} is larger than the limit of {limit} allowed by server."
    )]
    Body {
        /// As announced, in bytes.
        size: u64,
        /// In bytes.
        limit: usize,
    },
}

/// Looks for a request at the start of `bytes`, with a body of at most `limit` bytes.
pub fn parse(bytes: &[u8], limit: usize) -> Result<Parsed, HttpError> {
    let Some(head_len) = head_length(bytes)? else {
        return Ok(Parsed::Incomplete { wait: false });
    };
    let head = bytes.get(..head_len).unwrap_or_default();
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(head) {
        Ok(_) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(HttpError::Headers),
        Err(error) => return Err(HttpError::Syntax(error)),
    }
    let method = Method::parse(parsed.method.unwrap_or_default()).ok_or(HttpError::Method)?;
    let (path, query) = path_of(parsed.path.unwrap_or_default()).ok_or(HttpError::Target)?;
    let fields = Fields::read(parsed.headers)?;
    if fields.length > limit as u64 {
        let size = fields.length;
        return Err(HttpError::Body { size, limit });
    }
    let end = head_len + fields.length as usize;
    match bytes.get(head_len..end) {
        None => Ok(Parsed::Incomplete {
            wait: fields.waits && bytes.len() == head_len,
        }),
        Some(body) => {
            let request = Request {
                method,
                path,
                query,
                body: body.to_vec(),
                keep_alive: fields.keep_alive,
            };
            Ok(Parsed::Request(request, end))
        }
    }
}

/// Bytes up to and with the empty line, once that is there. Lines are bounded before.
fn head_length(bytes: &[u8]) -> Result<Option<usize>, HttpError> {
    let mut at = 0;
    for _ in 0..MAX_HEADERS + 2 {
        let rest = bytes.get(at..).unwrap_or_default();
        let window = rest.get(..MAX_LINE).unwrap_or(rest);
        let Some(len) = window.iter().position(|byte| *byte == b'\n') else {
            return if window.len() == MAX_LINE {
                Err(HttpError::Line)
            } else {
                Ok(None)
            };
        };
        at += len + 1;
        if matches!(window.get(..len), Some(b"" | b"\r")) {
            return Ok(Some(at));
        }
    }
    Err(HttpError::Headers)
}

/// The headers that matter.
struct Fields {
    length: u64,
    waits: bool,
    keep_alive: bool,
}

impl Fields {
    fn read(headers: &[httparse::Header<'_>]) -> Result<Self, HttpError> {
        let mut length = None;
        let mut fields = Self {
            length: 0,
            waits: false,
            // Also of HTTP/1.0: clients of Firecracker, which closes none, rely on it.
            keep_alive: true,
        };
        for header in headers {
            let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            if is("content-length") {
                let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
                let parsed = value.parse::<u64>().ok().filter(|_| digits);
                if length.is_some() || parsed.is_none() {
                    return Err(HttpError::Length);
                }
                length = parsed;
            } else if is("transfer-encoding") && !value.eq_ignore_ascii_case("identity") {
                return Err(HttpError::Encoding);
            } else if is("expect") {
                fields.waits = value.eq_ignore_ascii_case("100-continue");
            } else if is("connection") {
                let has = |word: &str| {
                    value
                        .split(',')
                        .any(|w| w.trim().eq_ignore_ascii_case(word))
                };
                fields.keep_alive = !has("close");
            } else if is("accept-encoding") && forbids_identity(value) {
                return Err(HttpError::AcceptEncoding(value.to_owned()));
            }
        }
        fields.length = length.unwrap_or(0);
        Ok(fields)
    }
}

/// Whether a list of encodings rules the plain one out (RFC 9110, section 12.5.3).
fn forbids_identity(value: &str) -> bool {
    let weight = |name: &str| {
        value.split(',').find_map(|item| {
            let mut parts = item.split(';').map(str::trim);
            let same = parts.next()?.eq_ignore_ascii_case(name);
            let q = parts.find_map(|part| part.strip_prefix("q=")?.parse::<f32>().ok());
            same.then_some(q.unwrap_or(1.0))
        })
    };
    weight("identity").or_else(|| weight("*")) == Some(0.0)
}

/// The path of a request target, as it is or behind an authority, and the query behind it.
fn path_of(target: &str) -> Option<(String, String)> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => match rest.find('/') {
            Some(at) => rest.get(at..)?,
            None => "/",
        },
        None => target,
    };
    let path = path.split('#').next()?;
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    path.starts_with('/')
        .then(|| (path.to_owned(), query.to_owned()))
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Absent for an answer without content.
    pub body: Option<String>,
    /// What the body is.
    pub content_type: &'static str,
    /// The body comes later, and ends with the connection.
    pub streaming: bool,
    /// The client used something that will go.
    pub deprecated: bool,
}

impl Response {
    /// A JSON body.
    pub fn json(status: u16, body: String) -> Self {
        Self {
            status,
            ..Self::text(JSON, body)
        }
    }

    /// A body of another type.
    pub fn text(content_type: &'static str, body: String) -> Self {
        Self {
            status: 200,
            body: Some(body),
            content_type,
            streaming: false,
            deprecated: false,
        }
    }

    /// A body that comes later.
    pub fn stream(content_type: &'static str) -> Self {
        Self {
            body: None,
            streaming: true,
            ..Self::text(content_type, String::new())
        }
    }

    /// Done, and nothing to say.
    pub fn empty() -> Self {
        Self {
            status: 204,
            body: None,
            content_type: JSON,
            streaming: false,
            deprecated: false,
        }
    }

    /// As it goes over the wire. `close` tells the client that nothing more comes.
    pub fn bytes(&self, close: bool) -> Vec<u8> {
        let connection = if close || self.streaming {
            "close"
        } else {
            "keep-alive"
        };
        let mut head = format!(
            "HTTP/1.1 {} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n",
            self.status
        );
        if self.deprecated {
            head.push_str("Deprecation: true\r\n");
        }
        if let Some(body) = &self.body {
            // Writing to a string cannot fail.
            let _ = write!(
                head,
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                body.len()
            );
        }
        if self.streaming {
            let _ = write!(head, "Content-Type: {}\r\n", self.content_type);
        }
        head.push_str("\r\n");
        head.push_str(self.body.as_deref().unwrap_or_default());
        head.into_bytes()
    }
}

#[cfg(test)]
mod tests;
