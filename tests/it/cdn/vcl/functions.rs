//! The functions of Fastly's VCL that the snippets call, as its reference describes them.

use aes::Aes256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::run::Value;

/// Names, and how many arguments they take.
const KNOWN: &[(&str, std::ops::RangeInclusive<usize>)] = &[
    ("table.lookup", 2..=3),
    ("table.contains", 2..=2),
    ("std.prefixof", 2..=2),
    ("std.strlen", 1..=1),
    ("std.atoi", 1..=1),
    ("std.tolower", 1..=1),
    ("substr", 2..=3),
    ("subfield", 3..=3),
    ("urldecode", 1..=1),
    ("digest.hmac_sha256", 2..=2),
    ("digest.secure_is_equal", 2..=2),
    ("crypto.decrypt_hex", 6..=6),
    ("bin.hex_to_base64", 1..=1),
];

pub fn check(name: &str, arguments: usize) -> Result<(), String> {
    match KNOWN.iter().find(|(known, _)| *known == name) {
        Some((_, takes)) if takes.contains(&arguments) => Ok(()),
        Some(_) => Err(format!("{name} does not take {arguments} arguments")),
        None => Err(format!("unknown function {name}")),
    }
}

/// All but those of tables. What is not set counts as the empty string, as in a STRING parameter.
pub fn call(name: &str, arguments: &[Value]) -> Result<Value, String> {
    let text = |at: usize| arguments[at].text().map(str::to_owned);
    Ok(match name {
        // An empty string is no prefix.
        "std.prefixof" => Value::Bool(!text(1)?.is_empty() && text(0)?.starts_with(&text(1)?)),
        "std.strlen" => Value::Number(text(0)?.len() as i64),
        "std.atoi" => Value::Number(text(0)?.parse().map_err(|_| "std.atoi of what is no number")?),
        "std.tolower" => Value::Text(text(0)?.to_lowercase()),
        "substr" => {
            let (all, from) = (text(0)?, arguments[1].number()? as usize);
            let length = arguments.get(2).map_or(Ok(i64::MAX), Value::number)?;
            Value::Text(all.chars().skip(from).take(length as usize).collect())
        }
        "subfield" => {
            let (all, name, separator) = (text(0)?, text(1)?, text(2)?);
            let mut fields = all.split(&*separator).filter_map(|field| field.split_once('='));
            fields
                .find(|(key, _)| key.eq_ignore_ascii_case(&name))
                .map_or(Value::NotSet, |(_, value)| Value::Text(value.into()))
        }
        "urldecode" => {
            let text = text(0)?.replace('+', " ");
            Value::Text(percent_encoding::percent_decode_str(&text).decode_utf8_lossy().into_owned())
        }
        "digest.hmac_sha256" => {
            let mut mac = Hmac::<Sha256>::new_from_slice(text(0)?.as_bytes()).expect("any length");
            mac.update(text(1)?.as_bytes());
            Value::Text(format!("0x{}", hex::encode(mac.finalize().into_bytes())))
        }
        "digest.secure_is_equal" => Value::Bool(text(0)? == text(1)?),
        "crypto.decrypt_hex" => decrypt(arguments)?,
        "bin.hex_to_base64" => {
            Value::Text(STANDARD.encode(hex::decode(text(0)?).map_err(|e| e.to_string())?))
        }
        other => return Err(format!("unknown function {other}")),
    })
}

/// Upper case, which Fastly does not rule out.
fn decrypt(arguments: &[Value]) -> Result<Value, String> {
    let text = |at: usize| arguments[at].text();
    if (text(0)?, text(1)?, text(2)?) != ("aes256", "ctr", "nopad") {
        return Err("another cipher than aes256, ctr, nopad".into());
    }
    let bytes = |at: usize| hex::decode(text(at).unwrap_or_default());
    let (Ok(key), Ok(iv), Ok(mut body)) = (bytes(3), bytes(4), bytes(5)) else { return Ok(Value::NotSet) };
    let Ok(mut cipher) = Ctr128BE::<Aes256>::new_from_slices(&key, &iv) else { return Ok(Value::NotSet) };
    cipher.apply_keystream(&mut body);
    Ok(Value::Text(hex::encode_upper(body)))
}
