# The switch to long mode and nothing else.
        .include "boot.inc"
main:
        ret
