//! A vCPU's registers and instruction bytes as text, for a person who reads a crash report.
//!
//! [`VcpuReport::collect`] runs on the vCPU's own thread after its guest has stopped for good. The
//! guest may have left anything in its registers and page tables: nothing here fails for it, the
//! report only becomes shorter.

mod paging;

use std::fmt;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

pub use paging::{WalkError, translate};

/// Longest x86 instruction in bytes.
pub const MAX_INSTRUCTION_SIZE: usize = 15;

/// The registers of a vCPU cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// General registers.
    #[error("cannot read the vCPU's registers (KVM_GET_REGS)")]
    Regs(#[source] kvm_ioctls::Error),
    /// Segment and control registers.
    #[error("cannot read the vCPU's system registers (KVM_GET_SREGS)")]
    Sregs(#[source] kvm_ioctls::Error),
}

/// What a vCPU was at when it stopped. Its text has eight lines without an end of line at the end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VcpuReport {
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
}

impl VcpuReport {
    /// Read a vCPU's registers.
    ///
    /// # Errors
    /// [`ReportError`] when KVM does not give them.
    pub fn collect(vcpu: &VcpuFd) -> Result<Self, ReportError> {
        let regs = vcpu.get_regs().map_err(ReportError::Regs)?;
        let sregs = vcpu.get_sregs().map_err(ReportError::Sregs)?;
        Ok(Self { regs, sregs })
    }

    /// Linear address of the next instruction: RIP in 64-bit mode, else CS base and EIP.
    #[must_use]
    pub fn linear_rip(&self) -> u64 {
        if self.is_64_bit() {
            self.regs.rip
        } else {
            self.sregs.cs.base.wrapping_add(self.regs.rip) & u64::from(u32::MAX)
        }
    }

    /// The bytes at RIP: up to [`MAX_INSTRUCTION_SIZE`], fewer where a page is not mapped, none if RIP
    /// points to no memory.
    #[must_use]
    pub fn instruction_bytes<M: Bytes<GuestAddress>>(&self, mem: &M) -> Vec<u8> {
        let start = self.linear_rip();
        let byte = |offset: u64| {
            let address = translate(mem, &self.sregs, start.wrapping_add(offset)).ok()?;
            mem.read_obj::<u8>(address).ok()
        };
        (0..MAX_INSTRUCTION_SIZE as u64).map_while(byte).collect()
    }

    fn is_64_bit(&self) -> bool {
        self.sregs.efer & paging::EFER_LMA != 0 && self.sregs.cs.l != 0
    }

    fn mode(&self) -> &'static str {
        match (
            self.is_64_bit(),
            self.sregs.cr0 & paging::CR0_PE != 0,
            self.sregs.cs.db != 0,
        ) {
            (true, ..) => "64-bit",
            (_, false, _) => "real mode",
            (_, _, true) => "32-bit",
            _ => "16-bit",
        }
    }
}

impl fmt::Display for VcpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.regs, &self.sregs);
        let general = [
            [
                ("RAX", r.rax),
                ("RBX", r.rbx),
                ("RCX", r.rcx),
                ("RDX", r.rdx),
            ],
            [
                ("RSI", r.rsi),
                ("RDI", r.rdi),
                ("RBP", r.rbp),
                ("RSP", r.rsp),
            ],
            [("R8 ", r.r8), ("R9 ", r.r9), ("R10", r.r10), ("R11", r.r11)],
            [
                ("R12", r.r12),
                ("R13", r.r13),
                ("R14", r.r14),
                ("R15", r.r15),
            ],
        ];
        for row in general {
            let [a, b, c, d] = row.map(Named);
            writeln!(f, "{a} {b} {c} {d}")?;
        }
        let [rip, flags] = [("RIP", r.rip), ("RFL", r.rflags)].map(Named);
        writeln!(f, "{rip} {flags} {} cpl {}", self.mode(), s.ss.dpl)?;
        let [cr0, cr2, cr3, cr4] = [
            ("CR0", s.cr0),
            ("CR2", s.cr2),
            ("CR3", s.cr3),
            ("CR4", s.cr4),
        ]
        .map(Named);
        writeln!(f, "{cr0} {cr2} {cr3} {cr4}")?;
        let segments = [
            ("CS", &s.cs),
            ("SS", &s.ss),
            ("DS", &s.ds),
            ("FS", &s.fs),
            ("GS", &s.gs),
        ];
        for (name, segment) in segments {
            write!(f, "{} ", Segment(name, segment))?;
        }
        writeln!(f, "{}", Segment("TR", &s.tr))?;
        write!(
            f,
            "{} {} {} APIC {:x}",
            Named(("EFER", s.efer)),
            Table("GDT", &s.gdt),
            Table("IDT", &s.idt),
            s.apic_base
        )
    }
}

struct Named((&'static str, u64));

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, value) = self.0;
        write!(f, "{name} {value:016x}")
    }
}

struct Segment<'a>(&'static str, &'a kvm_segment);

impl fmt::Display for Segment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:04x}@{:x}", self.0, self.1.selector, self.1.base)
    }
}

struct Table<'a>(&'static str, &'a kvm_dtable);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:x}+{:x}", self.0, self.1.base, self.1.limit)
    }
}

#[cfg(test)]
mod tests;
