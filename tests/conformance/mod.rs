//! What a container must be answered, as a table: one row a request. Asked in process and from real containers.
//!
//! The numbers are those of the table that the project was specified with (EC2's behaviour, from captures and
//! documentation); rows of later features join when these exist.

pub mod tricks;

/// Which token a request carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Token {
    /// No header.
    None,
    /// A good one of this container.
    Good,
    /// A good one of another container.
    Foreign,
    /// One whose time is over.
    Expired,
    /// This text.
    Text(&'static str),
}

/// The tokens that a client of the table holds.
pub struct Tokens {
    pub good: String,
    pub foreign: String,
    pub expired: String,
}

impl Tokens {
    /// The headers of a row's request.
    pub fn headers<'a>(&'a self, row: &Row) -> Vec<(&'a str, &'a str)> {
        let token = match row.token {
            Token::None => None,
            Token::Good => Some(self.good.as_str()),
            Token::Foreign => Some(self.foreign.as_str()),
            Token::Expired => Some(self.expired.as_str()),
            Token::Text(text) => Some(text),
        };
        let token = token.map(|token| ("X-aws-ec2-metadata-token", token));
        row.headers.iter().copied().chain(token).collect()
    }
}

/// A request and what must come back.
#[derive(Clone, Debug)]
pub struct Row {
    pub number: u8,
    pub method: &'static str,
    pub path: &'static str,
    pub token: Token,
    pub headers: &'static [(&'static str, &'static str)],
    pub status: u16,
    pub body: Body,
    /// Headers that must be there, and what they must be; `*` is anything.
    pub expected: &'static [(&'static str, &'static str)],
    /// Headers that must not be there.
    pub absent: &'static [&'static str],
}

/// What the body must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Body {
    /// Nothing at all.
    Empty,
    /// Exactly this.
    Exactly(&'static str),
    /// It holds this, and does not end with a line end.
    Holds(&'static str),
    /// A token: 56 visible characters.
    Token,
    /// EC2's page.
    NotFound,
    /// The credentials document: seven keys in EC2's order, more than 25 minutes of life.
    Credentials,
}

/// Whether tokens are required of the container that asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Optional,
    Required,
}

const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const INSTANCE_ID: &str = "/latest/meta-data/instance-id";
const ROLE_LIST: &str = "/latest/meta-data/iam/security-credentials";

fn row(number: u8, method: &'static str, path: &'static str) -> Row {
    Row {
        number,
        method,
        path,
        token: Token::None,
        headers: &[],
        status: 200,
        body: Body::Empty,
        expected: &[],
        absent: &[],
    }
}

impl Row {
    fn token(mut self, token: Token) -> Self {
        self.token = token;
        self
    }

    fn headers(mut self, headers: &'static [(&'static str, &'static str)]) -> Self {
        self.headers = headers;
        self
    }

    fn gives(mut self, status: u16, body: Body) -> Self {
        (self.status, self.body) = (status, body);
        self
    }

    fn with(mut self, expected: &'static [(&'static str, &'static str)]) -> Self {
        self.expected = expected;
        self
    }

    fn without(mut self, absent: &'static [&'static str]) -> Self {
        self.absent = absent;
        self
    }
}

/// The rows for a container whose role is `app`. Its instance id is `i-0123456789abcdef0` by label.
pub fn rows(mode: Mode) -> Vec<Row> {
    use Body::{Credentials, Empty, Exactly, Holds, NotFound};
    const ID: Body = Exactly("i-0123456789abcdef0");
    const VALUE: &[(&str, &str)] = &[
        ("content-type", "text/plain"),
        ("server", "EC2ws"),
        ("accept-ranges", "none"),
        ("last-modified", "*"),
        ("content-length", "19"),
        ("date", "*"),
    ];
    let token = "/latest/api/token";
    let put = || row(1, "PUT", token);
    let get = |number, path| row(number, "GET", path).token(Token::Good);
    let refused = |row: Row, status| row.gives(status, Empty).with(&[("content-length", "0")]);
    let mut rows = vec![
        put().headers(&[(TTL, "21600")]).gives(200, Body::Token).with(&[
            (TTL, "21600"),
            ("content-type", "text/plain"),
            ("content-length", "56"),
            ("server", "EC2ws"),
        ]),
        put()
            .headers(&[("X-aws-ec2-metadata-token-ttl-seconds", "60")])
            .gives(200, Body::Token)
            .with(&[(TTL, "60")]),
        row(2, "PUT", token).headers(&[(TTL, "1")]).gives(200, Body::Token),
        refused(row(2, "PUT", token).headers(&[(TTL, "21601")]), 400),
        refused(row(2, "PUT", token).headers(&[(TTL, "0")]), 400),
        refused(row(2, "PUT", token).headers(&[(TTL, "-1")]), 400),
        refused(row(2, "PUT", token).headers(&[(TTL, "abc")]), 400),
        refused(row(2, "PUT", token), 400),
        refused(
            row(3, "PUT", token).headers(&[(TTL, "60"), ("X-Forwarded-For", "1.2.3.4")]),
            403,
        ),
        refused(
            row(3, "PUT", token).headers(&[(TTL, "60"), ("Forwarded", "for=1.2.3.4")]),
            403,
        ),
        refused(row(4, "PUT", "/2021-03-23/api/token").headers(&[(TTL, "60")]), 403),
        refused(row(4, "PUT", "/latest/api/token/").headers(&[(TTL, "60")]), 403),
        row(5, "GET", token)
            .gives(405, Empty)
            .with(&[("allow", "OPTIONS, PUT"), ("content-length", "0")]),
        row(5, "OPTIONS", token)
            .gives(200, Empty)
            .with(&[("allow", "OPTIONS, PUT")]),
        refused(row(7, "GET", "/").token(Token::Text("INVALID")), 401),
        refused(row(7, "GET", "/").token(Token::Text("")), 401),
        refused(row(8, "GET", "/").token(Token::Foreign), 401),
        refused(row(8, "GET", INSTANCE_ID).token(Token::Foreign), 401),
        refused(row(9, "GET", INSTANCE_ID).token(Token::Expired), 401),
        get(10, INSTANCE_ID)
            .gives(200, ID)
            .with(VALUE)
            .with(&[(TTL, "*"), ("server", "EC2ws")]),
        get(12, "/latest/meta-data").gives(200, Holds("ami-id\nami-launch-index\n")),
        get(12, "/latest/meta-data/").gives(200, Holds("iam/\ninstance-action\ninstance-id\n")),
        get(12, "/").gives(200, Holds("1.0\n2007-01-19\n")),
        get(12, "/").gives(200, Holds("2024-04-11\nlatest")),
        get(12, "/latest").gives(200, Exactly("dynamic\nmeta-data")),
        get(13, "/latest/meta-data/instance-id/").gives(200, ID),
        get(13, "/latest//meta-data//instance-id").gives(200, ID),
        get(14, "/latest/meta-data/instance-id/x")
            .gives(404, NotFound)
            .with(&[("content-type", "text/html")]),
        get(14, "/latest/meta-data/nonsense").gives(404, NotFound),
        get(14, "/2009-04-05/meta-data/instance-id").gives(404, NotFound),
        row(15, "HEAD", INSTANCE_ID)
            .token(Token::Good)
            .gives(200, Empty)
            .with(VALUE),
        get(16, "/2009-04-04/meta-data/placement/region").gives(200, Exactly("eu-west-1")),
        get(16, "/1.0/meta-data/placement/availability-zone").gives(200, Exactly("eu-west-1a")),
        get(17, ROLE_LIST).gives(200, Exactly("app")),
        get(17, "/latest/meta-data/iam/security-credentials/").gives(200, Exactly("app")),
        get(18, "/latest/meta-data/iam/security-credentials/app").gives(200, Credentials),
        get(18, "/latest/meta-data/iam/security-credentials/app/").gives(200, Credentials),
        get(18, "/latest/meta-data/iam/info").gives(200, Holds("instance-profile/app")),
        get(19, "/latest/meta-data/iam/security-credentials/other").gives(404, NotFound),
        get(19, "/latest/meta-data/iam/security-credentials/ap").gives(404, NotFound),
        get(20, "/latest/meta-data/iam/security-credentials-extended/").gives(404, NotFound),
        get(25, "/latest/user-data").gives(404, NotFound),
        get(18, "/latest/dynamic/instance-identity/document").gives(200, Holds("\"region\" : \"eu-west-1\"")),
        // Host and Origin: a rebound web page must not get in, whatever it sends; before the method, before the token.
        refused(get(0, INSTANCE_ID).headers(&[("Host", "evil.example")]), 403),
        refused(
            get(0, INSTANCE_ID).headers(&[("Origin", "http://169.254.169.254")]),
            403,
        ),
        refused(row(0, "POST", INSTANCE_ID).headers(&[("Host", "evil.example")]), 403),
        refused(
            row(0, "PUT", token).headers(&[("Host", "evil.example"), (TTL, "60")]),
            403,
        ),
        get(0, INSTANCE_ID).headers(&[("Host", "instance-data")]).gives(200, ID),
        row(0, "POST", INSTANCE_ID)
            .gives(405, Empty)
            .with(&[("allow", "GET, HEAD")]),
        row(0, "DELETE", token)
            .gives(405, Empty)
            .with(&[("allow", "OPTIONS, PUT")]),
    ];
    rows.extend(match mode {
        Mode::Required => vec![
            refused(row(6, "GET", "/"), 401),
            refused(row(6, "GET", "/nonsense"), 401),
            refused(row(6, "GET", INSTANCE_ID), 401),
            refused(row(6, "HEAD", INSTANCE_ID), 401),
            refused(row(6, "GET", ROLE_LIST), 401),
        ],
        Mode::Optional => vec![
            row(11, "GET", INSTANCE_ID).gives(200, ID).with(VALUE).without(&[TTL]),
            row(11, "GET", "/latest/meta-data/iam/security-credentials/app").gives(200, Credentials),
            row(11, "GET", "/nonsense").gives(404, NotFound),
        ],
    });
    rows
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Checks an answer against its row. `now`: seconds since 1970 where the credentials are judged.
pub fn check(row: &Row, reply: &Reply, now: u64) -> Result<(), String> {
    let fail = |what: String| {
        Err(format!(
            "row {} {} {} {:?}: {what}\n{reply:?}",
            row.number, row.method, row.path, row.token
        ))
    };
    if reply.status != row.status {
        return fail(format!("status {}, expected {}", reply.status, row.status));
    }
    for (name, value) in row.expected {
        match reply.header(name) {
            Some(found) if *value == "*" || found == *value => {}
            found => return fail(format!("{name}: {found:?}, expected {value:?}")),
        }
    }
    for name in row.absent {
        if let Some(found) = reply.header(name) {
            return fail(format!("{name}: {found:?}, expected none"));
        }
    }
    let text = reply.text();
    let fits = match row.body {
        Body::Empty => text.is_empty(),
        Body::Exactly(expected) => text == expected,
        Body::Holds(part) => text.contains(part) && !text.ends_with('\n'),
        Body::Token => text.len() == 56 && text.bytes().all(|b| b.is_ascii_graphic()),
        Body::NotFound => text.contains("<title>404 - Not Found</title>"),
        Body::Credentials => return credentials(&text, now).or_else(fail),
    };
    if fits {
        Ok(())
    } else {
        fail(format!("body, expected {:?}", row.body))
    }
}

fn credentials(text: &str, now: u64) -> Result<(), String> {
    let keys = [
        "Code",
        "LastUpdated",
        "Type",
        "AccessKeyId",
        "SecretAccessKey",
        "Token",
        "Expiration",
    ];
    let mut at = 0;
    for key in keys {
        at += text[at..]
            .find(&format!("  \"{key}\" : \""))
            .ok_or(format!("{key} is missing or out of order"))?;
    }
    let read: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if read.as_object().map(serde_json::Map::len) != Some(keys.len()) || read["Code"] != "Success" {
        return Err("not the seven keys of a success".to_owned());
    }
    let expiration = read["Expiration"].as_str().unwrap_or_default();
    let seconds = expiration
        .parse::<jiff::Timestamp>()
        .map_err(|error| error.to_string())?
        .as_second();
    if u64::try_from(seconds).unwrap_or(0) < now + 25 * 60 {
        return Err(format!("expires at {expiration}: less than 25 minutes"));
    }
    if text.ends_with('\n') {
        Err("ends with a line end".to_owned())
    } else {
        Ok(())
    }
}
