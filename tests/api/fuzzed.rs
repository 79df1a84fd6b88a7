//! Schemathesis, which makes up requests from the API's description, against a microVM before and after
//! its start: no answer is 5xx or late, and the process is as it was.
//!
//! In a jail, where no path that is made up leads to a file of this machine.

use std::fs;
use std::io::copy;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use yaml_rust2::{Yaml, YamlLoader};

use crate::client::Client;
use crate::common::{Input, Running, tree};
use crate::jailer::{Jails, status};

const SOCKET: &str = "s";
/// Inputs for each operation in a run of Schemathesis, which takes some fifteen seconds.
const EXAMPLES: &str = "40";
/// Of two runs, at least.
const REQUESTS: u64 = 2000;
/// KiB that the process may grow by over the second run.
const GROWTH: u64 = 8 << 10;

/// Streams that do not end by themselves.
const STREAMS: [&str; 3] = ["/events", "/console", "/exec"];

/// Has connections to a port of TCP lead to a socket, since Schemathesis knows no other addresses.
fn lead_to(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let Ok(server) = UnixStream::connect(&socket) else {
                continue;
            };
            thread::spawn(move || join(stream, server));
        }
    });
    port
}

fn join(client: TcpStream, server: UnixStream) {
    let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    thread::spawn(move || {
        let _ = copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Write);
    });
    let _ = copy(&mut &server, &mut &client);
    let _ = client.shutdown(std::net::Shutdown::Both);
}

/// The API's description as JSON: Schemathesis takes what is one node of YAML by way of aliases for one
/// place, and writes what it finds of one operation to all of them.
fn description(dir: &Path) -> PathBuf {
    let text = fs::read_to_string(tree().join("resources/api/openapi.yaml")).unwrap();
    let yaml = YamlLoader::load_from_str(&text).unwrap().remove(0);
    let path = dir.join("openapi.json");
    fs::write(&path, json_of(yaml).to_string()).unwrap();
    path
}

fn json_of(yaml: Yaml) -> Value {
    match yaml {
        Yaml::Hash(map) => {
            let pair = |(key, value): (Yaml, Yaml)| (key.into_string().unwrap(), json_of(value));
            map.into_iter().map(pair).collect()
        }
        Yaml::Array(list) => list.into_iter().map(json_of).collect(),
        Yaml::String(text) => text.into(),
        Yaml::Integer(number) => number.into(),
        Yaml::Real(text) => serde_json::from_str(&text).unwrap(),
        Yaml::Boolean(flag) => flag.into(),
        Yaml::Null => Value::Null,
        other => panic!("{other:?} in the description"),
    }
}

/// Runs Schemathesis; how many requests it made.
fn schemathesis(dir: &Path, port: u16, seed: u32) -> u64 {
    let program = tree().join("target/tools/venv/bin/schemathesis");
    assert!(program.exists(), "run tests/setup test first");
    let mut command = Command::new(program);
    command.current_dir(dir).arg("run");
    command.arg(description(dir));
    command.args(["--url", &format!("http://127.0.0.1:{port}")]);
    command.args(["--phases", "fuzzing,stateful", "--max-examples", EXAMPLES]);
    command.args(["--checks", "not_a_server_error,status_code_conformance"]);
    command.args(["--checks", "response_schema_conformance"]);
    command.args(["--max-response-time", "10", "--request-timeout", "30"]);
    command.args(["--seed", &seed.to_string(), "--generation-database", "none"]);
    command.args([
        "--suppress-health-check",
        "all",
        "--no-color",
        "--warnings",
        "off",
    ]);
    for path in STREAMS {
        command.args(["--exclude-path", path]);
    }
    let outcome = Running::start(command, Input::Null, Duration::from_secs(240)).finish();
    assert!(outcome.code == 0, "{}\n{}", outcome.stdout, outcome.stderr);
    let words: Vec<_> = outcome.stdout.split_whitespace().collect();
    let at = words.iter().position(|word| word.starts_with("generated"));
    words[at.unwrap() - 1].parse().unwrap()
}

/// What a process has.
#[derive(Debug)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    anonymous_kib: u64,
}

impl Holdings {
    fn of(pid: i32) -> Self {
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        Self {
            descriptors: count("fd"),
            threads: count("task"),
            anonymous_kib: status(pid, "RssAnon")[0].parse().unwrap(),
        }
    }
}

/// Two runs, of which the second may not leave anything behind. The state at the end.
fn fuzz(jails: &Jails, mut client: Client) -> String {
    let (pid, port) = (jails.pid(), lead_to(jails.root().join(SOCKET)));
    let dir = tempfile::tempdir().unwrap();
    let mut requests = schemathesis(dir.path(), port, 1);
    let before = Holdings::of(pid);
    requests += schemathesis(dir.path(), port, 2);
    let after = Holdings::of(pid);
    let all = format!("{requests} requests, {before:?}, {after:?}");
    // Files of snapshots of changes stay open until a full one; of some threads there is one at most.
    assert!(after.descriptors <= before.descriptors + 32, "{all}");
    assert!(after.threads <= before.threads + 2, "{all}");
    assert!(
        after.anonymous_kib <= before.anonymous_kib + GROWTH,
        "{all}"
    );
    assert!(requests >= REQUESTS, "{all}");
    eprintln!("{all}");
    let answer = client.ask("GET", "/", "").value();
    answer["state"].as_str().unwrap().to_owned()
}

/// One after the other, since Schemathesis takes a processor.
#[test]
fn requests_made_up_before_and_after_the_start() {
    before_the_start();
    after_the_start();
}

fn before_the_start() {
    let jails = Jails::new();
    let _running = jails.start(&[], &["--api-sock", SOCKET]);
    assert_eq!(fuzz(&jails, jails.client(SOCKET)), "Not started");
}

fn after_the_start() {
    let jails = Jails::new().with_kernel("hlt_interruptible");
    let _running = jails.start(&[], &["--api-sock", SOCKET]);
    let mut client = jails.client(SOCKET);
    for (path, body) in [
        (
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 32, "track_dirty_pages": true }),
        ),
        ("/boot-source", json!({ "kernel_image_path": "/kernel" })),
        (
            "/balloon",
            json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 }),
        ),
        ("/vsock", json!({ "guest_cid": 3, "uds_path": "vsock" })),
        ("/entropy", json!({})),
        ("/hotplug/memory", json!({ "total_size_mib": 128 })),
        ("/actions", json!({ "action_type": "InstanceStart" })),
    ] {
        client.ask("PUT", path, &body.to_string()).done();
    }
    // Pausing is one of the requests.
    let state = fuzz(&jails, client);
    assert!(["Running", "Paused"].contains(&state.as_str()), "{state}");
}
