//! `agent_protocol`: any bytes of a guest at the host's client while that is being used, and any
//! bytes of a host at the guest's decoder and parsers.

use agent_protocol::start::StartView;
use agent_protocol::{
    Decoder, Frame, FromGuest, FromHost, HOST_WINDOW, MAX_FRAME, Power, WinSize, encode,
};
use bulle::guest::client::{AgentClient, AgentEvent, StartRequest};

use super::input::Input;

/// More than the client ever has waiting for its channel.
const OUTGOING_MAX: usize = 8 << 10;

/// Runs both sides on `data`.
pub fn run(data: &[u8]) {
    guest_side(data);
    Host::new(data).run(Input(data));
}

fn guest_side(data: &[u8]) {
    let mut rest = data;
    let mut decoder = Decoder::new();
    while let Some(frame) = decoder.decode(&mut rest) {
        message(frame);
    }
    assert!(rest.is_empty(), "bytes were left");
    if let Some((&[kind, flags], payload)) = data.split_first_chunk() {
        message(Frame {
            kind,
            flags,
            payload,
        });
    }
    if let Ok(start) = StartView::parse(data) {
        assert_eq!(start.strings().count(), 1 + start.argc + start.envc);
        assert!(start.strings().all(|text| text.last() == Some(&0)));
    }
}

/// What a frame means comes out again as the same frame. Longer texts are cut, so only others count.
fn message(frame: Frame<'_>) {
    let mut out = [0; MAX_FRAME];
    let both = [
        FromHost::parse(frame)
            .ok()
            .map(|message| message.encode_for(frame.job(), &mut out)),
        FromGuest::parse(frame)
            .ok()
            .map(|message| message.encode_for(frame.job(), &mut out)),
    ];
    assert!(
        both.iter().flatten().count() < 2,
        "kind {} has two directions",
        frame.kind
    );
    let Some(Some(length)) = both.into_iter().flatten().next() else {
        return;
    };
    let mut bytes = &out[..length];
    let mut decoder = Decoder::new();
    let again = decoder
        .decode(&mut bytes)
        .expect("an encoded frame is intact");
    assert_eq!((again.kind, again.flags), (frame.kind, frame.flags));
    if frame.payload.len() <= agent_protocol::message::MAX_TEXT {
        assert_eq!(again.payload, frame.payload);
    }
}

/// The host's client, and what a guest would see of it.
struct Host {
    client: AgentClient,
    decoder: Decoder,
    start: Vec<u8>,
    accepted: Vec<u8>,
    seen: Vec<u8>,
    unconsumed: usize,
    dead: bool,
}

impl Host {
    fn new(data: &[u8]) -> Self {
        // A Start of two pieces for some inputs.
        let long = if data.len().is_multiple_of(2) {
            1
        } else {
            1500
        };
        let request = StartRequest {
            argv: vec!["x".repeat(long).into(), "-c".into()],
            env: vec!["A=1".into()],
            ..StartRequest::default()
        };
        Self {
            client: AgentClient::new(&request).expect("a valid request"),
            decoder: Decoder::new(),
            start: Vec::new(),
            accepted: Vec::new(),
            seen: Vec::new(),
            unconsumed: 0,
            dead: false,
        }
    }

    fn run(&mut self, mut input: Input<'_>) {
        while !input.is_empty() {
            self.step(&mut input);
            assert!(self.client.outgoing().len() <= OUTGOING_MAX);
            assert!(self.unconsumed <= HOST_WINDOW as usize);
            assert!(
                self.accepted.starts_with(&self.seen),
                "input was changed on its way"
            );
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() {
            0..64 => {
                let length = input.u8();
                self.receive(input.bytes(length.into()));
            }
            64..128 => {
                let [kind, flags, length] = input.array();
                let payload = input.bytes(length.into());
                let mut out = [0; MAX_FRAME];
                let length = encode(
                    Frame {
                        kind,
                        flags,
                        payload,
                    },
                    &mut out,
                )
                .unwrap_or_default();
                self.receive(&out[..length]);
            }
            // All of the window in a few steps.
            128..144 => {
                let mut out = [0; MAX_FRAME];
                let payload = vec![b'o'; input.u16().min(4096).into()];
                let length = FromGuest::Stdout(&payload)
                    .encode(&mut out)
                    .unwrap_or_default();
                self.receive(&out[..length]);
            }
            144..176 => {
                let bytes = usize::from(input.u16());
                self.client.consumed(bytes);
                self.unconsumed = self.unconsumed.saturating_sub(bytes);
            }
            176..208 => self.send(input.u16().into()),
            208..232 => {
                let length = input.u8();
                let bytes = input.bytes(length.into());
                let taken = self.client.stdin(bytes);
                self.accepted.extend_from_slice(&bytes[..taken]);
            }
            232..236 => self.client.stdin_eof(),
            236..242 => {
                let (rows, cols) = (input.u16(), input.u16());
                self.client.resize(WinSize { rows, cols });
            }
            242..248 => self.client.signal(input.u8()),
            _ => self.client.shutdown(Power::Off),
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let mut events = Vec::new();
        self.client.received(bytes, &mut events);
        for event in events {
            assert!(!self.dead, "{event:?} after the protocol was broken");
            match event {
                AgentEvent::Stdout(bytes) | AgentEvent::Stderr(bytes) => {
                    self.unconsumed += bytes.len();
                }
                AgentEvent::ProtocolError(_) => self.dead = true,
                _ => {}
            }
        }
    }

    /// The channel takes `n` bytes; the guest understands each message.
    fn send(&mut self, n: usize) {
        let bytes = self.client.outgoing();
        let bytes = bytes[..n.min(bytes.len())].to_vec();
        self.client.sent(n);
        let mut rest = &bytes[..];
        while let Some(frame) = self.decoder.decode(&mut rest) {
            match FromHost::parse(frame).expect("the client speaks the protocol") {
                FromHost::Start { last, bytes } => {
                    self.start.extend_from_slice(bytes);
                    assert!(!last || StartView::parse(&self.start).is_ok());
                }
                FromHost::Stdin(bytes) => self.seen.extend_from_slice(bytes),
                _ => {}
            }
        }
        assert_eq!(self.decoder.skipped(), 0);
    }
}
