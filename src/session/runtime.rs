//! Actions on a machine that runs, on the vmm thread.

use std::os::fd::{AsRawFd, RawFd};

use super::commands;
use crate::config::Config;
use crate::control::{
    Action, ActionError, Instance, PAUSE_PATIENCE, Reply, Requests, SnapshotCreate, State, chain,
    no_balloon,
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

    /// Table: an arm for each action.
    fn act(&mut self, action: &Action, vm: &Vm) -> Result<Reply, ActionError> {
        let devices = &vm.board().devices;
        let config = &mut self.config;
        match action {
            Action::DescribeInstance => Ok(Reply::Instance(self.instance.clone())),
            Action::Version => Ok(Reply::Version(self.instance.vmm_version)),
            Action::GetConfig => Ok(Reply::Config(Box::new(config.clone()))),
            Action::GetMachine => Ok(Reply::Machine(config.machine_config.clone())),
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
            Action::PatchDrive(update) => commands::drive(devices, config, update),
            Action::PatchPmem(update) => commands::pmem(config, update),
            Action::GetBalloon => match config.balloon {
                Some(balloon) => Ok(Reply::Balloon(balloon)),
                None => Err(no_balloon()),
            },
            Action::PatchBalloon(update) => commands::balloon_size(devices, config, *update),
            Action::GetBalloonStatistics => commands::balloon_statistics(devices),
            Action::PatchBalloonStatistics(update) => {
                commands::balloon_interval(devices, config, *update)
            }
            Action::StartHinting(start) => commands::start_hinting(devices, *start),
            Action::GetHinting => commands::hinting(devices),
            Action::StopHinting => commands::stop_hinting(devices),
            Action::GetMemoryHotplug => commands::plugged(devices, config),
            Action::PatchMemoryHotplug(update) => commands::plug(devices, config, *update),
            Action::Unplug => Err(ActionError::NotYet {
                what: "hotplug",
                why: "does not take devices away while the guest runs",
            }),
            Action::CreateSnapshot(create) => self.save(create),
            Action::PutMachine(_)
            | Action::PatchMachine(_)
            | Action::PutBootSource(_)
            | Action::PutDrive(_)
            | Action::PutPmem(_)
            | Action::PutEntropy(_)
            | Action::PutVsock(_)
            | Action::PutSerial(_)
            | Action::PutBalloon(_)
            | Action::PutMemoryHotplug(_)
            | Action::LoadSnapshot(_)
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

    fn save(&self, _: &SnapshotCreate) -> Result<Reply, ActionError> {
        if self.instance.state == State::Running {
            return Err(ActionError::SnapshotRunning);
        }
        Err(ActionError::NotYet {
            what: "snapshots",
            why: "does not save microVMs; this one stays paused",
        })
    }
}

impl AsRawFd for Runtime {
    fn as_raw_fd(&self) -> RawFd {
        self.requests.as_raw_fd()
    }
}
