//! Who am I? Asks STS with whatever the default credential chain of the SDK finds, as any application would.
//!
//! ```text
//! docker exec orders /usr/local/bin/whoami
//! arn:aws:sts::111122223333:assumed-role/orders/orders@host
//! ```

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = aws_config::load_defaults(aws_config::BehaviorVersion::latest()).await;
    let identity = aws_sdk_sts::Client::new(&config)
        .get_caller_identity()
        .send()
        .await
        // The SDK's own Display is two words; the chain behind it says which provider failed and why.
        .map_err(|e| format!("{}", aws_sdk_sts::error::DisplayErrorContext(&e)))?;
    println!("{}", identity.arn().ok_or("STS answered without an ARN")?);
    Ok(())
}
