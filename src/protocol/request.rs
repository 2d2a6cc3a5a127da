//! The instance metadata service, versions 1 and 2: a request becomes a [`Call`], credentials become a document.
//!
//! Sections 1 and 2 of EC2's documentation of IMDS; what it leaves open follows captures of the real service.

use std::time::SystemTime;

use bytes::Bytes;
use hyper::header::{self, HeaderMap, HeaderName};
use hyper::http::request::Parts;
use hyper::{Method, Uri};

use super::token::TTL_SECONDS;
use super::{Refused, TOKEN_HEADER, TTL_HEADER};
use crate::clock::rfc3339_seconds;
use crate::credentials::Credentials;
use crate::metadata::document;

/// Path of tokens. Other versions and a slash at the end are refused by EC2.
const TOKEN_PATH: &str = "/latest/api/token";

/// Names under which IMDS is asked, beside the operator's own.
const HOSTS: &[&str] = &[
    "169.254.169.254",
    "[fd00:ec2::254]",
    "instance-data",
    "instance-data.ec2.internal",
];

/// Versions of the tree as `GET /` lists them (a capture of 2024), without `latest`. All serve the same tree.
pub const VERSIONS: &[&str] = &[
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "2011-01-01",
    "2011-05-01",
    "2012-01-12",
    "2014-02-25",
    "2014-11-05",
    "2015-10-20",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "2021-07-15",
    "2022-09-24",
    "2024-04-11",
];

/// What a request asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    /// A token that is good for so many seconds.
    IssueToken(u32),
    /// What the path of tokens takes.
    TokenOptions,
    /// A value.
    Get {
        /// Where in the tree, as it was typed: see [`Place`].
        place: Place,
        /// The token, if there was a header of it: then it must be good, whatever the options say.
        token: Option<Vec<u8>>,
    },
}

/// A place in the tree of metadata.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// `/`: the versions.
    Versions,
    /// A path below a version, without slashes at its ends: `meta-data/instance-id`.
    Below(String),
    /// A path whose first part is no version, or that is no text.
    Nowhere,
}

/// Reads a request. `hosts`: the operator's own names of this service, in lower case.
///
/// # Errors
/// What is refused before any token or path is looked at, in EC2's order: host, method; for the PUT: path, proxy, TTL.
pub fn parse(request: &Parts, hosts: &[String]) -> Result<Call, Refused> {
    if !asks_us(request, hosts) {
        return Err(Refused::Host);
    }
    let path = request.uri.path();
    match (&request.method, path == TOKEN_PATH) {
        (&Method::PUT, true) => token_call(&request.headers),
        (&Method::PUT, false) => Err(Refused::Put),
        (&Method::OPTIONS, true) => Ok(Call::TokenOptions),
        (_, true) => Err(Refused::TokenMethod),
        (&Method::GET | &Method::HEAD, false) => Ok(Call::Get {
            place: place(path),
            token: sent_token(&request.headers),
        }),
        _ => Err(Refused::Method),
    }
}

/// Whether the request names this service as its host. A web page that was rebound to our address names its own; any
/// page sends `Origin`. A request without `Host` is not from a browser.
fn asks_us(request: &Parts, hosts: &[String]) -> bool {
    if request.headers.contains_key(header::ORIGIN) {
        return false;
    }
    let mut named = request.headers.get_all(header::HOST).iter();
    let host = match (named.next(), named.next()) {
        (Some(host), None) => host.to_str().ok(),
        (None, _) => Some(""),
        (Some(_), Some(_)) => None,
    };
    let known = |authority: &str| authority.is_empty() || is_ours(authority, hosts);
    host.is_some_and(known) && authority(&request.uri).is_none_or(known)
}

fn authority(uri: &Uri) -> Option<&str> {
    uri.authority().map(hyper::http::uri::Authority::as_str)
}

fn is_ours(authority: &str, hosts: &[String]) -> bool {
    let name = authority.strip_suffix(":80").unwrap_or(authority);
    HOSTS.iter().any(|host| host.eq_ignore_ascii_case(name)) || hosts.iter().any(|host| host.eq_ignore_ascii_case(name))
}

fn token_call(headers: &HeaderMap) -> Result<Call, Refused> {
    const PROXIED: [HeaderName; 2] = [HeaderName::from_static("x-forwarded-for"), header::FORWARDED];
    if PROXIED.iter().any(|name| headers.contains_key(name)) {
        return Err(Refused::Forwarded);
    }
    let mut sent = headers.get_all(TTL_HEADER).iter();
    let (Some(ttl), None) = (sent.next(), sent.next()) else {
        return Err(Refused::Ttl);
    };
    let ttl = ttl
        .to_str()
        .ok()
        .filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
    let ttl = ttl
        .and_then(|text| text.parse().ok())
        .filter(|ttl| TTL_SECONDS.contains(ttl));
    ttl.map(Call::IssueToken).ok_or(Refused::Ttl)
}

/// The token of a request. Two headers are no token: an empty one is sent on, and is not good.
fn sent_token(headers: &HeaderMap) -> Option<Vec<u8>> {
    let mut sent = headers.get_all(TOKEN_HEADER).iter();
    let first = sent.next()?;
    Some(if sent.next().is_some() {
        Vec::new()
    } else {
        first.as_bytes().to_vec()
    })
}

/// Takes a path apart: empty parts do not count (`//`, and a slash at the end), each part is decoded once.
fn place(path: &str) -> Place {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let Some(version) = parts.next() else {
        return Place::Versions;
    };
    if version != "latest" && !VERSIONS.contains(&version) {
        return Place::Nowhere;
    }
    let mut below = String::with_capacity(path.len());
    for part in parts {
        if !below.is_empty() {
            below.push('/');
        }
        match percent_encoding::percent_decode_str(part).decode_utf8() {
            // A slash that was encoded is not one.
            Ok(part) if !part.contains('/') => below.push_str(&part),
            _ => return Place::Nowhere,
        }
    }
    Place::Below(below)
}

/// What `GET /` answers.
pub fn version_list() -> String {
    let mut list = VERSIONS.join("\n");
    list.push_str("\nlatest");
    list
}

/// The credentials document, byte for byte as EC2 writes it: seven keys in this order, two spaces, ` : `, no last line
/// end.
pub fn credentials_document(credentials: &Credentials) -> Bytes {
    document(&[
        ("Code", "Success"),
        ("LastUpdated", &rfc3339_seconds(credentials.updated)),
        ("Type", "AWS-HMAC"),
        ("AccessKeyId", &credentials.access_key_id),
        ("SecretAccessKey", credentials.secret_access_key.reveal()),
        ("Token", credentials.token.reveal()),
        ("Expiration", &rfc3339_seconds(credentials.expiration)),
    ])
    .into()
}

/// What EC2 answers in place of credentials of a role that it cannot assume (imds-contract 2.2; EC2's troubleshooting
/// page for IAM roles has it).
pub fn denied_document(role: &str, now: SystemTime) -> Bytes {
    const PAGE: &str = "https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_iam-ec2.html#troubleshoot_iam-ec2_errors-info-doc";
    document(&[
        ("Code", "AssumeRoleUnauthorizedAccess"),
        (
            "Message",
            &format!("EC2 cannot assume the role {role}.  Please see documentation at {PAGE}."),
        ),
        ("LastUpdated", &rfc3339_seconds(now)),
    ])
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::Secret;
    use hyper::Request;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn parts(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn read(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Call, Refused> {
        parse(&parts(method, uri, headers), &["metadata.local".to_owned()])
    }

    const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds";

    #[test]
    fn token_requests() {
        for (ttl, call) in [
            ("21600", Ok(Call::IssueToken(21_600))),
            ("1", Ok(Call::IssueToken(1))),
            ("21601", Err(Refused::Ttl)),
            ("0", Err(Refused::Ttl)),
            ("-1", Err(Refused::Ttl)),
            ("+1", Err(Refused::Ttl)),
            ("abc", Err(Refused::Ttl)),
            ("", Err(Refused::Ttl)),
            ("99999999999999999999", Err(Refused::Ttl)),
        ] {
            assert_eq!(read("PUT", TOKEN_PATH, &[(TTL, ttl)]), call, "{ttl}");
        }
        assert_eq!(read("PUT", TOKEN_PATH, &[]), Err(Refused::Ttl));
        assert_eq!(read("PUT", TOKEN_PATH, &[(TTL, "5"), (TTL, "6")]), Err(Refused::Ttl));
        for proxied in [
            ("X-Forwarded-For", "1.2.3.4"),
            ("X-Forwarded-For", ""),
            ("Forwarded", "for=1.2.3.4"),
        ] {
            assert_eq!(read("PUT", TOKEN_PATH, &[(TTL, "5"), proxied]), Err(Refused::Forwarded));
            // The PUT alone is refused so, and before its TTL is looked at.
            assert_eq!(read("PUT", TOKEN_PATH, &[proxied]), Err(Refused::Forwarded));
            assert!(read("GET", "/latest/meta-data", &[proxied]).is_ok());
        }
        for path in [
            "/2021-03-23/api/token",
            "/latest/api/token/",
            "//latest/api/token",
            "/latest/meta-data",
        ] {
            assert_eq!(read("PUT", path, &[(TTL, "5")]), Err(Refused::Put), "{path}");
        }
        for method in ["GET", "HEAD", "POST", "DELETE"] {
            assert_eq!(read(method, TOKEN_PATH, &[]), Err(Refused::TokenMethod));
        }
        assert_eq!(read("OPTIONS", TOKEN_PATH, &[]), Ok(Call::TokenOptions));
        for method in ["POST", "DELETE", "PATCH", "OPTIONS", "TRACE"] {
            assert_eq!(read(method, "/latest/meta-data", &[]), Err(Refused::Method));
        }
    }

    #[test]
    fn hosts() {
        for (host, ours) in [
            ("169.254.169.254", true),
            ("169.254.169.254:80", true),
            ("[fd00:ec2::254]:80", true),
            ("instance-data", true),
            ("Instance-Data.ec2.internal", true),
            ("metadata.local", true),
            ("", true),
            ("evil.example", false),
            ("169.254.169.254.evil.example", false),
            ("169.254.169.254:8080", false),
            ("169.254.169.254, evil.example", false),
        ] {
            assert_eq!(read("GET", "/", &[("Host", host)]).is_ok(), ours, "{host}");
        }
        assert!(read("GET", "/", &[]).is_ok());
        assert_eq!(
            read("GET", "/", &[("Host", "instance-data"), ("Host", "instance-data")]),
            Err(Refused::Host)
        );
        assert_eq!(
            read("GET", "/", &[("Origin", "http://169.254.169.254")]),
            Err(Refused::Host)
        );
        assert_eq!(
            read("GET", "http://evil.example/latest", &[("Host", "169.254.169.254")]),
            Err(Refused::Host)
        );
        assert!(read("GET", "http://169.254.169.254/latest", &[("Host", "169.254.169.254")]).is_ok());
        // Before the method and the rest.
        assert_eq!(read("POST", "/", &[("Host", "evil.example")]), Err(Refused::Host));
        assert_eq!(read("PUT", TOKEN_PATH, &[("Host", "evil.example")]), Err(Refused::Host));
    }

    #[test]
    fn places() {
        for (path, expected) in [
            ("/", Place::Versions),
            ("//", Place::Versions),
            ("/latest", Place::Below(String::new())),
            ("/latest/", Place::Below(String::new())),
            ("/latest/meta-data/", Place::Below("meta-data".into())),
            (
                "/latest//meta-data//instance-id/",
                Place::Below("meta-data/instance-id".into()),
            ),
            ("/2009-04-04/meta-data", Place::Below("meta-data".into())),
            ("/latest/a%3Ab", Place::Below("a:b".into())),
            ("/latest/a%2Fb", Place::Nowhere),
            ("/latest/%ff", Place::Nowhere),
            ("/latest/a%252Fb", Place::Below("a%2Fb".into())),
            ("/latest/../x", Place::Below("../x".into())),
            ("/Latest", Place::Nowhere),
            ("/2009-04-05/meta-data", Place::Nowhere),
        ] {
            assert_eq!(place(path), expected, "{path}");
        }
    }

    #[test]
    fn a_token_header_makes_it_version_2() {
        let token = |headers: &[(&str, &str)]| match read("GET", "/", headers) {
            Ok(Call::Get { token, .. }) => token,
            other => panic!("{other:?}"),
        };
        const TOKEN: &str = "X-aws-ec2-metadata-token";
        assert_eq!(token(&[]), None);
        assert_eq!(token(&[(TOKEN, "")]), Some(Vec::new()));
        assert_eq!(token(&[(TOKEN, "abc")]), Some(b"abc".to_vec()));
        assert_eq!(token(&[(TOKEN, "abc"), (TOKEN, "abc")]), Some(Vec::new()));
    }

    #[test]
    fn the_credentials_document_is_ec2s() {
        let time = UNIX_EPOCH + Duration::from_secs(1_767_607_872);
        let document = credentials_document(&Credentials {
            access_key_id: "ASIAEXAMPLE".into(),
            secret_access_key: Secret::new("abc/+="),
            token: Secret::new("t\"1"),
            updated: time,
            expiration: time + Duration::from_secs(3600),
            fake: false,
        });
        assert_eq!(
            document,
            "{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : \"2026-01-05T10:11:12Z\",\n  \"Type\" : \"AWS-HMAC\",\n  \
             \"AccessKeyId\" : \"ASIAEXAMPLE\",\n  \"SecretAccessKey\" : \"abc/+=\",\n  \"Token\" : \"t\\\"1\",\n  \
             \"Expiration\" : \"2026-01-05T11:11:12Z\"\n}"
        );
    }

    proptest! {
        #[test]
        fn no_path_is_above_its_version(path in "/(latest|1.0|x)?[/a-z.%0-9A-F]{0,40}") {
            if let Place::Below(below) = place(&path) {
                prop_assert!(!below.starts_with('/') && !below.ends_with('/') && !below.contains("//"));
            }
        }
    }
}
