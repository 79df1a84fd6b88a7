// The ELF note by which a loader finds the 32-bit entry point (XEN_ELFNOTE_PHYS32_ENTRY = 18).
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start
