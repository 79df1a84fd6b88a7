use proptest::prelude::*;

use super::*;

fn one(text: &str) -> Result<Parsed, HttpError> {
    parse(text.as_bytes(), MAX_BODY)
}

fn request(text: &str) -> (Request, usize) {
    match one(text) {
        Ok(Parsed::Request(request, len)) => (request, len),
        other => panic!("{text:?}: {other:?}"),
    }
}

#[test]
fn a_request_with_a_body_and_what_follows_it() {
    let text = "PUT /drives/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.1\r\n\r\n";
    let (first, len) = request(text);
    assert_eq!(
        (first.method, first.path.as_str()),
        (Method::Put, "/drives/a")
    );
    assert!(first.keep_alive);
    assert_eq!(first.body, b"{}");
    let (second, rest) = request(&text[len..]);
    assert_eq!((second.method, second.path.as_str()), (Method::Get, "/"));
    assert_eq!(len + rest, text.len());
}

#[test]
fn targets_and_connections() {
    let path = |target: &str| request(&format!("GET {target} HTTP/1.1\r\n\r\n")).0.path;
    assert_eq!(path("http://localhost/vm/config"), "/vm/config");
    assert_eq!(path("http://localhost"), "/");
    assert_eq!(path("/vm?x=1"), "/vm");
    assert_eq!(one("GET vm HTTP/1.1\r\n\r\n"), Err(HttpError::Target));
    let stays = |head: &str| request(&format!("GET / {head}\r\n\r\n")).0.keep_alive;
    assert!(stays("HTTP/1.1"));
    assert!(stays("HTTP/1.0"));
    assert!(stays("HTTP/1.0\r\nConnection: keep-alive"));
    assert!(!stays("HTTP/1.0\r\nConnection: close"));
    assert!(!stays("HTTP/1.1\r\nConnection: close"));
}

#[test]
fn what_is_not_there_yet_is_waited_for() {
    let text = "PUT / HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nabcd";
    let head = text.len() - 4;
    for len in 0..text.len() {
        let wait = len == head;
        assert_eq!(one(&text[..len]), Ok(Parsed::Incomplete { wait }), "{len}");
    }
    assert_eq!(request(text).0.body, b"abcd");
}

#[test]
fn what_is_no_request() {
    let long = "x".repeat(MAX_LINE);
    let many = "A: b\r\n".repeat(MAX_HEADERS + 1);
    let with = |header: &str| one(&format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n"));
    assert_eq!(one(&long), Err(HttpError::Line));
    assert_eq!(with(&format!("A: {long}")), Err(HttpError::Line));
    assert_eq!(with(&many), Err(HttpError::Headers));
    assert_eq!(one("POST / HTTP/1.1\r\n\r\n"), Err(HttpError::Method));
    assert!(matches!(
        one("GET / HTTP/9\r\n\r\n"),
        Err(HttpError::Syntax(_))
    ));
    for bad in ["x", "-1", "+1", "", "1, 1", "99999999999999999999999"] {
        assert_eq!(
            with(&format!("Content-Length: {bad}")),
            Err(HttpError::Length),
            "{bad}"
        );
    }
    assert_eq!(
        with("Content-Length: 1\r\nContent-Length: 1"),
        Err(HttpError::Length)
    );
    assert_eq!(with("Transfer-Encoding: chunked"), Err(HttpError::Encoding));
    let size = MAX_BODY as u64 + 1;
    assert_eq!(
        with(&format!("Content-Length: {size}")),
        Err(HttpError::Body {
            size,
            limit: MAX_BODY
        })
    );
    for bad in ["identity;q=0", "gzip, *;q=0"] {
        let error = with(&format!("Accept-Encoding: {bad}"));
        assert_eq!(error, Err(HttpError::AcceptEncoding(bad.to_owned())));
    }
    assert!(with("Accept-Encoding: *;q=0, identity").is_ok());
}

#[test]
fn responses_look_as_clients_expect() {
    let text = |response: Response| String::from_utf8(response.bytes(false)).unwrap();
    assert_eq!(
        text(Response::empty()),
        "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    );
    assert_eq!(
        text(Response::json(200, "{}".into())),
        "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    );
    let full = std::str::from_utf8(FULL).unwrap();
    let (head, body) = full.split_once("\r\n\r\n").unwrap();
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{}",
        body.len()
    );
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(&bytes, 100);
    }

    #[test]
    fn splitting_does_not_matter(at in 0usize..70, body in "[a-z]{0,20}") {
        let text = format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let at = at.min(text.len());
        let first = parse(&text.as_bytes()[..at], MAX_BODY);
        if at < text.len() {
            prop_assert_eq!(first, Ok(Parsed::Incomplete { wait: false }));
        }
        let whole = matches!(parse(text.as_bytes(), MAX_BODY), Ok(Parsed::Request(_, len)) if len == text.len());
        prop_assert!(whole);
    }
}
