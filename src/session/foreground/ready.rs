//! Saving a machine whose agent waits for a command.

use super::Foreground;
use crate::control::{SnapshotCreate, chain};
use crate::session::agent::AgentLink;
use crate::session::outcome::Outcome;

impl Foreground<'_> {
    /// Saves the machine as `create` says when its agent is there, and ends.
    pub fn save_when_ready(&mut self, create: SnapshotCreate) {
        if let Some(agent) = &mut self.agent {
            agent.hold();
            self.save_to = Some(create);
        }
    }

    /// Saves the machine if its agent waits. What it may have said since is looked at once more, with
    /// vCPUs and devices at rest.
    pub(super) fn save_if_ready(&mut self) {
        let ready = |agent: &Option<AgentLink>| agent.as_ref().and_then(AgentLink::ready);
        let Some(create) = self.save_to.take_if(|_| ready(&self.agent).is_some()) else {
            return;
        };
        let saved = self.runtime.save_ready(self.vm, &create, || {
            let agent = self.agent.as_mut()?;
            agent.receive(&mut self.stdout, &mut self.stderr);
            agent.ready()
        });
        self.end(match saved {
            Ok(()) => Outcome::Saved,
            Err(error) => Outcome::NotSaved(chain(&error)),
        });
    }
}
