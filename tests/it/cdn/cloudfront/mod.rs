//! CloudFront: the connector against three wires, its function as it is shipped, and its signatures by OpenSSL.

mod edge;
mod health;
mod invalidation;
mod rotation;
mod signer;
mod store;
mod wires;
