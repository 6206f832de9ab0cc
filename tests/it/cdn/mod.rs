//! Connectors of CDNs, the APIs that they speak to, and the code at the edges that gives keys out.

mod fastly;
mod fastly_cli;
mod fastly_edge;
mod fastly_stub;
mod fastly_vcl;
mod served;
mod vcl;
