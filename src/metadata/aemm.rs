//! Values from a file: the configuration of amazon-ec2-metadata-mock (AEMM), which is JSON, under its own key names.
//!
//! `metadata.values` has the values, by key; `metadata.paths` says where each stands, and AEMM's own paths hold for what it
//! does not name. What AEMM needs for itself (its port, its events, its one role) is passed over: here each container has its
//! own.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::crawl::is_of_another_link;
use super::tree::{self, MACS, PathError};

/// What a file gives.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Given {
    /// Values by path, from the version on.
    pub values: BTreeMap<String, String>,
    /// User data.
    pub user_data: Option<Bytes>,
}

/// A file, as AEMM writes it.
#[derive(Deserialize, Serialize, Default)]
struct File {
    #[serde(default)]
    metadata: Section,
    #[serde(default)]
    dynamic: Section,
    #[serde(default)]
    userdata: Section,
}

#[derive(Deserialize, Serialize, Default)]
struct Section {
    #[serde(default)]
    paths: BTreeMap<String, String>,
    #[serde(default)]
    values: BTreeMap<String, Value>,
}

/// Keys whose paths do not follow from their names, and the paths that AEMM has for them, below `meta-data/`.
const PATHS: &[(&str, &str)] = &[
    ("block-device-mapping-ami", "block-device-mapping/ami"),
    ("block-device-mapping-ebs", "block-device-mapping/ebs0"),
    ("block-device-mapping-ephemeral", "block-device-mapping/ephemeral0"),
    ("block-device-mapping-root", "block-device-mapping/root"),
    ("block-device-mapping-swap", "block-device-mapping/swap"),
    (
        "elastic-inference-accelerator",
        "elastic-inference/associations/eia-bfa21c7904f64a82a21b9f4540169ce1",
    ),
    ("mac-device-number", "network/interfaces/macs/{mac}/device-number"),
    (
        "mac-ipv4-associations",
        "network/interfaces/macs/{mac}/ipv4-associations/192.0.2.54",
    ),
    ("mac-ipv6-associations", "network/interfaces/macs/{mac}/ipv6s"),
    ("mac-local-hostname", "network/interfaces/macs/{mac}/local-hostname"),
    ("mac-local-ipv4s", "network/interfaces/macs/{mac}/local-ipv4s"),
    ("mac-mac", "network/interfaces/macs/{mac}/mac"),
    ("mac-network-interface-id", "network/interfaces/macs/{mac}/interface-id"),
    (
        "mac-network-interface-card-index",
        "network/interfaces/macs/{mac}/network-card-index",
    ),
    ("mac-owner-id", "network/interfaces/macs/{mac}/owner-id"),
    ("mac-public-hostname", "network/interfaces/macs/{mac}/public-hostname"),
    ("mac-public-ipv4s", "network/interfaces/macs/{mac}/public-ipv4s"),
    (
        "mac-security-group-ids",
        "network/interfaces/macs/{mac}/security-group-ids",
    ),
    ("mac-security-groups", "network/interfaces/macs/{mac}/security-groups"),
    ("mac-subnet-id", "network/interfaces/macs/{mac}/subnet-id"),
    (
        "mac-subnet-ipv4-cidr-block",
        "network/interfaces/macs/{mac}/subnet-ipv4-cidr-block",
    ),
    (
        "mac-subnet-ipv6-cidr-blocks",
        "network/interfaces/macs/{mac}/subnet-ipv6-cidr-blocks",
    ),
    ("mac-vpc-id", "network/interfaces/macs/{mac}/vpc-id"),
    (
        "mac-vpc-ipv4-cidr-block",
        "network/interfaces/macs/{mac}/vpc-ipv4-cidr-block",
    ),
    (
        "mac-vpc-ipv4-cidr-blocks",
        "network/interfaces/macs/{mac}/vpc-ipv4-cidr-blocks",
    ),
    (
        "mac-vpc-ipv6-cidr-blocks",
        "network/interfaces/macs/{mac}/vpc-ipv6-cidr-blocks",
    ),
    ("placement-availability-zone", "placement/availability-zone"),
    ("placement-availability-zone-id", "placement/availability-zone-id"),
    ("placement-group-name", "placement/group-name"),
    ("placement-host-id", "placement/host-id"),
    ("placement-partition-number", "placement/partition-number"),
    ("placement-region", "placement/region"),
    ("public-key", "public-keys/0/openssh-key"),
    ("services-domain", "services/domain"),
    ("services-partition", "services/partition"),
    ("tags-instance-name", "tags/instance/Name"),
    ("tags-instance-test", "tags/instance/Test"),
];

/// Keys that AEMM has and that are no values of a tree: what it makes events and listings of.
const NO_VALUES: &[&str] = &["event-id", "elastic-inference-associations"];

/// Reads a file.
///
/// # Errors
/// What is wrong, where, and what was expected.
pub fn read(text: &str) -> Result<Given, String> {
    let strange = |error: serde_json::Error| {
        format!("not what was expected: JSON with metadata.values, as amazon-ec2-metadata-mock has it: {error}")
    };
    let object: serde_json::Map<String, Value> = serde_json::from_str(text).map_err(strange)?;
    let file: File = serde_json::from_value(Value::Object(object)).map_err(strange)?;
    let mut given = Given::default();
    for (key, value) in &file.metadata.values {
        let named = file.metadata.paths.get(key);
        let own = PATHS.iter().find(|(known, _)| known == key);
        let path = match (named, own) {
            (Some(path), _) => below_version(path),
            (None, Some((_, path))) => format!("meta-data/{path}"),
            (None, None) => format!("meta-data/{key}"),
        };
        match value {
            _ if NO_VALUES.contains(&key.as_str()) || key.starts_with("iam-") || path.starts_with(tree::IAM) => {}
            Value::Object(tags) if key == "tags-instance" => {
                for (tag, value) in tags {
                    insert(&mut given, key, format!("{}{tag}", tree::TAGS), value)?;
                }
            }
            value => insert(&mut given, key, path, value)?,
        }
    }
    let monitoring = file.dynamic.values.get("fws-instance-monitoring");
    if let Some(monitoring) = monitoring {
        insert(
            &mut given,
            "fws-instance-monitoring",
            "dynamic/fws/instance-monitoring".to_owned(),
            monitoring,
        )?;
    }
    if let Some(Value::String(data)) = file.userdata.values.get("userdata") {
        let data = STANDARD
            .decode(data)
            .map_err(|_| "userdata.values.userdata: expected base64".to_owned())?;
        if data.len() > MOST_USER_DATA {
            return Err(format!(
                "userdata.values.userdata: expected at most {MOST_USER_DATA} bytes"
            ));
        }
        given.user_data = (!data.is_empty()).then(|| data.into());
    }
    Ok(given)
}

/// The most that user data may be, raw (EC2 user guide, "Run commands at launch using user data").
pub const MOST_USER_DATA: usize = 16 * 1024;

/// Writes a file that [`read`] reads, and AEMM, too: of what stood at these paths, all that can be given. Of several links, the
/// first one's.
pub fn write(found: &BTreeMap<String, String>, user_data: Option<&[u8]>) -> String {
    let mut file = File::default();
    for (path, value) in found {
        let value = value.trim_end_matches('\n');
        if is_of_another_link(path, found) || tree::known(path, value).is_err() {
            continue;
        }
        let (section, key) = match path.strip_prefix("meta-data/") {
            Some(key) => (&mut file.metadata, key.to_owned()),
            None => (&mut file.dynamic, path.trim_start_matches("dynamic/").replace('/', "-")),
        };
        section.paths.insert(key.clone(), format!("/latest/{path}"));
        section.values.insert(key, value.into());
    }
    if let Some(data) = user_data {
        let key = || "userdata".to_owned();
        file.userdata.paths.insert(key(), "/latest/user-data".to_owned());
        file.userdata.values.insert(key(), STANDARD.encode(data).into());
    }
    // Nothing in it that could not be written as JSON.
    serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
}

fn insert(given: &mut Given, key: &str, path: String, value: &Value) -> Result<(), String> {
    let value = match value {
        Value::Null => return Ok(()),
        Value::String(text) if text.is_empty() => return Ok(()),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match tree::known(&path, &value) {
        Ok(()) => {
            given.values.insert(path, value);
            Ok(())
        }
        Err(error @ PathError::Value) => Err(format!("values.{key} = {value:?}: {error}")),
        Err(error) => Err(format!("values.{key}, at {path}: {error}")),
    }
}

/// `/latest/meta-data/x` → `meta-data/x`, and any link's MAC address is that of the first.
fn below_version(path: &str) -> String {
    let path = path.trim_matches('/');
    let path = path.split_once('/').map_or(path, |(_, below)| below);
    match path.strip_prefix(MACS).and_then(|rest| rest.split_once('/')) {
        Some((_, rest)) => format!("{MACS}{}/{rest}", tree::MAC),
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_aemm_is_read_under_its_key_names() {
        let text = r#"{
            "server": {"hostname": "0.0.0.0", "port": "1338"}, "imdsv2": true, "spot": {"action": "stop"},
            "metadata": {
                "paths": {"own": "/latest/meta-data/placement/host-id",
                          "mac-vpc-id": "/latest/meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id",
                          "iam-info": "/latest/meta-data/iam/info"},
                "values": {"instance-type": "m4.xlarge", "placement-region": "us-east-1", "mac-vpc-id": "vpc-1",
                           "own": "h-1", "ramdisk-id": "", "iam-info": {"Code": "Success"}, "event-id": "e",
                           "iam-security-credentials-role": "baskinc-role",
                           "tags-instance": {"Name": "n"}, "elastic-inference-accelerator": {"version_2018_04_12": {}}}},
            "dynamic": {"values": {"instance-identity-document": {}, "fws-instance-monitoring": "enabled"}},
            "userdata": {"values": {"userdata": "MTIzNA=="}}
        }"#;
        let given = read(text).unwrap();
        let values: Vec<_> = given
            .values
            .iter()
            .map(|(path, value)| format!("{path}={value}"))
            .collect();
        assert_eq!(
            values,
            [
                "dynamic/fws/instance-monitoring=enabled",
                "meta-data/elastic-inference/associations/eia-bfa21c7904f64a82a21b9f4540169ce1={\"version_2018_04_12\":{}}",
                "meta-data/instance-type=m4.xlarge",
                "meta-data/network/interfaces/macs/{mac}/vpc-id=vpc-1",
                "meta-data/placement/host-id=h-1",
                "meta-data/placement/region=us-east-1",
                "meta-data/tags/instance/Name=n",
            ]
        );
        assert_eq!(given.user_data.as_deref(), Some(&b"1234"[..]));
        assert_eq!(read("{}"), Ok(Given::default()));
    }

    #[test]
    fn what_is_written_is_read_again_but_for_secrets_and_signatures() {
        let found = [
            ("meta-data/instance-type", "m7i.large"),
            ("meta-data/mac", "0e:49:61:0f:c3:11"),
            ("meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id", "vpc-1"),
            ("meta-data/network/interfaces/macs/0e:49:61:0f:c3:12/vpc-id", "vpc-2"),
            ("meta-data/public-keys/0/openssh-key", "ssh-rsa AAAA me\n"),
            ("meta-data/iam/security-credentials/app", "{}"),
            (
                "meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
                "{}",
            ),
            ("meta-data/something-new", "x"),
            ("dynamic/fws/instance-monitoring", "enabled"),
            ("dynamic/instance-identity/signature", "abc"),
        ];
        let found = found.map(|(path, value)| (path.to_owned(), value.to_owned())).into();
        let text = write(&found, Some(&[0, 255]));
        assert!(!text.contains("credentials") && !text.contains("abc"), "{text}");
        let given = read(&text).unwrap();
        let values: Vec<_> = given
            .values
            .iter()
            .map(|(path, value)| format!("{path}={value}"))
            .collect();
        assert_eq!(
            values,
            [
                "dynamic/fws/instance-monitoring=enabled",
                "meta-data/instance-type=m7i.large",
                "meta-data/mac=0e:49:61:0f:c3:11",
                "meta-data/network/interfaces/macs/{mac}/vpc-id=vpc-1",
                "meta-data/public-keys/0/openssh-key=ssh-rsa AAAA me",
            ]
        );
        assert_eq!(given.user_data.as_deref(), Some(&[0, 255][..]));
    }

    #[test]
    fn every_path_of_aemm_is_one_of_the_table() {
        for (key, path) in PATHS {
            assert_eq!(tree::known(&format!("meta-data/{path}"), "x"), Ok(()), "{key}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_key() {
        for (text, why) in [
            ("[]", "not what was expected: JSON with metadata.values"),
            (
                r#"{"metadata": {"values": {"instance-typ": "x"}}}"#,
                "values.instance-typ, at meta-data/instance-typ: there is no such category",
            ),
            (
                r#"{"metadata": {"values": {"placement": "x"}}}"#,
                "values.placement, at meta-data/placement: that is a directory",
            ),
            (
                r#"{"metadata": {"values": {"ami-id": "a\nb"}}}"#,
                "values.ami-id = \"a\\nb\": expected text without control characters",
            ),
            (
                r#"{"userdata": {"values": {"userdata": "%"}}}"#,
                "userdata.values.userdata: expected base64",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(why), "{error}");
        }
    }
}
