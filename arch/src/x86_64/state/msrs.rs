//! Which MSRs are saved, and how they are read and written in few calls.
//!
//! `KVM_GET_MSR_INDEX_LIST` does not name the memory type range registers and the machine check
//! banks, so they are added. Registers that a host lists and then refuses are dropped once.

use std::sync::Mutex;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::StateError;

/// Registers that state may have; hosts have about two hundred.
pub(super) const MAX_MSRS: usize = 1024;
pub(super) const TSC: u32 = 0x10;
/// Written behind the local APIC, whose timer mode decides whether KVM takes it, and behind the TSC.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// Registers that are not saved.
const EXCLUDED: &[u32] = &[
    // KVM writes the wall clock to guest memory when a guest sets one of these, and has no other use
    // for the value. At a restore it would write where the guest may have something else by now.
    0x11,        // MSR_KVM_WALL_CLOCK
    0x4b56_4d00, // MSR_KVM_WALL_CLOCK_NEW
];

/// First register, one behind the last.
type Range = (u32, u32);

/// Hyper-V's, which KVM lists on every host and which no guest of bulle is told of. Some tell the time.
const HYPER_V: Range = (0x4000_0000, 0x4000_0200);

/// Memory type range registers: eight variable ranges, the fixed ones, the default type.
const MTRRS: &[Range] = &[
    (0x200, 0x210),
    (0x250, 0x251),
    (0x258, 0x25a),
    (0x268, 0x270),
    (0x2ff, 0x300),
];
/// Machine check: the status, and 32 banks of four registers. Those that are 0, as after reset, are
/// left out.
const MACHINE_CHECK: &[Range] = &[(0x17a, 0x17b), (0x400, 0x480)];

fn is_in(ranges: &[Range], index: u32) -> bool {
    ranges
        .iter()
        .any(|&(first, end)| (first..end).contains(&index))
}

/// Entries are told apart from their reset value only where that is known to be 0.
fn is_reset(entry: &kvm_msr_entry) -> bool {
    entry.data == 0 && is_in(MACHINE_CHECK, entry.index)
}

/// The registers of a host.
#[derive(Debug)]
pub(super) struct MsrList {
    /// All that may be in a state, sorted.
    known: Vec<u32>,
    /// Those that can be read.
    readable: Mutex<Vec<u32>>,
}

impl MsrList {
    pub(super) fn new(listed: &[u32]) -> Self {
        let added = [MTRRS, MACHINE_CHECK].concat();
        let mut known: Vec<u32> = listed.to_vec();
        known.extend(added.into_iter().flat_map(|(first, end)| first..end));
        known.retain(|index| !EXCLUDED.contains(index) && !is_in(&[HYPER_V], *index));
        known.sort_unstable();
        known.dedup();
        Self {
            readable: Mutex::new(known.clone()),
            known,
        }
    }

    /// All values of a vCPU, the TSC deadline last.
    pub(super) fn read(&self, fd: &VcpuFd, vcpu: u16) -> Result<Vec<kvm_msr_entry>, StateError> {
        let wanted = self.readable().clone();
        let get = |msrs: &mut Msrs| {
            fd.get_msrs(msrs).map_err(|source| StateError::Vcpu {
                vcpu,
                ioctl: "KVM_GET_MSRS",
                source,
            })
        };
        let (mut values, refused) = read_all(&wanted, &get)?;
        if !refused.is_empty() {
            log::debug!(
                "not saved, since KVM lists and then refuses to read them: MSRs {refused:x?}"
            );
            self.readable().retain(|index| !refused.contains(index));
        }
        values.retain(|entry| !is_reset(entry));
        values.sort_by_key(|entry| (entry.index == TSC_DEADLINE, entry.index));
        Ok(values)
    }

    fn readable(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        // The list is whole after every statement that changes it.
        self.readable
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Refuse registers that this host does not save: no state from it has them.
    pub(super) fn check(&self, entries: &[kvm_msr_entry], vcpu: u16) -> Result<(), StateError> {
        if entries.len() > MAX_MSRS {
            return Err(StateError::TooMany {
                vcpu,
                what: "MSRs",
                count: entries.len(),
                most: MAX_MSRS,
            });
        }
        let unknown = |entry: &&kvm_msr_entry| self.known.binary_search(&entry.index).is_err();
        match entries.iter().find(unknown) {
            Some(entry) => Err(StateError::MsrUnknown {
                vcpu,
                index: entry.index,
            }),
            None => Ok(()),
        }
    }
}

/// Values of the registers that KVM lets be read, and the numbers of the others.
fn read_all(
    wanted: &[u32],
    get: &dyn Fn(&mut Msrs) -> Result<usize, StateError>,
) -> Result<(Vec<kvm_msr_entry>, Vec<u32>), StateError> {
    let (mut values, mut refused) = (Vec::with_capacity(wanted.len()), Vec::new());
    let mut rest = wanted;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .take(KVM_MAX_MSR_ENTRIES)
            .map(|&index| entry(index, 0))
            .collect();
        let mut msrs = batch(&entries)?;
        // KVM stops at the first register it refuses and returns how many it read.
        let read = get(&mut msrs)?.min(entries.len());
        values.extend(msrs.as_slice().iter().take(read));
        let mut next = read;
        if let Some(entry) = entries.get(read) {
            refused.push(entry.index);
            next += 1;
        }
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok((values, refused))
}

/// Write all of them, in their order.
pub(super) fn write(fd: &VcpuFd, entries: &[kvm_msr_entry], vcpu: u16) -> Result<(), StateError> {
    for entries in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let written = fd
            .set_msrs(&batch(entries)?)
            .map_err(|source| StateError::Vcpu {
                vcpu,
                ioctl: "KVM_SET_MSRS",
                source,
            })?;
        if let Some(entry) = entries.get(written) {
            return Err(StateError::MsrRefused {
                vcpu,
                index: entry.index,
                value: entry.data,
            });
        }
    }
    Ok(())
}

pub(super) fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    Ok(
        Msrs::from_entries(entries).map_err(|_| crate::msr::MsrError::TooMany {
            count: entries.len(),
        })?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads from a KVM that refuses some registers and has their numbers as values.
    fn read(wanted: &[u32], refused: &[u32]) -> (Vec<kvm_msr_entry>, Vec<u32>, usize) {
        let calls = std::cell::Cell::new(0);
        let get = |msrs: &mut Msrs| {
            calls.set(calls.get() + 1);
            let mut read = 0;
            for entry in msrs.as_mut_slice() {
                if refused.contains(&entry.index) {
                    break;
                }
                entry.data = entry.index.into();
                read += 1;
            }
            Ok(read)
        };
        let (values, dropped) = read_all(wanted, &get).unwrap();
        (values, dropped, calls.get())
    }

    #[test]
    fn refused_registers_are_dropped_wherever_they_are() {
        let wanted: Vec<u32> = (0..600).collect();
        let (values, dropped, calls) = read(&wanted, &[]);
        assert_eq!((values.len(), dropped.len(), calls), (600, 0, 3));
        let refused = [0, 255, 256, 300, 301, 599];
        let (values, dropped, _) = read(&wanted, &refused);
        assert_eq!(dropped, refused);
        assert_eq!(values.len(), 594);
        assert!(values.iter().all(|e| e.data == u64::from(e.index)));
        assert_eq!(read(&[], &[]).2, 0);
    }

    #[test]
    fn the_list_has_what_kvm_does_not_name_and_lacks_the_wall_clock() {
        let list = MsrList::new(&[0x4b56_4d00, TSC_DEADLINE, TSC, 0x11, 0x4000_0020]);
        for index in [TSC, TSC_DEADLINE, 0x200, 0x20f, 0x26f, 0x2ff, 0x400, 0x47f] {
            assert!(list.check(&[entry(index, 0)], 0).is_ok(), "{index:#x}");
        }
        for index in [0x11, 0x4b56_4d00, 0x4000_0020, 0x210, 0x480, 0xdead] {
            let error = list.check(&[entry(index, 0)], 3).unwrap_err();
            assert!(
                matches!(error, StateError::MsrUnknown { vcpu: 3, index: i } if i == index),
                "{error}"
            );
        }
        let many = vec![entry(TSC, 0); MAX_MSRS + 1];
        assert!(matches!(
            list.check(&many, 0),
            Err(StateError::TooMany { count: 1025, .. })
        ));
    }
}
