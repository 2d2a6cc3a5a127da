//! Variables of a container by which its SDKs do not ask this service, or ask another source of credentials first.

use crate::containers::label_sources::Pairs;

/// Variables, and their effect. The order is that of the SDKs' chains.
const SOURCES: &[(&str, &str)] = &[
    ("AWS_EC2_METADATA_DISABLED", "SDKs never ask this service"),
    (
        "AWS_EC2_METADATA_SERVICE_ENDPOINT",
        "SDKs ask the service at that address",
    ),
    ("AWS_ACCESS_KEY_ID", "SDKs use these keys first"),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "SDKs exchange this token first"),
    ("AWS_PROFILE", "SDKs use this profile first"),
    ("AWS_SHARED_CREDENTIALS_FILE", "SDKs read this file first"),
    ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "SDKs ask this endpoint first"),
    ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "SDKs ask this endpoint first"),
];

/// The names of such variables and their effects. Values may be secret. `None`: no such variable is set.
pub(super) fn other_sources(environment: &Pairs) -> Option<String> {
    let found: Vec<_> = SOURCES
        .iter()
        .filter(|(name, _)| {
            let value = environment.get(name).map_or("", |(value, _)| value);
            match *name {
                "AWS_EC2_METADATA_DISABLED" => value.eq_ignore_ascii_case("true"),
                _ => !value.is_empty(),
            }
        })
        .map(|(name, effect)| format!("{name} is set: {effect}"))
        .collect();
    (!found.is_empty()).then(|| found.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_sources_of_credentials_are_named_without_their_values() {
        let found = |pairs: &[(&str, &str)]| {
            let pairs = pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            other_sources(&pairs.collect())
        };
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[("AWS_REGION", "eu-west-1"), ("AWS_ACCESS_KEY_ID", "")]), None);
        assert_eq!(found(&[("AWS_EC2_METADATA_DISABLED", "false")]), None);
        assert_eq!(
            found(&[("AWS_EC2_METADATA_DISABLED", "True")]).as_deref(),
            Some("AWS_EC2_METADATA_DISABLED is set: SDKs never ask this service")
        );
        assert_eq!(
            found(&[
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1/x"),
                ("AWS_ACCESS_KEY_ID", "AKIA"),
                ("AWS_SECRET_ACCESS_KEY", "hidden"),
            ])
            .as_deref(),
            Some(
                "AWS_ACCESS_KEY_ID is set: SDKs use these keys first; \
                 AWS_CONTAINER_CREDENTIALS_FULL_URI is set: SDKs ask this endpoint first"
            )
        );
    }

    #[test]
    fn variables_of_the_image_count() {
        let all = [("AWS_PROFILE".to_owned(), "dev".to_owned())].into();
        let pairs = Pairs::split(&all, Some(&all));
        assert_eq!(
            other_sources(&pairs).as_deref(),
            Some("AWS_PROFILE is set: SDKs use this profile first")
        );
    }
}
