//! What a microVM tells those who listen, and its figures for Prometheus.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::client::request;
use crate::common;
use crate::served::Served;

/// A listener.
pub struct Listener(BufReader<UnixStream>);

impl Listener {
    pub fn new(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
            .write_all(request("GET", "/events", "").as_bytes())
            .unwrap();
        let mut listener = Self(BufReader::new(stream));
        let head = listener.part();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(
            head.contains("Content-Type: text/event-stream\r\n"),
            "{head}"
        );
        assert!(head.contains("Connection: close\r\n"), "{head}");
        listener
    }

    /// Lines up to an empty one, or to the end.
    fn part(&mut self) -> String {
        let mut part = String::new();
        while self.0.read_line(&mut part).unwrap() > 0 {
            if part.ends_with("\n\n") || part.ends_with("\n\r\n") {
                break;
            }
        }
        part
    }

    /// The next event.
    pub fn next(&mut self) -> Value {
        let part = self.part();
        let field = |name: &str| {
            let line = part.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {part:?}"))
        };
        let value: Value = serde_json::from_str(field("data: ")).unwrap();
        assert_eq!(value["event"], field("event: "));
        field("id: ").parse::<u64>().unwrap();
        assert!(value["time_ms"].as_u64().unwrap() > 1 << 40);
        value
    }

    #[track_caller]
    fn hears(&mut self, event: &str) -> Value {
        let mut value = self.next();
        // On a slow disk, in between.
        while value["event"] == "snapshot_progress" {
            value = self.next();
        }
        assert_eq!(value["event"], event, "{value}");
        value
    }

    #[track_caller]
    fn ends(&mut self) {
        assert_eq!(self.part(), "");
    }
}

fn state(state: &str) -> Value {
    json!({ "state": state })
}

#[test]
fn a_life_is_told_from_its_start_to_its_end() {
    let vm = Served::payload("serial_echo");
    let mut early = Listener::new(&vm.socket());
    assert_eq!(early.hears("state")["state"], "Not started");
    let mut vm = vm.start().wait_for("ready");
    early.hears("started");
    let mut late = Listener::new(&vm.socket());
    assert_eq!(late.hears("state")["state"], "Running");
    for _ in 0..2 {
        vm.patch("/vm", state("Paused")).done();
    }
    vm.patch("/vm", state("Resumed")).done();
    let saved = vm.dir.path().join("state");
    let create = json!({
        "snapshot_path": saved, "mem_file_path": vm.dir.path().join("memory"), "background": true,
    });
    vm.put("/snapshot/create", create).done();
    while vm.get("/vm/statistics").value()["snapshot"]["state"] == "writing" {}
    vm.types("\n");
    vm.finish().exits(0);
    for listener in [&mut early, &mut late] {
        listener.hears("paused");
        listener.hears("resumed");
        assert_eq!(listener.hears("snapshot_saved")["path"], json!(saved));
        let end = listener.hears("exited");
        assert_eq!(end["reason"], "debug-exit");
        assert_eq!(end["exit_code"], 0);
        listener.ends();
    }
}

#[test]
fn an_end_before_the_start_and_a_panic_are_told() {
    let vm = Served::new();
    let mut listener = Listener::new(&vm.socket());
    listener.hears("state");
    vm.signal(Signal::SIGTERM).finish().exits(128 + 15);
    let end = listener.hears("exited");
    assert_eq!(
        (&end["reason"], &end["exit_code"]),
        (&"signal".into(), &143.into())
    );
    listener.ends();
    let vm = Served::payload("pvpanic");
    let mut listener = Listener::new(&vm.socket());
    listener.hears("state");
    vm.start().finish().exits(121);
    listener.hears("started");
    listener.hears("panicked");
    assert_eq!(listener.hears("exited")["reason"], "panicked");
}

#[test]
fn a_device_that_fails_is_told() {
    let mut vm = Served::payload("hostile");
    let disk = vm.file("disk", &[0; 1 << 20]);
    let boot = json!({
        "kernel_image_path": common::payload("hostile"), "boot_args": "seed=5",
    });
    vm.put("/boot-source", boot).done();
    vm.put(
        "/drives/d",
        json!({ "drive_id": "d", "path_on_host": disk }),
    )
    .done();
    let mut listener = Listener::new(&vm.socket());
    listener.hears("state");
    let vm = vm.start();
    listener.hears("started");
    let failed = listener.hears("device_error");
    assert_eq!(failed["device"], "d");
    assert!(failed["failures"].as_u64().unwrap() > 0);
    drop(vm);
}

#[test]
fn listeners_beside_ten_connections_and_not_too_many() {
    let mut vm = Served::payload("hlt_forever").start().wait_for("\n");
    let mut listeners: Vec<_> = (0..16).map(|_| Listener::new(&vm.socket())).collect();
    let answer = vm.get("/events").refused(&["16 listeners to events"]);
    assert!(answer.body.contains("too-many"));
    // Those that go make room.
    listeners.truncate(1);
    let mut again = Listener::new(&vm.socket());
    again.hears("state");
    vm.patch("/vm", state("Paused")).done();
    again.hears("paused");
}

#[test]
fn figures_for_prometheus() {
    let mut vm = Served::payload("serial_echo");
    let before = vm.get("/metrics");
    assert!(before.body.contains("bulle_running 0\n"), "{}", before.body);
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 2, "mem_size_mib": 64 }),
    )
    .done();
    vm.put(
        "/balloon",
        json!({ "amount_mib": 1, "deflate_on_oom": true }),
    )
    .done();
    let mut vm = vm.start().wait_for("ready");
    vm.put("/balloon", json!({})).refused(&[]);
    let answer = vm.get("/metrics");
    let head = "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
    assert!(answer.head.contains(head), "{}", answer.head);
    let text = answer.body;
    let value = |name: &str| -> f64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    };
    assert_eq!(value("bulle_running"), 1.0);
    assert!(value(r#"bulle_vcpu_exits_total{vcpu="0",reason="io_out"}"#) >= 1.0);
    assert!(value(r#"bulle_vcpu_cpu_seconds_total{vcpu="0"}"#) > 0.0);
    assert!(value("bulle_process_resident_memory_bytes") > 1e6);
    assert!(value("bulle_process_threads") >= 4.0);
    // The payload and its stack at least, and far from all.
    let dirtied = value("bulle_memory_dirtied_pages");
    assert!((2.0..8192.0).contains(&dirtied), "{dirtied}");
    assert_eq!(
        value(r#"bulle_device_target_bytes{device="balloon",kind="balloon"}"#),
        1048576.0
    );
    assert_eq!(
        value(r#"bulle_api_requests_total{method="PUT",path="/balloon"}"#),
        2.0
    );
    assert_eq!(
        value(r#"bulle_api_request_failures_total{method="PUT",path="/balloon"}"#),
        1.0
    );
    assert!(value(r#"bulle_api_request_duration_seconds_count{method="PUT"}"#) >= 5.0);
    assert!(text.ends_with("# EOF\n"));
    let statistics = vm.get("/vm/statistics").value();
    assert_eq!(statistics["vcpus"].as_array().unwrap().len(), 2);
    assert_eq!(statistics["devices"][0]["kind"], "balloon");
}
