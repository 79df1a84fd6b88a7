//! State of one vCPU.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Xsave,
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::{ClockShift, Context, StateError, msrs, nested, raw};
use crate::{interrupts, tsc};

/// Bytes of extended state that every host takes (`struct kvm_xsave`).
const XSAVE_SIZE: usize = size_of::<kvm_xsave>();
/// Longest extended state, well above the 11 KiB of processors with AMX.
const MAX_XSAVE_SIZE: usize = 64 << 10;
/// Frequencies that differ by less, in parts per million, are the same to KVM (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// DR6 and DR7 after reset: the bits that are always 1.
const NEW_DR6: u64 = 0xffff_0ff0;
const NEW_DR7: u64 = 0x400;

/// What a guest often has as a new vCPU has it.
#[derive(Clone, Copy)]
enum Part {
    Debug,
    Events,
    MpState,
}

/// A vCPU's time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tsc {
    /// Its frequency in kHz; 0 when KVM does not say.
    pub khz: u32,
    /// Its value some time while the state was taken.
    pub value: u64,
    /// What it had more than the host's, with wrap-around; none when it does not run at the host's
    /// frequency, or KVM does not say (before Linux 5.16).
    pub offset: Option<u64>,
}

/// All that a vCPU has in KVM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// Its index among the vCPUs.
    pub index: u16,
    /// What its CPUID instruction answers.
    #[serde(with = "raw::list")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Time stamp counter.
    pub tsc: Tsc,
    /// Running, halted, or waiting for INIT or SIPI.
    #[serde(with = "raw")]
    pub mp_state: kvm_mp_state,
    /// Exceptions, interrupts and NMIs under way.
    #[serde(with = "raw")]
    pub events: kvm_vcpu_events,
    /// General registers.
    #[serde(with = "raw")]
    pub regs: kvm_regs,
    /// Segment and control registers.
    #[serde(with = "raw")]
    pub sregs: kvm_sregs,
    /// Extended control registers; none of them on a processor without XSAVE.
    #[serde(with = "raw")]
    pub xcrs: kvm_xcrs,
    /// FPU, vector and other extended state in the layout of XSAVE.
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// Debug registers.
    #[serde(with = "raw")]
    pub debugregs: kvm_debugregs,
    /// Registers of the local APIC.
    #[serde(with = "raw")]
    pub lapic: kvm_lapic_state,
    /// MSRs but for the TSC, in the order in which they are written.
    #[serde(with = "raw::list")]
    pub msrs: Vec<kvm_msr_entry>,
    /// `struct kvm_nested_state`, 128 bytes or more; empty where the guest has no virtual machines of its
    /// own.
    #[serde(with = "serde_bytes", default, skip_serializing_if = "Vec::is_empty")]
    pub nested: Vec<u8>,
}

impl VcpuState {
    /// Take the state of a vCPU that stands still and has no access to complete.
    ///
    /// # Errors
    /// [`StateError::Vcpu`] names the request that KVM refused.
    pub fn save(fd: &VcpuFd, index: u16, context: &Context) -> Result<Self, StateError> {
        let failed = |ioctl| failed(index, ioctl);
        // First, since KVM lets a pending INIT or SIPI happen here, which changes registers.
        let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        // KVM may deliver an exception's payload to CR2 or DR6 here.
        let events = fd
            .get_vcpu_events()
            .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        // The deadline before the local APIC: a timer that expires in between is then in both, and
        // rather fires twice than never.
        let (tsc, msrs) = save_msrs(fd, index, context)?;
        let xcrs = if context.xcrs {
            fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?
        } else {
            kvm_xcrs::default()
        };
        let sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        Ok(Self {
            index,
            cpuid: get_cpuid(fd).map_err(failed("KVM_GET_CPUID2"))?,
            tsc,
            mp_state,
            events,
            regs: fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
            nested: nested::save(fd, index, &sregs, context)?,
            sregs,
            xcrs,
            xsave: get_xsave(fd, index, context)?,
            debugregs: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            msrs,
        })
    }

    /// Give this state, CPUID included, to a vCPU.
    ///
    /// # Errors
    /// As [`Self::set_cpuid`] and [`Self::restore_registers`].
    pub fn restore(
        &self,
        fd: &VcpuFd,
        context: &Context,
        shift: &ClockShift,
    ) -> Result<(), StateError> {
        self.set_cpuid(fd)?;
        self.restore_registers(fd, context, shift)
    }

    /// Give only CPUID to a vCPU, which must be new: KVM refuses other CPUID than before once a vCPU
    /// has run.
    ///
    /// # Errors
    /// [`StateError`] when there are too many entries, or KVM refuses them.
    pub fn set_cpuid(&self, fd: &VcpuFd) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany {
            vcpu: self.index,
            what: "CPUID entries",
            count: self.cpuid.len(),
            most: KVM_MAX_CPUID_ENTRIES,
        })?;
        fd.set_cpuid2(&cpuid)
            .map_err(failed(self.index, "KVM_SET_CPUID2"))
    }

    /// Give everything but CPUID to a new vCPU that has the same CPUID already. What a new vCPU has
    /// anyway is not written, since each ioctl takes microseconds. The guest's memory must be in place:
    /// KVM looks up where some MSRs point to.
    ///
    /// # Errors
    /// [`StateError`] names what does not fit this host, or what KVM refused.
    pub fn restore_registers(
        &self,
        fd: &VcpuFd,
        context: &Context,
        shift: &ClockShift,
    ) -> Result<(), StateError> {
        self.give(fd, context, Some(shift), &|part| self.is_new(part))
    }

    /// Give all that does not go with time to a new vCPU that has the same CPUID already, long before it
    /// runs: [`start_clocks`](Self::start_clocks) brings the rest.
    ///
    /// # Errors
    /// As [`restore_registers`](Self::restore_registers).
    pub fn prepare(&self, fd: &VcpuFd, context: &Context) -> Result<(), StateError> {
        self.give(fd, context, None, &|part| self.is_new(part))
    }

    /// Whether a vCPU can be [prepared](Self::prepare): no timer of its local APIC counts down, which
    /// would go off meanwhile, and its guest has no virtual machines, whose registers it may be at.
    #[must_use]
    pub fn can_wait(&self) -> bool {
        interrupts::timer_count(&self.lapic) == 0 && self.nested.is_empty()
    }

    /// Whether its registers are taken together with some of memory, which has to be in place: with the page tables of
    /// PAE, KVM_SET_SREGS reads the four entries that CR3 leads to.
    #[must_use]
    pub fn reads_memory(&self) -> bool {
        const PG: u64 = 1 << 31;
        const PAE: u64 = 1 << 5;
        const LMA: u64 = 1 << 10;
        let sregs = &self.sregs;
        sregs.cr0 & PG != 0 && sregs.cr4 & PAE != 0 && sregs.efer & LMA == 0
    }

    /// Give the TSC, and what compares with it, to a vCPU that was [prepared](Self::prepare) and has not
    /// run.
    ///
    /// # Errors
    /// As [`restore_registers`](Self::restore_registers).
    pub fn start_clocks(
        &self,
        fd: &VcpuFd,
        context: &Context,
        shift: &ClockShift,
    ) -> Result<(), StateError> {
        let same_tsc = self.set_tsc_khz(fd, context)?;
        let deadline = |entry: &&kvm_msr_entry| is_deadline(entry) && entry.data != 0;
        let deadline: Vec<_> = self.msrs.iter().filter(deadline).copied().collect();
        self.set_tsc(fd, shift, same_tsc, &deadline)
    }

    /// [`restore_registers`](Self::restore_registers) for a vCPU that has run since.
    ///
    /// # Errors
    /// As there.
    pub fn reset_registers(
        &self,
        fd: &VcpuFd,
        context: &Context,
        shift: &ClockShift,
    ) -> Result<(), StateError> {
        nested::leave(fd, self, context)?;
        self.give(fd, context, Some(shift), &|_| false)
    }

    /// Whether a part is as a new vCPU has it.
    fn is_new(&self, part: Part) -> bool {
        match part {
            Part::Debug => {
                let Self { debugregs, .. } = self;
                debugregs.db == [0; 4] && (debugregs.dr6, debugregs.dr7) == (NEW_DR6, NEW_DR7)
            }
            Part::Events => {
                let flags = self.events.flags;
                let none = kvm_vcpu_events {
                    flags,
                    ..Default::default()
                };
                self.events == none
            }
            Part::MpState => {
                let new = match self.index {
                    0 => KVM_MP_STATE_RUNNABLE,
                    _ => KVM_MP_STATE_UNINITIALIZED,
                };
                self.mp_state.mp_state == new
            }
        }
    }

    /// `skip` says which parts the vCPU has already. Without `shift`, clocks and timers stay as they are.
    fn give(
        &self,
        fd: &VcpuFd,
        context: &Context,
        shift: Option<&ClockShift>,
        skip: &dyn Fn(Part) -> bool,
    ) -> Result<(), StateError> {
        let failed = |ioctl| failed(self.index, ioctl);
        context.msrs.check(&self.msrs, self.index)?;
        let xsave = self.xsave(context)?;
        let same_tsc = self.set_tsc_khz(fd, context)?;
        // The segment registers bring the APIC base, on whose mode the local APIC depends.
        fd.set_sregs(&self.sregs).map_err(failed("KVM_SET_SREGS"))?;
        fd.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        if self.xcrs.nr_xcrs > 0 {
            if !context.xcrs {
                return Err(StateError::Capability("KVM_CAP_XCRS"));
            }
            fd.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        // SAFETY: `xsave` has as many bytes as this host's `KVM_CAP_XSAVE2` says, so KVM reads
        // nothing behind it.
        unsafe { fd.set_xsave2(&xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        if !skip(Part::Debug) {
            fd.set_debug_regs(&self.debugregs)
                .map_err(failed("KVM_SET_DEBUGREGS"))?;
        }
        fd.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        match shift {
            Some(shift) => self.set_tsc(fd, shift, same_tsc, &self.msrs)?,
            None => {
                let timeless = self.msrs.iter().filter(|entry| !is_deadline(entry));
                let timeless: Vec<_> = timeless.copied().collect();
                msrs::write(fd, &timeless, self.index)?;
            }
        }
        nested::restore(fd, self, context)?;
        if !skip(Part::Events) {
            fd.set_vcpu_events(&self.events)
                .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        }
        if !skip(Part::MpState) {
            fd.set_mp_state(self.mp_state)
                .map_err(failed("KVM_SET_MP_STATE"))?;
        }
        Ok(())
    }

    /// The counter runs at the guest's frequency afterwards. True when that is exactly the host's.
    fn set_tsc_khz(&self, fd: &VcpuFd, context: &Context) -> Result<bool, StateError> {
        let saved = self.tsc.khz;
        if saved == 0 || !context.get_tsc_khz {
            return Ok(false);
        }
        let host = match context.host_tsc_khz.get() {
            Some(host) => *host,
            None => {
                let host = fd
                    .get_tsc_khz()
                    .map_err(failed(self.index, "KVM_GET_TSC_KHZ"))?;
                *context.host_tsc_khz.get_or_init(|| host)
            }
        };
        if host == saved {
            return Ok(true);
        }
        if context.tsc_control {
            fd.set_tsc_khz(saved)
                .map_err(failed(self.index, "KVM_SET_TSC_KHZ"))?;
        } else if u64::from(host.abs_diff(saved)) * 1_000_000 > u64::from(host) * TSC_TOLERANCE_PPM
        {
            return Err(StateError::TscFrequency { saved, host });
        }
        Ok(false)
    }

    /// The TSC before `rest`, which has the deadline. By its distance from the host's where that is possible: all
    /// vCPUs are then in step to the cycle, and KVM does not take a small value for an attempt to
    /// start in step with other vCPUs, as it does with the MSR before Linux 6.7.
    fn set_tsc(
        &self,
        fd: &VcpuFd,
        shift: &ClockShift,
        same_tsc: bool,
        rest: &[kvm_msr_entry],
    ) -> Result<(), StateError> {
        let Tsc { khz, value, offset } = self.tsc;
        let offset = offset.filter(|_| same_tsc);
        let by_offset =
            offset.is_some_and(|saved| tsc::set_offset(fd, shift.tsc_offset(saved, khz)).is_ok());
        if by_offset {
            return msrs::write(fd, rest, self.index);
        }
        let tsc = msrs::entry(msrs::TSC, shift.tsc(value, khz));
        let msrs = [&[tsc], rest].concat();
        msrs::write(fd, &msrs, self.index)
    }

    /// The extended state in the size of this host's. What is behind that, or missing, must be the
    /// initial state, which is zero.
    fn xsave(&self, context: &Context) -> Result<Xsave, StateError> {
        let wanted = context.xsave2_size.max(XSAVE_SIZE);
        let error = || StateError::Xsave {
            vcpu: self.index,
            found: self.xsave.len(),
            wanted,
        };
        let sizes = XSAVE_SIZE..=MAX_XSAVE_SIZE;
        let behind = self.xsave.get(wanted..).unwrap_or_default();
        if !sizes.contains(&self.xsave.len()) || behind.iter().any(|byte| *byte != 0) {
            return Err(error());
        }
        let mut xsave = new_xsave(wanted).ok_or_else(error)?;
        let (region, extra) = self.xsave.split_at(XSAVE_SIZE);
        // SAFETY: the length of the structure's variable part is not touched.
        let fixed = unsafe { xsave.as_mut_fam_struct() };
        fixed.xsave.region.as_mut_bytes().copy_from_slice(region);
        for (to, from) in xsave.as_mut_slice().as_mut_bytes().iter_mut().zip(extra) {
            *to = *from;
        }
        Ok(xsave)
    }
}

fn is_deadline(entry: &kvm_msr_entry) -> bool {
    entry.index == msrs::TSC_DEADLINE
}

pub(super) fn failed(
    vcpu: u16,
    ioctl: &'static str,
) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Vcpu {
        vcpu,
        ioctl,
        source,
    }
}

/// What the vCPU's CPUID instruction answers.
pub(super) fn get_cpuid(fd: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?;
    let mut entries = cpuid.as_slice().to_vec();
    // KVM before Linux 6.8 does not say how many there are. No real one is all zero: leaf 0 is not.
    while entries
        .pop_if(|last| last.as_bytes().iter().all(|b| *b == 0))
        .is_some()
    {}
    Ok(entries)
}

/// An empty extended state of this many bytes, rounded up to four.
fn new_xsave(size: usize) -> Option<Xsave> {
    Xsave::new(size.saturating_sub(XSAVE_SIZE).div_ceil(4)).ok()
}

fn get_xsave(fd: &VcpuFd, index: u16, context: &Context) -> Result<Vec<u8>, StateError> {
    if context.xsave2_size == 0 {
        let xsave = fd.get_xsave().map_err(failed(index, "KVM_GET_XSAVE"))?;
        return Ok(xsave.region.as_bytes().to_vec());
    }
    let wanted = context.xsave2_size.max(XSAVE_SIZE);
    let mut xsave = new_xsave(wanted).ok_or(StateError::Xsave {
        vcpu: index,
        found: 0,
        wanted,
    })?;
    // SAFETY: `xsave` has as many bytes as `KVM_CAP_XSAVE2` says that KVM writes.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(failed(index, "KVM_GET_XSAVE2"))?;
    let fixed = xsave.as_fam_struct_ref().xsave.region.as_bytes();
    let mut bytes = [fixed, xsave.as_slice().as_bytes()].concat();
    bytes.truncate(wanted);
    Ok(bytes)
}

/// The time stamp counter, and all other MSRs.
fn save_msrs(
    fd: &VcpuFd,
    index: u16,
    context: &Context,
) -> Result<(Tsc, Vec<kvm_msr_entry>), StateError> {
    let khz = if context.get_tsc_khz {
        fd.get_tsc_khz().map_err(failed(index, "KVM_GET_TSC_KHZ"))?
    } else {
        0
    };
    let before = tsc::read();
    let mut msrs = context.msrs.read(fd, index)?;
    let after = tsc::read();
    let value = msrs.iter().find(|e| e.index == msrs::TSC);
    let value = value.map_or(0, |entry| entry.data);
    msrs.retain(|e| e.index != msrs::TSC);
    // A counter that KVM scales has a distance from another one than the host's.
    let is_unscaled = |offset: &u64| (before..=after).contains(&value.wrapping_sub(*offset));
    let offset = tsc::offset(fd).filter(is_unscaled);
    Ok((Tsc { khz, value, offset }, msrs))
}
