pub mod cipher;
pub mod hls;
pub mod keys;
