# A loop for the translator: the sum of an array, again and again.
        .include "boot.inc"

main:
        mov     ebx, 100
again:  mov     esi, offset numbers
        mov     ecx, 256
        xor     eax, eax
sum:    add     eax, [rsi]
        add     rsi, 4
        dec     ecx
        jnz     sum
summed: dec     ebx
        jnz     again
done:   ret

        .section .data
        .balign 4096
numbers:
        .set    n, 1
        .rept   256
        .long   n
        .set    n, n + 1
        .endr
