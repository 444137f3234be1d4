//! System instructions.
use crate::exec::Exec;
use crate::fault::Fault;
use iced_x86::Instruction;

/// Executes `instr` if it is a system instruction; `None` if it is not.
#[allow(dead_code, unused_variables)]
pub(crate) fn execute(ex: &mut Exec<'_>, instr: &Instruction) -> Option<Result<(), Fault>> {
    None
}
