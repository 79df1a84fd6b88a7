//! Takes a hundred interrupts of the local APIC's periodic timer while halting, some 50 ms apart, and
//! prints a dot for each, then a line.
#![no_std]
#![no_main]

payloads::start32!(
    "mov $stack_top, %esp",
    "lgdt gdt_pointer",
    "ljmp $8, $1f",
    "1: mov $16, %eax",
    "mov %eax, %ss",
    "mov %eax, %ds",
    "mov $handler, %eax", // interrupt gate for vector 0x40
    "mov %ax, gate",
    "shr $16, %eax",
    "mov %ax, gate + 6",
    "lidt idt_pointer",
    "mov $0xfee00000, %edi",
    "movl $0x1ff, 0xf0(%edi)",    // enable, spurious vector
    "movl $0x20040, 0x320(%edi)", // periodic, vector 0x40
    "movl $0xb, 0x3e0(%edi)",     // divide by 1
    "movl $50000000, 0x380(%edi)",
    "2: sti",
    "hlt",
    "woken: cli",
    "putc '.'",
    "cmpl $100, ticks",
    "jb 2b",
    "println \"100 ticks\"",
    "write8 0xf4, 0",
    "hlt",
    "handler:",
    "incl ticks",
    "movl $0, 0xb0(%edi)", // end of interrupt
    "add $12, %esp",       // instead of iret, which a KVM that interprets this level may not know
    "jmp woken",
    ".section .data",
    ".balign 8",
    "gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff",
    "gdt_pointer: .word 23",
    ".long gdt",
    "idt: .fill 64, 8, 0",
    "gate: .word 0, 8, 0x8e00, 0",
    "idt_pointer: .word 65 * 8 - 1",
    ".long idt",
    "ticks: .long 0",
    ".fill 256, 4, 0",
    "stack_top:",
);
