//! What is asked of a guest's agent: commands, and what their clients send.

use serde::{Deserialize, Serialize};

/// A command to run in the guest, beside its first one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Variables beside those that the first command has, `NAME=value` each.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory; that of the first command if absent.
    pub cwd: Option<String>,
    /// A terminal of this size.
    pub tty: Option<TerminalSize>,
    /// Whether input comes; otherwise the command has none.
    #[serde(default)]
    pub stdin: bool,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// A line from the client of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecInput {
    /// Input that is text.
    Stdin(String),
    /// Any input.
    StdinBase64(String),
    /// No more input comes.
    CloseStdin,
    /// The terminal has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Columns.
        cols: u16,
    },
    /// A signal for the command's process group.
    Signal(u8),
}
