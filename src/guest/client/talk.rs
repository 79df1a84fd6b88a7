//! A conversation as it is saved with its guest, for a client in another process to go on with.
//!
//! Output that has come is the old client's, and counts as consumed. Commands beside the main one have
//! nobody any more: the new client hangs up on them. What is loaded is untrusted.

use agent_protocol::{MAX_EXTRA, MAX_FRAME, MAX_GUEST_WINDOW, MAX_HOST_WINDOW, MAX_START, WinSize};
use serde::{Deserialize, Serialize};

use super::job::{Job, MAX_SIGNALS, STDIN_BUFFER};
use super::{AgentClient, OUTGOING, Outgoing, State};

/// Most bytes to the agent that may wait elsewhere, in a port of the virtio console.
const MAX_UNREAD: usize = 256 * 1024;

/// A conversation with an agent, at any time before its main command has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Talk {
    /// Whether Hello has come.
    pub connected: bool,
    /// The agent's features.
    pub features: u32,
    /// Whether the channel was found to lose nothing.
    pub widened: bool,
    /// The beginning of a frame from the agent.
    #[serde(with = "serde_bytes")]
    pub partial: Vec<u8>,
    /// Frames to the agent that it has not got.
    #[serde(with = "serde_bytes")]
    pub outgoing: Vec<u8>,
    /// The main command.
    pub main: JobTalk,
    /// Those beside it.
    pub extra: Vec<JobTalk>,
}

/// What is saved of one command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobTalk {
    /// Its number, 0 for the main one.
    pub number: u8,
    /// Whether Started has come.
    pub running: bool,
    /// What is still to be sent of Start.
    #[serde(with = "serde_bytes")]
    pub start: Vec<u8>,
    /// Input that is still to be sent.
    #[serde(with = "serde_bytes")]
    pub stdin: Vec<u8>,
    /// Whether there is no more.
    pub stdin_eof: bool,
    /// Whether the agent knows.
    pub eof_sent: bool,
    /// Signals to be sent.
    #[serde(with = "serde_bytes")]
    pub signals: Vec<u8>,
    /// A new size of the terminal, rows and columns, to be sent.
    pub resize: Option<(u16, u16)>,
    /// Input bytes that the guest takes now, and the most that it ever does.
    pub credit: u32,
    /// The most that it ever does.
    pub guest_window: u32,
    /// The most output bytes that may be on their way.
    pub window: u32,
    /// Output bytes that have come and are to be granted again.
    pub owed: u32,
}

/// A saved conversation that never took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved conversation with bulle's agent is damaged: {0}")]
pub struct TalkError(&'static str);

impl Talk {
    /// Adds bytes that are on their way to the agent, before all others.
    pub fn unread(&mut self, mut bytes: Vec<u8>) {
        bytes.append(&mut self.outgoing);
        self.outgoing = bytes;
    }
}

impl AgentClient {
    /// The conversation, unless the agent waits to be told anything, the main command has ended, or the
    /// protocol was broken.
    pub fn save(&self) -> Option<Talk> {
        let over = self.held || self.main.has_ended() || self.state == State::Dead;
        (!over).then(|| Talk {
            connected: self.state == State::Talking,
            features: self.features,
            widened: self.widened,
            partial: self.decoder.held().to_vec(),
            outgoing: self.outgoing.bytes().to_vec(),
            main: self.main.save(),
            extra: self.extra.iter().map(Job::save).collect(),
        })
    }

    /// A client that goes on with `talk`.
    ///
    /// # Errors
    /// [`TalkError`] when there never was such a conversation.
    pub fn restored(talk: Talk) -> Result<Self, TalkError> {
        let wrong = |why| Err(TalkError(why));
        if talk.partial.len() > MAX_FRAME || talk.outgoing.len() > OUTGOING + MAX_UNREAD {
            return wrong("too much is on its way");
        }
        let numbered = |job: &JobTalk| (1..=MAX_EXTRA as u8).contains(&job.number);
        let mut numbers: Vec<u8> = talk.extra.iter().map(|job| job.number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        if numbers.len() != talk.extra.len() || !talk.extra.iter().all(numbered) {
            return wrong("its commands are not numbered");
        }
        if talk.main.number != 0 || !talk.connected && !talk.extra.is_empty() {
            return wrong("its commands run before the agent does");
        }
        let mut outgoing = Outgoing::new(OUTGOING);
        outgoing.restore(&talk.outgoing);
        let mut client = Self {
            state: match talk.connected {
                true => State::Talking,
                false => State::AwaitHello,
            },
            decoder: Box::default(),
            features: talk.features,
            main: Job::restored(talk.main)?,
            extra: Vec::new(),
            turn: 0,
            shutdown: None,
            addresses: Vec::new(),
            widened: talk.widened,
            outgoing,
            held: false,
        };
        for job in talk.extra {
            let mut job = Job::restored(job)?;
            job.hang_up();
            client.extra.push(job);
        }
        // No more than the beginning of a frame, of which no event comes.
        client.received(&talk.partial, &mut Vec::new());
        Ok(client)
    }
}

impl Job {
    fn save(&self) -> JobTalk {
        let start = self.start.get(self.start_sent..).unwrap_or_default();
        JobTalk {
            number: self.number,
            running: self.is_running(),
            start: start.to_vec(),
            stdin: self.stdin.clone(),
            stdin_eof: self.stdin_eof,
            eof_sent: self.eof_sent,
            signals: self.signals.clone(),
            resize: self.resize.map(|size| (size.rows, size.cols)),
            credit: self.credit,
            guest_window: self.guest_window,
            window: self.window,
            owed: self.owed + self.unconsumed,
        }
    }

    fn restored(talk: JobTalk) -> Result<Self, TalkError> {
        let sane = talk.credit <= talk.guest_window
            && talk.guest_window <= MAX_GUEST_WINDOW
            && talk.owed <= talk.window
            && talk.window <= MAX_HOST_WINDOW;
        if !sane {
            return Err(TalkError("more was granted than there is"));
        }
        if talk.stdin.len() > STDIN_BUFFER
            || talk.start.len() > MAX_START
            || talk.signals.len() > MAX_SIGNALS
        {
            return Err(TalkError("too much is to be said"));
        }
        if talk.running && !talk.start.is_empty() {
            return Err(TalkError("a command runs that was not started"));
        }
        let mut job = Self::empty(talk.number, talk.guest_window);
        if talk.running {
            job.state = super::job::State::Running;
        }
        job.start = talk.start;
        job.stdin = talk.stdin;
        (job.stdin_eof, job.eof_sent) = (talk.stdin_eof, talk.eof_sent);
        job.signals = talk.signals;
        job.resize = talk.resize.map(|(rows, cols)| WinSize { rows, cols });
        job.credit = talk.credit;
        (job.window, job.owed) = (talk.window, talk.owed);
        Ok(job)
    }
}

#[cfg(test)]
mod tests;
