//! Where stdin's bytes go, and whether they are read at all.

use super::escape::Escapes;

/// Input on its way to the guest.
pub struct Input {
    /// Read, but not taken by the guest yet.
    pub waiting: Vec<u8>,
    /// No more will come, or nobody wants it.
    pub ended: bool,
    /// In the epoll set now.
    pub watched: bool,
    /// A regular file, which epoll refuses and which never blocks.
    pub unpollable: bool,
    /// Present on a terminal.
    pub escapes: Option<Escapes>,
}

impl Input {
    /// Nothing yet. `raw` says that stdin is a raw terminal.
    pub fn new(raw: bool) -> Self {
        Self {
            waiting: Vec::new(),
            ended: false,
            watched: false,
            unpollable: false,
            escapes: raw.then(Escapes::default),
        }
    }
}
