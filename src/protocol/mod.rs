//! How EC2 says it: replies, and the one table from refusal to status.

pub mod request;
pub mod token;

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::ext::ReasonPhrase;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

/// Request header with the wanted life of a token, and reply header with what is left of it, in seconds.
pub const TTL_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
/// Request header with a token.
pub const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
/// Our own reply header: why a proven container got what it got. People use curl.
pub const HINT_HEADER: HeaderName = HeaderName::from_static("x-imds-router-hint");

/// The value of `Server` on EC2. Some programs conclude from it alone that they run on EC2.
const SERVER: HeaderValue = HeaderValue::from_static("EC2ws");

/// `Keep-Alive`: for how many seconds an idle connection stays open.
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// EC2's page for a path that does not exist (imds-contract 1.3; byte equality is not needed by any client).
const NOT_FOUND: &str = concat!(
    "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n",
    "<!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"\n",
    "\t\"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n",
    "<html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n",
    " <head>\n",
    "  <title>404 - Not Found</title>\n",
    " </head>\n",
    " <body>\n",
    "  <h1>404 - Not Found</h1>\n",
    " </body>\n",
    "</html>\n",
);

/// Why a request gets no value. The one table to a status is [`Refused::status`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Refused {
    /// Nobody knows who asks.
    Unproven,
    /// The endpoint is off for this container, or it carries no label of ours.
    Disabled,
    /// `Host` names somebody else, stands twice, or there is an `Origin`: a web page asks.
    Host,
    /// The PUT came through a proxy.
    Forwarded,
    /// A PUT anywhere but at the one path of tokens.
    Put,
    /// The wanted life of a token is missing or out of bounds.
    Ttl,
    /// Anything but GET, HEAD, and PUT and OPTIONS of a token.
    Method,
    /// GET and the like on the path of tokens.
    TokenMethod,
    /// No token where one is needed, or one that is not good.
    Token,
    /// No such path, no role, another role's name.
    NotFound,
    /// The engine has not told yet who runs here.
    NotReady,
    /// The container has as many open connections as it may, and none became idle in time.
    TooManyConnections,
}

impl Refused {
    /// The status of this refusal.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Unproven | Self::Disabled | Self::Host | Self::Forwarded | Self::Put => StatusCode::FORBIDDEN,
            Self::Ttl => StatusCode::BAD_REQUEST,
            Self::Method | Self::TokenMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::Token => StatusCode::UNAUTHORIZED,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::NotReady | Self::TooManyConnections => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Whether the caller is known to be a container that finds a metadata service.
    fn as_ec2(self) -> bool {
        !matches!(
            self,
            Self::Unproven | Self::Disabled | Self::NotReady | Self::TooManyConnections
        )
    }

    /// Methods that the path takes, for a 405.
    fn allow(self) -> Option<&'static str> {
        match self {
            Self::TokenMethod => Some("OPTIONS, PUT"),
            Self::Method => Some("GET, HEAD"),
            _ => None,
        }
    }
}

/// Whether a request asks for the connection to stay open: `keep-alive` is in the list of `Connection`, `close` is not. EC2
/// closes the connection otherwise, also after HTTP/1.1 (imds-contract 1.1).
pub fn asks_keep_alive(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::CONNECTION).iter();
    let options = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let mut keep_alive = false;
    for option in options.map(<[u8]>::trim_ascii) {
        if option.eq_ignore_ascii_case(b"close") {
            return false;
        }
        keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
    }
    keep_alive
}

/// An answer, before it is bytes.
#[derive(Clone, Debug)]
pub struct Reply {
    status: StatusCode,
    content_type: &'static str,
    body: Bytes,
    allow: Option<&'static str>,
    /// Seconds that the token of the request, or the token in the body, is good for.
    ttl: Option<u32>,
    last_modified: Option<HeaderValue>,
    /// The connection closes after this answer, whatever the request asks for.
    last: bool,
    /// For how many seconds the connection stays open without a request. `None`: it closes after this answer.
    keep_alive: Option<u64>,
    hint: Option<HeaderValue>,
    /// Whether the caller is a container that finds a metadata service.
    as_ec2: bool,
}

impl Reply {
    fn new(status: StatusCode, content_type: &'static str, body: Bytes) -> Self {
        Self {
            status,
            content_type,
            body,
            allow: None,
            ttl: None,
            last_modified: None,
            last: false,
            keep_alive: None,
            hint: None,
            as_ec2: true,
        }
    }

    /// A value, last set at `last_modified`.
    pub fn value(body: Bytes, last_modified: HeaderValue) -> Self {
        let mut reply = Self::new(StatusCode::OK, "text/plain", body);
        reply.last_modified = Some(last_modified);
        reply
    }

    /// Bytes as somebody gave them, which may be no text.
    pub fn bytes(body: Bytes, last_modified: HeaderValue) -> Self {
        let mut reply = Self::value(body, last_modified);
        reply.content_type = "application/octet-stream";
        reply
    }

    /// A new token.
    pub fn token(token: String, ttl: u32) -> Self {
        Self::new(StatusCode::OK, "text/plain", token.into()).with_ttl(Some(ttl))
    }

    /// The answer to OPTIONS on the path of tokens.
    pub fn token_options() -> Self {
        let mut reply = Self::new(StatusCode::OK, "text/plain", Bytes::new());
        reply.allow = Refused::TokenMethod.allow();
        reply
    }

    /// No value. Empty, but for 404, which has EC2's page.
    pub fn refused(why: Refused) -> Self {
        let (content_type, body) = match why {
            Refused::NotFound => ("text/html", Bytes::from_static(NOT_FOUND.as_bytes())),
            _ => ("text/plain", Bytes::new()),
        };
        let mut reply = Self::new(why.status(), content_type, body);
        reply.allow = why.allow();
        // Whoever is not proven, or not meant to be here, is not kept on the line.
        reply.last = matches!(
            why,
            Refused::Unproven | Refused::Disabled | Refused::NotReady | Refused::Host | Refused::TooManyConnections
        );
        reply.as_ec2 = why.as_ec2();
        reply
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// As the last answer of its connection.
    #[must_use]
    pub fn last(mut self) -> Self {
        self.last = true;
        self
    }

    /// As an answer after which the connection stays open for `idle`, if it is not the last one.
    #[must_use]
    pub fn keep_alive(mut self, idle: Duration) -> Self {
        self.keep_alive = Some(idle.as_secs());
        self
    }

    /// With the time that the request's token has left.
    #[must_use]
    pub fn with_ttl(mut self, seconds: Option<u32>) -> Self {
        self.ttl = seconds;
        self
    }

    /// With a hint for the person behind a proven container. Text that does not fit into a header is left out.
    #[must_use]
    pub fn with_hint(mut self, hint: &str) -> Self {
        self.hint = HeaderValue::from_bytes(hint.as_bytes()).ok();
        self
    }

    /// As hyper sends it.
    pub fn into_response(self) -> Response<Full<Bytes>> {
        let length = self.body.len();
        let mut response = Response::new(Full::new(self.body));
        *response.status_mut() = self.status;
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            // EC2 says it so (imds-contract 1.2).
            response
                .extensions_mut()
                .insert(ReasonPhrase::from_static(b"Not Allowed"));
        }
        let headers = response.headers_mut();
        if let Some(ttl) = self.ttl {
            headers.insert(TTL_HEADER, ttl.into());
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        if let Some(last_modified) = self.last_modified {
            headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("none"));
            headers.insert(header::LAST_MODIFIED, last_modified);
        }
        if let Some(allow) = self.allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        if let Some(hint) = self.hint {
            headers.insert(HINT_HEADER, hint);
        }
        // Said here, because hyper leaves it out of the answer to a HEAD when there is no body.
        headers.insert(header::CONTENT_LENGTH, length.into());
        if self.as_ec2 {
            headers.insert(header::SERVER, SERVER);
        }
        match self.keep_alive.filter(|_| !self.last) {
            Some(seconds) => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("keep-alive"));
                headers.extend(HeaderValue::try_from(format!("timeout={seconds}")).map(|value| (KEEP_ALIVE, value)));
            }
            None => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_refusals() {
        for (why, status, allow, page) in [
            (Refused::Unproven, 403, None, false),
            (Refused::Disabled, 403, None, false),
            (Refused::Host, 403, None, false),
            (Refused::Forwarded, 403, None, false),
            (Refused::Put, 403, None, false),
            (Refused::Ttl, 400, None, false),
            (Refused::Method, 405, Some("GET, HEAD"), false),
            (Refused::TokenMethod, 405, Some("OPTIONS, PUT"), false),
            (Refused::Token, 401, None, false),
            (Refused::NotFound, 404, None, true),
            (Refused::NotReady, 503, None, false),
            (Refused::TooManyConnections, 503, None, false),
        ] {
            let reply = Reply::refused(why);
            assert_eq!(reply.status, status, "{why:?}");
            assert_eq!(reply.allow, allow, "{why:?}");
            assert_eq!(!reply.body.is_empty(), page, "{why:?}");
            let strangers = [
                Refused::Unproven,
                Refused::Disabled,
                Refused::NotReady,
                Refused::TooManyConnections,
            ];
            let server = reply.into_response().headers().get("server").cloned();
            assert_eq!(server, (!strangers.contains(&why)).then_some(SERVER), "{why:?}");
        }
        assert_eq!(NOT_FOUND.len(), 337);
    }
    #[test]
    fn keep_alive_is_a_token_of_any_case_in_any_list() {
        for (values, expected) in [
            (&[][..], false),
            (&["keep-alive"], true),
            (&["Keep-Alive"], true),
            (&["te, KEEP-ALIVE ,x"], true),
            (&["te", "keep-alive"], true),
            (&["keep-alives"], false),
            (&["x-keep-alive"], false),
            (&["keep-alive, close"], false),
            (&["Close", "keep-alive"], false),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::CONNECTION, HeaderValue::from_static(value));
            }
            assert_eq!(asks_keep_alive(&headers), expected, "{values:?}");
        }
    }

    #[test]
    fn answer_says_whether_the_connection_stays_open() {
        let idle = Duration::from_secs(15);
        let open = (Some("keep-alive"), Some("timeout=15"));
        let closed = (Some("close"), None);
        for (reply, expected) in [
            (Reply::token_options(), closed),
            (Reply::token_options().keep_alive(idle), open),
            (Reply::token_options().keep_alive(idle).last(), closed),
            (Reply::refused(Refused::Token).keep_alive(idle), open),
            (Reply::refused(Refused::Host).keep_alive(idle), closed),
            (Reply::refused(Refused::TooManyConnections).keep_alive(idle), closed),
        ] {
            let response = reply.into_response();
            let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap());
            assert_eq!((header("connection"), header("keep-alive")), expected);
        }
    }
}
