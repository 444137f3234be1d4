//! The command `paravane`.

fn main() {}
