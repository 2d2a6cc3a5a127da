//! One HTTP exchange by curl, from wherever the caller has put curl: a container, the engine's host, another's namespace.

use std::fmt;
use std::process::Command;

use super::shell::Done;

/// Where every EC2 client looks.
pub const IMDS: &str = "http://169.254.169.254";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    /// The first header of that name, in whatever case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// Why there was no answer; [`curl`](Self::curl) is its exit code.
#[derive(Debug, Clone)]
pub struct NoReply {
    pub curl: Option<i32>,
    pub why: String,
}

impl NoReply {
    pub fn connection_refused(&self) -> bool {
        self.curl == Some(7) && self.why.contains("Connection refused")
    }

    pub fn unreachable(&self) -> bool {
        self.curl == Some(7) && self.why.contains("No route to host")
    }

    pub fn timed_out(&self) -> bool {
        self.curl == Some(28)
    }
}

impl fmt::Display for NoReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Adds the arguments for this request to `curl`, a command that ends in the word `curl`, and runs it.
pub fn request(mut curl: Command, method: &str, url: &str, headers: &[(&str, &str)]) -> Result<Reply, NoReply> {
    // -v, because only there does curl tell "refused" from "no route".
    curl.args(["-sSvi", "--max-time", "2", "--noproxy", "*"])
        // What the trial says is what goes over the wire.
        .args(["--globoff", "--path-as-is"]);
    match method {
        "HEAD" => curl.arg("--head"),
        _ => curl.args(["-X", method]),
    };
    for (name, value) in headers {
        // To curl, "Name:" means "leave it out", and "Name;" is how an empty value is written.
        curl.arg("-H").arg(match *value {
            "" => format!("{name};"),
            value => format!("{name}: {value}"),
        });
    }
    curl.arg(url);
    let done = Done::of(curl);
    if !done.succeeded() {
        return Err(NoReply {
            curl: done.status.code(),
            why: done.to_string(),
        });
    }
    parse(&done.stdout).ok_or_else(|| NoReply {
        curl: Some(0),
        why: format!("not an HTTP answer: {done}"),
    })
}

fn parse(text: &str) -> Option<Reply> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect();
    Some(Reply {
        status,
        headers,
        body: body.to_owned(),
    })
}
