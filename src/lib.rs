//! One daemon per Docker host that is the EC2 instance metadata service (IMDS) of every container on it, each with its
//! own role.
//!
//! # The house
//! Each folder answers one question.
//!
//! | where | question |
//! |---|---|
//! | [`containers`] | who runs here: engine events → an index of containers and their lives |
//! | [`attribution`] | who is asking: a connection → a proven life, or a refusal |
//! | [`metadata`] | what would EC2 know about it: the tree of one container, as data |
//! | [`credentials`] | what does AWS give it: roles, sessions, keepers, providers |
//! | [`protocol`] | how does EC2 say it: requests, replies, tokens |
//! | [`interception`] | how does 169.254.169.254 get there: on the host, and over a link of its own into each namespace |
//! | [`admin`] | what does the operator see |
//! | [`instance`] | labels, settings and links → what one container is to see: pure, the one place |
//! | [`server`] | HTTP over any connection |
//! | [`descriptors`] | how are file descriptors shared out: limit, reserve, shortages |
//! | [`files`] | which files can be read without waiting |
//! | [`config`], [`cli`], [`commands`], [`logging`], [`clock`] | what was typed, what is done, what is said, what time it is |
//! | [`daemon`] | puts the parts together; nobody sees it |
//!
//! # The flows
//! * *Connection*: accept, at the link of a network namespace or on the host → the runs of that namespace → proof by the
//!   kernel → [`attribution::Caller`] or refusal.
//! * *Request*: is the life still alive → parse → token → look-up in the tree → for a role, the broker → reply.
//! * *Event*: the one [`containers::reconciler::Reconciler`] looks up what an event names, resolves the instance anew, and
//!   replaces the record; the kernel begins and ends lives.
//!
//! # What holds
//! * No answer without proof: [`attribution::Caller`] is made in one place, from the kernel's word on exactly this connection.
//! * Nothing below `server` waits for AWS: credentials are fetched when a container is created, and kept fresh.
//! * One deadline goes through every wait of a request; no lock is held over an `await`.
//! * Secrets have no `Debug`, and no log level shows one.

#![deny(unsafe_code)]

pub mod admin;
pub mod attribution;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod containers;
pub mod credentials;
#[cfg(target_os = "linux")]
pub mod daemon;
pub mod descriptors;
pub mod files;
pub mod instance;
#[cfg(target_os = "linux")]
pub mod interception;
pub mod logging;
pub mod metadata;
pub mod orders;
pub mod protocol;
pub mod server;
