//! Networks with Debian's own driver: taps and user mode, on both transports. Each test has the
//! host's side in a network namespace of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{filter, linux};
use crate::common::{Input, Outcome, Running, guest_tool};

const BYTES: usize = 2 << 20;
const SLOW_BYTES: usize = 768 << 10;
/// The host's address and resolver in its namespace, and what the resolver says of every name.
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const HOST_SIX: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
const ANSWER: [u8; 4] = [203, 0, 113, 7];

pub fn sh(script: &str) {
    let status = Command::new("sh").args(["-ec", script]).status().unwrap();
    assert!(status.success(), "{script}: {status}");
}

/// Runs a test on a thread that has, with what it starts, a network of its own.
pub fn in_a_network(test: impl FnOnce() + Send + 'static) {
    let inside = move || {
        let dir = tempfile::tempdir().unwrap();
        own_network(dir.path());
        test();
    };
    if let Err(panic) = thread::spawn(inside).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Gives this thread a network with a default route and a resolver.
fn own_network(dir: &Path) {
    // SAFETY: it changes what this thread sees of the network and of mounts, and no memory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    let resolver = dir.join("resolv.conf");
    fs::write(&resolver, format!("nameserver {HOST}\n")).unwrap();
    sh(&format!(
        "modprobe tun; modprobe vhost_net
         mount --make-rprivate /; mount --bind {} /etc/resolv.conf
         ip link set lo up
         ip tuntap add dev uplink mode tap; ip addr add {HOST}/24 dev uplink
         ip link set uplink up; ip route add default via 192.0.2.1
         echo 0 >/proc/sys/net/ipv6/conf/uplink/accept_dad
         ip -6 addr add fe80::2/64 dev uplink; ip -6 addr add 2001:db8::2/64 dev uplink; ip -6 route add default via 2001:db8::1 dev uplink",
        resolver.display()
    ));
}

/// Bytes that are different everywhere.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(next).collect()
}

pub fn md5(bytes: &[u8]) -> String {
    let line = String::from_utf8(filter("md5sum", &[], bytes)).unwrap();
    line.split(' ').next().unwrap().to_string()
}

/// Serves `clients` clients that fetch a file of `len` bytes by HTTP. Returns the port, and how long
/// each took.
fn serve_file(
    at: impl Into<IpAddr>,
    len: usize,
    clients: usize,
) -> (u16, mpsc::Receiver<Duration>) {
    let listener = TcpListener::bind(SocketAddr::new(at.into(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, times) = mpsc::channel();
    for client in listener_clients(listener, clients) {
        let sender = sender.clone();
        thread::spawn(move || {
            let mut client = client.recv().unwrap();
            let (start, mut request) = (Instant::now(), Vec::new());
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") {
                client.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            write!(client, "HTTP/1.0 200 OK\r\nContent-Length: {len}\r\n\r\n").unwrap();
            client.write_all(&pattern(len)).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            // Its end is the client's.
            let _ = client.read(&mut byte);
            let _ = sender.send(start.elapsed());
        });
    }
    (port, times)
}

/// The next `count` clients of a listener.
fn listener_clients(listener: TcpListener, count: usize) -> Vec<mpsc::Receiver<TcpStream>> {
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::channel()).unzip();
    thread::spawn(move || {
        for sender in senders {
            let _ = sender.send(listener.accept().unwrap().0);
        }
    });
    receivers
}

/// Takes `len` bytes of each of `clients` clients. Returns the port, and how long each took and
/// whether the bytes are right.
fn take_files(at: Ipv4Addr, len: usize, clients: usize) -> (u16, mpsc::Receiver<(Duration, bool)>) {
    let listener = TcpListener::bind(SocketAddr::new(at.into(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, times) = mpsc::channel();
    for client in listener_clients(listener, clients) {
        let sender = sender.clone();
        thread::spawn(move || {
            let mut client = client.recv().unwrap();
            let (start, mut bytes) = (Instant::now(), vec![0; len]);
            let got = client.read_exact(&mut bytes);
            let right = got.is_ok() && bytes == pattern(len);
            let _ = sender.send((start.elapsed(), right));
        });
    }
    (port, times)
}

/// Answers every question for an IPv4 address with [`ANSWER`], others with nothing.
fn serve_names() {
    let socket = UdpSocket::bind((HOST, 53)).unwrap();
    thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut question) {
            let end = 12 + question[12..len].iter().position(|b| *b == 0).unwrap() + 5;
            let for_address = question[end - 4..end] == [0, 1, 0, 1];
            let mut answer = question[..end].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, for_address.into(), 0, 0, 0, 0]);
            if for_address {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend(ANSWER);
            }
            socket.send_to(&answer, from).unwrap();
        }
    });
}

/// Statistics of an interface of the host: bytes and packets.
fn statistics(name: &str, direction: &str) -> (u64, u64) {
    // The files in /sys are those of the namespace that mounted it.
    let output = Command::new("ip")
        .args(["-s", "-o", "link", "show", name])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (_, after) = text.split_once(&format!("{direction}:")).unwrap();
    let (_, numbers) = after.split_once('\\').unwrap();
    let mut numbers = numbers.split_ascii_whitespace().map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// Opens a tap interface of this thread's network for the processes that it starts.
fn open_tap(name: &str) -> i32 {
    let path = c"/dev/net/tun";
    // SAFETY: plain system calls with a structure and a text that outlive them.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_RDWR);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        let set = libc::ioctl(fd, libc::TUNSETIFF, &raw mut request);
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        fd
    }
}

/// What both interfaces with offloads have, and that these are used.
fn check_offloads(outcome: &Outcome) {
    // CSUM, GUEST_CSUM, MTU, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, CTRL_VQ, MQ (section 5.1.3).
    for (interface, mtu) in [("features", true), ("kernel", false)] {
        let bits = outcome.value(interface).as_bytes();
        for bit in [0, 1, 3, 5, 7, 8, 11, 12, 15, 16, 17, 22] {
            let expected = bit != 3 || mtu;
            assert_eq!(
                bits[bit] == b'1',
                expected,
                "{interface} {bit}: {outcome:#?}"
            );
        }
    }
    // Larger than the MTU: those of the host on its side, those of the guest as it counts them.
    let (bytes, packets) = statistics("fast", "TX");
    assert!(
        bytes > 4 * BYTES as u64 && bytes / packets > 1400,
        "{bytes} in {packets}"
    );
    let sent = outcome.value("sent").split(' ').map(|n| n.parse().unwrap());
    let sent: Vec<u64> = sent.collect();
    let (bytes, packets) = (sent[2] - sent[0], sent[3] - sent[1]);
    assert!(
        bytes > 2 * BYTES as u64 && bytes / packets > 1400,
        "{sent:?}"
    );
}

/// Files both ways, with checksums, over several connections at once; segments larger than the MTU
/// on the host's side; a second interface with limits.
fn tap(flavour: &str, more: &[&str]) {
    sh(
        "ip tuntap add dev fast mode tap multi_queue; ip addr add 10.9.0.1/24 dev fast
        ip tuntap add dev slow mode tap; ip addr add 10.9.1.1/24 dev slow
        ip tuntap add dev kern mode tap multi_queue; ip addr add 10.9.2.1/24 dev kern
        ip link set fast up; ip link set slow up; ip link set kern up",
    );
    let [fast, slow, kern] = [0, 1, 2].map(|net| Ipv4Addr::new(10, 9, net, 1));
    let (kern_down, _) = serve_file(kern, SLOW_BYTES, 1);
    let (kern_up, kern_taken) = take_files(kern, SLOW_BYTES, 1);
    let (down, _) = serve_file(fast, BYTES, 4);
    let (up, taken) = take_files(fast, BYTES, 2);
    let (slow_down, down_times) = serve_file(slow, SLOW_BYTES, 1);
    let (slow_up, up_times) = take_files(slow, SLOW_BYTES, 1);
    let script = format!(
        "cd /sys/class/net; echo interfaces $(ls)
        ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
        ip addr add 10.9.1.2/24 dev eth1; ip link set eth1 up
        ip addr add 10.9.2.2/24 dev eth2; ip link set eth2 up
        echo mac $(cat eth0/address); echo mtu $(cat eth0/mtu) $(cat eth1/mtu)
        echo queues $(ls -d eth0/queues/rx-* | wc -l) $(ls -d eth0/queues/tx-* | wc -l)
        echo features $(cat eth0/device/features); cd /tmp
        ping -c 20 -i 0.1 -s 1200 10.9.0.1 | grep -o '[0-9]*% packet loss'
        for n in 1 2 3 4; do wget -q -O got$n http://10.9.0.1:{down}/ & done; wait
        echo sums $(md5sum got* | cut -d ' ' -f 1 | sort -u)
        sent() {{ cat /sys/class/net/eth0/statistics/tx_bytes /sys/class/net/eth0/statistics/tx_packets; }}
        before=$(sent); for n in 1 2; do nc 10.9.0.1 {up} <got$n & done; wait
        echo sent $before $(sent)
        wget -q -O slow http://10.9.1.1:{slow_down}/; echo slow $(md5sum <slow)
        nc 10.9.1.1 {slow_up} <slow
        echo kernel $(cat /sys/class/net/eth2/device/features)
        ping -c 5 -i 0.1 -s 1200 10.9.2.1 | grep -o ', [0-9]*% packet loss'
        wget -q -O kern http://10.9.2.1:{kern_down}/; echo by-kernel $(md5sum <kern)
        nc 10.9.2.1 {kern_up} <kern; echo open; read answer"
    );
    // What a parent opened, of which bulle knows the number.
    let inherited = open_tap("slow");
    let limits = format!("fd={inherited},rx_rate.bandwidth.size=256K,tx_rate.bandwidth.size=256K");
    let running = linux(flavour)
        .args(["--cpus", "2", "--net"])
        .arg("tap=fast,queues=2,mtu=1400,mac=02:00:00:00:be:ef")
        .args(["--net", &limits, "--net", "tap=kern,queues=2,vhost=on"])
        .args(more)
        .timeout("280s")
        .patience(Duration::from_secs(290))
        .command(["sh", "-c", &script])
        .input(Input::Open)
        .start()
        .wait_for("open\n");
    // An instance for each pair of queues.
    let files = fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap();
    let files = files.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let instances = files.filter(|file| file == Path::new("/dev/vhost-net"));
    assert_eq!(instances.count(), 2);
    let outcome = running.types("seen\n").finish().exits(0);
    let sum = md5(&pattern(BYTES));
    assert_eq!(outcome.value("interfaces"), "eth0 eth1 eth2 lo");
    assert_eq!(outcome.value("mac"), "02:00:00:00:be:ef");
    assert_eq!(outcome.value("mtu"), "1400 1500");
    assert_eq!(outcome.value("queues"), "2 2");
    assert_eq!(outcome.value("0%"), "packet loss");
    assert_eq!(outcome.value("sums"), sum);
    assert!(taken.recv().unwrap().1 && taken.recv().unwrap().1);
    let slow_sum = format!("{} -", md5(&pattern(SLOW_BYTES)));
    assert_eq!(outcome.value("slow"), slow_sum);
    assert_eq!(outcome.value("by-kernel"), slow_sum);
    assert_eq!(outcome.value(", 0%"), "packet loss");
    assert!(kern_taken.recv().unwrap().1);
    check_offloads(&outcome);
    // A bucket that is full at first, and a third of the file each second.
    let (received, (sent, right)) = (down_times.recv().unwrap(), up_times.recv().unwrap());
    assert!(right, "other bytes came to the host");
    let least = Duration::from_millis(1500);
    assert!(received > least && sent > least, "{received:?}, {sent:?}");
}

#[test]
fn taps_on_mmio() {
    in_a_network(|| tap("amd64", &[]));
}

#[test]
fn taps_on_pci() {
    in_a_network(|| tap("cloud-amd64", &["--pci"]));
}

/// What passt leads to the guest's port, as soon as the guest listens.
fn published(host: IpAddr, port: u16) -> String {
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        let mut text = String::new();
        if let Ok(mut client) = TcpStream::connect((host, port)) {
            client
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            // passt of 2023 completes the guest's handshake when there is something to send.
            let _ = client.write_all(b"hello\n");
            let _ = client.read_to_string(&mut text);
        }
        if !text.is_empty() {
            return text;
        }
        thread::sleep(Duration::from_millis(200));
    }
    String::new()
}

/// Whether a datagram to a published port comes back, as soon as the guest listens.
fn echoes(host: IpAddr, port: u16) -> bool {
    let socket = UdpSocket::bind((host, 0)).unwrap();
    socket.connect((host, port)).unwrap();
    let patience = Some(Duration::from_millis(500));
    socket.set_read_timeout(patience).unwrap();
    let (sent, mut got) = (pattern(1200), [0; 2000]);
    (0..100).any(|_| {
        // Refused until somebody listens.
        let _ = socket.send(&sent);
        socket.recv(&mut got).is_ok_and(|len| got[..len] == sent)
    })
}

/// The passt that bulle has started.
fn passt_of(bulle: &Running) -> Pid {
    let stats = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let text = fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        let (pid, rest) = text.split_once(" (passt")?;
        let parent = rest.split_once(") ")?.1.split(' ').nth(1)?.to_string();
        (parent == bulle.pid().to_string()).then(|| Pid::from_raw(pid.parse().unwrap()))
    });
    let found: Vec<_> = stats.collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]
}

/// Address and resolver set by the agent and by DHCP, names, files both ways from the host's
/// loopback, a published port, and what the guest sees when passt dies and another one comes.
fn user(flavour: &str, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    serve_names();
    let (down, _) = serve_file(Ipv4Addr::LOCALHOST, BYTES, 2);
    let (up, taken) = take_files(Ipv4Addr::LOCALHOST, BYTES, 1);
    let (down_six, _) = serve_file(HOST_SIX, BYTES, 1);
    let script = format!(
        "echo address $(ip -o -4 addr show dev eth0 | grep -o 'inet [^ ]*')
        echo route $(ip route | grep default); echo resolver $(cat /etc/resolv.conf)
        echo mtu $(cat /sys/class/net/eth0/mtu)
        echo six $(ip -o -6 addr show dev eth0 | grep -o 'inet6 fd[^ ]*::15/64')
        echo route-six $(ip -6 route | grep -o 'default via fd[^ ]*')
        echo name $(nslookup -type=a some.example | tail -n 3 | grep Address)
        cd /tmp; wget -q -O got http://10.0.2.2:{down}/; echo sum $(md5sum <got)
        nc 10.0.2.2 {up} <got
        wget -q -O six http://[{HOST_SIX}]:{down_six}/; echo sum-six $(md5sum <six)
        /tools/guest-tool datagrams 53 1 &
        printf '#!/bin/sh\\necho lease $1 $ip $router $subnet $mtu\\n' >lease; chmod +x lease
        udhcpc -f -n -q -i eth0 -s /tmp/lease 2>/dev/null | grep bound
        (while :; do echo from-guest | nc -l -p 80; done) >/dev/null 2>&1 & server=$!
        cd /sys/class/net/eth0; before=$(cat carrier_changes); echo serving
        while [ $(cat carrier_changes) -lt $((before + 2)) ]; do sleep 0.1; done
        kill $server; echo carrier $(cat carrier_down_count); cd /tmp
        wget -q -O again http://10.0.2.2:{down}/; echo sum-again $(md5sum <again)"
    );
    fs::copy(guest_tool(), dir.path().join("guest-tool")).unwrap();
    let tools = format!("{}:/tools:ro", dir.path().display());
    let running = linux(flavour)
        .args([
            "--share",
            &tools,
            "--net",
            "user",
            "--publish",
            "8080:80",
            "--publish",
            "[::1]:8081:80",
        ])
        .args(["--publish", "5353:53/udp", "--publish", "[::1]:5354:53/udp"])
        .args(more)
        .timeout("280s")
        .patience(Duration::from_secs(290))
        .command(["sh", "-c", &script])
        .input(Input::Open)
        .start()
        .wait_for("serving\n");
    let (four, six) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    assert_eq!(published(four, 8080), "from-guest\n");
    assert_eq!(published(six, 8081), "from-guest\n");
    assert!(echoes(four, 5353), "no datagram came back");
    kill(passt_of(&running), Signal::SIGKILL).unwrap();
    let outcome = running.finish().exits(0);
    let sum_of_file = format!("{} -", md5(&pattern(BYTES)));
    assert_eq!(outcome.value("address"), "inet 10.0.2.15/24");
    assert_eq!(outcome.value("route"), "default via 10.0.2.2 dev eth0");
    assert_eq!(outcome.value("resolver"), "nameserver 10.0.2.3");
    assert_eq!(outcome.value("mtu"), "65520");
    assert_eq!(outcome.value("six"), "inet6 fd62:756c:6c65:2::15/64");
    assert_eq!(
        outcome.value("route-six"),
        "default via fd62:756c:6c65:2::2"
    );
    assert_eq!(outcome.value("sum-six"), sum_of_file);
    let [a, b, c, d] = ANSWER;
    assert_eq!(outcome.value("name"), format!("Address: {a}.{b}.{c}.{d}"));
    assert_eq!(outcome.value("sum"), sum_of_file);
    assert!(taken.recv().unwrap().1, "other bytes came to the host");
    let lease = "bound 10.0.2.15 10.0.2.2 255.255.255.0 65520";
    assert_eq!(outcome.value("lease"), lease);
    assert_eq!(outcome.value("sum-again"), sum_of_file);
    assert_ne!(outcome.value("carrier"), "0");
    let outcome = outcome.complains("its link is down");
    outcome.complains("passt is started again");
}

#[test]
fn user_mode_on_mmio() {
    in_a_network(|| user("amd64", &[]));
}

#[test]
fn user_mode_on_pci() {
    in_a_network(|| user("cloud-amd64", &["--pci"]));
}
