//! [`ContainerEngine`] on bollard: Docker, and whatever speaks its API.
//!
//! bollard's enums are closed: one row with a state that it does not know fails the whole list, one such event ends the
//! stream. So lists of containers and events are read here, each row and each event by itself. One that cannot be read costs
//! no other.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{NetworkInspect, OciDescriptor, SystemVersionComponents};
use bollard::query_parameters::{InspectContainerOptions, InspectNetworkOptions, StopContainerOptions};
use futures_util::future::{BoxFuture, TryFutureExt as _};
use futures_util::stream::StreamExt as _;
use futures_util::{FutureExt as _, future};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::OnceCell;
use tokio::time::timeout;
use tracing::debug;

use super::docker_http::{self, Line};
use super::image_labels::Image;
use super::reconciler::{
    ContainerEngine, ContainerSummary, EngineError, Event, Events, Inspection, Listed, Network, Run,
};
use super::{ContainerId, Endpoint, Environment, NetworkId, NetworkMode};
use crate::clock::Clock;
use crate::logging::{printable, with_causes};

/// Where Docker listens when nobody says otherwise.
pub const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

/// Kinds of events that say where to look.
const KINDS: &[&str] = &["container", "network"];

/// Events that say where to look. Others (exec, health, pause …) would only wake us.
const ACTIONS: &[&str] = &[
    "create",
    "start",
    "die",
    "destroy",
    "remove",
    "rename",
    "update",
    "connect",
    "disconnect",
    "init",
];

/// How long the engine may take to inspect one container that its list does not describe.
const INSPECTION: Duration = Duration::from_secs(2);

/// How far back events are asked for at subscription: whatever happens while the request is on its way is repeated.
const OVERLAP: Duration = Duration::from_secs(2);

/// An engine at an address.
#[derive(Clone)]
pub struct Engine {
    host: String,
    clock: Clock,
    connected: Arc<ArcSwapOption<Connected>>,
    lag: Arc<Lag>,
}

/// An engine that was connected to. A new one after each subscription: it may have been updated.
struct Connected {
    host: String,
    docker: Docker,
    kind: OnceCell<EngineKind>,
}

/// What the engine says of itself.
struct EngineKind {
    is_podman: bool,
    images: ImagesOfEngine,
}

impl Connected {
    /// Asks the engine once.
    async fn kind(&self) -> Result<&EngineKind, EngineError> {
        let asked = async {
            let version = self.docker.version().await?;
            let is_podman = |component: &SystemVersionComponents| component.name.starts_with("Podman");
            let is_podman = version.components.unwrap_or_default().iter().any(is_podman);
            Ok(EngineKind {
                is_podman,
                images: ImagesOfEngine {
                    has_indexes: !is_podman && uses_containerd(&self.docker).await?,
                    os: version.os.unwrap_or_default(),
                    architecture: version.arch.unwrap_or_default(),
                },
            })
        };
        self.kind.get_or_try_init(|| asked.map_err(failed)).await
    }
}

/// How far behind the engine's events are when they come here.
#[derive(Default)]
pub struct Lag {
    events: AtomicU64,
    micros: AtomicU64,
}

impl Lag {
    fn note(&self, made: SystemTime, clock: &Clock) {
        // Before the engine's own clock it has not come.
        let behind = clock.wall().duration_since(made).unwrap_or_default();
        self.events.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(behind.as_micros()).unwrap_or(u64::MAX);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Events so far, and the sum of the time from each until it came.
    pub fn so_far(&self) -> (u64, Duration) {
        let micros = Duration::from_micros(self.micros.load(Ordering::Relaxed));
        (self.events.load(Ordering::Relaxed), micros)
    }
}

impl Engine {
    /// The engine at `host` (`unix:///…`, `tcp://…`). Connects when it is asked for the first time.
    pub fn new(host: &str, clock: Clock) -> Self {
        Self {
            host: host.to_owned(),
            clock,
            connected: Arc::default(),
            lag: Arc::default(),
        }
    }

    /// How far behind its events are.
    pub fn lag(&self) -> Arc<Lag> {
        self.lag.clone()
    }

    /// Asks for something of the connected engine.
    fn ask<T, F>(&self, ask: impl FnOnce(Docker) -> F + Send + 'static) -> BoxFuture<'static, Result<T, EngineError>>
    where
        F: Future<Output = Result<T, EngineError>> + Send + 'static,
        T: Send + 'static,
    {
        match self.connected() {
            Ok(connected) => ask(connected.docker.clone()).boxed(),
            Err(error) => future::ready(Err(error)).boxed(),
        }
    }

    fn note_lag(&self, message: &Message, subscribed: SystemTime) {
        let made = message
            .time_nano
            .map(|nanos| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos));
        // The engine repeats events from before the subscription.
        if let Some(made) = made.filter(|made| *made >= subscribed) {
            self.lag.note(made, &self.clock);
        }
    }

    fn connected(&self) -> Result<Arc<Connected>, EngineError> {
        let connected = self.connected.load_full();
        connected.ok_or_else(|| EngineError("not connected".to_owned()))
    }
}

/// What the engine's answer about an image is about.
#[derive(Default)]
struct ImagesOfEngine {
    /// The ID of an image may name an index of images for several platforms: Docker with containerd's store. The engine then
    /// describes the image for its own platform, whichever of them a container was created from.
    has_indexes: bool,
    /// The engine's own platform, as Go names it.
    os: String,
    architecture: String,
}

impl ImagesOfEngine {
    /// Whether the engine describes the image that the container was created from. The author of an index writes everything in
    /// it, except for the digests. The platform of the container's image is the one that was asked for when it was created, since
    /// the engine chooses by it; the default is the engine's own.
    fn tell_which(&self, image_id: &str, manifest: Option<&OciDescriptor>) -> bool {
        let Some(manifest) = manifest else {
            return !self.has_indexes;
        };
        if manifest.digest.as_deref() == Some(image_id) {
            return true;
        }
        manifest.platform.as_ref().is_some_and(|platform| {
            let same = |text: &Option<String>, own: &str| !own.is_empty() && text.as_deref() == Some(own);
            let variant = platform.variant.as_deref().unwrap_or_default();
            // v8 is the only one of arm64 (containerd, platforms/database.go).
            let is_default = variant.is_empty() || (self.architecture == "arm64" && variant == "v8");
            same(&platform.os, &self.os) && same(&platform.architecture, &self.architecture) && is_default
        })
    }
}

/// Whether Docker keeps images in containerd's store (`docker info`: `driver-type: io.containerd.snapshotter.v1`).
async fn uses_containerd(docker: &Docker) -> Result<bool, Error> {
    let status = match docker.info().await {
        Ok(info) => info.driver_status.unwrap_or_default(),
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut words = status.iter().flatten();
    Ok(words.any(|word| word.starts_with("io.containerd.snapshotter")))
}

/// How long an engine that is there takes at most to say what it is: some milliseconds. Where systemd holds the engine's socket
/// and starts it after this daemon, that much of the boot is lost.
const SOON: Duration = Duration::from_millis(500);

/// The architecture of the engine's host, in the engine's words (`arm64`). An engine that is not there yet says nothing.
pub async fn architecture(host: &str) -> Option<String> {
    // The one question that needs no version to be agreed on: agreeing asks the same.
    let asked = async { Docker::connect_with_host(host).ok()?.version().await.ok()?.arch };
    tokio::time::timeout(SOON, asked).await.ok().flatten()
}

fn failed(error: Error) -> EngineError {
    EngineError(printable(&with_causes(&error), 300))
}

/// `None` for what the engine says is not there.
fn absent<T>(answer: Result<T, Error>) -> Result<Option<T>, EngineError> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// The value of the parameter `filters`.
fn filters(pairs: &[(&str, &[&str])]) -> String {
    let pairs: BTreeMap<_, _> = pairs.iter().copied().collect();
    let json = serde_json::json!(pairs).to_string();
    utf8_percent_encode(&json, NON_ALPHANUMERIC).to_string()
}

impl ContainerEngine for Engine {
    fn announces_late(&self) -> bool {
        let connected = self.connected.load();
        let kind = connected.as_ref().and_then(|connected| connected.kind.get());
        kind.is_some_and(|kind| kind.is_podman)
    }

    fn subscribe(&self) -> BoxFuture<'static, Result<Events, EngineError>> {
        let this = self.clone();
        async move {
            let at = |EngineError(why)| EngineError(format!("{}: {why}", this.host));
            let docker = Docker::connect_with_host(&this.host).map_err(failed).map_err(at)?;
            let subscribed = this.clock.wall();
            let since = this.clock.wall_seconds().saturating_sub(OVERLAP.as_secs());
            let path = format!(
                "/events?since={since}&filters={}",
                filters(&[("type", KINDS), ("event", ACTIONS)])
            );
            let lines = docker_http::lines(&this.host, &path).await.map_err(at)?;
            this.connected.store(Some(Arc::new(Connected {
                host: this.host.clone(),
                docker,
                kind: OnceCell::new(),
            })));
            let events = lines.filter_map(move |line| {
                let event = match line {
                    Ok(Line::Whole(line)) => match serde_json::from_slice::<Message>(&line) {
                        Ok(message) => {
                            this.note_lag(&message, subscribed);
                            read_event(message).map(Ok)
                        }
                        Err(error) => {
                            debug!(bytes = line.len(), column = error.column(), "an event cannot be read");
                            Some(Ok(Event::Unreadable))
                        }
                    },
                    Ok(Line::TooLong) => {
                        debug!("an event is too long");
                        Some(Ok(Event::Unreadable))
                    }
                    Err(error) => Some(Err(error)),
                };
                future::ready(event)
            });
            Ok(events.boxed())
        }
        .boxed()
    }

    fn containers(&self) -> BoxFuture<'static, Result<Listed, EngineError>> {
        let connected = self.connected();
        async move { list(&*connected?, None).await }.boxed()
    }

    fn container(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<ContainerSummary>, EngineError>> {
        let (connected, id) = (self.connected(), id.clone());
        async move {
            let listed = list(&*connected?, Some(&id)).await?;
            if let Some(row) = listed.rows.into_iter().find(|row| row.id == id) {
                return Ok(Some(row));
            }
            let why = listed
                .undescribed
                .into_iter()
                .find(|(it, _)| *it == id)
                .map(|(_, why)| why);
            // A row without an ID may be that of the container.
            why.or(listed.incomplete).map_or(Ok(None), Err)
        }
        .boxed()
    }

    fn inspect(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<Inspection>, EngineError>> {
        let id = id.clone();
        self.ask(|docker| async move {
            let answer = docker
                .inspect_container(id.as_str(), None::<InspectContainerOptions>)
                .await;
            Ok(absent(answer)?.map(|answer| Inspection {
                hostname: answer
                    .config
                    .as_ref()
                    .and_then(|config| config.hostname.clone())
                    .filter(|it| !it.is_empty()),
                environment: Environment::of(answer.config.and_then(|config| config.env).unwrap_or_default()),
                run: answer
                    .state
                    .filter(|state| state.running == Some(true))
                    .and_then(|state| {
                        Some(Run {
                            pid: u32::try_from(state.pid?).ok().filter(|pid| *pid > 0)?,
                            started: state.started_at.unwrap_or_default(),
                        })
                    }),
            }))
        })
    }

    fn image(&self, id: &str) -> BoxFuture<'static, Result<Option<Image>, EngineError>> {
        let id = id.to_owned();
        self.ask(|docker| async move {
            // A container of a directory has no image (`podman run --rootfs`).
            if id.trim_start_matches("sha256:").is_empty() {
                return Ok(None);
            }
            let image = absent(docker.inspect_image(&id).await)?;
            // Docker's containerd store tells neither a configuration nor an operating system if it lacks the content.
            let image =
                image.filter(|image| image.config.is_some() || image.os.as_ref().is_some_and(|os| !os.is_empty()));
            Ok(image.map(|image| {
                let config = image.config.unwrap_or_default();
                Image {
                    labels: config.labels.unwrap_or_default().into_iter().collect(),
                    environment: Environment::of(config.env.unwrap_or_default()),
                }
            }))
        })
    }

    fn networks(&self) -> BoxFuture<'static, Result<Vec<NetworkId>, EngineError>> {
        self.ask(|docker| async move {
            let networks = docker.list_networks(None).await.map_err(failed)?;
            let ids = networks.into_iter().filter_map(|network| network.id);
            Ok(ids.map(|id| NetworkId::from(id.as_str())).collect())
        })
    }

    fn network(&self, id: &NetworkId) -> BoxFuture<'static, Result<Option<Network>, EngineError>> {
        let id = id.clone();
        self.ask(|docker| async move {
            let answer = docker.inspect_network(&id.0, None::<InspectNetworkOptions>).await;
            Ok(absent(answer)?.map(read_network))
        })
    }

    fn stop(&self, id: &ContainerId) -> BoxFuture<'static, Result<(), EngineError>> {
        let id = id.clone();
        self.ask(|docker| async move {
            // 304: it had ended already; to the client that is no error.
            let answer = docker.stop_container(id.as_str(), None::<StopContainerOptions>).await;
            absent(answer).map(drop)
        })
    }
}

/// An event, as Docker and Podman send it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Message {
    r#type: Option<String>,
    action: Option<String>,
    actor: Option<Actor>,
    #[serde(rename = "timeNano")]
    time_nano: Option<u64>,
}

#[derive(Deserialize)]
struct Actor {
    #[serde(rename = "ID")]
    id: Option<String>,
    #[serde(rename = "Attributes")]
    attributes: Option<Attributes>,
}

/// All others are the labels of a container.
#[derive(Deserialize)]
struct Attributes {
    container: Option<String>,
}

fn read_event(message: Message) -> Option<Event> {
    let actor = message.actor?;
    let subject = actor.id?;
    match (message.r#type?.as_str(), message.action?.as_str()) {
        ("container", action) => {
            let id = ContainerId::parse(&subject)?;
            Some(match action {
                "start" | "init" => Event::Started(id),
                "die" => Event::Died(id),
                "destroy" | "remove" => Event::Removed(id),
                _ => Event::Defined(id),
            })
        }
        ("network", action) => {
            let network = NetworkId::from(subject.as_str());
            let container = actor.attributes.and_then(|attributes| attributes.container);
            match action {
                "connect" => Some(Event::Connected(
                    network,
                    container.and_then(|id| ContainerId::parse(&id)),
                )),
                "disconnect" | "destroy" | "remove" => Some(Event::Disconnected(network)),
                "create" => Some(Event::Connected(network, None)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Inspections at once, for rows that say too little.
const AT_ONCE: usize = 8;

/// The row of a container. Everything but its ID may be missing; a state that this daemon does not know is not `running`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedRow {
    names: Option<Vec<String>>,
    labels: Option<BTreeMap<String, String>>,
    image: Option<String>,
    #[serde(rename = "ImageID")]
    image_id: Option<String>,
    image_manifest_descriptor: Option<OciDescriptor>,
    state: Option<String>,
    host_config: Option<ListedHostConfig>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedHostConfig {
    network_mode: Option<String>,
}

/// The ID of a row, whatever else it has.
#[derive(Deserialize)]
struct ListedId {
    #[serde(rename = "Id")]
    id: String,
}

/// Lists all containers, or one.
async fn list(connected: &Connected, id: Option<&ContainerId>) -> Result<Listed, EngineError> {
    let kind = connected.kind().await?;
    let filter = id.map(|id| format!("&filters={}", filters(&[("id", &[id.as_str()])])));
    let path = format!("/containers/json?all=true{}", filter.unwrap_or_default());
    let answer = docker_http::get(&connected.host, &path).await?;
    let rows: Vec<&RawValue> = serde_json::from_slice(&answer)
        .map_err(|error| EngineError(printable(&format!("the list is not JSON as expected: {error}"), 300)))?;
    let rows: Vec<_> = rows.into_iter().map(|row| describe(connected, kind, row)).collect();
    let mut described = futures_util::stream::iter(rows).buffered(AT_ONCE);
    let mut listed = Listed::default();
    while let Some(row) = described.next().await {
        match row {
            Described::As(row) => listed.rows.push(*row),
            Described::Not(id, why) => listed.undescribed.push((id, why)),
            Described::Gone => {}
            Described::Unnamed => {
                listed.incomplete = Some(EngineError(
                    "a container of the list has no ID of 64 hex digits".to_owned(),
                ));
            }
        }
    }
    Ok(listed)
}

enum Described {
    As(Box<ContainerSummary>),
    Not(ContainerId, EngineError),
    /// It was removed meanwhile.
    Gone,
    Unnamed,
}

/// Reads one row. Podman's list does not say which network mode a container has; its inspections do.
async fn describe(connected: &Connected, kind: &EngineKind, row: &RawValue) -> Described {
    let id = serde_json::from_str(row.get()).ok();
    let Some(id) = id.and_then(|ListedId { id }| ContainerId::parse(&id)) else {
        return Described::Unnamed;
    };
    let row: ListedRow = match serde_json::from_str(row.get()) {
        Ok(row) => row,
        Err(error) => {
            return Described::Not(
                id,
                EngineError(printable(&format!("its row cannot be read: {error}"), 300)),
            );
        }
    };
    let listed = row.host_config.as_ref().and_then(|config| config.network_mode.clone());
    let mode = match listed {
        Some(mode) => Some(mode),
        None => {
            let answer = connected
                .docker
                .inspect_container(id.as_str(), None::<InspectContainerOptions>);
            let limited = timeout(INSPECTION, answer.map(absent)).await;
            let late = || Err(EngineError(format!("no inspection within {} s", INSPECTION.as_secs())));
            match limited.unwrap_or_else(|_| late()) {
                Ok(Some(answer)) => answer.host_config.and_then(|config| config.network_mode),
                Ok(None) => return Described::Gone,
                Err(why) => return Described::Not(id, why),
            }
        }
    };
    Described::As(Box::new(read_row(id, row, mode.as_deref(), &kind.images)))
}

fn read_row(id: ContainerId, row: ListedRow, mode: Option<&str>, images: &ImagesOfEngine) -> ContainerSummary {
    let image_id = row.image_id.unwrap_or_default();
    let names = row.names.unwrap_or_default();
    let names = names.iter().map(|name| name.trim_start_matches('/'));
    ContainerSummary {
        name: names.min_by_key(|name| name.len()).unwrap_or(id.short()).to_owned(),
        labels: row.labels.unwrap_or_default(),
        image: row.image.unwrap_or_default(),
        image_is_certain: images.tell_which(&image_id, row.image_manifest_descriptor.as_ref()),
        image_id,
        network_mode: mode.map(NetworkMode::parse).unwrap_or_default(),
        running: matches!(row.state.as_deref(), Some("running" | "paused")),
        id,
    }
}

fn read_network(network: NetworkInspect) -> Network {
    let name = network.name.unwrap_or_default();
    let internal = network.internal.unwrap_or(false);
    // A macvlan's gateway is a machine of the LAN.
    let is_bridge = network.driver.as_deref() == Some("bridge");
    let config = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
    let subnets = config
        .iter()
        .filter_map(|config| read_cidr(config.subnet.as_deref()?))
        .collect();
    let gateways = config
        .iter()
        .filter(|_| is_bridge)
        .filter_map(|config| config.gateway.as_deref()?.split('/').next()?.parse().ok())
        .collect();
    let endpoints = network
        .containers
        .unwrap_or_default()
        .into_iter()
        .filter_map(|(id, endpoint)| {
            // Not everything on a network is a container: `ingress-sbox` of swarm is not.
            let id = ContainerId::parse(&id)?;
            let cidr = |text: Option<String>| text.as_deref().and_then(read_cidr);
            let endpoint = Endpoint {
                network: name.clone(),
                mac: endpoint.mac_address.unwrap_or_default(),
                ipv4: cidr(endpoint.ipv4_address).and_then(|(address, prefix)| match address {
                    IpAddr::V4(address) => Some((address, prefix)),
                    IpAddr::V6(_) => None,
                }),
                ipv6: cidr(endpoint.ipv6_address).and_then(|(address, prefix)| match address {
                    IpAddr::V6(address) => Some((address, prefix)),
                    IpAddr::V4(_) => None,
                }),
                internal,
            };
            Some((id, endpoint))
        });
    Network {
        subnets,
        gateways,
        endpoints: endpoints.collect(),
    }
}

fn read_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    Some((address.parse().ok()?, prefix.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(json: &str) -> Option<Event> {
        read_event(serde_json::from_str(json).unwrap())
    }

    #[test]
    fn events_say_where_to_look() {
        let id = "ab".repeat(32);
        let container = ContainerId::parse(&id).unwrap();
        let of = |action: &str| {
            event(&format!(
                r#"{{"Type":"container","Action":"{action}","Actor":{{"ID":"{id}","Attributes":{{"exitCode":"x"}}}}}}"#
            ))
        };
        assert_eq!(of("create"), Some(Event::Defined(container.clone())));
        assert_eq!(of("start"), Some(Event::Started(container.clone())));
        assert_eq!(of("die"), Some(Event::Died(container.clone())));
        assert_eq!(of("destroy"), Some(Event::Removed(container.clone())));
        let connect = format!(
            r#"{{"Type":"network","Action":"connect","Actor":{{"ID":"n1","Attributes":{{"container":"{id}","name":"bridge"}}}}}}"#
        );
        assert_eq!(event(&connect), Some(Event::Connected("n1".into(), Some(container))));
        assert_eq!(
            event(r#"{"Type":"container","Action":"start","Actor":{"ID":"short"}}"#),
            None
        );
        assert_eq!(event(r#"{"Type":"image","Action":"pull","Actor":{"ID":"x"}}"#), None);
    }

    #[test]
    fn a_network_with_what_is_not_a_container() {
        let id = "ab".repeat(32);
        let json = format!(
            r#"{{"Name":"bridge","Driver":"bridge","Internal":true,
              "IPAM":{{"Config":[{{"Subnet":"172.17.0.0/16","Gateway":"172.17.0.1"}}]}},"Containers":{{
              "{id}":{{"Name":"web","MacAddress":"02:42:ac:11:00:02","IPv4Address":"172.17.0.2/16","IPv6Address":""}},
              "ingress-sbox":{{"IPv4Address":"172.17.0.9/16"}}}}}}"#
        );
        let network = read_network(serde_json::from_str(&json).unwrap());
        assert_eq!(network.subnets, [("172.17.0.0".parse().unwrap(), 16)]);
        assert_eq!(network.gateways, ["172.17.0.1".parse::<IpAddr>().unwrap()]);
        let of_the_lan = json.replace("\"Driver\":\"bridge\"", "\"Driver\":\"macvlan\"");
        let network_of_the_lan = read_network(serde_json::from_str(&of_the_lan).unwrap());
        assert_eq!(network_of_the_lan.gateways, [] as [IpAddr; 0]);
        assert_eq!(network.endpoints.len(), 1);
        let endpoint = network.endpoints.values().next().unwrap();
        assert_eq!(endpoint.ipv4, Some(([172, 17, 0, 2].into(), 16)));
        assert_eq!(endpoint.ipv6, None);
        assert!(endpoint.internal);
    }

    /// The answer that stands for an error of the engine.
    const FAILS: &str = "fails";

    /// An engine that answers every request for `path` with what `answer` says.
    fn engine(answer: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> (tempfile::TempDir, Engine) {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("docker.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let answer = Arc::new(answer);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let head = String::from_utf8(request).unwrap();
                    let path =
                        percent_encoding::percent_decode_str(head.split(' ').nth(1).unwrap()).decode_utf8_lossy();
                    let (status, body) = match answer(&path) {
                        Some(body) if body == FAILS => {
                            ("500 Internal Server Error", "{\"message\":\"broken\"}".to_owned())
                        }
                        Some(body) => ("200 OK", body),
                        None => ("404 Not Found", "{\"message\":\"no such thing\"}".to_owned()),
                    };
                    let reply = format!(
                        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    let _ = stream.write_all(reply.as_bytes()).await;
                });
            }
        });
        let engine = Engine::new(&format!("unix://{}", socket.display()), Clock::system());
        (dir, engine)
    }

    fn version(path: &str) -> Option<String> {
        path.ends_with("/version")
            .then(|| "{\"ApiVersion\":\"1.41\"}".to_owned())
    }

    #[test]
    fn an_image_of_another_platform_than_the_engines_is_uncertain() {
        let images = |has_indexes, architecture: &str| ImagesOfEngine {
            has_indexes,
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
        };
        let row = |manifest: &str| format!(r#"{{"Id":"x","ImageID":"sha256:aa"{manifest}}}"#);
        let of = |digest: &str, platform: &str| {
            let manifest = format!(r#""digest":"sha256:{digest}","platform":{platform}"#);
            row(&format!(r#","ImageManifestDescriptor":{{{manifest}}}"#))
        };
        let amd64 = r#"{"os":"linux","architecture":"amd64"}"#;
        let (arm64, v8) = (
            amd64.replace("amd64", "arm64"),
            r#"{"os":"linux","architecture":"arm64","variant":"v8"}"#,
        );
        let v3 = r#"{"os":"linux","architecture":"amd64","variant":"v3"}"#;
        for (has_indexes, own, row, certain) in [
            // Docker's classic store: the ID is the digest of the configuration.
            (false, "amd64", row(""), true),
            // A container that an older engine has created.
            (true, "amd64", row(""), false),
            (true, "amd64", of("bb", amd64), true),
            (true, "amd64", of("bb", &arm64), false),
            (true, "amd64", of("bb", v3), false),
            (true, "amd64", of("bb", "null"), false),
            (true, "", of("bb", r#"{"os":"linux","architecture":""}"#), false),
            // No index: the ID is that of the manifest.
            (true, "amd64", of("aa", &arm64), true),
            (true, "arm64", of("bb", v8), true),
        ] {
            let read: ListedRow = serde_json::from_str(&row).unwrap();
            let manifest = read.image_manifest_descriptor.as_ref();
            let is_certain = images(has_indexes, own).tell_which(&read.image_id.unwrap(), manifest);
            assert_eq!(is_certain, certain, "{own} {row}");
        }
    }

    #[tokio::test]
    async fn containerds_store_is_known_by_its_driver() {
        let (_dir, engine) = engine(|path| match path.ends_with("/info") {
            true => Some(r#"{"DriverStatus":[["driver-type","io.containerd.snapshotter.v1"]]}"#.to_owned()),
            false if path.contains("/containers/json") => Some(format!(
                r#"[{{"Id":"{}","ImageID":"sha256:aa","HostConfig":{{"NetworkMode":"host"}}}}]"#,
                "a".repeat(64)
            )),
            false => version(path),
        });
        drop(engine.subscribe().await.unwrap());
        assert!(!engine.containers().await.unwrap().rows[0].image_is_certain);
    }

    #[tokio::test]
    async fn the_engine_says_what_machine_it_is_on() {
        let (dir, _engine) = engine(|path| {
            let version = "{\"ApiVersion\":\"1.41\",\"Arch\":\"arm64\"}";
            path.ends_with("/version").then(|| version.to_owned())
        });
        let socket = |name: &str| format!("unix://{}/{name}", dir.path().display());
        assert_eq!(architecture(&socket("docker.sock")).await.as_deref(), Some("arm64"));
        assert_eq!(architecture(&socket("nobody.sock")).await, None);
    }

    #[tokio::test]
    async fn what_the_list_does_not_say_of_a_network_mode_an_inspection_does() {
        let (_dir, engine) = engine(|path| {
            if path.contains("/containers/json") {
                let row = |digit: &str, more: &str| format!("{{\"Id\":\"{}\"{more}}}", digit.repeat(64));
                let told = ",\"HostConfig\":{\"NetworkMode\":\"bridge\"}";
                return Some(format!("[{},{},{}]", row("a", ""), row("b", told), row("c", "")));
            }
            // Nobody asks for what is known; the third has gone meanwhile.
            assert!(!path.contains("bbbb"), "{path}");
            let inspected = path
                .contains("aaaa")
                .then(|| "{\"HostConfig\":{\"NetworkMode\":\"host\"}}".to_owned());
            inspected.or_else(|| version(path))
        });
        drop(engine.subscribe().await.unwrap());
        let rows = engine.containers().await.unwrap().rows;
        let modes: Vec<_> = rows.into_iter().map(|row| row.network_mode).collect();
        assert_eq!(modes, [NetworkMode::Host, NetworkMode::Own]);
    }

    /// The answer of an engine whose list is `list`.
    async fn listed(list: String) -> Result<Listed, EngineError> {
        let (_dir, engine) = engine(move |path| match path.contains("/containers/") {
            true if path.contains("/containers/json") => Some(list.clone()),
            true => Some(FAILS.to_owned()),
            false => version(path),
        });
        drop(engine.subscribe().await.unwrap());
        engine.containers().await
    }

    fn row(digit: &str, more: &str) -> String {
        format!("{{\"Id\":\"{}\"{more}}}", digit.repeat(64))
    }

    const ON_BRIDGE: &str = ",\"HostConfig\":{\"NetworkMode\":\"bridge\"}";

    #[tokio::test]
    async fn a_container_that_cannot_be_described_costs_itself_only() {
        let rows = [
            row("a", &format!(",\"State\":\"running\"{ON_BRIDGE}")),
            // Podman's state, and one of the future.
            row("b", &format!(",\"State\":\"stopped\"{ON_BRIDGE}")),
            row("c", &format!(",\"Labels\":[]{ON_BRIDGE}")),
            // Its inspection fails.
            row("d", ",\"State\":\"running\""),
        ];
        let listed = listed(format!("[{}]", rows.join(","))).await.unwrap();
        let read: Vec<_> = listed
            .rows
            .iter()
            .map(|row| (&row.id.as_str()[..1], row.running))
            .collect();
        assert_eq!(read, [("a", true), ("b", false)]);
        let undescribed: Vec<_> = listed
            .undescribed
            .iter()
            .map(|(id, why)| (&id.as_str()[..1], why.to_string()))
            .collect();
        assert_eq!(undescribed.iter().map(|(id, _)| *id).collect::<Vec<_>>(), ["c", "d"]);
        assert!(
            undescribed[0].1.starts_with("its row cannot be read: "),
            "{undescribed:?}"
        );
        assert!(undescribed[1].1.contains("broken"), "{undescribed:?}");
        assert_eq!(listed.incomplete, None);
    }

    #[tokio::test]
    async fn a_list_with_a_row_of_no_known_container_may_lack_containers() {
        let listed = listed(format!("[{},{{\"Id\":\"short\"}}]", row("a", ON_BRIDGE)))
            .await
            .unwrap();
        assert_eq!(listed.rows.len(), 1);
        assert!(listed.incomplete.is_some());
    }

    #[tokio::test]
    async fn a_list_that_is_broken_is_an_error_and_not_an_empty_list() {
        let whole = format!("[{},{}]", row("a", ON_BRIDGE), row("b", ON_BRIDGE));
        for list in [&whole[..whole.len() - 1], &whole[..40], "{}", "", "null", "[1", FAILS] {
            let error = listed(list.to_owned()).await.unwrap_err().to_string();
            let expected = if list == FAILS {
                "status 500: broken"
            } else {
                "the list is not JSON as expected"
            };
            assert!(error.starts_with(expected), "{list}: {error}");
        }
        assert_eq!(listed("[]".to_owned()).await.unwrap(), Listed::default());
    }

    #[tokio::test]
    async fn events_that_are_huge_or_garbled_cost_themselves_only() {
        let id = "ab".repeat(32);
        let event = move |kind: &str, more: &str| {
            format!(
                "{{\"Type\":\"{kind}\",\"Action\":\"start\",\"Actor\":{{\"ID\":\"{id}\",\"Attributes\":{{{more}}}}}}}\n"
            )
        };
        let garbled = format!("{}\n", &event("container", "")[..30]);
        let huge = event("container", &format!("\"label\":\"{}\"", "x".repeat(20_000_000)));
        let large = event("container", &format!("\"label\":\"{}\"", "x".repeat(900_000)));
        let whole = event("container", "");
        let (_dir, engine) = engine(move |path| match path.contains("/events") {
            true => {
                let others = event("image", "") + &event("pod", "");
                Some(
                    [&whole, &garbled, &whole, &others, &huge, "\u{0}\u{1}\n", &large, &whole]
                        .map(String::from)
                        .concat(),
                )
            }
            false => version(path),
        });
        // With bollard an event of 20 MB takes 12 s.
        let events = timeout(
            Duration::from_secs(20),
            engine.subscribe().await.unwrap().collect::<Vec<_>>(),
        );
        let events = events.await.expect("read in time");
        let started = || Ok(Event::Started(ContainerId::parse(&"ab".repeat(32)).unwrap()));
        let lost = || Ok(Event::Unreadable);
        assert_eq!(
            events,
            [started(), lost(), started(), lost(), lost(), started(), started()]
        );
    }

    #[tokio::test]
    async fn a_subscription_that_the_engine_refuses_is_a_stream_that_breaks() {
        let (_dir, engine) = engine(|path| match path.contains("/events") {
            true => Some(FAILS.to_owned()),
            false => version(path),
        });
        let events: Vec<_> = engine.subscribe().await.unwrap().collect().await;
        assert_eq!(events, [Err(EngineError("status 500: broken".to_owned()))]);
    }

    #[tokio::test]
    async fn a_container_without_an_image_has_none_that_can_be_read() {
        // What Podman and Docker answer to a path without an ID is no image: a redirection, an error, or a list.
        let (_dir, engine) = engine(|path| match path.contains("/images/") {
            true => Some("[]".to_owned()),
            false => version(path),
        });
        drop(engine.subscribe().await.unwrap());
        for id in ["", "sha256:"] {
            assert_eq!(engine.image(id).await.unwrap(), None, "{id:?}");
        }
    }

    #[tokio::test]
    async fn an_image_without_its_configuration_cannot_be_read() {
        // The containerd store of Docker, if it has no content for a platform.
        let image = r#"{"Id":"sha256:ab","RepoTags":[],"Architecture":"","Os":"","Size":1,"RootFS":{"Type":""}}"#;
        let (_dir, engine) = engine(move |path| match path.contains("/images/") {
            true => Some(image.to_owned()),
            false => version(path),
        });
        drop(engine.subscribe().await.unwrap());
        assert_eq!(engine.image("sha256:ab").await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_is_not_there_is_none_and_an_engine_that_is_away_an_error_that_names_it() {
        let (dir, engine) = engine(version);
        drop(engine.subscribe().await.unwrap());
        let id = ContainerId::parse(&"ab".repeat(32)).unwrap();
        assert_eq!(engine.inspect(&id).await.unwrap(), None);
        assert_eq!(engine.network(&NetworkId::from("n")).await.unwrap(), None);
        assert_eq!(engine.image("sha256:x").await.unwrap(), None);
        let away = Engine::new(&format!("unix://{}/away.sock", dir.path().display()), Clock::system());
        let error = away.subscribe().await.err().unwrap().to_string();
        assert!(error.contains("away.sock"), "{error}");
        assert_eq!(away.containers().await.unwrap_err().to_string(), "not connected");
    }
}
