//! Paths that no decent client asks for: ways to say what is closed so that somebody might take it for something else.

/// What an instance has for itself, below a version.
pub const CLOSED: [&str; 9] = [
    "meta-data/iam/info",
    "meta-data/iam/security-credentials/the-role-of-the-host",
    "meta-data/identity-credentials/ec2/info",
    "meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
    "meta-data/managed-ssh-keys/signer-cert",
    "user-data",
    "dynamic/instance-identity/rsa2048",
    "dynamic/instance-identity/pkcs7",
    "dynamic/instance-identity/signature",
];

/// The tricks, more than 200.
pub fn tricks() -> Vec<String> {
    let mut tricks = Vec::new();
    for path in CLOSED {
        let (first, rest) = path.split_once('/').unwrap_or((path, ""));
        let encoded: String = path.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let dots = path.replace('/', "/./");
        tricks.extend([
            format!("/latest/{path}"),
            format!("/latest/{path}/"),
            format!("//latest//{}", path.replace('/', "//")),
            format!("/latest/./{dots}"),
            format!("/latest/meta-data/../{path}"),
            format!("/latest/meta-data/instance-id/../../{path}"),
            format!("/latest/meta-data/tags/instance/../../../{path}"),
            format!("/latest/meta-data/%2e%2e/{path}"),
            format!("/latest/meta-data/..%2f{path}"),
            format!("/latest/meta-data/..%252f{path}"),
            format!("/latest/meta-data/..%5c{path}"),
            format!("/latest/meta-data/..\\{path}"),
            format!("/latest/meta-data/..;/{path}"),
            format!("/latest/meta-data/%c0%ae%c0%ae/{path}"),
            format!("/latest/{encoded}"),
            format!("/latest/{}", path.replace('/', "%2f")),
            format!("/latest/{}", path.replace('/', "%252F")),
            format!("/latest/{}", path.replace('-', "%2D")),
            format!("/latest/{}", path.to_ascii_uppercase()),
            format!("/LATEST/{path}"),
            format!("/latest/{first};x=1/{rest}"),
            format!("/latest/{path};x=1"),
            format!("/latest/{path}%00"),
            format!("/latest/{path}%20"),
            format!("/latest/{path}?meta-data/instance-id"),
            format!("/latest/meta-data/instance-id?/../../{path}"),
            format!("/latest/meta-data/instance-id%23/../../{path}"),
            format!("/1.0/{path}"),
            format!("/2009-04-04/{path}"),
            format!("/2024-04-11/{path}"),
            format!("/2099-01-01/{path}"),
            format!("/latest/latest/{path}"),
            format!("/latest/../latest/{path}"),
            format!("/../latest/{path}"),
            format!("/./latest/{path}"),
            format!("/{path}"),
            format!("http://169.254.169.254/latest/{path}"),
        ]);
    }
    tricks
}
