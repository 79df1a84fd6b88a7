use kvm_bindings::kvm_cpuid_entry2;

use super::*;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn intel() -> Vec<kvm_cpuid_entry2> {
    let word = u32::from_le_bytes;
    vec![
        entry(0, 0, [7, word(*b"Genu"), word(*b"ntel"), word(*b"ineI")]),
        entry(1, 0, [0, 0, 1 << 12 | 1, 1]),
        entry(7, 0, [0, 1 << 5, 0, 0]),
    ]
}

/// A state with nothing but CPUID.
fn state(cpuid: Vec<kvm_cpuid_entry2>) -> VcpuState {
    VcpuState {
        index: 2,
        cpuid,
        tsc: Tsc {
            khz: 0,
            value: 0,
            offset: None,
        },
        mp_state: Default::default(),
        events: Default::default(),
        regs: Default::default(),
        sregs: Default::default(),
        xcrs: Default::default(),
        xsave: vec![0; 4096],
        debugregs: Default::default(),
        lapic: Default::default(),
        msrs: Vec::new(),
        nested: Vec::new(),
    }
}

#[test]
fn a_host_with_more_will_do_and_what_is_not_the_hosts_does_not_count() {
    let mut more = intel();
    more[1].ecx |= 1 << 25;
    let state = state(intel());
    assert!(state.check(&HostCpuid::from_entries(&more)).is_ok());
    let mut state = state;
    // OSXSAVE and the hypervisor bit; the number of processors.
    state.cpuid[1].ecx |= 1 << 27 | 1 << 31;
    state.cpuid[1].edx |= 1 << 28;
    state.cpuid[1].ebx = 0x0504_0000;
    assert!(state.check(&HostCpuid::from_entries(&intel())).is_ok());
}

#[test]
fn everything_that_a_host_lacks_is_named() {
    let mut less = intel();
    less[1].ecx = 1;
    less.pop();
    let mut state = state(intel());
    state.cpuid.push(entry(7, 1, [1 << 31, 0, 0, 0]));
    let error = state.check(&HostCpuid::from_entries(&less)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "this host lacks what the guest's processor has: fma (CPUID 0x1.0x0 ecx bit 12), avx2 (CPUID \
         0x7.0x0 ebx bit 5), (CPUID 0x7.0x1 eax bit 31)"
    );
}

#[test]
fn another_vendor_is_named() {
    let word = u32::from_le_bytes;
    let amd = [entry(
        0,
        0,
        [7, word(*b"Auth"), word(*b"cAMD"), word(*b"enti")],
    )];
    let error = state(intel()).check(&HostCpuid::from_entries(&amd));
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("GenuineIntel") && text.contains("AuthenticAMD"),
        "{text}"
    );
    let text = state(Vec::new()).check(&HostCpuid::from_entries(&amd));
    assert!(matches!(text, Err(StateError::Vendor { .. })));
}

#[test]
fn clocks_jump_or_stay() {
    let saved = VmState {
        clock: 5,
        realtime: 0,
        host_tsc: 0,
        chips: None,
    };
    let shift = saved.shift(ClockPolicy::Frozen);
    assert_eq!(shift.advance(), std::time::Duration::ZERO);
    assert_eq!(shift.tsc(7, 2_000_000), 7);
    // Since 1970.
    let shift = saved.shift(ClockPolicy::Advance);
    assert!(shift.advance().as_secs() > 1_700_000_000);
    assert_eq!(
        shift.tsc(7, 1_000_000),
        7 + shift.advance().as_nanos() as u64
    );
    let later = VmState {
        realtime: u64::MAX,
        ..saved
    };
    let shift = later.shift(ClockPolicy::Advance);
    assert_eq!(shift.advance(), std::time::Duration::ZERO);
}

#[test]
fn structures_of_another_size_are_refused() {
    let json = serde_json::to_value(state(intel())).unwrap();
    let parse = |json: &serde_json::Value| serde_json::from_value::<VcpuState>(json.clone());
    assert_eq!(parse(&json).unwrap(), state(intel()));
    for (field, wanted) in [("regs", "kvm_regs"), ("cpuid", "kvm_cpuid_entry2")] {
        for change in [
            |v: &mut Vec<_>| drop(v.pop()),
            |v: &mut Vec<_>| v.push(0.into()),
        ] {
            let mut json = json.clone();
            change(json[field].as_array_mut().unwrap());
            let text = parse(&json).unwrap_err().to_string();
            assert!(text.contains(wanted), "{text}");
        }
    }
    let mut long = json.clone();
    long["msrs"] = vec![0; 65536 + 16].into();
    let text = parse(&long).unwrap_err().to_string();
    assert!(text.contains("65536 allowed"), "{text}");
    let mut more = json.clone();
    more["more"] = 1.into();
    assert!(parse(&more).is_err());
}
