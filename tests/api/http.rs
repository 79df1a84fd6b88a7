//! Whatever comes over the socket, with a guest running.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Client, request};
use crate::served::Served;

#[test]
fn split_and_pipelined_requests_are_answered_in_order() {
    let mut vm = Served::new();
    for byte in request("PUT", "/entropy", "{}").bytes() {
        vm.client.send(&[byte]);
        std::thread::sleep(Duration::from_micros(200));
    }
    vm.client.answer().done();
    let put = request(
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":2,"mem_size_mib":64}"#,
    );
    let all = [
        request("GET", "/machine-config", ""),
        put,
        request("GET", "/nowhere", ""),
        request("GET", "/machine-config", ""),
    ];
    vm.client.send(all.concat().as_bytes());
    assert_eq!(vm.client.answer().value()["vcpu_count"], 1);
    vm.client.answer().done();
    vm.client.answer().refused(&["GET nowhere"]);
    assert_eq!(vm.client.answer().value()["vcpu_count"], 2);
}

#[test]
fn the_look_of_an_answer() {
    let mut vm = Served::new();
    let answer = vm.get("/version");
    assert!(
        answer
            .head
            .starts_with("HTTP/1.1 200 \r\nServer: Firecracker API\r\n")
    );
    assert!(answer.head.contains("\r\nConnection: keep-alive\r\n"));
    let answer = vm.client.ask("PUT", "/entropy", "{}").done();
    assert_eq!(
        answer.head,
        "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    );
    vm.client
        .send(b"PUT /entropy HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(vm.client.answer().status, 100);
    vm.client.send(b"{}");
    vm.client.answer().done();
}

#[test]
fn what_is_no_request_is_answered_and_ends_the_connection_only() {
    let mut vm = Served::with(&["--http-api-max-payload-size", "1000"]);
    let long = "x".repeat(3000);
    for bytes in [
        "POST / HTTP/1.1\r\n\r\n".to_owned(),
        "GET / HTTP/7.0\r\n\r\n".to_owned(),
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nA: {long}\r\n\r\n"),
        "PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n".to_owned(),
        "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        request("PUT", "/entropy", &" ".repeat(1001)),
        "\0\u{1}\u{2}\n\n\n\n".to_owned(),
    ] {
        let mut client = Client::connect(&vm.socket());
        client.send(bytes.as_bytes());
        let answer = client.answer();
        assert_eq!(answer.status, 400, "{bytes:?}: {answer:?}");
        let error: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(error["error"], error["fault_message"], "{bytes:?}");
        assert_eq!(error["code"], "bad-request", "{bytes:?}: {error}");
        assert!(client.is_closed(), "{bytes:?}");
    }
    vm.put("/entropy", serde_json::json!({})).done();
}

#[test]
fn the_eleventh_connection_is_turned_away() {
    let mut vm = Served::new();
    let mut others: Vec<_> = (0..9).map(|_| Client::connect(&vm.socket())).collect();
    for client in &mut others {
        client.ask("GET", "/version", "").value();
    }
    vm.get("/version").value();
    let mut late = Client::connect(&vm.socket());
    let answer = late.answer();
    assert_eq!(answer.status, 503);
    assert!(
        answer
            .body
            .contains(r#""error": "Too many open connections""#),
        "{answer:?}"
    );
    assert!(late.is_closed());
    others.pop();
    let begin = Instant::now();
    loop {
        let mut next = Client::connect(&vm.socket());
        next.send(request("GET", "/version", "").as_bytes());
        if next.answer().status == 200 {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn a_client_for_whom_there_is_no_descriptor_waits_and_costs_nothing() {
    let mut vm = Served::new();
    vm.get("/version").value();
    let pid = vm.running.pid();
    let set = |limit: &str| {
        let pid = pid.to_string();
        let mut command = std::process::Command::new("prlimit");
        let status = command
            .args(["--pid", &pid, &format!("--nofile={limit}:")])
            .status();
        assert!(status.unwrap().success());
    };
    let is_free = |fd: &usize| !std::path::Path::new(&format!("/proc/{pid}/fd/{fd}")).exists();
    // What a start takes is opened after the first answers.
    std::thread::sleep(Duration::from_millis(500));
    // All numbers below are in use.
    set(&(0..).find(is_free).unwrap().to_string());
    let mut late = Client::connect(&vm.socket());
    late.send(request("GET", "/version", "").as_bytes());
    let before = vm.running.cpu_time();
    std::thread::sleep(Duration::from_secs(1));
    let used = vm.running.cpu_time() - before;
    assert!(used <= Duration::from_millis(50), "{used:?}");
    vm.get("/version").value();
    set("1024");
    late.answer().value();
}

#[test]
fn nobody_costs_processor_time_while_nothing_is_asked() {
    let vm = Served::payload("hlt_forever").start().wait_for("\n");
    let _idle: Vec<_> = (0..5).map(|_| Client::connect(&vm.socket())).collect();
    // The clients may be accepted late.
    let used = || {
        std::thread::sleep(Duration::from_millis(300));
        let before = vm.running.cpu_time();
        std::thread::sleep(Duration::from_secs(2));
        vm.running.cpu_time() - before
    };
    assert!((0..5).any(|_| used() <= Duration::from_millis(10)));
}
