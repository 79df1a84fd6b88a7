use std::net::TcpListener;
use std::os::fd::OwnedFd;

use super::*;

const FOUR: Families = Families {
    ipv4: true,
    ipv6: false,
};
const BOTH: Families = Families {
    ipv4: true,
    ipv6: true,
};
const SIX: Families = Families {
    ipv4: false,
    ipv6: true,
};

fn pipe_with(text: &str) -> OwnedFd {
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    File::from(write).write_all(text.as_bytes()).unwrap();
    read
}

#[test]
fn what_passt_says_is_one_line_without_noise() {
    let said = "Failed to send 47 bytes to syslog\nDon't run as root. Changing to nobody...\n\
                Failed to bind any port\nfor '-t 1'\u{1b}[2J\n";
    assert_eq!(
        text(pipe_with(said)),
        "Failed to bind any port; for '-t 1'?[2J"
    );
    assert_eq!(text(pipe_with("")), "it said nothing");
    let route = text(pipe_with("No external routable interface for IPv4\n"));
    assert!(route.contains("default route"), "{route}");
    // A pipe whose writer lives on is not waited for.
    let (read, _write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    assert_eq!(text(read), "it said nothing");
}

#[test]
fn ports_that_are_taken_are_told_from_those_that_are_not() {
    let publish = |port| Publish {
        host_ip: std::net::Ipv4Addr::LOCALHOST.into(),
        host_port: port,
        guest_port: 80,
        protocol: Protocol::Tcp,
    };
    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = held.local_addr().unwrap().port();
    let error = can_listen(&publish(port), FOUR).unwrap_err().to_string();
    assert!(error.contains("choose another port"), "{error}");
    drop(held);
    can_listen(&publish(port), FOUR).unwrap();
    let nowhere = Publish {
        host_ip: [198, 51, 100, 1].into(),
        ..publish(port)
    };
    let error = can_listen(&nowhere, FOUR).unwrap_err().to_string();
    assert!(error.contains("no such address"), "{error}");
    let six = Publish {
        host_ip: std::net::Ipv6Addr::LOCALHOST.into(),
        ..publish(port)
    };
    let error = can_listen(&six, FOUR).unwrap_err().to_string();
    assert!(
        error.contains("default route of IPv6") && error.contains(&format!("[::1]:{port}")),
        "{error}"
    );
}

#[test]
fn the_command_line_of_passt() {
    let network = UserNetwork {
        mac: [2, 0, 0, 0, 0, 1],
        address: [10, 0, 2, 15].into(),
        prefix: 24,
        gateway: [10, 0, 2, 2].into(),
        dns: [10, 0, 2, 3].into(),
        ipv6: ["fd00::15", "fd00::2"].map(|address| address.parse().unwrap()),
    };
    let publish: Vec<Publish> = [
        "8080:80",
        "[::]:8080:80",
        "0.0.0.0:53:5353/udp",
        "81:82/udp",
    ]
    .map(|text| text.parse().unwrap())
    .to_vec();
    let words = |families, publish: &[Publish]| {
        let command = command(&network, families, (1500, publish), 7);
        let words = command.get_args().map(|word| word.to_str().unwrap());
        words.collect::<Vec<_>>().join(" ")
    };
    let all = words(BOTH, &publish);
    for part in [
        "--fd 7 ",
        "--address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 --dns-forward 10.0.2.3 --mtu 1500",
        "--address fd00::15 --gateway fd00::2 ",
        "--tcp-ports 127.0.0.1/8080:80 --tcp-ports ::/8080:80",
        "--udp-ports 0.0.0.0/53:5353 --udp-ports 127.0.0.1/81:82",
    ] {
        assert!(all.contains(part), "{all}");
    }
    // What is not published is not listened on.
    let none = words(FOUR, &[]);
    assert!(none.ends_with("--tcp-ports none --udp-ports none"));
    let six = words(SIX, &[]);
    assert!(six.contains("--ipv6-only") && six.contains("--dns-forward fd00::3"));
    assert!(!six.contains("10.0.2"), "{six}");
    let four = Publish {
        host_ip: std::net::Ipv4Addr::LOCALHOST.into(),
        ..publish[0]
    };
    let error = can_listen(&four, SIX).unwrap_err().to_string();
    assert!(
        error.contains("default route of IPv4; see 'ip -4 route', or publish an IPv6"),
        "{error}"
    );
    assert!(!all.contains("ipv4-only") && none.contains("--ipv4-only") && !none.contains("fd00"));
}

#[test]
fn the_default_route_of_ipv6() {
    let line = |destination: &str, prefix, flags, interface| {
        let zero = "0".repeat(32);
        format!(
            "{destination} {prefix} {zero} 00 {zero} 00000400 00000001 00000000 {flags} {interface}\n"
        )
    };
    let (zero, other) = ("0".repeat(32), "fe80".to_string() + &"0".repeat(28));
    let reject = line(&zero, "00", "00200200", "lo");
    assert!(!has_default_route(""));
    assert!(!has_default_route(&reject));
    assert!(!has_default_route(&line(&other, "40", "00000001", "eth0")));
    assert!(!has_default_route(&line(&zero, "00", "00200200", "eth0")));
    assert!(has_default_route(
        &(reject + &line(&zero, "00", "00000003", "eth0"))
    ));
}

#[test]
fn the_default_route_of_ipv4() {
    let routes = |destination, flags, mask| {
        format!("Iface Destination …\neth0 {destination} 010200C0 {flags} 0 0 0 {mask} 0 0 0\n")
    };
    assert!(!has_default_route_of_ipv4(""));
    assert!(!has_default_route_of_ipv4(&routes(
        "000200C0", "0001", "00FFFFFF"
    )));
    assert!(!has_default_route_of_ipv4(&routes(
        "00000000", "0201", "00000000"
    )));
    assert!(has_default_route_of_ipv4(&routes(
        "00000000", "0003", "00000000"
    )));
}
