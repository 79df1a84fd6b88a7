//! What the guest asks over HTTP/1.0 or 1.1, and what it is told. Statuses and sentences are
//! Firecracker's, which programs in guests look for.

use std::fmt::Write;

use super::store::{Found, Mmds};
use super::tokens::LIFETIMES;

/// Where tokens are had.
const TOKENS: &str = "/latest/api/token";
/// Headers of a request.
const MAX_HEADERS: usize = 64;
/// A reader's token.
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
/// How long a token is to live.
const LIFETIME: [&str; 2] = [
    "X-metadata-token-ttl-seconds",
    "X-aws-ec2-metadata-token-ttl-seconds",
];
/// Who has a proxy between itself and the service gets no token.
const FORWARDED: [&str; 1] = ["X-Forwarded-For"];

/// A request's answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// As it goes over the wire.
    pub bytes: Vec<u8>,
    /// Bytes that the request took.
    pub taken: usize,
    /// Nothing comes behind it.
    pub last: bool,
}

struct Response {
    status: u16,
    json: bool,
    body: String,
    /// One more header.
    header: Option<(String, String)>,
}

impl Response {
    fn text(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            json: false,
            body: body.into(),
            header: None,
        }
    }

    fn bytes(&self, minor: u8, last: bool) -> Vec<u8> {
        let connection = if last { "close" } else { "keep-alive" };
        let kind = match self.json {
            true => "application/json",
            false => "text/plain",
        };
        let mut text = format!(
            "HTTP/1.{minor} {} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n",
            self.status
        );
        if let Some((name, value)) = &self.header {
            // Writing to a string cannot fail.
            let _ = write!(text, "{name}: {value}\r\n");
        }
        let length = self.body.len();
        let _ = write!(
            text,
            "Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        );
        text.push_str(&self.body);
        text.into_bytes()
    }
}

/// Answers the request at the start of `bytes`; `None` while it is not whole.
pub(super) fn answer(mmds: &Mmds, bytes: &[u8]) -> Option<Answer> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let taken = match request.parse(bytes) {
        Ok(httparse::Status::Complete(taken)) => taken,
        Ok(httparse::Status::Partial) => return None,
        Err(error) => {
            let response = match error {
                httparse::Error::Version => Response::text(501, "Unsupported HTTP version."),
                _ => Response::text(400, "Invalid request."),
            };
            // Where the next request would begin, nobody knows.
            return Some(Answer {
                bytes: response.bytes(1, true),
                taken: bytes.len(),
                last: true,
            });
        }
    };
    let minor = request.version.unwrap_or(1);
    let fields = Fields(request.headers);
    let has_body = ["Content-Length", "Transfer-Encoding"]
        .iter()
        .any(|name| fields.first(&[name]).is_some_and(|(_, value)| value != "0"));
    let last = has_body || fields.ends_connection(minor);
    let response = match has_body {
        true => Response::text(400, "Invalid request."),
        false => {
            let method = request.method.unwrap_or_default();
            respond(mmds, method, request.path.unwrap_or_default(), &fields)
        }
    };
    Some(Answer {
        bytes: response.bytes(minor, last),
        taken,
        last,
    })
}

fn respond(mmds: &Mmds, method: &str, target: &str, fields: &Fields<'_>) -> Response {
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => target,
    };
    if !path.starts_with('/') {
        return Response::text(400, "Invalid URI.");
    }
    match method {
        "GET" => get(mmds, path, fields),
        "PUT" => put(mmds, path, fields),
        "PATCH" | "DELETE" => Response {
            header: Some(("Allow".into(), "GET, PUT".into())),
            ..Response::text(405, "Not allowed HTTP method.")
        },
        _ => Response::text(501, "Unsupported HTTP method."),
    }
}

fn get(mmds: &Mmds, path: &str, fields: &Fields<'_>) -> Response {
    let counters = mmds.counters();
    let refusal = match fields.first(&TOKEN) {
        None => {
            counters.rx_no_token.add(1);
            Some(
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header \
                 to specify the session token.",
            )
        }
        Some((_, token)) if !mmds.is_valid(token) => {
            counters.rx_invalid_token.add(1);
            Some("MMDS token not valid.")
        }
        Some(_) => None,
    };
    if let Some(text) = refusal.filter(|_| mmds.service().sessions) {
        return Response::text(401, text);
    }
    let json = fields.accepts_json();
    match mmds.find(&without_doubles(path), json) {
        Found::Text(body) => Response {
            json,
            ..Response::text(200, body)
        },
        Found::Nothing => nothing_at(path),
        Found::NoForm => Response::text(
            501,
            "Cannot retrieve value. The value has an unsupported type.",
        ),
    }
}

fn put(mmds: &Mmds, path: &str, fields: &Fields<'_>) -> Response {
    if let Some((name, _)) = fields.first(&FORWARDED) {
        let text = format!("Invalid header. Reason: Unsupported header name. Key: {name}");
        return Response::text(400, text);
    }
    if without_doubles(path) != TOKENS {
        return nothing_at(path);
    }
    let Some((name, value)) = fields.first(&LIFETIME) else {
        return Response::text(
            400,
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let Ok(seconds) = value.parse::<u32>() else {
        let text = format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}");
        return Response::text(400, text);
    };
    if !LIFETIMES.contains(&seconds) {
        let (least, most) = (LIFETIMES.start(), LIFETIMES.end());
        let text = format!(
            "Invalid time to live value provided for token: {seconds}. Please provide a value \
             between {least} and {most}."
        );
        return Response::text(400, text);
    }
    match mmds.token(seconds) {
        Ok(token) => Response {
            header: Some((name.to_owned(), seconds.to_string())),
            ..Response::text(200, token)
        },
        Err(error) => {
            log::error!("no random numbers for a metadata token: {error}");
            Response::text(500, "No token can be made.")
        }
    }
}

fn nothing_at(path: &str) -> Response {
    Response::text(404, format!("Resource not found: {path}."))
}

/// A path with single slashes.
fn without_doubles(path: &str) -> String {
    let mut single = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !single.ends_with('/') {
            single.push(c);
        }
    }
    single
}

/// Headers of a request.
struct Fields<'a>(&'a [httparse::Header<'a>]);

impl<'a> Fields<'a> {
    /// Name and value of the first header with one of these names, if that is text.
    fn first(&self, names: &[&str]) -> Option<(&'a str, &'a str)> {
        let mut fields = self.0.iter();
        let field =
            fields.find(|field| names.iter().any(|n| field.name.eq_ignore_ascii_case(n)))?;
        Some((field.name, std::str::from_utf8(field.value).ok()?.trim()))
    }

    fn has_word(&self, name: &str, word: &str) -> bool {
        let value = self.first(&[name]).map_or("", |(_, value)| value);
        let mut words = value.split([',', ';']).map(str::trim);
        words.any(|one| one.eq_ignore_ascii_case(word))
    }

    fn accepts_json(&self) -> bool {
        self.has_word("Accept", "application/json")
    }

    fn ends_connection(&self, minor: u8) -> bool {
        let stays = minor > 0 || self.has_word("Connection", "keep-alive");
        !stays || self.has_word("Connection", "close")
    }
}
