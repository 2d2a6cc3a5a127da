//! What a real instance says of itself, but for what is its own business: credentials, signatures, keys, user data.
//!
//! The one list of what may be asked for, and so be seen by others, is the table of categories: whatever has no place in it, or
//! follows from a role, is not even asked for. What an instance lists is only compared with that table. It is never a path by
//! itself, so no name in a listing leads anywhere else.

use std::collections::BTreeMap;
use std::future::Future;

use super::tree::{self, MACS, PUBLIC_KEYS, PathError};

/// The most directories and values that are asked for: no instance has so many.
const MOST_PATHS: usize = 10_000;
/// Where the walk begins.
const ROOTS: [&str; 2] = ["meta-data", "dynamic/fws"];

/// Walks through an instance's metadata, and returns what it finds, by path, from the version on. `get` asks for what stands at
/// such a path; `None`: nothing does.
///
/// # Errors
/// What `get` says.
pub async fn gather<E, Asked>(get: impl Fn(String) -> Asked) -> Result<BTreeMap<String, String>, E>
where
    Asked: Future<Output = Result<Option<String>, E>>,
{
    let mut found = BTreeMap::new();
    let mut directories = ROOTS.map(str::to_owned).to_vec();
    let mut asked = 0;
    while let Some(directory) = directories.pop() {
        let listing = get(format!("{directory}/")).await?.unwrap_or_default();
        for line in listing.lines() {
            let Some(path) = listed(&directory, line) else { continue };
            asked += 1;
            match tree::known(&path, ANY_VALUE) {
                _ if asked > MOST_PATHS => return Ok(found),
                Err(PathError::Directory) => directories.push(path),
                Ok(()) => {
                    let value = get(path.clone()).await?.unwrap_or_default();
                    let value = value.trim_end_matches('\n');
                    if tree::known(&path, value).is_ok() {
                        found.insert(path, value.to_owned());
                    }
                }
                Err(PathError::Unknown | PathError::Derived | PathError::Value) => {}
            }
        }
    }
    Ok(found)
}

/// Whether a path may have a value is asked before there is one.
const ANY_VALUE: &str = "x";

/// The path of what a listing names.
fn listed(directory: &str, line: &str) -> Option<String> {
    let name = line.strip_suffix('/').unwrap_or(line);
    // Public keys are listed with their names: `0=me`.
    let name = match name.split_once('=') {
        Some((number, _)) if directory == PUBLIC_KEYS => number,
        _ => name,
    };
    // What keys of tags may have (EC2 user guide, "View tags using instance metadata"); no other name has more.
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-=.,_:@".contains(&byte);
    let leads_away = name.bytes().all(|byte| byte == b'.');
    (name.bytes().all(plain) && !leads_away).then(|| format!("{directory}/{name}"))
}

/// The same as values for another instance: of several links, the first one's are the first one's there.
pub fn for_another(found: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let values = found.iter().filter(|(path, _)| !is_of_another_link(path, found));
    let values = values.map(|(path, value)| {
        let of_link = path.strip_prefix(MACS).and_then(|rest| rest.split_once('/'));
        let path = match of_link {
            Some((_, rest)) => format!("{MACS}{}/{rest}", tree::MAC),
            None => path.clone(),
        };
        (path, value.clone())
    });
    values.collect()
}

/// Whether a path is of a link that is not the first.
pub fn is_of_another_link(path: &str, found: &BTreeMap<String, String>) -> bool {
    let first = found.get(MAC_ADDRESS);
    let of = path.strip_prefix(MACS).and_then(|rest| rest.split('/').next());
    of.is_some_and(|mac| first.is_none_or(|first| first != mac))
}

/// Where the MAC address of the first link stands.
pub const MAC_ADDRESS: &str = "meta-data/mac";

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::convert::Infallible;

    use super::*;

    /// What an instance with these values would be asked for, and what is found.
    fn gathered(values: &[(&str, &str)], listings: &[(&str, &str)]) -> (BTreeMap<String, String>, Vec<String>) {
        let asked = RefCell::new(Vec::new());
        let get = |path: String| {
            asked.borrow_mut().push(path.clone());
            let there = |all: &[(&str, &str)]| {
                let found = all.iter().find(|(at, _)| path.trim_end_matches('/') == *at);
                found.map(|(_, text)| (*text).to_owned())
            };
            let answer = there(values).or_else(|| there(listings));
            async move { Ok::<_, Infallible>(answer) }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let Ok(found) = runtime.block_on(gather(get));
        (found, asked.into_inner())
    }

    #[test]
    fn what_is_found_is_what_the_table_has() {
        let mac = "0e:49:61:0f:c3:11";
        let of_link = format!("meta-data/network/interfaces/macs/{mac}");
        let values = [
            ("meta-data/instance-id", "i-1"),
            (MAC_ADDRESS, mac),
            ("meta-data/public-keys/0/openssh-key", "ssh-rsa AAAA me\n"),
            ("meta-data/tags/instance/a=b", "t"),
            ("dynamic/fws/instance-monitoring", "enabled"),
        ];
        let vpc = format!("{of_link}/vpc-id");
        let values = [&values[..], &[(vpc.as_str(), "vpc-1")]].concat();
        let macs = format!("{mac}/\n0e:49:61:0f:c3:12/");
        let listings = [
            (
                "meta-data",
                "iam/\ninstance-id\nmac\nmetrics/\nnetwork/\npublic-keys/\ntags/\nsomething-new",
            ),
            ("meta-data/network", "interfaces/"),
            ("meta-data/network/interfaces", "macs/"),
            ("meta-data/network/interfaces/macs", macs.as_str()),
            (of_link.as_str(), "vpc-id"),
            ("meta-data/public-keys", "0=me"),
            ("meta-data/public-keys/0", "openssh-key"),
            ("meta-data/tags", "instance/"),
            ("meta-data/tags/instance", "a=b"),
            ("dynamic/fws", "instance-monitoring"),
        ];
        let (found, asked) = gathered(&values, &listings);
        let told: Vec<_> = for_another(&found)
            .into_iter()
            .map(|(path, value)| format!("{path}={value}"))
            .collect();
        assert_eq!(
            told,
            [
                "dynamic/fws/instance-monitoring=enabled",
                "meta-data/instance-id=i-1",
                "meta-data/mac=0e:49:61:0f:c3:11",
                "meta-data/network/interfaces/macs/{mac}/vpc-id=vpc-1",
                "meta-data/public-keys/0/openssh-key=ssh-rsa AAAA me",
                "meta-data/tags/instance/a=b=t",
            ]
        );
        assert!(
            !asked
                .iter()
                .any(|path| path.contains("iam") || path.contains("new") || path.contains("metrics"))
        );
    }

    #[test]
    fn no_listing_leads_to_what_is_the_instances_own() {
        let closed = [
            "iam/",
            "iam/info",
            "iam/security-credentials/role",
            "identity-credentials/",
            "identity-credentials/ec2/security-credentials/ec2-instance",
            "managed-ssh-keys/",
            "managed-ssh-keys/signer-cert",
            "../user-data",
            "../dynamic/instance-identity/document",
            "../dynamic/instance-identity/rsa2048",
        ];
        let mut names = Vec::new();
        for path in closed {
            let encoded: String = path.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let twice = encoded.replace('%', "%25");
            for form in [
                path.to_owned(),
                format!("/{path}"),
                format!("//{path}"),
                format!("./{path}"),
                format!("../{path}"),
                format!("../meta-data/{path}"),
                format!("../../latest/meta-data/{path}"),
                format!("placement/../{path}"),
                format!("instance-id/../{path}"),
                format!("..;/{path}"),
                path.replace('/', "%2f"),
                path.replace('/', "%2F"),
                path.replace('/', "%252f"),
                path.replace('/', "\\"),
                path.replace("iam", "IAM"),
                format!("..%2f..%2f{path}"),
                format!("%2e%2e/{path}"),
                format!("{path}?x=instance-id"),
                format!("{path}#x"),
                format!("{path}\u{0}"),
                format!(" {path}"),
                format!("http://169.254.169.254/latest/meta-data/{path}"),
                encoded,
                twice,
            ] {
                names.push(form);
            }
        }
        names.extend(["..", ".", "", "/", "...", "%2e%2e", "0=../../iam/"].map(str::to_owned));
        assert!(names.len() > 200, "{}", names.len());
        // Everywhere, and most of all where any name is a value.
        let listing = names.join("\n");
        let everywhere = [
            "meta-data",
            "meta-data/public-keys",
            "meta-data/tags",
            "meta-data/tags/instance",
            "dynamic/fws",
        ];
        let mut listings: Vec<_> = everywhere.map(|directory| (directory, listing.as_str())).to_vec();
        let top = format!("tags/\npublic-keys/\n{listing}");
        let tags = format!("instance/\n{listing}");
        (listings[0].1, listings[2].1) = (&top, &tags);
        let (found, asked) = gathered(&[], &listings);
        assert_eq!(found, BTreeMap::new());
        let strange = |path: &&String| {
            let below: Vec<_> = path.trim_end_matches('/').split('/').collect();
            let closed = [
                "iam",
                "identity-credentials",
                "managed-ssh-keys",
                "user-data",
                "instance-identity",
            ];
            // Any name is one of a tag or a key, and stays below.
            let named = ["meta-data/tags/instance/", "meta-data/public-keys/"]
                .iter()
                .any(|it| path.starts_with(it));
            below
                .iter()
                .any(|part| part.is_empty() || part.contains(['%', '\\', '?', '#', ' ', '\0']))
                || below.iter().any(|part| part.bytes().all(|byte| byte == b'.'))
                || (!named && closed.iter().any(|it| path.contains(it)))
        };
        assert_eq!(asked.iter().filter(strange).collect::<Vec<_>>(), Vec::<&String>::new());
        assert!(asked.iter().any(|path| path == "meta-data/tags/instance/"), "{asked:?}");
    }

    #[test]
    fn an_instance_without_end_is_left_at_some_point() {
        let many: Vec<String> = (0..2 * MOST_PATHS).map(|number| format!("t{number}")).collect();
        let listing = many.join("\n");
        let listings = [
            ("meta-data", "tags/"),
            ("meta-data/tags", "instance/"),
            ("meta-data/tags/instance", listing.as_str()),
        ];
        assert!(gathered(&[], &listings).1.len() <= MOST_PATHS + 5);
    }
}
