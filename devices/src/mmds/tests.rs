mod guest;
mod hostile;

use std::net::Ipv4Addr;
use std::sync::Arc;

use serde_json::json;

use self::guest::{Guest, lines};
use super::*;
use crate::virtio::net::{DETOUR_HEAD, Detour};

fn document() -> serde_json::Value {
    json!({
        "latest": { "meta-data": { "ami-id": "ami-1", "tags": { "a": "b" } } },
        "number": 1,
    })
}

fn served(service: Service) -> Guest {
    let mmds = Arc::new(Mmds::new(DEFAULT_LIMIT));
    mmds.put(document()).unwrap();
    mmds.serve(service);
    Guest::new(mmds)
}

fn v2() -> Guest {
    served(Service {
        sessions: true,
        ..Service::default()
    })
}

#[test]
fn a_guest_reads_in_either_format() {
    let mut guest = served(Service::default());
    let answer = guest.ask("GET /latest/meta-data HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(
        answer,
        "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
         Content-Type: text/plain\r\nContent-Length: 12\r\n\r\nami-id\ntags/"
    );
    let accept = "accept: application/json\r\n\r\n";
    let answer = guest.ask(&format!("GET //latest///meta-data/ HTTP/1.0\r\n{accept}"));
    assert_eq!(
        answer,
        "HTTP/1.0 200 \r\nServer: Firecracker API\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: 35\r\n\r\n\
         {\"ami-id\":\"ami-1\",\"tags\":{\"a\":\"b\"}}"
    );
    let address = "GET http://169.254.169.254/latest/meta-data/ami-id HTTP/1.1\r\n\r\n";
    assert_eq!(lines(&guest.ask(address)), ("200", "ami-1".into()));
    let count = |name: &str| {
        let mut all = guest.mmds.counters().values();
        all.find(|(one, _)| *one == name).unwrap().1
    };
    assert_eq!((count("rx_no_token"), count("connections_created")), (3, 3));
    assert!(count("rx_count") > 6 && count("tx_count") > 6 && count("tx_bytes") > 300);
}

#[test]
fn sessions_need_tokens() {
    let mut guest = v2();
    let mut ask = |text: &str| {
        let answer = guest.ask(&format!("{text}\r\n\r\n"));
        let (status, body) = lines(&answer);
        (status.to_owned(), body, answer)
    };
    let (status, text, _) = ask("GET / HTTP/1.1");
    assert_eq!(status, "401");
    assert!(text.starts_with("No MMDS token provided. Use `X-metadata-token`"));
    let (status, text, _) = ask("GET / HTTP/1.1\r\nX-metadata-token: foo");
    assert_eq!(
        (status.as_str(), text.as_str()),
        ("401", "MMDS token not valid.")
    );
    for (name, reader) in [
        ("X-metadata-token-ttl-seconds", "X-metadata-token"),
        (
            "x-aws-ec2-metadata-token-ttl-seconds",
            "X-AWS-EC2-metadata-token",
        ),
    ] {
        let put = format!("PUT /latest/api/token HTTP/1.1\r\nContent-Length: 0\r\n{name}: 60");
        let (status, token, answer) = ask(&put);
        assert_eq!((status.as_str(), token.len()), ("200", 48));
        assert!(answer.contains(&format!("\r\n{name}: 60\r\n")), "{answer}");
        let get = format!("GET /latest/meta-data/ami-id HTTP/1.1\r\n{reader}: {token}");
        assert_eq!(ask(&get).1, "ami-1");
        assert_eq!(
            lines(&v2().ask(&format!("{get}\r\n\r\n"))).0,
            "401",
            "of another VM"
        );
    }
    for (request, status, text) in [
        (
            "PUT /latest/api/token HTTP/1.1",
            "400",
            "Token time to live value not found.",
        ),
        (
            "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 0",
            "400",
            "Invalid time to live value provided for token: 0. Please provide a value between 1 and 21600.",
        ),
        (
            "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 21601",
            "400",
            "Invalid time to live value provided for token: 21601.",
        ),
        (
            "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: x",
            "400",
            "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:x",
        ),
        (
            "PUT / HTTP/1.1\r\nX-Forwarded-For: foo",
            "400",
            "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
        ),
        (
            "PUT /latest/api/toke HTTP/1.1",
            "404",
            "Resource not found: /latest/api/toke.",
        ),
    ] {
        let (got, body, _) = ask(request);
        assert_eq!(got, status, "{request}");
        assert!(body.starts_with(text), "{request}: {body}");
    }
}

#[test]
fn what_cannot_be_had_is_said() {
    let mut guest = served(Service::default());
    for (request, status, text) in [
        (
            "GET /nothing HTTP/1.1",
            "404",
            "Resource not found: /nothing.",
        ),
        (
            "GET /number HTTP/1.1",
            "501",
            "Cannot retrieve value. The value has an unsupported type.",
        ),
        ("PATCH / HTTP/1.1", "405", "Not allowed HTTP method."),
        ("POST / HTTP/1.1", "501", "Unsupported HTTP method."),
        ("GET / HTTP/2.0", "501", "Unsupported HTTP version."),
        (
            "GET / HTTP/1.1\r\nContent-Length: 100",
            "400",
            "Invalid request.",
        ),
        (
            "GET / HTTP/1.1\r\nTransfer-Encoding: chunked",
            "400",
            "Invalid request.",
        ),
        ("\x01", "400", "Invalid request."),
        ("GET x HTTP/1.1", "400", "Invalid URI."),
    ] {
        let answer = guest.ask(&format!("{request}\r\n\r\n"));
        assert_eq!(lines(&answer), (status, text.to_owned()), "{request}");
        assert_eq!(status == "405", answer.contains("\r\nAllow: GET, PUT\r\n"));
    }
    let empty = Arc::new(Mmds::new(10));
    assert_eq!(
        lines(&Guest::new(empty).ask("GET /a HTTP/1.1\r\n\r\n")).0,
        "404"
    );
}

#[test]
fn one_connection_takes_many_requests_in_any_pieces() {
    let mut guest = served(Service::default());
    let handle = guest.connect();
    let request = "GET /latest/meta-data/ami-id HTTP/1.1\r\n\r\n";
    for byte in request.bytes() {
        guest.say(handle, &[byte]);
    }
    assert_eq!(lines(&guest.hear(handle)).1, "ami-1");
    guest.say(handle, format!("{request}{request}{request}").as_bytes());
    let answers = guest.hear(handle);
    assert_eq!(answers.matches("\r\n\r\nami-1").count(), 3);
    assert!(guest.is_open(handle));
    guest.say(handle, b"GET /number HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert_eq!(lines(&guest.hear(handle)).0, "501");
    assert!(!guest.is_open(handle));
}

#[test]
fn a_large_document_arrives_whole() {
    let mut guest = served(Service::default());
    let text = "0123456789".repeat(5000);
    guest.mmds.put(json!({ "a": text })).unwrap();
    let answer = guest.ask("GET /a HTTP/1.1\r\n\r\n");
    assert!(lines(&answer).1 == text);
}

#[test]
fn other_frames_are_left_alone() {
    let stack = Stack::new(Arc::new(Mmds::new(1)), DEFAULT_ADDRESS);
    let takes = |bytes: &[(usize, &[u8])]| {
        let mut start = [0; DETOUR_HEAD];
        for (at, bytes) in bytes {
            start[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        stack.takes(&start)
    };
    let (address, other) = ([169, 254, 169, 254], [169, 254, 169, 253]);
    assert!(takes(&[(12, &[8, 0]), (30, &address)]));
    assert!(takes(&[(12, &[8, 6]), (38, &address)]));
    assert!(!takes(&[(12, &[8, 0]), (30, &other), (38, &address)]));
    assert!(!takes(&[(12, &[8, 6]), (38, &other), (30, &address)]));
    assert!(!takes(&[(12, &[0x86, 0xdd]), (30, &address)]));
    assert!(!takes(&[]));
    let moved = Stack::new(Arc::new(Mmds::new(1)), Ipv4Addr::new(169, 254, 1, 2));
    let mut start = [0; DETOUR_HEAD];
    (start[12], start[30], start[31], start[32], start[33]) = (8, 169, 254, 1, 2);
    assert!(moved.takes(&start));
}
