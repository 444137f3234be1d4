# A read-only page is written; the handler makes it writable and lets the instruction run again, as a kernel does for
# copy-on-write.
        .include "boot.inc"

        .equ    WINDOW, 0x40000000                      # the second GiB: nothing is mapped there yet

main:
        mov     qword ptr pdpt + 8, offset window_pd + 3
        mov     qword ptr window_pd, offset window_pt + 3
        mov     qword ptr window_pt, offset page + 1    # present, read-only
        mov     eax, offset page_fault
        mov     word ptr idt + 14 * 16, ax
        ror     eax, 16                                 # unlike SHR, leaves AF alone, which the flags below show
        mov     word ptr idt + 14 * 16 + 6, ax
        lidt    idt_pointer
        mov     ebx, WINDOW
        mov     eax, [rbx]                              # reading is allowed
write:  mov     dword ptr [rbx], 7
written:
        ret

page_fault:
        push    rax
        mov     rax, cr2
        or      qword ptr window_pt, 2                  # writable
        invlpg  [rax]
        pop     rax
        add     rsp, 8                                  # the error code
        iretq

        .section .data
idt:    .skip   14 * 16
        .quad   0x00008E0000080000, 0                   # interrupt gate, selector 8; main fills in the offset
idt_pointer:
        .word   idt_pointer - idt - 1
        .quad   idt

        .section .bss
        .balign 4096
window_pd:
        .skip   4096
window_pt:
        .skip   4096
page:   .skip   4096
