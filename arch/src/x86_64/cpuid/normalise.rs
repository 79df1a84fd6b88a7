//! From what the host's KVM supports to what a guest of bulle sees, leaf by leaf.
//!
//! Sources: Intel SDM volume 2 (CPUID), AMD APM volume 3 appendix E, and
//! linux/Documentation/virt/kvm/x86/cpuid.rst for the hypervisor's leaves. Leaves not named here
//! are as KVM reports them.

use super::{Entry, Leaves};
use crate::topology::Topology;

/// Local APIC bus frequency in kHz that KVM emulates (`APIC_BUS_CYCLE_NS` is 1).
const APIC_BUS_KHZ: u32 = 1_000_000;
/// First of the hypervisor's leaves: its signature and its highest leaf.
const HYPERVISOR: u32 = 0x4000_0000;
/// Timing leaf, as defined by VMware and taken over for KVM.
const TIMING: u32 = 0x4000_0010;

/// Leaves that a guest must not see.
const REMOVED: &[u32] = &[
    // MONITOR/MWAIT, which bulle does not let guests use.
    0x5,
    // TSC and crystal clock ratio, and processor frequencies. They would describe the host's clocks,
    // and cannot tell the truth: the APIC timer's clock has to be the crystal, and KVM's 1 GHz with a
    // ratio exact to 1 kHz overflows Linux's 32-bit arithmetic. Guests have leaf 0x4000_0010.
    0x15,
    0x16,
    // AMD's extended topology: the host's.
    0x8000_0026,
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Amd,
    Intel,
}

/// `value` with the bits `mask << shift` set to `field`.
fn with_field(value: u32, shift: u32, mask: u32, field: u32) -> u32 {
    value & !(mask << shift) | (field & mask) << shift
}

fn with_bit(value: u32, bit: u32, set: bool) -> u32 {
    with_field(value, bit, 1, u32::from(set))
}

/// AMD and Hygon share a layout, so do Intel and Zhaoxin.
fn vendor(leaves: &Leaves) -> Vendor {
    match leaves.get(0, 0).map(|e| {
        (
            e.ebx.to_le_bytes(),
            e.edx.to_le_bytes(),
            e.ecx.to_le_bytes(),
        )
    }) {
        Some((a, b, c)) if matches!(&[a, b, c].concat()[..], b"AuthenticAMD" | b"HygonGenuine") => {
            Vendor::Amd
        }
        _ => Vendor::Intel,
    }
}

/// Everything that is the same for all vCPUs.
pub(super) fn all(leaves: &mut Leaves, topology: &Topology, tsc_deadline: bool) {
    let vendor = vendor(leaves);
    for leaf in REMOVED {
        leaves.remove(*leaf);
    }
    let last = last_leaf(leaves, topology, vendor);
    features(leaves, topology, tsc_deadline);
    caches(leaves, topology);
    extended_topology(leaves, topology, last);
    if vendor == Vendor::Amd {
        amd(leaves, topology);
    }
}

/// Raise the highest basic leaf so that the topology leaves are in reach; the result is that leaf.
fn last_leaf(leaves: &mut Leaves, topology: &Topology, vendor: Vendor) -> u32 {
    let needed = if vendor == Vendor::Intel && topology.dies_per_socket() > 1 {
        0x1f
    } else {
        0xb
    };
    leaves.get_mut(0, 0).map_or(0, |leaf| {
        leaf.eax = leaf.eax.max(needed);
        leaf.eax
    })
}

/// Leaf 1: processor features.
fn features(leaves: &mut Leaves, topology: &Topology, tsc_deadline: bool) {
    const CLFLUSH: u32 = 1 << 19;
    let Some(leaf) = leaves.get_mut(1, 0) else {
        return;
    };
    if leaf.edx & CLFLUSH != 0 {
        // Cache lines of 64 bytes, in units of 8.
        leaf.ebx = with_field(leaf.ebx, 8, 0xff, 8);
    }
    let ids = (1u32 << topology.socket_shift()).min(0xff);
    leaf.ebx = with_field(leaf.ebx, 16, 0xff, ids);
    for (bit, set) in [
        (3, false), // MONITOR
        (21, true), // x2APIC: KVM's local APIC has it on every host
        (24, tsc_deadline),
        (27, false), // OSXSAVE: KVM sets it when the guest sets CR4
        (31, true),  // running under a hypervisor
    ] {
        leaf.ecx = with_bit(leaf.ecx, bit, set);
    }
    // HTT: the count of logical processors in EBX is valid.
    leaf.edx = with_bit(leaf.edx, 28, topology.per_socket() > 1);
}

/// Leaf 4 (Intel) and 0x8000_001d (AMD): which processors share a cache. A first or second level
/// belongs to a core, the third to a die.
fn caches(leaves: &mut Leaves, topology: &Topology) {
    const THIRD_LEVEL: u32 = 3;
    let cores = (1u32 << (topology.socket_shift() - topology.core_shift())) - 1;
    for function in [0x4, 0x8000_001d] {
        // Cache type 0 ends the list and has no other field.
        for leaf in leaves.all_mut(function).filter(|leaf| leaf.eax & 0x1f != 0) {
            let level = leaf.eax >> 5 & 7;
            let shift = if level < THIRD_LEVEL {
                topology.core_shift()
            } else {
                topology.die_shift()
            };
            leaf.eax = with_field(leaf.eax, 14, 0xfff, (1 << shift) - 1);
            if function == 0x4 {
                leaf.eax = with_field(leaf.eax, 26, 0x3f, cores.min(0x3f));
            }
        }
    }
}

/// Leaves 0xb and 0x1f: the levels of the topology; [`number`] writes the x2APIC id.
fn extended_topology(leaves: &mut Leaves, topology: &Topology, last: u32) {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    const DIE: u32 = 5 << 8;
    let count = u32::from;
    let thread = [
        topology.core_shift(),
        count(topology.threads_per_core()),
        THREAD,
        0,
    ];
    let core = [
        topology.socket_shift(),
        count(topology.per_socket()),
        CORE | 1,
        0,
    ];
    leaves.replace(0xb, true, &[thread, core]);
    leaves.remove(0x1f);
    if last >= 0x1f {
        let core = [topology.die_shift(), count(topology.per_die()), CORE | 1, 0];
        let die = [
            topology.socket_shift(),
            count(topology.per_socket()),
            DIE | 2,
            0,
        ];
        leaves.replace(0x1f, true, &[thread, core, die]);
    }
}

/// AMD's own topology leaves.
fn amd(leaves: &mut Leaves, topology: &Topology) {
    const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
    let per_socket = u32::from(topology.per_socket());
    let mut has_extensions = false;
    if let Some(leaf) = leaves.get_mut(0x8000_0001, 0) {
        // CmpLegacy: the count in leaf 1 is of cores.
        leaf.ecx = with_bit(leaf.ecx, 1, per_socket > 1);
        has_extensions = leaf.ecx & TOPOLOGY_EXTENSIONS != 0;
    }
    if let Some(leaf) = leaves.get_mut(0x8000_0008, 0) {
        leaf.ecx = with_field(leaf.ecx, 0, 0xff, per_socket - 1);
        leaf.ecx = with_field(leaf.ecx, 12, 0xf, topology.socket_shift());
    }
    leaves.remove(0x8000_001e);
    if has_extensions {
        let threads = u32::from(topology.threads_per_core()) - 1;
        // The field has three bits; more nodes than eight cannot be told here.
        let nodes = (u32::from(topology.dies_per_socket()) - 1).min(7);
        leaves.replace(0x8000_001e, false, &[[0, threads << 8, nodes << 8, 0]]);
    }
}

/// The hypervisor's timing leaf: TSC and APIC bus frequency in kHz, when the TSC is invariant.
pub(super) fn timing(leaves: &mut Leaves, tsc_khz: u32) {
    const INVARIANT_TSC: u32 = 1 << 8;
    leaves.remove(TIMING);
    let invariant = leaves
        .get(0x8000_0007, 0)
        .is_some_and(|e| e.edx & INVARIANT_TSC != 0);
    if !invariant || tsc_khz == 0 {
        return;
    }
    if let Some(signature) = leaves.get_mut(HYPERVISOR, 0) {
        signature.eax = signature.eax.max(TIMING);
        leaves.replace(TIMING, false, &[[tsc_khz, APIC_BUS_KHZ, 0, 0]]);
    }
}

/// Write what differs between vCPUs into one entry.
pub(super) fn number(entry: &mut Entry, topology: &Topology, index: u16) {
    let apic_id = topology.apic_id(index);
    match entry.function {
        0x1 => entry.ebx = with_field(entry.ebx, 24, 0xff, apic_id),
        0xb | 0x1f => entry.edx = apic_id,
        0x8000_001e => {
            let in_socket = apic_id & ((1 << topology.socket_shift()) - 1);
            let node = u32::from(index / topology.per_die());
            entry.eax = apic_id;
            entry.ebx = with_field(entry.ebx, 0, 0xff, in_socket >> topology.core_shift());
            entry.ecx = with_field(entry.ecx, 0, 0xff, node);
        }
        _ => {}
    }
}
