//! What EC2 would know about a container: its tree of metadata, built once per change at the most, never per request.

pub mod aemm;
pub mod crawl;
pub mod events;
pub mod identity_document;
pub mod tree;
pub mod zones;

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;

/// What stands at a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// A directory: the names in it, one a line, directories with `/`, no last line end.
    Dir(Bytes),
    /// A value.
    Text(Bytes),
    /// The list of the one role: there once there are credentials.
    RoleList(Bytes),
    /// The credentials document of the role.
    Credentials,
    /// A signature of an identity document.
    Signed(identity_document::SignatureFormat, Bytes),
    /// User data: bytes as they were given.
    UserData(Bytes),
}

/// The tree of one container. Paths have no slash at their ends: `meta-data/instance-id`; the root is empty.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct InstanceView {
    nodes: HashMap<Box<str>, Node>,
}

impl InstanceView {
    /// What stands at `path`.
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// All paths, in order.
    pub fn paths(&self) -> Vec<&str> {
        let mut paths: Vec<_> = self.nodes.keys().map(AsRef::as_ref).collect();
        paths.sort_unstable();
        paths
    }

    /// Makes the tree of `leaves`; the directories and what they list follow from them.
    pub fn of(leaves: BTreeMap<String, Node>) -> Self {
        let mut listings: BTreeMap<String, BTreeMap<String, bool>> = BTreeMap::new();
        listings.entry(String::new()).or_default();
        for path in leaves.keys() {
            let mut name_is_dir = false;
            let mut path = path.as_str();
            while !path.is_empty() {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
                *listings
                    .entry(parent.to_owned())
                    .or_default()
                    .entry(name.to_owned())
                    .or_default() |= name_is_dir;
                (path, name_is_dir) = (parent, true);
            }
        }
        let mut nodes: HashMap<Box<str>, Node> = HashMap::new();
        for (path, names) in listings {
            // EC2 lists what is below a version without slashes (a capture of `/latest`).
            let slash = |is_dir: bool| if is_dir && !path.is_empty() { "/" } else { "" };
            let lines: Vec<_> = names
                .iter()
                .map(|(name, is_dir)| format!("{name}{}", slash(*is_dir)))
                .collect();
            nodes.insert(path.clone().into(), Node::Dir(lines.join("\n").into()));
        }
        // The role list is a directory and a value at once: the value wins.
        nodes.extend(leaves.into_iter().map(|(path, node)| (path.into_boxed_str(), node)));
        Self { nodes }
    }
}

/// A JSON object of texts, as EC2 indents them.
pub fn document(fields: &[(&str, &str)]) -> String {
    let lines: Vec<String> = fields
        .iter()
        .map(|(key, value)| format!("  {} : {}", quoted(key), quoted(value)))
        .collect();
    format!("{{\n{}\n}}", lines.join(",\n"))
}

/// The same in one line, as EC2 writes small ones.
pub fn document_line(fields: &[(&str, &str)]) -> String {
    let fields: Vec<String> = fields
        .iter()
        .map(|(key, value)| format!("{}: {}", quoted(key), quoted(value)))
        .collect();
    format!("{{{}}}", fields.join(", "))
}

/// A JSON string.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &'static str) -> Node {
        Node::Text(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn listings_follow_from_the_leaves() {
        let leaves = [
            ("dynamic/instance-identity/document", text("{}")),
            ("meta-data/placement/region", text("r")),
            ("meta-data/ami-id", text("a")),
            ("meta-data/iam/info", text("i")),
            ("meta-data/iam/security-credentials", Node::RoleList("web".into())),
            ("meta-data/iam/security-credentials/web", Node::Credentials),
        ];
        let view = InstanceView::of(leaves.into_iter().map(|(path, node)| (path.to_owned(), node)).collect());
        let dir = |path: &str| match view.get(path) {
            Some(Node::Dir(names)) => String::from_utf8(names.to_vec()).unwrap(),
            other => panic!("{path}: {other:?}"),
        };
        assert_eq!(dir(""), "dynamic\nmeta-data");
        assert_eq!(dir("meta-data"), "ami-id\niam/\nplacement/");
        assert_eq!(dir("meta-data/iam"), "info\nsecurity-credentials/");
        assert_eq!(dir("meta-data/placement"), "region");
        assert_eq!(
            view.get("meta-data/iam/security-credentials"),
            Some(&Node::RoleList("web".into()))
        );
        assert_eq!(view.get("meta-data/nonsense"), None);
        assert_eq!(view.get("meta-data/ami-id/x"), None);
    }
}
