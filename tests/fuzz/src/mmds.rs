//! `mmds`: frames of a guest to the metadata service and back, any bytes or the segments of a
//! connection that the guest keeps.

use std::sync::Arc;

use devices::mmds::{DEFAULT_ADDRESS, MAX_CONNECTIONS, Mmds, Service, Stack};
use devices::virtio::net::{DETOUR_HEAD, Detour};

use super::input::Input;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const ADDRESS: [u8; 4] = [10, 0, 0, 2];
/// Most frames that may come of one step.
const MOST: usize = 64 * MAX_CONNECTIONS;
const SYN: u8 = 2;

const REQUESTS: [&str; 6] = [
    "GET / HTTP/1.1\r\n\r\n",
    "GET /a/b HTTP/1.0\r\nAccept: application/json\r\n\r\n",
    "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n",
    "GET /l HTTP/1.1\r\nX-aws-ec2-metadata-token: ",
    "\r\n\r\n",
    "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
];

/// A connection as the guest keeps it.
#[derive(Clone, Copy, Default)]
struct Ends {
    sent: u32,
    heard: u32,
}

struct Guest {
    stack: Stack,
    /// By port.
    ends: [Ends; 4],
}

impl Guest {
    fn segment(&mut self, port: u8, flags: u8, payload: &[u8]) {
        let ends = &mut self.ends[usize::from(port % 4)];
        let total = 40 + payload.len() as u16;
        let mut frame = vec![0; 14];
        frame[6..12].copy_from_slice(&MAC);
        frame[12] = 8;
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend(ADDRESS);
        frame.extend(DEFAULT_ADDRESS.octets());
        frame.extend([0x40, port % 4, 0, 80]);
        frame.extend(ends.sent.to_be_bytes());
        frame.extend(ends.heard.to_be_bytes());
        frame.extend([0x50, flags, 0x10, 0, 0, 0, 0, 0]);
        frame.extend(payload);
        let more = payload.len() as u32 + u32::from(flags & 3 != 0);
        ends.sent = ends.sent.wrapping_add(more);
        self.send(&frame);
    }

    fn send(&mut self, frame: &[u8]) {
        let mut start = [0; DETOUR_HEAD];
        for (to, from) in start.iter_mut().zip(frame) {
            *to = *from;
        }
        if self.stack.takes(&start) {
            self.stack.send(frame);
        }
    }

    /// Takes what is answered, with the numbers of the connections.
    fn hear(&mut self) {
        for count in 0.. {
            assert!(count < MOST, "it never ends");
            let Some(frame) = self.stack.receive() else {
                break;
            };
            assert!((42..=1514).contains(&frame.len()), "{} bytes", frame.len());
            if frame[12..14] != [8, 0] {
                continue;
            }
            let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("four"));
            let head = 34 + usize::from(frame[46] >> 4) * 4;
            let more = (frame.len() - head) as u32 + u32::from(frame[47] & 3 != 0);
            if frame[36] == 0x40 {
                self.ends[usize::from(frame[37] % 4)].heard = word(38).wrapping_add(more);
            }
        }
        assert!(!self.stack.is_waiting());
    }
}

/// Runs `data` as steps of a guest.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mmds = Arc::new(Mmds::new(1 << 16));
    let document = format!(r#"{{"a":{{"b":"c"}},"l":"{}"}}"#, "x".repeat(20_000));
    let put = mmds.put(serde_json::from_str(&document).expect("a document"));
    put.expect("it fits");
    mmds.serve(Service {
        sessions: input.u8() & 1 != 0,
        imds_compat: false,
    });
    let mut guest = Guest {
        stack: Stack::new(mmds, DEFAULT_ADDRESS),
        ends: Default::default(),
    };
    for _ in 0..400 {
        if input.is_empty() {
            break;
        }
        let [what, port] = input.array();
        match what % 8 {
            0 => {
                let len = input.u8();
                guest.send(input.bytes(len.into()));
            }
            1 => {
                guest.ends[usize::from(port % 4)].heard = 0;
                guest.segment(port, SYN, b"");
            }
            2 => guest.segment(port, input.u8(), b""),
            3 | 4 => {
                let request = REQUESTS[usize::from(input.u8()) % REQUESTS.len()];
                guest.segment(port, 0x18, request.as_bytes());
            }
            5 => {
                let [flags, len] = input.array();
                let payload = input.bytes(len.into()).to_vec();
                guest.segment(port, flags, &payload);
            }
            6 => {
                let ends = &mut guest.ends[usize::from(port % 4)];
                ends.sent = ends.sent.wrapping_sub(u32::from(input.u8()));
            }
            _ => guest.hear(),
        }
        guest.stack.due();
    }
    guest.hear();
    guest.stack.reset();
}
