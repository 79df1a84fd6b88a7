// Helpers for 32-bit payloads.
.macro putc char
    mov $\char, %al
    mov $0x3f8, %dx
    out %al, %dx
.endm

.macro println string               // clobbers eax, edx, esi
    mov $8f, %esi
    mov $0x3f8, %dx
7:  lodsb
    test %al, %al
    jz 9f
    out %al, %dx
    jmp 7b
8:  .ascii "\string"
    .byte 10, 0
9:
.endm

.macro write8 port, value           // clobbers eax, edx
    mov $\value, %al
    mov $\port, %dx
    out %al, %dx
.endm
