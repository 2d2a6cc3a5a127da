//! The whole instance, per container: its tree, what is given in it, its identity, its options.

use std::process::{Command, Stdio};

use imds_router::config::Settings;
use imds_router::wire::imds::VERSIONS;

use crate::conformance::Reply;
use crate::script::{Client, Daemon, id, settings};

const ROLE_LIST: &str = "/latest/meta-data/iam/security-credentials/";

/// Everything that is listed below `root`, with its answers.
async fn crawl(client: &mut Client, root: &str) -> Vec<(String, Reply)> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        let listing = client.get(&dir).await.unwrap();
        assert_eq!(listing.status, 200, "{dir}");
        for name in listing.text().lines() {
            let path = format!("{dir}{}", name.split('=').next().unwrap());
            let top = dir == root;
            let is_dir = name.ends_with('/') || name.contains('=') || (top && ["dynamic", "meta-data"].contains(&name));
            if is_dir {
                dirs.push(format!("{}/", path.trim_end_matches('/')));
            } else {
                let reply = client.get(&path).await.unwrap_or_else(|| panic!("{path}"));
                assert_eq!(reply.status, 200, "{path}");
                found.push((path, reply));
            }
        }
    }
    found
}

#[tokio::test(start_paused = true)]
async fn everything_that_is_listed_in_any_version_resolves() {
    let daemon = Daemon::start(Settings {
        instance_metadata_tags: true,
        public_keys: [("me".to_owned(), "ssh-ed25519 AAAA me".to_owned())].into(),
        user_data: Some("#cloud-config".into()),
        ..settings()
    });
    daemon.synchronised().await;
    let address = daemon
        .run(1, &[("imds.role", "app"), ("imds.instance-tag.Name", "a b")])
        .await;
    for version in VERSIONS.iter().chain(&["latest"]) {
        let found = crawl(&mut daemon.connect(1, address), &format!("/{version}/")).await;
        assert!(found.len() > 45, "{version}: {}", found.len());
        for (path, reply) in &found {
            assert!(!reply.body.ends_with(b"\n"), "{path}");
        }
        let has = |path: &str| found.iter().any(|(known, _)| *known == format!("/{version}/{path}"));
        assert!(has("user-data") && has("meta-data/tags/instance/Name") && has("meta-data/public-keys/0/openssh-key"));
    }
}

#[tokio::test(start_paused = true)]
async fn user_data_passes_unchanged() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let bytes: Vec<u8> = (0..16 * 1024).map(|at: u32| u8::try_from(at % 256).unwrap()).collect();
    let text = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(&bytes)
    };
    let address = daemon.run(1, &[("imds.user-data-base64", &text)]).await;
    for path in ["/latest/user-data", "/latest/user-data/", "/2009-04-04/user-data"] {
        let reply = daemon.connect(1, address).get(path).await.unwrap();
        assert_eq!(
            (reply.status, reply.header("content-type")),
            (200, Some("application/octet-stream"))
        );
        assert_eq!(reply.body, bytes);
    }
    let listing = daemon.connect(1, address).get("/latest").await.unwrap().text();
    assert_eq!(listing, "dynamic\nmeta-data\nuser-data");
}

#[tokio::test(start_paused = true)]
async fn what_is_given_takes_the_place_of_what_is_derived_and_nonsense_is_an_error_of_its_container() {
    let mut settings = settings();
    settings.metadata = [
        ("meta-data/instance-type", "m7i.large"),
        ("meta-data/placement/group-name", "g"),
    ]
    .map(|(path, value)| (path.to_owned(), value.to_owned()))
    .into();
    let daemon = Daemon::start(settings);
    daemon.synchronised().await;
    let mac = "imds.metadata.network/interfaces/macs/{mac}/vpc-id";
    let one = daemon
        .run(
            1,
            &[("imds.role", "app"), ("imds.instance-type", "t4g.nano"), (mac, "vpc-1")],
        )
        .await;
    let two = daemon
        .run(2, &[("imds.role", "app"), ("imds.metadata.placement", "x")])
        .await;
    let get = async |number, address, path: &str| {
        daemon
            .connect(number, address)
            .get(&format!("/latest/meta-data/{path}"))
            .await
            .unwrap()
    };
    assert_eq!(get(1, one, "instance-type").await.text(), "t4g.nano");
    assert_eq!(get(1, one, "placement/group-name").await.text(), "g");
    assert_eq!(
        get(1, one, "network/interfaces/macs/02:42:0a:00:00:01/vpc-id")
            .await
            .text(),
        "vpc-1"
    );
    assert_eq!(daemon.connect(1, one).get(ROLE_LIST).await.unwrap().text(), "app");
    let token = daemon.connect(2, two).token(60).await;
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    assert_eq!(
        daemon
            .connect(2, two)
            .send("GET", ROLE_LIST, &headers)
            .await
            .unwrap()
            .status,
        404
    );
    let problems = &daemon.index.get(&id(2)).unwrap().instance.problems;
    assert!(
        problems[0].starts_with("label imds.metadata.placement: that is a directory"),
        "{problems:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_instance_id_is_one_containers_while_it_runs() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let labels = &[("imds.role", "app"), ("imds.instance-id", "i-0123456789abcdef0")];
    let first = daemon.run(1, labels).await;
    let second = daemon.run(2, labels).await;
    let role = |number| daemon.index.get(&id(number)).unwrap().instance.role.session().is_some();
    assert!(role(1) && !role(2));
    assert_eq!(daemon.connect(1, first).get(ROLE_LIST).await.unwrap().text(), "app");
    let problems = daemon.index.get(&id(2)).unwrap().instance.problems.join(" ");
    assert!(
        problems.contains("instance id i-0123456789abcdef0 is that of container 000000010000, which runs"),
        "{problems}"
    );
    assert_eq!(daemon.connect(2, second).get(ROLE_LIST).await.unwrap().status, 401);
    // The same after everything was looked at again, in whatever order.
    daemon.configure(|_| {});
    daemon.settle().await;
    assert!(role(1) && !role(2));
    daemon.kill(1);
    daemon.settle().await;
    assert!(role(2));
    assert_eq!(daemon.connect(2, second).get(ROLE_LIST).await.unwrap().text(), "app");
}

/// Verifies with openssl, as EC2's user guide shows it.
fn openssl(arguments: &[&str]) -> String {
    let run = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("openssl runs");
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "openssl {arguments:?}: {said}");
    String::from_utf8_lossy(&run.stdout).into_owned()
}

#[tokio::test(start_paused = true)]
async fn openssl_verifies_the_identity_in_all_three_forms() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, &[("imds.role", "app")]).await;
    let mut client = daemon.connect(1, address);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for name in ["document", "signature", "pkcs7", "rsa2048"] {
        let reply = client
            .get(&format!("/latest/dynamic/instance-identity/{name}"))
            .await
            .unwrap();
        assert_eq!(reply.status, 200, "{name}");
        let body = match name {
            "pkcs7" | "rsa2048" => {
                format!("-----BEGIN PKCS7-----\n{}\n-----END PKCS7-----\n", reply.text()).into_bytes()
            }
            "signature" => [reply.body, b"\n".to_vec()].concat(),
            _ => reply.body,
        };
        std::fs::write(file(name), body).unwrap();
    }
    std::fs::write(file("certificate"), daemon.service.signer.certificate()).unwrap();
    let (certificate, document) = (file("certificate"), file("document"));
    let said = std::fs::read_to_string(&document).unwrap();
    for name in ["pkcs7", "rsa2048"] {
        let form = file(name);
        let verify = [
            "smime",
            "-verify",
            "-in",
            &form,
            "-inform",
            "PEM",
            "-certfile",
            &certificate,
            "-noverify",
        ];
        assert_eq!(openssl(&verify), said, "{name}");
        let trusted = [
            "cms",
            "-verify",
            "-binary",
            "-in",
            &form,
            "-inform",
            "PEM",
            "-CAfile",
            &certificate,
            "-purpose",
            "any",
        ];
        assert_eq!(openssl(&trusted), said, "{name}");
    }
    std::fs::write(file("raw"), openssl_bytes(&["base64", "-d", "-in", &file("signature")])).unwrap();
    std::fs::write(
        file("key"),
        openssl(&["x509", "-pubkey", "-noout", "-in", &certificate]),
    )
    .unwrap();
    let (raw, key) = (file("raw"), file("key"));
    let verify = ["dgst", "-sha256", "-verify", &key, "-signature", &raw, &document];
    assert_eq!(openssl(&verify), "Verified OK\n");
    std::fs::write(&document, said.replace("t3.micro", "t3.macro")).unwrap();
    let refused = Command::new("openssl").args(verify).output().unwrap();
    assert!(!refused.status.success());
}

fn openssl_bytes(arguments: &[&str]) -> Vec<u8> {
    let run = Command::new("openssl").args(arguments).output().expect("openssl runs");
    assert!(run.status.success());
    run.stdout
}
