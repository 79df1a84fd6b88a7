//! Processes that wait to become clones, each with a machine that has all but a guest.
//!
//! Whoever wants clones starts `bulle shell` processes ([`Waiting`]) and hands each the template over the
//! socket that is its standard input ([`crate::snapshot::template`]). It makes a shell of that shape,
//! says that it is ready, and waits for an [`Order`]. A [`Pool`] keeps some that are ready. One process has one
//! microVM, so none reaches another's memory, files or rights. What both sides say after the template
//! are words: a length (u32, little-endian) and JSON.

mod process;
mod words;

use std::collections::VecDeque;
use std::path::PathBuf;

pub use process::{Running, Stdio, Waiting};
pub use words::{Order, Word, receive, send};

use crate::snapshot::template::{Template, TemplateError};

/// A clone cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// No process.
    #[error("cannot start the process of a clone, {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What went wrong.
        #[source]
        source: std::io::Error,
    },
    /// It does not take the template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// It ends, or says nothing.
    #[error("the process of a clone cannot be talked to: it may have been killed")]
    Talk(#[source] std::io::Error),
    /// It says why it cannot.
    #[error("{text}")]
    Refused {
        /// The causes, joined.
        text: String,
    },
}

/// Processes that wait for an order, all with the same template.
#[derive(Debug)]
pub struct Pool {
    program: PathBuf,
    template: Template,
    size: usize,
    waiting: VecDeque<Waiting>,
}

impl Pool {
    /// For clones of `template`, in processes of `program`, which is bulle; `size` of them wait once
    /// [`fill`](Self::fill) was called.
    pub fn new(program: PathBuf, template: Template, size: usize) -> Self {
        Self {
            program,
            template,
            size,
            waiting: VecDeque::new(),
        }
    }

    /// Starts as many as are missing and waits until all of them are ready.
    ///
    /// # Errors
    /// [`PoolError`]; those that are ready stay.
    pub fn fill(&mut self) -> Result<(), PoolError> {
        let missing = self.size.saturating_sub(self.waiting.len());
        // All at once, so that they make their machines at the same time.
        let started: Result<Vec<_>, _> = (0..missing)
            .map(|_| Waiting::start(&self.program, &self.template, Stdio::default()))
            .collect();
        for mut process in started? {
            process.ready()?;
            self.waiting.push_back(process);
        }
        Ok(())
    }

    /// One that is ready; without any, one that is started now.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn take(&mut self) -> Result<Waiting, PoolError> {
        match self.waiting.pop_front() {
            Some(process) => Ok(process),
            None => Waiting::start(&self.program, &self.template, Stdio::default()),
        }
    }
}
