//! Progress of long steps, on a terminal only.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressStyle};

/// Shows one line on stderr while it lives; nothing where stderr is not a terminal.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// Nothing shown yet.
    pub fn new() -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("bulle: {msg}") {
            bar.set_style(style);
        }
        Self(Some(bar))
    }

    /// Says what is being done.
    pub fn step(&self, text: String) {
        if let Some(bar) = &self.0 {
            bar.set_message(text);
            bar.tick();
        }
    }

    /// Clears the line.
    pub fn clear(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
