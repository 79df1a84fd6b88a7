//! Actions on a machine that runs, on the vmm thread.

use std::os::fd::{AsRawFd, RawFd};

use crate::config::Config;
use crate::control::{
    Action, ActionError, Instance, PAUSE_PATIENCE, Reply, Requests, State, chain,
};
use crate::vm::Vm;

/// Who answers once a microVM has been started.
pub struct Runtime {
    requests: Requests,
    instance: Instance,
    config: Config,
}

impl Runtime {
    /// For the microVM `instance`, made of `config`.
    pub fn new(requests: Requests, instance: Instance, config: Config) -> Self {
        Self {
            requests,
            instance: Instance {
                state: State::Running,
                ..instance
            },
            config,
        }
    }

    /// Answers what is asked of `vm`.
    pub fn serve(&mut self, vm: &Vm) {
        while let Some(call) = self.requests.next() {
            let result = self.act(&call.action, vm);
            call.answer(result);
        }
    }

    fn act(&mut self, action: &Action, vm: &Vm) -> Result<Reply, ActionError> {
        match action {
            Action::DescribeInstance => Ok(Reply::Instance(self.instance.clone())),
            Action::Version => Ok(Reply::Version(self.instance.vmm_version)),
            Action::GetConfig => Ok(Reply::Config(Box::new(self.config.clone()))),
            Action::GetMachine => Ok(Reply::Machine(self.config.machine_config.clone())),
            Action::Pause => self.pause(vm),
            Action::Resume => {
                if self.instance.state == State::Paused {
                    vm.start();
                    self.instance.state = State::Running;
                }
                Ok(Reply::Done)
            }
            Action::SendCtrlAltDel => match vm.board().keyboard.ctrl_alt_del() {
                true => Ok(Reply::Done),
                false => Err(ActionError::Keyboard),
            },
            Action::PutMachine(_)
            | Action::PatchMachine(_)
            | Action::PutBootSource(_)
            | Action::PutDrive(_)
            | Action::PutEntropy(_)
            | Action::InstanceStart => Err(ActionError::AfterStart),
        }
    }

    /// Pauses; a vCPU that does not follow leaves all of them running.
    fn pause(&mut self, vm: &Vm) -> Result<Reply, ActionError> {
        if self.instance.state == State::Running {
            if let Err(error) = vm.pause(PAUSE_PATIENCE) {
                vm.start();
                let text = chain(&error);
                return Err(ActionError::Failed { text });
            }
            self.instance.state = State::Paused;
        }
        Ok(Reply::Done)
    }
}

impl AsRawFd for Runtime {
    fn as_raw_fd(&self) -> RawFd {
        self.requests.as_raw_fd()
    }
}
