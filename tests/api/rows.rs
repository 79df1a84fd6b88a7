//! The table of endpoints, row by row: `rows.txt` has a case for each success and each documented failure,
//! and what holds for all endpoints, such as the wrong phase, follows from the description.
//!
//! An operation of `resources/api/openapi.yaml` has its phase as `x-phase`, and beside the codes that
//! follow from phase, body and name those of its failures as `x-codes`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Answer, Client, request};
use crate::common;
use crate::description::{Description, Operation, filled};
use crate::mmds::network;
use crate::served::{Served, boot};

/// Codes that are not an operation's: of a path that is none, of bytes that are no request, of a microVM that ended
/// meanwhile, and of a caller that went.
const OF_NO_OPERATION: [&str; 4] = ["unknown-endpoint", "bad-request", "ended", "cancelled"];
const DONE: &str = "done";

/// Open as long as this process, which other tests know that their microVMs inherit them.
static NETWORKS: OnceLock<[UnixStream; 2]> = OnceLock::new();

/// A line of the table.
#[derive(Clone, Debug)]
struct Case {
    guest: String,
    method: String,
    path: String,
    body: String,
    outcome: String,
    words: String,
}

impl Case {
    fn is_of(&self, operation: &Operation<'_>) -> bool {
        let path = self.path.split('?').next().unwrap();
        let named = operation.path.rsplit_once("/{");
        let is_it = match named {
            Some((before, _)) => path.rsplit_once('/').is_some_and(|(a, _)| a == before),
            None => path == operation.path,
        };
        is_it && self.method == operation.method
    }
}

/// A line of the table, or something about its guest.
enum Step {
    Ask(Case),
    Wait(String),
    Open(usize, String),
}

fn table() -> Vec<(String, Vec<Step>)> {
    let text = fs::read_to_string(common::tree().join("tests/api/rows.txt")).unwrap();
    let mut guests: Vec<(String, Vec<Step>)> = Vec::new();
    for line in text.lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            guests.push((name.trim_end_matches(']').to_owned(), Vec::new()));
            continue;
        }
        let (guest, steps) = guests.last_mut().unwrap();
        steps.push(step(guest, line));
    }
    guests
}

fn step(guest: &str, line: &str) -> Step {
    if let Some(text) = line.strip_prefix("!wait ") {
        return Step::Wait(text.to_owned());
    }
    if let Some(text) = line.strip_prefix("!open ") {
        let (count, path) = text.split_once(' ').unwrap();
        return Step::Open(count.parse().unwrap(), path.to_owned());
    }
    let (asked, outcome) = line.rsplit_once(" => ").unwrap_or_else(|| panic!("{line}"));
    let mut asked = asked.splitn(3, ' ');
    let mut next = || asked.next().unwrap_or_default().to_owned();
    let (outcome, words) = outcome.split_once(": ").unwrap_or((outcome, ""));
    Step::Ask(Case {
        guest: guest.to_owned(),
        method: next(),
        path: next(),
        body: next(),
        outcome: outcome.to_owned(),
        words: words.to_owned(),
    })
}

fn cases() -> Vec<Case> {
    let steps = table().into_iter().flat_map(|(_, steps)| steps);
    let cases = steps.filter_map(|step| match step {
        Step::Ask(case) => Some(case),
        _ => None,
    });
    cases.collect()
}

/// A microVM of the table, and what its lines name.
struct Guest {
    vm: Served,
    names: BTreeMap<&'static str, String>,
    streams: Vec<Client>,
    _held: (TempDir, UnixListener),
}

impl Guest {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = NETWORKS.get_or_init(|| [network(), network()]);
        let at = |name: &str| dir.path().join(name);
        for (name, bytes) in [
            ("disk", 4096),
            ("root", 512),
            ("more", 4096),
            ("pmem", 2 << 20),
        ] {
            fs::File::create(at(name)).unwrap().set_len(bytes).unwrap();
        }
        fs::copy(at("pmem"), at("pmem2")).unwrap();
        let fork = UnixListener::bind(at("fork")).unwrap();
        let payload = match name {
            "full" => "hotplug",
            _ => "serial_echo",
        };
        let kernel = common::payload(payload);
        if ["new", "loaded"].contains(&name) {
            saved(dir.path());
        }
        let config = at("config");
        let mut arguments = vec!["--mmds-size-limit", "1000"];
        match name {
            "full" => arguments.push("--enable-pci"),
            "deaf" => {
                fs::write(&config, deaf(&kernel, dir.path())).unwrap();
                arguments.extend(["--config-file", config.to_str().unwrap()]);
            }
            _ => {}
        }
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let names = BTreeMap::from([
            ("$DIR", text(dir.path())),
            ("$KERNEL", text(&kernel)),
            ("$LONG", "x".repeat(3000)),
            ("$FD1", one.as_raw_fd().to_string()),
            ("$FD2", other.as_raw_fd().to_string()),
        ]);
        Self {
            vm: Served::with(&arguments),
            names,
            streams: Vec::new(),
            _held: (dir, fork),
        }
    }

    fn run(mut self, steps: Vec<Step>, streams: &BTreeSet<&str>) {
        for step in steps {
            match step {
                Step::Ask(case) => self.ask(&case, streams.contains(&*case.path)),
                Step::Wait(text) => self.vm = self.vm.wait_for(&text),
                Step::Open(count, path) => (0..count).for_each(|_| {
                    self.stream("GET", &path, "");
                }),
            }
        }
    }

    /// An answer on a connection of its own, which is a stream's from then on.
    fn stream(&mut self, method: &str, path: &str, body: &str) -> Answer {
        let mut client = Client::connect(&self.vm.socket());
        let answer = client.ask(method, path, body);
        self.streams.push(client);
        answer
    }

    fn ask(&mut self, case: &Case, is_stream: bool) {
        let mut body = case.body.clone();
        for (name, value) in &self.names {
            body = body.replace(name, value);
        }
        let answer = match is_stream {
            true => self.stream(&case.method, &case.path, &body),
            false => self.vm.client.ask(&case.method, &case.path, &body),
        };
        check(case, &answer);
    }
}

/// Saves a guest, for one that is made of it.
fn saved(dir: &Path) {
    let mut vm = Served::with(&["--enable-pci"]);
    let kernel = common::payload("serial_echo");
    vm.put("/boot-source", boot(&kernel)).done();
    vm.put("/hotplug/memory", json!({ "total_size_mib": 128 }))
        .done();
    let root = json!({ "id": "r", "path_on_host": dir.join("pmem"), "root_device": true });
    vm.put("/pmem/r", root).done();
    let mut vm = vm.start().wait_for("ready");
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let [state, memory] = ["saved.state", "saved.memory"].map(|name| dir.join(name));
    let files = json!({ "snapshot_path": state, "mem_file_path": memory });
    vm.put("/snapshot/create", files).done();
}

/// A configuration with an agent that will not be there.
fn deaf(kernel: &Path, dir: &Path) -> String {
    let root = dir.join("tree");
    fs::create_dir(&root).unwrap();
    let config = json!({
        "boot-source": boot(kernel),
        "guest": { "command": ["true"], "root": { "directory": root } },
        "balloon": {
            "amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1,
            "free_page_hinting": true,
        },
    });
    config.to_string()
}

fn check(case: &Case, answer: &Answer) {
    if case.outcome == DONE {
        let expected = match (case.method.as_str(), case.path.as_str()) {
            ("GET", _) | (_, "/exec") => 200,
            _ => 204,
        };
        assert_eq!(answer.status, expected, "{case:?}: {}", answer.body);
        return;
    }
    let (status, words) = match case.words.strip_prefix("413 ") {
        Some(words) => (413, words),
        None => (400, case.words.as_str()),
    };
    let value: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    let text = value["fault_message"].as_str().unwrap_or_default();
    assert_eq!(
        (answer.status, &value["code"]),
        (status, &json!(case.outcome)),
        "{case:?}: {}",
        answer.body
    );
    assert!(text.contains(words), "{case:?}: {text}");
}

/// The codes that an operation has in any case.
fn general(operation: &Operation<'_>) -> BTreeSet<String> {
    let mut codes = BTreeSet::new();
    let is_there = |key: &str| !operation.yaml[key].is_badvalue();
    if is_there("requestBody") || operation.method == "GET" || is_there("parameters") {
        codes.insert("bad-body");
    }
    if operation.path.contains('{') {
        codes.insert("bad-id");
    }
    match operation.yaml["x-phase"].as_str() {
        Some("before") => drop(codes.insert("started")),
        Some("after") => drop(codes.insert("not-started")),
        _ => {}
    }
    codes.into_iter().map(str::to_owned).collect()
}

/// Those that it has of its own.
fn own(operation: &Operation<'_>) -> BTreeSet<String> {
    let codes = operation.yaml["x-codes"].as_vec().into_iter().flatten();
    codes
        .map(|code| code.as_str().unwrap().to_owned())
        .collect()
}

fn run(name: &str) {
    let description = Description::read();
    let streams = description
        .operations()
        .filter(|operation| operation.yaml["x-stream"].as_bool() == Some(true))
        .map(|operation| operation.path)
        .collect();
    let (_, steps) = table()
        .into_iter()
        .find(|(guest, _)| guest == name)
        .unwrap();
    Guest::new(name).run(steps, &streams);
}

#[test]
fn rows_before_the_start() {
    run("new");
}

#[test]
fn rows_of_a_guest_without_devices() {
    run("bare");
}

#[test]
fn rows_of_a_guest_with_all_devices() {
    run("full");
}

#[test]
fn rows_of_a_guest_whose_agent_is_deaf() {
    run("deaf");
}

#[test]
fn rows_of_a_guest_that_was_saved() {
    run("loaded");
}

#[test]
fn each_success_and_each_documented_failure_has_a_case_and_no_other_comes() {
    let description = Description::read();
    let cases = cases();
    let mut wrong = Vec::new();
    for operation in description.operations() {
        let its = cases.iter().filter(|case| case.is_of(&operation));
        let seen: BTreeSet<_> = its
            .map(|case| case.outcome.split(' ').next().unwrap().to_owned())
            .collect();
        let own = own(&operation);
        let mut wanted = own.clone();
        wanted.insert(DONE.to_owned());
        let known: BTreeSet<_> = wanted.union(&general(&operation)).cloned().collect();
        for missing in wanted.difference(&seen) {
            wrong.push(format!(
                "{} {}: no case of {missing}",
                operation.method, operation.path
            ));
        }
        for more in seen.difference(&known) {
            wrong.push(format!(
                "{} {}: {more} is not described",
                operation.method, operation.path
            ));
        }
    }
    for case in &cases {
        let known = description
            .operations()
            .any(|operation| case.is_of(&operation));
        assert!(known, "{case:?} is of no operation");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Methods and paths that the first cells of a table have, with `{}` for a name.
fn in_table(text: &str) -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cell = line.split(" | ").next().unwrap();
        let (mut methods, mut ended) = (Vec::<String>::new(), false);
        for word in cell.split([' ', ',']) {
            let path = word.trim_matches('`');
            if path.starts_with('/') {
                ended = true;
                let path = unnamed(path);
                found.extend(methods.iter().map(|method| (method.clone(), path.clone())));
            } else if ["GET", "PUT", "PATCH", "DELETE"].contains(&word) {
                if std::mem::take(&mut ended) {
                    methods.clear();
                }
                methods.push(word.to_owned());
            }
        }
    }
    found
}

fn unnamed(path: &str) -> String {
    match path.split_once('{') {
        Some((before, _)) => format!("{before}{{}}"),
        None => path.to_owned(),
    }
}

#[test]
fn each_operation_is_compared_with_firecrackers() {
    let text = fs::read_to_string(common::tree().join("docs/firecracker-compat.md")).unwrap();
    let description = Description::read();
    let described: BTreeSet<_> = description
        .operations()
        .map(|operation| (operation.method.clone(), unnamed(operation.path)))
        .collect();
    assert_eq!(in_table(&text), described);
}

#[test]
fn cases_that_are_elsewhere_are_there() {
    for case in cases().iter().filter(|case| case.guest == "elsewhere") {
        let (_, file) = case.outcome.split_once(" in ").unwrap();
        let text = fs::read_to_string(common::tree().join(file)).unwrap();
        assert!(text.contains(&case.words), "{case:?}");
    }
}

#[test]
fn the_codes_of_the_source_are_those_of_the_description() {
    let mut source = BTreeSet::new();
    for file in ["src/control/error.rs", "src/api/error.rs"] {
        let text = fs::read_to_string(common::tree().join(file)).unwrap();
        let (_, body) = text.split_once("fn code(&self)").unwrap();
        let (body, _) = body.split_once("\n    }\n").unwrap();
        source.extend(body.split('"').skip(1).step_by(2).map(str::to_owned));
    }
    let description = Description::read();
    let listed = description.codes();
    assert_eq!(source, listed);
    let mut of_operations: BTreeSet<_> = OF_NO_OPERATION.map(str::to_owned).into();
    for operation in description.operations() {
        of_operations.extend(own(&operation));
        of_operations.extend(general(&operation));
    }
    assert_eq!(of_operations, listed);
}

/// A body that the operation takes: that of its first case which is none of a bad body.
fn body(cases: &[Case], operation: &Operation<'_>) -> String {
    let mut its = cases.iter().filter(|case| case.is_of(operation));
    let good = its.find(|case| !["bad-body", "bad-id"].contains(&&*case.outcome));
    let body = good.map(|case| case.body.clone()).unwrap_or_default();
    let named = body.replace("$LONG", "x").replace("$FD1", "3");
    let Ok(mut value) = serde_json::from_str::<Value>(&named) else {
        return named;
    };
    for name in ["drive_id", "iface_id", "id"] {
        if let Some(id) = value.get_mut(name) {
            *id = json!("a");
        }
    }
    value.to_string()
}

/// Asked on a connection of its own, for a stream would take it.
fn refused(vm: &Served, (method, path, body): (&str, &str, &str), code: &str) {
    let mut client = Client::connect(&vm.socket());
    client.send(request(method, path, body).as_bytes());
    let answer = client.answer();
    let value: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    let asked = format!("{method} {path} {body}: {}", answer.body);
    assert_eq!(
        (answer.status, value["code"].as_str()),
        (400, Some(code)),
        "{asked}"
    );
}

#[test]
fn each_operation_refuses_the_other_phase_a_bad_body_and_a_bad_name() {
    let description = Description::read();
    let cases = cases();
    let before = Served::payload("hlt_forever");
    let mut after = Served::payload("hlt_forever").start().wait_for("h");
    for operation in description.operations() {
        let (method, path) = (operation.method.as_str(), filled(operation.path));
        let body = body(&cases, &operation);
        match operation.yaml["x-phase"].as_str() {
            Some("before") => refused(&after, (method, &path, &body), "started"),
            Some("after") => refused(&before, (method, &path, &body), "not-started"),
            Some(other) => panic!("no phase: {other}"),
            None => {}
        }
        for vm in [&before, &after] {
            if method == "GET" {
                refused(vm, (method, &path, "{}"), "bad-body");
            }
            if !operation.yaml["requestBody"].is_badvalue() {
                refused(vm, (method, &path, "{"), "bad-body");
            }
            if let Some((place, _)) = operation.path.split_once('{') {
                refused(vm, (method, place, &body), "bad-id");
                refused(vm, (method, &format!("{place}a-b"), &body), "bad-id");
                if !body.is_empty() {
                    refused(vm, (method, &format!("{place}zz"), &body), "bad-id");
                }
            }
        }
    }
    assert_eq!(after.state(), "Running");
}
