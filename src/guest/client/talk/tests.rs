use agent_protocol::{Decoder, FromGuest, GUEST_WINDOW};

use super::super::tests::{bytes_of, request, running, take, tell};
use super::super::{AgentClient, AgentEvent, Exit, features};
use super::{Talk, TalkError};

/// Frames by kind, flags and payload.
type Frames = Vec<(u8, u8, Vec<u8>)>;

/// What another process makes of the saved conversation.
fn carried(client: &AgentClient) -> AgentClient {
    let mut bytes = Vec::new();
    ciborium::into_writer(&client.save().unwrap(), &mut bytes).unwrap();
    let talk: Talk = ciborium::from_reader(&bytes[..]).unwrap();
    AgentClient::restored(talk).unwrap()
}

/// Everything that `client` says and hears once the guest has read and said more.
fn rest(mut client: AgentClient, more: &[u8]) -> (Frames, Vec<AgentEvent>) {
    let mut decoder = Decoder::new();
    let mut said = take(&mut client, &mut decoder);
    let mut heard = Vec::new();
    client.received(more, &mut heard);
    said.extend(take(&mut client, &mut decoder));
    heard.extend(tell(&mut client, FromGuest::Credit(GUEST_WINDOW)));
    client.stdin_eof();
    said.extend(take(&mut client, &mut decoder));
    (said, heard)
}

#[test]
fn a_conversation_goes_on_wherever_it_was_saved() {
    let (mut client, _) = running();
    let input: Vec<u8> = (0..9000).map(|at| at as u8).collect();
    // More than the guest takes at once, some of it sent and some not.
    assert_eq!(client.stdin(&input), input.len());
    client.sent(17);
    client.sent(0);
    let output = bytes_of(FromGuest::Stdout(&[7; 3000]));
    let mut events = Vec::new();
    client.received(&output, &mut events);
    client.consumed(3000);
    let last = bytes_of(FromGuest::Stderr(b"last"));
    for cut in 0..last.len() {
        let (mut client, _) = running();
        client.stdin(&input);
        client.received(&last[..cut], &mut events);
        let again = carried(&client);
        assert_eq!(rest(again, &last[cut..]), rest(client, &last[cut..]));
    }
    // Bytes of the first frame went already; the rest of it comes first.
    let (mut whole, mut again) = (client.outgoing().to_vec(), carried(&client));
    assert_eq!(again.outgoing(), whole);
    again.sent(whole.len());
    client.sent(whole.len());
    whole.clear();
    assert_eq!(rest(again, &[]), rest(client, &[]));
}

#[test]
fn output_that_nobody_consumed_yet_is_the_old_clients() {
    let (mut client, _) = running();
    tell(&mut client, FromGuest::Stdout(&[1; 4000]));
    tell(&mut client, FromGuest::Stdout(&[1; 4000]));
    tell(&mut client, FromGuest::Stdout(&[1; 1000]));
    assert!(take(&mut client, &mut Decoder::new()).is_empty());
    let mut again = carried(&client);
    again.consumed(9000);
    // The whole window is the guest's again.
    again.resize(agent_protocol::WinSize { rows: 1, cols: 1 });
    let said = take(&mut again, &mut Decoder::new());
    assert_eq!(said[0], (0x87, 0, 9000_u32.to_le_bytes().to_vec()));
}

#[test]
fn a_guest_that_is_not_there_yet_gets_its_command_later() {
    let client = AgentClient::new(&request()).unwrap();
    let hello = FromGuest::Hello(agent_protocol::Hello {
        version: agent_protocol::VERSION,
        features: 1,
        window: GUEST_WINDOW,
        release: b"6.1",
    });
    let (mut again, mut first) = (carried(&client), client);
    for client in [&mut first, &mut again] {
        assert_eq!(tell(client, hello).len(), 1);
    }
    let said = take(&mut again, &mut Decoder::new());
    assert_eq!(said, take(&mut first, &mut Decoder::new()));
    assert_eq!(said[0].0, 0x81);
}

#[test]
fn other_commands_are_hung_up_on_and_end_unheard() {
    let (mut client, _) = running();
    client.features = features::EXTRA;
    let number = client.begin(&request()).unwrap();
    take(&mut client, &mut Decoder::new());
    let about = |message: FromGuest<'_>| {
        let mut frame = [0; agent_protocol::MAX_FRAME];
        let len = message.encode_for(number, &mut frame).unwrap();
        frame[..len].to_vec()
    };
    client.received(&about(FromGuest::Started { pid: 9 }), &mut Vec::new());
    let mut again = carried(&client);
    again.received(&[], &mut Vec::new());
    let said = take(&mut again, &mut Decoder::new());
    let flags = number << 4;
    assert_eq!(said, [(0x85, flags, vec![1]), (0x83, flags, vec![])]);
    let mut events = Vec::new();
    for _ in 0..100 {
        again.received(&about(FromGuest::Stdout(&[1; 1000])), &mut events);
        take(&mut again, &mut Decoder::new());
    }
    again.received(&about(FromGuest::Exited(Exit::Code(0))), &mut events);
    assert_eq!(events, []);
    assert!(again.begin(&request()).is_ok());
}

#[test]
fn what_has_ended_or_waits_is_not_saved() {
    let (mut client, _) = running();
    tell(&mut client, FromGuest::Exited(Exit::Code(0)));
    assert_eq!(client.save(), None);
    let mut held = AgentClient::new(&request()).unwrap();
    held.hold();
    assert_eq!(held.save(), None);
}

#[test]
fn conversations_that_never_were_are_refused() {
    let (mut client, _) = running();
    client.features = features::EXTRA;
    client.begin(&request()).unwrap();
    let good = client.save().unwrap();
    let bad = |change: fn(&mut Talk)| {
        let mut talk = good.clone();
        change(&mut talk);
        let error: TalkError = AgentClient::restored(talk).err().unwrap();
        assert!(error.to_string().contains("damaged"), "{error}");
    };
    bad(|talk| talk.partial = vec![0; 1 << 20]);
    bad(|talk| talk.outgoing = vec![0; 1 << 20]);
    bad(|talk| talk.extra.push(talk.extra[0].clone()));
    bad(|talk| talk.extra[0].number = 8);
    bad(|talk| talk.main.number = 1);
    bad(|talk| talk.connected = false);
    bad(|talk| talk.main.credit = talk.main.guest_window + 1);
    bad(|talk| talk.main.guest_window = u32::MAX);
    bad(|talk| talk.main.owed = talk.main.window + 1);
    bad(|talk| talk.main.window = u32::MAX);
    bad(|talk| talk.main.stdin = vec![0; 1 << 20]);
    bad(|talk| talk.main.start = vec![0; 1 << 20]);
    bad(|talk| talk.main.start = vec![0]);
    bad(|talk| talk.main.signals = vec![2; 33]);
    AgentClient::restored(good.clone()).unwrap();
}
