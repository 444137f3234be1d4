//! Runs that can be repeated, and gone back in.
//!
//! Under the instruction clock a run is decided by the machine and by what comes in from outside. The timeline of such a run:
//!
//! ```text
//!   slice        slice      slice        slice
//! |-----------|----------|----------|-----------|---->   instructions, which are nanoseconds
//!             ^          ^          ^
//!             timers, disk completions and input come in between two slices only
//!                        ^
//!                        a checkpoint, every 2^24 instructions: the engine starts over
//! ```
//!
//! Where a slice ends depends on timers alone; a debugger, a signal or a busy host may cut one, and it is finished afterwards.
//! At a checkpoint the engine forgets its translations, as it must where a run goes on from a saved state: which accessed bits it
//! sets depends on them. So a run from a checkpoint on is the same run.
//!
//! * `state`: all state of a machine, part by part, as bytes; `cpu` and `ram` are parts of it;
//! * `journal`: what came in, and when; `port`: where it comes in, and where output leaves;
//! * `record`: the file;
//! * `difference`: what is different between two states, in words;
//! * `timeline`: what happens between slices;
//! * `history`: points to go back to; `backwards`: a debugger going back.

mod cpu;
mod difference;
mod history;
mod identity;
mod journal;
mod port;
mod ram;
mod record;
mod state;
mod timeline;

pub use identity::identity;
pub use journal::{Input, Stamp};
pub use port::{Outside, SerialGate};
pub use record::{End, Identity, RecordError, Recorder, Recording};
pub use state::{PartError, Parts};
pub use timeline::{Timeline, Wishes};
