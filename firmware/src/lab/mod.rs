//! The lab guest.
