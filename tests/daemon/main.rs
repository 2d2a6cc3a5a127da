//! The daemon in process: every part but the outermost ports, with time that is paused.

#[path = "../conformance/mod.rs"]
mod conformance;
mod script;

mod attribution;
mod serving;
mod watching;
