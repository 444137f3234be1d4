//! CPUID models.
/// A processor model.
#[derive(Debug, Clone)]
pub struct CpuModel;
