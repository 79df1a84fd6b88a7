use kvm_bindings::kvm_cpuid_entry2;

use super::fixtures::{AMD, INTEL, entries};
use super::*;

fn capabilities(tsc_deadline_timer: bool) -> Capabilities {
    Capabilities {
        recommended_vcpus: 4,
        max_vcpus: 254,
        max_vcpu_id: 255,
        memory_slots: 32,
        split_irqchip: true,
        x2apic_api: true,
        tsc_deadline_timer,
        tsc_control: true,
        get_tsc_khz: true,
        sync_regs: 7,
        dirty_ring: 0,
        manual_dirty_log: false,
        xcrs: true,
        xsave2_size: 0,
        nested_state: false,
        kvmclock_ctrl: true,
        user_space_msr: true,
        coalesced_pio: true,
        irqfd_resample: true,
        readonly_memory: true,
        guest_memfd: false,
    }
}

fn template(supported: &[kvm_cpuid_entry2], topology: Topology) -> CpuidTemplate {
    CpuidTemplate::from_supported(supported, &topology, &capabilities(true), Some(2_596_124))
        .unwrap()
}

/// A vCPU's leaf as EAX, EBX, ECX, EDX; zeros where there is none, as KVM answers.
fn leaf(template: &CpuidTemplate, vcpu: u16, function: u32, index: u32) -> [u32; 4] {
    let cpuid = template.for_vcpu(vcpu).unwrap();
    let mut found = cpuid
        .as_slice()
        .iter()
        .filter(|e| (e.function, e.index) == (function, index));
    let entry = found.next().copied().unwrap_or_default();
    assert!(found.next().is_none(), "leaf {function:#x} is there twice");
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

/// Intel's leaf 4 and AMD's 0x8000001d: ids that share the cache of this sub-leaf.
fn sharing(template: &CpuidTemplate, function: u32, index: u32) -> u32 {
    (leaf(template, 0, function, index)[0] >> 14 & 0xfff) + 1
}

const FLAT_1: [u16; 5] = [1, 1, 1, 1, 1];
const FLAT_4: [u16; 5] = [4, 1, 4, 1, 1];
const THREADS: [u16; 5] = [4, 2, 2, 1, 1];
const FLAT_64: [u16; 5] = [64, 1, 64, 1, 1];
const DIES: [u16; 5] = [24, 2, 3, 2, 2];

fn topology([vcpus, threads, cores, dies, sockets]: [u16; 5]) -> Topology {
    Topology::new(vcpus, threads, cores, dies, sockets).unwrap()
}

#[test]
fn every_vcpu_has_its_apic_id_everywhere() {
    for (rows, shape) in [AMD, INTEL]
        .into_iter()
        .flat_map(|rows| [FLAT_1, FLAT_4, THREADS, FLAT_64, DIES].map(|shape| (rows, shape)))
    {
        let topology = topology(shape);
        let template = template(&entries(rows), topology);
        for vcpu in 0..topology.vcpus() {
            let id = topology.apic_id(vcpu);
            assert_eq!(leaf(&template, vcpu, 1, 0)[1] >> 24, id);
            assert_eq!(leaf(&template, vcpu, 0xb, 0)[3], id);
            assert_eq!(leaf(&template, vcpu, 0xb, 1)[3], id);
            if rows == AMD {
                assert_eq!(leaf(&template, vcpu, 0x8000_001e, 0)[0], id);
            }
        }
    }
}

#[test]
fn features_of_one_and_of_several() {
    for rows in [AMD, INTEL] {
        let one = leaf(&template(&entries(rows), topology(FLAT_1)), 0, 1, 0);
        assert_eq!(one[1], 1 << 16 | 8 << 8, "one processor, lines of 64 bytes");
        assert_eq!(one[3] >> 28 & 1, 0, "HTT");
        let many = leaf(&template(&entries(rows), topology(FLAT_64)), 63, 1, 0);
        assert_eq!(many[1], 63 << 24 | 64 << 16 | 8 << 8);
        assert_eq!(many[3] >> 28 & 1, 1, "HTT");
        for (bit, set) in [(3, 0), (21, 1), (24, 1), (27, 0), (31, 1)] {
            assert_eq!(many[2] >> bit & 1, set, "ECX bit {bit}");
        }
        assert_eq!(
            leaf(&template(&entries(rows), topology(FLAT_64)), 0, 5, 0),
            [0; 4]
        );
    }
}

#[test]
fn the_deadline_timer_follows_the_host() {
    for has in [false, true] {
        let template = CpuidTemplate::from_supported(
            &entries(AMD),
            &topology(FLAT_1),
            &capabilities(has),
            None,
        );
        assert_eq!(
            leaf(&template.unwrap(), 0, 1, 0)[2] >> 24 & 1,
            u32::from(has)
        );
    }
}

#[test]
fn extended_topology() {
    let case = |shape, leaf_number, index| {
        let [eax, ebx, ecx, _] = leaf(
            &template(&entries(INTEL), topology(shape)),
            0,
            leaf_number,
            index,
        );
        [eax, ebx, ecx]
    };
    assert_eq!(case(FLAT_1, 0xb, 0), [0, 1, 0x100]);
    assert_eq!(case(FLAT_1, 0xb, 1), [0, 1, 0x201]);
    assert_eq!(case(FLAT_4, 0xb, 0), [0, 1, 0x100]);
    assert_eq!(case(FLAT_4, 0xb, 1), [2, 4, 0x201]);
    assert_eq!(case(THREADS, 0xb, 0), [1, 2, 0x100]);
    assert_eq!(case(THREADS, 0xb, 1), [2, 4, 0x201]);
    assert_eq!(case(FLAT_64, 0xb, 1), [6, 64, 0x201]);
    assert_eq!(case(FLAT_64, 0xb, 2), [0; 3]);
    assert_eq!(case(FLAT_64, 0x1f, 0), [0; 3], "beyond the highest leaf");
    assert_eq!(case(DIES, 0x1f, 0), [1, 2, 0x100]);
    assert_eq!(case(DIES, 0x1f, 1), [3, 6, 0x201]);
    assert_eq!(case(DIES, 0x1f, 2), [4, 12, 0x502]);
    assert_eq!(case(DIES, 0xb, 1), [4, 12, 0x201]);
}

#[test]
fn dies_raise_intels_highest_leaf_only_when_there_are_several() {
    assert_eq!(
        leaf(&template(&entries(INTEL), topology(DIES)), 0, 0, 0)[0],
        0x1f
    );
    assert_eq!(
        leaf(&template(&entries(INTEL), topology(THREADS)), 0, 0, 0)[0],
        0x16
    );
    assert_eq!(
        leaf(&template(&entries(AMD), topology(DIES)), 0, 0, 0)[0],
        0x1c
    );
}

#[test]
fn sub_leaves_are_marked_as_such() {
    let template = template(&entries(INTEL), topology(DIES));
    for entry in template.for_vcpu(0).unwrap().as_slice() {
        let indexed = matches!(entry.function, 0x4 | 0xb | 0x1f);
        assert_eq!(
            entry.flags,
            if indexed {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            }
        );
    }
}

#[test]
fn intel_caches() {
    let shared = |shape| {
        let template = template(&entries(INTEL), topology(shape));
        (
            [0, 1, 2, 3].map(|index| sharing(&template, 4, index)),
            leaf(&template, 0, 4, 3)[0] >> 26,
        )
    };
    assert_eq!(shared(FLAT_1), ([1, 1, 1, 1], 0));
    assert_eq!(shared(FLAT_4), ([1, 1, 1, 4], 3));
    assert_eq!(shared(THREADS), ([2, 2, 2, 4], 1));
    assert_eq!(shared(FLAT_64), ([1, 1, 1, 64], 63));
    assert_eq!(shared(DIES), ([2, 2, 2, 8], 7));
    // Size and type are the host's.
    let template = template(&entries(INTEL), topology(FLAT_4));
    assert_eq!(leaf(&template, 0, 4, 2)[1..], [0x03c0_003f, 0x0000_03ff, 0]);
    assert_eq!(leaf(&template, 0, 4, 2)[0] & 0x3fff, 0x0143);
}

#[test]
fn amd_caches() {
    let shared = |shape| {
        let template = template(&entries(AMD), topology(shape));
        assert_eq!(
            leaf(&template, 0, 0x8000_001d, 3)[0] >> 26,
            0,
            "reserved on AMD"
        );
        [0, 1, 2, 3].map(|index| sharing(&template, 0x8000_001d, index))
    };
    assert_eq!(shared(FLAT_1), [1, 1, 1, 1]);
    assert_eq!(shared(FLAT_4), [1, 1, 1, 4]);
    assert_eq!(shared(THREADS), [2, 2, 2, 4]);
    assert_eq!(shared(DIES), [2, 2, 2, 8]);
}

#[test]
fn amd_counts_and_nodes() {
    let one = template(&entries(AMD), topology(FLAT_1));
    assert_eq!(leaf(&one, 0, 0x8000_0008, 0)[2] & 0xf0ff, 0);
    assert_eq!(leaf(&one, 0, 0x8000_0001, 0)[2] & 2, 0, "CmpLegacy");
    assert_eq!(leaf(&one, 0, 0x8000_001e, 0), [0; 4]);

    let threads = template(&entries(AMD), topology(THREADS));
    assert_eq!(leaf(&threads, 0, 0x8000_0008, 0)[2], 2 << 12 | 3);
    assert_eq!(leaf(&threads, 0, 0x8000_0001, 0)[2] & 2, 2, "CmpLegacy");
    assert_eq!(leaf(&threads, 3, 0x8000_001e, 0), [3, 1 << 8 | 1, 0, 0]);

    // The last of 2 sockets × 2 dies × 3 cores × 2 threads: die 1, core 2, thread 1.
    let dies = template(&entries(AMD), topology(DIES));
    assert_eq!(
        leaf(&dies, 23, 0x8000_001e, 0),
        [0b1_1101, 1 << 8 | 0b110, 1 << 8 | 3, 0]
    );
}

#[test]
fn intel_has_no_leaf_of_amd() {
    let template = template(&entries(INTEL), topology(THREADS));
    assert_eq!(leaf(&template, 0, 0x8000_001e, 0), [0; 4]);
    assert_eq!(
        leaf(&template, 0, 0x8000_0008, 0),
        [0x302e, 0x0100_d000, 0, 0]
    );
}

#[test]
fn the_hypervisor_is_kvm_and_tells_its_clocks() {
    for rows in [AMD, INTEL] {
        let template = template(&entries(rows), topology(FLAT_1));
        let [last, ebx, ecx, edx] = leaf(&template, 0, 0x4000_0000, 0);
        assert_eq!(last, 0x4000_0010);
        assert_eq!(
            [ebx, ecx, edx].map(u32::to_le_bytes).concat(),
            b"KVMKVMKVM\0\0\0"
        );
        assert_ne!(leaf(&template, 0, 0x4000_0001, 0)[0], 0);
        assert_eq!(
            leaf(&template, 0, 0x4000_0010, 0),
            [2_596_124, 1_000_000, 0, 0]
        );
        for clocks in [0x15, 0x16] {
            assert_eq!(leaf(&template, 0, clocks, 0), [0; 4], "the host's clocks");
        }
    }
}

#[test]
fn clocks_can_be_told_later_and_not_when_the_tsc_varies() {
    let mut template =
        CpuidTemplate::from_supported(&entries(AMD), &topology(FLAT_1), &capabilities(true), None)
            .unwrap();
    assert_eq!(leaf(&template, 0, 0x4000_0010, 0), [0; 4]);
    assert_eq!(leaf(&template, 0, 0x4000_0000, 0)[0], 0x4000_0001);
    template.set_tsc_khz(1);
    template.set_tsc_khz(3_000_000);
    assert_eq!(leaf(&template, 0, 0x4000_0010, 0)[0], 3_000_000);

    let varying: Vec<_> = entries(AMD)
        .into_iter()
        .filter(|e| e.function != 0x8000_0007)
        .collect();
    let template = super::tests::template(&varying, topology(FLAT_1));
    assert_eq!(leaf(&template, 0, 0x4000_0010, 0), [0; 4]);
    assert_eq!(leaf(&template, 0, 0x4000_0000, 0)[0], 0x4000_0001);
}

#[test]
fn zero_leaves_are_left_out() {
    let template = template(&entries(AMD), topology(FLAT_4));
    let cpuid = template.for_vcpu(1).unwrap();
    assert!(
        cpuid
            .as_slice()
            .iter()
            .all(|e| e.eax | e.ebx | e.ecx | e.edx != 0)
    );
    assert!(cpuid.as_slice().len() < AMD.len());
}

#[test]
fn a_host_without_the_first_leaves_is_refused() {
    let result = CpuidTemplate::from_supported(&[], &topology(FLAT_1), &capabilities(true), None);
    assert!(matches!(result, Err(CpuidError::NoLeaf { leaf: 0 })));
    let too_many = vec![entries(AMD); 20].concat();
    let result =
        CpuidTemplate::from_supported(&too_many, &topology(FLAT_1), &capabilities(true), None);
    assert!(matches!(result, Err(CpuidError::TooMany { .. })));
}

#[test]
fn a_template_changes_what_is_there() {
    use crate::cpu_template::Bits;
    let mut leaves = Leaves(entries(AMD));
    let before = *leaves.get(7, 0).unwrap();
    let bits = |mask, value| vec![Bits { mask, value }];
    let mut change = CpuidChange {
        leaf: 7,
        subleaf: 0,
        flags: 0,
        registers: [
            bits(0, 0),
            // Two changes of one register, of which one is wider than it.
            [bits(1 << 1 | 1 << 40, 1 << 40), bits(0b1001, 0b1000)].concat(),
            bits(u32::MAX.into(), 0),
            Vec::new(),
        ],
    };
    apply(&mut leaves, &change).unwrap();
    let after = leaves.get(7, 0).unwrap();
    assert_eq!(after.eax, before.eax);
    assert_eq!(after.ebx, before.ebx & !0b1011 | 0b1000);
    assert_eq!((after.ecx, after.edx, after.flags), (0, before.edx, 0));
    change.leaf = 0x1234;
    let error = apply(&mut leaves, &change).unwrap_err().to_string();
    assert_eq!(
        error,
        "Template changes a CPUID entry not supported by KVM: Leaf: 1234, Subleaf: 0"
    );
}
