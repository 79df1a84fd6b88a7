//! Every endpoint in the phase that it is not for.

use std::collections::BTreeSet;

use crate::served::Served;

/// Method, path and a body that it takes.
type Asked = (&'static str, &'static str, &'static str);

const AFTER: &str = "The requested operation is not supported after starting the microVM.";
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";

/// Only before the start.
const EARLY: &[Asked] = &[
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"/dev/null"}"#,
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":64}"#,
    ),
    ("PATCH", "/machine-config", r#"{"vcpu_count":1}"#),
    ("PUT", "/cpu-config", "{}"),
    ("PUT", "/entropy", "{}"),
    ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"/v"}"#),
    ("PUT", "/serial", "{}"),
    (
        "PUT",
        "/balloon",
        r#"{"amount_mib":1,"deflate_on_oom":true}"#,
    ),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib":128}"#),
    ("PUT", "/mmds/config", r#"{"network_interfaces":["a"]}"#),
    ("PUT", "/logger", "{}"),
    ("PUT", "/metrics", r#"{"metrics_path":"/m"}"#),
    (
        "PUT",
        "/snapshot/load",
        r#"{"snapshot_path":"/s","mem_file_path":"/m"}"#,
    ),
    ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
];

/// Only after it.
const LATE: &[Asked] = &[
    ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#),
    ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#),
    ("PUT", "/actions", r#"{"action_type":"Shutdown"}"#),
    ("PATCH", "/drives/a", r#"{"drive_id":"a"}"#),
    ("DELETE", "/drives/a", ""),
    ("PATCH", "/pmem/a", r#"{"id":"a"}"#),
    ("DELETE", "/pmem/a", ""),
    ("PATCH", "/network-interfaces/a", r#"{"iface_id":"a"}"#),
    ("DELETE", "/network-interfaces/a", ""),
    ("PATCH", "/balloon", r#"{"amount_mib":1}"#),
    ("GET", "/balloon/statistics", ""),
    (
        "PATCH",
        "/balloon/statistics",
        r#"{"stats_polling_interval_s":1}"#,
    ),
    ("PATCH", "/balloon/hinting/start", ""),
    ("GET", "/balloon/hinting/status", ""),
    ("PATCH", "/balloon/hinting/stop", ""),
    ("GET", "/hotplug/memory", ""),
    ("PATCH", "/hotplug/memory", r#"{"requested_size_mib":0}"#),
    (
        "PUT",
        "/snapshot/create",
        r#"{"snapshot_path":"/s","mem_file_path":"/m"}"#,
    ),
    ("DELETE", "/snapshot/create", ""),
    ("PUT", "/snapshot/working-set", ""),
    ("PUT", "/fork", r#"{"uds_path":"/f"}"#),
    ("PATCH", "/vm", r#"{"state":"Paused"}"#),
    ("PUT", "/exec", r#"{"command":["true"]}"#),
    ("GET", "/console", ""),
    ("GET", "/console/log", ""),
];

/// In both, or with a meaning of their own in each.
const BOTH: &[(&str, &str)] = &[
    ("GET", "/"),
    ("GET", "/version"),
    ("GET", "/vm/config"),
    ("GET", "/vm/statistics"),
    ("GET", "/metrics"),
    ("GET", "/events"),
    ("GET", "/machine-config"),
    ("GET", "/balloon"),
    ("PUT", "/mmds"),
    ("PATCH", "/mmds"),
    ("GET", "/mmds"),
    ("PUT", "/drives/a"),
    ("PUT", "/pmem/a"),
    ("PUT", "/network-interfaces/a"),
];

#[test]
fn each_endpoint_is_refused_in_the_other_phase_and_none_is_left_out() {
    let mut vm = Served::payload("hlt_forever");
    for (method, path, body) in LATE {
        vm.client.ask(method, path, body).refused(&[BEFORE]);
    }
    assert_eq!(vm.state(), "Not started");
    let mut vm = vm.start().wait_for("h");
    for (method, path, body) in EARLY {
        vm.client.ask(method, path, body).refused(&[AFTER]);
    }
    assert_eq!(vm.state(), "Running");
    let named = |path: &str| match path.split_once('{') {
        Some((before, _)) => format!("{before}a"),
        None => path.to_owned(),
    };
    let all: BTreeSet<_> = bulle::api::endpoints()
        .map(|(method, path)| (method, named(path)))
        .collect();
    let asked = EARLY.iter().chain(LATE);
    let asked = asked.map(|(method, path, _)| (*method, *path));
    let tried: BTreeSet<_> = asked
        .chain(BOTH.iter().copied())
        .map(|(method, path)| (method, path.to_owned()))
        .collect();
    assert_eq!(tried, all);
}
