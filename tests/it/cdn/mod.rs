//! Connectors of CDNs, against what stands for each vendor's API and edge.

#[cfg(feature = "cdn-cloudfront")]
mod cloudfront;
