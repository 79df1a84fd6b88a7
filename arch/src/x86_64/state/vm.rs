//! What the vCPUs of a VM share.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::{StateError, raw};
use crate::tsc;
use crate::vm::IrqchipMode;

/// What the guest's clocks do about the time between saving and restoring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockPolicy {
    /// They jump over it: kvmclock and the TSC have gone on, so timers that were due are due at once
    /// and the guest's wall clock is right where it derives from either.
    Advance,
    /// They go on where they stopped.
    Frozen,
}

/// How far clocks are from where they were saved. Made once for all vCPUs of a VM, so that their
/// TSCs stay in step.
#[derive(Clone, Copy, Debug)]
pub struct ClockShift {
    /// Time that the guest's clocks jump.
    advance: Duration,
    /// Saved host TSC minus this host's, with wrap-around.
    host_tsc: u64,
    /// When the guest's clocks are exactly so far.
    since: Instant,
}

impl ClockShift {
    /// Time that the guest's clocks jump at the restore; zero with [`ClockPolicy::Frozen`].
    #[must_use]
    pub fn advance(&self) -> Duration {
        self.advance
    }

    /// A TSC of this frequency, for a value that was saved.
    pub(super) fn tsc(&self, saved: u64, khz: u32) -> u64 {
        saved.wrapping_add(self.cycles(khz))
    }

    /// A TSC's distance from the host's, for a distance that was saved.
    #[must_use]
    pub fn tsc_offset(&self, saved: u64, khz: u32) -> u64 {
        saved
            .wrapping_add(self.host_tsc)
            .wrapping_add(self.cycles(khz))
    }

    fn cycles(&self, khz: u32) -> u64 {
        let cycles = self.advance.as_nanos() * u128::from(khz) / 1_000_000;
        u64::try_from(cycles).unwrap_or(u64::MAX)
    }
}

/// State of a VM but for its memory, its vCPUs and its devices in userspace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// kvmclock, in nanoseconds.
    pub clock: u64,
    /// The host's time of day when `clock` was read, in nanoseconds since 1970.
    pub realtime: u64,
    /// The host's TSC when `clock` was read.
    pub host_tsc: u64,
    /// Interrupt controllers and timer, with [`IrqchipMode::Kernel`].
    pub chips: Option<KernelChips>,
}

/// The interrupt controllers and the timer that are in the kernel with [`IrqchipMode::Kernel`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelChips {
    #[serde(with = "raw")]
    pic_master: kvm_irqchip,
    #[serde(with = "raw")]
    pic_slave: kvm_irqchip,
    #[serde(with = "raw")]
    ioapic: kvm_irqchip,
    #[serde(with = "raw")]
    pit: kvm_pit_state2,
}

impl PartialEq for KernelChips {
    fn eq(&self, other: &Self) -> bool {
        self.pit == other.pit
            && self
                .irqchips()
                .iter()
                .zip(other.irqchips())
                .all(|((_, a), (_, b))| a.as_bytes() == b.as_bytes())
    }
}

impl fmt::Debug for KernelChips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelChips").finish_non_exhaustive()
    }
}

impl KernelChips {
    fn irqchips(&self) -> [(u32, &kvm_irqchip); 3] {
        [
            (KVM_IRQCHIP_PIC_MASTER, &self.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, &self.pic_slave),
            (KVM_IRQCHIP_IOAPIC, &self.ioapic),
        ]
    }

    fn save(vm: &VmFd) -> Result<Self, StateError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(failed("KVM_GET_IRQCHIP"))?;
            Ok::<_, StateError>(chip)
        };
        let mut pit = vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?;
        // Moments of this host's clock, which KVM sets anew when it takes the state.
        for channel in &mut pit.channels {
            channel.count_load_time = 0;
        }
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit,
        })
    }

    fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        for (chip_id, chip) in self.irqchips() {
            // The field says which chip it is, not the number that a file may have in it.
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(failed("KVM_SET_PIT2"))
    }
}

fn failed(ioctl: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Vm { ioctl, source }
}

impl VmState {
    /// Take the state of a VM whose vCPUs stand still.
    ///
    /// # Errors
    /// [`StateError::Vm`] when KVM refuses.
    pub fn save(vm: &VmFd, mode: IrqchipMode) -> Result<Self, StateError> {
        let clock = vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
        // KVM says them for the very moment where it can, which is since Linux 5.16.
        let realtime = if clock.flags & KVM_CLOCK_REALTIME != 0 {
            clock.realtime
        } else {
            now()
        };
        let host_tsc = if clock.flags & KVM_CLOCK_HOST_TSC != 0 {
            clock.host_tsc
        } else {
            tsc::read()
        };
        Ok(Self {
            clock: clock.clock,
            realtime,
            host_tsc,
            chips: match mode {
                IrqchipMode::Kernel => Some(KernelChips::save(vm)?),
                IrqchipMode::Split => None,
            },
        })
    }

    /// Where the interrupt controllers are in this state.
    #[must_use]
    pub fn irqchip(&self) -> IrqchipMode {
        match self.chips {
            Some(_) => IrqchipMode::Kernel,
            None => IrqchipMode::Split,
        }
    }

    /// How the clocks are set, from now on. A host clock that stands before the saved one counts as
    /// no time.
    #[must_use]
    pub fn shift(&self, policy: ClockPolicy) -> ClockShift {
        let advance = match policy {
            ClockPolicy::Advance => Duration::from_nanos(now().saturating_sub(self.realtime)),
            ClockPolicy::Frozen => Duration::ZERO,
        };
        ClockShift {
            advance,
            host_tsc: self.host_tsc.wrapping_sub(tsc::read()),
            since: Instant::now(),
        }
    }

    /// Give this state to a VM of the same [`IrqchipMode`], whose vCPUs have theirs.
    ///
    /// # Errors
    /// [`StateError::Vm`] when KVM refuses.
    pub fn restore(&self, vm: &VmFd, shift: &ClockShift) -> Result<(), StateError> {
        if let Some(chips) = &self.chips {
            chips.restore(vm)?;
        }
        let passed = shift.advance.saturating_add(shift.since.elapsed());
        let clock = self.clock.saturating_add(nanoseconds(passed));
        let clock = kvm_clock_data {
            clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}

/// The host's time of day in nanoseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    nanoseconds(since.unwrap_or_default())
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
