use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use devices::mmds::Mmds;

use super::*;
use crate::api::connection::LINGER;
use crate::api::http::MAX_BODY;
use crate::control::{Instance, Preboot, channel};

/// A server whose microVM only answers before its start.
struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    api: Option<ApiThread>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (caller, requests) = channel().unwrap();
        thread::spawn(move || {
            let mut preboot = Preboot::new(
                Instance::new("x".into()),
                None,
                false,
                Arc::new(Mmds::new(1000)),
            );
            loop {
                let mut fds = [PollFd::new(requests.as_fd(), PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::NONE).unwrap();
                while let Some(call) = requests.next() {
                    let result = preboot.act(call.action.clone());
                    call.answer(result);
                }
            }
        });
        let api = Some(ApiThread::start(&path, MAX_BODY, caller).unwrap());
        Self {
            _dir: dir,
            path,
            api,
        }
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Client(stream)
    }
}

struct Client(UnixStream);

impl Client {
    fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).unwrap();
    }

    /// One answer: status and body.
    fn answer(&mut self) -> (u16, String) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head
            .lines()
            .find_map(|l| l.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |l| l.parse().unwrap())];
        self.0.read_exact(&mut body).unwrap();
        (status, String::from_utf8(body).unwrap())
    }

    fn is_closed(&mut self) -> bool {
        self.0.read(&mut [0; 1]).unwrap() == 0
    }
}

#[test]
fn requests_are_answered_in_their_order() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    let get = "GET /machine-config HTTP/1.1\r\n\r\n";
    let body = r#"{"vcpu_count":2,"mem_size_mib":256}"#;
    let put = format!(
        "PUT /machine-config HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    client.send(&[get, &put, get].concat());
    assert!(client.answer().1.contains(r#""vcpu_count":1"#));
    assert_eq!(client.answer(), (204, String::new()));
    assert!(client.answer().1.contains(r#""vcpu_count":2"#));
    for byte in "GET / HTTP/1.0\r\nConnection: close\r\n\r\n".bytes() {
        client.send(&char::from(byte).to_string());
    }
    let (status, text) = client.answer();
    assert_eq!(status, 200);
    assert!(text.contains(r#""state":"Not started""#), "{text}");
    assert!(client.is_closed());
}

#[test]
fn a_held_back_body_is_asked_for() {
    let fixture = Fixture::new();
    let mut client = fixture.connect();
    client.send("PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.answer().0, 100);
    client.send("{}");
    assert_eq!(client.answer().0, 204);
}

#[test]
fn nonsense_is_answered_and_closed() {
    let fixture = Fixture::new();
    let size = MAX_BODY + 1;
    for text in [
        "POST / HTTP/1.1\r\n\r\n".to_owned(),
        format!("PUT /drives/a HTTP/1.1\r\nContent-Length: {size}\r\n\r\n"),
        "\0".repeat(2000),
    ] {
        let mut client = fixture.connect();
        client.send(&text);
        let (status, body) = client.answer();
        assert_eq!(status, 400);
        assert!(body.contains(r#"{"error":"#), "{body}");
        assert!(client.is_closed());
    }
}

#[test]
fn an_answer_to_what_is_not_read_comes_to_its_end() {
    let fixture = Fixture::new();
    let body = "x".repeat(2 << 20);
    let mut client = fixture.connect();
    // All of it can be written, though nobody wants it, and others are answered meanwhile.
    client.send(&format!(
        "PUT /mmds HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        body.len()
    ));
    let (first, second) = body.split_at(body.len() / 2);
    client.send(first);
    let mut other = fixture.connect();
    other.send("GET /version HTTP/1.1\r\n\r\n");
    assert_eq!(other.answer().0, 200);
    client.send(second);
    assert_eq!(client.answer().0, 400);
    assert!(client.is_closed());
    // One that is turned away had sent something, too.
    let _all: Vec<_> = (0..MAX_CONNECTIONS).map(|_| fixture.connect()).collect();
    let mut late = fixture.connect();
    late.send("GET /version HTTP/1.1\r\n\r\n");
    assert_eq!(late.answer().0, 503);
    assert!(late.is_closed());
}

#[test]
fn a_client_that_never_ends_is_ended() {
    let fixture = Fixture::new();
    // What is before the end comes within this, unless the machine is too busy.
    let in_time = |begin: Instant| begin.elapsed() < LINGER;
    let soon = |what: &dyn Fn(Instant) -> bool| {
        let done = (0..20).any(|_| {
            let begin = Instant::now();
            let done = what(begin);
            assert!(done || !in_time(begin));
            done
        });
        assert!(done);
    };
    // By time.
    soon(&|begin| {
        let mut quiet = fixture.connect();
        quiet.send("POST / HTTP/1.1\r\n\r\n");
        assert_eq!(quiet.answer().0, 400);
        assert!(quiet.is_closed());
        let lingers = quiet.0.write_all(b"more").is_ok();
        while quiet.0.write_all(b"more").is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(10));
        }
        lingers
    });
    // By bytes.
    soon(&|begin| {
        let mut loud = fixture.connect();
        let sent = std::iter::repeat_with(|| loud.0.write(&[b'x'; 4096])).take_while(Result::is_ok);
        let sent = sent.map(Result::unwrap).sum::<usize>();
        assert!(sent < 8 << 20, "{sent}");
        sent > 4 << 20 && in_time(begin)
    });
    // By the number of others, and they take nobody's place.
    let turned = || {
        let mut client = fixture.connect();
        client.send("POST / HTTP/1.1\r\n\r\n");
        assert_eq!(client.answer().0, 400);
        client
    };
    let mut many: Vec<_> = (0..2 * MAX_CONNECTIONS).map(|_| turned()).collect();
    assert!(many[0].0.write_all(b"more").is_err());
    soon(&|_| turned().0.write_all(b"more").is_ok());
}

#[test]
fn the_eleventh_client_is_turned_away_until_one_goes() {
    let fixture = Fixture::new();
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(|_| fixture.connect()).collect();
    for client in &mut clients {
        client.send("GET /version HTTP/1.1\r\n\r\n");
        assert_eq!(client.answer().0, 200);
    }
    let mut late = fixture.connect();
    let (status, body) = late.answer();
    assert_eq!(
        (status, body.as_str()),
        (503, r#"{ "error": "Too many open connections" }"#)
    );
    assert!(late.is_closed());
    clients.pop();
    // The server sees the end at some time.
    let answered = (0..200).any(|_| {
        thread::sleep(Duration::from_millis(10));
        let mut client = fixture.connect();
        let _ = client.0.write_all(b"GET /version HTTP/1.1\r\n\r\n");
        client.answer().0 == 200
    });
    assert!(answered);
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let fixture = Fixture::new();
    let mut deaf = fixture.connect();
    deaf.0.set_nonblocking(true).unwrap();
    let many = "GET /vm/config HTTP/1.1\r\n\r\n".repeat(1000);
    while deaf.0.write(many.as_bytes()).is_ok() {}
    let mut client = fixture.connect();
    client.send("GET /version HTTP/1.1\r\n\r\n");
    assert_eq!(client.answer().0, 200);
}

#[test]
fn the_end_closes_all_and_removes_the_socket() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    client.send("GET /version HTTP/1.1\r\n\r\n");
    client.answer();
    let (caller, _requests) = channel().unwrap();
    let error = ApiThread::start(&fixture.path, MAX_BODY, caller)
        .err()
        .unwrap();
    assert!(matches!(error, ServerError::Exists { .. }));
    fixture.api = None;
    assert!(client.is_closed());
    assert!(!fixture.path.exists());
}

#[test]
fn while_an_answer_is_waited_for_streams_go_on_and_the_end_of_its_caller_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let (caller, requests) = channel().unwrap();
    let api = ApiThread::start(&path, MAX_BODY, caller).unwrap();
    let connect = || {
        let stream = UnixStream::connect(&path).unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        Client(stream)
    };
    let next = || loop {
        let mut fds = [PollFd::new(requests.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, 20_000_u16), Ok(1));
        if let Some(call) = requests.next() {
            return call;
        }
    };
    let mut listener = connect();
    listener.send("GET /events HTTP/1.1\r\n\r\n");
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let stream = Stream {
        content_type: "text/event-stream",
        end: Arc::new(theirs),
    };
    next().answer(Ok(Reply::Stream(stream)));
    assert_eq!(listener.answer().0, 200);
    // Nobody answers yet, and the stream passes on what comes.
    let mut asker = connect();
    asker.send("GET /version HTTP/1.1\r\n\r\n");
    let call = next();
    ours.write_all(b"event").unwrap();
    let mut heard = [0; 5];
    listener.0.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"event");
    let cancelled = || call.cancelled().load(std::sync::atomic::Ordering::SeqCst);
    // Others are served.
    let mut other = connect();
    other.send("GET /version HTTP/1.1\r\n\r\n");
    next().answer(Ok(Reply::Version("1")));
    assert_eq!(other.answer().0, 200);
    // One that sends no more still waits; one that is gone does not.
    asker.0.shutdown(std::net::Shutdown::Write).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert!(!cancelled());
    drop(asker);
    let begin = Instant::now();
    while !cancelled() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(1));
    }
    call.answer(Ok(Reply::Done));
    // One that is dropped is an answer as well.
    other.send("GET /version HTTP/1.1\r\n\r\n");
    drop(next());
    assert_eq!(other.answer().0, 400);
    drop((ours, requests, api));
}
