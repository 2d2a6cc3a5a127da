//! Bases and STS against a stand-in on the loopback: real sockets, so real time, and nobody sleeps.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use sha1::{Digest as _, Sha1};

use super::*;
use crate::clock::rfc3339_seconds;
use crate::credentials::broker::CredentialProvider as _;
use crate::credentials::sts::Sts;
use crate::credentials::{Credentials, ProfileSession, RoleArn, RoleSession, Session};

/// STS and IAM Identity Center, as told.
#[derive(Clone)]
struct Amazon {
    address: SocketAddr,
    /// What was asked, in order: the action, and what it was asked with.
    asked: Arc<Mutex<Vec<String>>>,
    /// Actions that are answered with this status and body instead.
    fails: Arc<Mutex<HashMap<&'static str, (u16, &'static str)>>>,
    /// How long it takes to answer.
    takes: Arc<Mutex<Duration>>,
}

const HOUR: Duration = Duration::from_secs(3600);
const IDENTITY: &str = "arn:aws:sts::111122223333:assumed-role/dev/me";

impl Amazon {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self {
            address: listener.local_addr().unwrap(),
            asked: Arc::default(),
            fails: Arc::default(),
            takes: Arc::default(),
        };
        let amazon = this.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let amazon = amazon.clone();
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let amazon = amazon.clone();
                    async move { Ok::<_, Infallible>(amazon.answer(request).await) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        this
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (parts, body) = request.into_parts();
        if parts.uri.path().starts_with("/latest/") {
            return self.as_ec2(&parts);
        }
        let takes = *self.takes.lock().unwrap();
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
        let action = match parts.uri.path() {
            "/token" => "CreateToken",
            "/federation/credentials" => "GetRoleCredentials",
            _ => body.split(['&', '=']).nth(1).unwrap_or_default(),
        }
        .to_owned();
        let bearer = parts.headers.get("x-amz-sso_bearer_token");
        let bearer = bearer.map(|it| it.to_str().unwrap().to_owned()).unwrap_or_default();
        self.asked.lock().unwrap().push(format!("{action} {body}{bearer}"));
        let mut failure = self.fails.lock().unwrap().get(action.as_str()).copied();
        if let Some(signed) = parts.headers.get("x-amz-date") {
            let format = "%Y%m%dT%H%M%SZ";
            let signed = jiff::civil::DateTime::strptime(format, signed.to_str().unwrap()).unwrap();
            let signed: SystemTime = signed.to_zoned(jiff::tz::TimeZone::UTC).unwrap().timestamp().into();
            let now = SystemTime::now();
            let off = now.duration_since(signed).unwrap_or_else(|error| error.duration());
            if off > Duration::from_secs(300) {
                failure = Some((403, SKEWED));
            }
        }
        let until = rfc3339_seconds(SystemTime::now() + HOUR);
        let keys = format!(
            "<Credentials><AccessKeyId>ASIA{action}</AccessKeyId><SecretAccessKey>made-secret</SecretAccessKey>\
             <SessionToken>made-token</SessionToken><Expiration>{until}</Expiration></Credentials>"
        );
        let (status, body) = match (failure, action.as_str()) {
            (Some((status, body)), _) => (status, body.to_owned()),
            (_, "GetCallerIdentity") => (
                200,
                format!(
                    "<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>{IDENTITY}</Arn>\
                     <Account>111122223333</Account></GetCallerIdentityResult></GetCallerIdentityResponse>"
                ),
            ),
            (_, "CreateToken") => (
                200,
                r#"{"accessToken":"new-access","expiresIn":3600,"refreshToken":"new-refresh","tokenType":"Bearer"}"#
                    .to_owned(),
            ),
            (_, "GetRoleCredentials") => (
                200,
                format!(
                    r#"{{"roleCredentials":{{"accessKeyId":"ASIASSO","secretAccessKey":"sso-secret","sessionToken":"sso-token","expiration":{}}}}}"#,
                    (SystemTime::now() + HOUR)
                        .duration_since(SystemTime::UNIX_EPOCH)
                        .unwrap()
                        .as_millis()
                ),
            ),
            (_, action) => (
                200,
                format!("<{action}Response><{action}Result>{keys}</{action}Result></{action}Response>"),
            ),
        };
        Response::builder().status(status).body(Full::new(body.into())).unwrap()
    }

    /// The host's own metadata service, by IMDSv2.
    fn as_ec2(&self, parts: &hyper::http::request::Parts) -> Response<Full<Bytes>> {
        const ROLE: &str = "/latest/meta-data/iam/security-credentials/";
        self.asked
            .lock()
            .unwrap()
            .push(format!("{} {}", parts.method, parts.uri.path()));
        let fails = self.fails.lock().unwrap().get("ec2").copied();
        let with_token = parts
            .headers
            .get("x-aws-ec2-metadata-token")
            .is_some_and(|it| it == "host-token");
        let (status, body) = match (parts.uri.path(), fails) {
            ("/latest/api/token", _) => (200, "host-token".to_owned()),
            _ if !with_token => (401, String::new()),
            (ROLE, Some((404, _))) => (404, String::new()),
            (ROLE, _) => (200, "app".to_owned()),
            (_, Some((status, body))) => (status, body.to_owned()),
            (path, None) if path == format!("{ROLE}app") => {
                let until = rfc3339_seconds(SystemTime::now() + HOUR);
                let document = serde_json::json!({
                    "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIAHOST", "SecretAccessKey": "host-secret",
                    "Token": "host-session", "Expiration": until, "LastUpdated": until,
                });
                (200, document.to_string())
            }
            _ => (404, String::new()),
        };
        let answer = Response::builder().status(status);
        let answer = answer.header("x-aws-ec2-metadata-token-ttl-seconds", "21600");
        answer.body(Full::new(body.into())).unwrap()
    }

    fn fail(&self, action: &'static str, status: u16, body: &'static str) {
        self.fails.lock().unwrap().insert(action, (status, body));
    }

    fn work(&self) {
        self.fails.lock().unwrap().clear();
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

const DENIED: &str = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>User: x is not authorized</Message></Error></ErrorResponse>";
const EXPIRED: &str = "<ErrorResponse><Error><Code>ExpiredToken</Code><Message>The security token included in the request is expired</Message></Error></ErrorResponse>";
const SLOWER: &str =
    "<ErrorResponse><Error><Code>Throttling</Code><Message>Rate exceeded</Message></Error></ErrorResponse>";

const SKEWED: &str = "<ErrorResponse><Error><Code>SignatureDoesNotMatch</Code><Message>Signature expired</Message></Error></ErrorResponse>";
const UNKNOWN: &str =
    "<ErrorResponse><Error><Code>InvalidClientTokenId</Code><Message>not valid</Message></Error></ErrorResponse>";

struct Desk {
    directory: tempfile::TempDir,
    amazon: Amazon,
    clock: Clock,
}

impl Desk {
    /// A directory of AWS files, and what they lead to.
    async fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            amazon: Amazon::start().await,
            clock: Clock::scripted(SystemTime::now()),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes `config`; each profile has the endpoint of the stand-in.
    fn config(&self, text: &str) {
        let endpoint = format!("region = eu-west-1\nendpoint_url = http://{}\n", self.amazon.address);
        let text: String = text
            .lines()
            .map(|line| {
                let profile = line.starts_with("[profile") || line.starts_with("[default");
                format!("{line}\n{}", if profile { endpoint.as_str() } else { "" })
            })
            .collect();
        std::fs::write(self.path("config"), text).unwrap();
    }

    fn setup(&self, variables: &[(&str, &str)]) -> Setup {
        Setup {
            profile: None,
            region: None,
            files: AwsFiles::find(Some(self.directory.path()), |_| None),
            allow_process: true,
            instance_metadata: None,
            variables: variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
        }
    }

    fn bases(&self) -> Arc<Bases> {
        Bases::new(self.setup(&[]), self.clock.clone())
    }

    fn sts(&self) -> Sts {
        Sts::new(self.bases(), self.clock.clone())
    }

    /// Writes the cached token of session `corp`, and answers where.
    fn token(&self, expires_in: i64, refreshable: bool) -> PathBuf {
        let hex: String = Sha1::digest(b"corp").iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.path("sso/cache").join(format!("{hex}.json"));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let at = |seconds: i64| {
            let by = Duration::from_secs(seconds.unsigned_abs());
            let now = self.clock.aws();
            rfc3339_seconds(if seconds < 0 { now - by } else { now + by })
        };
        let mut token = serde_json::json!({
            "accessToken": "old-access", "expiresAt": at(expires_in), "region": "eu-west-1", "startUrl": "https://corp",
        });
        if refreshable {
            token["clientId"] = "client".into();
            token["clientSecret"] = "client-secret".into();
            token["refreshToken"] = "old-refresh".into();
            token["registrationExpiresAt"] = at(1_000_000).into();
        }
        std::fs::write(&path, token.to_string()).unwrap();
        path
    }
}

const SSO: &str = "[sso-session corp]\nsso_start_url = https://corp\nsso_region = eu-west-1\n\
                   [profile dev]\nsso_session = corp\nsso_account_id = 111122223333\nsso_role_name = Dev\n";
const KEYS: &str = "aws_access_key_id = AKIAKEYS\naws_secret_access_key = file-secret\n";

async fn base(bases: &Bases, profile: Option<&str>) -> Result<(String, String), ProviderError> {
    let base = bases.get(profile, RENEW_BEFORE).await?;
    Ok((base.credentials.access_key_id().to_owned(), base.origin.clone()))
}

fn keys(id: &str, token: Option<&str>) -> Keys {
    Keys {
        access_key_id: id.into(),
        secret_access_key: Secret::new("handed-secret"),
        session_token: token.map(Secret::new),
    }
}

#[tokio::test]
async fn what_the_host_itself_has_comes_last_and_only_where_it_is_not_ours_to_give() {
    let desk = Desk::new().await;
    let on_ec2 = |variables: &[(&str, &str)]| {
        let setup = Setup {
            instance_metadata: Some(format!("http://{}", desk.amazon.address)),
            ..desk.setup(variables)
        };
        Bases::new(setup, desk.clock.clone())
    };
    let bases = on_ec2(&[]);
    let found = base(&bases, None).await.unwrap();
    assert_eq!(
        found,
        (
            "ASIAHOST".to_owned(),
            "instance profile of this host, role app".to_owned()
        )
    );
    assert!(bases.states()[&None].until.is_some());
    assert!(desk.amazon.asked().iter().all(|asked| asked.contains("/latest/")));
    // Whatever else there is comes first.
    let environment = [("AWS_ACCESS_KEY_ID", "AKIAENV"), ("AWS_SECRET_ACCESS_KEY", "s")];
    assert_eq!(base(&on_ec2(&environment), None).await.unwrap().0, "AKIAENV");
    assert_eq!(desk.amazon.asked(), [""; 0]);

    desk.config("[profile p]\nrole_arn = arn:aws:iam::111122223333:role/p\ncredential_source = Ec2InstanceMetadata\n");
    let (key, origin) = base(&on_ec2(&[]), Some("p")).await.unwrap();
    assert_eq!(key, "ASIAAssumeRole");
    assert_eq!(
        origin,
        "profile p (instance profile of this host, role arn:aws:iam::111122223333:role/p)"
    );
    let ours = base(&desk.bases(), Some("p")).await.unwrap_err().to_string();
    assert!(ours.contains("cannot be its own base"), "{ours}");

    for (status, body, said) in [
        (404, "", "and this host has no instance profile"),
        (
            200,
            r#"{"Code": "AssumeRoleUnauthorizedAccess", "Message": "m"}"#,
            "AssumeRoleUnauthorizedAccess: m",
        ),
        (200, "<html>", "role app: no credentials document"),
        (
            200,
            r#"{"Code": "Success", "AccessKeyId": "A"}"#,
            "role app: no credentials document",
        ),
        (403, "", "the host's own instance metadata service"),
    ] {
        desk.amazon.fail("ec2", status, body);
        let error = base(&on_ec2(&[]), None).await.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[tokio::test]
async fn the_usual_chain() {
    let desk = Desk::new().await;
    let with = |variables: &[(&str, &str)]| Bases::new(desk.setup(variables), desk.clock.clone());
    let environment = [("AWS_ACCESS_KEY_ID", "AKIAENV"), ("AWS_SECRET_ACCESS_KEY", "s")];
    let none = base(&with(&[]), None).await.unwrap_err().to_string();
    assert!(
        none.starts_with("no base credentials: there are none: no variables"),
        "{none}"
    );

    desk.config(&format!(
        "[default]\n{KEYS}[profile p]\naws_access_key_id = AKIAP\naws_secret_access_key = s\n"
    ));
    assert_eq!(base(&with(&[]), None).await.unwrap().0, "AKIAKEYS");
    assert_eq!(base(&with(&[("AWS_PROFILE", "p")]), None).await.unwrap().0, "AKIAP");
    let found = base(&with(&environment), None).await.unwrap();
    assert_eq!(found, ("AKIAENV".to_owned(), "environment variables".to_owned()));
    // A profile that is named is all there is: variables do not win over it.
    assert_eq!(base(&with(&environment), Some("p")).await.unwrap().0, "AKIAP");
    let missing = base(&with(&environment), Some("q")).await.unwrap_err();
    assert_eq!(missing.to_string(), "no base credentials: there is no profile \"q\"");
    let missing = base(&with(&[("AWS_PROFILE", "pp")]), None).await.unwrap_err();
    assert!(missing.to_string().contains("there is no profile \"pp\""), "{missing}");

    // A default profile that says nothing of credentials leaves it to the rest.
    desk.config("[default]\noutput = json\n");
    std::fs::write(desk.path("token"), "web-token\n").unwrap();
    let token = desk.path("token");
    let web = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()),
        ("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/web"),
    ];
    desk.amazon.asked();
    assert_eq!(
        base(&with(&web), None).await.unwrap().0,
        "ASIAAssumeRoleWithWebIdentity"
    );
    let asked = desk.amazon.asked();
    assert!(asked[0].contains("WebIdentityToken=web-token"), "{asked:?}");
    for (name, uri) in [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.169.254/latest"),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://[fd00:ec2::254]:80/x"),
        (
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
            "http://169.254.170.23/v1/credentials",
        ),
        ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/credentials/x"),
    ] {
        assert_eq!(
            base(&with(&[(name, uri)]), None).await.unwrap_err().to_string(),
            format!(
                "no base credentials: variable {name} leads to an address that this daemon answers: it cannot be its own base"
            )
        );
    }
    let program = format!(
        "[profile run]\ncredential_process = echo '{{\"Version\":1,\"AccessKeyId\":\"ASIARUN\",\"SecretAccessKey\":\"s\",\"SessionToken\":\"t\",\"Expiration\":\"{}\"}}'\n\
         [profile fails]\ncredential_process = echo 'a-secret' >&2; exit 1\n",
        rfc3339_seconds(SystemTime::now() + HOUR)
    );
    desk.config(&program);
    assert_eq!(base(&with(&[]), Some("run")).await.unwrap().0, "ASIARUN");
    let error = base(&with(&[]), Some("fails")).await.unwrap_err().to_string();
    assert!(
        error.contains("gives no credentials") && !error.contains("a-secret"),
        "{error}"
    );
}

#[tokio::test]
async fn a_program_that_hangs_is_ended_with_what_it_has_started() {
    let mark = tempfile::tempdir().unwrap();
    let pid = mark.path().join("pid");
    let command = Secret::new(format!("sleep 600 & echo $! > {}; wait", pid.display()));
    let started = async {
        loop {
            if let Some(pid) = std::fs::read_to_string(&pid).ok().filter(|it| it.ends_with('\n')) {
                return pid;
            }
            tokio::task::yield_now().await;
        }
    };
    let pid = tokio::select! {
        _ = process("p", &command) => panic!("it does not end by itself"),
        pid = started => pid,
    };
    let stat = format!("/proc/{}/stat", pid.trim());
    loop {
        match std::fs::read_to_string(&stat) {
            // A zombie until somebody takes it in, which is not ours to do.
            Ok(stat) if !stat.contains(") Z ") => tokio::task::yield_now().await,
            _ => break,
        }
    }
}

#[tokio::test]
async fn files_that_are_not_trusted_stop_who_needs_them() {
    use std::os::unix::fs::PermissionsExt as _;
    let desk = Desk::new().await;
    desk.config(&format!("[default]\n{KEYS}"));
    std::fs::set_permissions(desk.path("config"), std::fs::Permissions::from_mode(0o666)).unwrap();
    let error = base(&desk.bases(), None).await.unwrap_err().to_string();
    assert!(error.contains("others may write it (mode 0666)"), "{error}");
    let variables = [("AWS_ACCESS_KEY_ID", "AKIAENV"), ("AWS_SECRET_ACCESS_KEY", "s")];
    let bases = Bases::new(desk.setup(&variables), desk.clock.clone());
    assert_eq!(base(&bases, None).await.unwrap().0, "AKIAENV");
    // And what they say is not followed: the endpoint of the stand-in is in the file that is not trusted.
    assert_eq!(bases.get(None, RENEW_BEFORE).await.unwrap().sdk.endpoint_url(), None);
    let strict = Setup {
        allow_process: false,
        instance_metadata: None,
        ..desk.setup(&variables)
    };
    std::fs::set_permissions(desk.path("config"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let error = base(&Bases::new(strict, desk.clock.clone()), None).await.unwrap_err();
    assert!(error.to_string().contains("endpoint_url names an endpoint"), "{error}");
}

#[tokio::test]
async fn roles_on_the_way_and_files_that_change() {
    let desk = Desk::new().await;
    let bases = desk.bases();
    desk.config(&format!(
        "[default]\n{KEYS}[profile admin]\nrole_arn = arn:aws:iam::111122223333:role/admin\nsource_profile = default\n\
         external_id = word\nrole_session_name = me\nduration_seconds = 1800\n"
    ));
    let found = base(&bases, Some("admin")).await.unwrap();
    let origin = "profile admin (keys, role arn:aws:iam::111122223333:role/admin)";
    assert_eq!(found, ("ASIAAssumeRole".to_owned(), origin.to_owned()));
    let asked = desk.amazon.asked();
    assert_eq!(asked.len(), 1);
    for part in ["RoleSessionName=me", "DurationSeconds=1800", "ExternalId=word"] {
        assert!(asked[0].contains(part), "{asked:?}");
    }
    // As long as they are good and nothing changes, nobody is asked again.
    base(&bases, Some("admin")).await.unwrap();
    assert_eq!(desk.amazon.asked().len(), 0);
    desk.config("[profile admin]\naws_access_key_id = AKIANEW\naws_secret_access_key = s\n");
    assert_eq!(base(&bases, Some("admin")).await.unwrap().0, "AKIANEW");
    // What a file no longer says is not used on.
    desk.config("[profile other]\n");
    assert!(base(&bases, Some("admin")).await.is_err());

    desk.config(&format!(
        "[default]\n{KEYS}[profile admin]\nrole_arn = arn:aws:iam::111122223333:role/admin\nsource_profile = default\n"
    ));
    for (body, said) in [
        (
            DENIED,
            "no base credentials: role arn:aws:iam::111122223333:role/admin of the profile: AccessDenied: User: x",
        ),
        (SLOWER, "sts asks for fewer calls: Throttling: Rate exceeded"),
    ] {
        desk.amazon.fail("AssumeRole", 400, body);
        // Another change, so that the failure before is not what is told.
        desk.config(&format!(
            "[default]\n{KEYS}output = {}\n[profile admin]\nrole_arn = arn:aws:iam::111122223333:role/admin\nsource_profile = default\n",
            said.len()
        ));
        let error = base(&bases, Some("admin")).await.unwrap_err().to_string();
        assert!(error.starts_with(said), "{error}");
        let asked = desk.amazon.asked().len();
        assert_eq!(base(&bases, Some("admin")).await.unwrap_err().to_string(), error);
        assert_eq!(desk.amazon.asked().len(), 0, "many sessions have one base: {asked}");
    }
}

#[tokio::test(start_paused = true)]
async fn changes_of_files_are_seen() {
    let directory = tempfile::tempdir().unwrap();
    let setup = Setup {
        profile: None,
        region: None,
        files: AwsFiles::find(Some(directory.path()), |_| None),
        allow_process: false,
        instance_metadata: None,
        variables: HashMap::new(),
    };
    let bases = Bases::new(setup, Clock::scripted(SystemTime::UNIX_EPOCH + HOUR * 1_000));
    let mut changes = bases.changes();
    let _watching = tokio::spawn(bases.clone().watch_files());
    tokio::time::sleep(LOOK * 3).await;
    assert!(!changes.has_changed().unwrap());
    let cache = directory.path().join("sso/cache");
    std::fs::create_dir_all(&cache).unwrap();
    for path in [
        directory.path().join("config"),
        directory.path().join("credentials"),
        cache.join("x.json"),
    ] {
        for text in ["a", "bb"] {
            std::fs::write(&path, text).unwrap();
            tokio::time::sleep(LOOK * 2).await;
            assert!(changes.has_changed().unwrap(), "{}", path.display());
            changes.borrow_and_update();
        }
    }
}

#[tokio::test]
async fn sso_tokens_are_refreshed_and_written_back() {
    let desk = Desk::new().await;
    desk.config(SSO);
    let bases = desk.bases();
    let path = desk.token(3600, true);
    assert_eq!(
        base(&bases, Some("dev")).await.unwrap(),
        ("ASIASSO".into(), "profile dev (sso)".into())
    );
    assert_eq!(desk.amazon.asked(), ["GetRoleCredentials old-access"]);
    for expires_in in [60, -60] {
        desk.token(expires_in, true);
        base(&bases, Some("dev")).await.unwrap();
        let asked = desk.amazon.asked();
        assert!(
            asked[0].starts_with("CreateToken") && asked[0].contains("old-refresh"),
            "{asked:?}"
        );
        assert_eq!(asked[1], "GetRoleCredentials new-access");
        let written: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(written["accessToken"], "new-access");
        assert_eq!(written["refreshToken"], "new-refresh");
        assert_eq!(written["startUrl"], "https://corp", "what else was there is kept");
    }
}

#[tokio::test]
async fn a_cache_that_cannot_be_written_and_a_clock_that_goes_back_stop_nothing() {
    let desk = Desk::new().await;
    desk.config(SSO);
    let bases = desk.bases();
    let path = desk.token(-60, true);
    // A link is read through, and not written through.
    std::fs::rename(&path, desk.path("token")).unwrap();
    std::os::unix::fs::symlink(desk.path("token"), &path).unwrap();
    base(&bases, Some("dev")).await.unwrap();
    assert_eq!(desk.amazon.asked().len(), 2);
    assert!(
        std::fs::read_to_string(desk.path("token"))
            .unwrap()
            .contains("old-refresh")
    );
    // The refreshed one is in memory; the old refresh token is good for once only.
    desk.amazon.fail("CreateToken", 400, r#"{"error":"invalid_grant"}"#);
    desk.clock.jump(-36_000_000);
    bases.get(Some("dev"), HOUR * 20).await.unwrap();
    assert_eq!(desk.amazon.asked(), ["GetRoleCredentials new-access"]);
    // Somebody logs in again: that counts.
    desk.amazon.work();
    std::fs::remove_file(&path).unwrap();
    desk.clock.heard_from_aws(SystemTime::now());
    desk.token(3600, true);
    base(&bases, Some("dev")).await.unwrap();
    assert_eq!(desk.amazon.asked(), ["GetRoleCredentials old-access"]);
    // The SDK's own provider panics when it refreshes twice and the clock has gone back between.
    for jump in [-36_000_000, 36_000_000, -36_000_000] {
        desk.token(-60, true);
        desk.clock.jump(jump);
        base(&bases, Some("dev")).await.unwrap();
    }
}

#[tokio::test]
async fn who_must_log_in_is_told_how() {
    let desk = Desk::new().await;
    desk.config(SSO);
    let attention = |why: &str| ProviderError::NeedsAttention {
        why: format!("profile dev: {why}"),
        command: "aws sso login --profile dev".into(),
    };
    assert_eq!(
        base(&desk.bases(), Some("dev")).await.unwrap_err(),
        attention("nobody has logged in to IAM Identity Center")
    );
    desk.token(-60, false);
    let expired = attention("its login to IAM Identity Center has expired");
    assert_eq!(base(&desk.bases(), Some("dev")).await.unwrap_err(), expired);
    desk.token(-60, true);
    desk.amazon.fail(
        "CreateToken",
        400,
        r#"{"__type":"InvalidGrantException","error":"invalid_grant"}"#,
    );
    assert_eq!(base(&desk.bases(), Some("dev")).await.unwrap_err(), expired);
    // As long as the old one is good, a refresh that fails stops nobody.
    desk.token(60, true);
    assert!(base(&desk.bases(), Some("dev")).await.is_ok());
    // What passes is not a person's matter.
    desk.token(-60, true);
    desk.amazon
        .fail("CreateToken", 500, r#"{"__type":"InternalServerException"}"#);
    let error = base(&desk.bases(), Some("dev")).await.unwrap_err();
    assert!(matches!(error, ProviderError::Unavailable(_)), "{error}");
    desk.token(3600, true);
    desk.amazon.work();
    for (status, body, said) in [
        (
            401,
            r#"{"__type":"UnauthorizedException","message":"Session token not found or invalid"}"#,
            "needs attention: profile dev: its login to IAM Identity Center has ended; run: aws sso login --profile dev",
        ),
        (
            403,
            r#"{"__type":"ForbiddenException","message":"No access"}"#,
            "no base credentials: profile dev: IAM Identity Center gives no role Dev in account 111122223333: ForbiddenException: No access",
        ),
        (
            429,
            r#"{"__type":"TooManyRequestsException","message":"x"}"#,
            "sts asks for fewer calls: TooManyRequestsException",
        ),
    ] {
        desk.amazon.fail("GetRoleCredentials", status, body);
        assert_eq!(base(&desk.bases(), Some("dev")).await.unwrap_err().to_string(), said);
    }
    desk.config(&format!(
        "[profile mfa]\nrole_arn = r\nmfa_serial = m\nsource_profile = mfa\n{KEYS}"
    ));
    assert_eq!(
        base(&desk.bases(), Some("mfa")).await.unwrap_err().to_string(),
        "needs attention: profile \"mfa\" wants an MFA code (mfa_serial), which a daemon cannot give; run: \
         aws configure export-credentials --profile mfa | imds-router login --profile mfa --stdin"
    );
}

#[tokio::test]
async fn what_is_handed_over_counts_until_it_ends() {
    let desk = Desk::new().await;
    let bases = desk.bases();
    let mut changes = bases.changes();
    let hand = |until: Option<Duration>, token| {
        let until = until.map(|it| desk.clock.aws() + it);
        bases.hand_over(
            Some("dev"),
            HandedOver {
                keys: keys("ASIAHANDED", token),
                until,
            },
        )
    };
    assert!(hand(None, None).unwrap_err().contains("long-lived keys"));
    let past = HandedOver {
        keys: keys("ASIAHANDED", Some("t")),
        until: Some(desk.clock.aws() - HOUR),
    };
    assert!(
        bases
            .hand_over(None, past)
            .unwrap_err()
            .contains("have expired already")
    );
    assert!(base(&bases, Some("dev")).await.is_err());
    assert!(!changes.has_changed().unwrap());
    hand(Some(HOUR), Some("handed-token")).unwrap();
    assert!(changes.has_changed().unwrap());
    changes.borrow_and_update();
    let origin = "handed over by imds-router login";
    assert_eq!(
        base(&bases, Some("dev")).await.unwrap(),
        ("ASIAHANDED".into(), origin.into())
    );
    assert_eq!(bases.states()[&Some("dev".to_owned())].origin.as_deref(), Some(origin));
    assert!(!format!("{:?} {:?}", bases, bases.states()).contains("handed-secret"));
    // It ends: whoever handed it over is wanted again.
    desk.clock.suspend(3_600_000);
    let command = "aws configure export-credentials --profile dev | imds-router login --profile dev --stdin";
    assert_eq!(
        base(&bases, Some("dev")).await.unwrap_err(),
        ProviderError::NeedsAttention {
            why: "profile dev: what was handed over has expired".into(),
            command: command.into()
        }
    );
    // Files that have become good meanwhile are, too.
    desk.config(&format!("[profile dev]\n{KEYS}"));
    assert_eq!(base(&bases, Some("dev")).await.unwrap().0, "AKIAKEYS");
    // One base, whether it is named or the daemon's own.
    let setup = Setup {
        profile: Some("dev".into()),
        ..desk.setup(&[])
    };
    let bases = Bases::new(setup, desk.clock.clone());
    let handed = HandedOver {
        keys: keys("ASIAOWN", Some("t")),
        until: None,
    };
    bases.hand_over(None, handed).unwrap();
    assert_eq!(base(&bases, Some("dev")).await.unwrap().0, "ASIAOWN");
    assert_eq!(base(&bases, None).await.unwrap().0, "ASIAOWN");
}

#[test]
fn what_a_person_has_to_do_is_said_again_every_five_minutes() {
    let mut shown = Shown::default();
    let attention = |why: &str| ProviderError::NeedsAttention {
        why: why.into(),
        command: "c".into(),
    };
    let mut said = Vec::new();
    // Asked every 10 s for a quarter of an hour; after 400 s it is something else.
    for second in (0..900).step_by(10) {
        let error = attention(if second < 400 { "one" } else { "other" });
        if shown.says(Some(&error), Duration::from_secs(second)) {
            said.push(second);
        }
        shown.state.error = Some(error);
    }
    assert_eq!(said, [0, 300, 400, 700]);
    assert!(!shown.says(Some(&ProviderError::NoBase("x".into())), HOUR));
    assert!(!shown.says(None, HOUR));
}

#[tokio::test]
async fn credentials_that_sts_does_not_know_are_fetched_anew() {
    let desk = Desk::new().await;
    let counter = desk.path("runs");
    let program = format!(
        "echo x >> {0}; echo '{{\"Version\":1,\"AccessKeyId\":\"AKIARUN'$(wc -l < {0})'\",\"SecretAccessKey\":\"s\"}}'",
        counter.display()
    );
    desk.config(&format!("[profile run]\ncredential_process = {program}\n"));
    let bases = desk.bases();
    let sts = Sts::new(bases.clone(), desk.clock.clone());
    let role = RoleArn::parse("arn:aws:iam::111122223333:role/x").unwrap();
    let mut session = RoleSession::new(role, "s1", HOUR, "eu-west-1");
    session.profile = Some("run".into());
    let session = Session::Role(session);
    given(&sts, &session).await.unwrap();
    given(&sts, &session).await.unwrap();
    assert_eq!(
        base(&bases, Some("run")).await.unwrap().0,
        "AKIARUN1",
        "long-lived keys are kept"
    );
    desk.amazon.fail("AssumeRole", 403, UNKNOWN);
    let error = given(&sts, &session).await.unwrap_err().to_string();
    assert_eq!(error, "no base credentials: InvalidClientTokenId: not valid");
    assert_eq!(
        bases.states()[&Some("run".to_owned())]
            .error
            .as_ref()
            .unwrap()
            .to_string(),
        error
    );
    assert!(base(&bases, Some("run")).await.is_err(), "not at once");
    desk.clock.suspend(1_000);
    assert_eq!(base(&bases, Some("run")).await.unwrap().0, "AKIARUN2");
    // And less and less often, as long as STS does not take them.
    let mut runs = Vec::new();
    for second in 0..40 {
        if given(&sts, &session).await.unwrap_err().to_string() != error {
            panic!("it is the same all the time");
        }
        runs.push((second, std::fs::read_to_string(&counter).unwrap().lines().count()));
        desk.clock.suspend(1_000);
    }
    runs.dedup_by_key(|(_, count)| *count);
    assert_eq!(runs, [(0, 2), (2, 3), (6, 4), (14, 5), (29, 6)]);
    desk.amazon.work();
    desk.clock.suspend(60_000);
    given(&sts, &session).await.unwrap();
    bases.forget("run");
    assert_eq!(bases.states().len(), 0);
}

#[tokio::test]
async fn a_base_that_fails_is_asked_less_and_less_often() {
    let desk = Desk::new().await;
    desk.config(&format!(
        "[default]\n{KEYS}[profile p]\nrole_arn = arn:aws:iam::111122223333:role/p\nsource_profile = default\n"
    ));
    desk.amazon.fail("AssumeRole", 403, DENIED);
    let bases = desk.bases();
    let mut asked = Vec::new();
    for second in 0..60 {
        assert!(base(&bases, Some("p")).await.is_err());
        if !desk.amazon.asked().is_empty() {
            asked.push(second);
        }
        desk.clock.suspend(1_000);
    }
    assert_eq!(asked, [0, 1, 3, 7, 15, 30, 45]);
    desk.amazon.work();
    desk.config(&format!(
        "[default]\n{KEYS}[profile p]\nrole_arn = arn:aws:iam::111122223333:role/q\nsource_profile = default\n"
    ));
    assert!(base(&bases, Some("p")).await.is_ok(), "a change ends it");
}

fn as_it_is(profile: &str) -> Session {
    Session::Profile(ProfileSession {
        profile: Some(profile.to_owned()),
        duration: HOUR,
        region: "eu-west-1".into(),
    })
}

async fn given(sts: &Sts, session: &Session) -> Result<Credentials, ProviderError> {
    sts.prepare(session).await?;
    sts.credentials(session).await
}

#[tokio::test]
async fn a_profile_is_served_with_temporary_credentials_only() {
    let desk = Desk::new().await;
    desk.config(&format!(
        "{SSO}[profile keys]\n{KEYS}[profile temporary]\n{KEYS}aws_session_token = file-token\n"
    ));
    desk.token(3600, true);
    let sts = desk.sts();
    let exchanged = given(&sts, &as_it_is("keys")).await.unwrap();
    assert_eq!(exchanged.access_key_id, "ASIAGetSessionToken");
    assert!(
        exchanged.secret_access_key.reveal() == "made-secret",
        "and not the file's"
    );
    let asked = desk.amazon.asked();
    assert!(
        asked[0].contains("GetSessionToken") && asked[0].contains("DurationSeconds=3600"),
        "{asked:?}"
    );
    let sso = given(&sts, &as_it_is("dev")).await.unwrap();
    assert_eq!(
        (sso.access_key_id.as_str(), sso.token.reveal()),
        ("ASIASSO", "sso-token")
    );
    let life = sso.expiration.duration_since(sso.updated).unwrap();
    assert!(life.abs_diff(HOUR) < Duration::from_secs(5), "{life:?}");
    // At 40 % of its life it is fetched anew, although the base would do for roles.
    desk.amazon.asked();
    desk.clock.suspend(25 * 60_000);
    given(&sts, &as_it_is("dev")).await.unwrap();
    assert_eq!(desk.amazon.asked(), [] as [String; 0], "more than half is left");
    desk.clock.suspend(10 * 60_000);
    given(&sts, &as_it_is("dev")).await.unwrap();
    assert_eq!(desk.amazon.asked(), ["GetRoleCredentials old-access"]);
    let error = given(&sts, &as_it_is("temporary")).await.unwrap_err().to_string();
    assert!(error.contains("nothing says until when it is good"), "{error}");
}

#[tokio::test]
async fn what_sts_says_no_to() {
    let desk = Desk::new().await;
    desk.config(&format!("[profile p]\n{KEYS}aws_session_token = file-token\n"));
    let sts = desk.sts();
    let identity = sts.base_identity(Some("p")).await.unwrap();
    assert_eq!(
        (identity.account.as_str(), identity.arn.as_str()),
        ("111122223333", IDENTITY)
    );
    let role = RoleArn::parse("arn:aws:iam::111122223333:role/x").unwrap();
    let mut session = RoleSession::new(role, "s1", HOUR, "eu-west-1");
    session.profile = Some("p".into());
    let session = Session::Role(session);
    let made = given(&sts, &session).await.unwrap();
    assert_eq!(made.expiration.duration_since(made.updated).unwrap(), HOUR);
    for (status, body, said) in [
        (403, DENIED, "denied by sts: AccessDenied: User: x is not authorized"),
        (400, SLOWER, "sts asks for fewer calls: Throttling: Rate exceeded"),
        (
            403,
            EXPIRED,
            "needs attention: the session credentials of profile p (keys) have expired; run: \
             aws configure export-credentials --profile p | imds-router login --profile p --stdin",
        ),
    ] {
        desk.amazon.fail("AssumeRole", status, body);
        assert_eq!(given(&sts, &session).await.unwrap_err().to_string(), said);
    }
    desk.amazon.fail("AssumeRole", 503, "<html>no</html>");
    desk.clock.suspend(60_000);
    let error = given(&sts, &session).await.unwrap_err();
    assert!(matches!(error, ProviderError::Unavailable(_)), "{error}");
}

#[tokio::test]
async fn a_clock_that_is_ten_hours_off_is_no_reason_to_fail() {
    for (jump, skew) in [(-36_000_000, -36_000), (36_000_000, 36_000)] {
        let desk = Desk::new().await;
        desk.config(&format!("[profile p]\n{KEYS}"));
        let sts = desk.sts();
        // The stand-in's Date is the machine's, and it takes what is signed within five minutes of it.
        desk.clock.jump(jump);
        sts.base_identity(Some("p")).await.unwrap();
        assert_eq!(
            desk.amazon.asked().len(),
            2,
            "the second is signed with what the first told of the time"
        );
        let heard = desk.clock.skew().aws.unwrap();
        assert!((heard - skew).abs() <= 2, "{heard}");
        sts.base_identity(Some("p")).await.unwrap();
        assert_eq!(desk.amazon.asked().len(), 1, "and it is remembered");
        // It jumps again, back to where it should be.
        desk.clock.jump(-jump);
        let role = RoleArn::parse("arn:aws:iam::111122223333:role/x").unwrap();
        let mut session = RoleSession::new(role, "s1", HOUR, "eu-west-1");
        session.profile = Some("p".into());
        let made = given(&sts, &Session::Role(session)).await.unwrap();
        assert_eq!(desk.amazon.asked().len(), 1);
        assert!(made.expiration.duration_since(made.updated).unwrap() <= HOUR);
        assert!(desk.clock.skew().aws.unwrap().abs() <= 2);
    }
}

fn role_by(profile: &str) -> Session {
    let role = RoleArn::parse("arn:aws:iam::111122223333:role/web").unwrap();
    let mut session = RoleSession::new(role, "web@here".to_owned(), HOUR, "eu-west-1");
    session.profile = Some(profile.to_owned());
    Session::Role(session)
}

/// Time is paused: it passes only while all tasks wait for it.
#[tokio::test(start_paused = true)]
async fn an_answer_may_take_thirty_seconds() {
    let desk = Desk::new().await;
    desk.config("[profile dev]\naws_access_key_id = AKIADEV\naws_secret_access_key = s\n");
    let sts = desk.sts();
    let session = role_by("dev");
    *desk.amazon.takes.lock().unwrap() = Duration::from_secs(6);
    let credentials = sts.credentials(&session).await.unwrap();
    assert_eq!(credentials.access_key_id, "ASIAAssumeRole");
    *desk.amazon.takes.lock().unwrap() = HOUR;
    let start = desk.clock.now();
    let error = sts.credentials(&session).await.unwrap_err();
    let took = desk.clock.now() - start;
    assert!(matches!(error, ProviderError::Unavailable(_)), "{error}");
    let expected = Duration::from_secs(30)..Duration::from_secs(36);
    assert!(expected.contains(&took), "{took:?}");
}

#[tokio::test]
async fn answers_without_end_are_refused() {
    let desk = Desk::new().await;
    desk.config("[profile dev]\naws_access_key_id = AKIADEV\naws_secret_access_key = s\n");
    // A valid answer, were it read whole.
    let whole = format!(
        "<AssumeRoleResponse>{}</AssumeRoleResponse>",
        "x".repeat(50 * 1024 * 1024)
    )
    .leak();
    desk.amazon.fail("AssumeRole", 200, whole);
    let error = desk.sts().credentials(&role_by("dev")).await.unwrap_err();
    assert!(matches!(error, ProviderError::Unavailable(_)), "{error}");
    assert!(
        error.to_string().contains("the answer has more than 1048576 bytes"),
        "{error}"
    );
    let long = HashMap::from([("ec2", (200, &*whole))]);
    *desk.amazon.fails.lock().unwrap() = long;
    let service = format!("http://{}", desk.amazon.address);
    let error = instance_profile::credentials(&service, http::client())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("the answer has more than 1048576 bytes"),
        "{error}"
    );
}

#[tokio::test]
async fn a_program_that_prints_without_end_is_ended() {
    let command = Secret::new("yes");
    let ended = tokio::time::timeout(Duration::from_secs(20), process("p", &command)).await;
    let error = ended.expect("it reads without end").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("its credential_process gives no credentials")
    );
}
