//! The daemon in process: every part but the outermost ports, with time that is paused.

#![allow(clippy::unwrap_used, reason = "a test may panic: that is how it fails")]

#[path = "../conformance/mod.rs"]
mod conformance;
mod script;

mod address;
mod attribution;
mod connections;
mod failures;
mod image_labels;
mod instances;
mod rules;
mod serving;
mod watching;
