//! The instance identity document.

use std::net::Ipv4Addr;

use super::catalogue::Facts;
use super::quoted;
use crate::clock::rfc3339_seconds;

/// Version of the document's format, as EC2 writes it.
const VERSION: &str = "2017-09-30";

/// The document: EC2's fields in EC2's order; what a container has not is `null`, as on EC2. No last line end.
pub fn document(facts: &Facts) -> String {
    let text = |text: &str| Some(quoted(text));
    let fields = [
        ("accountId", text(&facts.account)),
        ("architecture", text(architecture())),
        ("availabilityZone", text(&facts.zone)),
        ("billingProducts", None),
        ("devpayProductCodes", None),
        ("marketplaceProductCodes", None),
        ("imageId", text(&facts.ami_id)),
        ("instanceId", text(&facts.instance_id)),
        ("instanceType", text(&facts.instance_type)),
        ("kernelId", None),
        ("pendingTime", text(&rfc3339_seconds(facts.started))),
        // Vector refuses a document in which this is not a string.
        (
            "privateIp",
            text(&facts.local_ipv4.unwrap_or(Ipv4Addr::UNSPECIFIED).to_string()),
        ),
        ("ramdiskId", None),
        ("region", text(&facts.region)),
        ("version", text(VERSION)),
    ];
    let lines: Vec<String> = fields
        .into_iter()
        .map(|(key, value)| format!("  {} : {}", quoted(key), value.unwrap_or_else(|| "null".to_owned())))
        .collect();
    format!("{{\n{}\n}}", lines.join(",\n"))
}

/// This machine's architecture as EC2 names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86" => "i386",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue::tests::facts;
    use super::*;

    #[test]
    fn the_document_is_json_with_ec2s_fields_in_ec2s_order() {
        let text = document(&facts());
        assert!(
            text.starts_with("{\n  \"accountId\" : \"123456789012\",\n  \"architecture\" : "),
            "{text}"
        );
        assert!(
            text.ends_with("  \"region\" : \"us-east-1\",\n  \"version\" : \"2017-09-30\"\n}"),
            "{text}"
        );
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(read["privateIp"], "172.17.0.5");
        assert_eq!(read["pendingTime"], "2026-01-05T10:04:05Z");
        assert!(read["kernelId"].is_null());
    }
}
