//! The one place that draws random bytes: the operating system's generator.

use zeroize::Zeroizing;

/// `N` random bytes, fit for keys and nonces; cleared when dropped.
///
/// # Panics
/// When the operating system has no randomness to give: no key may be made then, and nothing that the shield
/// could answer would be safe.
#[expect(clippy::disallowed_methods, reason = "this is the place that draws")]
pub fn random<const N: usize>() -> Zeroizing<[u8; N]> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(&mut bytes[..]).expect("the operating system has randomness to give");
    bytes
}
