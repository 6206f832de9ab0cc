//! CDNs: each connector over its vendor's API, the code at its edge in what runs it there, and the shield behind real
//! caches.

pub(crate) mod caches;
mod cloudflare;
mod cloudflare_stub;
mod cloudflare_worker;
mod cloudflare_workerd;
#[cfg(feature = "cdn-cloudfront")]
mod cloudfront;
mod custom;
mod documented;
mod fastly;
mod fastly_cli;
mod fastly_edge;
mod fastly_stub;
mod fastly_vcl;
mod served;
mod troubles;
mod vcl;
mod whole;
mod witness;

/// On a runtime of its own.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}
