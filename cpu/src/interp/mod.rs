//! The interpreter's instruction semantics.
pub(crate) mod system;
