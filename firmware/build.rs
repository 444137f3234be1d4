//! Builds the lab guest with the compiler that builds this crate: a freestanding ELF for the host's own target. Its symbols stay in,
//! for whoever debugs it.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

const FLAGS: [&str; 12] = [
    "--edition=2024",
    "--crate-type=bin",
    "--crate-name=lab",
    "--target=x86_64-unknown-linux-gnu",
    "-Copt-level=3",
    "-Cpanic=abort",
    "-Cno-redzone=yes",
    "-Crelocation-model=static",
    "-Ccode-model=small",
    "-Ctarget-cpu=x86-64",
    "-Cdebuginfo=0",
    "-Cstrip=debuginfo",
];

fn main() {
    println!("cargo::rerun-if-changed=lab");
    println!("cargo::rerun-if-changed=src/lab/shared.rs");
    println!("cargo::rerun-if-changed=build.rs");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(variable("OUT_DIR")).join("lab.elf");
    let script = root.join("lab/lab.ld");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(FLAGS);
    for argument in ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"] {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    rustc.arg(format!("-Clink-arg=-Wl,-T,{}", script.display()));
    rustc.arg("-o").arg(&out).arg(root.join("lab/main.rs"));
    // Flags meant for host programs (instrumentation, target features) would break a program without an OS.
    rustc.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    match rustc.status() {
        Ok(status) if status.success() => {}
        Ok(status) => {
            fail(&format!("building the lab guest failed ({status}); is a C linker `cc` installed?"))
        }
        Err(error) => fail(&format!("cannot run {rustc:?}: {error}")),
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| fail(&format!("{name} is not set: run this through cargo")))
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1);
}
