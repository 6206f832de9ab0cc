//! CDNs: each connector against what stands for its vendor, and the shield behind real caches.

pub(crate) mod caches;
mod custom;
mod documented;
mod whole;
