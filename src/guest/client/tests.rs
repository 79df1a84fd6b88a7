use std::ffi::OsString;

use agent_protocol::start::StartView;
use agent_protocol::{GUEST_WINDOW, HOST_WINDOW, Hello, MAX_FRAME};
use proptest::prelude::*;

use super::job::STDIN_BUFFER;
use super::*;

pub(super) fn request() -> StartRequest {
    StartRequest {
        argv: vec!["echo".into(), "hi".into()],
        env: vec!["PATH=/bin".into()],
        ..StartRequest::default()
    }
}

pub(super) fn bytes_of(message: FromGuest<'_>) -> Vec<u8> {
    let mut out = [0; MAX_FRAME];
    let n = message.encode(&mut out).unwrap();
    out[..n].to_vec()
}

const HELLO: FromGuest<'_> = FromGuest::Hello(Hello {
    version: VERSION,
    features: 1,
    window: GUEST_WINDOW,
    release: b"6.1",
});

pub(super) fn tell(client: &mut AgentClient, message: FromGuest<'_>) -> Vec<AgentEvent> {
    let mut events = Vec::new();
    client.received(&bytes_of(message), &mut events);
    events
}

/// Takes all that the client sends, as kind, flags and payload.
pub(super) fn take(client: &mut AgentClient, decoder: &mut Decoder) -> Vec<(u8, u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while !client.outgoing().is_empty() {
        let bytes = client.outgoing().to_vec();
        client.sent(bytes.len());
        let mut rest = &bytes[..];
        while let Some(frame) = decoder.decode(&mut rest) {
            frames.push((frame.kind, frame.flags, frame.payload.to_vec()));
        }
    }
    frames
}

pub(super) fn running() -> (AgentClient, Decoder) {
    let mut client = AgentClient::new(&request()).unwrap();
    let mut decoder = Decoder::new();
    tell(&mut client, HELLO);
    take(&mut client, &mut decoder);
    assert_eq!(
        tell(&mut client, FromGuest::Started { pid: 7 }),
        [AgentEvent::Started { pid: 7 }]
    );
    (client, decoder)
}

fn error_of(events: &[AgentEvent]) -> Option<&ProtocolError> {
    match events {
        [AgentEvent::ProtocolError(error)] => Some(error),
        _ => None,
    }
}

#[test]
fn nothing_is_sent_before_hello_and_noise_before_it_is_ignored() {
    let mut client = AgentClient::new(&request()).unwrap();
    client.signal(2);
    client.stdin(b"early");
    assert!(client.outgoing().is_empty());
    let mut events = Vec::new();
    client.received(b"iPXE initialising devices...\xb0\x11", &mut events);
    assert!(events.is_empty());
    client.received(&bytes_of(HELLO), &mut events);
    assert_eq!(
        events,
        [AgentEvent::Hello {
            features: 1,
            release: "6.1".into()
        }]
    );
    let frames = take(&mut client, &mut Decoder::new());
    let kinds: Vec<u8> = frames.iter().map(|f| f.0).collect();
    assert_eq!(kinds, [0x81, 0x85, 0x82]);
    let start = StartView::parse(&frames[0].2).unwrap();
    assert_eq!((start.argc, start.envc, start.window), (2, 1, HOST_WINDOW));
    assert_eq!(frames[2].2, b"early");
}

#[test]
fn an_agent_that_is_held_waits_and_another_client_goes_on_with_it() {
    let mut held = AgentClient::new(&request()).unwrap();
    held.hold();
    assert_eq!(held.ready(), None);
    tell(&mut held, HELLO);
    assert!(held.outgoing().is_empty());
    assert_eq!(held.ready(), Some(GUEST_WINDOW));
    // Half a message, of which another process would miss the beginning.
    let log = bytes_of(FromGuest::Credit(1));
    held.received(&log[..5], &mut Vec::new());
    assert_eq!(held.ready(), None);
    held.received(&log[5..], &mut Vec::new());
    assert_eq!(held.ready(), Some(GUEST_WINDOW));

    let mut client = AgentClient::resumed(&request(), 1, GUEST_WINDOW).unwrap();
    client.stdin(b"in");
    let frames = take(&mut client, &mut Decoder::new());
    assert_eq!((frames[0].0, frames[0].1), (0x81, 1));
    assert_eq!(frames[1].0, 0x82);
    let events = tell(&mut client, FromGuest::Started { pid: 7 });
    assert_eq!(events, [AgentEvent::Started { pid: 7 }]);
}

#[test]
fn a_long_start_comes_in_pieces_within_the_window() {
    let long = StartRequest {
        argv: vec!["x".repeat(100_000).into()],
        ..request()
    };
    let mut client = AgentClient::new(&long).unwrap();
    let mut decoder = Decoder::new();
    tell(&mut client, HELLO);
    let mut start = Vec::new();
    loop {
        let frames = take(&mut client, &mut decoder);
        let bytes: usize = frames.iter().map(|f| f.2.len()).sum();
        assert!(bytes > 0 && bytes <= GUEST_WINDOW as usize);
        let done = frames.iter().any(|f| f.1 == 1);
        frames.iter().for_each(|f| start.extend_from_slice(&f.2));
        if done {
            break;
        }
        tell(&mut client, FromGuest::Credit(bytes as u32));
    }
    let view = StartView::parse(&start).unwrap();
    assert_eq!(view.strings().nth(1).unwrap().len(), 100_001);
}

#[test]
fn text_of_the_guest_is_safe_to_print() {
    let (mut client, _) = running();
    let (level, text) = (Level::Warn, b"a\x1b[2Jb\nc\x07\xff".as_slice());
    let plain = "ab c\u{fffd}";
    assert_eq!(
        tell(&mut client, FromGuest::Log { level, text }),
        [AgentEvent::Log {
            level,
            text: plain.into()
        }]
    );
    let (stage, errno) = (Stage::Exec, 2);
    let failed = tell(&mut client, FromGuest::Failed { stage, errno, text });
    let text = plain.into();
    assert_eq!(
        failed,
        [AgentEvent::Failed(AgentFailure { stage, errno, text })]
    );
}

#[test]
fn a_command_from_start_to_end() {
    let (mut client, mut decoder) = running();
    let out = tell(&mut client, FromGuest::Stdout(b"out"));
    assert_eq!(out, [AgentEvent::Stdout(b"out".to_vec())]);
    let err = tell(&mut client, FromGuest::Stderr(b"err"));
    assert_eq!(err, [AgentEvent::Stderr(b"err".to_vec())]);
    client.resize(WinSize { rows: 1, cols: 2 });
    client.stdin_eof();
    client.shutdown(Power::Off);
    let kinds: Vec<u8> = take(&mut client, &mut decoder)
        .iter()
        .map(|f| f.0)
        .collect();
    assert_eq!(kinds, [0x84, 0x83, 0x86]);
    let end = tell(&mut client, FromGuest::Exited(Exit::Signal(15)));
    assert_eq!(end, [AgentEvent::Exited(Exit::Signal(15))]);
    assert!(!client.wants_stdin());
    let after = tell(&mut client, FromGuest::Stdout(b"late"));
    assert_eq!(
        error_of(&after),
        Some(&ProtocolError::OutOfPlace { message: "Stdout" })
    );
}

#[test]
fn stdin_stops_at_the_window_and_goes_on_with_credit() {
    let (mut client, mut decoder) = running();
    let input = vec![b'i'; 100_000];
    let mut accepted = 0;
    let mut received = 0;
    while accepted < input.len() {
        let n = client.stdin(&input[accepted..]);
        accepted += n;
        let got: usize = take(&mut client, &mut decoder)
            .iter()
            .map(|f| f.2.len())
            .sum();
        received += got;
        assert!(accepted - received <= STDIN_BUFFER);
        if n == 0 {
            assert!(!client.wants_stdin());
            assert_eq!(got, 0, "without credit nothing is sent");
            tell(&mut client, FromGuest::Credit(GUEST_WINDOW));
        }
    }
}

#[test]
fn output_beyond_the_window_is_an_error_once() {
    let (mut client, mut decoder) = running();
    let piece = [b'o'; 4096];
    for _ in 0..HOST_WINDOW / 4096 {
        assert_eq!(tell(&mut client, FromGuest::Stdout(&piece)).len(), 1);
    }
    let events = tell(&mut client, FromGuest::Stdout(b"!"));
    assert_eq!(
        error_of(&events),
        Some(&ProtocolError::Window { excess: 1 })
    );
    assert!(tell(&mut client, FromGuest::Stdout(b"!")).is_empty());
    client.signal(9);
    assert!(take(&mut client, &mut decoder).is_empty());
}

#[test]
fn a_channel_that_loses_nothing_has_a_wider_window() {
    let mut client = AgentClient::new(&request()).unwrap();
    let mut decoder = Decoder::new();
    client.widen();
    client.widen();
    let hello = FromGuest::Hello(Hello {
        version: VERSION,
        features: 0,
        window: u32::MAX,
        release: b"",
    });
    tell(&mut client, hello);
    let more = MAX_HOST_WINDOW - HOST_WINDOW;
    let frames = take(&mut client, &mut decoder);
    assert_eq!(frames[0], (0x87, 0, more.to_le_bytes().to_vec()));
    tell(&mut client, FromGuest::Started { pid: 7 });
    let piece = [b'o'; 4096];
    for _ in 0..MAX_HOST_WINDOW / 4096 {
        assert_eq!(tell(&mut client, FromGuest::Stdout(&piece)).len(), 1);
    }
    // And as much input as the host takes for granted, whatever the guest says.
    let mut sent = 0;
    while client.stdin(&piece) > 0 {
        let frames = take(&mut client, &mut decoder);
        sent += frames.iter().map(|f| f.2.len()).sum::<usize>();
    }
    let start = frames.iter().find(|f| f.0 == 0x81).map_or(0, |f| f.2.len());
    assert_eq!(sent + start, MAX_GUEST_WINDOW as usize);
    let events = tell(&mut client, FromGuest::Stdout(b"!"));
    let error = ProtocolError::Window { excess: 1 };
    assert_eq!(error_of(&events), Some(&error));
}

#[test]
fn consumed_output_is_granted_again() {
    let (mut client, mut decoder) = running();
    let piece = [b'o'; 4096];
    for _ in 0..100 {
        tell(&mut client, FromGuest::Stderr(&piece));
        tell(&mut client, FromGuest::Stderr(&piece));
        client.consumed(2 * piece.len());
        let frames = take(&mut client, &mut decoder);
        assert_eq!(frames, [(0x87, 0, 8192u32.to_le_bytes().to_vec())]);
    }
    client.consumed(usize::MAX);
    assert!(
        take(&mut client, &mut decoder).is_empty(),
        "only what was received is granted"
    );
}

#[test]
fn what_breaks_the_protocol_has_a_name() {
    let wrong = FromGuest::Hello(Hello {
        version: 9,
        features: 0,
        window: 1,
        release: b"",
    });
    let mut client = AgentClient::new(&request()).unwrap();
    let events = tell(&mut client, wrong);
    assert_eq!(
        error_of(&events),
        Some(&ProtocolError::Version { guest: 9 })
    );

    let (mut client, _) = running();
    let events = tell(&mut client, HELLO);
    assert_eq!(
        error_of(&events),
        Some(&ProtocolError::OutOfPlace { message: "Hello" })
    );

    let (mut client, _) = running();
    let mut events = Vec::new();
    client.received(b"[    1.234567] usb 1-1: new device", &mut events);
    assert!(matches!(
        error_of(&events),
        Some(ProtocolError::Noise { .. })
    ));

    let mut client = AgentClient::new(&request()).unwrap();
    let events = tell(&mut client, FromGuest::Stdout(b"x"));
    assert_eq!(
        error_of(&events),
        Some(&ProtocolError::OutOfPlace { message: "Stdout" })
    );

    let mut client = AgentClient::new(&request()).unwrap();
    let mut events = Vec::new();
    client.received(&vec![b'.'; 2 * MAX_NOISE as usize], &mut events);
    assert!(matches!(
        error_of(&events),
        Some(ProtocolError::Noise { .. })
    ));
}

#[test]
fn failures_have_the_exit_codes_of_a_shell() {
    let failure = |stage, errno: i32| AgentFailure {
        stage,
        errno: errno as u16,
        text: "x".into(),
    };
    assert_eq!(failure(Stage::Exec, libc::ENOENT).exit_code(), 127);
    assert_eq!(failure(Stage::Interpreter, libc::ENOENT).exit_code(), 127);
    assert_eq!(failure(Stage::Exec, libc::EACCES).exit_code(), 126);
    assert_eq!(failure(Stage::Cwd, libc::ENOENT).exit_code(), 125);
    assert_eq!(
        failure(Stage::Exec, libc::ENOENT).to_string(),
        "x: not found in the guest"
    );
}

#[test]
fn limits_of_a_request_are_named() {
    let with = |argv: Vec<OsString>| AgentClient::new(&StartRequest { argv, ..request() }).err();
    assert_eq!(with(vec![]), Some(RequestError::Empty));
    assert_eq!(with(vec!["a\0".into()]), Some(RequestError::Nul));
    assert_eq!(
        with(vec!["a".into(); 5000]),
        Some(RequestError::TooMany { count: 5001 })
    );
    assert!(matches!(
        with(vec!["a".repeat(200_000).into()]),
        Some(RequestError::TooLong { .. })
    ));
}

proptest! {
    #[test]
    fn any_bytes_at_any_time_give_at_most_one_error(
        start in any::<bool>(), chunks in prop::collection::vec(
            prop::collection::vec(prop_oneof![Just(0xb0u8), Just(0x11), any::<u8>()], 0..200), 0..20)
    ) {
        let mut client =
            if start { running().0 } else { AgentClient::new(&request()).unwrap() };
        let mut events = Vec::new();
        for chunk in &chunks {
            client.received(chunk, &mut events);
            prop_assert!(client.outgoing().len() <= OUTGOING);
        }
        prop_assert!(events.len() <= 1);
    }

    #[test]
    fn any_messages_keep_unconsumed_output_within_the_window(
        messages in prop::collection::vec((0u8..10, 0usize..4097, 0usize..9000), 0..60)
    ) {
        let (mut client, mut decoder) = running();
        let mut unconsumed = 0;
        let bytes = [0; 4096];
        for (kind, length, consumed) in messages {
            let message = match kind {
                0..5 => FromGuest::Stdout(&bytes[..length]),
                5..8 => FromGuest::Stderr(&bytes[..length]),
                8 => FromGuest::Credit(length as u32),
                _ => FromGuest::Log { level: Level::Info, text: b"note" },
            };
            for event in tell(&mut client, message) {
                if let AgentEvent::Stdout(b) | AgentEvent::Stderr(b) = event {
                    unconsumed += b.len();
                }
            }
            prop_assert!(unconsumed <= HOST_WINDOW as usize);
            let consumed = consumed.min(unconsumed);
            client.consumed(consumed);
            unconsumed -= consumed;
            take(&mut client, &mut decoder);
        }
    }
}

fn bytes_for(job: u8, message: FromGuest<'_>) -> Vec<u8> {
    let mut out = [0; MAX_FRAME];
    let n = message.encode_for(job, &mut out).unwrap();
    out[..n].to_vec()
}

/// A client whose agent runs commands beside the main one.
fn several() -> (AgentClient, Decoder) {
    let mut client = AgentClient::new(&request()).unwrap();
    let mut decoder = Decoder::new();
    assert_eq!(client.begin(&request()), Err(ExtraError::NotRunning));
    let FromGuest::Hello(hello) = HELLO else {
        unreachable!()
    };
    let features = hello.features | features::EXTRA;
    tell(&mut client, FromGuest::Hello(Hello { features, ..hello }));
    take(&mut client, &mut decoder);
    tell(&mut client, FromGuest::Started { pid: 7 });
    (client, decoder)
}

#[test]
fn commands_run_beside_the_main_one() {
    let (mut client, mut decoder) = several();
    let number = client.begin(&request()).unwrap();
    assert_eq!(number, 1);
    let frames = take(&mut client, &mut decoder);
    assert_eq!((frames[0].0, frames[0].1), (0x81, 0x11));
    let mut events = Vec::new();
    client.received(&bytes_for(1, FromGuest::Started { pid: 9 }), &mut events);
    client.received(&bytes_for(0, FromGuest::Stdout(b"main")), &mut events);
    client.received(&bytes_for(1, FromGuest::Stdout(b"beside")), &mut events);
    client.with(1, |job| {
        job.stdin(b"in");
        job.stdin_eof();
        job.signal(15);
    });
    let kinds: Vec<_> = take(&mut client, &mut decoder)
        .into_iter()
        .map(|f| (f.0, f.1))
        .collect();
    assert_eq!(kinds, [(0x85, 0x10), (0x82, 0x10), (0x83, 0x10)]);
    client.received(&bytes_for(1, FromGuest::Exited(Exit::Code(3))), &mut events);
    let extra = |event| AgentEvent::Extra(1, Box::new(event));
    assert_eq!(
        events,
        [
            extra(AgentEvent::Started { pid: 9 }),
            AgentEvent::Stdout(b"main".to_vec()),
            extra(AgentEvent::Stdout(b"beside".to_vec())),
            extra(AgentEvent::Exited(Exit::Code(3))),
        ]
    );
    assert!(client.with(1, |_| ()).is_none());
    assert_eq!(client.begin(&request()), Ok(1));
    // Of one that is none, nothing may come.
    let mut events = Vec::new();
    client.received(&bytes_for(2, FromGuest::Stdout(b"x")), &mut events);
    assert!(error_of(&events).is_some(), "{events:?}");
}

#[test]
fn starts_go_one_after_the_other_and_there_are_seven_at_most() {
    let (mut client, mut decoder) = several();
    let long = StartRequest {
        env: vec!["A".repeat(9000).into()],
        ..request()
    };
    for number in 1..=7 {
        assert_eq!(client.begin(&long), Ok(number));
    }
    assert_eq!(client.begin(&long), Err(ExtraError::TooMany));
    let mut starts = Vec::new();
    for _ in 0..100 {
        for (kind, flags, payload) in take(&mut client, &mut decoder) {
            assert_eq!(kind, 0x81);
            starts.push(flags);
            let credit = FromGuest::Credit(payload.len() as u32);
            client.received(&bytes_for(flags >> 4, credit), &mut Vec::new());
        }
    }
    let jobs: Vec<_> = starts.iter().map(|flags| flags >> 4).collect();
    assert!(jobs.is_sorted(), "{jobs:?}");
    assert_eq!(starts.iter().filter(|flags| *flags & 1 == 1).count(), 7);
}

#[test]
fn an_agent_that_knows_no_others_is_asked_for_none() {
    let (mut client, _) = running();
    assert_eq!(client.begin(&request()), Err(ExtraError::Unsupported));
}
