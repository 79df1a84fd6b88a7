//! The state of all devices as plain data, and which machine it fits.
//!
//! [`BoardState`] comes from [`Board::save`](super::Board::save) and goes into
//! [`Board::new`](super::Board::new); its default is the state after reset, so that booting is
//! restoring that. Virtio devices are told apart by their id alone. A state may come from a file:
//! each device checks its part of it.

use devices::ioapic::IoApicState;
use devices::legacy::i8042::I8042State;
use devices::legacy::power::PowerState;
use devices::legacy::rtc::CmosState;
use devices::legacy::serial::SerialState;
use devices::legacy::watchdog::WatchdogState;
use devices::pci::hotplug::HotplugState;
use devices::virtio::core::VirtioState;
use devices::virtio::transport::pci::PciState;
use serde::{Deserialize, Serialize};

use super::Wiring;
use super::plan::Plan;
use crate::config::{Irqchip, Transport};

/// All devices of a machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BoardState {
    /// COM1.
    pub console: SerialState,
    /// COM2.
    pub agent: SerialState,
    /// Keyboard controller.
    pub keyboard: I8042State,
    /// Power registers.
    pub power: PowerState,
    /// Real-time clock.
    pub clock: CmosState,
    /// The rest, which machines have or have not; `None`: as after reset, whatever there is.
    pub parts: Option<PartsState>,
}

/// Devices that not every machine has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartsState {
    /// Watchdog.
    pub watchdog: Option<WatchdogState>,
    /// I/O APIC, where it is not KVM's.
    pub ioapic: Option<IoApicState>,
    /// Address register of the PCI configuration ports, with `--pci`.
    pub pci_address: Option<u32>,
    /// PCI functions that came or were to go, with `--pci`.
    #[serde(default)]
    pub hotplug: Option<HotplugState>,
    /// Virtio devices in the order of their places on the bus.
    pub virtio: Vec<VirtioDeviceState>,
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VirtioDeviceState {
    /// What people call it.
    pub id: String,
    /// The type of device, as [`DeviceConfig::kind`](devices::virtio::registry::DeviceConfig::kind)
    /// has it.
    pub kind: String,
    /// Registers, queues and device.
    pub virtio: VirtioState,
    /// The PCI function, with `--pci`.
    pub pci: Option<PciState>,
    /// Its slot on the bus; the first that is free where there is none.
    #[serde(default)]
    pub slot: Option<u8>,
}

impl VirtioDeviceState {
    /// Whether it is of the device of `plan`: devices of different types may have the same name.
    pub fn is_of(&self, plan: &Plan) -> bool {
        (self.id.as_str(), self.kind.as_str()) == (&plan.id, plan.config.kind())
    }

    /// A device that no driver has seen.
    pub fn reset(id: &str, kind: &str) -> Self {
        Self {
            id: id.to_owned(),
            kind: kind.to_owned(),
            virtio: VirtioState::default(),
            pci: None,
            slot: None,
        }
    }
}

/// A saved state is not one of this machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The machine has a device more.
    #[error("The virtio device '{id}' is not in the snapshot: leave it out")]
    Missing {
        /// Its name.
        id: String,
    },
    /// The snapshot has a device more.
    #[error(
        "The snapshot has a virtio device '{id}', which this machine has not: give it that too"
    )]
    Surplus {
        /// Its name.
        id: String,
    },
    /// One name, two devices.
    #[error("The virtio device '{id}' is of type {now}, and of type {saved} in the snapshot")]
    Kind {
        /// Its name.
        id: String,
        /// In the snapshot.
        saved: String,
        /// As configured.
        now: &'static str,
    },
    /// Another machine altogether.
    #[error(
        "The snapshot is of a machine {} {what}, unlike this one",
        if *.saved { "with" } else { "without" }
    )]
    Machine {
        /// What only one of them has.
        what: &'static str,
        /// Whether that is the one in the snapshot.
        saved: bool,
    },
}

impl BoardState {
    /// The I/O APIC's part, or its state after reset.
    pub fn ioapic(&self) -> IoApicState {
        let parts = self.parts.as_ref();
        let ioapic = parts.and_then(|parts| parts.ioapic.clone());
        ioapic.unwrap_or_default()
    }

    /// Whether there are virtio devices in it.
    pub fn has_virtio(&self) -> bool {
        let parts = self.parts.as_ref();
        parts.is_some_and(|parts| !parts.virtio.is_empty())
    }

    /// Checks that this is a state of the machine that `wiring` makes, and brings its devices into
    /// the order in which they were saved. Nothing is changed otherwise.
    ///
    /// # Errors
    /// A device that only one of both has, or that has another type.
    pub fn arrange(
        &self,
        wiring: &mut Wiring,
        transport: Transport,
        irqchip: Irqchip,
    ) -> Result<(), StateError> {
        let Some(parts) = &self.parts else {
            return Ok(());
        };
        let both = |what, saved: bool, now: bool| match saved == now {
            true => Ok(()),
            false => Err(StateError::Machine { what, saved }),
        };
        let split = irqchip == Irqchip::Split;
        both(
            "a watchdog",
            parts.watchdog.is_some(),
            wiring.watchdog.is_some(),
        )?;
        both("a split irqchip", parts.ioapic.is_some(), split)?;
        let pci = transport == Transport::Pci;
        both("a PCI bus", parts.pci_address.is_some(), pci)?;
        for device in &parts.virtio {
            both("virtio devices over PCI", device.pci.is_some(), pci)?;
        }
        let order = parts.order(wiring)?;
        let mut plans: Vec<_> = wiring.devices.drain(..).map(Some).collect();
        let plans = order.into_iter().filter_map(|at| plans.get_mut(at)?.take());
        wiring.devices.extend(plans);
        Ok(())
    }
}

impl PartsState {
    /// For each saved device, its index in `wiring`.
    fn order(&self, wiring: &Wiring) -> Result<Vec<usize>, StateError> {
        let mut order: Vec<usize> = Vec::with_capacity(wiring.devices.len());
        for device in &self.virtio {
            let VirtioDeviceState { id, kind, .. } = device;
            let plans = &wiring.devices;
            let same = plans.iter().position(|plan| device.is_of(plan));
            let at = same.or_else(|| plans.iter().position(|plan| plan.id == *id));
            // A name that the snapshot has twice has only one device.
            let at = at.filter(|at| !order.contains(at));
            let plan = at.and_then(|at| Some((at, wiring.devices.get(at)?)));
            let Some((at, plan)) = plan else {
                return Err(StateError::Surplus { id: id.clone() });
            };
            let now = plan.config.kind();
            if kind != now {
                return Err(StateError::Kind {
                    id: id.clone(),
                    saved: kind.clone(),
                    now,
                });
            }
            order.push(at);
        }
        let mut plans = wiring.devices.iter().enumerate();
        match plans.find(|(at, _)| !order.contains(at)) {
            None => Ok(order),
            Some((_, plan)) => Err(StateError::Missing {
                id: plan.id.clone(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use devices::virtio::registry::DeviceConfig;
    use devices::virtio::rtc::RtcOptions;
    use vmm_sys_util::eventfd::EventFd;

    use super::super::SerialEnd;
    use super::super::plan::Plan;
    use super::*;
    use crate::config;

    fn wiring(ids: &[&str]) -> Wiring {
        let end = || SerialEnd {
            out: Box::new(std::io::sink()),
            drained: EventFd::new(0).unwrap(),
        };
        let plans = ids.iter().map(|id| Plan {
            id: (*id).to_owned(),
            config: match id.starts_with("clock") {
                true => DeviceConfig::Rtc(RtcOptions::default()),
                false => DeviceConfig::Entropy(None),
            },
        });
        Wiring {
            console: end(),
            agent: end(),
            watchdog: None,
            io: Vec::new(),
            boot_timer: None,
            devices: plans.collect(),
        }
    }

    fn saved(devices: &[(&str, &str)]) -> BoardState {
        let virtio = devices
            .iter()
            .map(|(id, kind)| VirtioDeviceState::reset(id, kind));
        BoardState {
            parts: Some(PartsState {
                ioapic: Some(IoApicState::default()),
                virtio: virtio.collect(),
                ..PartsState::default()
            }),
            ..BoardState::default()
        }
    }

    fn arrange(state: &BoardState, wiring: &mut Wiring) -> Result<(), StateError> {
        state.arrange(wiring, Transport::Mmio, Irqchip::Split)
    }

    fn ids(wiring: &Wiring) -> Vec<&str> {
        wiring.devices.iter().map(|plan| plan.id.as_str()).collect()
    }

    #[test]
    fn the_reset_state_fits_every_machine() {
        let reset = BoardState::default();
        for irqchip in [Irqchip::Split, Irqchip::Kernel] {
            for transport in [Transport::Mmio, Transport::Pci] {
                let mut wiring = wiring(&["b", "a"]);
                assert_eq!(reset.arrange(&mut wiring, transport, irqchip), Ok(()));
                assert_eq!(ids(&wiring), ["b", "a"]);
            }
        }
    }

    #[test]
    fn devices_come_in_the_order_in_which_they_were_saved() {
        let state = saved(&[("a", "entropy"), ("clock", "clock"), ("b", "entropy")]);
        let mut wiring = wiring(&["b", "clock", "a"]);
        assert_eq!(arrange(&state, &mut wiring), Ok(()));
        assert_eq!(ids(&wiring), ["a", "clock", "b"]);
    }

    #[test]
    fn devices_of_different_types_may_have_the_same_name() {
        let state = saved(&[("1", "clock"), ("1", "entropy")]);
        let mut wiring = wiring(&["1", "clock"]);
        wiring.devices[1].id = "1".to_owned();
        assert_eq!(arrange(&state, &mut wiring), Ok(()));
        let kinds = wiring.devices.iter().map(|plan| plan.config.kind());
        assert_eq!(kinds.collect::<Vec<_>>(), ["clock", "entropy"]);
    }

    #[test]
    fn another_machine_is_refused_and_nothing_changed() {
        let id = |id: &str| id.to_owned();
        let good = [("a", "entropy"), ("clock", "clock")];
        let cases: [(&[_], &[_], _); 5] = [
            (&good, &["clock"], StateError::Surplus { id: id("a") }),
            (
                &good[..1],
                &["clock", "a"],
                StateError::Missing { id: id("clock") },
            ),
            (&[], &["a"], StateError::Missing { id: id("a") }),
            (
                &[good[0], good[0]],
                &["a", "clock"],
                StateError::Surplus { id: id("a") },
            ),
            (
                &[good[0], ("clock", "net")],
                &["a", "clock"],
                StateError::Kind {
                    id: id("clock"),
                    saved: id("net"),
                    now: "clock",
                },
            ),
        ];
        for (devices, now, error) in cases {
            let mut wiring = wiring(now);
            assert_eq!(arrange(&saved(devices), &mut wiring), Err(error));
            assert_eq!(ids(&wiring), now);
        }
    }

    #[test]
    fn machines_of_another_kind_are_told_apart() {
        let state = saved(&[("a", "entropy")]);
        let with = |transport, irqchip, watchdog| {
            let mut wiring = Wiring {
                watchdog,
                ..wiring(&["a"])
            };
            state.arrange(&mut wiring, transport, irqchip)
        };
        let machine = |what, saved| Err(StateError::Machine { what, saved });
        let (mmio, split) = (Transport::Mmio, Irqchip::Split);
        assert_eq!(with(mmio, split, None), Ok(()));
        assert_eq!(
            with(Transport::Pci, split, None),
            machine("a PCI bus", false)
        );
        assert_eq!(
            with(mmio, Irqchip::Kernel, None),
            machine("a split irqchip", true)
        );
        let dog = Some(config::Watchdog::default());
        assert_eq!(with(mmio, split, dog), machine("a watchdog", false));
    }

    #[test]
    fn it_goes_through_json() {
        let state = saved(&[("a", "entropy"), ("clock", "clock")]);
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<BoardState>(&json).unwrap(), state);
    }
}
