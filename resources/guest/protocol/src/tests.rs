extern crate std;

use proptest::prelude::*;
use std::vec::Vec;

use crate::frame::{HEADER, SYNC};
use crate::start::StartView;
use crate::*;

type Owned = (u8, u8, Vec<u8>);

fn frames_in(decoder: &mut Decoder, mut bytes: &[u8]) -> Vec<Owned> {
    let mut found = Vec::new();
    while let Some(f) = decoder.decode(&mut bytes) {
        found.push((f.kind, f.flags, f.payload.to_vec()));
    }
    assert!(bytes.is_empty());
    found
}

fn bytes_of((kind, flags, payload): &Owned) -> Vec<u8> {
    let mut out = [0; MAX_FRAME];
    let n = encode(
        Frame {
            kind: *kind,
            flags: *flags,
            payload,
        },
        &mut out,
    )
    .unwrap();
    out[..n].to_vec()
}

fn any_frame() -> impl Strategy<Value = Owned> {
    (
        any::<u8>(),
        any::<u8>(),
        prop::collection::vec(any::<u8>(), 0..300),
    )
}

fn guest_bytes(message: FromGuest<'_>) -> Vec<u8> {
    let mut out = [0; MAX_FRAME];
    let n = message.encode(&mut out).unwrap();
    out[..n].to_vec()
}

fn host_bytes(message: FromHost<'_>) -> Vec<u8> {
    let mut out = [0; MAX_FRAME];
    let n = message.encode(&mut out).unwrap();
    out[..n].to_vec()
}

#[test]
fn the_bytes_of_a_frame_are_as_documented() {
    let bytes = host_bytes(FromHost::Signal(15));
    assert_eq!(
        bytes,
        [
            0xb0, 0x11, 0x85, 0, 1, 0, 0xfb, 0x09, 15, 0x8a, 0x33, 0xde, 0x01
        ]
    );
    assert_eq!(bytes.len(), OVERHEAD + 1);
}

#[test]
fn largest_payload_passes_and_a_larger_one_does_not() {
    let mut out = [0; MAX_FRAME + 10];
    let payload = [0x5a; MAX_PAYLOAD + 1];
    let full = Frame {
        kind: 3,
        flags: 0,
        payload: &payload[..MAX_PAYLOAD],
    };
    assert_eq!(encode(full, &mut out), Some(MAX_FRAME));
    let mut decoder = Decoder::new();
    let mut input = &out[..MAX_FRAME];
    assert_eq!(decoder.decode(&mut input), Some(full));
    assert_eq!(
        encode(
            Frame {
                payload: &payload,
                ..full
            },
            &mut out
        ),
        None
    );
    assert_eq!(encode(full, &mut out[..MAX_FRAME - 1]), None);
}

#[test]
fn a_false_header_does_not_swallow_the_next_frame() {
    let mut bytes = std::vec![SYNC[0], SYNC[1], 3, 0, 0xff, 0x0f, 1, 2];
    let frame = (1, 0, b"hello".to_vec());
    bytes.extend(bytes_of(&frame));
    let mut decoder = Decoder::new();
    assert_eq!(frames_in(&mut decoder, &bytes), [frame]);
    assert_eq!(decoder.skipped(), HEADER as u64);
}

#[test]
fn every_guest_message_survives_the_wire() {
    let hello = Hello {
        version: 1,
        features: 5,
        window: 2048,
        release: b"6.1.0-56-cloud-amd64",
    };
    let messages = [
        FromGuest::Hello(hello),
        FromGuest::Started { pid: 0x0102_0304 },
        FromGuest::Stdout(b"out"),
        FromGuest::Stderr(b""),
        FromGuest::Exited(Exit::Code(37)),
        FromGuest::Exited(Exit::Signal(9)),
        FromGuest::Failed {
            stage: Stage::Exec,
            errno: 2,
            text: b"/bin/nope",
        },
        FromGuest::Log {
            level: Level::Warn,
            text: b"module",
        },
        FromGuest::Stopping(Power::Reboot),
        FromGuest::Credit(77),
    ];
    for message in messages {
        let bytes = guest_bytes(message);
        let mut decoder = Decoder::new();
        let frame = decoder.decode(&mut &bytes[..]).unwrap();
        assert_eq!(FromGuest::parse(frame), Ok(message));
        assert!(
            FromHost::parse(frame).is_err(),
            "{message:?} must not pass for the host's"
        );
    }
}

#[test]
fn every_host_message_survives_the_wire() {
    let messages = [
        FromHost::Start {
            last: false,
            bytes: b"x",
        },
        FromHost::Start {
            last: true,
            bytes: b"yz",
        },
        FromHost::Stdin(b"in"),
        FromHost::StdinEof,
        FromHost::Resize(WinSize { rows: 24, cols: 80 }),
        FromHost::Address {
            from: [2, 0, 0, 0, 0, 1],
            to: [2, 0, 0, 0, 0, 2],
        },
        FromHost::Signal(2),
        FromHost::Shutdown(Power::Off),
        FromHost::Credit(4096),
    ];
    for message in messages {
        let bytes = host_bytes(message);
        let mut decoder = Decoder::new();
        let frame = decoder.decode(&mut &bytes[..]).unwrap();
        assert_eq!(FromHost::parse(frame), Ok(message));
        assert!(FromGuest::parse(frame).is_err());
    }
}

#[test]
fn wrong_lengths_values_and_flags_are_malformed() {
    let cases: [(u8, u8, &[u8]); 9] = [
        (0x02, 0, &[1, 2, 3]),
        (0x02, 0, &[1, 2, 3, 4, 5]),
        (0x05, 0, &[2, 0]),
        (0x06, 0, &[99, 0, 0]),
        (0x08, 0, &[3]),
        (0x03, 1, b"flag"),
        (0x08, 0x10, &[0]),
        (0x00, 0, &[]),
        (0x7f, 0, &[]),
    ];
    for (kind, flags, payload) in cases {
        let frame = Frame {
            kind,
            flags,
            payload,
        };
        assert_eq!(FromGuest::parse(frame), Err(Malformed { kind }));
    }
    for (kind, flags, payload) in [
        (0x81, 2, &b"x"[..]),
        (0x81, 1, b""),
        (0x83, 0, b"x"),
        (0x86, 0, &[9]),
        (0x86, 0x10, &[0]),
    ] {
        assert!(
            FromHost::parse(Frame {
                kind,
                flags,
                payload
            })
            .is_err()
        );
    }
}

#[test]
fn long_texts_are_cut() {
    let text = [b'x'; 600];
    let bytes = guest_bytes(FromGuest::Log {
        level: Level::Info,
        text: &text,
    });
    assert_eq!(bytes.len(), OVERHEAD + 1 + message::MAX_TEXT);
}

#[test]
fn start_names_the_broken_limit() {
    let none: [&[u8]; 0] = [];
    let start = Start {
        window: 1,
        tty: None,
        cwd: &b""[..],
        argv: &none,
        env: &none,
    };
    assert_eq!(start.encoded_len(), Err(StartError::Empty));
    let nul: [&[u8]; 1] = [b"a\0b"];
    assert_eq!(
        Start {
            argv: &nul,
            ..start
        }
        .encoded_len(),
        Err(StartError::Nul)
    );
    let many = [&b"a"[..]; MAX_STRINGS + 1];
    let error = Start {
        argv: &many,
        ..start
    }
    .encoded_len();
    assert_eq!(error, Err(StartError::TooMany(MAX_STRINGS + 1)));
    let long = std::vec![b'a'; MAX_START];
    let error = Start {
        argv: &[&long[..]],
        ..start
    }
    .encoded_len();
    assert_eq!(error, Err(StartError::TooLong(14 + 1 + MAX_START + 1)));
}

proptest! {
    #[test]
    fn any_split_and_any_noise_between_gives_the_same_frames(
        frames in prop::collection::vec(any_frame(), 0..6),
        // 0xb0 would start a frame; noise with it is the next test's matter.
        noise in prop::collection::vec(0u8..0xb0, 0..40),
        cuts in prop::collection::vec(1usize..50, 1..40),
    ) {
        let mut stream = noise.clone();
        for frame in &frames {
            stream.extend(bytes_of(frame));
            stream.extend(&noise);
        }
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        let mut rest = &stream[..];
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            found.extend(frames_in(&mut decoder, now));
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(found, frames);
    }

    #[test]
    fn a_damaged_frame_is_never_returned_and_the_next_is_found(
        first in any_frame(), second in any_frame(), at in any::<prop::sample::Index>(), flip in 1u8..
    ) {
        let mut stream = bytes_of(&first);
        let at = at.index(stream.len());
        stream[at] ^= flip;
        stream.extend(bytes_of(&second));
        let mut decoder = Decoder::new();
        let found = frames_in(&mut decoder, &stream);
        prop_assert_eq!(found, [second]);
        prop_assert_eq!(decoder.skipped(), bytes_of(&first).len() as u64);
    }

    #[test]
    fn no_bytes_panic(stream in prop::collection::vec(
        prop_oneof![Just(0xb0u8), Just(0x11), Just(0), any::<u8>()], 0..3000)) {
        let mut decoder = Decoder::new();
        let mut input = &stream[..];
        while let Some(frame) = decoder.decode(&mut input) {
            let _ = (FromGuest::parse(frame), FromHost::parse(frame));
        }
        prop_assert!(decoder.skipped() <= stream.len() as u64);
    }

    #[test]
    fn no_payload_panics(kind in any::<u8>(), flags in 0u8..3,
                         payload in prop::collection::vec(any::<u8>(), 0..40)) {
        let frame = Frame { kind, flags, payload: &payload };
        if let Ok(message) = FromGuest::parse(frame) {
            prop_assert_eq!(guest_bytes(message), bytes_of(&(kind, flags, payload.clone())));
        }
        if let Ok(message) = FromHost::parse(frame) {
            prop_assert_eq!(host_bytes(message), bytes_of(&(kind, flags, payload.clone())));
        }
        let _ = StartView::parse(&payload);
    }

    #[test]
    fn start_survives_its_layout(
        strings in prop::collection::vec(prop::collection::vec(1u8.., 0..20), 2..20),
        split in any::<prop::sample::Index>(), tty in any::<Option<(u16, u16)>>(), window in any::<u32>(),
    ) {
        let (cwd, rest) = strings.split_first().unwrap();
        let (argv, env) = rest.split_at(1 + split.index(rest.len()));
        let tty = tty.map(|(rows, cols)| WinSize { rows, cols });
        let start = Start { window, tty, cwd: cwd.clone(), argv, env };
        let mut out = [0; 1024];
        let n = start.encode(&mut out).unwrap();
        prop_assert_eq!(Ok(n), start.encoded_len());
        let view = StartView::parse(&out[..n]).unwrap();
        prop_assert_eq!((view.window, view.tty), (window, tty));
        prop_assert_eq!((view.argc, view.envc), (argv.len(), env.len()));
        let read: Vec<Vec<u8>> =
            view.strings().map(|s| s.strip_suffix(&[0]).unwrap().to_vec()).collect();
        prop_assert_eq!(read, strings);
        prop_assert!(StartView::parse(&out[..n - 1]).is_err());
    }
}

#[test]
fn messages_are_about_a_command() {
    let mut out = [0; MAX_FRAME];
    let n = FromGuest::Stdout(b"x").encode_for(7, &mut out).unwrap();
    let mut decoder = Decoder::new();
    let frame = decoder.decode(&mut &out[..n]).unwrap();
    assert_eq!((frame.job(), frame.flags), (7, 0x70));
    assert_eq!(FromGuest::parse(frame), Ok(FromGuest::Stdout(b"x")));
    let start = FromHost::Start {
        last: true,
        bytes: b"x",
    };
    let n = start.encode_for(2, &mut out).unwrap();
    let mut decoder = Decoder::new();
    let frame = decoder.decode(&mut &out[..n]).unwrap();
    assert_eq!((frame.job(), frame.flags), (2, 0x21));
    assert_eq!(FromHost::parse(frame), Ok(start));
}
