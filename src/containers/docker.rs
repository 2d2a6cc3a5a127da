//! [`ContainerEngine`] on bollard: Docker, and whatever speaks its API.
//!
//! bollard's enums are closed: one row with a state that it does not know fails the whole list, one such event ends the
//! stream. So the engine filters by type and action, a list that fails is asked again state by state, and a stream that
//! ends is subscribed again (the watcher resynchronises).

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{
    ContainerSummary, ContainerSummaryStateEnum, EventMessage, EventMessageTypeEnum, NetworkInspect,
    SystemVersionComponents,
};
use bollard::query_parameters::{
    EventsOptions, InspectContainerOptions, InspectNetworkOptions, ListContainersOptions, StopContainerOptions,
};
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use futures_util::{FutureExt as _, future};
use tracing::{debug, warn};

use super::images::Image;
use super::watcher::{ContainerEngine, EngineError, Event, Inspection, Network, Row, Run};
use super::{ContainerId, Endpoint, Environment, NetworkId, NetworkMode};
use crate::clock::Clock;
use crate::telemetry::{printable, with_causes};

/// Where Docker listens when nobody says otherwise.
pub const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

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

/// States of containers in the engine's list (Docker API 1.41 to 1.53), for asking state by state.
const STATES: &[&str] = &[
    "created",
    "running",
    "paused",
    "restarting",
    "removing",
    "exited",
    "dead",
];

/// How far back events are asked for at subscription: whatever happens while the request is on its way is repeated.
const OVERLAP: Duration = Duration::from_secs(2);

/// An engine at an address.
#[derive(Clone)]
pub struct Engine {
    host: String,
    clock: Clock,
    client: Arc<ArcSwapOption<Docker>>,
    lag: Arc<Lag>,
    is_podman: Arc<AtomicBool>,
    images: Arc<ArcSwap<ImagesOfEngine>>,
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
            client: Arc::default(),
            lag: Arc::default(),
            is_podman: Arc::default(),
            images: Arc::default(),
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
        match self.client.load_full() {
            Some(client) => ask(Docker::clone(&client)).boxed(),
            None => future::ready(Err(EngineError("not connected".to_owned()))).boxed(),
        }
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
    fn tell_which(&self, row: &ContainerSummary) -> bool {
        let Some(manifest) = &row.image_manifest_descriptor else {
            return !self.has_indexes;
        };
        if manifest.digest.is_some() && manifest.digest == row.image_id {
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

fn filters(pairs: &[(&str, &[&str])]) -> Option<HashMap<String, Vec<String>>> {
    let owned = |values: &[&str]| values.iter().map(|it| (*it).to_owned()).collect();
    Some(
        pairs
            .iter()
            .map(|(key, values)| ((*key).to_owned(), owned(values)))
            .collect(),
    )
}

impl ContainerEngine for Engine {
    fn announces_late(&self) -> bool {
        self.is_podman.load(Ordering::Relaxed)
    }

    fn subscribe(&self) -> BoxFuture<'static, Result<BoxStream<'static, Event>, EngineError>> {
        let this = self.clone();
        async move {
            let at = |error| {
                let EngineError(why) = failed(error);
                EngineError(format!("{}: {why}", this.host))
            };
            let client = Docker::connect_with_host(&this.host)
                .map_err(at)?
                .negotiate_version()
                .await
                .map_err(at)?;
            this.client.store(Some(Arc::new(client.clone())));
            let version = client.version().await.map_err(at)?;
            let is_podman = |component: &SystemVersionComponents| component.name.starts_with("Podman");
            let components = version.components.unwrap_or_default();
            let is_podman = components.iter().any(is_podman);
            this.is_podman.store(is_podman, Ordering::Relaxed);
            let has_indexes = !is_podman && uses_containerd(&client).await.map_err(at)?;
            this.images.store(Arc::new(ImagesOfEngine {
                has_indexes,
                os: version.os.unwrap_or_default(),
                architecture: version.arch.unwrap_or_default(),
            }));
            let since = this.clock.wall_seconds().saturating_sub(OVERLAP.as_secs());
            let options = EventsOptions {
                since: Some(since.to_string()),
                filters: filters(&[("type", &["container", "network"]), ("event", ACTIONS)]),
                ..EventsOptions::default()
            };
            let subscribed = this.clock.wall();
            let events = client.events(Some(options)).map(move |event| match event {
                Ok(event) => {
                    let made = event.time_nano.and_then(|nanos| u64::try_from(nanos).ok());
                    let made = made.map(|nanos| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos));
                    // What is told again was made before.
                    if let Some(made) = made.filter(|made| *made >= subscribed) {
                        this.lag.note(made, &this.clock);
                    }
                    Some(event)
                }
                Err(error) => {
                    warn!(
                        error = failed(error).0,
                        "the stream of events has broken; subscribing again"
                    );
                    None
                }
            });
            // The stream ends with the first error.
            let events = events.take_while(|event| future::ready(event.is_some()));
            Ok(events
                .filter_map(|event| future::ready(event.and_then(read_event)))
                .boxed())
        }
        .boxed()
    }

    fn containers(&self) -> BoxFuture<'static, Result<Vec<Row>, EngineError>> {
        let images = self.images.load_full();
        self.ask(|docker| async move {
            let list = |states: Option<&'static str>| {
                let filters = states.and_then(|state| filters(&[("status", &[state])]));
                let options = ListContainersOptions {
                    all: true,
                    filters,
                    ..ListContainersOptions::default()
                };
                let docker = docker.clone();
                async move { docker.list_containers(Some(options)).await }
            };
            let rows = match list(None).await {
                Ok(rows) => rows,
                Err(error) => {
                    debug!(
                        error = failed(error).0,
                        "the list of containers is unreadable; asking state by state"
                    );
                    let mut rows = Vec::new();
                    for state in STATES {
                        match list(Some(state)).await {
                            Ok(more) => rows.extend(more),
                            // A state that this engine does not know, or rows of it that cannot be read: theirs alone.
                            Err(
                                Error::JsonDataError { .. } | Error::DockerResponseServerError { status_code: 400, .. },
                            ) => {
                                warn!(state, "containers of this state are unreadable; they are not served");
                            }
                            Err(error) => return Err(failed(error)),
                        }
                    }
                    rows
                }
            };
            read_rows(&docker, &images, rows).await
        })
    }

    fn container(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<Row>, EngineError>> {
        let (id, images) = (id.clone(), self.images.load_full());
        self.ask(|docker| async move {
            let filters = filters(&[("id", &[id.as_str()])]);
            let options = ListContainersOptions {
                all: true,
                filters,
                ..ListContainersOptions::default()
            };
            let rows = docker.list_containers(Some(options)).await.map_err(failed)?;
            let rows = read_rows(&docker, &images, rows).await?;
            Ok(rows.into_iter().find(|row| row.id == id))
        })
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

fn read_event(event: EventMessage) -> Option<Event> {
    let actor = event.actor?;
    let subject = actor.id?;
    let attribute = |name: &str| actor.attributes.as_ref().and_then(|attributes| attributes.get(name));
    match (event.typ?, event.action?.as_str()) {
        (EventMessageTypeEnum::CONTAINER, action) => {
            let id = ContainerId::parse(&subject)?;
            Some(match action {
                "start" | "init" => Event::Started(id),
                "die" => Event::Died(id),
                "destroy" | "remove" => Event::Removed(id),
                _ => Event::Defined(id),
            })
        }
        (EventMessageTypeEnum::NETWORK, action) => {
            let network = NetworkId::from(subject.as_str());
            match action {
                "connect" => Some(Event::Connected(
                    network,
                    attribute("container").and_then(|id| ContainerId::parse(id)),
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

/// Podman's list does not say which network mode a container has; its inspections do.
async fn read_rows(
    docker: &Docker,
    images: &ImagesOfEngine,
    rows: Vec<ContainerSummary>,
) -> Result<Vec<Row>, EngineError> {
    let rows = futures_util::stream::iter(rows).map(|row| async {
        let told = row.host_config.as_ref().is_some_and(|it| it.network_mode.is_some());
        let Some(mut row) = read_row(row, images) else {
            return Ok(None);
        };
        if !told {
            let answer = docker.inspect_container(row.id.as_str(), None::<InspectContainerOptions>);
            let host_config = absent(answer.await)?.and_then(|answer| answer.host_config);
            let mode = host_config.and_then(|config| config.network_mode);
            row.network_mode = mode.as_deref().map(NetworkMode::parse).unwrap_or_default();
        }
        Ok(Some(row))
    });
    let rows = rows.buffered(AT_ONCE).try_filter_map(future::ok);
    rows.try_collect().await
}

fn read_row(row: ContainerSummary, images: &ImagesOfEngine) -> Option<Row> {
    let image_is_certain = images.tell_which(&row);
    let id = ContainerId::parse(row.id.as_deref()?)?;
    let name = row.names.and_then(|names| {
        names
            .into_iter()
            .map(|name| name.trim_start_matches('/').to_owned())
            .min_by_key(String::len)
    });
    let mode = row.host_config.and_then(|config| config.network_mode);
    Some(Row {
        name: name.unwrap_or_else(|| id.short().to_owned()),
        labels: row.labels.unwrap_or_default().into_iter().collect(),
        image: row.image.unwrap_or_default(),
        image_id: row.image_id.unwrap_or_default(),
        image_is_certain,
        network_mode: mode.as_deref().map(NetworkMode::parse).unwrap_or_default(),
        running: matches!(
            row.state,
            Some(ContainerSummaryStateEnum::RUNNING | ContainerSummaryStateEnum::PAUSED)
        ),
        id,
    })
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
        let row = |manifest: &str| -> ContainerSummary {
            serde_json::from_str(&format!(r#"{{"Id":"x","ImageID":"sha256:aa"{manifest}}}"#)).unwrap()
        };
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
            assert_eq!(images(has_indexes, own).tell_which(&row), certain, "{own} {row:?}");
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
        assert!(!engine.containers().await.unwrap()[0].image_is_certain);
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
        let rows = engine.containers().await.unwrap();
        let modes: Vec<_> = rows.into_iter().map(|row| row.network_mode).collect();
        assert_eq!(modes, [NetworkMode::Host, NetworkMode::Own, NetworkMode::Own]);
    }

    #[tokio::test]
    async fn a_row_that_cannot_be_read_costs_those_of_its_state_only() {
        let row = |digit: &str, state: &str| format!("{{\"Id\":\"{}\",\"State\":\"{state}\"}}", digit.repeat(64));
        let (_dir, engine) = engine(move |path| {
            // Podman says `stopped`, which bollard does not know.
            let rows = match path {
                _ if path.contains("\"status\":[\"running\"]") => vec![row("a", "running")],
                _ if path.contains("\"status\":[\"exited\"]") => vec![row("b", "stopped")],
                _ if path.contains("\"status\":") => vec![],
                _ if path.contains("/containers/json") => vec![row("a", "running"), row("b", "stopped")],
                _ => return version(path),
            };
            Some(format!("[{}]", rows.join(",")))
        });
        drop(engine.subscribe().await.unwrap());
        let rows = engine.containers().await.unwrap();
        assert_eq!(
            rows.iter().map(|row| row.id.short()).collect::<Vec<_>>(),
            ["aaaaaaaaaaaa"]
        );
        assert!(rows[0].running);
    }

    #[tokio::test]
    async fn an_event_that_cannot_be_read_ends_the_stream_and_one_of_others_does_not() {
        let id = "ab".repeat(32);
        let (_dir, engine) = engine(move |path| {
            let event =
                |kind: &str| format!("{{\"Type\":\"{kind}\",\"Action\":\"start\",\"Actor\":{{\"ID\":\"{id}\"}}}}\n");
            match path.contains("/events") {
                true => Some(
                    [
                        event("container"),
                        event("image"),
                        event("container"),
                        event("pod"),
                        event("container"),
                    ]
                    .concat(),
                ),
                false => version(path),
            }
        });
        let events: Vec<_> = engine.subscribe().await.unwrap().collect().await;
        assert_eq!(events.len(), 2, "{events:?}");
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
