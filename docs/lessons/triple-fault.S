# An interrupt descriptor table whose gate names a data segment: the page fault cannot be delivered, nor what follows.
        .include "boot.inc"

main:
        mov     eax, offset page_fault
        mov     word ptr idt + 14 * 16, ax
        shr     eax, 16
        mov     word ptr idt + 14 * 16 + 6, ax
        lidt    idt_pointer
        mov     rbx, 0x7FFF12345000
wild:   mov     eax, [rbx]                              # nothing is mapped here
        ret

page_fault:
        hlt
        jmp     page_fault

        .section .data
idt:    .skip   14 * 16
        .quad   0x00008E0000100000, 0                   # selector 10H is data
idt_pointer:
        .word   idt_pointer - idt - 1
        .quad   idt
