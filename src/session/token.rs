//! What the foreground's events are about, and which of them are waited for.

use event_manager::{EventOps, EventSet, Events};

/// What an event is about; the number travels as epoll data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Token {
    /// The VM ended.
    Exit,
    /// A signal came.
    Signal,
    /// The time limit is reached.
    Timeout,
    /// A grace period is over.
    Grace,
    /// The console shows a panic.
    Panic,
    /// There is input.
    Stdin,
    /// The console takes input again.
    ConsoleRoom,
    /// The agent takes input again.
    AgentRoom,
    /// The agent says something.
    AgentData,
    /// hvc0 has output.
    Hvc,
    /// stdout takes output again.
    Stdout,
    /// stderr takes output again.
    Stderr,
    /// The watchdog may have expired.
    Watchdog,
    /// Somebody asks for an action, or figures are due.
    Calls,
    /// A first client is at the control socket.
    Client,
    /// It is time to have a control socket.
    Door,
    /// The console has output for those who read along.
    ConsoleOutput,
}

impl Token {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Exit,
        Self::Signal,
        Self::Timeout,
        Self::Grace,
        Self::Panic,
        Self::Stdin,
        Self::ConsoleRoom,
        Self::AgentRoom,
        Self::AgentData,
        Self::Hvc,
        Self::Stdout,
        Self::Stderr,
        Self::Watchdog,
        Self::Calls,
        Self::Client,
        Self::Door,
        Self::ConsoleOutput,
    ];

    /// The one that travels as `data`.
    pub fn from_data(data: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|token| *token as u32 == data)
    }
}

/// Puts a descriptor into the epoll set or takes it out, where that changes anything. A descriptor
/// is there only while it is wanted, since epoll reports a hang-up whether wanted or not.
pub fn watch(
    ops: &mut EventOps,
    (fd, token, set): (i32, Token, EventSet),
    wants: bool,
    watched: &mut bool,
) -> Result<(), event_manager::Error> {
    if wants != *watched {
        let events = Events::with_data_raw(fd, token as u32, set);
        if wants {
            ops.add(events)
        } else {
            ops.remove(events)
        }?;
        *watched = wants;
    }
    Ok(())
}
