//! What a pool and its processes say to each other.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control::SnapshotLoad;

/// Most bytes of a word.
const MAX_WORD: u32 = 1 << 20;

/// What a waiting process is to become.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// What it has otherwise than the template's machine; its paths are of no consequence.
    pub load: SnapshotLoad,
    /// Directory in which it is found by its name; absent: nowhere.
    pub base: Option<PathBuf>,
    /// Its name; absent: any.
    pub name: Option<String>,
    /// Command for an agent that waits for one.
    pub command: Vec<String>,
}

/// What a process says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    /// It waits for an order.
    Ready,
    /// Its guest runs, or is paused, as ordered.
    Begun,
    /// It cannot, and ends. The causes, joined.
    Failed(String),
}

/// Says `word`.
///
/// # Errors
/// Of the socket.
pub fn send(to: &UnixStream, word: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(word)?;
    let len = u32::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut message = len.to_le_bytes().to_vec();
    message.extend(text);
    let mut to = to;
    to.write_all(&message)
}

/// Waits for a word; `None`: there comes none any more.
///
/// # Errors
/// Of the socket, and of what is no such word.
pub fn receive<T: DeserializeOwned>(from: &UnixStream) -> io::Result<Option<T>> {
    let mut from = from;
    let mut len = [0; 4];
    match from.read_exact(&mut len) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let len = u32::from_le_bytes(len);
    if len > MAX_WORD {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; len as usize];
    from.read_exact(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_arrive_in_order_until_there_are_no_more() {
        let (here, there) = UnixStream::pair().unwrap();
        let said = [Word::Ready, Word::Failed("no room".into()), Word::Begun];
        said.iter().for_each(|word| send(&here, word).unwrap());
        drop(here);
        for word in said {
            assert_eq!(receive(&there).unwrap(), Some(word));
        }
        assert_eq!(receive::<Word>(&there).unwrap(), None);
    }

    #[test]
    fn what_is_no_word_is_refused() {
        for bytes in [&[0xff; 8][..], b"\x02\0\0\0{}", b"\x09\0\0\0\"ready\""] {
            let (mut here, there) = UnixStream::pair().unwrap();
            here.write_all(bytes).unwrap();
            drop(here);
            assert!(receive::<Word>(&there).is_err(), "{bytes:?}");
        }
    }
}
