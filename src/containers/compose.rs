//! What `docker compose config` prints → the containers that it would make, as far as their labels decide anything.
//!
//! Compose writes labels of its own, names and networks as it will (compose-spec, 05-services.md); a `$` of a value is
//! printed as `$$`. Image and id are not known before there is a container.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::label_sources::Pairs;
use super::{ContainerId, Definition, Endpoint, NetworkEndpoints, NetworkId, NetworkMode};

/// Labels that compose writes (docker/compose, `pkg/api/labels.go`).
pub const PROJECT: &str = "com.docker.compose.project";
/// The service of the project.
pub const SERVICE: &str = "com.docker.compose.service";
/// The number of the container in its service, from 1.
pub const CONTAINER_NUMBER: &str = "com.docker.compose.container-number";
/// A digest of the service's configuration.
const CONFIG_HASH: &str = "com.docker.compose.config-hash";

/// Counts compose's own labels as own on a container that compose created.
///
/// `docker compose build` writes project and service into the image, too (`getImageBuildLabels` of docker/compose), so that both
/// have the same pairs. Compose writes all of these labels on each container that it creates, and the last two on no image: if the
/// image does not have one of the two, compose created the container, and wrote the others as well.
pub fn own_labels(labels: &mut Pairs) {
    let is_compose = [CONFIG_HASH, CONTAINER_NUMBER];
    if is_compose.iter().any(|name| labels.get_own(name).is_some()) {
        labels.count_as_own(&[PROJECT, SERVICE, CONTAINER_NUMBER, CONFIG_HASH]);
    }
}

/// Why a text is not what `docker compose config` prints.
#[derive(Debug, thiserror::Error)]
#[error("not what `docker compose config` prints: {0}\nhint: docker compose config | imds-router check --compose -")]
pub struct ComposeError(String);

#[derive(Deserialize)]
struct Project {
    name: Option<String>,
    services: BTreeMap<String, Value>,
    #[serde(default)]
    networks: Option<BTreeMap<String, Option<Network>>>,
}

#[derive(Deserialize, Default)]
struct Network {
    name: Option<String>,
    #[serde(default)]
    internal: bool,
}

/// Values that may be `null` have the type [`Value`].
#[derive(Deserialize)]
struct Service {
    container_name: Option<String>,
    image: Option<String>,
    /// Compose builds the image, with these labels in it.
    #[serde(default)]
    build: Value,
    /// A swarm deploys it.
    #[serde(default)]
    deploy: Value,
    hostname: Option<String>,
    network_mode: Option<String>,
    #[serde(default)]
    labels: Value,
    #[serde(default)]
    environment: Value,
    #[serde(default)]
    networks: Value,
}

/// The containers that compose would create for a project.
#[derive(Debug)]
pub struct Composed {
    /// The project's name, where it is known.
    pub project: Option<String>,
    /// The first container of each service.
    pub containers: Vec<Container>,
}

/// The first container of a service.
#[derive(Debug)]
pub struct Container {
    /// As the engine would report it.
    pub definition: Definition,
    /// Its networks.
    pub attachments: NetworkEndpoints,
    /// Names of the labels below `deploy:` that the container does not have: a swarm writes them on the service only.
    pub labels_of_deploy: Vec<String>,
}

/// A mapping, or a list of names or of `name=value`. `null` is empty.
fn pairs(value: Value) -> Result<Vec<(String, Value)>, ComposeError> {
    let text = |item: Value| match item {
        Value::String(line) => Some(match line.split_once('=') {
            Some((name, value)) => (name.to_owned(), Value::from(value)),
            None => (line, Value::Null),
        }),
        _ => None,
    };
    let pairs = match value {
        Value::Null => Some(Vec::new()),
        Value::Object(map) => Some(map.into_iter().collect()),
        Value::Array(list) => list.into_iter().map(text).collect(),
        _ => None,
    };
    pairs.ok_or_else(|| ComposeError("expected a mapping, or a list of NAME=VALUE".to_owned()))
}

/// The same, with texts. A `$` is printed as `$$`. A name without a value has the value `without`, or is left out.
fn texts(value: Value, without: Option<&str>) -> Result<BTreeMap<String, String>, ComposeError> {
    let mut read = BTreeMap::new();
    for (name, value) in pairs(value)? {
        let value = match value {
            Value::Null => match without {
                Some(value) => value.to_owned(),
                None => continue,
            },
            Value::String(text) => text.replace("$$", "$"),
            Value::Bool(it) => it.to_string(),
            Value::Number(it) => it.to_string(),
            Value::Array(_) | Value::Object(_) => {
                return Err(ComposeError(format!(
                    "{name}: expected a text, a number, true or false"
                )));
            }
        };
        read.insert(name, value);
    }
    Ok(read)
}

/// Compose gives a label without a value the empty text.
fn labels(value: Value) -> Result<BTreeMap<String, String>, ComposeError> {
    texts(value, Some(""))
}

/// The value of a key in a mapping. `null`: the value is no mapping (`build: .`), or has no such key.
fn part(mut of: Value, key: &str) -> Value {
    of.get_mut(key).map(Value::take).unwrap_or_default()
}

/// The containers that the services of a project would be: the first of each. `project` overrides the name in the file, which
/// `docker-compose` 1 and `docker stack config` do not print.
///
/// # Errors
/// If it is not what compose prints.
pub fn services(text: &str, project: Option<&str>) -> Result<Composed, ComposeError> {
    let read: Project = serde_saphyr::from_str(text).map_err(|error| {
        // The message goes on with a picture of the place.
        let said = error.to_string();
        ComposeError(said.lines().next().unwrap_or_default().to_owned())
    })?;
    let name = project.map(str::to_owned).or(read.name);
    let networks = read.networks.unwrap_or_default();
    let containers = read.services.into_iter().map(|(service, value)| {
        let of_service = |why: String| ComposeError(format!("service {service}: {why}"));
        if !value.is_object() {
            return Err(of_service("expected a mapping".to_owned()));
        }
        let read: Service = serde_json::from_value(value).map_err(|error| of_service(error.to_string()))?;
        let defined = read.define(&service, name.as_deref(), &networks);
        defined.map_err(|ComposeError(why)| of_service(why))
    });
    Ok(Composed {
        containers: containers.collect::<Result<_, _>>()?,
        project: name,
    })
}

impl Service {
    fn define(
        self,
        service: &str,
        project: Option<&str>,
        networks: &BTreeMap<String, Option<Network>>,
    ) -> Result<Container, ComposeError> {
        let at = |key: &'static str| move |ComposeError(why)| ComposeError(format!("{key}: {why}"));
        let image = labels(part(self.build, "labels")).map_err(at("build.labels"))?;
        let mut all = image.clone();
        all.extend(labels(self.labels).map_err(at("labels"))?);
        let of_deploy = labels(part(self.deploy, "labels")).map_err(at("deploy.labels"))?;
        let labels_of_deploy = of_deploy.into_keys().filter(|name| !all.contains_key(name)).collect();
        let mut labels = Pairs::split(&all, Some(&image));
        if let Some(project) = project {
            labels.insert(PROJECT, project);
            labels.insert(SERVICE, service);
        }
        // A variable without a value is the shell's, which is not known.
        let variables = texts(self.environment, None).map_err(at("environment"))?;
        let names = pairs(self.networks).map_err(at("networks"))?;
        let mut names: Vec<String> = names.into_iter().map(|(name, _)| name).collect();
        if names.is_empty() && self.network_mode.is_none() {
            names.push("default".to_owned());
        }
        let in_project = |separator: &str, name: &str| match project {
            Some(project) => format!("{project}{separator}{name}"),
            None => name.to_owned(),
        };
        let endpoints = names.into_iter().map(|name| {
            let described = networks.get(&name).and_then(Option::as_ref);
            let network = described.and_then(|it| it.name.clone());
            let network = network.unwrap_or_else(|| in_project("_", &name));
            let endpoint = Endpoint {
                mac: String::new(),
                ipv4: None,
                ipv6: None,
                internal: described.is_some_and(|it| it.internal),
                network: network.clone(),
            };
            (NetworkId::from(network.as_str()), endpoint)
        });
        let attachments = NetworkEndpoints(endpoints.collect());
        let id = ContainerId::parse(&"0".repeat(ContainerId::DIGITS)).expect("zeros are digits");
        let name = format!("{}-1", in_project("-", service));
        let definition = Definition {
            name: self.container_name.unwrap_or(name),
            labels,
            environment: Some(variables.into_iter().collect()),
            image_is_known: true,
            image: self.image.unwrap_or_else(|| in_project("-", service)),
            image_id: String::new(),
            network_mode: NetworkMode::parse(self.network_mode.as_deref().unwrap_or_default()),
            hostname: self.hostname.unwrap_or_else(|| id.short().to_owned()),
            id,
        };
        Ok(Container {
            definition,
            attachments,
            labels_of_deploy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::label_sources::Origin;

    #[test]
    fn labels_that_compose_build_wrote_into_the_image_are_own_on_a_container_of_compose() {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let pairs = pairs.iter();
            pairs
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        let built = [(PROJECT, "shop"), (SERVICE, "orders")];
        for (started, origin) in [(&[][..], Origin::Ambiguous), (&[(CONTAINER_NUMBER, "1")], Origin::Own)] {
            let all = map(&[&built[..], started].concat());
            let mut labels = Pairs::split(&all, Some(&map(&built)));
            own_labels(&mut labels);
            assert_eq!(labels.get(PROJECT), Some(("shop", origin)));
        }
        // An image that has the number as well proves nothing.
        let all = map(&[(PROJECT, "shop"), (CONTAINER_NUMBER, "1")]);
        let mut labels = Pairs::split(&all, Some(&all));
        own_labels(&mut labels);
        assert_eq!(labels.get(PROJECT), Some(("shop", Origin::Ambiguous)));
    }

    const PRINTED: &str = r#"
name: shop
services:
  orders:
    image: shop/orders:1
    environment: { AWS_REGION: eu-west-1, PASSED_ON: null, WORKERS: 4 }
    labels:
      imds.role: orders
      imds.role.policy: '{"a": "$${aws:username}"}'
    networks: { default: null, inner: { ipv4_address: 10.1.2.3 } }
  reports:
    container_name: the-reports
    image: shop/reports
    hostname: reports
    network_mode: host
    environment: [ "A=b=c", UNSET ]
    labels: [ "imds.role=reports" ]
networks:
  default: { name: shop_default }
  inner: { name: elsewhere, internal: true }
"#;

    #[test]
    fn what_compose_prints_is_what_it_would_make() {
        let made = services(PRINTED, None).unwrap().containers;
        let [first, second] = made.as_slice() else {
            panic!("{made:?}")
        };
        let (orders, networks) = (&first.definition, &first.attachments);
        let (reports, none) = (&second.definition, &second.attachments);
        assert_eq!(
            (orders.name.as_str(), reports.name.as_str()),
            ("shop-orders-1", "the-reports")
        );
        let own = |value| Some((value, Origin::Own));
        assert_eq!((orders.project(), orders.service()), (own("shop"), own("orders")));
        assert_eq!(
            orders.labels.get_own("imds.role.policy"),
            Some(r#"{"a": "${aws:username}"}"#)
        );
        assert_eq!(reports.labels.get_own("imds.role"), Some("reports"));
        let variables = orders.environment.as_ref().unwrap();
        assert_eq!(
            (variables.get_own("WORKERS"), variables.get_own("PASSED_ON")),
            (Some("4"), None)
        );
        assert_eq!(reports.environment.as_ref().unwrap().get_own("A"), Some("b=c"));
        let names: Vec<_> = networks
            .0
            .values()
            .map(|it| (it.network.as_str(), it.internal))
            .collect();
        assert_eq!(names, [("elsewhere", true), ("shop_default", false)]);
        assert!(none.0.is_empty());
        assert_eq!(reports.network_mode, NetworkMode::Host);
    }

    #[test]
    fn json_is_read_as_well() {
        let text = r#"{"name": "p", "services": {"a": {"labels": {"imds.role": "x"}}}}"#;
        let made = services(text, None).unwrap().containers;
        assert_eq!(made[0].definition.labels.get_own("imds.role"), Some("x"));
        assert_eq!(made[0].attachments.0.values().next().unwrap().network, "p_default");
    }

    #[test]
    fn labels_of_the_build_are_labels_of_the_image() {
        let made = services(
            "name: p\nservices: { a: { build: { context: ., labels: { imds.role: x, imds.region: eu-west-1 } }, labels: { imds.role: x } } }",
            None,
        );
        let labels = &made.unwrap().containers[0].definition.labels;
        assert_eq!(labels.get("imds.role"), Some(("x", Origin::Ambiguous)));
        assert_eq!(labels.get("imds.region"), Some(("eu-west-1", Origin::Ambiguous)));
        assert!(services("name: p\nservices: { a: { build: . } }", None).is_ok());
    }

    /// The engine gets a label with an empty value, and the container has an error.
    #[test]
    fn labels_without_a_value_are_empty() {
        for text in [
            "name: p\nservices: { a: { labels: { imds.role: null } } }",
            "name: p\nservices: { a: { labels: { imds.role: } } }",
            "name: p\nservices: { a: { labels: [ imds.role ] } }",
            "name: p\nservices: { a: { labels: [ 'imds.role=' ] } }",
        ] {
            let made = services(text, None).unwrap();
            assert_eq!(
                made.containers[0].definition.labels.get_own("imds.role"),
                Some(""),
                "{text}"
            );
        }
        let text =
            "name: p\nservices: { a: { labels: null, environment: null, networks: null, build: null, deploy: null } }";
        let made = services(text, None).unwrap();
        assert_eq!(made.containers[0].definition.labels.get_own("imds.role"), None);
    }

    #[test]
    fn labels_of_a_swarms_service_are_not_those_of_its_containers() {
        let made = services(
            "services: { a: { labels: { imds.region: x }, deploy: { labels: [ imds.role=x, imds.region=x ] } } }",
            None,
        );
        let made = made.unwrap();
        assert_eq!(made.containers[0].labels_of_deploy, ["imds.role"]);
        assert_eq!(made.containers[0].definition.labels.get("imds.role"), None);
    }

    #[test]
    fn a_project_without_a_name() {
        let text = "services: { web: { labels: { imds.role: x } } }";
        let made = services(text, None).unwrap();
        assert_eq!(made.project, None);
        let web = &made.containers[0];
        assert_eq!(
            (web.definition.name.as_str(), web.definition.project()),
            ("web-1", None)
        );
        assert_eq!(web.attachments.0.values().next().unwrap().network, "default");
        let made = services(text, Some("shop")).unwrap();
        assert_eq!(made.containers[0].definition.name, "shop-web-1");
    }

    #[test]
    fn what_is_not_compose_is_said() {
        for (text, why) in [
            ("name: x", "services"),
            ("{", ""),
            (
                "name: x\nservices: { a: { labels: { b: [1] } } }",
                "service a: labels: b: expected a text",
            ),
            (
                "name: x\nservices: { a: { labels: text } }",
                "service a: labels: expected a mapping, or a list of NAME=VALUE",
            ),
            (
                "name: x\nservices: { a: { environment: [1] } }",
                "service a: environment: expected a mapping, or a list of NAME=VALUE",
            ),
            ("name: x\nservices: { a: null }", "service a: expected a mapping"),
        ] {
            let said = services(text, None).unwrap_err().to_string();
            assert!(
                said.starts_with("not what `docker compose config` prints: ") && said.contains(why),
                "{text}: {said}"
            );
        }
    }
}
