//! The HTTP client of all calls for credentials: the SDK's default client, with a limit for the size of an answer.

use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};
use aws_smithy_http_client::{Builder, ConnectorBuilder};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};

/// The largest answer. Answers with credentials have a few kilobytes.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// A new client, with connections of its own.
pub fn client() -> SharedHttpClient {
    // As the SDK's own default: rustls, and a proxy by HTTPS_PROXY and the like.
    let unlimited = Builder::new().build_with_connector_fn(|settings, components| {
        let mut builder = ConnectorBuilder::default().tls_provider(tls::Provider::Rustls(CryptoMode::AwsLc));
        builder.set_connector_settings(settings.cloned());
        if let Some(components) = components {
            builder.set_sleep_impl(components.sleep_impl());
        }
        builder.set_proxy_config(Some(ProxyConfig::from_env()));
        builder.build()
    });
    SharedHttpClient::new(LimitedClient(unlimited))
}

#[derive(Debug)]
struct LimitedClient(SharedHttpClient);

impl HttpClient for LimitedClient {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(LimitedConnector(self.0.http_connector(settings, components)))
    }
}

#[derive(Debug)]
struct LimitedConnector(SharedHttpConnector);

impl HttpConnector for LimitedConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let answer = self.0.call(request);
        HttpConnectorFuture::new(async { Ok(answer.await?.map(limited)) })
    }
}

fn limited(body: SdkBody) -> SdkBody {
    let body = Limited::new(body, MAX_ANSWER_BYTES).map_err(|error| match error.is::<LengthLimitError>() {
        true => format!("the answer has more than {MAX_ANSWER_BYTES} bytes").into(),
        false => error,
    });
    SdkBody::from_body_1_x(body)
}
