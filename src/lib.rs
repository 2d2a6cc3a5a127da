//! One daemon per Docker host that is the EC2 instance metadata service (IMDS) of every container on it, each with its
//! own role.
//!
//! # Modules
//!
//! | module | job |
//! |---|---|
//! | [`containers`] | follows the Docker API: engine events → an index of containers and their runs |
//! | [`attribution`] | authenticates callers: a connection → the container run that sent it, or a refusal |
//! | [`instance`] | resolves labels, settings and network endpoints → the role and metadata of one container; no I/O |
//! | [`metadata`] | builds the metadata tree of one container, as data |
//! | [`credentials`] | resolves roles, calls STS, refreshes sessions |
//! | [`protocol`] | reads and writes EC2's wire format: requests, replies, tokens |
//! | [`server`] | serves HTTP over any connection |
//! | [`interception`] | brings 169.254.169.254 to the host, and over a link into each network namespace |
//! | [`admin`] | the admin API: types, server, client, output of `status` and `explain` |
//! | [`orders`] | stores the changes by `trigger` and `modify` |
//! | [`descriptors`] | shares out file descriptors: limit, reserve, shortages |
//! | [`files`] | reads files that must not block |
//! | [`config`], [`cli`], [`commands`] | settings, command line, and what each command does |
//! | [`logging`], [`clock`] | log output and its limits; time |
//! | [`daemon`] | starts and connects all of the above; no other module except [`commands`] imports it |
//!
//! # Flows
//!
//! * *Connection*: `server` accepts it, at the link of a network namespace or on the host. `attribution` finds the runs in that
//!   namespace, and the kernel shows which of them owns the socket. The result is an [`attribution::Caller`] or a refusal.
//! * *Request*: `server` checks that the run is still alive, parses the request, checks the token, and looks the path up in the
//!   metadata tree. For a role, it takes credentials from the broker.
//! * *Event*: the [`containers::reconciler::Reconciler`] looks up the container that an event names, resolves its instance, and
//!   replaces its record. The kernel reports when runs start and stop.
//!
//! # Invariants
//!
//! * No answer without proof: one function makes an [`attribution::Caller`], from kernel evidence about exactly this connection.
//! * No request calls AWS: the daemon fetches credentials when a container is created, and refreshes them. A request waits for the
//!   first ones at most.
//! * One deadline limits every wait of a request. No request holds a lock over an `await`.
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
