//! Console ports (section 5.3): control messages of any port, queues that are never filled, and the
//! console alone, as drivers have it that know of no ports.

use payloads::io;
use payloads::tsc;
use payloads::virtio::Device;

use super::super::{Attack, PROTOCOL};
use super::{Line, SHORT, fence, is_whole};

/// Device ID.
pub const ID: u32 = 3;
/// `VIRTIO_CONSOLE_F_SIZE` and `F_MULTIPORT`.
const FEATURES: u64 = 3;
/// Messages to the driver.
const CONTROL_RX: u16 = 2;
/// Messages from the driver.
const CONTROL_TX: u16 = 3;
/// Bytes of a message.
const LEN: u32 = 8;
const READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_OPEN: u16 = 6;
/// What port 0 sends.
const OUTPUT: u16 = 1;
const STORM: u32 = 3000;
/// Longest message: one with a name.
const ROOM: u32 = 256;

fn start(attack: &Attack<'_>) -> Option<Line> {
    (attack.device.id == ID)
        .then(|| Line::start(attack.device, FEATURES, PROTOCOL))
        .flatten()
}

/// Says something; whether the device took it.
fn say(line: &mut Line, id: u32, event: u16, value: u16, len: u32) -> bool {
    io::write(line.out, id);
    io::write(line.out + 4, event);
    io::write(line.out + 6, value);
    line.send(CONTROL_TX, &[(line.out, len)], &[]) == Some(0)
}

/// The next message in a buffer of `room` bytes: port, event, and how long it is.
fn hear(line: &mut Line, room: u32, cycles: u64) -> Option<(u32, u16, u32)> {
    let at = line.answers;
    fence(at + u64::from(room));
    line.post(CONTROL_RX, 0, &[], &[(at, room)]);
    let (_, len) = line.wait(CONTROL_RX, cycles)?;
    Some((io::read(at), io::read(at + 4), len))
}

/// The device says which ports there are once it is asked.
pub fn works(device: Device, base: u64) -> bool {
    let Some(mut line) = Line::start(device, FEATURES, base) else {
        return false;
    };
    let ready = say(&mut line, 0, READY, 1, LEN);
    ready && hear(&mut line, ROOM, tsc::LONG) == Some((0, PORT_ADD, LEN))
}

/// Messages of every kind, of ports that exist and others, which nobody waits for; then all that
/// the device has to say is taken, and must have an end.
pub fn messages(attack: &mut Attack<'_>) -> bool {
    let Some(mut line) = start(attack) else {
        return attack.device.id != ID;
    };
    let ports = io::read::<u32>(attack.device.config() + 4);
    for _ in 0..STORM {
        let id = match attack.random.below(3) {
            0 => attack.random.u64() as u32,
            1 => attack
                .random
                .pick(&[ports, 31, 32, 0xffff, 1 << 31, u32::MAX]),
            _ => attack.random.below(ports.into()) as u32,
        };
        let event = attack
            .random
            .pick(&[0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 0xffff]);
        let value = attack.random.pick(&[0, 1, 1, 2, 0xffff]);
        let len = attack.random.pick(&[LEN, LEN, LEN, 0, 1, 7, 9, 4096]);
        if !say(&mut line, id, event, value, len) {
            return false;
        }
    }
    // Each port is told of, at most once in each way; buffers may be too small.
    let mut count = 0;
    for room in [0, 1, 7, 8, 9, 12]
        .into_iter()
        .chain(core::iter::repeat(ROOM))
    {
        let Some((id, _, len)) = hear(&mut line, room, 30 * SHORT) else {
            break;
        };
        count += 1;
        let sound = len <= room && (len < 4 || id < ports);
        if !sound || !is_whole(line.answers + u64::from(room)) || count > 8 * ports {
            return false;
        }
    }
    line.device.runs()
}

/// Output to ports that are not open and that nobody reads, in buffers of the wrong direction too,
/// and input for which there is no room.
pub fn streams(attack: &mut Attack<'_>) -> bool {
    if attack.device.id != ID {
        return true;
    }
    for queue in attack.queues() {
        for open in [0, 1] {
            let Some(mut line) = start(attack) else {
                return false;
            };
            let ports = io::read::<u32>(attack.device.config() + 4);
            for id in 0..ports {
                if !say(&mut line, id, 3, open, LEN) || !say(&mut line, id, 6, open, LEN) {
                    return false;
                }
            }
            // To be read by the device, to be written by it, both; too much for any buffer.
            let (out, answers) = (line.out, line.answers);
            for round in 0..64 {
                let len = attack.random.pick(&[0, 1, 4096, 0x8000]);
                let head = round % 8 * 2;
                match attack.random.below(4) {
                    0 => line.post(queue, head, &[], &[(answers, len)]),
                    1 => line.post(queue, head, &[(out, len)], &[(answers, len)]),
                    _ => line.post(queue, head, &[(out, len)], &[]),
                }
                // What is held back takes room in the ring.
                if line.wait(queue, SHORT).is_none() && round % 8 == 7 {
                    break;
                }
            }
            if !attack.device.reset() {
                return false;
            }
        }
    }
    true
}

/// A console without `F_MULTIPORT`, whose only port is hvc0: everything that the driver has for the
/// ports' queues all the same, output in any direction, input that nobody takes, and words in the
/// configuration space. What is sent as it should be is taken.
pub fn plain(attack: &mut Attack<'_>) -> bool {
    if attack.device.id != ID {
        return true;
    }
    for features in [0, 1] {
        for queue in attack.queues() {
            let Some(mut line) = Line::start(attack.device, features, PROTOCOL) else {
                return false;
            };
            let (out, answers) = (line.out, line.answers);
            // Without ports nobody may hear of these.
            io::write(out, attack.random.below(4) as u32);
            io::write(out + 4, PORT_OPEN);
            io::write(out + 6, 1u16);
            for round in 0..64 {
                let len = attack.random.pick(&[0, 1, LEN, 4096, 0x8000]);
                let head = round % 8 * 2;
                match attack.random.below(4) {
                    0 => line.post(queue, head, &[], &[(answers, len)]),
                    1 => line.post(queue, head, &[(out, len)], &[(answers, len)]),
                    _ => line.post(queue, head, &[(out, len)], &[]),
                }
                let space = attack.device.config() + attack.random.below(64);
                io::write(space & !3, attack.random.u64() as u32);
                let _ = io::read::<u8>(space);
                if line.wait(queue, SHORT).is_none() && round % 8 == 7 {
                    break;
                }
            }
            if !attack.device.reset() {
                return false;
            }
        }
        let Some(mut line) = Line::start(attack.device, features, PROTOCOL) else {
            return false;
        };
        // To a file or a terminal, whatever is in it.
        if line.send(OUTPUT, &[(line.out, 4096)], &[]) != Some(0) || !line.device.runs() {
            return false;
        }
    }
    true
}
