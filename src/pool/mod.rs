//! Processes that wait to become clones, each with a machine that has all but a guest.
//!
//! Whoever wants clones starts `bulle shell` processes ([`Waiting`]) and hands each a template over the
//! socket that is its standard input ([`crate::snapshot::template`]). It confines itself, makes a shell of that shape,
//! says that it is ready, and waits for an [`Order`], with which another template of that shape may come. A [`Pool`] keeps
//! some that are ready, for clones of any templates, and closes those that are gone off the path. One process has one
//! microVM, so none reaches another's memory, files or rights. What both sides say after the template
//! are words: a length (u32, little-endian) and JSON.

mod process;
mod words;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

pub use process::{Running, Stdio, Waiting};
pub use words::{Order, Word, receive, send};

use crate::sandbox::reaper::Reaper;
use crate::sandbox::thread::ThreadError;
use crate::snapshot::template::{Template, TemplateError};
use crate::vm::Shape;

/// Processes that may end before they are ready until the reason is with all of them.
const MOST_LOST: usize = 8;

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
    /// Those that ended before they were ready, one after the other.
    lost: usize,
    /// Waits for the end of those that are gone, which takes as long as closing their machines does.
    reaper: Option<Reaper>,
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
            lost: 0,
            reaper: None,
        }
    }

    fn reap(&mut self, gone: Waiting) {
        if self.reaper.is_none() {
            let reaper = Reaper::new();
            let told = |error: &ThreadError| log::warn!("processes are waited for here: {error}");
            self.reaper = reaper.inspect_err(told).ok();
        }
        match &self.reaper {
            Some(reaper) => reaper.reap(gone),
            None => drop(gone),
        }
    }

    /// Lets go of those that ended, such as by being killed, and starts as many as are missing, all at once;
    /// they get ready meanwhile. Does not wait.
    ///
    /// # Errors
    /// [`PoolError`], also where one says that it cannot, or one after the other ends before it is ready.
    pub fn fill(&mut self) -> Result<(), PoolError> {
        for mut process in std::mem::take(&mut self.waiting) {
            let was_ready = process.is_ready();
            match process.attend() {
                Ok(()) => {
                    self.lost = if process.is_ready() { 0 } else { self.lost };
                    self.waiting.push_back(process);
                }
                Err(PoolError::Talk(error)) if was_ready || self.lost < MOST_LOST => {
                    self.lost += usize::from(!was_ready);
                    log::debug!("a process that waited is gone: {error}");
                    self.reap(process);
                }
                Err(error) => return Err(error),
            }
        }
        while self.waiting.len() < self.size {
            match Waiting::start(&self.program, &self.template, Stdio::default()) {
                Err(PoolError::Talk(error)) if self.lost < MOST_LOST => {
                    self.lost += 1;
                    log::debug!("a process that was started is gone: {error}");
                }
                started => self.waiting.push_back(started?),
            }
        }
        Ok(())
    }

    /// Waits until all of them are ready.
    ///
    /// # Errors
    /// [`PoolError`]; those that are ready stay.
    pub fn ready(&mut self) -> Result<(), PoolError> {
        self.waiting.iter_mut().try_for_each(Waiting::ready)
    }

    /// Readable where [`fill`](Self::fill) has something to do.
    pub fn events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.waiting.iter().map(AsFd::as_fd)
    }

    /// A clone as ordered, in a process that waits, or in a new one. One that turns out to be gone
    /// has another in its place.
    ///
    /// # Errors
    /// [`PoolError`], of the order.
    pub fn clone(&mut self, order: &Order) -> Result<Running, PoolError> {
        self.clone_of(None, order)
    }

    /// As [`clone`](Self::clone), of `another` template than the pool's. Processes that wait are for it if its
    /// machine has the [`Shape`] of theirs; else the clone is in a new one.
    ///
    /// # Errors
    /// [`PoolError`], of the order or the template.
    pub fn clone_of(
        &mut self,
        another: Option<&Template>,
        order: &Order,
    ) -> Result<Running, PoolError> {
        let shape = |template: &Template| Shape::of(&template.config.machine_config);
        let fits = another.is_none_or(|another| shape(another) == shape(&self.template));
        while fits && let Some(mut process) = self.waiting.pop_front() {
            let ordered = process.order_of(order, another);
            match ordered.and_then(|()| process.begin()) {
                Err(PoolError::Talk(error)) => {
                    log::debug!("a process that waited is gone: {error}");
                    self.reap(process);
                }
                ordered => return ordered,
            }
        }
        let template = another.unwrap_or(&self.template);
        let mut process = Waiting::start(&self.program, template, Stdio::default())?;
        process.order(order)?;
        process.begun()
    }
}
