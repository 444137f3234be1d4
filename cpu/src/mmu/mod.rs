//! Paging.
/// Software TLB.
#[derive(Debug, Default)]
pub struct Tlb;
/// What cached translations must be dropped.
#[derive(Debug, Default)]
pub struct Flushes;
