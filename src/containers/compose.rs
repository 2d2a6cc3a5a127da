//! What `docker compose config` prints → the containers that it would make, as far as their labels decide anything.
//!
//! Compose writes labels of its own, names and networks as it will (compose-spec, 05-services.md); a `$` of a value is
//! printed as `$$`. Image and id are not known before there is a container.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::pairs::Pairs;
use super::{Attachments, ContainerId, Definition, Endpoint, NetworkId, NetworkMode};

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
    services: BTreeMap<String, Service>,
    #[serde(default)]
    networks: BTreeMap<String, Option<Network>>,
}

#[derive(Deserialize, Default)]
struct Network {
    name: Option<String>,
    #[serde(default)]
    internal: bool,
}

#[derive(Deserialize)]
struct Service {
    container_name: Option<String>,
    image: Option<String>,
    /// Compose builds the image, with these labels in it.
    build: Option<Value>,
    hostname: Option<String>,
    network_mode: Option<String>,
    #[serde(default)]
    labels: MapOrList,
    #[serde(default)]
    environment: MapOrList,
    #[serde(default)]
    networks: MapOrList,
}

/// The labels that compose writes into the image that it builds: those of `build:`, which may be a path alone.
fn labels_of_build(build: Option<Value>) -> Result<MapOrList, ComposeError> {
    let labels = build.and_then(|mut build| build.get_mut("labels").map(Value::take));
    let labels = labels.filter(|labels| !labels.is_null()).map(serde_json::from_value);
    let labels = labels
        .transpose()
        .map_err(|_| ComposeError("build.labels: expected a mapping, or a list of NAME=VALUE".to_owned()))?;
    Ok(labels.unwrap_or_default())
}

/// What may be written as a mapping or as a list: of names, or of `name=value`.
#[derive(Deserialize)]
#[serde(untagged)]
enum MapOrList {
    Map(BTreeMap<String, Value>),
    List(Vec<String>),
}

impl Default for MapOrList {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl MapOrList {
    fn into_names(self) -> Vec<String> {
        match self {
            Self::Map(map) => map.into_keys().collect(),
            Self::List(list) => list,
        }
    }

    /// A variable without a value is the shell's, which is not known.
    fn into_pairs(self) -> Result<Vec<(String, String)>, ComposeError> {
        let pairs: Vec<(String, Value)> = match self {
            Self::Map(map) => map.into_iter().collect(),
            Self::List(list) => {
                let pairs = list.into_iter().map(|line| match line.split_once('=') {
                    Some((name, value)) => (name.to_owned(), Value::from(value)),
                    None => (line, Value::Null),
                });
                pairs.collect()
            }
        };
        let mut read = Vec::new();
        for (name, value) in pairs {
            let value = match value {
                Value::Null => continue,
                Value::String(text) => text.replace("$$", "$"),
                Value::Bool(it) => it.to_string(),
                Value::Number(it) => it.to_string(),
                Value::Array(_) | Value::Object(_) => {
                    return Err(ComposeError(format!(
                        "{name}: expected a text, a number, true or false"
                    )));
                }
            };
            read.push((name, value));
        }
        Ok(read)
    }
}

/// The containers that the services of a project would be: the first of each.
///
/// # Errors
/// If it is not what compose prints.
pub fn services(text: &str) -> Result<Vec<(Definition, Attachments)>, ComposeError> {
    let project: Project = serde_saphyr::from_str(text).map_err(|error| {
        // The message goes on with a picture of the place.
        let said = error.to_string();
        ComposeError(said.lines().next().unwrap_or_default().to_owned())
    })?;
    let Project {
        name,
        services,
        networks,
    } = project;
    let name = name.ok_or_else(|| ComposeError("it has no `name`, which is the project's".to_owned()))?;
    let services = services.into_iter();
    services
        .map(|(service, made_of)| made_of.define(&service, &name, &networks))
        .collect()
}

impl Service {
    fn define(
        self,
        service: &str,
        project: &str,
        networks: &BTreeMap<String, Option<Network>>,
    ) -> Result<(Definition, Attachments), ComposeError> {
        let of_service = |ComposeError(why)| ComposeError(format!("service {service}: {why}"));
        let image = labels_of_build(self.build).map_err(of_service)?;
        let image: BTreeMap<_, _> = image.into_pairs().map_err(of_service)?.into_iter().collect();
        let mut labels = image.clone();
        labels.extend(self.labels.into_pairs().map_err(of_service)?);
        let mut labels = Pairs::split(&labels, Some(&image));
        labels.insert(PROJECT, project);
        labels.insert(SERVICE, service);
        let variables = self.environment.into_pairs().map_err(of_service)?;
        let mut names = self.networks.into_names();
        if names.is_empty() && self.network_mode.is_none() {
            names.push("default".to_owned());
        }
        let endpoints = names.into_iter().map(|name| {
            let described = networks.get(&name).and_then(Option::as_ref);
            let network = described.and_then(|it| it.name.clone());
            let network = network.unwrap_or_else(|| format!("{project}_{name}"));
            let endpoint = Endpoint {
                mac: String::new(),
                ipv4: None,
                ipv6: None,
                internal: described.is_some_and(|it| it.internal),
                network: network.clone(),
            };
            (NetworkId::from(network.as_str()), endpoint)
        });
        let attachments = Attachments(endpoints.collect());
        let id = ContainerId::parse(&"0".repeat(ContainerId::DIGITS)).expect("zeros are digits");
        let definition = Definition {
            name: self.container_name.unwrap_or_else(|| format!("{project}-{service}-1")),
            labels,
            environment: Some(variables.into_iter().collect()),
            image_is_known: true,
            image: self.image.unwrap_or_else(|| format!("{project}-{service}")),
            image_id: String::new(),
            network_mode: NetworkMode::parse(self.network_mode.as_deref().unwrap_or_default()),
            hostname: self.hostname.unwrap_or_else(|| id.short().to_owned()),
            id,
        };
        Ok((definition, attachments))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::pairs::Origin;

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
        let made = services(PRINTED).unwrap();
        let [(orders, networks), (reports, none)] = made.as_slice() else {
            panic!("{made:?}")
        };
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
        let made = services(r#"{"name": "p", "services": {"a": {"labels": {"imds.role": "x"}}}}"#).unwrap();
        assert_eq!(made[0].0.labels.get_own("imds.role"), Some("x"));
        assert_eq!(made[0].1.0.values().next().unwrap().network, "p_default");
    }

    #[test]
    fn labels_of_the_build_are_labels_of_the_image() {
        let made = services(
            "name: p\nservices: { a: { build: { context: ., labels: { imds.role: x, imds.region: eu-west-1 } }, labels: { imds.role: x } } }",
        );
        let labels = &made.unwrap()[0].0.labels;
        assert_eq!(labels.get("imds.role"), Some(("x", Origin::Ambiguous)));
        assert_eq!(labels.get("imds.region"), Some(("eu-west-1", Origin::Ambiguous)));
        assert!(services("name: p\nservices: { a: { build: . } }").is_ok());
    }

    #[test]
    fn what_is_not_compose_is_said() {
        for (text, why) in [
            ("services: {}", "it has no `name`"),
            ("name: x", "services"),
            ("{", ""),
            (
                "name: x\nservices: { a: { labels: { b: [1] } } }",
                "service a: b: expected a text",
            ),
        ] {
            let said = services(text).unwrap_err().to_string();
            assert!(
                said.starts_with("not what `docker compose config` prints: ") && said.contains(why),
                "{text}: {said}"
            );
        }
    }
}
