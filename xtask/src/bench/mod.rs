use crate::host::{Outcome,Failure};
#[derive(clap::Args)]
pub struct Options {}
pub fn run(_: &Options) -> Outcome<()> { Err(Failure::new("x")) }
