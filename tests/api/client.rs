//! A client of the API, as plain as can be.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// Fails the test unless it is done, with nothing to say.
    #[track_caller]
    pub fn done(self) -> Self {
        assert_eq!((self.status, self.body.as_str()), (204, ""), "{self:#?}");
        self
    }

    /// What was asked for.
    #[track_caller]
    pub fn value(self) -> Value {
        assert_eq!(self.status, 200, "{self:#?}");
        assert!(self.head.contains("\r\nContent-Type: application/json\r\n"));
        serde_json::from_str(&self.body).unwrap()
    }

    /// Fails the test unless it is refused, for a reason that has all of `words`.
    #[track_caller]
    pub fn refused(self, words: &[&str]) -> Self {
        self.refused_as(400, words)
    }

    /// The same, for a reason that programs call `code`.
    #[track_caller]
    pub fn refused_with(self, code: &str, words: &[&str]) {
        let body: Value = serde_json::from_str(&self.body).unwrap();
        assert_eq!(body["code"], code, "{self:#?}");
        self.refused(words);
    }

    /// The same, with another status.
    #[track_caller]
    pub fn refused_as(self, status: u16, words: &[&str]) -> Self {
        assert_eq!(self.status, status, "{self:#?}");
        let value: Value = serde_json::from_str(&self.body).unwrap();
        let text = value["fault_message"].as_str().unwrap();
        for word in words {
            assert!(text.contains(word), "no {word:?} in {text:?}");
        }
        assert!(value["code"].is_string(), "{value}");
        self
    }
}

/// A connection.
pub struct Client(UnixStream);

impl Client {
    /// Waits until somebody answers at `path`.
    pub fn connect(path: &Path) -> Self {
        let begin = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    let patience = Some(Duration::from_secs(60));
                    stream.set_read_timeout(patience).unwrap();
                    return Self(stream);
                }
                // A process starts slowly in an emulated host.
                Err(error) => assert!(begin.elapsed() < Duration::from_secs(100), "{error}"),
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Reads one answer.
    #[track_caller]
    pub fn answer(&mut self) -> Answer {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let lengths = |line: &str| line.strip_prefix("Content-Length: ")?.parse().ok();
        let mut body = vec![0; head.lines().find_map(lengths).unwrap_or(0)];
        self.0.read_exact(&mut body).unwrap();
        let body = String::from_utf8(body).unwrap();
        Answer { status, head, body }
    }

    /// One request, answered.
    #[track_caller]
    pub fn ask(&mut self, method: &str, path: &str, body: &str) -> Answer {
        self.send(request(method, path, body).as_bytes());
        self.answer()
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }
}

/// A request as text.
pub fn request(method: &str, path: &str, body: &str) -> String {
    let length = match body.len() {
        0 => String::new(),
        length => format!("Content-Length: {length}\r\n"),
    };
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}")
}
