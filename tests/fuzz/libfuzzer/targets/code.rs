#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| paravane_fuzz::run("code", input));
