# Somebody overwrites `balance`. Who?
        .include "boot.inc"

main:
        mov     ebx, 50
month:  add     dword ptr balance, 10
        call    report
        mov     eax, 51
        sub     eax, ebx
        imul    eax, 10                                 # what it should be
        cmp     dword ptr balance, eax
        jne     lost
        dec     ebx
        jnz     month
lost:   ret

# Clears the line when it is full: one byte too many.
report: inc     dword ptr used
        cmp     dword ptr used, 33
        jne     kept
        mov     edi, offset line
        mov     ecx, 16 + 1
        xor     eax, eax
clear:  mov     [rdi], al
        inc     rdi
        dec     ecx
        jnz     clear
kept:   ret

        .section .data
        .balign 16
line:   .fill   16, 1, 'x'
balance:
        .long   0
used:   .long   0
