// From the PVH entry (32-bit protected mode, no paging, ebx = start_info) to Rust in 64-bit mode at
// privilege level 3 with I/O privilege level 3.
//
// Level 3, since a KVM without hardware virtualisation interprets level 0 instruction by instruction
// and knows no SSE there, while this level runs natively. All of the low 4 GiB is mapped one to one
// with user access, so ports, MMIO and page tables are in reach all the same.

.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
    cld
    mov cr4_bits, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx           // EFER: long mode, syscall
    xor %edx, %edx
    mov $0x101, %eax
    wrmsr
    mov $0x80000033, %eax           // CR0: paging, numeric errors, co-processor, protection
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $1f
.code64
1:  mov $0x10, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $stack_top, %rsp
    movw $104, tss + 102
    mov $tss, %eax
    mov %ax, gdt_tss + 2
    shr $16, %eax
    mov %al, gdt_tss + 4
    mov %ah, gdt_tss + 7
    mov $0x30, %eax
    ltr %ax
    mov %ebx, %ebp
    mov $boot_cpuid, %edi
2:  mov (%rdi), %eax
    mov 4(%rdi), %ecx
    cpuid
    mov %eax, 8(%rdi)
    mov %ebx, 12(%rdi)
    mov %ecx, 16(%rdi)
    mov %edx, 20(%rdi)
    add $24, %edi
    cmp $boot_cpuid_end, %edi
    jb 2b
    mov boot_cpuid + 24 + 16, %eax  // leaf 1, ECX
    and $0x14000000, %eax           // AVX and XSAVE
    cmp $0x14000000, %eax
    jne 3f
    mov %cr4, %rax
    or $0x40000, %eax               // OSXSAVE
    mov %rax, %cr4
    xor %ecx, %ecx
    xor %edx, %edx
    mov $7, %eax                    // x87, SSE, AVX
    xsetbv
    mov %eax, boot_xcr0
3:  mov %ebp, %edi
    pushq $0x23
    pushq $stack_top - 8
    pushq $0x3002                   // RFLAGS: I/O privilege level 3
    pushq $0x2b
    pushq $payload_main
    iretq

.section .data, "aw"
cr4_bits:
    .long 0x620                     // physical address extension, FXSR, SIMD exceptions
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        // 0x08 kernel code
    .quad 0x00cf93000000ffff        // 0x10 kernel data
    .quad 0x00cffb000000ffff        // 0x18 user code, 32-bit
    .quad 0x00cff3000000ffff        // 0x20 user data
    .quad 0x00affb000000ffff        // 0x28 user code, 64-bit
gdt_tss:                            // 0x30 task state with an I/O map; the base is filled in
    .word 104 + 8192, 0, 0x8900, 0
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.global boot_cpuid
boot_cpuid:                         // leaf, level; then EAX, EBX, ECX, EDX
    .irp leaf, 0, 1, 0x40000000
    .long \leaf, 0, 0, 0, 0, 0
    .endr
    .long 0xb, 0, 0, 0, 0, 0
    .long 0xb, 1, 0, 0, 0, 0
boot_cpuid_end:
.global boot_xcr0
boot_xcr0:                          // XCR0, where it was set
    .long 0
    .balign 4096
.global pml4
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0
pdpt:                               // 4 GiB in pages of 2 MiB; `memory::map` adds what lies above
    .quad pd + 0x0027, pd + 0x1027, pd + 0x2027, pd + 0x3027
    .fill 508, 8, 0
pd:                                 // present, writable, user, accessed, dirty, large
    .set page, 0
    .rept 2048
    .quad page + 0xe7
    .set page, page + 0x200000
    .endr

.section .bss, "aw", @nobits
    .balign 16
    .skip 32768
stack_top:
tss:                                // the I/O map of zeros allows every port, since the privilege level
    .skip 104 + 8192 + 1            // in RFLAGS may not survive on a KVM without hardware support
.section .text, "ax"
