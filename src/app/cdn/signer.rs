//! `keyshield cdn sign` and `keyshield cdn rotate-signer`: what lets viewers in at CloudFront, and the keys behind it.
//!
//! A rotation takes as long as the longest life of a signature, and its state is in the folder of the keys. So it is not
//! this command that must last: it takes the steps that can be taken, says what is waited for, and is run again.

use std::time::Duration;

use anyhow::{Context, anyhow};
use zeroize::Zeroizing;

use super::SignedWhat;
use crate::cdn::{CloudFront, Step};
use crate::clock::Clock;

/// The signed URL, or a line for each cookie. Whoever has it views.
///
/// # Errors
/// A CDN without a signer; what the signer refuses.
pub(super) fn sign(
    front: &CloudFront,
    what: &SignedWhat,
    ttl: Duration,
    clock: &Clock,
) -> anyhow::Result<Zeroizing<String>> {
    let signer = front.signer().ok_or_else(no_signer)?;
    let expires = clock.now().plus(ttl);
    let text = match (&what.url, &what.cookies) {
        (Some(url), _) => format!("{}\n", signer.sign_url(url, expires)?),
        (None, pattern) => {
            let pattern = pattern.as_deref().unwrap_or_default();
            let cookies = signer.sign_cookies(pattern, expires)?;
            cookies.iter().map(|cookie| format!("{}={}\n", cookie.name, cookie.value)).collect()
        }
    };
    Ok(Zeroizing::new(text))
}

/// Takes the steps that can be taken now; with `wait`, also those that come later. `tell` hears what is waited for.
///
/// # Errors
/// A CDN without a signer; the first step that fails, which the next run goes on with.
pub(super) async fn rotate(
    front: &CloudFront,
    wait: bool,
    clock: &Clock,
    tell: &(dyn Fn(&str) + Sync),
) -> anyhow::Result<String> {
    let group = front.key_group().ok_or_else(no_signer)?;
    loop {
        let step = group.rotate(clock.now()).await.context("the rotation is gone on with by the next run")?;
        let (what, until) = match step {
            Step::WaitsForDeployment { until } => ("until every edge has the new key", until),
            Step::WaitsForOldSignatures { until } => ("until what the old key signed has run out", until),
            // It goes on until it waits or is over.
            _ => break,
        };
        let left = until.since(clock.now());
        let says = format!("the rotation waits {} s, {what}", left.as_secs());
        if !wait {
            return Ok(format!("{says}; run this again then\n"));
        }
        tell(&says);
        tokio::time::sleep(left.max(Duration::from_secs(1))).await;
    }
    status(front).await
}

/// Which key signs, and how far a rotation is.
///
/// # Errors
/// A CDN without a signer; what CloudFront or the folder refuses.
pub(super) async fn status(front: &CloudFront) -> anyhow::Result<String> {
    let status = front.key_group().ok_or_else(no_signer)?.status().await?;
    let rotation = match status.rotation {
        None => "none".to_owned(),
        Some((stage, None)) => stage.to_owned(),
        Some((stage, Some(new))) => format!("{stage}, to {new}"),
    };
    Ok(format!(
        "signs       {}\nin group    {}\nrotation    {rotation}\n",
        status.signing.as_deref().unwrap_or("nothing yet: run keyshield cdn rotate-signer"),
        status.in_group.join(", "),
    ))
}

fn no_signer() -> anyhow::Error {
    anyhow!("it has no signer: give its [cdns.cloudfront] signer_key_group_id and signer_directory")
}
