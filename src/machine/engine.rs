//! The engine of a vCPU.

use super::MachineError;
use super::config::EngineKind;
use crate::run::BOOT_VP;
use paravane_cpu::{Attention, CpuModel, Engine, HostFeatures, Interpreter, model_by_name};
use paravane_jit::{HostVectorUnit, JitOptions, Translator};
use paravane_memory::{GuestMemory, MemoryConfig, VpIndex};

/// The processor model called `name`.
pub(super) fn model(name: &str) -> Result<CpuModel, MachineError> {
    model_by_name(name, &HostFeatures::detect()).map_err(MachineError::Model)
}

/// An engine of the kind asked for, for processor `vp`; `options` are the translator's.
pub(super) fn build(
    kind: EngineKind,
    model: CpuModel,
    mem: &GuestMemory,
    vp: VpIndex,
    attention: Attention,
    options: JitOptions,
) -> Result<Box<dyn Engine>, MachineError> {
    match kind {
        EngineKind::Jit => {
            let engine = Translator::new(model, mem, attention, vp, options).map_err(MachineError::Engine)?;
            Ok(Box::new(engine))
        }
        EngineKind::Interp => {
            let vector = HostVectorUnit::new().map_err(MachineError::Engine)?;
            Ok(Box::new(Interpreter::new(model, Box::new(vector), attention, vp)))
        }
    }
}

/// Builds a translator and drops it again: whether this host can run it.
pub fn probe_translator() -> Result<(), String> {
    let mem = GuestMemory::new(MemoryConfig::pc(16 << 20)).map_err(|e| e.to_string())?;
    let model = model("max").map_err(|e| e.to_string())?;
    build(EngineKind::Jit, model, &mem, BOOT_VP, Attention::default(), JitOptions::default())
        .map(drop)
        .map_err(|e| e.to_string())
}
