//! Network interfaces.

use std::net::{TcpListener, UdpSocket};
use std::process::Command;
use std::time::Duration;

use crate::common::{Bulle, Input, Outcome, Running};
use crate::refuses;

fn bare() -> Bulle {
    Bulle::run().args(["--root", "none", "--kernel", "/dev/null"])
}

fn with(options: &[&str]) -> Outcome {
    bare().args(options).outcome()
}

/// Runs bulle with `options` after `prelude` in a network, with mounts and processes of its own.
/// Ends with 99 when a passt is left behind.
fn in_a_network(prelude: &str, options: &[&str]) -> Outcome {
    let script = format!(
        "{prelude}
        code=0; \"$@\" || code=$?
        for try in $(seq 50); do
            grep -q '^passt' /proc/[0-9]*/comm 2>/dev/null || exit $code
            sleep 0.1
        done
        exit 99"
    );
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--mount"]);
    command.args(["--pid", "--fork", "--mount-proc", "sh", "-ec", &script]);
    command.args(["sh", env!("CARGO_BIN_EXE_bulle"), "run"]);
    command.args(["--root", "none", "--kernel", "/dev/null"]);
    command.args(options);
    Running::start(command, Input::Null, Duration::from_secs(60)).finish()
}

#[test]
fn taps_that_cannot_be_had() {
    let words = ["no network interface 'gone0'", "ip tuntap add dev gone0"];
    refuses(with(&["--net", "tap=gone0"]), &words);
    let long = "tap=sixteen-letters-";
    refuses(
        with(&["--net", long]),
        &["'sixteen-letters-'", "1 to 15 bytes"],
    );
    refuses(with(&["--net", "tap=lo"]), &["'lo' is not a tap interface"]);
    let no_rights = Bulle::unprivileged().args(["--root", "none", "--kernel", "/dev/null"]);
    let outcome = no_rights.args(["--net", "tap=bulle%d"]).outcome();
    refuses(outcome, &["no permission", "'bulle%d'", "CAP_NET_ADMIN"]);
}

#[test]
fn taps_of_a_poor_host() {
    let tap = "ip tuntap add dev one mode tap; ";
    let two = ["--net", "tap=one,id=a", "--net", "tap=one,id=b"];
    refuses(
        in_a_network(tap, &two),
        &["'one' is in use", "give each VM its own"],
    );
    refuses(
        in_a_network(tap, &["--net", "tap=one,queues=2"]),
        &["'one'", "2 queue(s)", "multi_queue"],
    );
    let hidden = "mount -t tmpfs none /dev/net";
    refuses(
        in_a_network(hidden, &["--net", "tap=x%d"]),
        &["/dev/net/tun", "modprobe tun", "No such file"],
    );
    // One that is there and free is no obstacle, nor is one with several queues.
    let outcome = in_a_network(tap, &["--net", "tap=one"]);
    refuses(outcome, &["/dev/null"]);
    let many = "ip tuntap add dev many mode tap multi_queue; ";
    let outcome = in_a_network(many, &["--net", "tap=many,queues=2"]);
    refuses(outcome, &["/dev/null"]);
}

#[test]
fn the_kernel_moves_frames_only_of_taps_and_nothing_else() {
    for options in [
        &["--net", "user,vhost=on"][..],
        &["--net", "tap=x,vhost=on,rx_rate.ops.size=1"],
        &["--net", "tap=x,vhost=on", "--hotplug-memory", "total=1G"],
    ] {
        refuses(
            with(options),
            &["'net0' with vhost=on", "leave vhost=on or"],
        );
    }
    let metadata = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&metadata, "{}").unwrap();
    let path = metadata.path().to_str().unwrap();
    let options = ["--net", "tap=x,vhost=on", "--metadata", path];
    refuses(with(&options), &["'net0' with vhost=on", "metadata"]);
    let tap = "ip tuntap add dev one mode tap; ";
    let vhost = ["--net", "tap=one,vhost=on"];
    // A device of which nothing can be opened, whatever the host has.
    let none = "mount --bind /dev/null /dev/vhost-net 2>/dev/null || [ ! -e /dev/vhost-net ]; ";
    let prelude = [tap, none].concat();
    refuses(
        in_a_network(&prelude, &vhost),
        &["'net0'", "/dev/vhost-net", "modprobe vhost_net"],
    );
    let mut command = Command::new("bash");
    let socket = "exec 9<>/dev/tcp/127.0.0.1/$0; exec \"$@\" --net fd=9,vhost=on";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    command.args(["-c", socket, &port, env!("CARGO_BIN_EXE_bulle"), "run"]);
    command.args(["--root", "none", "--kernel", "/dev/null"]);
    let outcome = Running::start(command, Input::Null, Duration::from_secs(60)).finish();
    refuses(outcome, &["file descriptor 9 is a socket", "vhost=on"]);
}

#[test]
fn a_tun_device_of_roots() {
    let prelude = "file=$(mktemp); chmod 0 $file; mount --bind $file /dev/net/tun; rm $file
        set -- setpriv --bounding-set=-all --inh-caps=-all \"$@\"; ";
    let outcome = in_a_network(prelude, &["--net", "tap=x%d"]);
    refuses(
        outcome,
        &[
            "/dev/net/tun",
            "Permission denied",
            "may not read and write it",
        ],
    );
}

#[test]
fn descriptors_that_are_none() {
    for fd in ["2", "77"] {
        let words = [
            format!("file descriptor {fd} of network interface 'net0'"),
            "parent".to_string(),
        ];
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        refuses(with(&["--net", &format!("fd={fd}")]), &words);
    }
    let script = "exec 9</etc/passwd; exec \"$@\" --net fd=9";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_bulle"), "run"]);
    command.args(["--root", "none", "--kernel", "/dev/null"]);
    let outcome = Running::start(command, Input::Null, Duration::from_secs(60)).finish();
    refuses(outcome, &["file descriptor 9", "not a tap interface"]);
}

#[test]
fn a_host_without_passt() {
    let mut command = Command::new("env");
    command.args(["PATH=/nowhere", env!("CARGO_BIN_EXE_bulle"), "run"]);
    command.args(["--root", "none", "--kernel", "/dev/null", "--net", "user"]);
    let outcome = Running::start(command, Input::Null, Duration::from_secs(60)).finish();
    refuses(outcome, &["passt", "apt-get install passt"]);
}

#[test]
fn passt_that_cannot_start() {
    refuses(
        in_a_network("ip link set lo up", &["--net", "user"]),
        &["passt ended", "default route"],
    );
    // One that neither answers nor ends.
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("passt");
    std::fs::write(&script, "#!/bin/sh\necho $$ >\"$0.pid\"; exec sleep 100\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new("env");
    let path = format!("PATH={}:/usr/bin:/bin", dir.path().display());
    command.args([&path, env!("CARGO_BIN_EXE_bulle"), "run"]);
    command.args(["--root", "none", "--kernel", "/dev/null", "--net", "user"]);
    let outcome = Running::start(command, Input::Null, Duration::from_secs(60)).finish();
    let outcome = outcome.within(Duration::from_secs(30));
    refuses(outcome, &["passt does not answer within 10 seconds"]);
    let pid = std::fs::read_to_string(dir.path().join("passt.pid")).unwrap();
    let proc = format!("/proc/{}", pid.trim());
    assert!(!std::path::Path::new(&proc).exists(), "it is left behind");
}

#[test]
fn passt_goes_with_bulle() {
    let route = "ip tuntap add dev uplink mode tap; ip addr add 192.0.2.2/24 dev uplink; ip link set uplink up
        ip link set lo up; ip route add default via 192.0.2.1";
    refuses(in_a_network(route, &["--net", "user"]), &["/dev/null"]);
    let two = ["--net", "user", "--net", "user", "--publish", "8080:80"];
    refuses(in_a_network(route, &two), &["/dev/null"]);
}

#[test]
fn ports_that_cannot_be_published() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let publish = |ports: &str| with(&["--publish", ports]);
    let words = [&format!("127.0.0.1:{port}"), "another program has it"];
    refuses(publish(&format!("{port}:80")), &words);
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = udp.local_addr().unwrap().port();
    let words = [&format!("127.0.0.1:{port}"), "another program has it"];
    refuses(publish(&format!("{port}:80/udp")), &words);
    refuses(
        publish("198.51.100.1:8080:80"),
        &["198.51.100.1:8080", "no such address"],
    );
    let no_rights = Bulle::unprivileged().args(["--root", "none", "--kernel", "/dev/null"]);
    let outcome = no_rights.args(["--publish", "80:80"]).outcome();
    refuses(
        outcome,
        &["127.0.0.1:80", "below 1024", "ip_unprivileged_port_start"],
    );
}

#[test]
fn networks_that_make_no_sense() {
    for (options, words) in [
        (
            &["--net", "nat"][..],
            &["'nat' is no network", "tap=NAME"][..],
        ),
        (&["--net", "user,speed=1"], &["unknown field `speed`"]),
        (&["--publish", "80"], &["[ADDRESS:]HOST-PORT:GUEST-PORT"]),
        (
            &["--net", "none", "--publish", "8080:80"],
            &["--net none means no network"],
        ),
    ] {
        let outcome = with(options).exits(125);
        for word in words {
            assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:#?}");
        }
    }
    let refused = |options: &[&str], words: &[&str]| refuses(with(options), words);
    refused(
        &["--net", "tap=a,id=x", "--net", "user,id=x"],
        &["'x'", "given twice"],
    );
    refused(&["--net", "user,mac=01:00:00:00:00:00"], &["multicast"]);
    refused(
        &[
            "--net",
            "tap=a,mac=02:00:00:00:00:01",
            "--net",
            "tap=b,mac=02:00:00:00:00:01",
        ],
        &["02:00:00:00:00:01", "two network interfaces"],
    );
    refused(&["--net", "user,mtu=65535"], &["MTU of 65535", "65520"]);
    refused(&["--net", "user,queues=2"], &["2 pairs of queues"]);
    refused(&["--net", "tap=a,queues=65"], &["65 pairs", "up to 64"]);
    refused(&["--net", "tap=a,fd=7"], &["mode tap goes with"]);
    refused(
        &["--publish", "8080:80", "--publish", "0.0.0.0:8080:81"],
        &["port 8080", "published twice"],
    );
    refused(
        &["--net", "user,rx_rate.group=g"],
        &["'net0'", "'g'", "bandwidth or ops"],
    );
}

#[test]
fn no_network_is_the_default() {
    for options in [&[][..], &["--net", "none"]] {
        let outcome = bare()
            .args(options)
            .arg("--print-config")
            .outcome()
            .exits(0);
        assert!(
            !outcome.stdout.contains("network-interfaces"),
            "{outcome:#?}"
        );
    }
    let user = bare().args(["--net", "user", "--print-config"]).outcome();
    user.exits(0).prints(r#""iface_id": "net0""#);
}
